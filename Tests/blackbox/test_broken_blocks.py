"""Single blocks fail when they are written, for a while: what is asked for again and succeeds must be there after power loss.

The kernel tells of a failed write-back once and calls the pages clean; and ext4 calls the second write to a block flushed that was only
reserved, and whose first write has failed.
"""

import json
import os
import random
import struct
import time

import nbd

from laboratory import LaboratoryTest, write_back
from sites import wait_for

MIB = 1 << 20
PAGE = 4096
SLOT = 256 << 10


class BrokenBlocks(LaboratoryTest):
    kind = "thin"

    def filled_pair(self):
        east, west = self.pair({"disk": "16MiB"}, interval="manual", keep=8)
        handle = east.connect("disk")
        base = random.randbytes(16 * MIB)
        for at in range(0, len(base), MIB):
            handle.pwrite(base[at:at + MIB], at)
        handle.flush()
        return east, west, handle, base, east.cycle()

    def insist(self, ask):
        """Asks until it is done."""
        end = time.monotonic() + 30
        while ask().returncode != 0:
            self.assertLess(time.monotonic(), end)
            time.sleep(0.3)

    def test_bits_of_a_recovery_point(self):
        east, west, handle, base, point = self.filled_pair()
        bitmap = f"{west.state}/volumes/disk/copies/{point}.bitmap"
        west.data_disk.break_at(bitmap, 0, 2 * PAGE)
        handle.pwrite(random.randbytes(256 << 10), 3 * MIB)
        handle.flush()
        self.assertNotEqual(east.farcopy("cycle", "shop", "--wait", check=False).returncode, 0, "the secondary refuses")
        west.data_disk.mend()
        self.insist(lambda: east.farcopy("cycle", "shop", "--wait", check=False))
        east.farcopy("suspend", "shop")
        west.lose_power()
        west.start()
        self.assertTrue(west.read(f"disk@{point}") == base, "the older point holds newer data")

    def test_marks_of_what_the_peer_lacks(self):
        """A resync that could not be written down is asked for again."""
        east, west, handle, _, _ = self.filled_pair()
        east.farcopy("suspend", "shop")
        handle.pwrite(random.randbytes(4 * MIB), 8 * MIB)  # never sent
        handle.flush()
        handle.shutdown()
        east.kill()
        west.farcopy("failover", "shop")
        wait_for(lambda: west.status()["volumes"]["disk"]["restoring_bytes"] == 0, what="the restore")
        east.start()
        west.farcopy("rate", "shop", "64KiB")
        west.data_disk.break_at(f"{west.state}/volumes/disk/recording.bitmap", 0, 4 * PAGE)
        words = ("resync", "shop", "--discard", "east", "--yes")
        self.assertNotEqual(west.farcopy(*words, check=False).returncode, 0)
        west.data_disk.mend()
        self.insist(lambda: west.farcopy(*words, check=False))
        west.lose_power()
        west.start()
        west.farcopy("rate", "shop", "default")
        point = west.cycle()
        self.assertTrue(east.read(f"disk@{point}") == west.read("disk"), "the new secondary differs")

    def test_a_journal_that_cannot_be_written(self):
        """ext4 tells whoever waits for the transaction; whose flush comes later, although it is of the same one, it tells that all is well."""
        site = self.site("solo", {"one": "8MiB", "two": "8MiB"}, apart=True)  # the site itself changes nothing there
        handles = [site.connect(volume) for volume in ("one", "two")]
        site.data_disk.break_journal()
        for handle in handles:
            handle.pwrite(random.randbytes(PAGE), MIB)  # of a hole
        for volume in ("one", "two"):
            write_back(site.image(volume), 8 * MIB)
        for _ in range(2):
            for handle in handles:
                with self.assertRaises(nbd.Error):
                    handle.flush()
        with self.assertRaises(nbd.Error):
            handles[1].pwrite(random.randbytes(PAGE), MIB, nbd.CMD_FLAG_FUA)

    def test_a_record(self):
        site = self.site("solo", {"disk": "1MiB"})
        record = f"{site.state}/volumes/disk/volume.record"

        def slots():
            with open(record, "rb") as file:
                data = file.read()
            return [struct.unpack("<QI", data[at + 8:at + 20]) if data[at:at + 8] == b"FARCOPY1" else (0, 0) for at in (0, SLOT)]

        count = 0
        while max(length for _, length in slots()) < PAGE - 300:  # the next save is the first that needs a second block
            site.farcopy("flashcopy", "create", "disk", f"c{count}", "--durable")
            count += 1
        base = SLOT * ((max(sequence for sequence, _ in slots()) + 1) % 2 == 1)
        site.data_disk.break_at(record, base, 2 * PAGE)
        create = ("flashcopy", "create", "disk")
        first, *_ = [site.farcopy(*create, f"tried{number}", "--durable", check=False) for number in range(3)]
        self.assertNotEqual(first.returncode, 0)
        site.data_disk.mend()
        time.sleep(2)  # what waits for the record to be saved does it
        told = []
        for number in range(2):
            self.insist(lambda: site.farcopy(*create, f"told{number}", "--durable", check=False))
            told.append(f"told{number}")
        if max(sequence for sequence, _ in slots()) % 2 != (base > 0):  # the newest is in the other slot
            site.farcopy("flashcopy", "set", "disk", "told0", "--rate", "1MiB", check=False)
        site.lose_power()
        site.start()
        names = [copy["name"] for copy in json.loads(site.farcopy("flashcopy", "list", "--json").stdout)]
        self.assertTrue(set(told) <= set(names), f"{told} were told of; there are {names}")
        self.assertTrue(os.path.exists(record))
