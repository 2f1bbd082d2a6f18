"""What is on stable storage before an answer, observed from outside: a preloaded library (`order.c`) writes down in order which files a site
writes, flushes and creates and what it answers, and makes single calls fail. Rules are held against that order.

Not seen: what goes through io_uring, which is the reactors' I/O. What they flush is looked at in `test_devices.py` and `test_power.py`.
"""

import errno
import os
import random
import struct
import subprocess
import time

from sites import FARCOPY, REPEAT, ROOT, SiteTest, die_with_parent, read_handle, run, wait_for

MIB = 1 << 20
PAGE = 4096
FLUSHES = ("fdatasync", "fsync", "msync")


class Recorder:
    """The order of events at one site."""

    def __init__(self, library, site):
        self.log, self.control = os.path.join(site.path, "order.log"), os.path.join(site.path, "order.fault")
        for path in (self.log, self.control):
            with open(path, "wb") as file:
                file.truncate(PAGE if path == self.control else 0)
        site.environment = {
            **os.environ, "LD_PRELOAD": library, "FARCOPY_ORDER_UNDER": site.path, "FARCOPY_ORDER_LOG": self.log,
            "FARCOPY_ORDER_FAULT": self.control, "SWIFT_BACKTRACE": "enable=no"}
        self.seen = 0

    def events(self):
        """What happened since it was asked last: (what, path) each."""
        with open(self.log) as file:
            lines = file.read().splitlines()
        new, self.seen = lines[self.seen:], len(lines)
        return [tuple(line.split(" ")[:2]) for line in new]

    def request(self, path):
        """From the request that contains `path` to its answer."""
        events = self.events()
        first = max(index for index, event in enumerate(events) if event[0] == "request" and path in event[1])
        last = next(index for index in range(first, len(events)) if events[index][0] == "answer")
        return events[first:last + 1]

    def fail(self, call, suffix, error=errno.ENOSPC, count=1, skip=0, half=False):
        """The next `count` such calls fail, after `skip` that do not. Error 0: the process is killed instead; below 0: they take so
        many seconds longer."""
        with open(self.control, "r+b", buffering=0) as file:
            file.write(struct.pack("<16s64siiii", call.encode(), suffix.encode(), error, skip, count, half))

    def failed(self):
        """How many of them have not come yet."""
        with open(self.control, "rb") as file:
            return struct.unpack("<i", file.read(96)[88:92])[0]

    def skipped(self):
        """How many more would have been let through."""
        with open(self.control, "rb") as file:
            return struct.unpack("<i", file.read(96)[84:88])[0]

    def last_failed(self):
        """The call and the path that failed last."""
        with open(self.control, "rb") as file:
            return file.read(352)[96:].split(b"\0")[0].decode()


