"""The disk with the state directory fails while hosts go on writing to volumes on another disk that is well; then the machine loses power, and
the disk comes back as it was. What was written since is in no bitmap and no log of it, and is not forgotten all the same.
"""

import json
import os
import random
import time

from laboratory import LaboratoryTest, LoopDevice
from sites import FARCOPY, run, wait_for

MIB = 1 << 20
PAGE = 4096
SIZE = 48 * MIB
KNOWN = 8 * MIB  # the log's region, of 4 MiB, is in the log


class StateDisk(LaboratoryTest):
    """East's state directory has a disk of its own."""

    def make_site(self, name, volumes, **options):
        return super().make_site(name, volumes, apart=name == "east", **options)

    def come_back(self, site, without=None):
        """Power is lost; what the volume's disk has stays. `without`: the peer answers once the site has started."""
        site.end()
        site.state_disk.come_back()
        site.boot()
        if without:
            without.stop()
        site.start()
        if without:
            without.start()


class StateDiskFails(StateDisk):
    kind = "thin"

    def make_site(self, name, volumes, **options):
        site = super().make_site(name, volumes, **options)
        if name == "east" and self.on_device:
            self.device = LoopDevice(os.path.join(self.directory, "disk.under"), SIZE)
            self.addCleanup(self.device.detach)
            os.symlink(self.device.path, site.image("disk"))
        return site

    on_device = False

    def mirrored(self):
        """A pair with a point, and a host that has written to the first regions."""
        east, west = self.pair({"disk": f"{SIZE >> 20}MiB"}, interval="manual")
        handle = east.connect("disk")
        handle.pwrite(random.randbytes(KNOWN), 0)
        handle.flush()
        east.cycle()
        return east, west, handle

    def write_elsewhere(self, handle):
        """Hosts go on."""
        began = time.monotonic()
        for at in range(16 * MIB, 40 * MIB, 8 * MIB):
            handle.pwrite(random.randbytes(MIB), at)
        handle.flush()
        self.assertLess(time.monotonic() - began, 20, "hosts were held up")

    def copies(self, site):
        return json.loads(site.farcopy("flashcopy", "list", "--json").stdout)

    def assert_alike(self, east, west):
        wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")
        point = east.cycle()
        self.assertTrue(east.read("disk") == west.read(f"disk@{point}"), "something is forgotten")

    def test_the_volumes_own_file_knows(self):
        east, west, handle = self.mirrored()
        west.stop()
        east.state_disk.die()
        self.write_elsewhere(handle)
        self.come_back(east)
        west.start()
        self.assert_alike(east, west)
        with self.subTest("once"):
            self.assertEqual(os.listxattr(east.image("disk")), [])

    def test_a_failover_asks_for_all_of_it(self):
        east, west, handle = self.mirrored()
        east.state_disk.die()
        self.write_elsewhere(handle)
        east.kill()
        west.farcopy("failover", "shop")
        wait_for(lambda: west.status()["volumes"]["disk"]["restoring_bytes"] == 0, what="the restore")
        self.come_back(east, without=west if self.on_device else None)  # a file knows by itself
        west.farcopy("resync", "shop", "--discard", "east", "--yes")
        wait_for(lambda: west.group()["state"] == "mirroring", what="the resync")
        self.assert_alike(west, east)

    def test_a_resync_the_other_way_round_as_well(self):
        """The site that has the note is the one that gives up the role."""
        east, west, handle = self.mirrored()
        east.state_disk.die()
        self.write_elsewhere(handle)
        east.kill()
        west.farcopy("failover", "shop")
        other = west.connect("disk")
        other.pwrite(b"w" * (64 << 10), 0)
        other.shutdown()
        self.come_back(east, without=west if self.on_device else None)  # a file knows by itself
        if not self.on_device:
            self.assertEqual(east.group()["state"], "split-brain", "nobody knows what hosts wrote here without the peer")
        east.farcopy("resync", "shop", "--discard", "west", "--yes")
        self.assert_alike(east, west)

    def test_a_background_copy_is_refreshed_in_full(self):
        """What has changed since it was taken is in the log as well."""
        east, west, handle = self.mirrored()
        east.farcopy("flashcopy", "create", "disk", "copy", "--copy", "--rate", "0")
        complete = lambda: self.copies(east)[0]["background_copy"]["complete"]
        wait_for(complete, what="the background copy")
        east.state_disk.die()
        self.write_elsewhere(handle)
        self.come_back(east)
        east.farcopy("flashcopy", "refresh", "disk", "copy")
        wait_for(complete, what="the background copy")
        self.assertTrue(east.read("disk") == east.read("disk@copy"), "it lacks what was written meanwhile")

    def test_a_durable_copy_that_fails_first(self):
        """One note does not count for another."""
        east, west, handle = self.mirrored()
        east.farcopy("flashcopy", "create", "disk", "copy", "--durable")
        east.state_disk.die()
        handle.pwrite(random.randbytes(MIB), MIB)
        handle.flush()
        self.write_elsewhere(handle)
        if self.on_device:
            wait_for(lambda: "cannot write down any more" in west.farcopy("events").stdout, what="the note")
        self.come_back(east)
        self.assert_alike(east, west)

    def test_a_durable_copy_that_has_failed_stays_so(self):
        for volume_is_in_a_group in (True, False):
            with self.subTest(group=volume_is_in_a_group):
                if volume_is_in_a_group:
                    site, west, handle = self.mirrored()
                    west.stop()
                else:
                    self.put_away(*self.sites)
                    site = self.site("east", {"disk": f"{SIZE >> 20}MiB"})
                    handle = site.connect("disk")
                    handle.pwrite(random.randbytes(KNOWN), 0)
                site.farcopy("flashcopy", "create", "disk", "copy", "--durable")
                site.state_disk.die()
                handle.pwrite(random.randbytes(MIB), MIB)  # its old content cannot be kept
                handle.flush()
                self.come_back(site)
                copy, = self.copies(site)
                self.assertEqual(copy["state"], "failed")

    def test_more_copies_than_an_attribute_has_room_for(self):
        site = self.site("east", {"disk": "1MiB"})
        handle = site.connect("disk")
        for number in range(120):
            site.farcopy("flashcopy", "create", "disk", f"c{number}", "--durable")
        site.state_disk.die()
        handle.pwrite(b"2" * PAGE, 0)
        handle.flush()
        self.come_back(site)
        self.assertEqual({copy["state"] for copy in self.copies(site)}, {"failed"})


