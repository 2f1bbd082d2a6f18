"""Structured replies, extended headers and metadata contexts, by rule of the NBD document."""

import json
import os
import random
import struct

import nbd

from rawclient import ACK, EXT_HEADER_REQD, INVALID, META_CONTEXT, TOO_BIG, UNKNOWN, Raw
from sites import SiteTest, not_on_devices, run

MIB = 1 << 20
NONE, OFFSET_DATA, OFFSET_HOLE, BLOCK_STATUS, BLOCK_STATUS_EXT, ERROR = 0, 1, 2, 5, 6, 0x8001


def assemble(chunks, offset, length):
    """The data of a READ's chunks; fails where they overlap, leave a gap, or lie outside."""
    data = bytearray(length)
    covered = bytearray(length)
    for _, kind, _, payload, *_ in chunks:
        if kind == NONE:
            continue
        at = struct.unpack(">Q", payload[:8])[0] - offset
        piece = bytes(struct.unpack(">I", payload[8:])[0]) if kind == OFFSET_HOLE else payload[8:]
        assert kind in (OFFSET_DATA, OFFSET_HOLE) and 0 <= at and at + len(piece) <= length and piece
        assert not any(covered[at:at + len(piece)]), "chunks overlap"
        data[at:at + len(piece)] = piece
        covered[at:at + len(piece)] = b"\1" * len(piece)
    assert all(covered), "a byte is in no chunk"
    return bytes(data)


def descriptors(payload, extended=False):
    """(context, [(length, flags) …]) of a BLOCK_STATUS chunk."""
    if extended:
        context, count = struct.unpack(">II", payload[:8])
        found = list(struct.iter_unpack(">QQ", payload[8:]))
        assert len(found) == count
    else:
        context, found = struct.unpack(">I", payload[:4])[0], list(struct.iter_unpack(">II", payload[4:]))
    assert found and all(length for length, _ in found)
    assert all(a[1] != b[1] for a, b in zip(found, found[1:])), "equal neighbours are one"
    return context, found


