"""Volumes with `cache = "none"`: direct I/O, and clients that ignore its block size."""

import json
import os
import random
import shutil
import tempfile
import threading

import nbd

from sites import SECTOR, SiteTest, device_at, run

MIB = 1 << 20
SIZE = 16 * MIB


class Direct(SiteTest):
    def setUp(self):
        super().setUp()
        # tmpfs has no storage behind its page cache; a disk is wanted here.
        self.disk = tempfile.mkdtemp(prefix="farcopy-direct-", dir=os.environ.get("BENCH_DISK", "/var/tmp"))
        self.addCleanup(shutil.rmtree, self.disk, True)
        self.path = os.path.join(self.disk, "direct.img")
        if SECTOR:
            device = device_at(self.path, str(SIZE), SECTOR)
            self.addCleanup(device.detach)
        self.server = self.site("solo", {}, extra=(
            f'[volumes.disk]\npath = "{self.path}"\nsize = "{SIZE}"\ncache = "none"\n'))

    def test_the_file_is_open_for_direct_io(self):
        directory = f"/proc/{self.server.process.pid}/fd"
        number, = (fd for fd in os.listdir(directory) if os.readlink(f"{directory}/{fd}") == os.path.realpath(self.path))
        with open(f"/proc/{self.server.process.pid}/fdinfo/{number}") as file:
            flags = int(next(line for line in file if line.startswith("flags")).split()[1], 8)
        self.assertTrue(flags & os.O_DIRECT)

    def test_the_block_size_is_told(self):
        info = json.loads(run("nbdinfo", "--json", self.server.uri("disk")).stdout)["exports"][0]
        self.assertIn(info["block_size_minimum"], [SECTOR] if SECTOR else (512, 4096))
        self.assertGreaterEqual(info["block_size_preferred"], info["block_size_minimum"])

    def test_unaligned_requests_against_a_model(self):
        """Random writes, zeroes and reads at any byte, several in flight, disjoint but sharing blocks."""
        model = bytearray(SIZE)
        handle = self.server.connect("disk")
        # libnbd itself would refuse what is below the advertised minimum.
        handle.set_strict_mode(0)
        for _ in range(300):
            at = random.randrange(0, SIZE - 1)
            length = min(random.choice((1, 100, 511, 513, 4096, 5000, 70_000, 3 * MIB)), SIZE - at)
            kind = random.randrange(3)
            if kind == 0:
                data = random.randbytes(length)
                handle.pwrite(data, at, random.choice((0, 1)))
                model[at:at + length] = data
            elif kind == 1:
                handle.zero(length, at)
                model[at:at + length] = bytes(length)
            else:
                self.assertEqual(handle.pread(length, at), model[at:at + length])
        self.assertEqual(self.server.read("disk"), model)
        self.server.stop()
        with open(self.path, "rb") as file:
            self.assertEqual(file.read(), model)

    def test_writers_that_share_blocks_lose_nothing(self):
        """Four clients, each with its own 100 bytes of every 400, in flight together."""
        errors = []

        def work(number):
            try:
                handle = self.server.connect("disk")
                handle.set_strict_mode(0)
                cookies = []
                for piece in range(1500):
                    cookies.append(handle.aio_pwrite(bytes([number + 1]) * 100, piece * 400 + number * 100))
                    while handle.aio_in_flight() > 30:
                        handle.poll(-1)
                while handle.aio_in_flight():
                    handle.poll(-1)
                for cookie in cookies:
                    assert handle.aio_command_completed(cookie)
            except Exception as error:
                errors.append(error)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(errors, [])
        pattern = b"".join(bytes([number + 1]) * 100 for number in range(4))
        self.assertEqual(self.server.read("disk")[:600_000], pattern * 1500)

    def test_a_fast_zero_of_parts_of_blocks_is_refused(self):
        handle = self.server.connect("disk")
        handle.set_strict_mode(0)
        handle.zero(MIB, 0, nbd.CMD_FLAG_FAST_ZERO)
        with self.assertRaises(nbd.Error) as error:
            handle.zero(MIB, 1, nbd.CMD_FLAG_FAST_ZERO)
        self.assertEqual(error.exception.errno, "ENOTSUP")

    def test_trims_round_inwards(self):
        handle = self.server.connect("disk")
        handle.set_strict_mode(0)
        handle.pwrite(b"t" * MIB, 0)
        handle.trim(MIB - 2, 1)
        self.assertEqual(handle.pread(1, 0), b"t")
        self.assertEqual(handle.pread(1, MIB - 1), b"t")
        handle.trim(10, 100)
        self.assertEqual(handle.pread(1, 0), b"t")

    def test_fio_verifies_and_flashcopies_hold(self):
        run("fio", "--name=verify", "--ioengine=nbd", f"--uri={self.server.uri('disk')}", "--rw=randrw", "--size=12M",
            "--bsrange=512-64k", "--iodepth=32", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
            "--output=/dev/null")
        before = self.server.read("disk")
        self.server.farcopy("flashcopy", "create", "disk", "kept")
        handle = self.server.connect("disk")
        handle.set_strict_mode(0)
        for _ in range(200):
            handle.pwrite(random.randbytes(700), random.randrange(0, SIZE - 700))
        self.assertEqual(self.server.read("disk@kept"), before)

    def test_a_size_that_direct_io_cannot_have_is_refused(self):
        with open(self.path + ".odd", "wb") as file:
            file.truncate(SIZE + 100)
        site = self.site("odd", {}, start=False, extra=f'[volumes.disk]\npath = "{self.path}.odd"\ncache = "none"\n')
        site.start(wait=False)
        self.assertEqual(site.process.wait(20), 1)
        self.assertIn("cache", site.tail())
