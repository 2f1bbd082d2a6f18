"""A client that sends what it likes, byte by byte, and takes replies apart."""

import socket
import struct

IHAVEOPT = b"IHAVEOPT"
ACK, SERVER, INFO, META_CONTEXT = 1, 2, 3, 4
ERROR = 0x80000000
UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN, TOO_BIG, EXT_HEADER_REQD = (ERROR + n for n in (1, 2, 3, 5, 6, 9, 10))


class Raw:
    """A client that sends what it likes."""

    def __init__(self, site, flags=3):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(site.socket)
        greeting = self.receive(18)
        assert greeting == b"NBDMAGIC" + IHAVEOPT + b"\x00\x03", greeting
        if flags is not None:
            self.socket.sendall(struct.pack(">I", flags))

    def receive(self, count):
        data = b""
        while len(data) < count:
            piece = self.socket.recv(count - len(data))
            if not piece:
                raise EOFError(f"the server closed after {len(data)} of {count} bytes")
            data += piece
        return data

    def option(self, number, data=b"", length=None):
        self.socket.sendall(IHAVEOPT + struct.pack(">II", number, len(data) if length is None else length) + data)

    def reply(self):
        magic, option, kind, length = struct.unpack(">QIII", self.receive(20))
        assert magic == 0x3e889045565a9, hex(magic)
        return option, kind, self.receive(length)

    def go(self, name, number=7, infos=()):
        data = struct.pack(">I", len(name)) + name + struct.pack(">H", len(infos))
        self.option(number, data + b"".join(struct.pack(">H", info) for info in infos))
        replies = []
        while True:
            replies.append(self.reply())
            if replies[-1][1] == 1 or replies[-1][1] >> 31:
                return replies

    @staticmethod
    def packed(kind, offset=0, length=0, cookie=1, flags=0, payload=b"", magic=0x25609513):
        return struct.pack(">IHHQQI", magic, flags, kind, cookie, offset, length) + payload

    def request(self, *fields, **named):
        self.socket.sendall(self.packed(*fields, **named))

    def answer(self, length=0):
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == 0x67446698, hex(magic)
        return error, cookie, self.receive(length) if error == 0 else b""

    def is_closed(self):
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    # Structured replies and extended headers.

    def negotiate(self, option=8):
        self.option(option)
        assert self.reply() == (option, ACK, b"")

    def contexts(self, name, *queries, number=10):
        """LIST or SET_META_CONTEXT: the final reply's type, and the contexts as {name: id}."""
        data = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
        self.option(number, data + b"".join(struct.pack(">I", len(query)) + query for query in queries))
        found = {}
        while True:
            _, kind, data = self.reply()
            if kind != META_CONTEXT:
                return kind, found
            found[data[4:].decode()] = struct.unpack(">I", data[:4])[0]

    def extended_request(self, kind, offset=0, length=0, cookie=1, flags=0, payload=b""):
        self.socket.sendall(struct.pack(">IHHQQQ", 0x21e41c71, flags, kind, cookie, offset, length) + payload)

    def chunk(self, extended=False):
        """One chunk: (done, type, cookie, payload), with the request's offset behind it when extended."""
        if extended:
            magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQQ", self.receive(32))
            assert magic == 0x6e8a278c, hex(magic)
            return flags & 1 == 1, kind, cookie, self.receive(length), offset
        magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.receive(20))
        assert magic == 0x668e33ef, hex(magic)
        return flags & 1 == 1, kind, cookie, self.receive(length)

    def chunks(self, extended=False):
        found = []
        while True:
            found.append(self.chunk(extended))
            if found[-1][0]:
                return found
