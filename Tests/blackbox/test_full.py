"""Disks that are full, and flushes that fail, for real. ENOSPC ends what asked for the space, with words that name the path, and nothing
else; a flush that failed is never followed by one that succeeds, until the volume is opened anew.
"""

import json
import os
import random
import time

import nbd

from laboratory import LaboratoryTest, LoopDevice, SmallFileSystem
from sites import FARCOPY, REPEAT, Site, read_handle, run, wait_for

MIB = 1 << 20
PAGE = 4096
SIZE = 16 * MIB


class FullTest(LaboratoryTest):
    def make_site(self, name, volumes, small=False, **options):
        """`small`: its state directory lies on a small file system."""
        if small:
            disk = SmallFileSystem(os.path.join(self.directory, name + "-state"), self.kind)
            self.addCleanup(disk.end)
            options["state"] = os.path.join(disk.path, "state")
        site = Site(self.directory, name, volumes, **options)
        site.environment = {**os.environ, "SWIFT_BACKTRACE": "enable=no"}
        site.disk = disk if small else None
        return site

    def assert_alive(self, site, when):
        code = site.process.poll()
        if code is not None:
            site.end()
            self.fail(f"{site.name} ended with {code} {when}\n{site.tail()}")

    def assert_says_so(self, text, path):
        self.assertIn("No space left", text)
        self.assertIn(path, text)

    def write(self, site, count=20, volume="disk"):
        """What hosts write succeeds, whatever is full."""
        handle = site.connect(volume)
        for _ in range(count):
            handle.pwrite(random.randbytes(PAGE), random.randrange(SIZE // PAGE) * PAGE)
        handle.flush()
        handle.shutdown()

    def start_while_full(self, site):
        """Served, or refused with words: never a signal. Returns whether it is served."""
        site.start(wait=False)
        if site.process.stdout.readline() == "ready\n":
            return True
        code = site.process.wait(30)
        site.end()
        self.assertEqual(code, 1, f"{site.name} ended with {code}\n{site.tail()}")
        self.assert_says_so(site.tail(), site.state)
        return False


class FullStateDirectory:
    """The state directory's file system is full; the volumes' is not."""

    def solo(self):
        site = self.site("solo", {"disk": "16MiB"}, small=True)
        self.write(site, 400)
        return site

    def names(self, site):
        found = json.loads(site.farcopy("flashcopy", "list", "--json").stdout)
        return {c["name"]: c["state"] for c in found}

    def test_creating_copies_in_what_room_there_is(self):
        """From no room at all, page by page, until one can be made: files, their bitmaps and the growing record fail in turn."""
        site = self.solo()
        images, failed = {}, 0
        for number in range(24):
            site.disk.fill(leave=number % 8 * PAGE)
            for again in ("a", "b"):
                name = f"{again}{number}"
                image = site.read("disk")
                done = site.farcopy("flashcopy", "create", "disk", name, check=False)
                self.assert_alive(site, f"when a FlashCopy was made with {number % 8} pages left")
                if done.returncode == 0:
                    images[name] = image
                else:
                    failed += 1
                    self.assert_says_so(done.stderr, site.state)
                    self.assertNotIn(name, self.names(site))
                self.assertIn("current", run(FARCOPY, "inspect", f"{site.state}/volumes/disk/volume.record").stdout)
        self.assertGreater(failed, 0, "the disk was never full")
        # No room for old content: a copy that cannot take it fails, hosts do not.
        site.disk.fill()
        self.write(site)
        self.assert_alive(site, "when a host wrote under copies")
        now, states = site.read("disk"), self.names(site)
        self.assertEqual(set(states), set(images))
        for name in [name for name in images if states[name] == "active"]:
            self.assertEqual(site.read(f"disk@{name}"), images[name], name)
        site.kill()
        if self.start_while_full(site):
            self.write(site, 5)
            now = site.read("disk")
            site.kill()
        site.disk.free()
        site.start()
        self.assertEqual(site.read("disk"), now)
        for name, state in self.names(site).items():
            if state == "active":
                self.assertEqual(site.read(f"disk@{name}"), images[name], name)
        site.farcopy("flashcopy", "create", "disk", "room")

    def test_a_write_under_a_copy_whose_target_lies_elsewhere(self):
        """Only the bitmap needs room on the full disk."""
        site = self.solo()
        image = site.read("disk")
        site.farcopy("flashcopy", "create", "disk", "copy", "--target", f"{site.path}/target")
        site.disk.fill()
        self.write(site)
        self.assert_alive(site, "when a host wrote under a copy")
        if self.names(site)["copy"] == "active":
            self.assertEqual(site.read("disk@copy"), image)
        site.kill()
        if not self.start_while_full(site):
            site.disk.free()
            site.start()
        self.write(site)
        if self.names(site)["copy"] == "active":
            self.assertEqual(site.read("disk@copy"), image)

    def test_other_commands_on_copies(self):
        site = self.solo()
        for name in ("a", "b"):
            site.farcopy("flashcopy", "create", "disk", name)
        image = site.read("disk@b")
        for command in (("clone", "disk", "a", "c"), ("refresh", "disk", "a"), ("restore", "disk", "b"), ("set", "disk", "b", "--writable"),
                        ("withdraw", "disk", "a")):
            site.disk.fill()
            done = site.farcopy("flashcopy", *command, check=False)
            self.assert_alive(site, f"after {command}")
            if done.returncode:
                self.assert_says_so(done.stderr, site.state)
            self.write(site, 2)
            self.assert_alive(site, f"when a host wrote after {command}")
        site.kill()
        site.disk.free()
        site.start()
        if self.names(site).get("b") == "active":
            self.assertEqual(len(site.read("disk@b")), len(image))
        site.farcopy("flashcopy", "create", "disk", "room")

    def full_pair(self, which):
        # `pair` makes both; only one has a small disk.
        make = self.make_site
        self.make_site = lambda name, volumes, **options: make(name, volumes, small=name == which, **options)
        east, west = self.pair({"disk": "16MiB"}, interval="manual")
        self.write(east, 200)
        east.cycle()
        return east, west

    def assert_alike(self, primary, secondary):
        primary.farcopy("resume", "shop", check=False)
        wait_for(lambda: primary.group()["state"] in ("mirroring", "resyncing"), what="the link")
        point = primary.cycle()
        self.assertEqual(secondary.read(f"disk@{point}"), primary.read("disk"))

    def test_a_point_at_a_full_primary(self):
        east, west = self.full_pair("east")
        for leave in (0, 0, PAGE, 2 * PAGE):
            east.disk.fill(leave)
            self.write(east, 50)
            done = east.farcopy("cycle", "shop", "--wait", check=False)
            self.assert_alive(east, f"when a point was formed with {leave} bytes left")
            self.write(east, 50)
            self.assert_alive(east, "when a host wrote while the point was held")
            if done.returncode:
                self.assert_says_so(done.stderr + east.farcopy("events").stdout + json.dumps(east.group()), east.state)
        east.kill()
        if self.start_while_full(east):
            self.write(east, 5)
            east.kill()
        east.disk.free()
        east.start()
        self.assert_alike(east, west)

    def test_commits_at_a_full_secondary(self):
        east, west = self.full_pair("west")
        before = west.points()[-1]["id"]
        image = west.read(f"disk@{before}")
        for leave in (0, 0, PAGE, 2 * PAGE, 5 * PAGE):
            west.disk.fill(leave)
            self.write(east, 50)
            east.farcopy("resume", "shop", check=False)
            done = east.farcopy("cycle", "shop", "--wait", check=False, timeout=60)
            self.assert_alive(west, f"at a commit with {leave} bytes left")
            if done.returncode:
                self.assertIn("No space left", done.stderr + east.farcopy("events").stdout + json.dumps(east.group()))
            self.assertIn("current", run(FARCOPY, "inspect", f"{west.state}/groups/shop/group.record").stdout)
        if before in [point["id"] for point in west.points()]:
            self.assertEqual(west.read(f"disk@{before}"), image)
        west.kill()
        if self.start_while_full(west):
            west.kill()
        west.disk.free()
        west.start()
        self.assert_alike(east, west)

    def test_a_commit_that_was_not_recorded_is_none(self):
        """What the secondary says it has, it has: the next session, and a failover, find no point that has no files."""
        east, west = self.full_pair("west")
        for _ in range(3):
            west.disk.fill()
            self.write(east, 50)
            east.farcopy("cycle", "shop", "--wait", check=False, timeout=60)
            west.disk.free()
            east.farcopy("resume", "shop", check=False)
            wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")
            for point in west.points():
                west.connect(f"disk@{point['id']}").shutdown()
        point = east.cycle()
        image = east.read("disk")
        self.assertEqual(west.read(f"disk@{point}"), image)
        east.kill()
        west.farcopy("failover", "shop")
        self.assertEqual(west.read("disk"), image)

    def test_a_failover_at_a_full_secondary(self):
        east, west = self.full_pair("west")
        image = east.read("disk")
        self.write(east, 300)
        east.farcopy("rate", "shop", "256KiB")
        east.farcopy("cycle", "shop")
        time.sleep(1)
        west.disk.fill()
        east.kill()
        west.farcopy("failover", "shop")
        self.assert_alive(west, "at a failover")
        self.assertEqual(west.read("disk"), image)
        handle = west.connect("disk")
        handle.pwrite(b"w" * PAGE, 0)
        handle.flush()
        image = b"w" * PAGE + image[PAGE:]
        wait_for(lambda: west.status()["volumes"]["disk"]["restoring_bytes"] == 0, what="the end of the restore")
        self.assertEqual(west.read("disk"), image)
        west.kill()
        west.start()
        self.assertEqual(west.group()["role"], "primary")
        self.assertEqual(west.read("disk"), image)

    def test_a_failover_that_could_not_be_recorded_is_none(self):
        """Either hosts can write after it, or it says why not, and can be asked for again when there is room."""
        east, west = self.full_pair("west")
        image = east.read("disk")
        east.kill()
        west.disk.fill()
        for _ in range(2):
            done = west.farcopy("failover", "shop", check=False)
            self.assert_alive(west, "at a failover")
            if done.returncode == 0:
                break
            self.assert_says_so(done.stderr, west.state)
        else:
            west.disk.free()
            west.farcopy("failover", "shop")
        handle = west.connect("disk")
        handle.pwrite(b"w" * PAGE, 0)
        handle.flush()
        self.assertEqual(read_handle(handle), b"w" * PAGE + image[PAGE:])


class FullStateTmpfs(FullStateDirectory, FullTest):
    kind = "tmpfs"


class FullStateExt4(FullStateDirectory, FullTest):
    kind = "ext4"


class FileWithoutSpace:
    """A file of an ext4 on a device of which the space under the file can be taken away: what is written there succeeds, and its write-back
    fails. The file system's own blocks keep theirs."""

    def __init__(self, test, name):
        self.disk = SmallFileSystem(os.path.join(test.directory, name), "tmpfs", 56 * MIB)
        test.addCleanup(self.disk.end)
        self.device = LoopDevice(os.path.join(self.disk.path, "under"), 48 * MIB)
        test.addCleanup(self.device.detach)
        place = os.path.join(test.directory, name + "-fs")
        os.mkdir(place)
        run("mkfs.ext4", "-q", "-O", "^has_journal", "-b", "4096", self.device.path)
        run("mount", self.device.path, place)
        test.addCleanup(run, "umount", "--lazy", place, check=False)
        self.path = os.path.join(place, "volume.img")
        with open(self.path, "wb") as file:
            file.write(b"z" * SIZE)
            os.fsync(file.fileno())
        self.first = list(self.extents())  # a volume that is zeroed gives them up, and may get them again

    def extents(self):
        """(offset in the file, offset on the device, bytes) of each."""
        for line in run("filefrag", "-e", "-b4096", self.path).stdout.splitlines():
            fields = line.replace("..", " ").replace(":", " ").split()
            if fields and fields[0].isdigit():
                yield int(fields[1]) * 4096, int(fields[3]) * 4096, int(fields[5]) * 4096

    def fill(self):
        for at, place, length in {*self.first, *self.extents()}:
            # The first MiB stays.
            kept = min(length, max(0, MIB - at))
            if length > kept:
                run("fallocate", "--punch-hole", "--offset", str(place + kept), "--length", str(length - kept), self.device.backing)
        self.disk.fill()

    def free(self):
        self.disk.free()

    def under(self, offset, length):
        data = bytearray(length)
        for at, place, count in self.extents():
            first, end = max(at, offset), min(at + count, offset + length)
            if first < end:
                data[first - offset:end - offset] = self.device.under(place + first - at, end - first)
        return bytes(data)


class FailedFlushes(FullTest):
    """A volume on a device whose file cannot grow: writes succeed in the page cache, and its write-back fails. The kernel tells that to one
    flush of an open file; whoever asked first, hosts must not take the next for a success."""
    kind = "tmpfs"

    def device(self, name):
        disk = SmallFileSystem(os.path.join(self.directory, name), "tmpfs", 24 * MIB)
        self.addCleanup(disk.end)
        device = LoopDevice(os.path.join(disk.path, "under"), SIZE)
        self.addCleanup(device.detach)
        device.fill, device.free = disk.fill, disk.free
        return device

    def solo(self):
        device = self.device("solo-device")
        site = self.site("solo", {}, extra=f'[volumes.disk]\npath = "{device.path}"\n')
        handle = site.connect("disk")
        handle.pwrite(b"a" * MIB, 0)
        handle.flush()
        device.fill()
        return site, device, handle

    def assert_never_flushed_again(self, site, device, handle):
        """Until the volume is opened anew, also when there is room again."""
        for _ in range(2):
            with self.assertRaises(nbd.Error, msg="a flush succeeded after one that failed"):
                handle.flush()
        device.free()
        handle.pwrite(b"c" * PAGE, 0)
        with self.assertRaises(nbd.Error, msg="a flush succeeded after one that failed"):
            handle.flush()
        with self.assertRaises(nbd.Error, msg="another client's flush succeeded"):
            site.connect("disk").flush()
        self.assert_alive(site, "after a flush that failed")
        site.end()
        site.start()
        data = random.randbytes(2 * MIB)
        handle = site.connect("disk")
        handle.pwrite(data, 4 * MIB)
        handle.flush()
        self.assertTrue(device.under(4 * MIB, len(data)) == data)

    def test_a_hosts_flush(self):
        site, device, handle = self.solo()
        handle.pwrite(b"b" * 4 * MIB, 2 * MIB)
        with self.assertRaises(nbd.Error):
            handle.flush()
        self.assert_never_flushed_again(site, device, handle)

    def test_a_write_with_fua(self):
        site, device, handle = self.solo()
        handle.pwrite(b"b" * 4 * MIB, 2 * MIB)
        with self.assertRaises(nbd.Error):
            # Over the range of the earlier one, whose write-back it takes part in.
            handle.pwrite(b"f" * 4 * MIB, 2 * MIB, nbd.CMD_FLAG_FUA)
        self.assert_never_flushed_again(site, device, handle)

    def test_a_durable_copy(self):
        site, device, handle = self.solo()
        handle.pwrite(b"b" * 4 * MIB, 2 * MIB)
        done = site.farcopy("flashcopy", "create", "disk", "copy", "--durable", "--target", f"{site.path}/target", check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn(device.path, done.stderr)
        self.assert_never_flushed_again(site, device, handle)

    def mirrored_device(self):
        """East mirrors a device to west; the first copy is complete."""
        device = self.device("east-device")
        group = '[groups.shop]\nvolumes = ["disk"]\nrole = "{}"\npeer = "{}"\ninterval = "manual"\nkeep = 4\nisolation_timeout = "300ms"\n'
        west = self.site("west", {"disk": "16MiB"}, peers=["east"], groups=group.format("secondary", "east"))
        east = self.site(
            "east", {}, peers=["west"], extra=f'[volumes.disk]\npath = "{device.path}"\n' + group.format("primary", "west"))
        wait_for(west.points, what="the first copy")
        return east, west, device

    def test_the_sweep_of_the_activity_log(self):
        """It flushes what was idle for 10 to 20 s."""
        if REPEAT == 1 and type(self) is FailedFlushes:
            self.skipTest("it waits long; the same for files is run always")
        east, west, device = self.mirrored_device()
        handle = east.connect("disk")
        device.fill()
        handle.pwrite(b"b" * 4 * MIB, 2 * MIB)
        time.sleep(21)
        with self.assertRaises(nbd.Error, msg="the first flush of a host succeeded, and what it had written is not on the device"):
            handle.flush()
        self.assert_never_flushed_again(east, device, handle)

    def test_a_primary_that_lost_what_its_peer_has(self):
        """After a flush that failed the bitmaps say too little, also for the next process of the same boot."""
        east, west, device = self.mirrored_device()
        handle = east.connect("disk")
        device.fill()
        sent = random.randbytes(4 * MIB)
        handle.pwrite(sent, 2 * MIB)
        point = east.cycle()
        self.assertTrue(west.read(f"disk@{point}")[2 * MIB:6 * MIB] == sent)
        with self.assertRaises(nbd.Error):
            handle.flush()
        device.free()
        east.kill()
        east.start()
        self.assertFalse(east.read("disk")[2 * MIB:6 * MIB] == sent, "nothing was lost")
        wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")
        point = east.cycle()
        written = slice(2 * MIB, 6 * MIB)  # where space is taken away under a file, old data goes as well
        self.assertTrue(west.read(f"disk@{point}")[written] == east.read("disk")[written], "the sites differ in what is lost here")

    def test_a_secondary_that_could_not_flush(self):
        """It commits nothing on what it lost; opened anew, it is sent that again."""
        device = self.device("west-device")
        group = '[groups.shop]\nvolumes = ["disk"]\nrole = "{}"\npeer = "{}"\ninterval = "manual"\nkeep = 4\nisolation_timeout = "300ms"\n'
        west = self.site(
            "west", {}, peers=["east"], extra=f'[volumes.disk]\npath = "{device.path}"\n' + group.format("secondary", "east"))
        east = self.site("east", {"disk": "16MiB"}, peers=["west"], groups=group.format("primary", "west"))
        wait_for(west.points, what="the first copy")
        before = [point["id"] for point in west.points()]
        device.fill()
        handle = east.connect("disk")
        handle.pwrite(random.randbytes(4 * MIB), 2 * MIB)
        handle.flush()
        for _ in range(3):
            done = east.farcopy("cycle", "shop", "--wait", check=False, timeout=60)
            self.assertNotEqual(done.returncode, 0, f"a point was committed that is not on the device\n{west.tail()}\n{east.tail()}")
            east.farcopy("resume", "shop", check=False)
        self.assertEqual([point["id"] for point in west.points()], before)
        self.assert_alive(west, "after a flush that failed")
        device.free()
        west.kill()
        west.start()
        east.farcopy("resume", "shop", check=False)
        wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")
        point = east.cycle()
        self.assertEqual(west.read(f"disk@{point}"), east.read("disk"))
        self.assertTrue(device.under(0, SIZE) == east.read("disk"), "a committed point is not on the device")


class FailedFlushesOfFiles(FailedFlushes):
    def device(self, name):
        return FileWithoutSpace(self, name)
