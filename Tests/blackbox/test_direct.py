"""Volumes with `cache = "none"`: direct I/O, and clients that ignore its block size."""

import json
import os
import random
import shutil
import tempfile
import threading

import nbd

from rawclient import ACK, Raw
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

    def pieces(self):
        """Some ranges that do not overlap, in a random order, of any length and at any byte, aligned ones among them; neighbours mostly
        share a block."""
        at = random.randrange(SIZE - 8 * MIB)
        if random.randrange(2):
            at &= ~4095
        found = []
        for _ in range(random.randrange(1, 24)):
            length = random.choice((1, 100, 511, 513, 4096, 5000, 8192, 70_000)) if random.randrange(40) else 3 * MIB
            if random.randrange(3) == 0:
                at, length = (at + 4095) & ~4095, (length + 4095) & ~4095
            if at + length > SIZE:
                break
            found.append((at, length))
            at += length + random.choice((0, 0, 0, 1, 300, 4096))
        random.shuffle(found)
        return found

    def test_unaligned_requests_against_a_model(self):
        """Random writes, zeroes and reads at any byte, several in flight, disjoint but sharing blocks, aligned ones among them."""
        model = bytearray(SIZE)
        handle = self.server.connect("disk")
        # libnbd itself would refuse what is below the advertised minimum.
        handle.set_strict_mode(0)
        most = 0
        for _ in range(150):
            commands, reads = [], []
            for at, length in self.pieces():
                kind = random.randrange(4)
                if kind < 2:
                    data = random.randbytes(length)
                    commands.append(handle.aio_pwrite(data, at, flags=random.choice((0, 1))))
                    model[at:at + length] = data
                elif kind == 2:
                    commands.append(handle.aio_zero(length, at))
                    model[at:at + length] = bytes(length)
                else:
                    buffer = nbd.Buffer(length)
                    commands.append(handle.aio_pread(buffer, at))
                    reads.append((buffer, at, length))
            most = max(most, handle.aio_in_flight())
            while handle.aio_in_flight():
                handle.poll(-1)
            for command in commands:
                self.assertTrue(handle.aio_command_completed(command))
            for buffer, at, length in reads:
                self.assertTrue(buffer.to_bytearray() == model[at:at + length], f"{length} bytes at {at}")
        self.assertGreater(most, 4, "several are in flight together")
        self.assertTrue(self.server.read("disk") == model, "what is read is not what was written")
        self.server.stop()
        with open(self.path, "rb") as file:
            self.assertTrue(file.read() == model, "the file is not what was written")

    def test_an_aligned_write_waits_for_an_unaligned_one_on_its_block(self):
        """Both are under way together, so the bytes that both write may be either's; the rest of the block is the aligned one's."""
        raw = Raw(self.server)
        self.assertEqual(raw.go(b"disk")[-1][1], ACK)
        count = 200
        for turn in range(1, 4):
            old, new, part = (bytes([value + turn]) for value in (0x10, 0x20, 0x30))
            raw.request(1, 0, count * 4096, payload=old * count * 4096)
            self.assertEqual(raw.answer()[0], 0)
            for block in range(count):
                raw.socket.sendall(
                    raw.packed(1, block * 4096 + 1000, 100, cookie=1, payload=part * 100)
                    + raw.packed(1, block * 4096, 4096, cookie=2, payload=new * 4096))
                for _ in range(2):
                    self.assertEqual(raw.answer()[0], 0)
            data = self.server.read("disk")
            for block in range(count):
                content = data[block * 4096:(block + 1) * 4096]
                self.assertEqual(content[:1000] + content[1100:], new * 3996, f"block {block}: what was there before has come back")
                self.assertIn(content[1000:1100], (part * 100, new * 100))

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
        run("fio", "--thread", "--name=verify", "--ioengine=nbd", f"--uri={self.server.uri('disk')}", "--rw=randrw", "--size=12M",
            f"--bsrange={SECTOR or 512}-64k", "--iodepth=32", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
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
