"""A group over several hosts and several remotes while disks are full, power is lost, calls fail and descriptors are missing, around
prepare and commit above all: hosts go on, no remote commits what another does not, all remotes fail over to one and the same closed cut,
and points go on once the fault is over.

The hosts, remotes and the chain are those of `test_several_hosts`. `REPEAT=n` takes n times as many rounds, and the tests that are
`at_length` as well.
"""

import errno
import faulthandler
import json
import os
import random
import resource
import shutil
import socket
import threading
import time

import nbd

import chains
import test_several_hosts
from control import call
from laboratory import PoweredSite, SmallFileSystem, ThinFileSystem, own_mounts
from sites import REPEAT, Site, wait_for
from test_order import OrderTest
from test_several_hosts import MASTER, REMOTES, SeveralHosts

MIB = 1 << 20
PAGE = 4096
WESTS = sorted(set(REMOTES.values()))
# Seconds that no write may take, with six sites on a busy machine.
PATIENCE = 5
QUIET = {**os.environ, "SWIFT_BACKTRACE": "enable=no"}


def at_length(test):
    """Part of the long run only."""
    return test if REPEAT > 1 else None


class DurableChain(chains.Chain):
    """Writes with FUA to the sites that are named: what was acknowledged survives power loss."""

    durable = ()

    def _connected(self, host):
        handle = super()._connected(host)
        return Durable(handle) if self.sites[host].name in self.durable else handle


class Durable:
    def __init__(self, handle):
        self.handle = handle

    def pwrite(self, data, offset):
        self.handle.pwrite(data, offset, nbd.CMD_FLAG_FUA)


class Faults(SeveralHosts):
    """What all of these check, and a chain that tells of hosts that fail while none of them was killed."""

    def clean_up(self):
        super().clean_up()
        shutil.rmtree(self.directory, ignore_errors=True)  # what was killed may have left a name meanwhile

    def images(self, suffix="", hosts=tuple(REMOTES), at=None):
        """A point is listed a moment before it can be read."""
        until = time.monotonic() + 5
        while True:
            try:
                return super().images(suffix, hosts, at)
            except nbd.Error as error:
                if "ENOENT" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(0.02)

    alone = False

    def common(self):
        """Once pairs have exchanged their roles alone, each has points of that moment of its own."""
        if not self.alone:
            return super().common()
        return sorted(set.intersection(*map(self.committed, self.remotes)))

    def begin(self):
        self.begin_chain()
        self.progress(100)
        return self.next_point(self.common()[-1])

    def assert_alive(self, when):
        for site in self.all.values():
            code = site.process.poll() if site.process else None
            if code is not None:
                tail = site.tail()
                site.end()
                self.fail(f"{site.name} ended with {code} {when}\n{tail}")

    def assert_hosts_went_on(self):
        """Since the chain was told to expect no losses every error of a write has stopped it."""
        self.assertEqual(self.chain.errors, [])
        self.assertLess(self.chain.longest, PATIENCE, "a host's write stalled")

    def said(self, *sites):
        """All that an operator is shown."""
        found = ""
        for site in sites or self.all.values():
            if site.process:
                found += json.dumps(site.status()) + site.farcopy("events").stdout
        return found

    def calm(self):
        """Every host has been written to, over a connection of now; from here on no write may fail."""
        self.progress(3 * len(REMOTES))
        self.chain.losses = False

    def goes_on(self, above, seconds=40):
        """Points are formed again, by themselves, and are closed cuts; also the one after the next, which was formed from now on."""
        number = self.next_point(above, seconds)
        first = self.cut(number)
        self.progress(100)
        last = self.cut(self.next_point(self.next_point(number)))
        self.assertGreater(last, first)

    def check_points(self):
        """Every point that all remotes list as committed is a closed cut, and newer ones have more."""
        last = 0
        for number in self.common()[-4:]:
            cut = self.cut(number)
            self.assertGreaterEqual(cut, last, f"point {number} has less than the one before")
            last = cut
        return last

    def fail_over(self, leader=None):
        """With no host alive: all remotes are at one closed cut, which has what was in the newest point of all. Returns its last write."""
        self.chain.expect_losses()
        for host in self.hosts.values():
            if host.process:
                host.kill()
        self.chain.stop()
        leader = leader or random.choice(WESTS)
        listed = [max(self.committed(remote), default=0) for remote in self.remotes]
        least = min(listed)
        floor = self.cut(least) if all(least in self.committed(remote) for remote in self.remotes) else 0
        with self.told(leader=leader, committed=listed):
            done = self.remotes[leader].farcopy("failover", "shop", "--json")
            self.assertEqual(done.stderr, "", "the other remotes have followed")
            number = json.loads(done.stdout)["id"]
            self.assertGreaterEqual(number, max(listed), "what any remote has committed is not given up")
            last = self.failed_over(number)
            self.assertGreaterEqual(last, floor)
            self.assertLessEqual(last, self.chain.acknowledged + 1)
        return last

    def fail_back(self, last):
        """The hosts return, and have what was failed over to; mirroring goes on from them."""
        for host in self.hosts.values():
            host.start()
        with self.told(last=last):
            leader = self.remotes[random.choice(WESTS)]
            # A failback that has failed before may still be under way at the other remote.
            wait_for(lambda: "is in a failback" not in leader.farcopy("failback", "shop", "--yes", check=False).stderr, 40, "a failback")
            for site in self.hosts.values():
                self.assertEqual(site.group()["role"], "primary", site.name)
            images = [self.hosts[host].read(f"v-{host}") for host in REMOTES]
            self.assertEqual(chains.check(images), last, "hosts have what was failed over to")
            self.chain.acknowledged = last
            self.chain.start()
            self.goes_on(max(map(max, map(self.committed, WESTS))))


