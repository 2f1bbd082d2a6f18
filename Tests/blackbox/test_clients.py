"""More of other people's clients: nbdsh, fio over many connections, and file systems through nbdfuse and a loop device."""

import os
import subprocess

from sites import SiteTest, run, wait_for

MIB = 1 << 20


class Clients(SiteTest):
    def setUp(self):
        super().setUp()
        self.server = self.site("solo", {"disk": "512MiB"})

    def test_nbdsh(self):
        script = """
assert h.get_size() == 512 << 20 and h.can_multi_conn() and h.can_df() and h.can_cache() and h.can_fast_zero()
assert h.get_structured_replies_negotiated() and h.can_meta_context("base:allocation")
h.pwrite(b"one" * 100, 1000)
assert h.pread_structured(300, 1000, lambda *chunk: 0, nbd.CMD_FLAG_DF) == b"one" * 100
h.zero(100, 1100, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(302, 999) == b"\\0" + (b"one" * 100)[:100] + bytes(100) + (b"one" * 100)[200:] + b"\\0"
h.trim(1 << 20, 1 << 20)
h.cache(1 << 20, 0)
h.flush()
extents = []
h.block_status(512 << 20, 0, lambda context, at, entries, error: extents.extend(entries) or 0)
assert sum(extents[0::2]) == 512 << 20
for bad in (lambda: h.pread(1, 512 << 20), lambda: h.pwrite(b"x", 512 << 20), lambda: h.block_status(1, 512 << 20, print)):
    h.set_strict_mode(0)
    try:
        bad()
        raise SystemExit("an error was expected")
    except nbd.Error as error:
        assert error.errno in ("EINVAL", "ENOSPC"), error
"""
        run("nbdsh", "--base-allocation", "-u", self.server.uri("disk"), "-c", script,
            env={**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})  # Debian's Python has libnbd's module

    def test_fio_verifies_over_one_four_and_sixteen_connections(self):
        for jobs in (1, 4, 16):
            share = 480 // jobs
            run("fio", "--thread", "--name=verify", "--ioengine=nbd", f"--uri={self.server.uri('disk')}", "--rw=randrw",
                f"--size={min(share, 48)}M", f"--offset_increment={share}M", f"--numjobs={jobs}", "--bsrange=512-128k",
                "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--output=/dev/null",
                timeout=110)

    def test_attach_says_what_is_wrong(self):
        for words, said in ((("disk", "/dev/sda"), "/dev/nbd0"), (("nothing", "/dev/nbd0"), "has no export 'nothing'"),
                            (("nbd://127.0.0.1:1/disk", "/dev/sda"), "/dev/nbd0")):
            done = self.server.farcopy("attach", *words, check=False)
            self.assertEqual(done.returncode, 1)
            self.assertIn(said, done.stderr)
        self.assertEqual(self.server.farcopy("attach", "disk", "/dev/nbd0", "--timeout", "0", check=False).returncode, 2)

    def test_file_systems_through_nbdfuse(self):
        """Needs root, for the loop device and the mount."""
        image, mount = os.path.join(self.directory, "image"), os.path.join(self.directory, "mount")
        os.mkdir(mount)
        with open(image, "w"):
            pass
        fuse = self.spawn("nbdfuse", image, self.server.uri("disk"), stderr=subprocess.DEVNULL)
        device = None
        try:
            wait_for(lambda: os.path.getsize(image) == 512 * MIB, what="nbdfuse")
            device = run("losetup", "--find", "--show", image).stdout.strip()
            for make, check in ((["mkfs.ext4", "-q"], ["e2fsck", "-fn"]), (["mkfs.xfs", "-q", "-f"], ["xfs_repair", "-n"])):
                run(*make, device)
                run("mount", device, mount)
                try:
                    run("fio", "--thread", "--name=verify", f"--directory={mount}", "--rw=randwrite", "--bsrange=4k-64k", "--size=48M",
                        "--ioengine=psync", "--fsync=64", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
                        "--output=/dev/null")
                    run("fstrim", mount, check=False)
                finally:
                    run("umount", mount)
                run(*check, device)
        finally:
            if device:
                run("losetup", "-d", device)
            run("fusermount3", "-uz", image, check=False)
            fuse.wait(30)
