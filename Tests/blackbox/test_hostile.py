"""Clients that mean harm, or do not know what they do: the others keep their service, and memory stays bounded."""

import contextlib
import os
import random
import socket
import struct
import threading
import time

import nbd

from rawclient import ACK, Raw
from sites import SiteTest, wait_for

MIB = 1 << 20
# The bound of docs/protocol.md: payload and copy pools of each reactor (two cores and the greeter), receive buffers, and the
# program itself.
MEMORY = 3 * (256 + 64) * MIB + 1024 * 256 * 1024 + 128 * MIB


class Hostile(SiteTest):
    def setUp(self):
        super().setUp()
        self.server = self.site("solo", {"disk": "64MiB", "other": "16MiB"})
        self.good = self.server.connect("disk")

    def started(self, name=b"disk"):
        raw = Raw(self.server)
        self.assertEqual(raw.go(name)[-1][1], ACK)
        return raw

    def serves(self):
        """An honest client is answered, soon, and with what it wrote."""
        data = random.randbytes(70_000)
        started = time.monotonic()
        self.good.pwrite(data, 32 * MIB)
        self.assertEqual(self.good.pread(len(data), 32 * MIB), data)
        self.assertLess(time.monotonic() - started, 15)

    def tearDown(self):
        self.serves()
        self.assertLess(self.server.resident(), MEMORY)

    def test_a_thousand_connections(self):
        """As many as are allowed at once stay, the rest are turned away, and all of it ends."""
        before = self.server.sockets()
        clients = []
        for _ in range(1000):
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(10)
            client.connect(self.server.socket)
            clients.append(client)
        self.serves()
        for client in clients:
            client.close()
        wait_for(lambda: self.server.sockets() <= before, what="closed sockets")
        clients = [self.started() for _ in range(900)]
        for cookie, raw in enumerate(clients):
            raw.request(0, 0, 4096, cookie=cookie)
        for cookie, raw in enumerate(clients):
            self.assertEqual(raw.answer(4096)[:2], (0, cookie))
        for raw in clients:
            raw.socket.close()
        wait_for(lambda: self.server.sockets() <= before, what="closed sockets")

    def test_descriptors_do_not_leak(self):
        def descriptors():
            found = []
            for number in os.listdir(directory):
                with contextlib.suppress(FileNotFoundError):
                    found.append(os.readlink(f"{directory}/{number}"))
            # The language's runtime makes a clock of its own when it first needs one.
            return [name for name in found if "timerfd" not in name]

        directory = f"/proc/{self.server.process.pid}/fd"
        self.serves()
        before = descriptors()
        for round in range(300):
            raw = Raw(self.server) if round % 3 == 0 else self.started()
            if round % 3 == 1:
                raw.request(1, 0, MIB, payload=b"part")
            raw.socket.close()
        try:
            wait_for(lambda: len(descriptors()) <= len(before), what="closed descriptors")
        except AssertionError as error:
            raise AssertionError(f"{error}: {sorted(before)} before, {sorted(descriptors())} now") from error

    def test_a_cookie_that_is_used_again(self):
        raw = self.started()
        for number in range(100):
            raw.request(1, number * 4096, 4096, cookie=7, payload=bytes([number]) * 4096)
        self.assertEqual([raw.answer()[:2] for _ in range(100)], [(0, 7)] * 100)
        for number in range(100):
            raw.request(0, number * 4096, 4096, cookie=7)
        answers = [raw.answer(4096)[2] for _ in range(100)]
        self.assertEqual(sorted(answers), [bytes([number]) * 4096 for number in range(100)])

    def test_overlapping_writes_leave_what_one_of_them_wrote(self):
        raws = [self.started() for _ in range(4)]
        for round in range(20):
            for number, raw in enumerate(raws):
                for cookie in range(10):
                    raw.request(1, (cookie % 3) * 512, 65536, cookie=cookie, payload=bytes([number + 1]) * 65536)
            for raw in raws:
                for _ in range(10):
                    self.assertEqual(raw.answer()[0], 0)
        data = self.good.pread(65536, 0)
        for at in range(0, 65536, 512):
            self.assertEqual(len(set(data[at:at + 512])), 1, "no sector is a mixture")
            self.assertIn(data[at], (1, 2, 3, 4))

    def test_a_byte_at_a_time(self):
        raw = self.started()
        message = struct.pack(">IHHQQI", 0x25609513, 0, 1, 5, 4096, 16) + b"sixteen bytes..."
        for byte in message:
            raw.socket.sendall(bytes([byte]))
            time.sleep(0.02)
        self.assertEqual(raw.answer()[:2], (0, 5))
        self.assertEqual(self.good.pread(16, 4096), b"sixteen bytes...")

    def test_stopped_payloads_take_no_memory_from_others(self):
        """Clients that announce 32 MiB each and send one byte of it."""
        stalled = [self.started() for _ in range(40)]
        for raw in stalled:
            raw.request(1, 0, 32 << 20, payload=b"x")
        self.serves()
        big = random.randbytes(32 << 20)
        self.good.pwrite(big, 0)
        self.assertEqual(self.good.pread(32 << 20, 0), big)

    def test_nobody_reads(self):
        """Twenty clients ask for 64 MiB each and take nothing; one that does is served meanwhile."""
        deaf = [self.started() for _ in range(20)]
        for raw in deaf:
            for cookie in range(64):
                raw.request(0, 0, MIB, cookie=cookie)
        self.serves()
        self.assertLess(self.server.resident(), MEMORY)

    def test_many_reads_and_gone(self):
        """What makes nbdkit 1.32 abort."""
        for _ in range(30):
            handle = self.server.connect("disk")
            for _ in range(64):
                handle.aio_pread(nbd.Buffer(MIB), 0)
            handle.poll(10)
            del handle

    def test_gone_in_the_middle_of_copy_on_write(self):
        self.server.farcopy("flashcopy", "create", "disk", "copy")
        before = self.server.read("disk@copy")
        for _ in range(20):
            raw = self.started()
            for cookie in range(100):
                raw.request(1, random.randrange(0, 8000) * 4096, 4096, cookie=cookie, payload=b"g" * 4096)
            raw.socket.close()
        self.serves()
        self.assertEqual(self.server.read("disk@copy"), before)

    def test_noise(self):
        """Random bytes at every phase: the server goes on, gives everything back, and what others have written stays."""
        data = random.randbytes(MIB)
        self.good.pwrite(data, 5 * MIB)
        sockets = self.server.sockets()
        ended = []

        def attack(seed):
            generator = random.Random(seed)
            for _ in range(60):
                try:
                    raw = Raw(self.server) if generator.random() < 0.5 else self.started(b"other")
                    raw.socket.sendall(generator.randbytes(generator.randrange(1, 5000)))
                    if generator.random() < 0.5:
                        raw.socket.settimeout(0.01)
                        raw.socket.recv(100)
                except (OSError, EOFError):
                    pass
                finally:
                    raw.socket.close()
            ended.append(seed)
        threads = [threading.Thread(target=attack, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(len(ended), len(threads), "every attack was carried out to its end")
        self.serves()
        self.assertTrue(self.good.pread(MIB, 5 * MIB) == data, "what another client had written has changed")
        self.assertFalse(any(self.server.read("other")), "noise was taken for a request")
        wait_for(lambda: self.server.sockets() <= sockets, what="the connections of clients that are gone to end")
