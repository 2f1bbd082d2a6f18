"""A chain of dependent writes over the volumes of several hosts, and the check that images of these volumes are a closed cut of it.

Write 1, 2, 3 … of the chain goes to one host after the other, each only after the one before was acknowledged: write k to the
volume of host k mod n, where it fills block (k // n) mod BLOCKS with its number. When all blocks are used, older numbers give way.

In a closed cut, if write k is there, then every earlier one is: in each block stands the newest write that belongs there up to the
last one of the cut. A write that was not acknowledged may be there, as the last one, or not: it is issued anew until it is.

(`closedcut` has many chains over two volumes of one host, with connections that do not outlive it; here there are many hosts, and any
of them may be killed and come back.)
"""

import struct
import threading
import time

import nbd

BLOCK = 4096
BLOCKS = 512


def content(number):
    return struct.pack("<Q", number) * (BLOCK // 8)


def place(number, hosts):
    """Which host write `number` goes to, and to which byte of its volume."""
    return number % hosts, number // hosts % BLOCKS * BLOCK


class Chain:
    """Writes the chain from one thread until it is told to stop: `sites` and the export to write to at each."""

    def __init__(self, sites, exports):
        self.sites, self.exports = list(sites), list(exports)
        self.acknowledged = 0
        self.longest = 0.0  # seconds that a write took that was acknowledged at its first try
        self.stopping = False
        self.losses = False
        self.errors = []
        self.handles = {}
        self.thread = None

    def start(self):
        """Begins, or goes on where it stopped."""
        self.stopping = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def expect_losses(self):
        """From now on hosts may be gone, or serve nobody; before this every error of a write is one."""
        self.losses = True

    def stop(self):
        """On return nothing is under way. Raises `AssertionError` when a write failed that should not have."""
        self.stopping = True
        if self.thread:
            self.thread.join(timeout=60)
            assert not self.thread.is_alive(), f"write {self.acknowledged + 1} hangs"
            self.thread = None
        self._disconnect()
        assert self.errors == [], f"writes failed while the hosts were there: {self.errors}"

    def _run(self):
        while not self.stopping:
            self._write(self.acknowledged + 1)

    def _write(self, number):
        """Until it is acknowledged."""
        host, offset = place(number, len(self.sites))
        data, again = content(number), False
        while not self.stopping:
            try:
                handle = self._connected(host)
                began = time.monotonic()
                handle.pwrite(data, offset)
            except nbd.Error as error:
                self.handles.pop(host, None)
                again = True
                if not self.losses:
                    self.errors.append(f"{self.sites[host].name}: {error}")
                    self.stopping = True
                time.sleep(0.02)
                continue
            if not again:
                self.longest = max(self.longest, time.monotonic() - began)
            self.acknowledged = number
            return

    def _connected(self, host):
        if host not in self.handles:
            self.handles[host] = self.sites[host].connect(self.exports[host])
        return self.handles[host]

    def _disconnect(self):
        for handle in self.handles.values():
            try:
                handle.shutdown()
            except nbd.Error:
                pass  # it has gone before
        self.handles = {}


def check(images):
    """Returns the last write in the images, one of each host's volume in the chain's order; raises AssertionError when they are no closed
    cut. An image that is None is not looked at: then the others are a part of a closed cut."""
    hosts = len(images)
    there = {}
    for host, image in enumerate(images):
        if image is None:
            continue
        for offset in range(0, BLOCKS * BLOCK, BLOCK):
            data = bytes(image[offset:offset + BLOCK])
            number, = struct.unpack_from("<Q", data)
            assert data == content(number), f"host {host}: the block at {offset} is torn, or foreign"
            assert number == 0 or place(number, hosts) == (host, offset), f"host {host}: write {number} stands at {offset}"
            there[host, offset] = number
    last = max(there.values(), default=0)
    for number in range(max(1, last - hosts * BLOCKS + 1), last + 1):
        where = place(number, hosts)
        if images[where[0]] is None:
            continue
        assert there[where] == number, (
            f"write {last} is there, but write {number} to host {where[0]}, acknowledged before it was issued, is not: "
            f"write {there[where]} stands there")
    return last
