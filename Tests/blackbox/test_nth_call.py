"""The N-th call fails, or the process is killed there: for each operation and N = 1, 2, 3 … until a run gets through untouched.

A preloaded library (`order.c`) counts the calls of one site on files below its directory: open, pwrite, fdatasync, fsync, msync, rename,
fallocate, ftruncate, mmap, mkdir, unlink. One of them fails with EIO, ENOSPC or EDQUOT, or is a SIGKILL. Afterwards must hold: no answer of
success without the fact; the site is alive; asked for again, the operation succeeds; after a restart all of it is there; every point that is
listed can be read, and the newest is what the primary holds; both sites' volumes are identical.

Here one N of each, at random. `SWEEP=all` tries every N (hours; `make test-long`), `SWEEP=restore,clone` those of some operations,
`NTH=restore:primary:EIO:7` one.
"""

import errno
import json
import os
import random
import subprocess
import time

import nbd

from sites import FARCOPY, die_with_parent, read_handle, wait_for
from test_order import OrderTest

SIZE = 1 << 20
PAGE = 4096
NAMES = ("orders", "wal")
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EDQUOT": errno.EDQUOT, "SIGKILL": 0}
BOTH = ("primary", "secondary")


class Operation:
    """What is asked for, at a pair that mirrors. `test` has the pair, and `test.image`, which is what the primary holds."""

    victims = ("primary",)
    words = ()

    def __init__(self, test):
        self.test = test

    def arrange(self):
        pass

    def asked(self):
        """The site that is asked, and the words."""
        return self.test.primary, self.words

    def act(self, victim):
        """Asks; whether it was done. A victim that dies is started again, since the command may wait for it."""
        site, words = self.asked()
        return self.test.ask(site, *words)

    def holds(self):
        """After success: the fact."""

    def between(self):
        """After a failure: what must hold all the same."""

    def again(self):
        site, words = self.asked()
        self.test.insist(self, site, words)

    def is_done(self):
        """By the first try, which went on although it was answered with an error."""
        return False

    def tidy(self):
        pass


class Create(Operation):
    options = ("--durable",)

    def arrange(self):
        self.test.write()

    @property
    def words(self):
        return "flashcopy", "create", *NAMES, "copy", *self.options

    def asked(self):
        return self.test.primary, self.words

    def holds(self):
        self.test.assert_copy("copy", self.test.image)

    def between(self):
        """All of the volumes have it, or none."""
        listed = self.test.listed("copy")
        self.test.assertIn(len(listed), (0, len(NAMES)))
        if listed:
            self.holds()

    def again(self):
        if not self.test.listed("copy"):
            super().again()

    def tidy(self):
        self.test.withdraw("copy")


class CreateFilled(Create):
    options = ("--copy", "--rate", "0")


class OnCopy(Operation):
    """There is a copy, durable, and one from before."""

    options = ("--durable",)

    def arrange(self):
        test = self.test
        test.write()
        self.first = test.image
        test.primary.farcopy("flashcopy", "create", *NAMES, "first", *self.options)
        test.write()
        self.then = test.image
        test.primary.farcopy("flashcopy", "create", *NAMES, "copy", *self.options)
        test.write()

    def between(self):
        self.test.assert_copy("first", self.first)

    def tidy(self):
        self.test.withdraw("first")
        for name in {copy["name"] for copy in self.test.copies()}:
            self.test.withdraw(name)


class Clone(OnCopy):
    words = "flashcopy", "clone", *NAMES, "copy", "clone"

    def holds(self):
        self.between()
        self.test.assert_copy("clone", self.then)
        self.test.assert_copy("copy", self.then)

    def again(self):
        if not self.test.listed("clone"):
            super().again()


class Refresh(OnCopy):
    words = "flashcopy", "refresh", *NAMES, "copy"

    def holds(self):
        self.between()
        self.test.assert_copy("copy", self.test.image)


