"""Mode `change-volume`: a first intermediate at the primary takes every grain of a point before it is sent, and holds the point once it is
committed; `farcopy restore GROUP --from change-volume`."""

import itertools
import os
import random
import re
import subprocess
import threading
import time

import nbd

import closedcut
from sites import FARCOPY, REPEAT, SiteTest, not_on_devices, run, wait_for

PAGE = 4096
MIB = 1 << 20
SIZE = 16 * MIB
VOLUMES = {"data": "8MiB", "log": "8MiB"}
MODES = {"flashcopy": 'mode = "flashcopy"\n', "global-mirror": 'mode = "global-mirror"\n', "change-volume": 'mode = "change-volume"\n'}


def written(path, size=SIZE):
    """What a file holds, as long as a volume."""
    with open(path, "rb") as file:
        return file.read(size)


class ChangeVolumeTest(SiteTest):
    def linked(self, volumes, interval="manual", mode="change-volume", **options):
        return super().linked(volumes, interval, options=MODES[mode], **options)

    def path(self, site, volume="orders"):
        return os.path.join(site.state, "volumes", volume, "change.volume")

    def filled(self, site):
        wait_for(lambda: site.status()["volumes"][next(iter(site.status()["volumes"]))]["change_volume_lacks_bytes"] == 0,
                 what="an intermediate that lacks nothing")
        wait_for(lambda: "has everything" in site.farcopy("events").stdout, what="that being written down")

    def write(self, site, pages, byte=None, volume="orders"):
        handle = site.connect(volume)
        for page in pages:
            handle.pwrite(byte * PAGE if byte else random.randbytes(PAGE), page * PAGE)
        handle.shutdown()

    def alike(self, primary, secondary, volume="orders"):
        wait_for(lambda: primary.group()["state"] == "mirroring", what="mirroring")
        number = primary.cycle()
        self.assertEqual(secondary.read(f"{volume}@{number}"), primary.read(volume))
        return number

    def half_sent(self, east, byte=b"n"):
        """A newer point of 8 MiB is sent slowly, and in part in the intermediate."""
        handle = east.connect("orders")
        handle.pwrite(byte * 8 * MIB, 0)
        handle.shutdown()
        east.farcopy("rate", "shop", "256KiB")
        east.farcopy("cycle", "shop")
        wait_for(lambda: written(self.path(east))[:PAGE] == byte * PAGE, what="the first grains of the next point")



