"""Power loss for real: what hosts had flushed is there, no changed grain is forgotten, no recovery point or FlashCopy is served with
other data than its own; at the primary, at the secondary, at both, during the start that follows, twice in a row, of one disk only.

`REPEAT=10` repeats what has chance in it.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import struct
import threading
import time

import nbd

import closedcut
import test_sequences
from laboratory import on_each_file_system, on_ext4_and_at_length_on_xfs
from sites import REPEAT, byte_count, read_handle, wait_for

MIB = 1 << 20
PAGE = 4096
SIZE = 16 * MIB
VOLUMES = {"orders": "16MiB", "wal": "8MiB"}


class Host(threading.Thread):
    """Writes pages at random places of a volume and flushes now and then, until the server is gone; knows what must be there after power
    loss, and what may be."""

    def __init__(self, site, volume):
        super().__init__(daemon=True)
        self.handle, self.volume = site.connect(volume), volume
        self.before = read_handle(self.handle)
        self.flushed = {}
        self.newer = {}
        self.stopping = False

    @staticmethod
    def page(stamp):
        return struct.pack("<Q", stamp) * (PAGE // 8)

    def run(self):
        try:
            while not self.stopping:
                for _ in range(random.randrange(1, 60)):
                    page, stamp = random.randrange(self.handle.get_size() // PAGE), random.randrange(1, 1 << 63)
                    self.newer.setdefault(page, []).append(stamp)
                    self.handle.pwrite(self.page(stamp), page * PAGE)
                acknowledged = {page: stamps[-1] for page, stamps in self.newer.items()}
                self.handle.flush()
                self.flushed.update(acknowledged)
                self.newer = {}
        except nbd.Error:
            pass

    def stop(self):
        self.stopping = True
        self.join(60)
        assert not self.is_alive(), "a host hangs"

    def check(self, image):
        for page in range(len(image) // PAGE):
            place = slice(page * PAGE, (page + 1) * PAGE)
            content = image[place]
            if page not in self.flushed and content == self.before[place]:
                continue
            stamp, = struct.unpack("<Q", content[:8])
            allowed = {self.flushed.get(page), *self.newer.get(page, ())}
            assert content == self.page(stamp) and stamp in allowed, f"page {page} of {self.volume} is not what was flushed, nor newer"


class PowerTest:
    def apart_pair(self, volumes=VOLUMES, **options):
        """A pair whose sites have a disk for their state and one for their volumes."""
        self.apart = True
        return self.pair(volumes, **options)

    apart = False

    def make_site(self, name, volumes, **options):
        return super().make_site(name, volumes, apart=self.apart, **options)

    @contextlib.contextmanager
    def part(self, name):
        """A part of a test with sites of its own."""
        with self.subTest(name):
            try:
                yield
            finally:
                self.put_away(*self.sites)

    def write(self, site, count=40, volume="orders", flush=True):
        handle = site.connect(volume)
        for _ in range(count):
            handle.pwrite(random.randbytes(PAGE), random.randrange(handle.get_size() // PAGE) * PAGE)
        if flush:
            handle.flush()
        handle.shutdown()

    def mirrored(self, interval="manual", make=None, **options):
        """A pair with a point and data in both volumes, in the state that betrays whoever trusts what power loss left: the bitmaps lie on
        disk with nothing set, and the activity log is empty, since no host wrote the data."""
        east, west = (make or self.pair)(VOLUMES, interval=interval, start=False, **options)
        self.seed(east)
        west.start()
        east.start()
        wait_for(west.points, what="the first copy")
        east.stop()
        east.start()
        self.wait_for_mirroring(east)
        return east, west

    def seed(self, site):
        for volume, size in VOLUMES.items():
            with open(site.image(volume), "wb") as file:
                file.write(random.randbytes(byte_count(size)))
                os.fsync(file.fileno())

    def wait_for_mirroring(self, site):
        wait_for(lambda: site.group()["state"] in ("mirroring", "resyncing"), what="the link")

    def assert_alike(self, primary, secondary, volumes=VOLUMES):
        """Nothing is forgotten: after the next point the sites are equal, as their peers see it and as their files are."""
        self.wait_for_mirroring(primary)
        point = primary.cycle()
        self.assertEqual(primary.group()["state"], "mirroring")
        for volume in volumes:
            self.assert_equal_images(primary.read(volume), secondary.read(f"{volume}@{point}"), f"{volume}@{point}")
        primary.farcopy("suspend", "shop")
        for site in (primary, secondary):
            site.stop()
        for volume in volumes:
            images = []
            for site in (primary, secondary):
                with open(site.image(volume), "rb") as file:
                    images.append(file.read())
            self.assert_equal_images(*images, f"the file of {volume}")

    def assert_equal_images(self, first, second, what):
        self.assertEqual(len(first), len(second), what)
        different = sum(first[at:at + PAGE] != second[at:at + PAGE] for at in range(0, len(first), PAGE))
        self.assertEqual(different, 0, f"{what}: so many pages of {len(first) // PAGE} differ between the sites")

    def begin_start(self, site):
        """Starts the site and returns while it waits for its peer: its volumes are open, and not yet served."""
        site.start(wait=False)
        wait_for(lambda: self.has_open(site, "wal"), what="its volumes")
        time.sleep(0.3)
        assert site.process.poll() is None, site.tail()

    def has_open(self, site, volume):
        wanted, directory = os.stat(site.image(volume)), f"/proc/{site.process.pid}/fd"
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(f"{directory}/{name}"), wanted):
                    return True
        return False

    def waits_for_its_peer(self, site):
        """From now on a start takes so long that it can be interrupted."""
        site.edit('isolation_timeout = "300ms"', 'isolation_timeout = "15s"\non_isolated = "refuse"')


@on_each_file_system
class Answers(PowerTest):
    """What a single answer promises, by what is there after power loss."""

    def test_what_was_written_with_fua_is_there(self):
        """Zeroes and trims change the file's layout only, which a file system writes down later by itself."""
        site = self.site("solo", {"disk": "16MiB"})
        handle = site.connect("disk")
        before = random.randbytes(16 * MIB)
        for at in range(0, len(before), MIB):
            handle.pwrite(before[at:at + MIB], at)
        handle.flush()
        expected = bytearray(before)
        # Each by itself: a flush for one would take the others along.
        for part, (request, data) in enumerate((
                (lambda at: handle.pwrite(b"w" * 3 * PAGE, at, nbd.CMD_FLAG_FUA), b"w" * 3 * PAGE),
                # The page cache takes one that follows another at once.
                (lambda at: [handle.pwrite(b"v" * PAGE, at, flags) for flags in (0, 0, nbd.CMD_FLAG_FUA)], b"v" * PAGE),
                (lambda at: handle.zero(3 * PAGE, at, nbd.CMD_FLAG_FUA), bytes(3 * PAGE)),
                (lambda at: handle.zero(3 * PAGE, at, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE), bytes(3 * PAGE)),
                (lambda at: handle.trim(3 * PAGE, at, nbd.CMD_FLAG_FUA), bytes(3 * PAGE)),
                (lambda at: handle.pwrite(b"n" * 3 * PAGE, at), None))):
            at = part * 2 * MIB + PAGE
            handle.pread(4 * PAGE, at)
            request(at)
            site.lose_power()
            site.start()
            handle = site.connect("disk")
            if data:
                expected[at:at + len(data)] = data
            self.assert_equal_images(site.read("disk"), bytes(expected), f"request {part}")