class Full(Faults):
    """Small file systems; `small` says whose state directory (`state`) and volumes (`data`) lie on one."""
    kind = "ext4"
    small = {}
    BYTES = {"state": 400 * MIB, "data": 24 * MIB}

    def setUp(self):
        own_mounts()
        super().setUp()

    def make_site(self, name, volumes, **options):
        disks = {}
        for part in self.small.get(name, ()):
            disks[part] = disk = SmallFileSystem(os.path.join(self.directory, f"{name}-{part}"), self.kind, self.BYTES[part])
            self.addCleanup(disk.end)
            options[part] = os.path.join(disk.path, part)
            os.makedirs(options[part], exist_ok=True)
        site = Site(self.directory, name, volumes, **options)
        site.environment = QUIET
        site.disks = disks
        return site

    def fill_for_a_while(self, site, part, leave=0):
        """Hosts go on while the disk is full, and points once there is room again."""
        self.next_point(self.common()[-1])
        with self.told(site=site.name, part=part, leave=leave):
            site.disks[part].fill(leave)
            self.progress(1000)
            time.sleep(1)
            self.progress(300)
            self.assert_alive(f"while the disk of {site.name}'s {part} was full")
            self.check_points()
            said = self.said()
            site.disks[part].free()
            self.goes_on(self.common()[-1])
            self.assert_hosts_went_on()
            return said


class FullState(Full):
    """The state directory's disk: records, and the old content that points take."""

    def test_of_a_remote(self):
        self.small = {remote: ("state",) for remote in WESTS}
        self.several()
        self.begin()
        for remote in self.remotes.values():
            for leave in [0, random.randrange(1, 40) * PAGE] * REPEAT if REPEAT > 1 else [0]:
                said = self.fill_for_a_while(remote, "state", leave)
                if leave == 0:
                    self.assertIn("No space left", said, "somebody says why no points are formed")
        self.settled()

    def test_of_a_host_and_of_the_master(self):
        self.small = {MASTER: ("state",), "east2": ("state",)}
        self.several()
        self.begin()
        for name in (MASTER, "east2") if REPEAT > 1 else (random.choice((MASTER, "east2")),):
            self.fill_for_a_while(self.hosts[name], "state")
        self.settled()

    def test_the_link_to_a_full_remote_is_tried_ever_more_seldom(self):
        self.small = {"west1": ("state",)}
        self.several()
        self.begin()
        west1 = self.remotes["west1"]
        west1.disks["state"].fill(60 * PAGE)  # for the files of a point, and some of what it takes
        self.progress(2000)
        wait_for(lambda: "cannot be written" in json.dumps(west1.group()), what="the refusal")

        def sessions():
            with open(west1.log) as file:
                return file.read().count("has opened a session")
        before = sessions()
        time.sleep(5)
        self.assertLess(sessions() - before, 2 * 7, "sessions in 5 s, of two hosts")
        west1.disks["state"].free()
        self.goes_on(self.common()[-1])
        self.assert_hosts_went_on()

    def test_a_restart_while_it_is_full(self):
        """A site is served, or says why not."""
        self.small = {name: ("state",) for name in (MASTER, "east2", *WESTS)}
        self.several()
        self.begin()
        for name in self.small if REPEAT > 1 else random.sample(list(self.small), 2):
            site = self.all[name]
            with self.told(site=name):
                self.chain.expect_losses()
                before = self.common()[-1]
                site.kill()
                site.disks["state"].fill()
                site.start(wait=False)
                if site.process.stdout.readline() != "ready\n":
                    self.assertEqual(site.process.wait(30), 1, site.tail())
                    self.assertIn("No space left", site.tail())
                    site.end()
                else:
                    self.progress(50)
                    self.assert_alive("while it was full")
                site.disks["state"].free()
                if site.process is None:
                    site.start()
                self.goes_on(before)
                self.calm()
        self.settled()

    def test_remotes_are_full_from_the_beginning(self):
        self.small = {remote: ("state",) for remote in WESTS}
        self.several(start=False)
        for remote in self.remotes.values():
            remote.start()
            remote.disks["state"].fill(random.randrange(0, 40) * PAGE)
        for host in self.hosts.values():
            host.start()
        self.begin_chain()
        self.progress(1000)
        self.assert_alive("while remotes were full")
        for remote in self.remotes.values():
            remote.disks["state"].free()
        self.goes_on(self.common()[-1] if self.common() else 0)
        self.assert_hosts_went_on()
        self.settled()

    def test_a_failover_while_a_remote_is_full(self):
        self.small = {remote: ("state",) for remote in WESTS}
        self.several()
        self.begin()
        full = self.remotes[random.choice(WESTS)]
        full.disks["state"].fill()
        self.progress(1000)
        last = self.fail_over()
        self.assert_alive("at a failover")
        for remote in self.remotes.values():
            remote.kill()
            remote.start()
        self.assertEqual(self.failed_over(), last)
        full.disks["state"].free()
        self.fail_back(last)
        self.settled()

    def scattered(self, points=3):
        """Points with changes in single grains here and there: their numbers, and what they hold."""
        numbers, images = [], {}
        for turn in range(points):
            for host in REMOTES:
                handle = self.hosts[host].connect(f"v-{host}")
                for place in range(turn, 64, 8):
                    handle.pwrite(bytes([turn + 1]) * PAGE, place * 16 * PAGE)
                handle.shutdown()
            numbers.append(self.hosts["east2"].cycle())
            wait_for(lambda: numbers[-1] in self.common(), what="the point at all remotes")
            images[numbers[-1]] = self.images(f"@{numbers[-1]}")
        return numbers, images

    def all_full_and_hosts_dead(self):
        self.small = {remote: ("state",) for remote in WESTS}
        self.several(interval="manual")
        numbers, images = self.scattered()
        for site in self.hosts.values():
            site.kill()
        for remote in self.remotes.values():
            remote.disks["state"].fill()
        return numbers, images

    def wait_for_the_restore(self):
        for remote in self.remotes.values():
            wait_for(lambda: not any(volume.get("restoring_bytes") for volume in remote.status()["volumes"].values()), what="the restore")

    def test_both_pairs_of_a_full_remote_fail_over(self):
        """What the first one has flowing back takes nothing that the second one needs."""
        numbers, images = self.all_full_and_hosts_dead()
        done = self.remotes["west1"].farcopy("failover", "shop", "--point", str(numbers[0]), check=False)
        self.assert_alive("at a failover")
        with self.subTest("while it is full"):
            self.assertEqual((done.returncode, done.stderr), (0, ""))
        # If it was refused, it can be asked for again.
        for remote in self.remotes.values():
            remote.disks["state"].free()
        if done.returncode != 0:
            done = self.remotes["west1"].farcopy("failover", "shop", "--point", str(numbers[0]))
        self.assertEqual(done.stderr, "")
        self.wait_for_the_restore()
        self.assertEqual(self.images(), images[numbers[0]])

    def test_points_survive_a_failover_on_a_full_disk(self):
        """Data flows back, no host writes: nothing needs room, and every point stays."""
        numbers, images = self.all_full_and_hosts_dead()
        self.remotes["west2"].farcopy("failover", "shop", "--point", str(numbers[0]), check=False)
        self.wait_for_the_restore()
        time.sleep(0.3)
        for remote in self.remotes:
            self.assertLessEqual(set(numbers), self.committed(remote), f"{remote} has lost points\n{self.remotes[remote].tail()}")
        for number in numbers:
            self.assertEqual(self.images(f"@{number}"), images[number], f"point {number}")


