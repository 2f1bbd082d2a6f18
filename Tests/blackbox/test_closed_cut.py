"""Recovery points are closed cuts, read at any time, and after SIGKILL of either site at random moments."""

import datetime
import random
import time

import nbd

import closedcut
from sites import SiteTest, read_handle, wait_for

SIZE = 8 << 20
VOLUMES = {"data": "8MiB", "log": "8MiB"}


class ClosedCut(SiteTest):
    def writers(self, east, chains=6):
        return closedcut.Writers(lambda: (east.connect("data"), east.connect("log")), SIZE, chains)

    def check_point(self, west, number, chains=6):
        """Opens the point on both volumes, then reads it: a client keeps the point that it opened."""
        handles = (west.connect(f"data@{number}"), west.connect(f"log@{number}"))
        return closedcut.check(*(read_handle(handle) for handle in handles), chains, SIZE)

    def check_any_point(self, west):
        """A point named in the list may be retired before it is opened; then another is taken."""
        for _ in range(20):
            number = random.choice(west.points())["id"]
            try:
                return self.check_point(west, number)
            except nbd.Error:
                continue
        self.fail("no point could be opened in twenty tries")

    def test_points_under_load_are_closed_cuts(self):
        """Two volumes, continuous points, six concurrent writers for 15 s; points are read all the while."""
        east, west = self.pair(VOLUMES, keep=64)
        east.cycle()
        writers = self.writers(east)
        writers.start()
        end = time.monotonic() + 15
        reads = 0
        while time.monotonic() < end:
            self.check_any_point(west)
            reads += 1
        status = east.group()
        writers.stop()
        self.assertEqual(writers.errors, [])
        self.assertGreater(reads, 20)
        self.assertGreater(status["point"]["id"], 20)
        self.assertLess(status["lag_seconds"], 2)
        number = east.cycle()
        last = self.check_point(west, number)
        self.assertEqual(last, writers.steps, "the point holds all that was acknowledged before it was asked for")
        self.assertGreater(min(last), 200)
        print(f"  {reads} reads of {number} points, {sum(last)} steps, hold p99 {status['hold_seconds_p99'] * 1e6:.0f} us")

    def test_flashcopies_while_points_form(self):
        """Both hold acknowledgements; neither may let go for the other."""
        east, west = self.pair(VOLUMES, keep=64)
        east.cycle()
        writers = self.writers(east)
        writers.start()
        for number in range(40):
            east.farcopy("flashcopy", "create", "data", "log", f"cut{number}")
            handles = (east.connect(f"data@cut{number}"), east.connect(f"log@cut{number}"))
            closedcut.check(*(read_handle(handle) for handle in handles), 6, SIZE)
            self.check_any_point(west)
            if number >= 10:
                east.farcopy("flashcopy", "withdraw", "data", "log", f"cut{number - 10}")
        writers.stop()
        self.assertEqual(writers.errors, [])
        self.assertEqual(self.check_point(west, east.cycle()), writers.steps)

    def test_kill_primary_and_fail_over(self):
        """After SIGKILL of the primary the far site takes over with a closed cut at most 2 s old."""
        east, west = self.pair(VOLUMES)
        east.cycle()
        writers = self.writers(east)
        writers.start()
        time.sleep(2)
        killed = time.time()
        writers.expect_the_end()
        east.kill()
        writers.join()
        west.farcopy("failover", "shop")
        status = west.group()
        self.assertEqual((status["role"], status["state"]), ("primary", "failed-over"))
        data, log = west.read("data"), west.read("log")
        last = closedcut.check(data, log, 6, SIZE)
        self.assertGreater(min(last), 0)
        formed = parse_time(status["point"]["formed_at"])
        self.assertLess(killed - formed, 2)
        wait_for(lambda: all(v["restoring_bytes"] == 0 for v in west.status()["volumes"].values()), what="the restore")
        with open(f"{west.path}/data.img", "rb") as file:
            self.assertEqual(file.read(), data, "the raw file is the volume")
        handle = west.connect("data")
        handle.pwrite(b"x" * 4096, 4096)
        handle.flush()
        self.assertEqual(handle.pread(4096, 4096), b"x" * 4096)

    def test_kill_primary_at_random_moments(self):
        """Ten times: SIGKILL, restart, everything goes on; nothing acknowledged is lost; every point is a closed cut."""
        east, west = self.pair(VOLUMES)
        east.cycle()
        writers = self.writers(east)
        for _ in range(10):
            writers.start()
            time.sleep(random.uniform(0.05, 1.2))
            writers.expect_the_end()
            east.kill()
            writers.join()
            self.check_any_point(west)
            east.start()
            data, log = east.read("data"), east.read("log")
            last = closedcut.check(data, log, 6, SIZE)
            for chain in range(6):
                self.assertGreaterEqual(last[chain], writers.steps[chain], "an acknowledged write survives the process")
                writers.steps[chain] = last[chain]
        number = east.cycle()
        self.assertEqual(self.check_point(west, number), writers.steps)
        for volume in VOLUMES:
            self.assertEqual(west.read(f"{volume}@{number}"), east.read(volume))

    def test_kill_secondary_at_random_moments(self):
        """Ten times: SIGKILL of the far site; hosts do not notice; the points survive; mirroring goes on."""
        east, west = self.pair(VOLUMES)
        east.cycle()
        writers = self.writers(east)
        writers.start()
        for _ in range(10):
            time.sleep(random.uniform(0.05, 1.2))
            before = west.points()[-1]
            west.kill()
            time.sleep(random.uniform(0, 0.3))
            west.start()
            after = west.points()
            self.assertGreaterEqual(after[-1]["id"], before["id"], "a committed point survives")
            if after[0]["id"] <= before["id"]:
                self.assertIn(before, after)
            self.check_any_point(west)
        self.assertEqual(writers.errors, [])
        wait_for(lambda: east.group()["state"] == "mirroring", what="mirroring")
        writers.stop()
        number = east.cycle()
        self.assertEqual(self.check_point(west, number), writers.steps)


def parse_time(text):
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