@on_ext4_and_at_length_on_xfs
class Failing(PowerTest):
    """A file system that fails in the middle of flushes: ext4 lets one that is under way succeed although what it was for is lost."""
    ROUNDS = 10

    def test_a_flush_that_was_answered_counts(self):
        site = self.site("solo", {"orders": "256MiB"})
        pages, flushed = itertools.count(), {}

        def host(handle, durable):
            with contextlib.suppress(nbd.Error):
                while True:
                    page = next(pages)  # of a hole
                    content = random.randbytes(PAGE)
                    handle.pwrite(content, page * PAGE, nbd.CMD_FLAG_FUA if durable else 0)
                    if not durable:
                        handle.flush()
                    flushed[page] = content

        for _ in range(self.ROUNDS):
            hosts = [threading.Thread(target=host, args=(site.connect("orders"), durable), daemon=True) for durable in (True, False)]
            for thread in hosts:
                thread.start()
            before = len(flushed)
            wait_for(lambda: len(flushed) > before + 10, what="flushes")
            time.sleep(random.uniform(0, 0.05))
            site.data_disk.shut_down()
            for thread in hosts:  # until they are told
                thread.join(30)
                self.assertFalse(thread.is_alive(), "a host hangs")
            site.end()
            site.data_disk.come_back()
            site.boot()
            with open(site.image("orders"), "rb") as file:
                for page, content in flushed.items():
                    file.seek(page * PAGE)
                    self.assertEqual(file.read(PAGE), content, f"page {page} was flushed")
            site.start()