class FullHosts(Full):
    @at_length
    def test_a_failback_to_a_full_host(self):
        """It needs room for what it had not sent. Asked for again once there is, it succeeds."""
        self.small = {host: ("state",) for host in REMOTES}
        self.several()
        self.begin()
        last = self.fail_over()
        full = self.hosts[random.choice(list(REMOTES))]
        full.disks["state"].fill()
        for host in self.hosts.values():
            host.start()
        with self.told(full=full.name):
            leader = self.remotes[random.choice(WESTS)]
            done = leader.farcopy("failback", "shop", "--yes", check=False)
            self.assert_alive("at a failback")
            full.disks["state"].free()
            if done.returncode != 0:
                self.assertIn("No space left", done.stderr + self.said())
            for host in self.hosts.values():
                host.kill()
            self.fail_back(last)
            self.settled()


class FullVolumes(Full):
    """The disk of a remote's volumes, which are sparse files."""

    def test_what_hosts_send_finds_no_room(self):
        self.small = {remote: ("data",) for remote in WESTS}
        self.several()
        remotes = list(self.remotes.values())
        random.shuffle(remotes)
        remotes[0].disks["data"].fill(random.randrange(1, 30) * 64 * 1024)
        self.begin_chain()
        self.progress(2000)
        time.sleep(1)
        self.assert_alive("while it was full")
        self.assertIn("No space left", self.said())
        self.check_points()
        remotes[0].disks["data"].free()
        self.goes_on(self.common()[-1])
        self.assert_hosts_went_on()
        self.settled()


class Between(Full):
    """Between prepare and commit: the master's word to a remote is held up, and its disk becomes full meanwhile."""
    prepared = test_several_hosts.InDoubt.prepared
    only_west1_prepares = test_several_hosts.InDoubt.only_west1_prepares
    west2_has_committed = test_several_hosts.InDoubt.west2_has_committed
    caught = test_several_hosts.InDoubt.caught
    cut_off_after = test_several_hosts.InDoubt.cut_off_after

    def test_a_remote_becomes_full_and_the_point_is_committed_all_the_same(self):
        self.small = {"west1": ("state",)}
        number = self.only_west1_prepares()
        west1 = self.remotes["west1"]
        west1.disks["state"].fill()
        self.progress()
        self.way.stall(False)
        self.progress(1000)
        time.sleep(0.5)
        self.check_points()
        self.assert_alive("at a commit")
        west1.disks["state"].free()
        self.goes_on(number - 1)
        self.assertEqual(self.chain.errors, [])
        self.settled()

    def test_a_full_remote_is_killed_while_it_has_prepared(self):
        """Files of the point may have to be made once more; there is no room for them."""
        self.small = {"west1": ("state",)}
        for _ in range(REPEAT):
            leader, comes_back = random.choice(WESTS), random.random() < 0.5
            with self.told(leader=leader, comes_back=comes_back):
                number = self.west2_has_committed()
                west1 = self.remotes["west1"]
                west1.disks["state"].fill()
                west1.kill()
                west1.start(wait=False)
                self.assertEqual(west1.process.stdout.readline(), "ready\n", west1.tail())
                self.assertEqual(self.prepared(), number)
                if comes_back:  # the master decides
                    self.way.delay = 0
                    self.master.start()
                    time.sleep(1)
                    self.assert_alive("at a commit")
                self.fail_over(leader)
                west1.kill()
                west1.start()
                self.failed_over()
            self.put_away(*self.all.values())
            self.way.close()