class StateDiskFailsUnderDevice(StateDiskFails):
    """A block device has no place for a note: the peer keeps it."""
    on_device = True
    test_a_durable_copy_that_has_failed_stays_so = None
    test_more_copies_than_an_attribute_has_room_for = None

    def test_the_volumes_own_file_knows(self):
        east, west, handle = self.mirrored()
        east.state_disk.die()
        self.write_elsewhere(handle)
        self.come_back(east)
        self.assert_alike(east, west)
        with self.subTest("the note is spent"):
            for count in range(2):  # the record has two copies
                handle = east.connect("disk")
                handle.pwrite(bytes([count + 1]) * MIB, 0)
                handle.shutdown()
                east.cycle()
            self.assertNotIn("untracked", run(FARCOPY, "inspect", f"{west.state}/groups/shop/group.record").stdout)

    def test_hosts_come_first(self):
        """Nobody takes the note: hosts wait a little, and the operator is told what to do."""
        east, west, handle = self.mirrored()
        west.kill()
        east.state_disk.die()
        self.write_elsewhere(handle)
        self.assertIn("farcopy adopt disk", str(east.group()["alerts"]))
        with self.subTest("the peer comes back"):
            west.start()
            wait_for(lambda: "cannot write down any more" in west.farcopy("events").stdout, what="the note")
            self.come_back(east)
            self.assert_alike(east, west)


class StateDiskIsShutDown(StateDisk):
    """XFS answers a store to a page of a bitmap that is clean with SIGBUS once it is shut down."""
    kind = "xfs"

    def test_hosts_go_on_and_nothing_is_forgotten(self):
        east, west = self.pair({"disk": "136MiB"}, interval="manual", keep=1)
        east.farcopy("flashcopy", "create", "disk", "copy", "--durable")
        handle = east.connect("disk")
        handle.pwrite(b"1" * MIB, 0)
        handle.flush()
        east.cycle()
        east.state_disk.shut_down()
        places = range(129 * MIB, 136 * MIB, 2 * MIB)  # of the second page of each bitmap
        for at in places:
            handle.pwrite(b"2" * MIB, at)
        handle.flush()
        self.assertIsNone(east.process.poll(), "the site has ended, and cannot start while the disk is dead")
        self.come_back(east)
        copy, = json.loads(east.farcopy("flashcopy", "list", "--json").stdout)
        self.assertEqual(copy["state"], "failed")
        wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")
        other = west.connect(f"disk@{east.cycle()}")
        for at in places:
            self.assertEqual(other.pread(MIB, at), b"2" * MIB, at)