@on_each_file_system
class Primary(PowerTest):
    def test_while_hosts_write_and_points_form(self):
        """Twice in a row: what was flushed is there, and both sites come to be equal."""
        for _ in range(REPEAT):
            east, west = self.mirrored(interval="0s")
            hosts = {}
            for _ in range(2):
                for volume in VOLUMES:
                    hosts[volume] = Host(east, volume)
                    hosts[volume].start()
                time.sleep(random.uniform(0.3, 1.2))
                east.lose_power()
                for host in hosts.values():
                    host.stop()
                    self.assertGreater(len(host.flushed), 0)
                east.start()
                for volume, host in hosts.items():
                    host.check(east.read(volume))
            self.assert_alike(east, west)
            self.put_away(east, west)

    def test_while_the_link_is_down(self):
        """The bitmaps of what the peer lacks are in memory only; the activity log must tell."""
        east, west = self.mirrored()
        west.stop()
        self.write(east, 200)
        image = east.read("orders")
        east.lose_power()
        east.start()
        self.assert_equal_images(east.read("orders"), image, "what was flushed")
        west.start()
        self.assert_alike(east, west)

    def test_without_an_activity_log(self):
        """Nobody knows which bits were lost: everything is compared, also if the start that found it missing ended early."""
        for again in (False, True):
            with self.part(again):
                east, west = self.mirrored()
                west.stop()
                self.write(east, 200)
                east.lose_power()
                for volume in VOLUMES:
                    os.unlink(f"{east.state}/volumes/{volume}/activity.log")
                if again:
                    self.waits_for_its_peer(east)
                    self.begin_start(east)
                    east.kill()
                west.start()
                east.start()
                self.assertIn("activity.log is missing", open(east.log).read())
                self.assert_alike(east, west)

    def test_during_the_start_that_follows(self):
        """The process is ended before its volumes are served: what the next finds is no more to be trusted than what this one found."""
        for how in (signal.SIGKILL, signal.SIGTERM, "power"):
            with self.part(how):
                east, west = self.mirrored()
                west.stop()
                self.write(east, 100)
                self.waits_for_its_peer(east)
                east.lose_power()
                self.begin_start(east)
                if how == "power":
                    east.lose_power()
                else:
                    east.kill(how)
                west.start()
                east.start()
                self.assert_alike(east, west)

    def test_a_refused_start_between(self):
        east, west = self.mirrored()
        east.farcopy("flashcopy", "create", "wal", "kept", "--durable")
        west.stop()
        self.write(east, 100)
        self.write(east, 100, "wal")
        east.lose_power()
        # Another file in the place of one of the volumes, by a slip in the configuration.
        shutil.copy(east.image("wal"), east.image("other"))
        east.edit(east.image("wal"), east.image("other"))
        east.start(wait=False)
        self.assertEqual(east.process.wait(30), 1)
        east.end()
        self.assertIn("is another file than the one that was served last", east.tail())
        east.edit(east.image("other"), east.image("wal"))
        west.start()
        east.start()
        self.assert_alike(east, west)

    def test_a_command_that_refuses_isolation_then_a_kill(self):
        """The whole start was done, but hosts were not let in: it counts, and so does what it found."""
        east, west = self.mirrored()
        west.stop()
        self.write(east, 100)
        self.waits_for_its_peer(east)
        east.edit('isolation_timeout = "15s"', 'isolation_timeout = "1s"')
        east.lose_power()
        east.start()
        self.assertIn("does not answer", json.dumps(east.group()))
        east.kill()
        west.start()
        east.start()
        self.assert_alike(east, west)

    def test_first_contact(self):
        """2 s after a secondary was met, whatever of the first copy has been sent: everything that was not must still be sent."""
        for when in ("met", "not yet met"):
            with self.part(when):
                east, west = self.pair(VOLUMES, interval="manual", start=False, options='rate = "1MiB"')
                self.seed(east)
                if when == "met":
                    west.start()
                east.start()
                time.sleep(2)
                east.lose_power()
                east.start()
                self.assertGreater(east.group()["pending_bytes"], SIZE, "nearly everything is still to be sent")
                if when == "not yet met":
                    west.start()
                east.farcopy("rate", "shop", "unlimited")
                self.assert_alike(east, west)

    def test_an_exchanged_secondary(self):
        east, west = self.mirrored()
        west.stop()
        east.farcopy("rate", "shop", "1MiB")
        for volume in VOLUMES:
            shutil.rmtree(f"{west.state}/volumes/{volume}")
            os.truncate(west.image(volume), 0)
        shutil.rmtree(f"{west.state}/groups/shop")
        west.start()
        wait_for(lambda: east.group()["state"] == "copying", what="the first copy to the new secondary")
        time.sleep(2)
        east.lose_power()
        east.start()
        self.assertGreater(east.group()["pending_bytes"], SIZE, "nearly everything is still to be sent")
        east.farcopy("rate", "shop", "unlimited")
        wait_for(west.points, what="the first copy")
        self.assert_alike(east, west)

    def test_one_of_the_two_disks(self):
        for name in ("state_disk", "data_disk"):
            with self.part(name):
                east, west = self.mirrored(make=self.apart_pair)
                west.stop()
                self.write(east, 100)
                self.write(east, 100, "wal", flush=False)
                image = east.read("orders")
                east.lose_power(getattr(east, name))
                east.start()
                self.assert_equal_images(east.read("orders"), image, "what was flushed")
                west.start()
                self.assert_alike(east, west)

    def test_a_state_disk_that_came_back_in_the_same_boot(self):
        """The boot id says that the page cache is as the last process left it. Not if the file system was mounted anew."""
        east, west = self.mirrored(make=self.apart_pair)
        east.farcopy("flashcopy", "create", "orders", "copy")
        west.stop()
        self.write(east, 100)
        east.lose_power(east.state_disk, new_boot=False)
        east.start()
        with self.subTest("FlashCopy"):
            state, = (c["state"] for c in json.loads(east.farcopy("flashcopy", "list", "--json").stdout))
            self.assertEqual(state, "lost")
        west.start()
        self.assert_alike(east, west)