class Powered(Faults):
    """Machines that lose power: `powered` says whose."""
    powered = WESTS
    kind = "ext4"
    apart = False

    def setUp(self):
        own_mounts()
        super().setUp()

    def make_site(self, name, volumes, **options):
        if name in self.powered:
            return PoweredSite(self.directory, name, volumes, self.kind, apart=self.apart, **options)
        return super().make_site(name, volumes, **options)

    def begin_chain(self, hosts=tuple(REMOTES)):
        self.chain = DurableChain([self.hosts[host] for host in hosts], [f"v-{host}" for host in hosts])
        self.chain.durable = self.powered
        self.chain.start()

    def near_the_commit(self):
        """A random moment, as often as not one at which a remote has prepared a point."""
        time.sleep(random.random() * 0.2)
        if random.random() < 0.5:
            return
        until = time.monotonic() + 2
        while time.monotonic() < until:
            status, points = call(self.remotes["west2"], "GET", "/v1/groups/shop/points")
            if any(point["state"] == "prepared" for point in points):
                return

    def lose(self, site):
        site.lose_power()

    def kept(self):
        """Points that all remotes have, and their images."""
        return {number: self.images(f"@{number}") for number in self.common()[-2:]}

    def rounds(self, count, every):
        """Power of one or several fails at once; then they start. What was committed is there as it was. Now and then all remotes fail
        over."""
        self.several()
        self.begin()
        for turn in range(count * REPEAT):
            faulthandler.dump_traceback_later(120, exit=True)
            lost = random.sample(self.powered, random.randrange(1, len(self.powered) + 1))
            with self.told(turn=turn, lost=lost):
                kept = self.kept()
                self.chain.expect_losses()
                self.near_the_commit()
                before = {remote: max(self.committed(remote)) for remote in self.remotes}
                threads = [threading.Thread(target=self.lose, args=(self.all[name],)) for name in lost]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                if random.random() < 0.3:
                    time.sleep(random.random())
                for name in random.sample(lost, len(lost)):
                    self.all[name].start()
                for remote, number in before.items():
                    self.assertGreaterEqual(max(self.committed(remote)), number, f"{remote} has lost a point that it had committed")
                for number, images in kept.items():
                    self.assertEqual(self.images(f"@{number}"), images, f"point {number} has changed")
                if turn % every == every - 1:
                    if random.random() < 0.5:
                        self.goes_on(self.common()[-1])
                    self.fail_back(self.fail_over())
                else:
                    self.goes_on(self.common()[-1])
                self.calm()
        self.settled()


class PowerOfRemotes(Powered):
    def test_of_remotes(self):
        self.rounds(5, every=5)


class PowerOfOneDisk(Powered):
    """State directory and volumes of the remotes lie on a disk each, of which one goes, with the machine or without it."""
    apart = True

    def lose(self, site):
        site.lose_power(random.choice(site.disks), new_boot=random.random() < 0.5)

    @at_length
    def test_of_remotes(self):
        self.rounds(2, every=2)


class BrokenBlocks(Powered):
    """Blocks of the disk of a remote's volumes fail: its flushes fail, and the kernel tells that once."""
    powered = []

    def make_site(self, name, volumes, **options):
        if name not in WESTS:
            return super().make_site(name, volumes, **options)
        disk = ThinFileSystem(os.path.join(self.directory, f"{name}-data"))
        self.addCleanup(disk.end)
        site = Site(self.directory, name, volumes, data=disk.path, **options)
        site.environment, site.data_disk = QUIET, disk
        return site

    def break_blocks(self, disk, path, length):
        """The beginning of a file cannot be written any more. Returns what lies there, by its place in the file under the disk."""
        os.sync()
        kept = []
        with open(disk.device.backing, "rb") as under:
            for at, place, count in disk.extents(path):
                if at < length:
                    under.seek(place)
                    kept.append((place, under.read(min(count, length - at))))
        disk.break_at(path, 0, length)
        return kept

    def test_a_flush_of_a_remotes_volume_fails(self):
        """It commits nothing until it is restarted, and says so; hosts go on."""
        self.several()
        self.begin()
        self.progress(1600)
        for name, volume in random.sample((("west1", "v-east2"), ("west2", "v-east3")), 1 if REPEAT == 1 else 2):
            with self.told(remote=name):
                remote = self.remotes[name]
                self.chain.stop()  # what is to be kept is on the disk
                number = self.master.cycle()
                wait_for(lambda: number in self.common(), what="the last point before")
                kept = self.break_blocks(remote.data_disk, remote.image(volume), 256 << 10)
                self.chain.start()
                wait_for(lambda: "No space left" in json.dumps(remote.group()), 20, "the reason")
                self.progress(1000)
                self.assert_alive("after a flush that failed")
                self.check_points()
                before = self.common()[-1]
                self.progress(1000)
                self.assert_hosts_went_on()
                self.assertEqual(self.common()[-1], before, "nothing is committed before it is restarted")
                self.chain.expect_losses()
                remote.kill()
                remote.data_disk.mend()
                for place, data in kept:  # a disk that does not take what is new has what it had
                    with open(remote.data_disk.device.backing, "r+b") as under:
                        under.seek(place)
                        under.write(data)
                remote.start()
                self.goes_on(before)
                self.calm()
        self.settled()


class PowerOfAll(Powered):
    powered = [*WESTS, *REMOTES]

    @at_length
    def test_of_all_sites(self):
        self.rounds(2, every=2)


class PowerOfTheMaster(Powered):
    powered = [MASTER, "west1"]

    @at_length
    def test_of_the_master_and_a_remote(self):
        self.rounds(3, every=3)


