"""Disks that can be looked at from below, and machines that lose power: loop devices, file systems that are shut down without
their log, and a new boot id for the process that starts after it. Needs root, and fails without it.

What power loss is here: everything that the file system had not been told to make durable is gone, its log included. A real disk may
keep any part of it; the simulator tries those, this tries the worst. What a call had made durable stays, since the loop devices of
file systems pass the page cache by (`direct`): what has reached the device has reached the file under it.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import shutil
import stat
import struct
import time
import uuid

from sites import REPEAT, Site, SiteTest, run

MIB = 1 << 20
LIBC = ctypes.CDLL(None, use_errno=True)
BOOT_ID = "/proc/sys/kernel/random/boot_id"
# _IOR('X', 125, u32): EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN are one number, and "do not flush the log" is 2 in both.
SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2
MOUNT_OPTIONS = {"ext4": "commit=600", "xfs": "nouuid"}
# The smallest that mkfs.xfs makes. The files under file systems are sparse.
FILE_SYSTEM_BYTES = 320 * MIB


def require_root():
    if os.geteuid() != 0:
        raise AssertionError("the laboratory mounts file systems and attaches loop devices: run it as root")


def call(name, *words):
    if getattr(LIBC, name)(*words) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}{words}: {os.strerror(number)}")


def own_mounts():
    """Moves this process into a mount namespace of its own, so that what it mounts is gone with it, however it ends. Below, sites have
    namespaces that follow this one: what is unmounted here is unmounted there."""
    if own_mounts.done:
        return
    require_root()
    recursive, private, shared = 1 << 14, 1 << 18, 1 << 20
    call("unshare", 0x00020000)  # CLONE_NEWNS
    call("mount", None, b"/", None, recursive | private, None)
    call("mount", None, b"/", None, recursive | shared, None)
    own_mounts.done = True


own_mounts.done = False


class LoopDevice:
    """A block device over a sparse file. It is gone once it is let go of and nothing has it mounted or open, also when this process is
    killed."""

    def __init__(self, backing, size=None, sector=512, direct=False):
        """`direct`: the device has no cache of its own file (the page cache of the device itself is there either way)."""
        require_root()
        self.backing, self.sector, self.direct = backing, sector, direct
        if not os.path.exists(backing):
            with open(backing, "wb") as file:
                file.truncate(size)
        self.attach()

    def attach(self):
        for _ in range(20):
            done = run(
                "losetup", "--find", "--show", "--sector-size", str(self.sector), f"--direct-io={'on' if self.direct else 'off'}",
                self.backing, check=False)
            if done.returncode == 0:
                break
            # Somebody else took the device that was free; or it is there, but /dev has no node for it.
            self.make_nodes()
            time.sleep(0.05)
        else:
            raise AssertionError(f"no loop device for {self.backing}: {done.stderr}")
        self.path = done.stdout.strip()
        self.descriptor = os.open(self.path, os.O_RDONLY)
        # Takes effect when the last has closed it.
        run("losetup", "--detach", self.path)
        asked = self.facts("LOG-SEC"), self.facts("DIO") == "1"
        if asked != (str(self.sector), self.direct):
            raise AssertionError(f"{self.path} has sectors of {asked[0]} bytes, direct I/O is {asked[1]}; the kernel did as it likes")

    @staticmethod
    def make_nodes():
        if not os.path.exists("/dev/loop-control"):
            os.mknod("/dev/loop-control", 0o600 | stat.S_IFCHR, os.makedev(10, 237))
        for number in range(64):
            with contextlib.suppress(FileExistsError):
                if os.path.exists(f"/sys/block/loop{number}"):
                    os.mknod(f"/dev/loop{number}", 0o600 | stat.S_IFBLK, os.makedev(7, number))

    def facts(self, column):
        return run("losetup", "--noheadings", "--raw", "--output", column, self.path).stdout.strip()

    def detach(self):
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def is_free(self):
        """Whether nothing has it mounted."""
        try:
            os.close(os.open(self.path, os.O_RDONLY | os.O_EXCL))
            return True
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False

    def under(self, offset=0, length=None):
        """What lies in the file under the device: what was written to the device and is in its page cache alone is not there."""
        return read_direct(self.backing, offset, os.stat(self.backing).st_size - offset if length is None else length)


def write_back(path, length):
    """What the kernel does with dirty pages by and by: no flush."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if LIBC.sync_file_range(descriptor, ctypes.c_long(0), ctypes.c_long(length), 7) != 0:
            raise OSError(ctypes.get_errno(), "sync_file_range")
    finally:
        os.close(descriptor)


def read_direct(path, offset, length):
    """Reads past the page cache."""
    first = offset & ~4095
    space = mmap.mmap(-1, ((offset + length - first) + 4095) & ~4095)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        done = 0
        while done < len(space):
            with memoryview(space) as whole, whole[done:] as rest:
                count = os.preadv(descriptor, [rest], first + done)
            if count == 0:
                break
            done += count
        return space[offset - first:offset - first + length]
    finally:
        os.close(descriptor)


