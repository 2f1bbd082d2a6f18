"""Contradictory commands of several operators at both sites at once, with hosts writing: nobody aborts, every call is answered in time,
whatever can be read of a recovery point is a closed cut, and when the commands stop the documented way brings both sites together.

`LASTS=60` goes on for so many seconds, `SEED=n` draws the same commands again (what they meet is another matter), `REPEAT=n` takes n seeds.
"""

import collections
import faulthandler
import http.client
import os
import random
import threading
import time

import nbd

from control import call
from sites import REPEAT, SECTOR, SiteTest, wait_for

VOLUMES = {"data": "4MiB", "log": "4MiB"}
PAGE = 4096
PAGES = 1024
# The first pages of both volumes: a number is written to `data` and then, when that was acknowledged, to `log`.
CHAINS = 8
SECONDS = int(os.environ.get("LASTS", "15"))
# A call that takes longer is a failure. Each operator waits for one at a time.
LONGEST = 30
GROUP = "/v1/groups/shop"
# How often each is asked for.
COMMANDS = {
    "cycle": 14, "switchover": 8, "failover": 8, "resync": 14, "suspend": 4, "resume": 10, "create": 8, "refresh": 5, "restore": 5,
    "withdraw": 8, "clone": 3, "practice": 3, "end practice": 3, "verify": 4, "abort": 6, "drop": 2, "status": 6}
# What has succeeded at least in a run, or it has shown little.
LEAST = {"failover": 2, "resync": 2, "create": 2, "status": 5}


class Party(threading.Thread):
    """Does something at the sites until the time is over."""

    def __init__(self, sites, seed, until):
        super().__init__(daemon=True)
        self.sites, self.random, self.until = sites, random.Random(seed), until
        self.problem = None

    def goes_on(self):
        return time.monotonic() < self.until

    def run(self):
        try:
            while self.goes_on():
                self.act()
        except Exception as error:
            self.problem = f"{type(self).__name__}: {error!r}"


class Operator(Party):
    """Asks one site or the other for something, waits for the answer, and goes on."""

    def __init__(self, sites, seed, until):
        super().__init__(sites, seed, until)
        self.succeeded, self.refused = collections.Counter(), collections.Counter()
        self.problems, self.told = [], []
        self.doing = None

    def act(self):
        kind = self.random.choices(list(COMMANDS), list(COMMANDS.values()))[0]
        self.ask(self.random.choice(self.sites), kind)
        time.sleep(self.random.choice((0, 0.01, 0.1, 0.4)))

    def ask(self, site, kind):
        request = self.request(kind)
        began = time.monotonic()
        self.doing = f"{site.name} {kind} {request}"
        try:
            status, answer = call(site, *request, timeout=LONGEST)
        except TimeoutError:
            self.problems.append(f"{self.doing} was not answered in {LONGEST} s")
            return
        except (OSError, http.client.HTTPException) as error:
            status, answer = 0, repr(error)  # the site is away; who sent it away looks after that
        seconds = time.monotonic() - began
        if seconds > LONGEST:
            self.problems.append(f"{self.doing} took {seconds:.0f} s")
        if status == 500:
            self.problems.append(f"{self.doing}: an error that nobody has words for: {answer}")
        (self.succeeded if 200 <= status < 300 else self.refused)[kind] += 1
        words = "" if status == 200 else answer
        self.told.append((began, f"{self.doing}: {status} in {seconds:.2f} s {words}"[:300]))
        self.doing = None

    def request(self, kind):
        """Method, path and body."""
        copy = {"name": self.random.choice("abc"), "volumes": list(VOLUMES)}
        where = self.random.choice(("east", "west"))
        match kind:
            case "cycle" | "switchover" | "failover" | "suspend" | "resume" | "practice":
                return "POST", f"{GROUP}/{kind}"
            case "resync":
                return "POST", f"{GROUP}/resync?discard={where}"
            case "end practice":
                return "DELETE", f"{GROUP}/practice"
            case "verify":
                return "POST", f"{GROUP}/verify?repair={self.random.choice(('true', 'false'))}"
            case "abort":
                kind = self.random.choice(("switchover", "resync", "verify", "cycle", "copy"))
                return "POST", f"/v1/abort?operation={kind}:shop"
            case "drop":
                return "POST", f"{GROUP}/points/drop", {"older_than": "2s"}
            case "create":
                options = self.random.choice(({}, {"durable": True}, {"copy": True, "rate": 0}, {"writable": True}))
                return "POST", "/v1/flashcopies", copy | options
            case "clone":
                return "POST", "/v1/flashcopies/clone", copy | {"of": self.random.choice("abc")}
            case "restore":
                return "POST", "/v1/flashcopies/restore", copy | {"disconnect": True}
            case "refresh" | "withdraw":
                return "POST", f"/v1/flashcopies/{kind}", copy
            case "status":
                return "GET", self.random.choice(("/v1/status", "/v1/flashcopies", f"{GROUP}/points", "/metrics"))


