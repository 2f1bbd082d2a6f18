"""Who is primary, and how that changes: return of a stale primary, split-brain, resync, switchover, failback."""

import json
import os
import random
import subprocess
import time

import nbd

from link import Link
from sites import SiteTest, rewrite_record, wait_for

SIZE = 16 << 20
VOLUMES = {"orders": "16MiB", "wal": "4MiB"}


class Roles(SiteTest):
    def write(self, site, count=8, volume="orders", size=4096):
        """Writes random pages; returns them by their offset."""
        handle = site.connect(volume)
        pages = {}
        for _ in range(count):
            at = random.randrange(SIZE // size if volume == "orders" else (4 << 20) // size) * size
            pages[at] = random.randbytes(size)
            handle.pwrite(pages[at], at)
        handle.shutdown()
        return pages

    def assert_holds(self, site, pages, export="orders"):
        handle = site.connect(export)
        for at, data in pages.items():
            self.assertEqual(handle.pread(len(data), at), data, f"{export} of {site.name} at {at}")

    def assert_alike(self, primary, secondary):
        point = primary.cycle()
        for volume in VOLUMES:
            self.assertEqual(secondary.read(f"{volume}@{point}"), primary.read(volume), volume)

    def state(self, site):
        return site.group()["state"]

    def restored(self, site):
        wait_for(lambda: all(v["restoring_bytes"] == 0 for v in site.status()["volumes"].values()), what="the restore")

    def refused(self, site, *words):
        done = site.farcopy(*words, check=False)
        self.assertNotEqual(done.returncode, 0, words)
        return done.stderr

    def mirrored(self, interval="manual"):
        """A pair with a point and a few pages in it."""
        east, west = self.pair(VOLUMES, interval=interval)
        pages = self.write(east, 40)
        east.cycle()
        return east, west, pages

    def test_kill_failover_work_return_failback(self):
        east, west, old = self.mirrored()
        unsent = self.write(east, 10)
        east.kill()
        lost = west.farcopy("failover", "shop").stdout
        self.assertIn("the old primary does not answer", lost)
        self.restored(west)
        work = self.write(west, 12)
        east.start()
        # It has learnt that it is stale before it was ready: no host can write.
        status = east.group()
        self.assertEqual((status["role"], status["state"]), ("primary", "suspended"))
        self.assertIn("stale", status["reason"])
        handle = east.connect("orders")
        self.assertTrue(handle.is_read_only())
        with self.assertRaises(nbd.Error):
            handle.pwrite(b"x" * 512, 0)
        self.assert_holds(east, unsent)
        words = "is primary at 'east', as the configuration says; there is nothing to fail back"
        self.assertIn(words, self.refused(east, "failback", "shop"))
        preview = json.loads(west.farcopy("failback", "shop", "--preview", "--json").stdout)
        self.assertEqual((preview["from"], preview["to"]), ("west", "east"))
        self.assertEqual(preview["discarded_bytes"], 4096 * len(unsent))
        self.assertLessEqual(preview["sent_bytes"], 4096 * (len(unsent) + len(work)))
        self.assertIn("give --yes", self.refused(west, "failback", "shop"))
        before = east.status()["volumes"]["orders"]["bytes_written"]
        west.farcopy("failback", "shop", "--yes")
        self.assertEqual((east.group()["role"], west.group()["role"]), ("primary", "secondary"))
        sent = east.status()["volumes"]["orders"]["bytes_written"] - before
        self.assertLessEqual(sent, 4096 * (len(unsent) + len(work)), "only what differs is copied")
        self.assert_holds(east, work)
        overwritten = {at: data for at, data in old.items() if at not in unsent and at not in work}
        self.assert_holds(east, overwritten)
        names = [c["name"] for c in json.loads(east.farcopy("flashcopy", "list", "--json").stdout) if c["volume"] == "orders"]
        self.assertEqual(len(names), 1)
        self.assertTrue(names[0].startswith("unsent-after-"), names)
        self.assert_holds(east, unsent, f"orders@{names[0]}")
        # The roles are as they were, and everything goes on.
        self.write(east, 5)
        self.assert_alike(east, west)
        east.farcopy("flashcopy", "withdraw", "orders", "wal", names[0])

    def test_a_failback_goes_on_after_a_restart_and_is_aborted(self):
        east, west, pages = self.mirrored()
        east.kill()
        west.farcopy("failover", "shop")
        self.restored(west)
        west.farcopy("rate", "shop", "16KiB")
        pages.update(self.write(west, 60))
        east.start()
        running = self.spawn(
            west.program, "failback", "shop", "--yes", "--control", west.control, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        wait_for(lambda: (west.group().get("operation") or {}).get("name") == "failback:shop", what="the failback")
        wait_for(lambda: east.group()["role"] == "secondary", what="the other direction")
        self.assertIn("is in a failback", self.refused(west, "failback", "shop", "--yes"))
        west.kill()
        running.wait(timeout=30)
        west.start()
        wait_for(lambda: (west.group().get("operation") or {}).get("name") == "failback:shop", what="the failback again")
        west.farcopy("abort", "failback:shop")
        wait_for(lambda: (west.group().get("operation") or {}).get("name") != "failback:shop", what="its end")
        self.assertEqual((east.group()["role"], west.group()["role"]), ("secondary", "primary"))
        west.stop()
        west.start()
        time.sleep(0.5)
        self.assertNotEqual((west.group().get("operation") or {}).get("name"), "failback:shop", "it stays aborted")
        west.farcopy("rate", "shop", "default")
        west.farcopy("failback", "shop")
        self.assert_holds(east, pages)

    def test_switchover_there_and_back_loses_nothing(self):
        east, west, pages = self.mirrored(interval="0s")
        for source, target in ((east, west), (west, east), (east, west)):
            host = source.connect("orders")
            last = random.randbytes(4096)
            host.pwrite(last, 8192)
            pages[8192] = last
            source.farcopy("switchover", "shop")
            self.assertEqual((source.group()["role"], target.group()["role"]), ("secondary", "primary"))
            with self.assertRaises(nbd.Error):
                host.pwrite(b"x" * 512, 0)
            self.assert_holds(target, pages)
            wait_for(lambda: self.state(target) == "mirroring", what="mirroring")
            pages.update(self.write(target, 5))
            self.assert_alike(target, source)
            before = source.status()["volumes"]["wal"]["bytes_written"]
            self.assert_alike(target, source)
            self.assertEqual(source.status()["volumes"]["wal"]["bytes_written"], before, "nothing is sent twice")
        self.assertNotIn("unsent", east.farcopy("flashcopy", "list").stdout + west.farcopy("flashcopy", "list").stdout)
        self.assertIn("secondary", self.refused(east, "switchover", "shop"))

    def test_split_brain_is_shown_at_both_and_resolved_either_way(self):
        for loser in ("east", "west"):
            with self.subTest(loser):
                east, west, _ = self.mirrored()
                self.addCleanup(east.end)
                # The link is cut: west is stopped while east's hosts go on, then west is made primary alone.
                west.stop()
                pages = {"east": self.write(east, 6)}
                wait_for(lambda: self.state(east) == "suspended", what="the suspension")
                east.stop()
                west.start()
                west.farcopy("failover", "shop")
                self.restored(west)
                pages["west"] = self.write(west, 7)
                east.start()
                wait_for(lambda: self.state(west) == "split-brain", what="split-brain at west")
                self.assertEqual(self.state(east), "split-brain")
                self.assertIn("resync shop --discard", east.group()["reason"])
                self.assertTrue(any("split-brain" in text for text in west.group()["alerts"]))
                self.assertIn("hosts wrote here and at 'east'", self.refused(west, "cycle", "shop", "--wait"))
                winner, other = (west, east) if loser == "east" else (east, west)
                preview = json.loads(other.farcopy("resync", "shop", "--discard", loser, "--preview", "--json").stdout)
                self.assertEqual((preview["from"], preview["to"]), (winner.name, loser))
                self.assertGreaterEqual(preview["discarded_bytes"], 4096 * len(pages[loser]))
                self.assertTrue(preview["since"])
                self.assertIn("give --yes", self.refused(winner, "resync", "shop", "--discard", loser))
                self.assertIn("there is no site", self.refused(winner, "resync", "shop", "--discard", "north"))
                self.assertEqual(self.state(winner), "split-brain", "nothing was done")
                # From either site.
                random.choice((winner, other)).farcopy("resync", "shop", "--discard", loser, "--yes")
                wait_for(lambda: self.state(winner) == "mirroring", what="mirroring")
                self.assert_holds(winner, pages[winner.name])
                self.assert_alike(winner, other)
                copies = json.loads(other.farcopy("flashcopy", "list", "--json").stdout)
                name = next(c["name"] for c in copies if c["volume"] == "orders")
                self.assert_holds(other, pages[loser], f"orders@{name}")
                self.put_away(east, west)

    def test_a_primary_that_serves_on_is_not_stopped_under_its_hosts(self):
        east, west, _ = self.mirrored(interval="0s")
        host = east.connect("orders")
        host.pwrite(b"a" * 4096, 0)
        east.farcopy("suspend", "shop")
        host.pwrite(b"b" * 4096, 4096)
        self.assertIn("that the old primary still has", west.farcopy("failover", "shop").stdout)
        self.write(west, 3)
        east.farcopy("resume", "shop")
        wait_for(lambda: self.state(east) == "split-brain", what="split-brain")
        host.pwrite(b"c" * 4096, 8192)
        self.assertEqual(host.pread(4096, 8192), b"c" * 4096)
        east.stop()
        east.start()
        self.assertEqual(self.state(east), "split-brain", "it remembers")
        self.assertTrue(east.connect("orders").is_read_only(), "after a restart it asks first")

    def test_an_idle_primary_becomes_stale_while_it_runs(self):
        east, west, pages = self.mirrored(interval="0s")
        wait_for(lambda: east.group()["pending_bytes"] == 0, what="everything is sent")
        west.farcopy("failover", "shop")
        wait_for(lambda: "stale" in east.group().get("reason", ""), what="east to learn it")
        # Its session was refused in these words; that it is stale it finds out next.
        wait_for(lambda: east.connect("orders").is_read_only(), what="hosts to be shut out")
        self.restored(west)
        work = self.write(west, 3)
        west.farcopy("failback", "shop")
        self.assert_holds(east, {**pages, **work})

    def test_isolated_primaries_do_as_configured(self):
        marker = os.path.join(self.directory, "may-start")
        for policy in ("refuse", f"test -e {marker}"):
            with self.subTest(policy):
                east, west, _ = self.mirrored()
                east.stop()
                west.stop()
                east.edit('peer = "west"', f'peer = "west"\non_isolated = "{policy}"')
                east.start()
                self.assertEqual(self.state(east), "suspended")
                self.assertIn("does not answer", east.group()["reason"])
                self.assertTrue(east.connect("orders").is_read_only())
                if policy == "refuse":
                    west.start()
                    wait_for(lambda: self.state(east) in ("mirroring", "resyncing"), what="the peer's answer")
                else:
                    self.assertIn("on_isolated", east.group()["reason"])
                    with open(marker, "w"):
                        pass
                    east.stop()
                    east.start()
                self.assertFalse(east.connect("orders").is_read_only())
                east.stop()
                if west.process:
                    west.stop()
                east.edit(f'on_isolated = "{policy}"', 'on_isolated = "refuse"')
                east.start()
                self.assertTrue(east.connect("orders").is_read_only())
                east.farcopy("resume", "shop", "--isolated")
                self.assertFalse(east.connect("orders").is_read_only())
                self.put_away(east, west)

    def test_a_switchover_that_the_peer_cannot_answer_is_taken_back_or_goes_on(self):
        east, west, pages = self.mirrored()
        west.stop()
        wait_for(lambda: self.state(east) == "suspended", what="the suspension")
        self.assertIn("suspended", self.refused(east, "switchover", "shop"))
        self.assertFalse(east.connect("orders").is_read_only(), "hosts were not shut out")
        west.start()
        wait_for(lambda: self.state(east) in ("mirroring", "resyncing"), what="the link")
        self.assertIn("no switchover", self.refused(east, "abort", "switchover:shop"))
        self.assertIn("names no operation", self.refused(east, "abort", "switchover"))
        east.farcopy("switchover", "shop")
        # Both restart at once: roles stay, mirroring goes on.
        for site in (east, west):
            site.kill()
        for site in (east, west):
            site.start(wait=False)
        for site in (east, west):
            self.assertEqual(site.process.stdout.readline(), "ready\n")
        self.assertEqual((east.group()["role"], west.group()["role"]), ("secondary", "primary"))
        pages.update(self.write(west, 4))
        wait_for(lambda: self.state(west) in ("mirroring", "resyncing"), what="the link")
        self.assert_alike(west, east)
        west.farcopy("failback", "shop")
        self.assert_holds(east, pages)

    def test_failover_during_a_resync_goes_to_what_is_consistent(self):
        """The new primary is lost before it has sent everything: the old one's last state is a point."""
        east, west, _ = self.mirrored()
        unsent = self.write(east, 10)
        image = east.read("orders")
        east.kill()
        west.farcopy("failover", "shop")
        self.restored(west)
        self.write(west, 4)
        east.start()
        west.farcopy("suspend", "shop", check=False)
        west.farcopy("resync", "shop", "--discard", "east", "--yes")
        west.kill()
        status = east.group()
        self.assertEqual(status["role"], "secondary")
        points = east.points()
        self.assertTrue(status["consistent_as_of"])
        self.assertEqual(east.read(f"orders@{points[0]['id']}"), image)
        east.farcopy("failover", "shop", "--point", str(points[0]["id"]))
        self.assert_holds(east, unsent)
        west.start()
        self.restored(east)
        wait_for(lambda: west.group()["state"] in ("suspended", "split-brain"), what="west learns it")
        east.farcopy("resync", "shop", "--discard", "west", "--yes")
        wait_for(lambda: self.state(east) == "mirroring", what="mirroring")
        self.assert_alike(east, west)
        self.assert_holds(east, unsent)

    def test_a_switchover_that_was_interrupted_goes_on_or_is_aborted(self):
        """The primary was killed after its decision to hand over, before the peer's answer."""
        for end in ("goes on", "aborted"):
            with self.subTest(end):
                east, west, pages = self.mirrored()
                link = Link()
                self.addCleanup(link.close)
                link.forward(f"{east.path}/link", f"{west.path}/control.sock")
                east.stop()
                east.edit(f"{west.path}/control.sock", f"{east.path}/link")
                point = west.points()[-1]["id"]
                rewrite_record(f"{east.path}/state/groups/shop/group.record", lambda record: record.update(handingOver=point))
                if end == "aborted":
                    link.cut()
                east.start()
                if end == "goes on":
                    wait_for(lambda: east.group()["role"] == "secondary", what="the switchover")
                    self.assert_holds(west, pages)
                    wait_for(lambda: self.state(west) == "mirroring", what="mirroring")
                    self.assert_alike(west, east)
                else:
                    self.assertTrue(east.connect("orders").is_read_only())
                    self.assertIn("abort switchover:shop", east.group()["reason"])
                    self.assertIn("cannot be taken back", self.refused(east, "abort", "switchover:shop"))
                    west.stop()
                    # The peer answers again just for the abort: whoever comes first decides.
                    west.start()
                    link.mend()
                    done = east.farcopy("abort", "switchover:shop", check=False)
                    primary, secondary = (east, west) if done.returncode == 0 else (west, east)
                    wait_for(lambda: primary.group()["role"] == "primary" and secondary.group()["role"] == "secondary",
                             what="one primary")
                    wait_for(lambda: self.state(primary) in ("mirroring", "resyncing"), what="mirroring")
                    self.assert_holds(primary, pages)
                    self.assert_alike(primary, secondary)
                self.put_away(east, west)