class Intermediates(ChangeVolumeTest):
    def test_the_intermediate_is_the_committed_point_byte_by_byte(self):
        east, west = self.linked({"orders": "16MiB"})
        for round in range(3):
            self.write(east, range(round * 100, 4096, 7), bytes([65 + round]))
            number = east.cycle()
            self.assertEqual(written(self.path(east)), west.read(f"orders@{number}"))
        self.assertEqual(east.group()["mode"], "change-volume")

    def test_points_are_closed_cuts_while_hosts_write(self):
        east, west = self.linked(VOLUMES, interval="0s")
        east.cycle()
        self.link.delay = 0.01
        writers = closedcut.Writers(lambda: (east.connect("data"), east.connect("log")), 8 * MIB)
        writers.start()
        looked = closedcut.look(west, 6, 6, 8 * MIB)
        writers.stop()
        self.link.delay = 0
        self.assertGreater(looked, 5)
        number = east.cycle()
        images = [west.read(f"{name}@{number}") for name in VOLUMES]
        self.assertEqual(closedcut.check(*images, 6, 8 * MIB), writers.steps)
        for name, image in zip(VOLUMES, images):
            self.assertEqual(written(self.path(east, name), 8 * MIB), image)

    def test_a_killed_primary_goes_on_with_the_point(self):
        east, west = self.linked({"orders": "16MiB"})
        self.filled(east)
        number = self.alike(east, west)
        self.half_sent(east)
        self.write(east, range(1500, 2500), b"o")  # collisions, and others
        east.kill()
        east.start()
        east.farcopy("rate", "shop", "unlimited")
        wait_for(lambda: west.points()[-1]["id"] == number + 1, what="the point that was under way")
        self.assertEqual(west.read(f"orders@{number + 1}"), b"n" * 8 * MIB + bytes(8 * MIB))
        self.assertEqual(written(self.path(east)), b"n" * 8 * MIB + bytes(8 * MIB))
        self.alike(east, west)

    @not_on_devices
    def test_an_empty_volume_costs_its_intermediate_nothing(self):
        east, west = self.linked({"orders": "1TiB"})
        self.write(east, [7, 1000000], b"x")
        number = east.cycle()
        self.filled(east)
        self.assertLess(os.stat(self.path(east)).st_blocks * 512, 64 * MIB)
        self.assertEqual(west.connect(f"orders@{number}").pread(PAGE, 7 * PAGE), b"x" * PAGE)

    def test_a_full_intermediate_costs_a_point_and_no_write(self):
        """Rule 5. Needs root for a small tmpfs."""
        place = os.path.join(self.directory, "small")
        os.mkdir(place)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], check=True)
        self.addCleanup(subprocess.run, ["umount", "-l", place], check=False)
        east, west = self.linked({"orders": "16MiB"}, start=False)
        east.edit("[volumes.orders]\n", f'[volumes.orders]\nchange_volume = "{place}/orders"\n')
        west.start()
        east.start()
        self.write(east, range(4096))
        done = east.farcopy("cycle", "shop", "--wait", check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn("No space left", done.stderr + east.farcopy("events").stdout)
        self.write(east, range(4096), b"y")
        subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
        self.alike(east, west)
        self.assertEqual(written(f"{place}/orders"), east.read("orders"))

    @not_on_devices
    def test_an_intermediate_that_was_exchanged_is_filled_anew(self):
        east, west = self.linked({"orders": "16MiB"})
        self.write(east, range(4096))
        self.alike(east, west)
        self.filled(east)
        for exchange in ("another", "changed", "gone"):
            east.stop()
            if exchange == "another":
                os.rename(self.path(east), self.path(east) + ".old")
                with open(self.path(east), "wb") as file:
                    file.write(b"?" * SIZE)
            elif exchange == "changed":
                with open(self.path(east), "r+b") as file:
                    file.write(b"!" * PAGE)
            else:
                os.unlink(self.path(east))
            east.start()
            wait_for(lambda: written(self.path(east)) == east.read("orders"), what=f"an intermediate after it was {exchange}")
            self.write(east, [5])
            self.alike(east, west)

    def test_wrong_intermediates_are_refused_with_words(self):
        east, west = self.linked({"orders": "16MiB"}, start=False)
        west.start()
        volume = east.image("orders")
        for path, words in ((volume, "is a path of volume 'orders' already"), ("relative", "must be an absolute path")):
            with self.subTest(path=path):
                east.edit("[volumes.orders]\n", f'[volumes.orders]\nchange_volume = "{path}"\n')
                self.refused(east, words)
                east.edit(f'change_volume = "{path}"\n', "")
        small = os.path.join(self.directory, "nowhere", "orders")
        east.edit("[volumes.orders]\n", f'[volumes.orders]\nchange_volume = "{small}"\n')
        self.refused(east, "change_volume", small)

    def test_modes_are_changed_under_a_held_point(self):
        """Each to each other, by a stop or a kill, without a full copy: what one mode has held is not taken for another's."""
        east, west = self.linked({"orders": "16MiB"}, mode="flashcopy")
        self.write(east, range(4096))
        self.alike(east, west)
        ways = ["flashcopy", "global-mirror", "change-volume", "flashcopy", "change-volume", "global-mirror", "flashcopy"]
        for count, (before, after) in enumerate(itertools.pairwise(ways)):
            with self.subTest(before=before, after=after):
                self.write(east, random.sample(range(2048), 100))
                east.farcopy("rate", "shop", "64KiB")
                east.farcopy("cycle", "shop")
                wait_for(lambda: east.group()["rate_bytes_per_second"] > 0, what="the drain")
                self.write(east, random.sample(range(2048), 100))
                east.kill() if count % 2 else east.stop()
                east.edit(MODES[before], MODES[after])
                east.start()
                self.assertEqual(east.group()["mode"], after)
                east.farcopy("rate", "shop", "unlimited")
                self.alike(east, west)
                self.assertLess(east.group()["point"]["bytes"], 2 * MIB, "no full copy")
                if after == "change-volume":
                    wait_for(lambda: written(self.path(east)) == east.read("orders"), what="the intermediate")

    def test_roles_are_exchanged_and_come_back(self):
        east, west = self.linked({"orders": "16MiB"})
        self.write(east, range(4096))
        self.alike(east, west)
        east.farcopy("switchover", "shop")
        self.write(west, random.sample(range(4096), 100))
        number = self.alike(west, east)
        wait_for(lambda: written(self.path(west)) == east.read(f"orders@{number}"), what="west's intermediate")
        west.kill()
        east.farcopy("failover", "shop")
        self.write(east, random.sample(range(4096), 100))
        west.start()
        wait_for(lambda: all(v["restoring_bytes"] == 0 for v in east.status()["volumes"].values()), what="restore")
        wait_for(lambda: west.group()["state"] != "mirroring", what="its finding that it is stale")
        east.farcopy("resync", "shop", "--discard", "west", "--yes")
        number = self.alike(east, west)
        wait_for(lambda: written(self.path(east)) == west.read(f"orders@{number}"), what="east's intermediate")

    def test_kills_at_random_moments(self):
        """Of either site, under load: what is committed is a closed cut, and what the primary restores is that point."""
        east, west = self.linked(VOLUMES, interval="0s")
        east.cycle()
        steps, fetched = [0] * 6, 0
        for turn in range(6 * REPEAT):
            writers = closedcut.Writers(lambda: (east.connect("data"), east.connect("log")), 8 * MIB)
            writers.steps = steps
            writers.start()
            time.sleep(random.uniform(0.2, 1.0))
            site = (east, west)[turn % 2]
            if site is east:
                writers.expect_the_end()
                site.kill()
                writers.join()
            else:
                site.kill()
            site.start()
            wait_for(lambda: east.group()["state"] == "mirroring", what="mirroring")
            if site is west:
                time.sleep(random.uniform(0, 0.5))
                writers.stop()
            done = east.farcopy("restore", "shop", "--from", "change-volume", "--discard")
            number = int(re.search(r"to point (\d+)", done.stdout)[1])
            fetched += "0 B of them" not in done.stdout
            images = [west.read(f"{name}@{number}") for name in VOLUMES]
            steps = list(closedcut.check(*images, 6, 8 * MIB))
            self.assertEqual([east.read(name) for name in VOLUMES], images)
            wait_for(lambda: east.group()["state"] == "mirroring", what="mirroring")
        print(f"  {sum(steps)} steps, point {number}, {fetched} of {6 * REPEAT} restores needed the peer")


class LocalRestore(ChangeVolumeTest):
    def restore(self, site, *words, **options):
        return site.farcopy("restore", "shop", "--from", "change-volume", *words, **options)

    def test_the_committed_point_comes_back_and_what_is_discarded_is_kept(self):
        east, west = self.linked({"orders": "16MiB", "wal": "16MiB"})
        names = ("orders", "wal")
        for name in names:
            self.write(east, range(2048), b"a", name)
        number = east.cycle()
        points = {name: west.read(f"{name}@{number}") for name in names}
        for name in names:
            self.write(east, range(1024, 1280), b"b", name)
        wrong = {name: east.read(name) for name in names}
        done = self.restore(east)
        self.assertIn(f"restored to point {number}: 2.0 MiB written, 0 B of them from the peer", done.stdout)
        for name in names:
            self.assertEqual(east.read(name), points[name])
            self.assertEqual(east.read(f"{name}@before-restore-1"), wrong[name])
        after = east.cycle()
        for name in names:
            self.assertEqual(west.read(f"{name}@{after}"), points[name])
            self.assertEqual(written(self.path(east, name)), points[name])
        self.assertLess(east.group()["point"]["bytes"], MIB, "what is alike is not sent")

    def test_what_is_of_a_newer_point_comes_from_the_peer(self):
        east, west = self.linked({"orders": "16MiB"})
        self.write(east, range(4096), b"a")
        number = self.alike(east, west)
        self.half_sent(east)
        before = east.read("orders")
        self.link.cut()
        wait_for(lambda: east.group()["state"] == "suspended", what="the loss of the link")
        west.stop()
        done = self.restore(east, check=False)
        self.assertEqual(done.returncode, 1)
        for words in ("a part of a newer point", "'west'"):
            self.assertIn(words, done.stderr)
        self.assertEqual(east.read("orders"), before, "nothing has changed")
        self.write(east, [4000], b"c")  # hosts are let in
        self.link.mend()
        west.start()
        wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="mirroring")
        self.assertEqual(west.points()[-1]["id"], number)
        done = self.restore(east, "--discard")
        self.assertNotIn("0 B of them from the peer", done.stdout)
        self.assertEqual(east.read("orders"), b"a" * SIZE)
        east.farcopy("rate", "shop", "unlimited")
        self.alike(east, west)

    def test_hosts_are_asked_for(self):
        east, west = self.linked({"orders": "16MiB"})
        self.write(east, range(100), b"a")
        self.alike(east, west)
        handle = east.connect("orders")
        handle.pwrite(b"b" * PAGE, 0)
        done = self.restore(east, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn("open for writing", done.stderr)
        self.assertIn("1 connections ended", self.restore(east, "--yes").stdout)
        with self.assertRaises(nbd.Error):
            handle.pread(PAGE, 0)
        self.assertEqual(east.read("orders")[:PAGE], b"a" * PAGE)

    def test_refusals(self):
        east, west = self.linked({"orders": "16MiB"}, mode="flashcopy")
        east.cycle()
        for site, words in ((east, "have no change volumes"), (west, "give this command to its primary")):
            done = self.restore(site, check=False)
            self.assertEqual(done.returncode, 1)
            self.assertIn(words, done.stderr)
        done = east.farcopy("restore", "shop", "--from", "nowhere", check=False)
        self.assertIn("nothing to restore from", done.stderr)

    @not_on_devices
    def test_a_volume_that_was_lost_comes_back_with_no_peer(self):
        east, west = self.linked({"orders": "16MiB"})
        self.write(east, range(4096))
        self.alike(east, west)
        self.filled(east)
        point = east.read("orders")
        east.kill()
        west.stop()
        path = east.image("orders")
        os.unlink(path)
        with open(path, "wb") as file:
            file.truncate(SIZE)
        run(FARCOPY, "adopt", "orders", "--config", east.config)
        east.start()
        self.assertEqual(east.read("orders"), bytes(SIZE))
        done = self.restore(east, "--discard")
        self.assertIn("16.0 MiB written, 0 B of them from the peer", done.stdout)
        self.assertEqual(east.read("orders"), point)
        west.start()
        number = self.alike(east, west)
        self.assertEqual(west.read(f"orders@{number}"), point)
        self.assertLess(east.group()["point"]["bytes"], MIB, "differences alone")

    @not_on_devices
    def test_a_restore_that_cannot_end_is_given_up_by_command(self):
        east, west = self.linked({"orders": "16MiB"})
        self.write(east, range(2048), b"a")
        self.alike(east, west)
        self.write(east, range(1024), b"b")
        before = east.read("orders")
        os.truncate(self.path(east), 0)  # behind the site's back
        done = self.restore(east, check=False)
        self.assertEqual(done.returncode, 1)
        for words in ("Hosts are shut out", "farcopy abort restore:shop", "before-restore-1"):
            self.assertIn(words, done.stderr)
        with self.assertRaises(AssertionError):
            east.read("orders")
        self.assertEqual(self.restore(east, check=False).returncode, 1)
        self.assertIn("as they were", east.farcopy("abort", "restore:shop").stdout)
        wait_for(lambda: "orders" in east.status()["volumes"]["orders"]["exports"], what="the export")
        self.assertEqual(east.read("orders@before-restore-1"), before)
        self.write(east, [9])
        self.alike(east, west)

    def test_a_restore_goes_on_after_a_kill(self):
        east, west = self.linked({"orders": "256MiB"})
        handle = east.connect("orders")
        for at in range(0, 256, 4):
            handle.pwrite(b"a" * 4 * MIB, at * MIB)
        handle.shutdown()
        east.cycle()
        handle = east.connect("orders")
        for at in range(0, 256, 4):
            handle.pwrite(b"b" * 4 * MIB, at * MIB)
        handle.shutdown()
        killed = False
        for delay in (0.05, 0.1, 0.2, 0.02):
            command = threading.Thread(target=lambda: self.restore(east, "--discard", check=False))
            command.start()
            time.sleep(delay)
            east.kill()
            command.join()
            east.start(wait=True)
            killed = killed or "goes on" in east.farcopy("events").stdout

            def is_whole():
                try:
                    return east.read("orders") in (b"a" * 256 * MIB, b"b" * 256 * MIB)
                except AssertionError:
                    return False  # hosts are shut out

            wait_for(is_whole, what="all or nothing of the restore")
        self.assertTrue(killed)
        self.alike(east, west)