@on_ext4_and_at_length_on_xfs
class Copies(PowerTest):
    def states(self, site):
        return {c["name"]: c["state"] for c in json.loads(site.farcopy("flashcopy", "list", "--json").stdout)}

    def copied(self, site):
        """FlashCopies of every kind, one moment, and everything overwritten since. Returns the image of the moment."""
        image = site.read("orders")
        site.farcopy("flashcopy", "create", "orders", "plain")  # one that is newer than a durable one would be durable too
        site.farcopy("flashcopy", "create", "orders", "durable", "--durable")
        site.farcopy("flashcopy", "create", "orders", "complete", "--copy", "--rate", "0")
        wait_for(lambda: json.loads(site.farcopy("flashcopy", "show", "orders", "complete", "--json").stdout)[0]["state"] == "active"
                 and "complete" in site.farcopy("flashcopy", "show", "orders", "complete").stdout.replace("complete", "", 1),
                 what="the background copy")
        handle = site.connect("orders")
        for at in range(0, SIZE, MIB):
            handle.pwrite(random.randbytes(MIB), at)
        handle.flush()
        handle.shutdown()
        return image

    def check_copies(self, site, image):
        self.assertEqual(self.states(site), {"durable": "active", "plain": "lost", "complete": "active"})
        self.assertEqual(site.read("orders@durable"), image)
        self.assertEqual(site.read("orders@complete"), image)
        with self.assertRaises(nbd.Error):
            site.connect("orders@plain")

    def test_what_survives_is_served_and_what_does_not_is_lost(self):
        site = self.site("solo", {"orders": "16MiB"})
        self.write(site, 1000)
        image = self.copied(site)
        now = site.read("orders")
        for _ in range(2):
            site.lose_power()
            site.start()
            self.assertEqual(site.read("orders"), now)
            self.check_copies(site, image)

    def test_during_the_start_that_follows(self):
        for how in (signal.SIGKILL, signal.SIGTERM, "power"):
            with self.part(how):
                east, west = self.mirrored()
                image = self.copied(east)
                west.stop()
                self.waits_for_its_peer(east)
                east.lose_power()
                self.begin_start(east)
                if how == "power":
                    east.lose_power()
                else:
                    east.kill(how)
                west.start()
                east.start()
                self.check_copies(east, image)
                self.assert_alike(east, west)

    def test_a_complete_copy_of_a_volume_that_has_grown(self):
        """Power loss took bits of the finished background copy; its data is there."""
        site = self.site("solo", {"orders": "16MiB"})
        self.write(site, 2000)
        image = site.read("orders")
        site.farcopy("flashcopy", "create", "orders", "full", "--copy", "--rate", "0")
        listed = lambda: json.loads(site.farcopy("flashcopy", "list", "--json").stdout)  # noqa: E731
        wait_for(lambda: listed()[0]["background_copy"]["complete"], what="the background copy")
        self.write(site, 200)
        site.lose_power()
        site.edit('size = "16MiB"', 'size = "17MiB"')
        site.start()
        self.assertEqual([copy["state"] for copy in listed()], ["active"])
        self.assert_equal_images(site.read("orders@full")[:SIZE], image, "the copy")

    def test_a_restore_goes_on(self):
        """The command had succeeded, so the volume is as it was at the copy's moment; what hosts wrote and flushed since is there too."""
        site = self.site("solo", {"orders": "16MiB"})
        self.write(site, 1000)
        image = site.read("orders")
        site.farcopy("flashcopy", "create", "orders", "good", "--durable")
        handle = site.connect("orders")
        for at in range(0, SIZE, MIB):
            handle.pwrite(random.randbytes(MIB), at)
        handle.shutdown()
        site.farcopy("flashcopy", "restore", "orders", "good")
        handle = site.connect("orders")
        handle.pwrite(b"since" * 800, 5 * PAGE)
        handle.flush()
        site.lose_power()
        site.start()
        now = bytearray(image)
        now[5 * PAGE:5 * PAGE + 4000] = b"since" * 800
        self.assertEqual(site.read("orders"), bytes(now))


    def test_at_once_after_a_restore(self):
        """No host has flushed anything since."""
        site = self.site("solo", {"orders": "16MiB"})
        self.write(site, 500)
        self.write(site, 500, flush=False)
        image = site.read("orders")
        site.farcopy("flashcopy", "create", "orders", "good", "--durable")
        self.write(site, 500)
        site.farcopy("flashcopy", "restore", "orders", "good")
        site.lose_power()
        site.start()
        self.assert_equal_images(site.read("orders"), image, "what was restored")


