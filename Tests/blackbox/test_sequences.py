"""Random sequences of what operators and disasters do, on real processes: writes, cycles, suspensions, kills, failovers,
switchovers, failbacks, cut links. After every step what can be read is a closed cut; at the end both sites are identical.

`SEQUENCES=200` runs that many; `SEQUENCE=seed` runs one.
"""

import os
import random
import time

import nbd

from link import Link
from sites import SiteTest, wait_for

PAGES = 64
PAGE = 4096
NAMES = ("orders", "wal")


class Timeline:
    """The writes that hosts of one primary did, one after the other, each acknowledged before the next was issued."""

    def __init__(self, writes=()):
        self.writes = list(writes)

    def image(self, count=None):
        pages = {}
        for volume, page, number in self.writes[:count]:
            pages[volume, page] = number
        return pages

    def prefix(self, pages):
        """How many of the writes make these pages; None when they are no prefix, and so no closed cut."""
        numbers = {number: index for index, (_, _, number) in enumerate(self.writes)}
        if any(number not in numbers for number in pages.values()):
            return None
        count = max((numbers[number] + 1 for number in pages.values()), default=0)
        return count if self.image(count) == pages else None


class Sequences(SiteTest):
    write_flags = 0

    def test_random_sequences(self):
        if "SEQUENCE" in os.environ:
            return self.sequence(int(os.environ["SEQUENCE"]))
        first = int(os.environ.get("FIRST", "1"))
        for seed in range(first, first + int(os.environ.get("SEQUENCES", "12"))):
            with self.subTest(seed=seed):
                self.sequence(seed)

    # One sequence.

    def sequence(self, seed):
        import faulthandler
        faulthandler.dump_traceback_later(120, exit=True)
        self.random = random.Random(seed)
        self.number = 0
        self.steps = []
        keep = self.random.choice((1, 3, 8))
        east, west = self.pair(
            {name: "1MiB" for name in NAMES}, interval=self.random.choice(("0s", "manual")), keep=keep, start=False)
        self.link = Link()
        self.link.join(east, west)
        self.east, self.west = east, west
        self.timelines = {"east": Timeline(), "west": Timeline()}
        self.former = []
        try:
            west.start()
            east.start()
            for _ in range(self.random.randint(4, 14)):
                self.step()
            self.settle()
            if "SHOW" in os.environ:
                print(f"seed {seed}:", "; ".join(self.steps), flush=True)
        except BaseException as error:
            logs = "\n".join(f"--- {site.name}\n" + open(site.log).read()[-6000:] for site in (east, west))
            raise AssertionError(f"seed {seed}: {error!r}\nsteps: {self.steps}\n{logs}") from error
        finally:
            for site in (east, west):
                site.end()
            self.link.close()
            self.put_away(east, west)

    def step(self):
        steps = {
            self.write: 30, self.cycle: 20, self.suspend: 4, self.resume: 6, self.kill: 14, self.start: 14, self.failover: 8,
            self.switchover: 8, self.failback: 8, self.cut: 5, self.mend: 7, self.resync: 4}
        what = self.random.choices(list(steps), list(steps.values()))[0]
        site = self.random.choice((self.east, self.west))
        wanted = "secondary" if what == self.failover else "primary"
        if what in (self.cycle, self.suspend, self.failover, self.switchover, self.failback) and self.random.random() < 0.9:
            site = next((s for s in (self.east, self.west) if self.group(s)["role"] == wanted), site)
        what(site)
        self.look()

    def note(self, *words):
        self.steps.append(" ".join(str(word) for word in words))

    def up(self, site):
        return site.process is not None

    def command(self, site, *words):
        """A command that may be refused; what it does is checked by looking."""
        if not self.up(site):
            return False
        done = site.farcopy(*words, check=False, timeout=60)
        self.note(site.name, *words, "ok" if done.returncode == 0 else f"refused: {done.stderr.strip()[:90]}")
        return done.returncode == 0

    def group(self, site):
        return site.group() if self.up(site) else {"role": None, "state": "down"}

    def write(self, site):
        if not self.up(site):
            return
        try:
            handles = {name: site.connect(name) for name in NAMES}
        except nbd.Error:
            return
        if any(handle.is_read_only() for handle in handles.values()):
            return
        timeline = self.timelines[site.name]
        count = self.random.randint(1, 20)
        for _ in range(count):
            volume, page = self.random.choice(NAMES), self.random.randrange(PAGES)
            self.number += 1
            handles[volume].pwrite(self.number.to_bytes(8, "little") * (PAGE // 8), page * PAGE, self.write_flags)
            timeline.writes.append((volume, page, self.number))
        self.note(site.name, "wrote", count)
        for handle in handles.values():
            handle.shutdown()

    def pages(self, site, suffix=""):
        pages = {}
        for name in NAMES:
            handle = site.connect(name + suffix)
            data = bytes(handle.pread(PAGES * PAGE, 0))
            for page in range(PAGES):
                content = data[page * PAGE:(page + 1) * PAGE]
                number = int.from_bytes(content[:8], "little")
                assert content == content[:8] * (PAGE // 8), f"page {page} of {name} is torn"
                if number:
                    pages[name, page] = number
            handle.shutdown()
        return pages

    def look(self):
        """Whatever can be read is a closed cut."""
        for site in (self.east, self.west):
            if not self.up(site):
                continue
            group = self.group(site)
            if group["role"] == "primary":
                pages = self.pages(site)
                assert pages == self.timelines[site.name].image(), f"{site.name} is not what its hosts wrote"
            elif site.points():
                point = site.points()[-1]["id"]
                pages = self.pages(site, f"@{point}")
                known = [*self.timelines.values(), *self.former]
                assert any(t.prefix(pages) is not None for t in known), f"point {point} of {site.name} is no closed cut"

    def cycle(self, site):
        self.command(site, "cycle", "shop", "--wait")

    def suspend(self, site):
        self.command(site, "suspend", "shop")

    def resume(self, site):
        self.command(site, "resume", "shop")

    def kill(self, site):
        if self.up(site):
            self.note("kill", site.name)
            self.random.choice((site.kill, site.stop))()

    def start(self, site):
        if not self.up(site):
            self.note("start", site.name)
            site.start()
            self.adopt(site)

    def adopt(self, site):
        """A site that has become primary by itself (a failback or switchover that went on)."""
        if self.group(site)["role"] == "primary":
            self.take_over(site)

    def take_over(self, site):
        pages = self.pages(site)
        if pages == self.timelines[site.name].image():
            return
        known = [*self.timelines.values(), *self.former]
        for timeline in known:
            count = timeline.prefix(pages)
            if count is not None:
                self.former.append(self.timelines[site.name])
                self.timelines[site.name] = Timeline(timeline.writes[:count])
                return
        raise AssertionError(f"{site.name} took over with what is no closed cut")

    def failover(self, site):
        if self.command(site, "failover", "shop"):
            self.take_over(site)

    def other(self, site):
        return self.west if site is self.east else self.east

    def exchanged(self, site):
        """After a planned change of roles nothing is lost."""
        winner = self.other(site)
        assert self.group(winner)["role"] == "primary"
        pages = self.pages(winner)
        assert pages == self.timelines[site.name].image(), f"{winner.name} lacks something after a planned exchange"
        self.former.append(self.timelines[winner.name])
        self.timelines[winner.name] = Timeline(self.timelines[site.name].writes)

    def switchover(self, site):
        if self.command(site, "switchover", "shop"):
            self.exchanged(site)

    def failback(self, site):
        if self.up(site) and self.ready_to_fail_back(site) and self.command(site, "failback", "shop", "--yes"):
            self.exchanged(site)

    def ready_to_fail_back(self, site):
        """A failback waits for its peer; the sequence does not."""
        return self.up(self.other(site)) and not self.link.is_cut and self.group(site)["state"] != "suspended"

    def resync(self, site):
        self.command(site, "resync", "shop", "--discard", self.random.choice(("east", "west")), "--yes")

    def cut(self, site):
        self.note("cut")
        self.link.cut()

    def mend(self, site):
        self.note("mend")
        self.link.mend()

    def settle(self):
        """Everything comes up; the operator decides what is open; mirroring goes on to the end."""
        self.link.mend()
        for site in (self.east, self.west):
            self.start(site)
        self.look()
        self.note("settle")
        end = time.monotonic() + 60
        while True:
            east, west = self.group(self.east), self.group(self.west)
            roles = (east["role"], west["role"])
            if roles.count("primary") == 2:
                winner = self.east if "stale" in west.get("reason", "") else self.west
                if "split-brain" in (east["state"], west["state"]):
                    winner = self.random.choice((self.east, self.west))
                self.command(winner, "resync", "shop", "--discard", self.other(winner).name, "--yes")
            elif roles.count("primary") == 1:
                primary = self.east if roles[0] == "primary" else self.west
                state = self.group(primary)
                if state["state"] == "suspended":
                    self.command(primary, "resume", "shop")
                elif self.command(primary, "cycle", "shop", "--wait"):
                    break
            assert time.monotonic() < end, f"no end of it: {east} {west}"
            time.sleep(0.05)
        secondary = self.other(primary)
        self.look()
        point = int(primary.farcopy("cycle", "shop", "--wait").stdout)
        assert self.pages(secondary, f"@{point}") == self.timelines[primary.name].image(), "the sites differ"
        for site in (primary, secondary):
            site.stop()
        for name in NAMES:
            images = []
            for site in (self.east, self.west):
                with open(site.image(name), "rb") as file:
                    images.append(file.read())
            assert images[0] == images[1], f"{name} differs between the sites' files"