class RefreshFilled(Refresh):
    options = ("--copy", "--rate", "0")

    def between(self):
        pass

    def holds(self):
        self.test.assert_copy("copy", self.test.image)


class Restore(OnCopy):
    words = "flashcopy", "restore", *NAMES, "copy", "--yes"

    def arrange(self):
        super().arrange()
        self.before = self.test.image

    def holds(self):
        self.between()
        self.test.image = self.then
        self.test.assert_volumes(self.test.primary)

    def between(self):
        super().between()
        held = self.test.read(self.test.primary)
        self.test.assertTrue(held in (self.before, self.then), "the volumes hold neither what they held nor the copy")
        self.test.image = held


class Withdraw(OnCopy):
    words = "flashcopy", "withdraw", *NAMES, "copy"

    def holds(self):
        self.between()
        wait_for(lambda: not self.test.listed("copy"), what="the end of the copy")

    def again(self):
        left = [copy["volume"] for copy in self.test.listed("copy")]
        if left:
            self.test.primary.farcopy("flashcopy", "withdraw", *left, "copy", check=False)


class Cycle(Operation):
    victims = BOTH
    words = "cycle", "shop", "--wait"

    def arrange(self):
        self.test.write()

    def holds(self):
        test = self.test
        point = test.secondary.points()[-1]["id"]
        test.assert_same(test.read(test.secondary, f"@{point}"), test.image, f"point {point} is not what was committed")


class Verify(Operation):
    victims = BOTH
    words = "verify", "shop"

    def arrange(self):
        self.test.write()

    def holds(self):
        self.test.assertFalse([copy for copy in self.test.copies() if copy["name"].startswith("verify")])


class Failover(Operation):
    victims = ("secondary",)
    words = "failover", "shop"

    def arrange(self):
        self.test.write()
        self.test.primary.cycle()
        self.test.primary.kill()

    def asked(self):
        return self.test.secondary, self.words

    def holds(self):
        test = self.test
        test.assertEqual(test.secondary.group()["role"], "primary")
        test.assert_volumes(test.secondary)
        test.write(test.secondary)

    def again(self):
        if self.test.secondary.group()["role"] != "primary":
            super().again()

    def tidy(self):
        test = self.test
        test.exchange()
        test.secondary.start()
        test.primary.farcopy("resync", "shop", "--discard", test.secondary.name, "--yes", timeout=60)


class Switchover(Operation):
    victims = BOTH
    words = "switchover", "shop"

    def arrange(self):
        self.test.write()
        self.winner = self.test.secondary

    def holds(self):
        test = self.test
        wait_for(self.is_exchanged, what="the exchange")
        if test.primary is not self.winner:
            test.exchange()
        test.assert_volumes(self.winner)
        test.write()

    def again(self):
        test = self.test
        for site in (test.primary, test.secondary):
            site.farcopy("resume", "shop", check=False)
        time.sleep(0.2)
        if not self.is_exchanged():
            super().again()
        self.holds()

    def is_done(self):
        return self.is_exchanged()

    def is_exchanged(self):
        return self.winner.group()["role"] == "primary" and self.test.other(self.winner).group()["role"] == "secondary"


class Failback(Switchover):
    words = "failback", "shop", "--yes"

    def arrange(self):
        """The secondary was failed over to, and the old primary returns with what it had not sent."""
        test = self.test
        test.write()
        test.primary.cycle()
        sent = test.image
        test.write()
        test.primary.kill()
        test.secondary.farcopy("failover", "shop")
        test.image = sent
        test.exchange()
        test.write()
        test.secondary.start()
        self.winner = test.secondary


