"""Volumes and targets that are block devices: what FLUSH and FUA are worth, by what lies under the device, not by what its page cache
says; alignment; devices that somebody else uses. Sectors of 512 and 4,096 bytes."""

import json
import os
import random
import subprocess

import nbd

from laboratory import LaboratoryTest, LoopDevice, PoweredFileSystem
from sites import Site, byte_count, run, wait_for

MIB = 1 << 20
PAGE = 4096
SIZE = "16MiB"


class Devices:
    def make_site(self, name, volumes, **options):
        return Site(self.directory, name, volumes, **options)

    def setUp(self):
        super().setUp()
        self.devices = []
        self.addCleanup(lambda: [device.detach() for device in self.devices])

    def device(self, name, size=SIZE, **options):
        device = LoopDevice(os.path.join(self.directory, name + ".under"), byte_count(size), self.sector, **options)
        self.devices.append(device)
        return device

    def served(self, device, start=True, **keys):
        """A site with the one volume `disk`, the device."""
        lines = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        return self.site("solo", {}, start=start, extra=f'[volumes.disk]\npath = "{device.path}"\n{lines}')

    def refused(self, site, *expected):
        site.start(wait=False)
        try:
            self.assertEqual(site.process.wait(10), 1)
        except subprocess.TimeoutExpired:
            self.fail("it is served")
        finally:
            site.end()
        for text in expected:
            self.assertIn(text, site.tail())

    # What reaches the device

    def test_a_flush_reaches_what_lies_under_the_device(self):
        device = self.device("disk")
        handle = self.served(device).connect("disk")
        data = random.randbytes(4 * MIB)
        handle.pwrite(data, MIB)
        self.assertEqual(device.under(MIB, len(data)), bytes(len(data)), "it is in the page cache only")
        handle.flush()
        self.assertTrue(device.under(MIB, len(data)) == data, "what was flushed is not on the device")
        handle.pwrite(b"b" * 512, 9 * MIB)
        handle.zero(PAGE, MIB)
        handle.flush()
        self.assertEqual(device.under(9 * MIB, 512), b"b" * 512)
        self.assertEqual(device.under(MIB, PAGE), bytes(PAGE))

    def test_fua_reaches_what_lies_under_the_device(self):
        device = self.device("disk")
        handle = self.served(device).connect("disk")
        for at, length in ((0, 512), (3 * 512, 1024), (MIB, 64 << 10), (4 * MIB, 3 * MIB)):
            data = random.randbytes(length)
            handle.pwrite(data, at, nbd.CMD_FLAG_FUA)
            self.assertTrue(device.under(at, length) == data, f"{length} bytes at {at}")
        for kind in (handle.zero, handle.trim):
            handle.pwrite(b"x" * 2 * PAGE, 8 * MIB, nbd.CMD_FLAG_FUA)
            kind(PAGE, 8 * MIB, nbd.CMD_FLAG_FUA)
            self.assertEqual(device.under(8 * MIB, PAGE), bytes(PAGE), kind.__name__)

    def test_a_stop_in_order_leaves_everything_on_the_device(self):
        device = self.device("disk")
        site = self.served(device)
        data = random.randbytes(MIB)
        site.connect("disk").pwrite(data, 0)
        site.stop()
        self.assertTrue(device.under(0, MIB) == data)

    def test_power_loss_under_the_device(self):
        """The device's file lies on a file system that loses power: what was flushed went all the way down."""
        disk = PoweredFileSystem(os.path.join(self.directory, "machine"), "ext4")
        self.addCleanup(disk.end)
        device = LoopDevice(os.path.join(disk.path, "under"), byte_count(SIZE), self.sector)
        self.addCleanup(device.detach)
        site = self.served(device)
        handle = site.connect("disk")
        flushed, later = random.randbytes(MIB), random.randbytes(MIB)
        handle.pwrite(flushed, 0)
        handle.flush()
        handle.pwrite(b"f" * PAGE, 2 * MIB, nbd.CMD_FLAG_FUA)
        handle.pwrite(later, 4 * MIB)
        disk.shut_down()
        site.end()
        device.detach()
        disk.come_back()
        with open(device.backing, "rb") as file:
            image = file.read()
        self.assertTrue(image[:MIB] == flushed, "what was flushed is lost")
        self.assertTrue(image[2 * MIB:2 * MIB + PAGE] == b"f" * PAGE, "what was written with FUA is lost")
        self.assertFalse(image[4 * MIB:5 * MIB] == later, "the power was not lost")

    # FlashCopies

    def test_a_durable_copy_is_on_its_device_before_the_source_is_overwritten(self):
        source, target = self.device("disk"), self.device("target")
        site = self.served(source)
        handle = site.connect("disk")
        before = random.randbytes(16 * MIB)
        for at in range(0, len(before), MIB):
            handle.pwrite(before[at:at + MIB], at)
        site.farcopy("flashcopy", "create", "disk", "kept", "--durable", "--target", target.path)
        self.assertTrue(source.under() == before, "a durable copy reads the source, so that is flushed when it is taken")
        for at in (0, 5 * MIB, 5 * MIB + PAGE, 15 * MIB):
            handle.pwrite(b"n" * PAGE, at)
            # The write was acknowledged, so the old content is durable, and nobody has asked for a flush.
            self.assertEqual(target.under(at, PAGE), before[at:at + PAGE], f"at {at}")
        self.assertEqual(site.read("disk@kept"), before)

    def test_a_complete_copy_on_a_device_is_an_image(self):
        source, target = self.device("disk"), self.device("target")
        with open(target.path, "r+b") as file:
            file.write(b"\xff" * (16 * MIB))
        site = self.served(source)
        handle = site.connect("disk")
        data = random.randbytes(4 * MIB)
        handle.pwrite(data, 2 * MIB)
        site.farcopy("flashcopy", "create", "disk", "image", "--copy", "--rate", "0", "--target", target.path)
        wait_for(lambda: "complete" in site.farcopy("flashcopy", "list", "--json").stdout and json.loads(
            site.farcopy("flashcopy", "show", "disk", "image", "--json").stdout)[0].get("progress", 1) == 1, what="the copy")
        wait_for(lambda: target.under() == bytes(2 * MIB) + data + bytes(10 * MIB), what="the image under the device")
        site.kill()
        site.start()
        self.assertEqual(site.read("disk@image"), bytes(2 * MIB) + data + bytes(10 * MIB))

    def test_a_smaller_device_is_no_target(self):
        site = self.served(self.device("disk"))
        target = self.device("target", "8MiB")
        done = site.farcopy("flashcopy", "create", "disk", "copy", "--target", target.path, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn("8388608 bytes", done.stderr)

    # Both sites on devices

    def test_the_secondary_flushes_before_it_commits(self):
        """With the activity log on at the primary, and the peer's volume a device as well."""
        sites, devices = {}, {name: self.device(name) for name in ("east", "west")}
        for name, peer, role in (("east", "west", "primary"), ("west", "east", "secondary")):
            sites[name] = self.site(
                name, {}, start=False, peers=[peer],
                extra=f'[volumes.disk]\npath = "{devices[name].path}"\n[groups.shop]\nvolumes = ["disk"]\nrole = "{role}"\n'
                      f'peer = "{peer}"\ninterval = "manual"\nkeep = 4\nisolation_timeout = "300ms"\n')
        east, west = sites["east"], sites["west"]
        west.start()
        east.start()
        handle = east.connect("disk")
        data = random.randbytes(4 * MIB)
        handle.pwrite(data, MIB)
        point = east.cycle()
        self.assertTrue(devices["west"].under(MIB, len(data)) == data, "a committed point is not on the secondary's device")
        self.assertEqual(west.read(f"disk@{point}"), east.read("disk"))
        handle.pwrite(b"k" * PAGE, MIB)
        west.stop()
        east.kill()
        west.start()
        east.start()
        wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")
        point = east.cycle()
        self.assertEqual(west.read(f"disk@{point}"), east.read("disk"))
        east.kill()
        west.farcopy("failover", "shop")
        handle = west.connect("disk")
        handle.pwrite(b"w" * PAGE, 3 * MIB)
        handle.flush()
        self.assertEqual(devices["west"].under(3 * MIB, PAGE), b"w" * PAGE)

    # Direct I/O

    def test_direct_io_tells_the_sector_and_takes_less(self):
        device = self.device("disk")
        site = self.served(device, cache="none")
        info = json.loads(run("nbdinfo", "--json", site.uri("disk")).stdout)["exports"][0]
        self.assertEqual(info["block_size_minimum"], self.sector)
        model = bytearray(16 * MIB)
        handle = site.connect("disk")
        handle.set_strict_mode(0)
        for _ in range(150):
            at = random.randrange(16 * MIB - 1)
            length = min(random.choice((1, 100, 511, 513, 4096, 5000, 70_000)), 16 * MIB - at)
            data = random.randbytes(length)
            handle.pwrite(data, at, random.choice((0, nbd.CMD_FLAG_FUA)))
            model[at:at + length] = data
        handle.flush()
        self.assertEqual(site.read("disk"), model)
        self.assertTrue(device.under() == model, "what was flushed is not on the device")

    # Devices that are in use

    def test_a_mounted_device_is_no_volume_and_no_target(self):
        mounted = self.device("mounted", "64MiB")
        run("mkfs.ext4", "-q", mounted.path)
        place = os.path.join(self.directory, "place")
        os.mkdir(place)
        run("mount", mounted.path, place)
        self.addCleanup(run, "umount", "--lazy", place, check=False)
        self.refused(self.served(mounted, start=False), mounted.path, "mounted")
        self.put_away(*self.sites)
        site = self.served(self.device("disk", "64MiB"))
        done = site.farcopy("flashcopy", "create", "disk", "copy", "--target", mounted.path, check=False)
        self.assertEqual(done.returncode, 1, "a FlashCopy may be written over a mounted file system")
        self.assertIn(mounted.path, done.stderr)
        self.assertIn("mounted", done.stderr)
        run("umount", place)
        run("fsck.ext4", "-fn", mounted.path)

    def test_a_device_that_is_open_exclusively_is_no_volume_and_no_target(self):
        taken = self.device("taken")
        descriptor = os.open(taken.path, os.O_RDWR | os.O_EXCL)
        try:
            self.refused(self.served(taken, start=False), taken.path, "in use")
            self.put_away(*self.sites)
            site = self.served(self.device("disk"))
            done = site.farcopy("flashcopy", "create", "disk", "copy", "--target", taken.path, check=False)
            self.assertEqual(done.returncode, 1)
            self.assertIn("in use", done.stderr)
        finally:
            os.close(descriptor)

    def test_nobody_mounts_what_is_served(self):
        device = self.device("disk", "64MiB")
        run("mkfs.ext4", "-q", device.path)
        site = self.served(device)
        with self.assertRaises(OSError):
            os.close(os.open(device.path, os.O_RDWR | os.O_EXCL))
        place = os.path.join(self.directory, "place")
        os.mkdir(place)
        self.assertNotEqual(run("mount", device.path, place, check=False).returncode, 0)
        site.stop()
        run("mount", device.path, place)
        run("umount", place)

    def test_one_device_for_two_volumes_is_refused(self):
        device = self.device("disk")
        link = os.path.join(self.directory, "by-another-name")
        os.symlink(device.path, link)
        site = self.site("solo", {}, start=False, extra=f'[volumes.one]\npath = "{device.path}"\n[volumes.two]\npath = "{link}"\n')
        self.refused(site, link)


class Devices512(Devices, LaboratoryTest):
    sector = 512


class Devices4096(Devices, LaboratoryTest):
    sector = 4096