class Host(Party):
    """Writes to both volumes of its site when it is let in. It is disconnected at any time, and finds connections read-only, since roles
    change under it."""

    def __init__(self, site, seed, until):
        super().__init__([site], seed, until)
        self.site, self.written = site, 0

    def act(self):
        try:
            handles = [self.site.connect(name) for name in VOLUMES]
            # Otherwise one may be of another recovery point than the other.
            if not any(handle.is_read_only() for handle in handles):
                # Whatever changes what a volume holds ends the connections to both before.
                numbers = read_chains(handles)
                while self.goes_on():
                    self.step(handles, numbers)
        except nbd.Error:
            pass
        time.sleep(0.05)

    def step(self, handles, numbers):
        chain = self.random.randrange(CHAINS)
        if numbers["data"][chain] == numbers["log"][chain]:
            numbers["data"][chain] += 1
            handles[0].pwrite(page_of(numbers["data"][chain]), chain * PAGE)
        numbers["log"][chain] = numbers["data"][chain]
        handles[1].pwrite(page_of(numbers["log"][chain]), chain * PAGE)
        for handle in handles:
            handle.pwrite(self.random.randbytes(PAGE), self.random.randrange(CHAINS, PAGES) * PAGE)
        if self.random.random() < 0.02:
            handles[0].flush()
        self.written += 1


class Reader(Party):
    """Opens recovery points and FlashCopies of both sites and looks whether they are closed cuts."""

    def __init__(self, sites, seed, until):
        super().__init__(sites, seed, until)
        self.read = 0

    def act(self):
        site = self.random.choice(self.sites)
        try:
            status, points = call(site, "GET", f"{GROUP}/points", timeout=LONGEST)
            names = [str(point["id"]) for point in points if status == 200] + ["a", "b", "c"]
            name = self.random.choice(names)
            # Who takes one of them away, or takes it anew, ends the connections to it before.
            read_chains([site.connect(f"{volume}@{name}") for volume in VOLUMES])
            self.read += 1
        except AssertionError as error:
            raise AssertionError(f"{name} of {site.name}: {error}") from error
        except (nbd.Error, OSError, http.client.HTTPException):
            time.sleep(0.02)