class OrderTest(SiteTest):
    def setUp(self):
        super().setUp()
        self.library = os.path.join(self.directory, "order.so")
        run("clang", "-O1", "-shared", "-fPIC", "-o", self.library, os.path.join(ROOT, "Tests/blackbox/order.c"))

    def make_site(self, name, volumes, **options):
        site = super().make_site(name, volumes, **options)
        site.recorder = Recorder(self.library, site)
        return site

    def solo(self):
        site = self.site("solo", {"disk": "16MiB"})
        handle = site.connect("disk")
        handle.pwrite(random.randbytes(4 * MIB), 0)
        handle.shutdown()
        site.recorder.events()
        return site

    def mirrored(self):
        east, west = self.pair({"disk": "16MiB"}, interval="manual")
        self.write(east)
        east.cycle()
        for site in (east, west):
            site.recorder.events()
        return east, west

    def write(self, site, count=50):
        handle = site.connect("disk")
        for _ in range(count):
            handle.pwrite(random.randbytes(PAGE), random.randrange(16 * MIB // PAGE) * PAGE)
        handle.flush()
        handle.shutdown()

    def check_rules(self, events, what, names_too=True):
        """Of any operation: records are flushed after they were written; who is told, or recorded, comes after new names are durable.
        `names_too`: not for copies that power loss may take."""
        unflushed, flushed, names, maps = set(), set(), {}, set()
        for kind, path in events:
            if kind == "create" and not path.endswith("/lock"):
                if names_too or "/copies/" not in path:
                    names[path] = os.path.dirname(path)
                if path.endswith((".bitmap", ".bitmap.new", ".log")):
                    maps.add(path)
            elif kind == "rename" and (names_too or "/copies/" not in path):
                names[path] = os.path.dirname(path)
            elif kind == "remove":
                names.pop(path, None)
                maps.discard(path)
            elif kind == "fsync":
                names = {name: parent for name, parent in names.items() if parent != (path or "/")}
            if kind in FLUSHES:
                unflushed.discard(path)
                flushed.add(path)
                maps.discard(path)
            if kind == "pwrite" and path.endswith(".record"):
                early = [name for name in names if "/copies/" in name]
                self.assertEqual(early, [], f"{what}: {path} was written before the names of these files were durable")
                self.assertEqual(maps, set(), f"{what}: {path} was written before these files were flushed")
                unflushed.add(path)
            if kind in ("answer", "ready"):
                # A record that was flushed may be in the middle of the next save, by what goes on beside the command.
                self.assertEqual(unflushed - flushed, set(), f"{what}: answered before this was flushed")
                # The reserve holds nothing but space.
                missing = [name for name in names if not name.endswith("/reserve")]
                self.assertEqual(missing, [], f"{what}: answered before these names were durable")

    def order(self, events, *steps):
        """The steps, each a kind (or kinds) and the end of a path, come in this order."""
        at = 0
        for kinds, suffix in steps:
            kinds = (kinds,) if isinstance(kinds, str) else kinds
            while at < len(events) and not (events[at][0] in kinds and suffix in events[at][1]):
                at += 1
            self.assertLess(at, len(events), f"no {'/'.join(kinds)} of {suffix} in its place: {events}")
            at += 1

    def record(self, name):
        return (("pwrite", name), ("fdatasync", name))


class Order(OrderTest):
    def test_a_start(self):
        site = self.site("solo", {"disk": "16MiB"})
        self.check_rules([*site.recorder.events(), ("ready", "")], "the first start")
        site.kill()
        site.start()
        self.check_rules([*site.recorder.events(), ("ready", "")], "a start")

    def test_a_durable_copy(self):
        site = self.solo()
        site.farcopy("flashcopy", "create", "disk", "copy", "--durable")
        events = site.recorder.request("/v1/flashcopies")
        self.check_rules(events, "create")
        self.order(
            events, ("create", ".bitmap"), (FLUSHES, ".bitmap"), ("fsync", "/copies"), *self.record("volume.record"),
            ("answer", "200"))

    def test_other_commands_on_copies(self):
        site, copied = self.solo(), 0
        for words in (("create", "disk", "a", "--copy", "--rate", "0"), ("create", "disk", "b"), ("clone", "disk", "b", "c"),
                      ("set", "disk", "b", "--writable"), ("refresh", "disk", "a"), ("restore", "disk", "b")):
            site.recorder.events()
            site.farcopy("flashcopy", *words)
            self.check_rules(site.recorder.events(), words[0], names_too=False)
            # What goes on in the background writes a record of its own, while the next command may be making files.
            copied += words[0] in ("create", "refresh") and words[2] == "a"
            wait_for(lambda: site.farcopy("events").stdout.count("copy of 'a' is complete") == copied, what="the background copy")

    def test_a_background_copy_is_complete(self):
        """From then on it survives power loss: its data, its bitmap and their names are durable before the record says so."""
        site = self.solo()
        site.farcopy("flashcopy", "create", "disk", "copy", "--copy", "--rate", "0")
        events = []

        def recorded():
            events.extend(site.recorder.events())
            # That the copy is there may be written down meanwhile.
            names = [index for index, event in enumerate(events) if event == ("fsync", "/state/volumes/disk/copies")]
            record = "/state/volumes/disk/volume.record"
            written = names and ("pwrite", record) in events[names[-1]:] and events[names[-1]:].index(("pwrite", record)) + names[-1]
            return written and ("fdatasync", record) in events[written:]
        wait_for(recorded, what="the end of the background copy")
        self.order(events, ("fdatasync", ".target"), (FLUSHES, ".bitmap"), *self.record("volume.record"))
        self.order(events, ("fsync", "/copies"), *self.record("volume.record"))

    def test_a_restore_is_on_disk_before_it_is_decided(self):
        site = self.solo()
        site.farcopy("flashcopy", "create", "disk", "copy")
        self.write(site)
        site.recorder.events()
        site.farcopy("flashcopy", "restore", "disk", "copy")
        self.order(
            site.recorder.events(), (FLUSHES, "restore.bitmap"), ("pwrite", "volume.record"), ("fdatasync", "volume.record"), ("answer", "200"))

    def test_a_commit(self):
        """At the secondary data first, then files, then the record; at the primary the record before the command is answered."""
        east, west = self.mirrored()
        self.write(east)
        east.recorder.events()
        east.farcopy("cycle", "shop", "--wait")
        events = west.recorder.request("/commit")
        self.check_rules(events, "commit")
        self.order(
            events, ("create", ".bitmap"), (FLUSHES, ".bitmap"), ("fsync", "/copies"),
            *self.record("group.record"), ("answer", "200"))
        events = east.recorder.events()
        self.order(events, ("request", "/cycle"), *self.record("group.record"), *self.record("group.record"), ("answer", "200"))
        self.check_rules(events, "cycle")

    def test_a_failover(self):
        east, west = self.mirrored()
        east.kill()
        west.recorder.events()
        west.farcopy("failover", "shop")
        events = west.recorder.request("/failover")
        self.check_rules(events, "failover")
        for bitmap in ("restore.bitmap", "recording.bitmap"):
            self.order(events, (FLUSHES, bitmap), *self.record("group.record"), ("answer", "200"))

    def test_a_switchover_and_the_way_back(self):
        east, west = self.mirrored()
        self.write(east)
        east.recorder.events()
        east.farcopy("switchover", "shop")
        for site in (east, west):
            self.check_rules(site.recorder.events(), f"switchover at {site.name}")
        wait_for(lambda: west.group()["role"] == "primary", what="the exchange")
        self.write(west)
        west.cycle()
        west.kill()
        east.farcopy("failover", "shop")
        self.write(east)
        east.recorder.events()
        west.start()
        west.recorder.events()
        east.farcopy("resync", "shop", "--discard", "west", "--yes")
        for site in (east, west):
            self.check_rules(site.recorder.events(), f"resync at {site.name}")

    def test_giving_up_a_role(self):
        """What the role's end relies on is durable before the record that ends it; the peer's changes before they count as taken over."""
        east, west = self.mirrored()
        self.write(east)
        east.kill()
        west.farcopy("failover", "shop")
        self.write(west)
        east.start()
        for site in (east, west):
            site.recorder.events()
        west.farcopy("resync", "shop", "--discard", "east", "--yes")
        events = east.recorder.request("/yield")
        self.check_rules(events, "yield")
        self.order(events, (FLUSHES, "recording.bitmap"), *self.record("group.record"), ("answer", "200"))
        events = west.recorder.events()
        self.check_rules(events, "resync")
        self.order(events, ("request", "/resync"), (FLUSHES, "recording.bitmap"), *self.record("group.record"), ("answer", "200"))


class FailingCalls(OrderTest):
    """Single calls fail at the moment that matters. What was not recorded has not happened, and nobody dies of it."""

    def assert_alive(self, site, when):
        code = site.process.poll()
        if code is not None:
            site.end()
            self.fail(f"{site.name} ended with {code} {when}\n{site.tail()}")

    def settled(self, east, west):
        """Whatever failed, mirroring goes on; every point that is listed is there, and the newest is what the primary holds."""
        east.farcopy("resume", "shop", check=False)
        wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")
        point = east.cycle()
        image = east.read("disk")
        for listed in west.points():
            west.connect(f"disk@{listed['id']}").shutdown()
        self.assertEqual(west.read(f"disk@{point}"), image)
        return image

    def test_saves_that_fail_in_a_row_leave_a_copy_that_can_be_read(self):
        site = self.solo()
        site.farcopy("flashcopy", "create", "disk", "kept", "--durable")
        image = site.read("disk@kept")
        made, failed = {"disk@kept"}, 0
        for call in ("pwrite", "fdatasync"):
            for name in ("one", "two", "three"):
                # More than one, since what goes on beside the command may save as well.
                site.recorder.fail(call, "volume.record", count=3, half=True)
                done = site.farcopy("flashcopy", "create", "disk", name + call, check=False)
                site.recorder.fail("none", "")
                if done.returncode == 0:
                    made.add(f"disk@{name}{call}")
                else:
                    failed += 1
                    self.assertIn("volume.record", done.stderr)
                self.assert_alive(site, "after a save that failed")
                shown = run(FARCOPY, "inspect", f"{site.state}/volumes/disk/volume.record").stdout
                self.assertIn("current", shown, f"after {name} no copy of the record can be read")
        self.assertGreater(failed, 0)
        site.kill()
        site.start()
        self.assertEqual({word for word in site.farcopy("flashcopy", "list").stdout.split() if "@" in word}, made)
        self.assertEqual(site.read("disk@kept"), image)

    def test_a_save_that_fails_leaves_what_was_saved_last(self):
        """Killed before it can be saved again: the next start finds the newest record, not the one before."""
        for call in ("pwrite", "fdatasync"):
            for name in ("even", "odd"):  # the two copies of the record
                with self.subTest(call, name=name):
                    site = self.solo()
                    site.farcopy("flashcopy", "create", "disk", "last", "--durable")
                    if name == "odd":
                        site.farcopy("flashcopy", "set", "disk", "last", "--read-only")
                    site.recorder.fail(call, "volume.record", count=1000, half=True)
                    self.assertNotEqual(site.farcopy("flashcopy", "create", "disk", "next", check=False).returncode, 0)
                    site.kill()
                    site.recorder.fail("none", "")
                    site.start()
                    self.assertIn("disk@last", site.farcopy("flashcopy", "list").stdout)
                    self.put_away(site)

    def test_a_commit_that_is_not_recorded(self):
        """The next session finds no such point, and a failover serves one that there is."""
        for call in ("pwrite", "fdatasync"):
            for count in (1, 2):
                with self.subTest(call, count=count):
                    east, west = self.mirrored()
                    before = [point["id"] for point in west.points()]
                    self.write(east)
                    west.recorder.fail(call, "group.record", count=count, half=True)
                    east.farcopy("cycle", "shop", check=False)
                    wait_for(lambda: west.recorder.failed() == 0, what="the failures")
                    time.sleep(0.5)
                    self.assert_alive(west, "after a commit whose record failed")
                    for point in west.points():
                        west.connect(f"disk@{point['id']}").shutdown()
                    self.assertTrue(set(before) <= {point["id"] for point in west.points()})
                    image = self.settled(east, west)
                    east.kill()
                    west.kill()
                    west.start()
                    west.farcopy("failover", "shop")
                    self.assertEqual(west.read("disk"), image)
                self.put_away(*self.sites)

    def test_a_failover_that_is_not_recorded(self):
        """It says so; asked for again it is carried out, and hosts can write."""
        for call in ("pwrite", "fdatasync"):
            with self.subTest(call):
                east, west = self.mirrored()
                image = east.read("disk")
                east.kill()
                west.recorder.fail(call, "group.record", half=True)
                done = west.farcopy("failover", "shop", check=False)
                self.assertEqual(done.returncode, 1)
                self.assertIn("group.record", done.stderr)
                self.assert_alive(west, "after a failover whose record failed")
                west.farcopy("failover", "shop")
                handle = west.connect("disk")
                handle.pwrite(b"w" * PAGE, 0)
                handle.flush()
                self.assertEqual(read_handle(handle), b"w" * PAGE + image[PAGE:])
                west.kill()
                west.start()
                self.assertEqual(west.group()["role"], "primary")
                self.assertEqual(west.read("disk"), b"w" * PAGE + image[PAGE:])
            self.put_away(*self.sites)

    def test_points_of_a_primary_that_cannot_record(self):
        """Hosts go on; the point is given up, or formed later."""
        for skip in range(3):
            with self.subTest(skip=skip):
                east, west = self.mirrored()
                self.write(east)
                east.recorder.fail("fdatasync", "group.record", errno.EIO, count=2, skip=skip)
                east.farcopy("cycle", "shop", check=False)
                wait_for(lambda: east.process.poll() is not None or east.recorder.failed() == 0, what="the failures")
                time.sleep(0.3)
                self.assert_alive(east, "when a record could not be written")
                self.write(east)
                self.settled(east, west)
            self.put_away(*self.sites)

    def test_a_copy_that_ends_by_itself_and_cannot_be_recorded(self):
        """Its background copy is complete; that this could not be written down ends nobody."""
        site = self.solo()
        site.farcopy("flashcopy", "create", "disk", "copy", "--copy", "--rate", "1MiB")
        image = site.read("disk@copy")
        site.recorder.fail("fdatasync", "volume.record", errno.EIO, skip=1)
        site.farcopy("flashcopy", "set", "disk", "copy", "--rate", "0")
        wait_for(lambda: site.process.poll() is not None or site.recorder.failed() == 0, what="the failure")
        time.sleep(0.3)
        self.assert_alive(site, "when it could not record that a copy is complete")
        self.write(site)
        self.assertEqual(site.read("disk@copy"), image)
        site.kill()
        site.start()
        self.assertEqual(site.read("disk@copy"), image)

    def test_a_role_that_is_given_up_and_not_recorded(self):
        """A resync whose end could not be written down at the site that loses can be asked for again."""
        for skip in range(3):
            with self.subTest(skip=skip):
                east, west = self.mirrored()
                self.write(east)
                east.kill()
                west.farcopy("failover", "shop")
                self.write(west)
                east.start()
                east.recorder.fail("fdatasync", "group.record", skip=skip)
                west.farcopy("resync", "shop", "--discard", "east", "--yes", check=False)
                for site in (east, west):
                    self.assert_alive(site, "when a record of a resync failed")
                east.recorder.fail("none", "")
                if east.group()["role"] == "primary":
                    west.farcopy("resync", "shop", "--discard", "east", "--yes")
                self.settled(west, east)
            self.put_away(*self.sites)

    def test_kills_at_every_save(self):
        """SIGKILL instead of each write of a record, in a commit, a failover, a resync."""
        for number in range(2 * REPEAT):
            with self.subTest(number):
                east, west = self.mirrored()
                self.write(east)
                skip = random.randrange(4)
                victim = random.choice((east, west))
                victim.recorder.fail(random.choice(("pwrite", "fdatasync")), ".record", 0, skip=skip)
                east.farcopy("cycle", "shop", check=False)
                time.sleep(0.5)
                self.revive(victim)
                self.settled(east, west)
                self.write(east)
                image = east.read("disk")
                point = east.cycle()
                east.end()
                west.recorder.fail("fdatasync", ".record", 0, skip=skip % 2)
                west.farcopy("failover", "shop", check=False)
                self.revive(west)
                if west.group()["role"] != "primary":
                    west.farcopy("failover", "shop", "--point", str(point))
                self.assertEqual(west.read("disk"), image)
                self.write(west)
                east.start()
                east.recorder.fail("fdatasync", ".record", 0, skip=skip)
                # It waits for its peer, which is killed under it.
                waiting = subprocess.Popen(
                    [FARCOPY, "resync", "shop", "--discard", "east", "--yes", "--control", west.control], stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=die_with_parent)
                time.sleep(0.7)
                self.revive(east)
                waiting.wait(60)
                if east.group()["role"] == "primary":
                    west.farcopy("resync", "shop", "--discard", "east", "--yes")
                self.settled(west, east)
            self.put_away(*self.sites)

    def revive(self, site):
        """Starts a site that its fault has killed; takes the fault away from one that it has not."""
        site.recorder.fail("none", "")
        time.sleep(0.05)
        if site.process.poll() is not None:
            site.end()
            site.start()