class Resync(Failback):
    def arrange(self):
        super().arrange()
        self.winner = self.test.primary

    def asked(self):
        return self.test.primary, ("resync", "shop", "--discard", self.test.secondary.name, "--yes")

    def is_done(self):
        return self.test.primary.group()["state"] in ("mirroring", "resyncing")

    def holds(self):
        test = self.test
        wait_for(lambda: test.secondary.group()["role"] == "secondary", what="the new role")
        test.assert_volumes(self.winner)

    def again(self):
        test = self.test
        test.primary.farcopy("resume", "shop", check=False)
        if not self.is_done():
            Operation.again(self)
        self.holds()


class Start(Operation):
    victims = BOTH

    def arrange(self):
        test = self.test
        test.write()
        test.primary.farcopy("flashcopy", "create", *NAMES, "kept", "--durable")
        self.kept = test.image
        test.write()

    def end(self, site):
        site.kill()

    def act(self, victim):
        self.end(victim)
        self.test.arm()
        return self.test.try_start(victim)

    def holds(self):
        self.test.assert_copy("kept", self.kept)
        self.test.assert_volumes(self.test.primary)

    def again(self):
        for site in (self.test.primary, self.test.secondary):
            if site.process is None:
                site.start()
        self.holds()

    def tidy(self):
        self.test.withdraw("kept")


class StartAfterStop(Start):
    def end(self, site):
        site.stop()


class StartAfterPowerLoss(Start):
    def end(self, site):
        site.lose_power()


class Growth(Start):
    """Both sites' volumes are a grain larger at this start."""

    def arrange(self):
        super().arrange()
        size = self.test.size
        self.test.size += 64 << 10
        for site in (self.test.primary, self.test.secondary):
            site.edit(f'size = "{size}"', f'size = "{self.test.size}"')
        more = bytes(64 << 10)
        self.test.image = tuple(image + more for image in self.test.image)
        self.kept = tuple(image + more for image in self.kept)

    def act(self, victim):
        self.end(victim)
        other = self.test.other(victim)
        other.kill()
        other.start()
        self.test.arm()
        return self.test.try_start(victim)


OPERATIONS = {
    "create": Create, "create-filled": CreateFilled, "clone": Clone, "refresh": Refresh, "refresh-filled": RefreshFilled,
    "restore": Restore, "withdraw": Withdraw, "cycle": Cycle, "verify": Verify, "failover": Failover, "switchover": Switchover,
    "failback": Failback, "resync": Resync, "start": Start, "start-after-stop": StartAfterStop,
    "start-after-power-loss": StartAfterPowerLoss, "growth": Growth}