@on_ext4_and_at_length_on_xfs
class Secondary(PowerTest):
    CUTS = {"data": "8MiB", "log": "8MiB"}
    SIZE = 8 * MIB
    CHAINS = 4

    def writers(self, site):
        return closedcut.Writers(lambda: (site.connect("data"), site.connect("log")), self.SIZE, self.CHAINS)

    def check_points(self, site):
        """Every recovery point that is listed is a closed cut, and a later one holds what an earlier one does."""
        last = None
        for number in [point["id"] for point in site.points()]:
            images = [read_handle(site.connect(f"{name}@{number}")) for name in self.CUTS]
            steps = closedcut.check(*images, self.CHAINS, self.SIZE)
            if last:
                self.assertTrue(all(a <= b for a, b in zip(last, steps)), f"point {number} is older than the one before it")
            last = steps
        return last

    def loses_power(self, make, choose, start_again=lambda site: site.start()):
        """The secondary's power goes in the middle of drains and commits."""
        for _ in range(REPEAT):
            east, west = make(self.CUTS, interval="0s", keep=16)
            east.cycle()
            writers = self.writers(east)
            for _ in range(2):
                writers.start()
                time.sleep(random.uniform(0.3, 0.8))
                before = [point["id"] for point in west.points()]
                # No two points are asked for at once, so what has been told of is committed.
                west.lose_power(*choose(west))
                writers.stop()
                self.assertEqual(writers.errors, [], "hosts of the primary do not notice")
                # Nothing is retired while the points are read.
                east.farcopy("suspend", "shop")
                start_again(west)
                after = [point["id"] for point in west.points()]
                self.assertGreaterEqual(after[-1], before[-1], "a point that was told of is there")
                self.check_points(west)
                east.farcopy("resume", "shop")
            self.assert_alike(east, west, self.CUTS)
            self.put_away(east, west)

    def test_in_the_middle_of_drains_and_commits(self):
        self.loses_power(self.pair, lambda west: ())

    def test_its_state_disk_only(self):
        self.loses_power(self.apart_pair, lambda west: [west.state_disk])

    def test_its_data_disk_only(self):
        self.loses_power(self.apart_pair, lambda west: [west.data_disk])

    def test_during_the_start_that_follows(self):
        def start_again(west):
            west.start(wait=False)
            time.sleep(random.uniform(0, 0.3))
            if west.process.poll() is not None:
                raise AssertionError(west.tail())
            west.lose_power()
            west.start()
        self.loses_power(self.pair, lambda west: (), start_again)

    def test_both_sites(self):
        for _ in range(REPEAT):
            east, west = self.pair(self.CUTS, interval="0s", keep=16)
            east.cycle()
            writers = self.writers(east)
            writers.start()
            time.sleep(1)
            writers.expect_the_end()
            for site in (east, west):
                site.lose_power()
            writers.join()
            west.start()
            self.check_points(west)
            east.start()
            self.assert_alike(east, west, self.CUTS)
            self.put_away(east, west)

    def test_right_after_a_failover(self):
        """Data is still flowing back from the point; hosts of the new primary have flushed a little."""
        for again in (False, True):
            with self.part(again):
                east, west = self.mirrored(interval="manual")
                point = east.group()["point"]["id"]
                image = west.read(f"orders@{point}")
                self.write(east, 2000, flush=False)
                # Sent in part: what has arrived is no part of the point.
                east.farcopy("rate", "shop", "2MiB")
                east.farcopy("cycle", "shop")
                time.sleep(1)
                east.lose_power()
                west.farcopy("failover", "shop")
                handle = west.connect("orders")
                handle.pwrite(b"since" * 800, 5 * PAGE)
                handle.flush()
                west.lose_power()
                if again:
                    west.start(wait=False)
                    time.sleep(0.2)
                    west.lose_power()
                west.start()
                now = bytearray(image)
                now[5 * PAGE:5 * PAGE + 4000] = b"since" * 800
                self.assertEqual(west.group()["role"], "primary")
                self.assert_equal_images(west.read("orders"), bytes(now), "the volume that was failed over to")
                east.start()
                self.assertIn("stale", east.group()["reason"])
                west.farcopy("resync", "shop", "--discard", "east", "--yes")
                self.assert_alike(west, east)

    def test_at_once_after_a_failover(self):
        """No host has flushed anything yet."""
        east, west = self.mirrored(interval="manual")
        image = west.read("orders")
        self.write(east, 1000, flush=False)
        east.farcopy("rate", "shop", "2MiB")
        east.farcopy("cycle", "shop")
        time.sleep(1)
        east.lose_power()
        west.farcopy("rate", "shop", "1MiB")
        west.farcopy("failover", "shop")
        west.lose_power()
        west.start()
        self.assertEqual(west.group()["role"], "primary")
        self.assert_equal_images(west.read("orders"), image, "the volume that was failed over to")

    def test_after_the_roles_were_exchanged(self):
        for loses in ("new primary", "new secondary", "both"):
            with self.part(loses):
                east, west = self.mirrored(interval="0s")
                east.farcopy("switchover", "shop")
                self.write(west, 50)
                image = west.read("orders")
                for site, name in ((west, "new primary"), (east, "new secondary")):
                    if loses in (name, "both"):
                        site.lose_power()
                for site in (east, west):
                    if site.process is None:
                        site.start()
                self.assert_equal_images(west.read("orders"), image, "what was flushed")
                self.assert_alike(west, east)


@on_ext4_and_at_length_on_xfs
class PowerSequences(test_sequences.Sequences):
    """Power loss among the random steps. Hosts' writes are FUA, so what was acknowledged is there after it."""
    write_flags = nbd.CMD_FLAG_FUA

    def test_random_sequences(self):
        self.sequences(int(os.environ.get("SEQUENCES", 2 * REPEAT)))

    def kill(self, site):
        if self.up(site):
            how = self.random.choice((site.kill, site.stop, site.lose_power))
            self.note(how.__name__, site.name)
            how()
