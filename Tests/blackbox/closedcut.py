"""Dependent writes over two volumes, and the check that an image pair is a closed cut of them.

Each chain writes step 1, 2, 3 …: odd steps to the first volume, even steps to the second, each only after the one before
was acknowledged. Step s of a chain goes to slot (s // 2) mod SLOTS of that chain in its volume, as 512 bytes that say so.
Slots of different chains share grains, so that in-flight writes of one chain meet the copy-on-write of another.

In a closed cut, if step s of a chain is there, then every earlier one is: in each slot stands the newest step that
belongs there up to the chain's last step.
"""

import struct
import threading
import time

import nbd

from sites import read_handle

SLOTS = 96
SECTOR = 512
MAGIC = b"farcopy-cut!"


def offset(chain, chains, step, size):
    """Slots of all chains lie side by side, spread over the volume."""
    slot = (step // 2) % SLOTS
    stride = (size // SLOTS) // SECTOR * SECTOR
    return slot * stride + chain * SECTOR


def sector(chain, step):
    head = MAGIC + struct.pack("<IQ", chain, step)
    return head + struct.pack("<Q", step) * ((SECTOR - len(head)) // 8)


class Writers:
    """`chains` threads, each with connections of its own to both volumes."""

    def __init__(self, connect, size, chains=6):
        self.connect = connect
        self.size = size
        self.chains = chains
        self.steps = [0] * chains  # acknowledged
        self.stopping = False
        self.server_ends = False
        self.errors = []
        self.threads = []

    def start(self):
        self.stopping = self.server_ends = False
        for chain in range(self.chains):
            handles = self.connect()
            thread = threading.Thread(target=self._run, args=(chain, handles), daemon=True)
            self.threads.append(thread)
            thread.start()

    def _run(self, chain, handles):
        step = self.steps[chain]
        try:
            while not self.stopping:
                step += 1
                target = handles[(step + 1) % 2]
                target.pwrite(sector(chain, step), offset(chain, self.chains, step, self.size))
                self.steps[chain] = step
        except Exception as error:
            if not (self.server_ends and isinstance(error, nbd.Error)):
                self.errors.append(error)

    def expect_the_end(self):
        """The server is about to be killed: until the next start it is no error that it is gone. Before this every error is one."""
        self.server_ends = True

    def stop(self):
        self.stopping = True
        self.join()

    def join(self):
        for thread in self.threads:
            thread.join(timeout=60)
            assert not thread.is_alive(), "a writer hangs"
        self.threads = []
        assert self.errors == [], f"writers failed while the server was there: {self.errors}"


def look(site, seconds, chains, size):
    """Checks the newest recovery point at a site, over and over; returns how often."""
    end, looked = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        number = site.points()[-1]["id"]
        try:
            handles = (site.connect(f"data@{number}"), site.connect(f"log@{number}"))
        except nbd.Error:
            continue  # retired meanwhile
        check(*(read_handle(handle) for handle in handles), chains, size)
        looked += 1
    return looked


def check(first, second, chains, size):
    """Returns the last step of each chain in the pair of images; raises AssertionError when it is no closed cut."""
    last = []
    for chain in range(chains):
        found = {}
        for which, image in ((0, first), (1, second)):
            for slot in range(SLOTS):
                at = offset(chain, chains, 2 * slot, size)
                data = image[at:at + SECTOR]
                if data == bytes(SECTOR):
                    continue
                named, step = struct.unpack("<IQ", data[len(MAGIC):len(MAGIC) + 12])
                assert data == sector(chain, step), f"chain {chain}: torn or foreign sector in slot {slot} of volume {which}"
                assert named == chain and (step + 1) % 2 == which and (step // 2) % SLOTS == slot, f"chain {chain}: step {step} in a wrong place"
                found[step] = which
        newest = max(found, default=0)
        for step in range(max(1, newest - 2 * SLOTS + 2), newest + 1):
            assert step in found, f"chain {chain}: step {newest} is there, but step {step}, acknowledged before it was issued, is not"
        last.append(newest)
    return last