class NthCall(OrderTest):
    def of(self, name):
        """The cases of one operation that are wanted."""
        if "NTH" in os.environ:
            wanted, victim, error, number = os.environ["NTH"].split(":")
            if wanted == name:
                self.sweep(name, victim, [(error, int(number))])
            return
        wanted = os.environ.get("SWEEP", "some")
        if wanted not in ("some", "all") and name not in wanted.split(","):
            return
        for victim in OPERATIONS[name].victims:
            with self.subTest(victim=victim):
                self.sweep(name, victim, None if wanted == "some" else [])

    def sweep(self, name, victim, cases):
        """`cases`: an error and a number each; empty = all, None = some."""
        import faulthandler
        faulthandler.dump_traceback_later(3600, exit=True)
        if cases:
            for error, number in cases:
                self.run_case(name, victim, error, number)
        else:
            calls = self.run_case(name, victim, "EIO", 100_000)
            self.assertGreater(calls, 0, "the operation makes no call that could fail")
            if cases is None:
                self.run_case(name, victim, random.choice(("SIGKILL", "EIO", "ENOSPC", "EDQUOT")), random.randrange(calls))
            else:
                for errors in (("EIO", "ENOSPC", "EDQUOT"), ("SIGKILL",)):
                    number = 0
                    while self.run_case(name, victim, errors[number % len(errors)], number) == number:
                        number += 1
                    print(f"{name} at the {victim}, {errors[0]}: {number} calls", flush=True)
        self.put_away(*self.sites)

    # One case.

    def run_case(self, name, role, error, number):
        """Returns how many calls were let through before the one that failed; all of them, when none did."""
        if not self.sites:
            self.primary, self.secondary = self.pair({name: str(SIZE) for name in NAMES}, interval="manual")
            self.size, self.image = SIZE, (bytes(SIZE), bytes(SIZE))
            self.write()
            self.primary.cycle()
        operation = OPERATIONS[name](self)
        try:
            operation.arrange()
            self.victim, self.error, self.number = getattr(self, role), ERRORS[error], number
            calls = self.one(operation)
        except BaseException as problem:
            what = self.victim.recorder.last_failed() if hasattr(self, "victim") else ""
            logs = "\n".join(f"--- {site.name}, ended: {site.process.poll() if site.process else None}\n" + site.tail() for site in self.sites)
            self.put_away(*self.sites)
            text = f"NTH={name}:{role}:{error}:{number} ({what}): {problem!r}"
            print(text, flush=True)
            raise AssertionError(f"{text}\n{logs}") from problem
        return calls

    def arm(self):
        self.victim.recorder.fail("*", "", self.error, skip=self.number, half=True)

    def one(self, operation):
        victim = self.victim
        self.was_revived = False
        self.arm()
        done = operation.act(victim)
        hit = victim.recorder.failed() == 0
        calls = self.number if hit else self.number - victim.recorder.skipped()
        victim.recorder.fail("none", "")
        if hit and self.error == 0 and not self.was_revived and victim.process is not None:
            victim.process.wait(10)
        self.revive(victim, when=f"after {operation.__class__.__name__}")
        if done:
            operation.holds()
        elif self.lost_a_target() and isinstance(operation, OnCopy):
            operation.tidy()
            self.settle()
            return calls
        else:
            self.assertTrue(hit, "the operation failed although no call did")
            operation.between()
            operation.again()
            operation.holds()
        if victim.process is not None:
            victim.kill()
        victim.start()
        operation.holds()
        operation.tidy()
        self.settle()
        return calls

    def ask(self, site, *words):
        """Whether the command succeeded. It may wait for the victim, which is started when it dies."""
        asked = subprocess.Popen(
            [FARCOPY, *words, "--control", site.control], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent)
        end = time.monotonic() + 30
        while asked.poll() is None:
            if self.error == 0 and self.victim.process.poll() is not None:
                self.was_revived = True
                self.victim.recorder.fail("none", "", count=0)
                self.revive(self.victim)
            if time.monotonic() > end:
                asked.kill()
                self.fail(f"`farcopy {' '.join(words)}` has no answer after 30 s: {site.farcopy('status', check=False).stdout}")
            time.sleep(0.01)
        self.said = asked.stdout.read().decode()
        asked.stdout.close()
        return asked.returncode == 0

    def insist(self, operation, site, words):
        """Asked for again it succeeds, at the latest when the link is up again."""
        end = time.monotonic() + 30
        while not operation.is_done() and not self.ask(site, *words):
            if time.monotonic() > end:
                self.fail(f"`farcopy {' '.join(words)}`, asked for again: {self.said}")
            self.primary.farcopy("resume", "shop", check=False)
            time.sleep(0.2)

    def revive(self, site, when=""):
        """A site that was to be killed may be dead, and starts; another must be alive."""
        code = site.process.poll() if site.process else 0
        if code is None:
            return
        if site.process is not None and self.error != 0:
            site.process = None
            self.fail(f"{site.name} ended with {code} {when}\n{site.tail()}")
        site.end()
        site.start()

    def try_start(self, site):
        site.start(wait=False)
        ready = site.process.stdout.readline() == "ready\n"
        if not ready:
            code = site.process.wait(30)
            self.assertTrue(code > 0 or self.error == 0, f"the start ended with {code}: {site.tail()}")
            if self.error != 0:
                self.assertIn("farcopy", site.tail().splitlines()[-1])
            site.end()
        return ready

    # The pair.

    def other(self, site):
        return self.secondary if site is self.primary else self.primary

    def exchange(self):
        self.primary, self.secondary = self.secondary, self.primary

    def write(self, site=None):
        """Some pages of each volume, and now and then a range of zeroes; flushed."""
        images = []
        for name, image in zip(NAMES, self.image):
            handle = (site or self.primary).connect(name)
            image = bytearray(image)
            for _ in range(6):
                at = random.randrange(len(image) // PAGE) * PAGE
                data = random.randbytes(PAGE)
                handle.pwrite(data, at)
                image[at:at + PAGE] = data
            handle.flush()
            handle.shutdown()
            images.append(bytes(image))
        self.image = tuple(images)

    def read(self, site, suffix=""):
        images = []
        for name in NAMES:
            handle = site.connect(name + suffix)
            images.append(read_handle(handle))
            handle.shutdown()
        return tuple(images)

    def assert_same(self, found, wanted, otherwise):
        """Without a megabyte of difference in words."""
        pages = [
            f"{name} page {at // PAGE}" for name, one, other in zip(NAMES, found, wanted)
            for at in range(0, max(len(one), len(other)), PAGE) if one[at:at + PAGE] != other[at:at + PAGE]]
        self.assertEqual(pages[:8], [], otherwise)

    def copies(self):
        return json.loads(self.primary.farcopy("flashcopy", "list", "--json").stdout)

    def listed(self, name):
        return [copy for copy in self.copies() if copy["name"] == name]

    def assert_copy(self, name, image):
        def has_failed():
            return self.lost_a_target() and "failed" in [copy["state"] for copy in self.listed(name)]

        if has_failed():
            return
        try:
            self.assertEqual([copy["state"] for copy in self.listed(name)], ["active"] * len(NAMES), f"FlashCopy {name}")
            image_now = self.read(self.primary, "@" + name)
        except (AssertionError, nbd.Error):
            if not has_failed():  # meanwhile, in the background
                raise
            return
        self.assert_same(image_now, image, f"FlashCopy {name} is not its moment")

    def assert_volumes(self, site):
        self.assert_same(self.read(site), self.image, f"{site.name} does not hold what its hosts wrote")

    def lost_a_target(self):
        """Whether a flush of a target failed: its copy has failed then, by design, and what reads through it may have."""
        call, _, path = self.victim.recorder.last_failed().partition(" ")
        return self.error != 0 and call == "fdatasync" and path.endswith(".target")

    def withdraw(self, name):
        left = [copy["volume"] for copy in self.listed(name)]
        if left:
            self.primary.farcopy("flashcopy", "withdraw", *left, name)
        wait_for(lambda: not self.listed(name), what=f"the end of {name}")

    def settle(self):
        """Whatever failed, mirroring goes on; every point that is listed is there, and the newest is what the primary holds."""
        self.primary.farcopy("resume", "shop", check=False)
        wait_for(lambda: self.primary.group()["state"] in ("mirroring", "resyncing"), what="the link")
        self.assert_volumes(self.primary)
        self.write()
        point = self.primary.cycle()
        for listed in self.secondary.points():
            self.read(self.secondary, f"@{listed['id']}")
        self.assert_same(self.read(self.secondary, f"@{point}"), self.image, f"point {point} is not what the primary holds")
        for name in {copy["name"] for copy in self.copies()}:
            self.withdraw(name)  # what resyncs have kept
        wait_for(lambda: self.files(self.secondary) == self.files(self.primary) == self.image, what="identical volumes")

    def files(self, site):
        images = []
        for name in NAMES:
            with open(site.image(name), "rb") as file:
                images.append(file.read())
        return tuple(images)


for operation_name in OPERATIONS:
    setattr(NthCall, f"test_{operation_name.replace('-', '_')}", lambda self, name=operation_name: self.of(name))
