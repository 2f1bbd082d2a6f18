"""The laboratory itself: what was not flushed is lost with the power, and what was flushed is not."""

import contextlib
import mmap
import os

from laboratory import BOOT_ID, LaboratoryTest, LoopDevice, PoweredFileSystem, on_each_file_system
from sites import SECTOR, wait_for

PAGE = 4096


@on_each_file_system
class PowerLoss:
    def write(self, path, data, flush, at=0):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.pwrite(descriptor, data, at)
        if flush:
            os.fdatasync(descriptor)
        os.close(descriptor)

    def synchronize(self, directory):
        descriptor = os.open(directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def test_what_was_not_flushed_is_lost_and_what_was_is_not(self):
        disk = PoweredFileSystem(os.path.join(self.directory, "disk"), self.kind)
        self.addCleanup(disk.end)

        def path(name):
            return os.path.join(disk.path, name)
        for name in ("flushed", "overwritten", "renamed", "removed", "mapped"):
            self.write(path(name), b"a" * PAGE, flush=True)
        self.synchronize(disk.path)
        self.write(path("overwritten"), b"b" * PAGE, flush=False)
        self.write(path("flushed"), b"b" * PAGE, flush=True, at=PAGE)
        self.write(path("flushed"), b"c" * PAGE, flush=False, at=2 * PAGE)
        descriptor = os.open(path("mapped"), os.O_RDWR)
        with mmap.mmap(descriptor, PAGE) as memory:
            memory[:4] = b"bbbb"
            self.write(path("unflushed"), b"b" * PAGE, flush=False)
            os.rename(path("renamed"), path("new-name"))
            os.unlink(path("removed"))
            disk.shut_down()
            with self.assertRaises(OSError):
                self.write(path("flushed"), b"d" * PAGE, flush=True)
        with contextlib.suppress(OSError):  # XFS
            os.close(descriptor)
        disk.come_back()
        found = {}
        for name in os.listdir(disk.path):
            if name != "lost+found":
                with open(path(name), "rb") as file:
                    found[name] = file.read()
        a, b = b"a" * PAGE, b"b" * PAGE
        self.assertEqual(found, {"flushed": a + b, "overwritten": a, "renamed": a, "removed": a, "mapped": a})

    def test_a_site_finds_another_boot_id_only_after_power_loss(self):
        if SECTOR:
            self.skipTest("volumes that are devices lie on no file system that loses power")
        site = self.site("solo", {"disk": "4MiB"})

        def boot_id():
            with open(f"/proc/{site.process.pid}/root{BOOT_ID}") as file:
                return file.read()
        with open(BOOT_ID) as file:
            own = file.read()
        first = boot_id()
        site.kill()
        site.start()
        self.assertEqual(boot_id(), first)
        handle = site.connect("disk")
        handle.pwrite(b"f" * PAGE, 0)
        handle.flush()
        handle.pwrite(b"u" * PAGE, PAGE)
        site.lose_power()
        with open(site.image("disk"), "rb") as file:
            self.assertEqual(file.read(2 * PAGE), b"f" * PAGE + bytes(PAGE))
        site.start()
        self.assertEqual(len({own, first, boot_id()}), 3)
        with open(BOOT_ID) as file:
            self.assertEqual(file.read(), own, "nobody else sees it")

    def test_each_disk_loses_power_by_itself(self):
        site = self.site("solo", {"disk": "4MiB"}, apart=True)
        site.connect("disk").pwrite(b"u" * PAGE, 0)
        site.lose_power(site.state_disk)
        with open(site.image("disk"), "rb") as file:
            self.assertEqual(file.read(PAGE), b"u" * PAGE, "the other disk kept everything")
        site.start()
        site.connect("disk").pwrite(b"v" * PAGE, 0)
        site.lose_power(site.data_disk)
        with open(site.image("disk"), "rb") as file:
            self.assertEqual(file.read(PAGE), b"u" * PAGE)


class LoopDevices(LaboratoryTest):
    def test_what_lies_under_a_device(self):
        for sector in (512, 4096):
            device = LoopDevice(os.path.join(self.directory, f"under-{sector}"), 1 << 20, sector)
            self.addCleanup(device.detach)
            with open(device.path, "r+b", buffering=0) as file:
                file.write(b"x" * PAGE)
                self.assertEqual(device.under(0, PAGE), bytes(PAGE), "it is in the page cache only")
                os.fdatasync(file.fileno())
            self.assertEqual(device.under(0, PAGE), b"x" * PAGE)

    def test_a_device_is_gone_when_it_is_let_go_of(self):
        device = LoopDevice(os.path.join(self.directory, "under"), 1 << 20)
        backing = f"/sys/block/{os.path.basename(device.path)}/loop/backing_file"
        self.assertTrue(os.path.exists(backing))
        device.detach()
        wait_for(lambda: not os.path.exists(backing), what="its end")
