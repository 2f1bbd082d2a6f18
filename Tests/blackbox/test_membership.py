"""Volumes that grow, join and leave while a group is mirrored."""

import json
import os
import random

from sites import SiteTest, wait_for

MIB = 1 << 20


class Membership(SiteTest):
    def restart(self, *sites, how="stop"):
        for site in sites:
            getattr(site, how)()
        for site in sites:
            site.start()

    def linked(self, east):
        wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")

    def sent(self, site, volume):
        return site.status()["volumes"][volume]["bytes_written"]

    def test_a_volume_grows_at_both_sites_without_a_full_copy(self):
        for how in ("stop", "kill"):
            with self.subTest(how):
                east, west = self.pair({"orders": "16MiB", "wal": "4MiB"}, interval="manual")
                handle = east.connect("orders")
                data = random.randbytes(15 * MIB)
                handle.pwrite(data, 0)
                old = east.cycle()
                east.farcopy("flashcopy", "create", "orders", "before")
                handle.pwrite(b"late" * 1024, 4096)
                east.edit('size = "16MiB"', 'size = "40MiB"')
                self.restart(east, how=how)
                wait_for(lambda: "make them the same size" in east.group().get("reason", ""), what="the refusal")
                self.assertEqual(east.connect("orders").get_size(), 40 * MIB, "hosts go on with what there is")
                west.edit('size = "16MiB"', 'size = "40MiB"')
                self.restart(west, how=how)
                east.farcopy("resume", "shop")
                self.linked(east)
                east.connect("orders").pwrite(random.randbytes(2 * MIB), 30 * MIB)
                self.assertEqual(west.read(f"orders@{old}")[:15 * MIB], data)
                point = east.cycle()
                self.assertEqual(west.read(f"orders@{point}"), east.read("orders"))
                self.assertLess(self.sent(west, "orders"), 26 * MIB, "the old part is not copied again")
                report = json.loads(east.farcopy("points", "shop", "--json").stdout)[-1]
                self.assertLess(report["bytes"], 3 * MIB)
                self.assertEqual(west.read(f"orders@{old}")[:15 * MIB], data)
                self.assertEqual(east.read("orders@before"), data + bytes(25 * MIB))
                west.stop()
                west.edit('size = "40MiB"', 'size = "20MiB"')
                west.start(wait=False)
                self.assertEqual(west.process.wait(timeout=30), 1)
                west.process.stdout.close()
                west.process = None
                self.assertIn("correct 'size'", west.tail())
                self.put_away(east, west)

    def test_volumes_join_and_leave_without_resending_the_others(self):
        east, west = self.pair({"orders": "16MiB", "wal": "4MiB"}, interval="manual")
        for site in (east, west):
            with open(site.config, "a") as file:
                file.write(f'[volumes.log]\npath = "{site.path}/log.img"\nsize = "8MiB"\n')
        handle = east.connect("orders")
        handle.pwrite(random.randbytes(12 * MIB), 0)
        old = east.cycle()
        with open(f"{east.path}/log.img", "wb") as file:
            file.write(random.randbytes(8 * MIB))
        for site in (east, west):
            site.edit('volumes = ["orders", "wal"]', 'volumes = ["orders", "wal", "log"]')
        self.restart(west, east)
        self.linked(east)
        names = west.farcopy("status").stdout
        self.assertIn(f"orders@{old}", names)
        self.assertNotIn(f"log@{old}", names, "the point has no part of it")
        point = east.cycle()
        self.assertEqual(self.sent(west, "orders"), 0, "the others are not sent again")
        for volume in ("orders", "wal", "log"):
            self.assertEqual(west.read(f"{volume}@{point}"), east.read(volume))
        # A failover to a point from before leaves the new volume out.
        west.kill()
        west.start()
        self.linked(east)
        # One leaves.
        for site in (east, west):
            site.edit('volumes = ["orders", "wal", "log"]', 'volumes = ["orders", "log"]')
        self.restart(west, east)
        self.linked(east)
        east.connect("log").pwrite(b"more" * 1024, 0)
        point = east.cycle()
        self.assertEqual(self.sent(west, "orders"), 0)
        self.assertLessEqual(self.sent(west, "log"), 4096)
        for volume in ("orders", "log"):
            self.assertEqual(west.read(f"{volume}@{point}"), east.read(volume))
        east.connect("wal").pwrite(b"alone", 0)

    def test_a_failover_leaves_out_a_volume_that_has_no_point_yet(self):
        east, west = self.pair({"orders": "4MiB"}, interval="manual")
        east.connect("orders").pwrite(b"o" * 4096, 0)
        east.cycle()
        for site in (east, west):
            with open(site.config, "a") as file:
                file.write(f'[volumes.log]\npath = "{site.path}/log.img"\nsize = "8MiB"\n')
            site.edit('volumes = ["orders"]', 'volumes = ["orders", "log"]')
        self.restart(west)
        east.kill()
        west.farcopy("failover", "shop")
        self.assertEqual(west.connect("orders").pread(4096, 0), b"o" * 4096)
        west.connect("orders").pwrite(b"w" * 4096, 4096)
        for _ in range(2):
            self.assertIn("log", west.status()["volumes"])
            self.assertEqual(west.status()["volumes"]["log"]["exports"], [], "nothing is shown of what is nothing's copy")
            self.restart(west)
        words = "is left out; take it out of the group's configuration at both sites"
        self.assertIn(words, west.farcopy("events", check=False).stdout + open(west.log).read())
