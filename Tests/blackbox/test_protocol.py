"""The NBD server through other people's clients, and through a raw socket for what those do not send."""

import os
import random
import socket
import struct
import time

import nbd

from rawclient import IHAVEOPT, Raw
from sites import SiteTest, run, wait_for

SIZE = 64 << 20


class Protocol(SiteTest):
    def setUp(self):
        super().setUp()
        self.server = self.site("solo", {"disk": "64MiB", "other": "1MiB"})

    def started(self, name=b"disk"):
        raw = Raw(self.server)
        self.assertEqual(raw.go(name)[-1][1], 1)
        return raw

    def alive(self):
        """Other clients keep their service."""
        handle = self.server.connect("disk")
        handle.pwrite(b"alive" * 100, 1 << 20)
        self.assertEqual(handle.pread(500, 1 << 20), b"alive" * 100)
        handle.shutdown()

    # Clients of other people.

    def test_nbdinfo_tells_the_truth(self):
        import json
        info = json.loads(run("nbdinfo", "--json", self.server.uri("disk")).stdout)
        export = info["exports"][0]
        self.assertEqual(export["export-size"], SIZE)
        for feature in ("can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"):
            self.assertTrue(export[feature], feature)
        self.assertFalse(export["is_read_only"])
        self.assertEqual(export["block_size_maximum"], 32 << 20)
        listed = json.loads(run("nbdinfo", "--json", "--list", self.server.uri("")).stdout)
        self.assertEqual([e["export-name"] for e in listed["exports"]], ["disk", "other"])

    def test_nbdcopy_there_and_back(self):
        image = os.path.join(self.directory, "random.img")
        with open(image, "wb") as file:
            file.write(random.randbytes(SIZE))
        run("nbdcopy", "--connections=4", "--requests=32", image, self.server.uri("disk"))
        run("nbdcopy", self.server.uri("disk"), f"{image}.back")
        run("cmp", image, f"{image}.back")
        run("cmp", image, f"{self.server.path}/disk.img")

    def test_qemu_io_patterns_zeroes_and_discard(self):
        target = self.server.uri("disk")
        done = run("qemu-io", "-f", "raw", target,
                   "-c", "write -P 0x5a 1M 3M", "-c", "read -P 0x5a 1M 3M",
                   "-c", "write -z 2M 1M", "-c", "read -P 0 2M 1M", "-c", "write -z -u 1M 64k", "-c", "read -P 0 1M 64k",
                   "-c", "discard 3M 1M", "-c", "read -P 0 3M 1M", "-c", "write -f -P 7 4097 511", "-c", "flush",
                   "-c", "read -P 7 4097 511")
        self.assertNotIn("failed", done.stdout + done.stderr)

    def test_fio_verifies_random_writes(self):
        run("fio", "--thread", "--name=verify", "--ioengine=nbd", f"--uri={self.server.uri('disk')}", "--rw=randrw", "--size=60M",
            "--bsrange=512-256k", "--iodepth=64", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
            "--output=/dev/null")

    def test_qemu_img_compares_multi_connection_copies(self):
        source = os.path.join(self.directory, "source.img")
        with open(source, "wb") as file:
            file.truncate(SIZE)
            file.seek(5 << 20)
            file.write(random.randbytes(7 << 20))
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8", source, self.server.uri("disk"))
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, self.server.uri("disk"))

    def test_largest_payload(self):
        handle = self.server.connect("disk")
        data = random.randbytes(32 << 20)
        handle.pwrite(data, 12345)
        self.assertEqual(bytes(handle.pread(32 << 20, 12345)), data)

    def test_tcp(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        site = self.site("tcp", {"disk": "1MiB"}, nbd_listen=[f"127.0.0.1:{port}"])
        handle = nbd.NBD()
        handle.connect_uri(f"nbd://127.0.0.1:{port}/disk")
        handle.pwrite(b"tcp!" * 128, 512)
        self.assertEqual(site.connect("disk").pread(512, 512), b"tcp!" * 128)

    # Handshake.

    def test_export_name(self):
        raw = Raw(self.server)
        raw.option(1, b"disk")
        self.assertEqual(struct.unpack(">Q", raw.receive(8))[0], SIZE)
        raw.receive(2)
        raw.request(0, 0, 512)
        self.assertEqual(raw.answer(512)[0], 0)
        with_zeroes = Raw(self.server, flags=1)
        with_zeroes.option(1, b"disk")
        self.assertEqual(with_zeroes.receive(134)[10:], bytes(124))

    def test_export_name_unknown_closes(self):
        raw = Raw(self.server)
        raw.option(1, b"nothing")
        self.assertTrue(raw.is_closed())

    def test_unknown_client_flags_close(self):
        self.assertTrue(Raw(self.server, flags=1 << 31).is_closed())

    def test_bad_option_magic_closes(self):
        raw = Raw(self.server)
        raw.socket.sendall(b"x" * 16)
        self.assertTrue(raw.is_closed())

    def test_unknown_option_keeps_step(self):
        raw = Raw(self.server)
        for length in (0, 4, 70_000):
            raw.option(0x7654321, b"z" * length)
            self.assertEqual(raw.reply()[:2], (0x7654321, 0x80000001))
        self.assertEqual(raw.go(b"disk")[-1][1], 1)

    def test_huge_option_closes(self):
        raw = Raw(self.server)
        raw.option(7, b"", length=0xffffffff)
        self.assertTrue(raw.is_closed())

    def test_malformed_info_keeps_step(self):
        raw = Raw(self.server)
        for data in (b"", b"\0\0\0\4disk", b"\0\0\0\5disk\0\0", b"\0\0\0\4disk\0\1", b"\xff\xff\xff\xffdisk\0\0",
                     b"\0\0\0\4di\0k\0\0", b"\0\0\0\2\xff\xfe\0\0"):
            raw.option(6, data)
            self.assertEqual(raw.reply()[1], 0x80000003, data)
        raw.option(3, b"data")
        self.assertEqual(raw.reply()[1], 0x80000003)
        self.assertEqual(raw.go(b"nothing", 6)[-1][1], 0x80000006)
        info = raw.go(b"disk", 6, infos=[3, 3, 99])
        go = raw.go(b"disk", 7, infos=[3, 3, 99])
        self.assertEqual([r[1:] for r in info], [r[1:] for r in go])
        self.assertEqual(len(go), 3)

    def test_a_long_list_is_sent_whole(self):
        """Twenty lists in a row that the client reads late."""
        site = self.site("many", {f"volume-with-a-rather-long-name-{number:03}": "1MiB" for number in range(300)})
        raw = Raw(site)
        for _ in range(20):
            raw.option(3)
        time.sleep(0.2)
        for _ in range(20):
            names = []
            while True:
                _, kind, data = raw.reply()
                if kind == 1:
                    break
                names.append(data[4:])
            self.assertEqual(len(names), 300)
        self.assertEqual(raw.go(b"volume-with-a-rather-long-name-299")[-1][1], 1)

    def test_lists_by_the_thousand_end_the_connection(self):
        site = self.site("many", {f"volume-with-a-rather-long-name-{number:03}": "1MiB" for number in range(100)})
        for count in (8_000, 100_000):
            raw, replied = Raw(site), 0
            try:
                raw.socket.sendall((IHAVEOPT + struct.pack(">II", 3, 0)) * count)
                while piece := raw.socket.recv(1 << 20):
                    replied += len(piece)
            except ConnectionError:
                pass
            # Memory is taken for a bounded number of replies; each has more than 4,000 bytes.
            self.assertLess(replied, 4 << 20)
        self.assertLess(site.resident(), 200 << 20)
        self.assertEqual(site.connect("volume-with-a-rather-long-name-099").get_size(), 1 << 20)

    def test_abort(self):
        raw = Raw(self.server)
        raw.option(2, b"ignored")
        self.assertEqual(raw.reply()[1], 1)
        self.assertTrue(raw.is_closed())

    def test_pipelined_handshake_and_requests(self):
        raw = Raw(self.server, flags=None)
        go = struct.pack(">I", 4) + b"disk" + b"\0\0"
        raw.socket.sendall(struct.pack(">I", 3) + IHAVEOPT + struct.pack(">II", 3, 0)
                           + IHAVEOPT + struct.pack(">II", 7, len(go)) + go
                           + struct.pack(">IHHQQI", 0x25609513, 0, 0, 77, 0, 512))
        while raw.reply()[1] != 1:
            pass
        while raw.reply()[1] != 1:
            pass
        self.assertEqual(raw.answer(512), (0, 77, bytes(512)))

    # Requests.

    def test_errors_and_the_connection_goes_on(self):
        raw = self.started()
        cases = [
            (0, SIZE, 1, 0, 22), (0, SIZE - 1, 2, 0, 22), (0, 2**64 - 1, 1, 0, 22), (0, 2**63, 2**31, 0, 22),
            (0, 0, 0xffffffff, 0, 22), (0, 0, 33 << 20, 0, 22), (4, SIZE, 512, 0, 22), (6, SIZE, 512, 0, 28),
            (99, 0, 0, 0, 22), (5, 0, 512, 0, 0), (5, SIZE, 512, 0, 22), (5, 0, 512, 2, 22), (7, 0, 512, 0, 22), (0, 0, 512, 1 << 2, 22), (4, 0, 512, 2, 22),
            (3, 0, 0, 1 << 5, 22), (6, 0, 4096, 3, 0), (4, 0, 4096, 1, 0), (3, 0, 0, 1, 0), (0, SIZE, 0, 0, 0)]
        for kind, offset, length, flags, expected in cases:
            raw.request(kind, offset, length, cookie=5, flags=flags)
            self.assertEqual(raw.answer()[:2], (expected, 5), (kind, offset, length, flags))
        for offset, flags, expected in ((SIZE - 100, 0, 28), (2**64 - 10, 0, 28), (0, 1 << 3, 22)):
            raw.request(1, offset, 4096, cookie=6, flags=flags, payload=b"p" * 4096)
            self.assertEqual(raw.answer()[:2], (expected, 6))
        raw.request(0, 0, 4096)
        self.assertEqual(raw.answer(4096)[2], bytes(4096), "a refused write leaves nothing")

    def test_bad_request_magic_closes(self):
        raw = self.started()
        raw.request(0, 0, 512, magic=0xdeadbeef)
        self.assertTrue(raw.is_closed())
        self.alive()

    def test_oversize_write_closes(self):
        raw = self.started()
        raw.request(1, 0, 0xffffffff)
        self.assertTrue(raw.is_closed())
        self.alive()

    def test_disconnect_answers_what_came_before(self):
        raw = self.started()
        for cookie in range(50):
            raw.request(0, cookie * 4096, 4096, cookie=cookie)
        raw.request(2)
        raw.socket.sendall(b"garbage after the end")
        seen = {raw.answer(4096)[1] for _ in range(50)}
        self.assertEqual(seen, set(range(50)))
        self.assertTrue(raw.is_closed())

    def test_half_close_answers_what_came_before(self):
        raw = self.started()
        for cookie in range(300):
            raw.request(1, cookie * 4096, 4096, cookie=cookie, payload=bytes([cookie % 251]) * 4096)
        raw.socket.shutdown(socket.SHUT_WR)
        self.assertEqual({raw.answer()[1] for _ in range(300)}, set(range(300)))
        self.assertTrue(raw.is_closed())

    def test_partial_write_is_not_carried_out(self):
        for cut in (0, 1, 511, 4095):
            raw = self.started(b"other")
            raw.request(1, 8192, 4096, payload=b"q" * cut)
            raw.socket.close()
        handle = self.server.connect("other")
        self.assertEqual(handle.pread(4096, 8192), bytes(4096))

    def test_clients_that_vanish_at_any_byte(self):
        script = struct.pack(">I", 3) + IHAVEOPT + struct.pack(">II", 7, 10) + struct.pack(">I", 4) + b"disk\0\0" \
            + struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 65536) + struct.pack(">IHHQQI", 0x25609513, 0, 1, 2, 0, 64) + b"w" * 64
        for cut in range(len(script)):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(self.server.socket)
                client.sendall(script[:cut])
        self.alive()
        wait_for(lambda: self.server.sockets() < 8, what="closed sockets")

    def test_client_that_never_reads(self):
        raw = self.started()
        raw.socket.settimeout(2)
        try:
            for cookie in range(100_000):
                raw.request(0, 0, 1 << 20, cookie=cookie)
        except TimeoutError:
            pass
        self.alive()
        self.assertLess(self.server.resident(), 700 << 20, "memory stays bounded")
        raw.socket.close()
        self.alive()

    def test_many_pipelined_reads_then_gone(self):
        for _ in range(20):
            raw = self.started()
            for cookie in range(64):
                raw.request(0, 0, 256 << 10, cookie=cookie)
            raw.receive(1000)
            raw.socket.close()
        self.alive()

    def test_many_connections(self):
        clients = [self.started() for _ in range(200)]
        for index, raw in enumerate(clients):
            raw.request(1, index * 4096, 4096, cookie=index, payload=bytes([index]) * 4096)
        for index, raw in enumerate(clients):
            self.assertEqual(raw.answer()[:2], (0, index))
        for index, raw in enumerate(clients):
            clients[(index + 1) % 200].request(0, index * 4096, 4096, cookie=index)
        for index, raw in enumerate(clients):
            self.assertEqual(clients[(index + 1) % 200].answer(4096), (0, index, bytes([index]) * 4096))