class FailingCalls(Faults, OrderTest):
    """The N-th call of a site on its files fails with EIO while points are formed, prepared and committed one after the other."""
    SPACING = 400  # about as many calls as a few points take

    def make_site(self, name, volumes, **options):
        site = super().make_site(name, volumes, **options)
        if name not in self.victims:
            site.environment = QUIET
        return site

    def each(self, victims, rounds):
        self.victims = victims
        self.several()
        self.begin()
        for turn in range(rounds * REPEAT):
            faulthandler.dump_traceback_later(120, exit=True)
            victim = self.all[random.choice(victims)]
            what = random.choice(("*", "*", "fdatasync", "rename", "open", "pwrite", "fsync", "msync"))
            number, count = random.randrange(self.SPACING if what == "*" else self.SPACING // 10), random.choice((1, 1, 1, 3))
            number_of_error = random.choice((errno.EIO, errno.EIO, errno.ENOSPC))
            victim.recorder.fail(what, "", number_of_error, count=count, skip=number, half=True)
            until = time.monotonic() + 2
            while time.monotonic() < until and victim.recorder.failed() > 0:
                time.sleep(0.02)
            hit = victim.recorder.last_failed() if victim.recorder.failed() < count else None
            victim.recorder.fail("none", "")
            with self.told(turn=turn, victim=victim.name, call=what, number=number, count=count, error=number_of_error, hit=hit):
                self.progress(100)
                self.assert_alive(f"when {hit} failed")
                self.check_points()
                self.assert_hosts_went_on()
                try:
                    self.goes_on(self.common()[-1], 5)
                    restarts = turn % 6 == 5
                except AssertionError as error:
                    if "did not come about" not in str(error):
                        raise
                    self.assertIn(os.strerror(number_of_error), self.said(), "why no points are formed is said")
                    restarts = True
                if restarts:
                    self.chain.expect_losses()
                    victim.kill()
                    victim.start()
                    self.goes_on(self.common()[-1])
                    self.calm()
        self.fail_back(self.fail_over())
        self.settled()

    def test_of_remotes(self):
        self.each(WESTS, 4)

    @at_length
    def test_of_the_master(self):
        self.each([MASTER], 4)

    def round(self, turn, victim, comes_back=0.8):
        """The victim, which may be failing or dead, is started again; then, at every third turn, all remotes fail over, sometimes while
        it has not been restarted."""
        if victim.process is None or random.random() < comes_back:
            victim.end()
            victim.recorder.fail("none", "")
            victim.start()
        victim.recorder.fail("none", "")
        if turn % 3 == 1:
            self.fail_back(self.fail_over())
        else:
            self.goes_on(self.common()[-1])
        self.check_points()
        self.calm()

    def test_a_kill_at_the_nth_call(self):
        """Between any two calls around prepare and commit."""
        self.victims = [*WESTS, MASTER]
        self.several()
        self.begin()
        for turn in range(2 * REPEAT):
            faulthandler.dump_traceback_later(120, exit=True)
            victim = self.all[random.choice(self.victims)]
            number = random.randrange(120 if victim.name in WESTS else 12)
            with self.told(turn=turn, victim=victim.name, number=number):
                self.chain.expect_losses()
                victim.recorder.fail("*", "", 0, skip=number)
                wait_for(lambda: victim.process.poll() is not None, 20, "the kill")
                victim.end()
                with self.told(at=victim.recorder.last_failed()):
                    self.round(turn, victim)
        self.settled()

    def test_records_cannot_be_saved_and_may_have_been(self):
        """Every save of a group's record fails for a while, though what was written may be in the file; the site is killed meanwhile, or
        goes on."""
        self.victims = [*WESTS, MASTER]
        self.several()
        self.begin()
        for turn in range(2 * REPEAT):
            faulthandler.dump_traceback_later(120, exit=True)
            victim = self.all[random.choice(self.victims)]
            what = random.choice(("pwrite", "fdatasync", "fdatasync"))
            with self.told(turn=turn, victim=victim.name, what=what):
                time.sleep(random.random() * 0.2)
                victim.recorder.fail(what, "group.record", errno.EIO, count=1 << 20, half=random.random() < 0.5)
                self.progress(random.randrange(1, 500))
                self.assert_alive("when records could not be saved")
                self.assert_hosts_went_on()
                self.check_points()
                self.chain.expect_losses()
                if random.random() < 0.5:
                    victim.kill()
                    self.round(turn, victim)
                else:
                    victim.recorder.fail("none", "")
                    self.round(turn, victim, comes_back=0)
        self.settled()

    @at_length
    def test_a_failover_while_records_cannot_be_saved(self):
        """It is refused, or done; asked for again once they can be, it leads all to one point."""
        for turn in range(REPEAT):
            faulthandler.dump_traceback_later(120, exit=True)
            self.victims = WESTS
            self.several()
            self.begin()
            victim, leader = self.remotes[random.choice(WESTS)], random.choice(WESTS)
            with self.told(victim=victim.name, leader=leader):
                self.chain.expect_losses()
                time.sleep(random.random() * 0.2)
                victim.recorder.fail("fdatasync", "group.record", errno.EIO, count=1 << 20)
                time.sleep(random.random() * 0.2)
                for host in self.hosts.values():
                    host.kill()
                self.remotes[leader].farcopy("failover", "shop", check=False)
                self.assert_alive("at a failover")
                if random.random() < 0.5:
                    victim.kill()
                    victim.recorder.fail("none", "")
                    victim.start()
                victim.recorder.fail("none", "")
                self.chain.stop()
                self.fail_back(self.fail_over())
                self.settled()
            self.put_away(*self.all.values())

    def test_a_fault_in_a_failover(self):
        """A call of the site that leads, or of the one that is led, fails, or is its end. Asked for again, all are at one point."""
        self.victims = WESTS
        self.several()
        self.begin()
        for turn in range(REPEAT):
            faulthandler.dump_traceback_later(120, exit=True)
            victim, leader = self.remotes[random.choice(WESTS)], random.choice(WESTS)
            error, number = random.choice((0, 0, errno.EIO)), random.randrange(60)
            with self.told(turn=turn, victim=victim.name, leader=leader, error=error, number=number):
                self.chain.expect_losses()
                time.sleep(random.random() * 0.2)
                for host in self.hosts.values():
                    host.kill()
                self.chain.stop()
                floor = max(max(self.committed(remote)) for remote in self.remotes)
                victim.recorder.fail("*", "", error, skip=number)
                done = self.remotes[leader].farcopy("failover", "shop", check=False)
                hit = victim.recorder.last_failed() if victim.recorder.failed() == 0 else None
                if error == 0 and hit:
                    victim.process.wait(20)
                    victim.end()
                    victim.recorder.fail("none", "")
                    victim.start()
                victim.recorder.fail("none", "")
                self.assert_alive(f"at a failover, which ended with {done.returncode} {done.stderr}, when {hit} failed")
                again = self.remotes[random.choice(WESTS)].farcopy("failover", "shop", "--json")
                self.assertEqual(again.stderr, "")
                self.assertGreaterEqual(json.loads(again.stdout)["id"], floor)
                last = self.failed_over()
                if random.random() < 0.5:
                    for remote in self.remotes.values():
                        remote.kill()
                        remote.start()
                    self.assertEqual(self.failed_over(), last)
                self.fail_back(last)
        self.settled()

    def test_why_a_remote_cannot_prepare_is_said(self):
        """At the remote and at the master, as with one remote; and no more, once it can."""
        self.victims = ["west1"]
        self.several()
        self.begin()
        west1 = self.remotes["west1"]
        for what, suffix in (("open", ".bitmap.new"), ("fdatasync", "group.record")):
            with self.subTest(call=what):
                try:
                    west1.recorder.fail(what, suffix, errno.EIO, count=1 << 20)
                    self.progress(500)
                    for site in (west1, self.master):
                        wait_for(lambda: os.strerror(errno.EIO) in json.dumps(site.group()), 8, f"the reason in the status of {site.name}")
                finally:
                    west1.recorder.fail("none", "")
                self.goes_on(self.common()[-1])
                wait_for(lambda: os.strerror(errno.EIO) not in json.dumps(west1.group()), 8, "the end of that")
        self.assert_hosts_went_on()

    @at_length
    def test_a_fault_in_a_failback(self):
        """A call of any site fails, or is its end, while roles come back. Asked for again, all have theirs, and nothing is lost."""
        self.victims = sorted([*WESTS, *REMOTES])
        self.several()
        self.begin()
        for turn in range(2 * REPEAT):
            faulthandler.dump_traceback_later(120, exit=True)
            victim = self.all[random.choice(self.victims)]
            error, number = random.choice((0, 0, errno.EIO)), random.randrange(150)
            with self.told(turn=turn, victim=victim.name, error=error, number=number):
                last = self.fail_over()
                for host in self.hosts.values():
                    host.start()
                victim.recorder.fail("*", "", error, skip=number)
                leader = self.remotes[random.choice(WESTS)]
                done = leader.farcopy("failback", "shop", "--yes", check=False)
                hit = victim.recorder.last_failed() if victim.recorder.failed() == 0 else None
                if error == 0 and hit:
                    victim.process.wait(20)
                    victim.end()
                    victim.recorder.fail("none", "")
                    victim.start()
                victim.recorder.fail("none", "")
                self.assert_alive(f"at a failback, which ended with {done.returncode} {done.stderr}, when {hit} failed")
                self.roles_come_back()
                images = [self.hosts[host].read(f"v-{host}") for host in REMOTES]
                self.assertEqual(chains.check(images), last, "hosts have what was failed over to")
                self.chain.acknowledged = last
                self.chain.start()
                self.goes_on(max(map(max, map(self.committed, WESTS))))
                self.calm()
        self.settled()

    def roles_come_back(self):
        """As docs/OPERATIONS.md says: asked for again; or pair by pair, if some have exchanged theirs and others not."""
        end, words, tries = time.monotonic() + 60, [], 0
        while time.monotonic() < end:
            roles = {name: site.group()["role"] for name, site in self.all.items()}
            if all(roles[host] == "primary" for host in REMOTES) and all(roles[remote] == "secondary" for remote in WESTS):
                return
            tries += 1
            for remote in self.remotes.values():
                if remote.group()["role"] == "secondary":
                    continue
                mine = [host for host in REMOTES if REMOTES[host] == remote.name]
                pairs = [f"shop@{host}" for host in mine] if len(mine) > 1 else ["shop"]
                alone = [("switchover", pair, "--alone") for pair in pairs]
                self.alone = self.alone or tries % 3 == 0
                for command in alone if tries % 3 == 0 else [("failback", "shop", "--yes")]:
                    done = remote.farcopy(*command, check=False)
                    words.append((remote.name, command[:2], done.returncode, done.stderr[:300]))
            time.sleep(0.5)
        self.fail(f"the roles have not come back: {roles} {words}")

    @at_length
    def test_slow_disks(self):
        """Flushes of a remote, or of the master, take seconds: questions are asked again meanwhile."""
        self.victims = [*WESTS, MASTER]
        self.several()
        self.begin()
        for turn in range(2 * REPEAT):
            faulthandler.dump_traceback_later(120, exit=True)
            victim = self.all[random.choice(self.victims)]
            with self.told(turn=turn, victim=victim.name):
                victim.recorder.fail("fdatasync", "", -2, count=random.randrange(1, 4), skip=random.randrange(10))
                self.progress(1500)
                wait_for(lambda: victim.recorder.failed() == 0, 20, "slow calls")
                self.check_points()
                self.goes_on(self.common()[-1])
                self.assert_hosts_went_on()
        self.settled()


class Descriptors(Faults):
    """There are no descriptors left."""

    def limit(self, site, count):
        _, hard = resource.prlimit(site.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(site.process.pid, resource.RLIMIT_NOFILE, (count, hard))

    def clients(self, address, count):
        made = []
        for _ in range(count):
            client = socket.socket(socket.AF_UNIX)
            self.addCleanup(client.close)
            client.settimeout(10)
            try:
                client.connect(address)
            except OSError:
                client.close()
                continue
            made.append(client)
        return made

    def test_the_limit_is_lowered_while_points_are_formed(self):
        self.several()
        self.begin()
        for name in (*WESTS, MASTER, "east2") if REPEAT > 1 else (random.choice(WESTS), random.choice((MASTER, "east2"))):
            site = self.all[name]
            numbers = [int(number) for number in os.listdir(f"/proc/{site.process.pid}/fd")]
            for more in (0, random.randrange(1, 12)) if REPEAT > 1 else (random.choice((0, 0, *range(1, 12))),):
                with self.told(site=name, more=more):
                    self.limit(site, max(numbers) + 1 + more if more else len(numbers) // 2)
                    self.progress(1000)
                    time.sleep(0.5)
                    self.assert_alive("without descriptors")
                    _, hard = resource.prlimit(site.process.pid, resource.RLIMIT_NOFILE)
                    self.limit(site, hard)
                    self.goes_on(self.common()[-1])
                    self.check_points()
                    self.assert_hosts_went_on()
        self.settled()

    def test_many_clients(self):
        self.several(start=False)
        for site in self.all.values():
            site.prefix = ["bash", "-c", 'ulimit -n 600; exec "$@"', "-"]
        self.start_all()
        self.begin()
        for name in (*WESTS, MASTER, "east3") if REPEAT > 1 else ("west1", random.choice((MASTER, "east3"))):
            site = self.all[name]
            with self.told(site=name):
                idle = self.clients(site.control[5:], 700) + self.clients(site.socket, 700)
                self.progress(1000)
                time.sleep(0.5)
                self.assert_alive("with many clients")
                for client in idle:
                    client.close()
                self.goes_on(self.common()[-1])
                self.check_points()
                self.assert_hosts_went_on()
        self.settled()


class ReplacedDisk(Faults):
    """A site loses its disk, and starts with an empty one, while the others go on."""

    def lose_disk(self, site, *volumes):
        site.kill()
        shutil.rmtree(site.state)
        for volume in volumes:
            os.unlink(site.image(volume))

    def lose_a_hosts(self, name="east2"):
        self.several()
        self.begin()
        self.chain.expect_losses()
        host = self.hosts[name]
        self.lose_disk(host, f"v-{name}")
        time.sleep(0.3)
        before = self.common()[-1]
        last = self.cut(before)
        host.start()
        wait_for(lambda: f"belongs to another '{name}'" in (host.group().get("reason") or ""), what="the refusal")
        return before, last

    @at_length
    def test_of_a_host_and_it_gets_its_data_back(self):
        """As docs/OPERATIONS.md says: fail over, and fail back to the empty disk."""
        before, last = self.lose_a_hosts()
        self.assertEqual(self.cut(self.common()[-1]), last, "nothing empty is mirrored")
        self.hosts["east2"].kill()
        self.lose_disk(self.hosts["east2"].start(), "v-east2")
        last = self.fail_over()
        self.assertGreater(last, 0)
        self.fail_back(last)
        self.settled()

    def paired_anew(self, name):
        before, last = self.lose_a_hosts(name)
        self.chain.stop()
        west1 = self.remotes["west1"]
        west1.stop()
        shutil.rmtree(os.path.join(west1.state, "groups", f"shop@{name}"))
        west1.start()
        self.hosts[name].farcopy("resume", "shop")
        # Nobody decides any more about a point that a remote had prepared: an operator does.
        for remote in self.remotes.values():
            remote.farcopy("abort", "cycle:shop", check=False)
        # The chain begins anew, where nothing is left of it.
        for host in REMOTES:
            handle = self.hosts[host].connect(f"v-{host}")
            handle.zero(4 * MIB, 0)
            handle.shutdown()
        self.begin_chain()
        number = self.next_point(before, 30)
        self.assertGreater(number, before)
        self.goes_on(self.common()[-1])
        self.settled()
        self.fail_back(self.fail_over())

    @at_length
    def test_of_a_host_that_is_paired_anew(self):
        """As the refusal says; points count on, and are whole."""
        self.paired_anew("east2")

    def test_of_the_master_that_is_paired_anew(self):
        """It does not know any more what was decided, nor in which epoch."""
        self.paired_anew(MASTER)

    @at_length
    def test_a_failover_before_a_remote_has_all_again(self):
        """It has no point: the others do not go to one that it lacks, and nothing has changed."""
        self.several('rate = "1MiB"')
        self.begin()
        west2 = self.remotes["west2"]
        self.chain.expect_losses()
        self.lose_disk(west2, "v-east3")
        west2.start()
        time.sleep(0.5)
        for host in self.hosts.values():
            host.kill()
        for leader in WESTS:
            done = self.remotes[leader].farcopy("failover", "shop", check=False)
            self.assertEqual(done.returncode, 1)
        for host in self.hosts.values():
            host.start()
        self.goes_on(self.common()[-1] if self.common() else 0)
        self.settled()

    def test_of_a_remote(self):
        """As docs/OPERATIONS.md says; everything is copied anew."""
        self.several()
        self.begin()
        before = self.common()[-1]
        west2 = self.remotes["west2"]
        self.lose_disk(west2, "v-east3")
        self.progress()
        west2.start()
        self.goes_on(before)
        self.assert_hosts_went_on()
        self.settled()
        self.fail_back(self.fail_over())


class RandomKills(Faults):
    """Hosts, the master and remotes are killed at random, several at a time; all remotes fail over now and then, and back."""

    def test_kills(self):
        self.several()
        self.begin()
        self.turns(3 * REPEAT, every=3)
        self.settled()

    def turns(self, count, every):
        seed = random.randrange(1 << 32)
        dice = random.Random(seed)
        for turn in range(count):
            faulthandler.dump_traceback_later(120, exit=True)
            victims = dice.sample(sorted(self.all), dice.choice((1, 1, 1, 2, 3)))
            with self.told(seed=seed, turn=turn, victims=victims):
                self.chain.expect_losses()
                time.sleep(dice.random() * 0.4)
                for name in victims:
                    self.all[name].kill()
                    if dice.random() < 0.5:
                        time.sleep(dice.random() * 0.05)
                fails_over = turn % every == every - 1
                if fails_over and dice.random() < 0.5:
                    victims = [name for name in victims if name in self.remotes]
                time.sleep(dice.random() * 0.3)
                for name in dice.sample(victims, len(victims)):
                    self.all[name].start()
                if fails_over:
                    if dice.random() < 0.5:
                        time.sleep(dice.random())
                    self.fail_back(self.fail_over(dice.choice(WESTS)))
                else:
                    self.goes_on(self.common()[-1])
                    self.check_points()
                self.calm()


class AnotherMaster(Faults):
    """The hosts' configurations name another master, as docs/OPERATIONS.md says; what the last one has committed counts."""

    def test_hosts_had_not_heard_of_the_last_commit(self):
        """All remotes have committed a point; the host that is to coordinate was not told."""
        way = self.link()
        self.several(options=f'max_coordination = "1s"\nmaster = "{MASTER}"', start=False)
        self.wire(way, self.master, self.hosts["east2"])
        self.start_all()
        self.begin()
        way.delay = 0.3
        number = self.next_point(self.common()[-1])
        self.chain.expect_losses()
        for host in self.hosts.values():
            host.kill()
        self.assertEqual(self.common()[-1], number)
        self.assertNotIn("prepared", str([remote.points() for remote in self.remotes.values()]))
        for host in self.hosts.values():
            host.edit(f'master = "{MASTER}"', 'master = "east2"')
            host.start()
        self.goes_on(number, 20)
        self.chain.stop()
        self.hosts["east2"].cycle()

    @at_length
    def test_back_and_forth(self):
        self.several(options=f'master = "{MASTER}"')
        self.begin()
        before = MASTER
        for name in ("east2", MASTER, "east3", MASTER):
            self.chain.expect_losses()
            for host in self.hosts.values():
                host.stop()
            for remote in self.remotes.values():
                remote.farcopy("abort", "cycle:shop", check=False)
            for host in self.hosts.values():
                host.edit(f'master = "{before}"', f'master = "{name}"')
                host.start()
            before = name
            with self.told(master=name):
                self.goes_on(self.common()[-1], 20)
        self.chain.stop()


class GoingOn(Faults):
    """`on_host_lost = "go-on"`: the cut of the hosts that are there, while one comes and goes and others are killed."""
    OTHERS = ("east1", "east3")

    def committed(self, remote):
        pair = "shop@east1" if remote == "west1" else "shop"
        status, points = call(self.remotes[remote], "GET", f"/v1/groups/{pair}/points")
        self.assertEqual(status, 200, points)
        return {point["id"] for point in points if point["state"] == "committed"}

    def cut(self, number):
        return super().cut(number, self.OTHERS)

    @at_length
    def test_kills_while_a_host_comes_and_goes(self):
        self.several('on_host_lost = "go-on"')
        self.begin_chain(self.OTHERS)
        self.progress(100)
        self.next_point(self.common()[-1])
        east2 = self.hosts["east2"]
        for turn in range(2 * REPEAT):
            faulthandler.dump_traceback_later(120, exit=True)
            victims = random.sample(["west1", "west2", "east1"], random.choice((0, 1, 1, 2)))
            with self.told(turn=turn, victims=victims, east2=east2.process is not None):
                self.chain.expect_losses()
                time.sleep(random.random() * 0.4)
                if east2.process and random.random() < 0.7:
                    east2.kill()
                time.sleep(random.choice((0, random.random() * 3)))
                for name in victims:
                    self.all[name].kill()
                for name in victims:
                    self.all[name].start()
                if not east2.process and random.random() < 0.6:
                    east2.start()
                self.goes_on(self.common()[-1])
                self.check_points()
                self.calm()
        self.chain.expect_losses()
        for host in self.hosts.values():
            if host.process:
                host.kill()
        self.chain.stop()
        least = min(max(self.committed(remote)) for remote in self.remotes)
        floor = self.cut(least)
        with self.told(least=least):
            done = self.remotes[random.choice(WESTS)].farcopy("failover", "shop", "--json")
            self.assertEqual(done.stderr, "")
            self.assertGreaterEqual(json.loads(done.stdout)["id"], least)
            last = chains.check(self.images(hosts=self.OTHERS))
            self.assertGreaterEqual(last, floor)
            self.assertLessEqual(last, self.chain.acknowledged + 1)