def page_of(number):
    return number.to_bytes(8, "little") * (PAGE // 8)


def read_chains(handles):
    """The numbers of each volume's chains, of one moment as long as no connection has ended."""
    images = {name: bytes(handle.pread(CHAINS * PAGE, 0)) for name, handle in reversed(list(zip(VOLUMES, handles)))}
    numbers = {}
    for name, image in images.items():
        pages = [image[at:at + PAGE] for at in range(0, CHAINS * PAGE, PAGE)]
        numbers[name] = [int.from_bytes(page[:8], "little") for page in pages]
        assert pages == [page_of(number) for number in numbers[name]], f"{name} has a torn page"
    assert all(log <= data <= log + 1 for data, log in zip(numbers["data"], numbers["log"])), f"no closed cut: {numbers}"
    return numbers


class Contradiction(SiteTest):
    def test_commands_that_contradict_each_other(self):
        seed = int(os.environ.get("SEED", random.randrange(1 << 32)))
        for number in range(REPEAT):
            with self.subTest(seed=seed + number):
                self.contradict(seed + number)

    def contradict(self, seed):
        faulthandler.dump_traceback_later(SECONDS + 180, exit=True)
        self.random = random.Random(seed)
        interval = self.random.choice(("0s", "200ms", "manual"))
        east, west = self.pair(VOLUMES, interval=interval, keep=self.random.choice((2, 8)), start=False)
        for site in (east, west):
            # Of a process that ends by itself no more than where.
            site.environment = {**os.environ, "SWIFT_BACKTRACE": "threads=crashed,limit=24,images=none,registers=none,sanitize=no"}
        self.operators = []
        try:
            for site in (west, east):
                site.start()
            wait_for(lambda: east.group()["state"] == "mirroring", what="the first copy")
            self.run_threads(east, west)
            self.bring_together(east, west)
        except BaseException as error:
            logs = "\n".join(f"--- {site.name}\n" + open(site.log).read()[-12000:] for site in (east, west))
            raise AssertionError(f"SEED={seed} interval {interval}: {error!r}\n{self.story()}\n{logs}") from error
        finally:
            self.put_away(east, west)

    def story(self):
        told = sorted(line for operator in self.operators for line in operator.told)
        waiting = [f"still waiting: {operator.doing}" for operator in self.operators if operator.doing]
        return "\n".join([*(f"{began:.2f} {text}" for began, text in told[-150:]), *waiting])

    def run_threads(self, east, west):
        until = time.monotonic() + SECONDS
        self.operators = [Operator((east, west), self.random.random(), until) for _ in range(5)]
        hosts = [Host(site, self.random.random(), until) for site in (east, west)]
        reader = Reader((east, west), self.random.random(), until)
        threads = [*self.operators, *hosts, reader]
        for thread in threads:
            thread.start()
        grows = time.monotonic() + self.random.uniform(0.3, 0.7) * SECONDS
        while time.monotonic() < until:
            self.alive(east, west)
            time.sleep(0.2)
            if grows and time.monotonic() > grows and not SECTOR:
                self.grow(east, west)
                grows = None
        for thread in threads:
            thread.join(LONGEST + 15)
            assert not thread.is_alive(), f"{thread} does not end"
        self.alive(east, west)
        succeeded = sum((operator.succeeded for operator in self.operators), collections.Counter())
        refused = sum((operator.refused for operator in self.operators), collections.Counter())
        written = {host.site.name: host.written for host in hosts}
        print(f"  done {dict(succeeded)}\n  refused {dict(refused)}\n  steps {written}, {reader.read} points and copies", flush=True)
        problems = [problem for operator in self.operators for problem in operator.problems]
        problems += [thread.problem for thread in threads if thread.problem]
        assert not problems, problems
        for kind, least in LEAST.items():
            assert succeeded[kind] >= least, f"too few of {kind} have succeeded for this to show anything"
        assert sum(written.values()) > 50 and reader.read > 10, "too little was written or read for this to show anything"

    def grow(self, *sites):
        """Volumes grow by a restart of each site with the new size, whatever it is doing."""
        for site in self.random.sample(sites, 2):
            self.alive(site)
            site.stop()
            with open(site.config) as file:
                text = file.read()
            with open(site.config, "w") as file:
                file.write(text.replace('size = "4MiB"', 'size = "5MiB"'))
            site.start()

    def alive(self, *sites):
        for site in sites:
            assert site.process.poll() is None, f"{site.name} has ended with {site.process.returncode}"

    def bring_together(self, east, west):
        """As docs/OPERATIONS.md says: resume what is suspended, end what waits, resync what both changed."""
        end = time.monotonic() + 60
        while True:
            groups = {site: site.group() for site in (east, west)}
            primaries = [site for site in (east, west) if groups[site]["role"] == "primary"]
            assert time.monotonic() < end, f"the sites do not come together: {list(groups.values())}"
            if len(primaries) == 2:
                winner = next((s for s in primaries if "stale" not in groups[s].get("reason", "")), east)
                loser = west if winner is east else east
                call(winner, "POST", f"{GROUP}/resync?discard={loser.name}", timeout=LONGEST)
            elif len(primaries) == 1:
                primary = primaries[0]
                if groups[primary]["state"] == "suspended":
                    call(primary, "POST", f"{GROUP}/resume", timeout=LONGEST)
                restoring = sum(volume["restoring_bytes"] for volume in primary.status()["volumes"].values())
                if not restoring and call(primary, "POST", f"{GROUP}/cycle", timeout=LONGEST)[0] == 200:
                    break
            time.sleep(0.1)
        secondary = west if primary is east else east
        # Nobody writes any more; suspended, so that no newer point pushes out the one that is read.
        primary.farcopy("suspend", "shop")
        point = secondary.points()[-1]["id"]
        for name in VOLUMES:
            assert secondary.read(f"{name}@{point}") == primary.read(name), f"{name} differs between the sites"
        for site in (primary, secondary):
            site.stop()
        for name in VOLUMES:
            images = []
            for site in (east, west):
                with open(site.image(name), "rb") as file:
                    images.append(file.read())
            differing = [at // PAGE for at in range(0, len(images[0]), PAGE) if images[0][at:at + PAGE] != images[1][at:at + PAGE]]
            assert not differing, f"the files of {name} differ at {len(differing)} pages: {differing[:20]}"


if __name__ == "__main__":
    import unittest
    unittest.main()
