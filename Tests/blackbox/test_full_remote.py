"""A remote that becomes full: what it tells, recovery points that are dropped, and a failover all the same."""

import json
import os
import random

import nbd

from sites import ROOT, SiteTest, run, wait_for

MIB = 1 << 20
SIZE = 16 * MIB


def fill_up(directory, leave=0):
    """Takes all the space of a file system but `leave` bytes; returns the file to remove."""
    path = os.path.join(directory, "filler")
    space = os.statvfs(directory)
    left = space.f_bavail * space.f_frsize - leave
    with open(path, "wb", buffering=0) as file:
        try:
            while left > 0:
                left -= file.write(bytes(min(left, MIB)))
            while leave == 0:
                file.write(bytes(4096))
        except OSError:
            pass
    return path


class FullRemote(SiteTest):
    def mounted(self, site, kind="tmpfs", size=48):
        """The site's state directory on a small file system of its own."""
        state = f"{site.path}/state"
        os.makedirs(state)
        if kind == "tmpfs":
            run("mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", state)
        else:
            image = f"{site.path}/state.image"
            with open(image, "wb") as file:
                file.truncate(size * MIB)
            run("mkfs.ext4", "-q", "-m", "0", image)
            run("mount", "-o", "loop", image, state)
        self.addCleanup(run, "umount", "-l", state, check=False)
        return state

    def points(self, site):
        return [point["id"] for point in site.points()]

    def series(self, east, west, handle, count):
        """Points, each with one MiB changed; what each of them holds."""
        images = {}
        for _ in range(count):
            handle.pwrite(random.randbytes(MIB), random.randrange(SIZE // MIB) * MIB)
            number = east.cycle()
            images[number] = handle.pread(SIZE, 0)
        self.check(west, images)
        return images

    def check(self, west, images, points=None):
        for number in set(points or images) & set(images):
            self.assertEqual(west.read(f"orders@{number}"), images[number], f"point {number}")

    def link(self, east):
        east.farcopy("resume", "shop")
        wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")

    def files(self, site):
        return {int(name.split(".")[0]) for name in os.listdir(f"{site.path}/state/volumes/orders/copies")}

    # Retention

    def test_a_smaller_keep_counts_at_the_start(self):
        east, west = self.pair({"orders": "16MiB"}, interval="manual", keep=8)
        images = self.series(east, west, east.connect("orders"), 6)
        second = sorted(images)[1]
        west.farcopy("flashcopy", "clone", "orders", str(second), "trial")
        west.stop()
        west.edit("keep = 8", "keep = 2")
        west.start()
        kept = sorted(images)[-2:]
        self.assertEqual(self.points(west), kept)
        wait_for(lambda: self.files(west) & set(images) == set(kept), what="the files to go")
        self.check(west, images, kept)
        self.assertEqual(west.read("orders@trial"), images[second], "what a clone reads through them was handed over")
        self.assertIn("'keep' does not cover", west.farcopy("events", "shop").stdout)
        west.kill()
        west.start()
        self.assertEqual(self.points(west), kept)
        self.assertEqual(west.read("orders@trial"), images[second])
        self.link(east)
        images |= self.series(east, west, east.connect("orders"), 1)
        self.check(west, images, self.points(west))

    # By command

    def test_points_are_dropped_by_number_and_by_age(self):
        east, west = self.pair({"orders": "16MiB"}, interval="manual", keep=8)
        images = self.series(east, west, east.connect("orders"), 6)
        numbers = sorted(images)
        for words, code, expected in (
                (("--drop", "999", "--yes"), 1, "has no point 999"), (("--drop", str(numbers[-1]), "--yes"), 1, "is the newest"),
                (("--drop", str(numbers[0])), 2, "give --yes"), (("--older-than", "soon", "--yes"), 1, "neither a time"),
                (("--drop", "1", "--older-than", "1h"), 2, "exclude each other")):
            done = west.farcopy("points", "shop", *words, check=False)
            self.assertEqual(done.returncode, code, (words, done.stderr))
            self.assertIn(expected, done.stderr)
        self.assertEqual(self.points(west)[-6:], numbers)
        reader = west.connect(f"orders@{numbers[1]}")
        done = west.farcopy("points", "shop", "--drop", str(numbers[0]), str(numbers[1]), "--yes", check=False)
        self.assertIn(f"1 of orders@{numbers[1]}", done.stderr)
        self.assertEqual(self.points(west)[-6:], numbers, "all or nothing")
        reader.shutdown()
        west.farcopy("practice", "shop", "--point", str(numbers[1]))
        # In the middle: what the older point and the practice copy read through them moves to those first.
        done = west.farcopy("points", "shop", "--drop", str(numbers[3]), str(numbers[1]), "--yes")
        self.assertIn(f"point {numbers[1]}, formed", done.stdout)
        self.assertEqual(self.files(west) & {numbers[1], numbers[3]}, set())
        left = [numbers[0], numbers[2], numbers[4], numbers[5]]
        for _ in range(2):
            self.assertEqual(self.points(west)[-4:], left)
            self.check(west, images, left)
            self.assertEqual(west.read("orders@practice"), images[numbers[1]])
            west.kill()
            west.start()
        time = next(point["formed_at"] for point in west.points() if point["id"] == numbers[4])
        report = json.loads(west.farcopy("points", "shop", "--older-than", time, "--yes", "--json").stdout)
        self.assertEqual([point["id"] for point in report["dropped"]][-2:], [numbers[0], numbers[2]])
        self.assertGreaterEqual(report["freed_bytes"], MIB)
        self.assertEqual(self.points(west), numbers[4:])
        report = json.loads(west.farcopy("points", "shop", "--older-than", "0s", "--yes", "--json").stdout)
        self.assertEqual(report["kept"], [{"id": numbers[5], "reason": "it is the newest, which the next one builds on"}])
        self.assertEqual(self.points(west), numbers[5:])
        self.check(west, images, numbers[5:])
        self.link(east)
        images |= self.series(east, west, east.connect("orders"), 2)
        east.kill()
        west.farcopy("failover", "shop", "--point", str(sorted(images)[-2]))
        done = west.farcopy("points", "shop", "--drop", str(sorted(images)[-2]), "--yes", check=False)
        self.assertIn("failed over to", done.stderr)
        west.farcopy("points", "shop", "--drop", str(numbers[5]), "--yes")
        self.assertEqual(west.read("orders"), images[sorted(images)[-2]])

    def test_a_kill_while_points_are_dropped(self):
        library = os.path.join(self.directory, "kill_at_flush.so")
        run("clang", "-O1", "-shared", "-fPIC", "-o", library, os.path.join(ROOT, "Tests/blackbox/kill_at_flush.c"))
        order = os.path.join(self.directory, "kill-at")
        east, west = self.pair({"orders": "16MiB"}, interval="manual", keep=16, start=False)
        west.environment = {**os.environ, "LD_PRELOAD": library, "FARCOPY_KILL_AT": order}
        west.start()
        east.start()
        images = self.series(east, west, east.connect("orders"), 6)
        east.stop()
        for step in range(1, 20):
            before = self.points(west)
            with open(order, "w") as file:
                file.write(str(step))
            done = west.farcopy("points", "shop", "--drop", str(before[1]), "--yes", check=False)
            os.unlink(order)
            if done.returncode == 0:
                break
            west.process.wait(timeout=20)
            west.end()
            west.start()
            after = self.points(west)
            self.assertIn(after, (before, before[:1] + before[2:]))
            wait_for(lambda: self.files(west) == set(after), what="the files to be those of the points")
            self.check(west, images, after)
        self.assertGreater(step, 1)

    # A full disk

    def test_on_a_full_disk_the_oldest_are_dropped_first(self):
        east, west = self.pair({"orders": "16MiB"}, interval="manual", keep=8, start=False)
        state = self.mounted(west)
        west.start()
        east.start()
        images = self.series(east, west, east.connect("orders"), 5)
        fill_up(state)
        numbers = self.points(west)
        done = west.farcopy("points", "shop", "--drop", str(numbers[2]), str(numbers[3]), "--yes", check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn("drop older points first", done.stderr)
        self.assertEqual(self.points(west), numbers)
        free = os.statvfs(state).f_bavail
        west.farcopy("points", "shop", "--drop", *map(str, numbers[:3]), "--yes")
        self.assertGreaterEqual((os.statvfs(state).f_bavail - free) * 4096, MIB, "at once")
        self.assertEqual(self.points(west), numbers[3:])
        self.check(west, images, numbers[3:])

    def test_the_runbook_for_a_full_remote(self):
        """As docs/OPERATIONS.md says."""
        called = os.path.join(self.directory, "called")
        east, west = self.pair({"orders": "16MiB"}, interval="manual", keep=20, start=False)
        state = self.mounted(west)
        west.edit("[site]\n", f'[site]\non_space_low = "echo $FARCOPY_EVENT $FARCOPY_SITE $FARCOPY_PATH >> {called}"\n')
        west.start()
        east.start()
        handle = east.connect("orders")
        images = self.series(east, west, handle, 4)
        self.assertIsNone(west.status().get("alerts"))
        filler = fill_up(state, leave=3 * MIB)
        wait_for(lambda: west.status().get("alerts"), what="the alert")
        alert, = west.status()["alerts"]
        self.assertRegex(alert, rf"space: {state}: its file system is 9\d\.\d % full: 4\d of 48 MiB")
        self.assertIn(f"alert: {alert}", west.farcopy("status").stdout)
        self.assertIn("alert: space", west.farcopy("events").stdout)
        metrics = run("curl", "-s", "--unix-socket", west.control[5:], "http://x/metrics").stdout
        self.assertRegex(metrics, rf'farcopy_filesystem_used_ratio\{{path="{state}"\}} 0\.9')
        wait_for(lambda: os.path.exists(called), what="the command")
        with open(called) as file:
            self.assertEqual(file.read(), f"on_space_low west {state}\n")
        # It becomes full: the site that is full says so, and where.
        handle.pwrite(random.randbytes(SIZE), 0)
        east.farcopy("cycle", "shop")
        wait_for(lambda: east.group()["state"] == "suspended", what="the suspension")
        for text in (west.group()["reason"], west.farcopy("events", "shop").stdout, "".join(west.group()["alerts"])):
            self.assertIn("No space left on device", text)
            self.assertIn(f"{state}/volumes/orders/copies/", text)
        self.assertEqual(west.group()["state"], "suspended")
        self.check(west, images)
        # The runbook.
        os.unlink(filler)
        fill_up(state, leave=256 << 10)
        numbers = [int(line.split("\t")[0]) for line in west.farcopy("points", "shop").stdout.splitlines()]
        self.assertEqual(numbers[-4:], sorted(images))
        dropped = west.farcopy("points", "shop", "--drop", *map(str, numbers[:-1]), "--yes").stdout
        self.assertIn("their files take", dropped)
        os.unlink(filler)  # what else took the space
        self.link(east)
        point = east.cycle()
        self.assertEqual(west.read(f"orders@{point}"), handle.pread(SIZE, 0))
        wait_for(lambda: not west.group().get("alerts"), what="the end of the alert")
        self.assertEqual(west.group()["state"], "mirroring")
        wait_for(lambda: not west.status().get("alerts"), what="the end of the space alert")
        self.assertIn("alert over: space", west.farcopy("events").stdout)

    def test_failover_whatever_is_full(self):
        for kind in ("tmpfs", "ext4"):
            with self.subTest(kind=kind):
                east, west = self.pair({"orders": "16MiB", "wal": "4MiB"}, interval="manual", keep=3, start=False)
                state = self.mounted(west, kind)
                west.start()
                east.start()
                handle = east.connect("orders")
                images = self.series(east, west, handle, 3)
                first = sorted(images)[-3]
                east.kill()
                fill_up(state)
                with self.assertRaises(OSError):
                    with open(f"{state}/more", "wb", buffering=0) as file:
                        for _ in range(1024):
                            file.write(bytes(65536))
                west.farcopy("failover", "shop", "--point", str(first))
                self.assertEqual(west.read("orders"), images[first])
                host = west.connect("orders")
                host.pwrite(b"on" * 2048, 0)
                host.flush()
                image = b"on" * 2048 + images[first][4096:]
                for _ in range(2):
                    self.assertEqual(west.read("orders"), image)
                    west.kill()
                    west.start()
                wait_for(lambda: west.status()["volumes"]["orders"]["restoring_bytes"] == 0, what="the data to be back")
                self.assertEqual(west.read("orders"), image)
                self.put_away_mounted(east, west, state)

    def test_points_that_failed_stay_so(self):
        """A site that was failed over to has no room for what its hosts overwrite: it goes on, and its points fail. None of them is listed or
        served again, not after a kill either, and what the replicator has recorded meanwhile stays."""
        for mirrors in (False, True):
            with self.subTest(mirrors=mirrors):
                east, west = self.pair({"orders": "16MiB"}, interval="manual", keep=8, start=False)
                state = self.mounted(west)
                west.start()
                east.start()
                images = self.series(east, west, east.connect("orders"), 3)
                east.kill()
                west.farcopy("failover", "shop")
                wait_for(lambda: west.status()["volumes"]["orders"]["restoring_bytes"] == 0, what="the restore")
                if mirrors:
                    east.start()
                    west.farcopy("resync", "shop", "--discard", "east", "--yes")
                    self.link(west)
                    west.cycle()
                filler = fill_up(state)
                host = west.connect("orders")
                image = random.randbytes(SIZE)
                host.pwrite(image, 0)
                host.flush()
                wait_for(lambda: max(images) not in self.points(west), what="the end of the points" + west.farcopy("events").stdout[-1500:])
                os.unlink(filler)
                newest = None
                if mirrors:
                    self.link(west)
                    newest = west.cycle()
                for ended in (west.kill, west.kill, west.stop):
                    self.assertNotIn(max(images), self.points(west))
                    self.assertEqual(west.read("orders"), image)
                    for number in images:
                        if number in self.points(west):
                            self.assertEqual(west.read(f"orders@{number}"), images[number])
                        else:
                            with self.assertRaises(nbd.Error, msg=f"point {number} has failed and is served"):
                                west.connect(f"orders@{number}")
                    self.assertNotIn(f"orders@{max(images)}", west.status()["volumes"]["orders"]["exports"])
                    self.assertEqual(west.group()["role"], "primary")
                    if mirrors:
                        self.assertEqual(west.group()["point"]["id"], newest, "the replicator's record was overwritten")
                        self.assertEqual(west.group()["pending_bytes"], 0)
                    ended()
                    west.start()
                if not mirrors:
                    east.start()
                    west.farcopy("resync", "shop", "--discard", "east", "--yes")
                self.link(west)
                point = west.cycle()
                self.assertEqual(east.read(f"orders@{point}"), image)
                self.put_away_mounted(east, west, state)

    def put_away_mounted(self, east, west, state):
        east.end()
        west.end()
        run("umount", "-l", state)
        self.put_away(east, west)