class PoweredFileSystem:
    """ext4 or XFS on a loop device, mounted at `path`."""

    def __init__(self, path, kind, size=FILE_SYSTEM_BYTES, sector=512):
        own_mounts()
        self.path, self.kind = path, kind
        os.makedirs(path, exist_ok=True)
        self.device = LoopDevice(path + ".disk", size, sector, direct=True)
        quiet = {"ext4": ["mkfs.ext4", "-q", "-E", "lazy_itable_init=1,lazy_journal_init=1"], "xfs": ["mkfs.xfs", "-q"]}[kind]
        # Small file systems of XFS are for tests only; these words say that this is one.
        run(*quiet, self.device.path, env={**os.environ, "TEST_DIR": "1", "TEST_DEV": "1", "QA_CHECK_FS": "1"})
        self.mount()

    def mount(self):
        run("mount", "-t", self.kind, "-o", MOUNT_OPTIONS[self.kind], self.device.path, self.path)

    def shut_down(self):
        """From now on nothing reaches the disk; every call fails. What was not flushed is lost."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        except OSError as error:
            raise AssertionError(f"this kernel cannot shut {self.kind} down as power loss does: {error}") from error
        finally:
            os.close(descriptor)

    def unmount(self):
        """On return nothing has the file system mounted. Who has files open there has ended before, or is about to."""
        end = time.monotonic() + 20
        while run("umount", self.path, check=False).returncode != 0 and os.path.ismount(self.path):
            if time.monotonic() > end:
                run("umount", "--lazy", self.path)
                break
            time.sleep(0.05)
        while not self.device.is_free():
            if time.monotonic() > end + 10:
                raise AssertionError(f"{self.path} stays mounted somewhere, by {self.device.path}")
            time.sleep(0.02)

    def come_back(self):
        """Mounts what is on the disk. The device is another one, so that no cache of the old one has a part in it."""
        self.unmount()
        self.device.detach()
        self.device.attach()
        self.mount()

    def lose_power(self):
        self.shut_down()
        self.come_back()

    def end(self):
        """Clean-up, whatever state it is in."""
        run("umount", "--lazy", self.path, check=False)
        self.device.detach()


def take_all_space(descriptor):
    """Extends a file until its file system has no block left; its size then."""
    end = os.fstat(descriptor).st_size
    for step in (MIB, 64 << 10, 4096):
        with contextlib.suppress(OSError):
            while True:
                os.posix_fallocate(descriptor, end, step)
                end += step
    return end


class ThinFileSystem(PoweredFileSystem):
    """ext4 on a device of which single blocks can be made to fail when they are written: the file under it has no room for them."""

    def __init__(self, path, size=96 * MIB):
        own_mounts()
        self.path, self.kind, self.saved = path, "ext4", path + ".saved"
        os.makedirs(path, exist_ok=True)
        self.pool = path + ".pool"
        os.makedirs(self.pool)
        run("mount", "-t", "tmpfs", "-o", f"size={size + 8 * MIB}", "farcopy-test", self.pool)
        with open(os.path.join(self.pool, "under"), "wb") as file:
            for _ in range(size // MIB):
                file.write(bytes(MIB))
        self.filler = os.open(os.path.join(self.pool, "filler"), os.O_RDWR | os.O_CREAT, 0o600)
        self.device = LoopDevice(os.path.join(self.pool, "under"))
        run("mkfs.ext4", "-q", "-m", "0", "-b", "4096", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", self.device.path)
        self.mount()

    def extents(self, path):
        """(offset, place on the device, bytes) of each."""
        for line in run("filefrag", "-e", "-b4096", path).stdout.splitlines():
            fields = line.replace("..", " ").replace(":", " ").split()
            if fields and fields[0].isdigit():
                yield int(fields[1]) * 4096, int(fields[3]) * 4096, int(fields[5]) * 4096

    def break_at(self, path, offset, length):
        """Writes to this part of a file fail from now on. It begins with the file, or behind what is written with it in one go: the loop
        driver calls a write whose first page has room a success."""
        os.sync()
        for at, place, count in self.extents(path):
            first, last = max(at, offset), min(at + count, offset + length)
            if first < last:
                self.punch(place + first - at, last - first)
        take_all_space(self.filler)

    def break_journal(self):
        """No transaction is committed from now on. What the journal of a file system that is well holds is of no use."""
        os.sync()
        for first, last in re.findall(r"\(\d+-\d+\):(\d+)-(\d+)", run("debugfs", "-R", "stat <8>", self.device.path).stdout):
            self.punch(int(first) * 4096, (int(last) + 1 - int(first)) * 4096)
        take_all_space(self.filler)

    def punch(self, offset, length):
        run("fallocate", "--punch-hole", "--offset", str(offset), "--length", str(length), self.device.backing)

    def mend(self):
        os.ftruncate(self.filler, 0)

    def die(self):
        """Every write fails from now on. When it comes back it is as it was."""
        os.sync()
        shutil.copyfile(self.device.backing, self.saved)
        self.punch(0, os.path.getsize(self.device.backing))
        take_all_space(self.filler)

    def come_back(self):
        self.unmount()
        self.device.detach()
        self.mend()
        if os.path.exists(self.saved):
            with open(self.saved, "rb") as saved, open(self.device.backing, "r+b") as under:
                shutil.copyfileobj(saved, under)
            os.unlink(self.saved)
        self.device.attach()
        self.mount()

    def end(self):
        super().end()
        os.close(self.filler)
        run("umount", "--lazy", self.pool, check=False)


class SmallFileSystem:
    """tmpfs or ext4 at `path` that can be filled to the last block."""

    def __init__(self, path, kind, size=32 * MIB):
        own_mounts()
        self.path, self.device = path, None
        os.makedirs(path, exist_ok=True)
        if kind == "tmpfs":
            run("mount", "-t", "tmpfs", "-o", f"size={size}", "farcopy-test", path)
        else:
            self.device = LoopDevice(path + ".disk", size, direct=True)
            run("mkfs.ext4", "-q", "-m", "0", "-b", "4096", self.device.path)
            run("mount", "-t", kind, self.device.path, path)
        self.filler = os.open(os.path.join(path, "filler"), os.O_RDWR | os.O_CREAT, 0o600)

    def fill(self, leave=0):
        """Takes all space but `leave` bytes."""
        os.sync()  # what is to be allocated later is allocated now
        end = take_all_space(self.filler)
        os.ftruncate(self.filler, max(0, end - leave))
        os.fsync(self.filler)

    def free(self):
        os.ftruncate(self.filler, 0)
        os.fsync(self.filler)

    def end(self):
        os.close(self.filler)
        run("umount", "--lazy", self.path, check=False)
        if self.device:
            self.device.detach()


class PoweredSite(Site):
    """A site on a machine that can lose power. Its state directory and its volumes lie on one file system, or, when `apart`, each on its
    own."""

    def __init__(self, directory, name, volumes, kind, apart=False, **options):
        path = os.path.join(directory, name)
        os.makedirs(path, exist_ok=True)
        data = os.path.join(path, "data")
        def disk(at):
            return ThinFileSystem(at) if kind == "thin" else PoweredFileSystem(at, kind)

        self.data_disk = disk(data)
        self.state_disk = disk(os.path.join(path, "state-disk")) if apart else self.data_disk
        super().__init__(
            directory, name, volumes, state=os.path.join(self.state_disk.path, "state"), data=self.data_disk.path, **options)
        # A process that traps when its disks are gone must not stay to print how.
        self.environment = {**os.environ, "SWIFT_BACKTRACE": "enable=no"}
        self.boot()

    @property
    def disks(self):
        return [self.data_disk] if self.data_disk is self.state_disk else [self.data_disk, self.state_disk]

    def boot(self):
        """The process that is started next finds a boot id that no other had. It is bound over the kernel's in a mount namespace that only
        this process has."""
        file = os.path.join(self.path, f"boot-{time.monotonic_ns()}")
        with open(file, "w") as opened:
            opened.write(f"{uuid.uuid4()}\n")
        self.prefix = [
            "unshare", "--mount", "--propagation", "slave", "sh", "-c", f'mount --bind "$0" {BOOT_ID} && exec "$@"', file]

    def lose_power(self, *disks, new_boot=True):
        """All disks, or those given, lose what was not flushed; the others keep everything. With the same boot id it is the disk that
        went away and came back, not the machine."""
        for disk in disks or self.disks:
            disk.shut_down()
        self.end()  # a process whose disks are gone may have ended by itself
        for disk in self.disks:
            disk.come_back()
        if new_boot:
            self.boot()

    def release(self):
        super().release()
        for disk in self.disks:
            disk.end()


class LaboratoryTest(SiteTest):
    """Sites on machines that lose power, with file systems of `kind`."""
    kind = "ext4"

    def setUp(self):
        own_mounts()
        super().setUp()

    def make_site(self, name, volumes, **options):
        return PoweredSite(self.directory, name, volumes, self.kind, **options)


def on_each_file_system(test, kinds=(("ext4", "Ext4"), ("xfs", "XFS"))):
    """Makes `NameExt4` and `NameXFS` of a class of tests; nothing is left of the class itself."""
    module = __import__(test.__module__, fromlist=["*"])
    for kind, name in kinds:
        case = type(test.__name__ + name, (test, LaboratoryTest), {"kind": kind, "__module__": test.__module__})
        setattr(module, case.__name__, case)


def on_ext4_and_at_length_on_xfs(test):
    """The same; on XFS only with `REPEAT` (`make test-long`), where the file system makes no difference that other classes do not see."""
    if REPEAT > 1:
        on_each_file_system(test)
    else:
        on_each_file_system(test, kinds=(("ext4", "Ext4"),))
