"""Two things at once that contradict each other: resyncs both ways, a split-brain resolved while a point is held, a restore while
the role is given up. Nobody aborts, one of them wins, and both sites are alike in the end."""

import json
import random
import subprocess
import time

from sites import RECORD_SPACE, SiteTest, run, wait_for

PAGE = 4096
MIB = 1 << 20


class Opposites(SiteTest):
    def linked(self, interval="manual", volumes=None):
        return super().linked(volumes or {"orders": "16MiB"}, interval)

    def write(self, site, count=8, start=0):
        handle = site.connect("orders")
        pages = {}
        for number in range(count):
            at = (start + number) * PAGE
            pages[at] = random.randbytes(PAGE)
            handle.pwrite(pages[at], at)
        handle.shutdown()
        return pages

    def holds(self, site, pages):
        handle = site.connect("orders")
        for at, data in pages.items():
            self.assertEqual(handle.pread(PAGE, at), data, f"{site.name} at {at}")

    def started(self, site, *words):
        return self.spawn(
            site.program, *words, "--control", site.control, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def alive(self, *sites):
        for site in sites:
            self.assertIsNone(site.process.poll(), f"{site.name} has ended\n{site.tail()}")

    def put_away(self, *sites):
        self.link.close()
        super().put_away(*sites)

    def alike(self, primary, secondary):
        wait_for(lambda: primary.group()["state"] == "mirroring", seconds=60, what="mirroring")
        point = primary.cycle()
        self.assertEqual(secondary.read(f"orders@{point}"), primary.read("orders"))

    def split(self, **options):
        """Hosts write at both; both know."""
        east, west = self.linked(**options)
        pages = {"both": self.write(east, 16)}
        east.cycle()
        self.link.cut()
        pages["east"] = self.write(east, 6, start=100)
        wait_for(lambda: east.group()["state"] == "suspended", what="the suspension")
        west.farcopy("failover", "shop")
        pages["west"] = self.write(west, 7, start=200)
        return east, west, pages

    def mend(self, east, west):
        self.link.mend()
        east.farcopy("resume", "shop", check=False)
        for site in (east, west):
            wait_for(lambda: site.group()["state"] == "split-brain", what=f"split-brain at {site.name}")

    def test_opposite_resyncs_one_of_which_wins(self):
        for attempt in range(3):
            with self.subTest(attempt):
                east, west, pages = self.split()
                self.mend(east, west)
                wait_for(lambda: all(v["restoring_bytes"] == 0 for v in west.status()["volumes"].values()), what="restore")
                # Each keeps what it has.
                commands = {
                    "east": self.started(east, "resync", "shop", "--discard", "west", "--yes"),
                    "west": self.started(west, "resync", "shop", "--discard", "east", "--yes")}
                ends = {name: (process.communicate(timeout=90), process.returncode) for name, process in commands.items()}
                self.alive(east, west)
                won = [name for name, end in ends.items() if end[1] == 0]
                self.assertEqual(len(won), 1, ends)
                winner, loser = (east, west) if won == ["east"] else (west, east)
                self.assertIn("group 'shop'", ends[loser.name][0][1])
                self.assertEqual((winner.group()["role"], loser.group()["role"]), ("primary", "secondary"))
                self.alike(winner, loser)
                self.holds(winner, pages[winner.name])
                self.put_away(east, west)

    def test_split_brain_resolved_at_a_primary_that_holds_a_point(self):
        for loser in ("west", "east"):
            with self.subTest(loser):
                east, west = self.linked()
                self.write(east, 16)
                east.cycle()
                east.farcopy("rate", "shop", "16KiB")
                handle = east.connect("orders")
                handle.pwrite(random.randbytes(2 * MIB), 4 * MIB)
                east.farcopy("cycle", "shop")
                wait_for(lambda: east.group()["rate_bytes_per_second"] > 0, what="the drain")
                self.link.cut()
                wait_for(lambda: east.group()["state"] == "suspended", what="the suspension")
                handle.pwrite(b"e" * PAGE, 4 * MIB)  # collides with what is held
                west.farcopy("failover", "shop")
                wait_for(lambda: all(v["restoring_bytes"] == 0 for v in west.status()["volumes"].values()), what="restore")
                self.write(west, 4, start=10)
                self.mend(east, west)
                winner, other = (east, west) if loser == "west" else (west, east)
                winner.farcopy("resync", "shop", "--discard", loser, "--yes")
                winner.farcopy("rate", "shop", "unlimited")
                self.alive(east, west)
                self.alike(winner, other)
                if winner is east:
                    self.assertEqual(east.connect("orders").pread(PAGE, 4 * MIB), b"e" * PAGE)
                self.alive(east, west)
                self.put_away(east, west)

    def test_a_restore_does_not_begin_while_the_role_is_given_up(self):
        """Whichever comes first, no site aborts, and what flows back is marked."""
        for attempt in range(4):
            with self.subTest(attempt):
                east, west = self.linked()
                self.write(east, 64)
                east.farcopy("flashcopy", "create", "orders", "before")
                self.write(east, 64)
                east.cycle()
                self.link.cut()
                self.write(east, 32, start=8)
                wait_for(lambda: east.group()["state"] == "suspended", what="the suspension")
                west.farcopy("failover", "shop")
                wait_for(lambda: all(v["restoring_bytes"] == 0 for v in west.status()["volumes"].values()), what="restore")
                self.write(west, 4, start=300)
                self.mend(east, west)
                resync = self.started(west, "resync", "shop", "--discard", "east", "--yes")
                time.sleep(0.01 * attempt)
                restores = [self.started(east, "flashcopy", "restore", "orders", "before") for _ in range(4)]
                for process in (resync, *restores):
                    process.communicate(timeout=90)
                self.alive(east, west)
                self.assertEqual(resync.returncode, 0)
                wait_for(lambda: west.group()["state"] == "mirroring", seconds=60, what="mirroring")
                self.alike(west, east)
                self.put_away(east, west)

    def test_a_failover_overtakes_a_switchover(self):
        """Between the last point and the promotion the other site fails over: the switchover says that it is neither done nor taken back, and
        the way out is the usual one."""
        east, west = self.linked()
        pages = self.write(east)
        east.cycle()
        self.link.delay = 0.4
        switchover = self.started(east, "switchover", "shop")
        wait_for(lambda: "shut out" in (east.group().get("operation") or {}).get("step", ""), what="the last point")
        before = west.points()[-1]["id"]
        wait_for(lambda: west.points()[-1]["id"] > before, what="its commit")
        west.farcopy("failover", "shop")
        self.link.delay = 0
        words = switchover.communicate(timeout=60)[1]
        self.assertEqual(switchover.returncode, 1)
        self.assertIn("'west' does not take over", words)
        self.assertIn("nor can the switchover be taken back", words)
        self.alive(east, west)
        self.assertEqual([site.group()["role"] for site in (east, west)], ["primary", "primary"])
        self.assertTrue(east.connect("orders").is_read_only(), "hosts are let in at a site that is stale")
        self.assertIn("cannot be taken back", east.farcopy("abort", "switchover:shop", check=False).stderr)
        wait_for(lambda: all(v["restoring_bytes"] == 0 for v in west.status()["volumes"].values()), what="restore")
        west.farcopy("resync", "shop", "--discard", "east", "--yes")
        self.alike(west, east)
        self.holds(west, pages)

    def test_huge_numbers_of_a_peer_are_refused(self):
        """From a peer that lies or is broken: words, not an end of the process."""
        east, west = self.pair({"orders": "4MiB"}, interval="manual")
        east.cycle()
        socket = west.control.removeprefix("unix:")

        def post(path, body):
            done = run(
                "curl", "-s", "-o", "/dev/stdout", "-w", " %{http_code}", "--unix-socket", socket, "-H",
                "Content-Type: application/json", "-d", json.dumps(body), f"http://localhost/v1/peer/groups/shop/{path}")
            answer, code = done.stdout.rsplit(" ", 1)
            return int(code), json.loads(answer)

        with open(f"{east.path}/state/site.record", "rb") as file:
            text = file.read()[RECORD_SPACE:]  # the first copy that is written
        identity = json.loads(text[32:32 + int.from_bytes(text[16:20], "little")])["id"]
        with open(f"{west.state}/groups/shop/group.record", "rb") as file:
            text = file.read()[RECORD_SPACE:]
        generations = json.loads(text[32:32 + int.from_bytes(text[16:20], "little")])["generations"]
        huge = (1 << 64) - 1
        previous = west.status()["groups"]["shop"]["point"]["id"]
        for number, formed in ((huge, 1.0), (previous + 1, 1e300), (previous + 1, -1.0)):
            # In a session of its own: east, whose session that ends, opens the next.
            code, opened = post("session", dict(
                site="east", siteID=identity, generations=generations, volumes=[dict(name="orders", size=4 << 20)]))
            self.assertEqual(code, 200)
            code, answer = post("commit", dict(
                siteID=identity, session=opened["state"]["session"], number=number, previous=previous, formedAt=formed))
            self.assertEqual(code, 403)
            self.assertIn("cannot be", answer["error"])
        for highest in (huge, huge - 1):
            code, _ = post("yield", dict(
                site="east", siteID=identity, generations=[], highestPoint=highest,
                volumes=[dict(name="orders", size=4 << 20)]))
            self.assertEqual(code, 403)
        self.alive(east, west)
        wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")
        east.cycle()


if __name__ == "__main__":
    import unittest
    unittest.main()