class Structured(SiteTest):
    def setUp(self):
        super().setUp()
        self.server = self.site("solo", {"disk": "64MiB", "other": "1MiB"})

    def started(self, style=8, contexts=(), name=b"disk"):
        raw = Raw(self.server)
        raw.negotiate(style)
        if contexts:
            kind, self.ids = raw.contexts(name, *contexts)
            self.assertEqual(kind, ACK)
        self.assertEqual(raw.go(name)[-1][1], ACK)
        return raw

    # Options.

    def test_flags_tell_df_only_with_structured_replies(self):
        def flags(raw):
            return struct.unpack(">H", raw.go(b"disk", 6)[0][2][10:12])[0]
        raw = Raw(self.server)
        plain = flags(raw)
        self.assertEqual(plain & (1 << 7), 0)
        self.assertTrue(plain & 1 and plain & (1 << 10) and plain & (1 << 11), "CACHE and FAST_ZERO are told")
        raw.negotiate()
        self.assertEqual(flags(raw), plain | 1 << 7)

    def test_options_with_data_are_invalid(self):
        raw = Raw(self.server)
        for option in (8, 11):
            raw.option(option, b"x")
            self.assertEqual(raw.reply()[1], INVALID)
        raw.negotiate(8)
        raw.negotiate(8)
        raw.negotiate(11)
        raw.option(8)
        self.assertEqual(raw.reply()[1], EXT_HEADER_REQD)

    def test_infos_name_and_description(self):
        raw = Raw(self.server)
        replies = raw.go(b"disk", 6, infos=[1, 2, 3])
        infos = {struct.unpack(">H", data[:2])[0]: data[2:] for _, kind, data in replies if kind == 3}
        self.assertEqual(infos[1], b"disk")
        self.assertIn(b"solo", infos[2])
        self.assertEqual(struct.unpack(">III", infos[3]), (1, 4096, 32 << 20))

    def test_export_name_is_no_way_in_with_extended_headers(self):
        raw = Raw(self.server)
        raw.negotiate(11)
        raw.option(1, b"disk")
        self.assertTrue(raw.is_closed())

    # Metadata contexts.

    def test_list_and_set(self):
        self.server.farcopy("flashcopy", "create", "disk", "before")
        raw = Raw(self.server)
        self.assertEqual(raw.contexts(b"disk", b"base:allocation")[0], INVALID, "structured replies come first")
        raw.negotiate()
        everything = {"base:allocation": 0, "qemu:dirty-bitmap:before": 0}
        self.assertEqual(raw.contexts(b"disk", number=9), (ACK, everything))
        self.assertEqual(raw.contexts(b"disk", b"base:", number=9), (ACK, {"base:allocation": 0}))
        self.assertEqual(raw.contexts(b"disk", b"qemu:", number=9), (ACK, {"qemu:dirty-bitmap:before": 0}))
        self.assertEqual(raw.contexts(b"disk", b"x-other:thing", b"base:nothing", number=9), (ACK, {}))
        self.assertEqual(raw.contexts(b"disk@before", number=9), (ACK, {"base:allocation": 0, "qemu:allocation-depth": 0}))
        self.assertEqual(raw.contexts(b"nothing", number=9)[0], UNKNOWN)
        kind, chosen = raw.contexts(b"disk", b"base:allocation", b"base:allocation", b"qemu:dirty-bitmap:before", b"qemu:")
        self.assertEqual((kind, set(chosen)), (ACK, set(everything)))
        self.assertEqual(len(set(chosen.values())), 2, "each context has its own number")
        self.assertEqual(raw.contexts(b"disk", b"base:"), (ACK, {}))
        self.assertEqual(raw.contexts(b"disk"), (ACK, {}))

    def test_malformed_queries_keep_step(self):
        raw = Raw(self.server)
        raw.negotiate()
        for data in (b"", b"\0\0\0\4disk", b"\0\0\0\4disk\xff\xff\xff\xff", b"\0\0\0\4disk\0\0\0\1\0\0\0\x09short",
                     b"\0\0\0\4disk\0\0\0\0more", b"\xff\xff\xff\xffdisk\0\0\0\0", b"\0\0\0\4disk\0\0\0\1\0\0\0\2a\0"):
            for option in (9, 10):
                raw.option(option, data)
                self.assertEqual(raw.reply()[1], INVALID, data)
        raw.option(10, b"z" * 70_000)
        self.assertEqual(raw.reply()[1], TOO_BIG)
        self.assertEqual(raw.go(b"disk")[-1][1], ACK)

    def test_a_failed_set_and_another_export_void_the_selection(self):
        for spoil in (lambda raw: raw.contexts(b"nothing", b"base:allocation"), lambda raw: None):
            raw = Raw(self.server)
            raw.negotiate()
            self.assertEqual(raw.contexts(b"other", b"base:allocation")[0], ACK)
            spoil(raw)
            self.assertEqual(raw.go(b"disk")[-1][1], ACK)
            raw.request(7, 0, 4096)
            self.assertEqual(raw.chunks()[0][3][:4], struct.pack(">I", 22))

    def test_many_contexts_are_too_many(self):
        names = [f"copy{number}" for number in range(17)]
        for name in names:
            self.server.farcopy("flashcopy", "create", "other", name)
        raw = Raw(self.server)
        raw.negotiate()
        queries = [f"qemu:dirty-bitmap:{name}".encode() for name in names]
        self.assertEqual(raw.contexts(b"other", *queries)[0], TOO_BIG)
        self.assertEqual(raw.contexts(b"other", *queries[:16])[0], ACK)
        self.assertEqual(raw.go(b"other")[-1][1], ACK)
        raw.request(7, 0, MIB)
        self.assertEqual(len(raw.chunks()), 16)

    # READ.

    def test_holes_are_sent_as_holes(self):
        handle = self.server.connect("disk")
        pieces = {0: 5000, 8 * 4096: 4096, 100 * 4096 + 7: 1}
        for at, length in pieces.items():
            handle.pwrite(random.randbytes(length - 1) + b"\1", at)
        handle.flush()
        with open(f"{self.server.path}/disk.img", "rb") as file:
            image = file.read()
        raw = self.started()
        for offset, length in ((0, MIB), (1, 4096), (4095, 2), (3 * 4096, 4096), (100 * 4096, 4096 + 511), (0, 1)):
            raw.request(0, offset, length, cookie=length)
            chunks = raw.chunks()
            self.assertEqual(assemble(chunks, offset, length), image[offset:offset + length])
            self.assertTrue(all(cookie == length for _, _, cookie, _ in chunks))
        raw.request(0, 0, MIB)
        self.assertEqual([kind for _, kind, *_ in raw.chunks()].count(OFFSET_HOLE), 3)
        raw.request(0, 32 * MIB, 32 * MIB)
        self.assertEqual(len(raw.chunks()), 1, "an empty half is one hole")

    def test_a_scattered_read_has_a_bounded_number_of_chunks(self):
        handle = self.server.connect("disk")
        for block in range(0, 256, 2):
            handle.pwrite(b"\1" * 4096, block * 4096)
        raw = self.started()
        raw.request(0, 0, MIB)
        chunks = raw.chunks()
        self.assertLessEqual(len(chunks), 16)
        self.assertEqual(assemble(chunks, 0, MIB), (b"\1" * 4096 + bytes(4096)) * 128)

    def test_df_is_one_chunk(self):
        self.server.connect("disk").pwrite(b"\1" * 4096, 65536)
        raw = self.started()
        raw.request(0, 0, MIB, flags=4)
        chunks = raw.chunks()
        self.assertEqual([kind for _, kind, *_ in chunks], [OFFSET_DATA])
        self.assertEqual(assemble(chunks, 0, MIB), bytes(65536) + b"\1" * 4096 + bytes(MIB - 69632))

    def test_errors_of_reads_are_chunks_with_a_message(self):
        raw = self.started()
        for offset, length, expected in ((64 * MIB, 1, 22), (2**64 - 1, 1, 22), (0, 33 * MIB, 75)):
            raw.request(0, offset, length, cookie=9)
            done, kind, cookie, payload = raw.chunk()
            error, count = struct.unpack(">IH", payload[:6])
            self.assertEqual((done, kind, cookie, error), (True, ERROR, 9, expected))
            self.assertTrue(count == len(payload) - 6 and payload[6:].decode())
        raw.request(0, 0, 0)
        self.assertEqual(raw.chunk()[:2], (True, NONE))

    def test_libnbd_takes_structured_reads_apart(self):
        handle = self.server.connect("disk")
        handle.pwrite(b"\7" * 8192, MIB)
        seen = []
        handle.pread_structured(2 * MIB, 0, lambda data, at, kind, error: seen.append((at, len(data), kind)) or 0)
        self.assertEqual(seen, [(0, MIB, nbd.READ_HOLE), (MIB, 8192, nbd.READ_DATA),
                                (MIB + 8192, MIB - 8192, nbd.READ_HOLE)])

    # BLOCK_STATUS.

    @not_on_devices
    def test_allocation(self):
        handle = self.server.connect("disk")
        handle.pwrite(b"\1" * 65536, MIB)
        raw = self.started(contexts=[b"base:allocation"])
        raw.request(7, 0, 64 * MIB)
        (done, kind, _, payload), = raw.chunks()
        self.assertEqual((done, kind), (True, BLOCK_STATUS))
        context, found = descriptors(payload)
        self.assertEqual(context, self.ids["base:allocation"])
        self.assertEqual(found, [(MIB, 3), (65536, 0), (63 * MIB - 65536, 3)])
        raw.request(7, MIB + 4096, 8192, flags=8)
        self.assertEqual(descriptors(raw.chunks()[0][3])[1], [(8192, 0)])
        raw.request(7, 0, 64 * MIB, flags=8)
        self.assertEqual(descriptors(raw.chunks()[0][3])[1], [(MIB, 3)], "REQ_ONE is one descriptor")
        for offset, length in ((64 * MIB, 1), (0, 0), (64 * MIB - 1, 2), (2**64 - 4096, 4096)):
            raw.request(7, offset, length)
            self.assertEqual(raw.chunk()[1], ERROR)

    def test_every_context_is_answered(self):
        self.server.farcopy("flashcopy", "create", "disk", "before")
        raw = self.started(contexts=[b"base:allocation", b"qemu:dirty-bitmap:before"])
        raw.request(7, 4096, MIB)
        chunks = raw.chunks()
        self.assertEqual({descriptors(payload)[0] for _, _, _, payload in chunks}, set(self.ids.values()))
        self.assertEqual([done for done, *_ in chunks], [False, True])

    @not_on_devices
    def test_fragmented_status_can_be_walked_to_the_end(self):
        handle = self.server.connect("disk")
        for block in range(0, 2048, 2):
            handle.pwrite(b"\1" * 4096, block * 4096)
        raw = self.started(contexts=[b"base:allocation"])
        at, data = 0, 0
        while at < 64 * MIB:
            raw.request(7, at, 64 * MIB - at)
            for length, flags in descriptors(raw.chunks()[0][3])[1]:
                at += length
                data += length if flags == 0 else 0
        self.assertEqual((at, data), (64 * MIB, 1024 * 4096))

    @not_on_devices
    def test_nbdinfo_and_qemu_img_map(self):
        handle = self.server.connect("disk")
        handle.pwrite(b"\1" * MIB, 4 * MIB)
        regions = json.loads(run("nbdinfo", "--map", "--json", self.server.uri("disk")).stdout)
        self.assertEqual([(r["offset"], r["length"], r["type"]) for r in regions],
                         [(0, 4 * MIB, 3), (4 * MIB, MIB, 0), (5 * MIB, 59 * MIB, 3)])
        mapped = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", self.server.uri("disk")).stdout)
        self.assertEqual([(r["start"], r["length"], r["data"]) for r in mapped],
                         [(0, 4 * MIB, False), (4 * MIB, MIB, True), (5 * MIB, 59 * MIB, False)])

    @not_on_devices
    def test_depth_tells_where_a_copys_data_lies(self):
        handle = self.server.connect("disk")
        handle.pwrite(b"\1" * (3 * MIB), 0)
        self.server.farcopy("flashcopy", "create", "disk", "first")
        handle.pwrite(b"\2" * MIB, 0)
        self.server.farcopy("flashcopy", "create", "disk", "second")
        handle.pwrite(b"\3" * MIB, MIB)

        def depths(name):
            text = run("nbdinfo", "--map=qemu:allocation-depth", "--json", self.server.uri(name)).stdout
            return [(r["length"] // MIB, r["type"]) for r in json.loads(text)]
        # Its own target, the next copy's target, the source, and nothing.
        self.assertEqual(depths("disk@first"), [(1, 1), (1, 2), (1, 3), (61, 0)])
        self.assertEqual(depths("disk@second"), [(1, 2), (1, 1), (1, 2), (61, 0)])

    # What changed since a copy.

    def dirty(self, export, since):
        text = run("nbdinfo", f"--map=qemu:dirty-bitmap:{since}", "--json", self.server.uri(export)).stdout
        found = []
        for region in json.loads(text):
            if region["type"] == 1:
                found.append((region["offset"], region["length"]))
        return found

    def test_dirty_bitmap_since_a_flashcopy(self):
        handle = self.server.connect("disk")
        handle.pwrite(random.randbytes(20 * MIB), 0)
        self.server.farcopy("flashcopy", "create", "disk", "sunday")
        self.assertEqual(self.dirty("disk", "sunday"), [])
        handle.pwrite(b"\1" * 4096, 4096)
        handle.pwrite(b"\2" * 100, 3 * MIB + 10)
        handle.zero(8192, 5 * MIB)
        sunday = [(4096, 4096), (3 * MIB, 4096), (5 * MIB, 8192)]
        self.assertEqual(self.dirty("disk", "sunday"), sunday)
        self.server.farcopy("flashcopy", "create", "disk", "monday")
        handle.pwrite(b"\3" * 4096, 7 * MIB)
        self.assertEqual(self.dirty("disk", "sunday"), sunday + [(7 * MIB, 4096)])
        self.assertEqual(self.dirty("disk", "monday"), [(7 * MIB, 4096)])
        self.assertEqual(self.dirty("disk@monday", "sunday"), sunday)

    def test_an_incremental_backup_with_qemu_img(self):
        """A full backup of one copy, then only what changed up to the next, equals that next copy."""
        handle = self.server.connect("disk")
        handle.pwrite(random.randbytes(20 * MIB), 0)
        self.server.farcopy("flashcopy", "create", "disk", "full")
        backup = os.path.join(self.directory, "backup.img")
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", self.server.uri("disk@full"), backup)
        for _ in range(40):
            handle.pwrite(random.randbytes(5000), random.randrange(0, 60 * MIB))
        handle.zero(MIB, 12 * MIB)
        self.server.farcopy("flashcopy", "create", "disk", "next")
        image = json.dumps({
            "driver": "raw", "file": {
                "driver": "nbd", "export": "disk@next", "server": {"type": "unix", "path": self.server.socket},
                "x-dirty-bitmap": "qemu:dirty-bitmap:full"}})
        mapped = json.loads(run("qemu-img", "map", "--output=json", f"json:{image}").stdout)
        source = self.server.connect("disk@next")
        copied = 0
        with open(backup, "r+b") as file:
            for region in mapped:
                if not region["data"]:  # qemu shows dirty regions of such an image as holes
                    file.seek(region["start"])
                    data = source.pread(region["length"], region["start"])
                    copied += len(data)
                    file.write(data)
        with open(backup, "rb") as file:
            self.assertEqual(file.read(), self.server.read("disk@next"))
        self.assertLess(copied, 3 * MIB)

    def test_a_withdrawn_base_leaves_everything_dirty(self):
        self.server.farcopy("flashcopy", "create", "disk", "base")
        raw = self.started(contexts=[b"qemu:dirty-bitmap:base"])
        raw.request(7, 0, 64 * MIB)
        self.assertEqual(descriptors(raw.chunks()[0][3])[1], [(64 * MIB, 0)])
        self.server.farcopy("flashcopy", "withdraw", "disk", "base")
        raw.request(7, 0, 64 * MIB)
        self.assertEqual(descriptors(raw.chunks()[0][3])[1], [(64 * MIB, 1)])

    # Extended headers.

    def test_extended_requests_and_replies(self):
        raw = self.started(11, contexts=[b"base:allocation"])
        data = random.randbytes(10_000)
        raw.extended_request(1, 4000, len(data), cookie=7, flags=1 << 5, payload=data)
        self.assertEqual(raw.chunk(True), (True, NONE, 7, b"", 4000))
        raw.extended_request(0, 4000, len(data), cookie=8)
        chunks = raw.chunks(True)
        self.assertEqual(assemble(chunks, 4000, len(data)), data)
        self.assertTrue(all(chunk[4] == 4000 for chunk in chunks), "a chunk repeats the request's offset")
        raw.extended_request(3, 0, 0, cookie=9)
        self.assertEqual(raw.chunk(True), (True, NONE, 9, b"", 0))
        raw.extended_request(7, 0, 64 * MIB)
        (_, kind, _, payload, _), = raw.chunks(True)
        self.assertEqual(kind, BLOCK_STATUS_EXT)
        self.assertEqual(sum(length for length, _ in descriptors(payload, True)[1]), 64 * MIB)
        raw.extended_request(6, 0, 64 * MIB)
        self.assertEqual(raw.chunk(True)[1], NONE)
        raw.extended_request(0, 4000, 100)
        self.assertEqual(assemble(raw.chunks(True), 4000, 100), bytes(100))

    def test_extended_errors_and_payloads(self):
        raw = self.started(11)
        for kind, offset, length, flags, expected in (
                (0, 2**64 - 1, 2**64 - 1, 0, 22), (4, 0, 2**63, 0, 22), (6, 0, 2**64 - 1, 0, 28), (0, 0, 33 * MIB, 0, 75), (0, 0, 2**40, 0, 22),
                (99, 0, 2**50, 0, 22), (7, 0, 4096, 0, 22)):
            raw.extended_request(kind, offset, length, cookie=3, flags=flags)
            done, chunk, cookie, payload, echoed = raw.chunk(True)
            self.assertEqual((done, chunk, cookie, echoed), (True, ERROR, 3, offset))
            self.assertEqual(struct.unpack(">I", payload[:4])[0], expected)
        # A payload on a command that has none is thrown away, and the stream stays in step.
        raw.extended_request(3, 0, 1000, flags=1 << 5, payload=b"p" * 1000)
        self.assertEqual(struct.unpack(">I", raw.chunk(True)[3][:4])[0], 22)
        # WRITE without the flag is taken as it is meant.
        raw.extended_request(1, 0, 512, payload=b"w" * 512)
        self.assertEqual(raw.chunk(True)[1], NONE)
        raw.extended_request(1, 0, 2**33, flags=1 << 5)
        self.assertTrue(raw.is_closed())

    def test_a_compact_request_ends_an_extended_session(self):
        raw = self.started(11)
        raw.request(0, 0, 512)
        raw.socket.sendall(bytes(8))
        self.assertTrue(raw.is_closed())
        raw = self.started(8)
        raw.extended_request(0, 0, 512)
        self.assertTrue(raw.is_closed())

    # CACHE and fast zeroes.

    def test_cache_changes_nothing(self):
        handle = self.server.connect("disk")
        handle.pwrite(b"c" * 4096, 0)
        handle.cache(64 * MIB, 0)
        self.assertEqual(handle.pread(4096, 0), b"c" * 4096)

    def test_fast_zero(self):
        handle = self.server.connect("disk")
        handle.pwrite(b"z" * MIB, 0)
        self.assertTrue(handle.can_fast_zero())
        handle.zero(MIB, 0, nbd.CMD_FLAG_FAST_ZERO)
        self.assertEqual(handle.pread(MIB, 0), bytes(MIB))
