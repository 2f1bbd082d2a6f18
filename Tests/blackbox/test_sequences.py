"""Random sequences of what operators and disasters do, on real processes: writes, cycles, suspensions, kills, failovers,
switchovers, failbacks, cut links. After every step what can be read is a closed cut that lacks nothing that had to be in it; at the end
both sites are identical, and enough commands of each kind have succeeded for that to say something.

`SEQUENCES=200` runs that many; `SEQUENCE=seed` runs one.
"""

import collections
import os
import random
import time

import nbd

from link import Link
from sites import SiteTest, wait_for

PAGES = 64
PAGE = 4096
NAMES = ("orders", "wal")


# What succeeds at least in a hundred sequences, by far.
LEAST = {"cycle": 200, "failover": 35, "switchover": 25, "failback": 20, "resync": 35, "points read": 200, "sites compared": 100}


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

    def setUp(self):
        super().setUp()
        self.succeeded = collections.Counter()

    def test_random_sequences(self):
        if "SEQUENCE" in os.environ:
            return self.sequence(int(os.environ["SEQUENCE"]))
        self.sequences(int(os.environ.get("SEQUENCES", "12")))

    def sequences(self, count):
        first = int(os.environ.get("FIRST", "1"))
        for seed in range(first, first + count):
            with self.subTest(seed=seed):
                self.sequence(seed)
        print(f"  {dict(self.succeeded)}", flush=True)
        for kind, least in LEAST.items():
            # Of a few sequences one may have none.
            self.assertGreaterEqual(self.succeeded[kind], least * count // 100, f"too few of {kind} for {count} sequences to test anything")

    # One sequence.

    def sequence(self, seed):
        import faulthandler
        faulthandler.dump_traceback_later(120, exit=True)
        self.seed, self.random = seed, random.Random(seed)
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
        # By its number, what was written before a point was asked for that was then reported as committed.
        self.committed = {}
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
        roles = [self.group(s)["role"] for s in (self.east, self.west)]
        if roles == ["secondary", "primary"]:
            steps[self.failback] = 20
        elif roles == ["primary", "primary"]:
            steps[self.resync] = 20
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
        """A command that may be refused; what it does is checked by looking. What it printed when it succeeded, or None."""
        if not self.up(site):
            return None
        done = site.farcopy(*words, check=False, timeout=60)
        self.note(site.name, *words, "ok" if done.returncode == 0 else f"refused: {done.stderr.strip()[:90]}")
        if done.returncode != 0:
            return None
        self.succeeded[words[0]] += 1
        return done.stdout

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
        """Whatever can be read is a closed cut, and lacks nothing that was committed before it."""
        for site in (self.east, self.west):
            if not self.up(site):
                continue
            group = self.group(site)
            if group["role"] == "primary":
                pages = self.pages(site)
                assert pages == self.timelines[site.name].image(), f"{site.name} is not what its hosts wrote"
            else:
                self.look_at_points(site)

    def look_at_points(self, site):
        for _ in range(20):
            points = [point["id"] for point in site.points()]
            read = 0
            for point in points:
                try:
                    pages = self.pages(site, f"@{point}")
                except nbd.Error:
                    # Newer ones may have pushed it out meanwhile.
                    assert point not in [p["id"] for p in site.points()], f"point {point} of {site.name} is listed and cannot be read"
                    continue
                self.check_point(site, point, pages)
                read += 1
            self.succeeded["points read"] += read
            if read or not points:
                return
        raise AssertionError(f"no point of {site.name} could be read in twenty tries")

    def check_point(self, site, point, pages):
        if point in self.committed:
            assert pages == Timeline(self.committed[point]).image(), f"point {point} of {site.name} is not what it was committed with"
        else:
            assert self.origin(pages, point) is not None, f"point {point} of {site.name} is no closed cut, or lacks what was committed before it"

    def origin(self, pages, point=None):
        """The writes that made these pages, which begin with all that was committed up to the point; None when there are none such.
        Every primary goes on from the newest point that was committed, so nothing of that is ever missing in a later one."""
        before = [number for number in self.committed if point is None or number <= point]
        needed = self.committed[max(before)] if before else []
        for timeline in [*self.timelines.values(), *self.former]:
            count = timeline.prefix(pages)
            if count is not None and count >= len(needed) and timeline.writes[:len(needed)] == needed:
                return timeline.writes[:count]
        return None

    def cycle(self, site):
        number = self.command(site, "cycle", "shop", "--wait")
        if number:
            self.committed[int(number)] = list(self.timelines[site.name].writes)
        return number

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
        writes = self.origin(pages)
        assert writes is not None, f"{site.name} took over with what is no closed cut, or lacks what was committed"
        self.former.append(self.timelines[site.name])
        self.timelines[site.name] = Timeline(writes)

    def failover(self, site):
        if self.command(site, "failover", "shop") is not None:
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
        if self.command(site, "switchover", "shop") is not None:
            self.exchanged(site)

    def failback(self, site):
        if self.up(site) and self.ready_to_fail_back(site) and self.command(site, "failback", "shop", "--yes") is not None:
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
        """Everything comes up; the operator decides what is open; roles change once more, which nothing may refuse; mirroring goes on to
        the end."""
        self.link.mend()
        for site in (self.east, self.west):
            self.start(site)
        self.look()
        self.note("settle")
        (self.agree, self.exchange_twice, self.lose_a_site)[self.seed % 3]()
        self.compare(self.agree())

    def agree(self):
        """One site is primary, and a point of it is committed at the other. Returns it."""
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
                elif self.cycle(primary):
                    return primary
            assert time.monotonic() < end, f"no end of it: {east} {west}"
            time.sleep(0.05)

    def exchange_twice(self):
        for _ in range(2):
            primary = self.agree()
            self.write(primary)
            change = ["failback", "shop", "--yes"] if primary is self.west else ["switchover", "shop"]
            assert self.command(primary, *change) is not None, f"a {change[0]} was refused with everything in order"
            self.exchanged(primary)

    def lose_a_site(self):
        lost = self.agree()
        survivor = self.other(lost)
        self.write(lost)
        self.note("kill", lost.name)
        lost.kill()
        assert self.command(survivor, "failover", "shop") is not None, "a failover was refused"
        self.take_over(survivor)
        self.write(survivor)
        self.start(lost)
        wait_for(lambda: all(v["restoring_bytes"] == 0 for v in survivor.status()["volumes"].values()), what="the restore")
        resync = "resync", "shop", "--discard", lost.name, "--yes"
        assert self.command(survivor, *resync) is not None, "a resync was refused"

    def newest(self, site):
        try:
            return self.pages(site, f"@{site.points()[-1]['id']}")
        except nbd.Error:
            return None

    def compare(self, primary):
        secondary = self.other(primary)
        self.look()
        # Suspended, so that newer points do not push out the one that is read; the last may be on its way.
        primary.farcopy("suspend", "shop")
        wait_for(lambda: self.newest(secondary) == self.timelines[primary.name].image(), seconds=5, what="likeness of the sites")
        for site in (primary, secondary):
            site.stop()
        for name in NAMES:
            images = []
            for site in (self.east, self.west):
                with open(site.image(name), "rb") as file:
                    images.append(file.read())
            assert images[0] == images[1], f"{name} differs between the sites' files"
        self.succeeded["sites compared"] += 1
