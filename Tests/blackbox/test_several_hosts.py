"""A group over several hosts and several remotes, mode `global-mirror`: points are one closed cut of all hosts, all remotes commit the same
ones and fail over to the same one, whoever is killed.

Three hosts mirror to two remotes: east1, the master, and east2 to west1, east3 to west2. A chain of dependent writes goes over all hosts.
`REPEAT=n` takes n times as many random kills.
"""

import contextlib
import faulthandler
import json
import os
import random
import signal
import subprocess
import time

import chains
from control import call
from link import Link
from sites import FARCOPY, GROUP_LINES, REPEAT, SiteTest, read_handle, wait_for

REMOTES = {"east1": "west1", "east2": "west1", "east3": "west2"}
MASTER = "east1"
SIZE = "4MiB"
MODE = os.environ.get("SEVERAL_MODE", "global-mirror")


def names(*all):
    return json.dumps(list(all))


class SeveralHosts(SiteTest):
    """Sets up hosts and remotes: `self.sites_by_name`, and `self.hosts` and `self.remotes` among them."""

    def setUp(self):
        self.chain = None
        super().setUp()

    def clean_up(self):
        if self.chain:
            self.chain.stopping = True
        super().clean_up()  # whoever waits for a site does not any more
        if self.chain and self.chain.thread:
            self.chain.thread.join(timeout=10)

    def several(self, options="", interval="0s", start=True):
        """`options` are lines for the group at the hosts."""
        remotes = sorted(set(REMOTES.values()))
        common = f'mode = "{MODE}"\nremotes = {names(*remotes)}\nkeep = 64\nisolation_timeout = "300ms"\n{GROUP_LINES}\n'
        self.hosts, self.remotes = {}, {}
        for remote in remotes:
            mine = [host for host in REMOTES if REMOTES[host] == remote]
            self.remotes[remote] = self.site(
                remote, {f"v-{host}": SIZE for host in mine}, start=False, peers=mine + [each for each in remotes if each != remote],
                groups=f'[groups.shop]\nvolumes = {names(*(f"v-{host}" for host in mine))}\nrole = "secondary"\n'
                       f'peers = {names(*mine)}\n{common}')
        for host, remote in REMOTES.items():
            self.hosts[host] = self.site(
                host, {f"v-{host}": SIZE}, start=False, peers=[each for each in REMOTES if each != host] + remotes,
                groups=f'[groups.shop]\nvolumes = ["v-{host}"]\nrole = "primary"\npeer = "{remote}"\nhosts = {names(*REMOTES)}\n'
                       f'interval = "{interval}"\n{options}\n{common}')
        self.master = self.hosts[MASTER]
        self.all = {**self.remotes, **self.hosts}
        if start:
            self.start_all()

    def start_all(self):
        for site in self.all.values():
            site.start()
        wait_for(self.common, what="the first point")

    def begin_chain(self, hosts=tuple(REMOTES)):
        self.chain = chains.Chain([self.hosts[host] for host in hosts], [f"v-{host}" for host in hosts])
        self.chain.start()

    def wire(self, link, here, there):
        """What `here` asks of `there`'s control API goes through the link. Neither is running."""
        link.forward(f"{here.path}/to-{there.name}.sock", f"{there.path}/control.sock")
        here.edit(f'control = "unix:{there.path}/control.sock"', f'control = "unix:{here.path}/to-{there.name}.sock"')

    def link(self, **options):
        link = Link(**options)
        self.addCleanup(link.close)
        return link

    # Points.

    def committed(self, remote):
        status, points = call(self.remotes[remote], "GET", "/v1/groups/shop/points")
        self.assertEqual(status, 200, points)
        return {point["id"] for point in points if point["state"] == "committed"}

    def common(self):
        """Points that all remotes list as committed, in order. Those that one has, and another has passed over, fail the test."""
        listed = [self.committed(remote) for remote in self.remotes]
        if not all(listed):
            return []
        first, last = max(map(min, listed)), min(map(max, listed))
        inside = [sorted(number for number in each if first <= number <= last) for each in listed]
        for each in inside[1:]:
            self.assertEqual(inside[0], each, "each remote has committed the points that the other has")
        return inside[0]

    def images(self, suffix="", hosts=tuple(REMOTES), at=None):
        """Of the hosts' volumes at their remotes."""
        found = []
        for host in hosts:
            handle = (at or self.remotes[REMOTES[host]]).connect(f"v-{host}{suffix}")
            found.append(read_handle(handle))
            handle.shutdown()
        return found

    def cut(self, number, hosts=tuple(REMOTES)):
        """The last write in a point, which is a closed cut."""
        return chains.check(self.images(f"@{number}", hosts))

    def next_point(self, above=0, seconds=20):
        """A point that all remotes have committed, newer than `above`."""
        try:
            wait_for(lambda: self.common()[-1:] > [above], seconds, what=f"a point above {above}")
        except AssertionError as error:
            raise AssertionError(f"{error}; hosts say {self.notices()}") from None
        return self.common()[-1]

    def notices(self):
        found = {}
        for site in self.hosts.values():
            if site.process:
                group = site.group()
                found[site.name] = group["state"], group.get("reason"), group.get("notice")
        return found

    def settled(self):
        """No more is written; the next point has all that was."""
        self.chain.stop()
        number = self.master.cycle()
        wait_for(lambda: number in self.common(), what=f"point {number} at all remotes")
        self.assertEqual(self.cut(number), self.chain.acknowledged, "the point has the last write that was acknowledged")
        return number

    def progress(self, writes=500):
        """The chain goes on."""
        before = self.chain.acknowledged
        wait_for(lambda: self.chain.acknowledged >= before + writes, what=f"{writes} writes more than {before}")

    # Failover.

    def failed_over(self, number=None):
        """All remotes have failed over, to one and the same point (`number`), and have a closed cut: returns its last write."""
        for remote in self.remotes.values():
            group = remote.group()
            self.assertEqual((group["role"], group["state"]), ("primary", "failed-over"), (remote.name, group))
        # Asked again, each says where it is.
        points = {remote.name: json.loads(remote.farcopy("failover", "shop", "--json").stdout)["id"] for remote in self.remotes.values()}
        self.assertEqual(len(set(points.values())), 1, points)
        if number:
            self.assertEqual(set(points.values()), {number})
        return chains.check(self.images())

    def logs(self):
        return "".join(f"== {site.name}\n{site.tail()}" for site in self.all.values())

    @contextlib.contextmanager
    def told(self, **facts):
        """A failure says what was drawn, and what the sites say."""
        try:
            yield
        except BaseException:
            print(f"  {facts}\n{self.logs()}", flush=True)
            raise


class ClosedCuts(SeveralHosts):
    def test_points_are_closed_cuts_while_mirroring_goes_on(self):
        self.several()
        self.begin_chain()
        end, cuts = time.monotonic() + 4, {}
        while time.monotonic() < end:
            number = self.next_point(max(cuts, default=0))
            cuts[number] = self.cut(number)
        self.assertGreater(len(cuts), 5)
        self.assertEqual(sorted(cuts.values()), [cuts[number] for number in sorted(cuts)])
        self.assertGreater(len(set(cuts.values())), 5, "points differ")
        self.settled()
        # Both remotes list the same, once the commits that are under way are done.
        def listed():
            return [[(point["id"], point["state"]) for point in remote.points()] for remote in self.remotes.values()]

        wait_for(lambda: len(set(map(str, listed()))) == 1, what="the same points at both remotes")
        self.assertEqual({state for _, state in listed()[0]}, {"committed"})
        for host in ("east1", "east2"):
            self.assertGreater(len(self.remotes["west1"].points(f"shop@{host}")), 0, "one host's part can be asked for by itself")
        for host in self.hosts.values():
            self.assertEqual(host.group()["state"], "mirroring")
        print(f"  {len(cuts)} cuts, {self.chain.acknowledged} writes, the longest took {self.chain.longest:.3f} s")

    def test_the_check_finds_what_is_no_closed_cut(self):
        """One host's volume of an older or of a newer point, and a write of which a host has lost the half."""
        self.several()
        self.begin_chain()
        self.progress()
        older = self.next_point()
        before = self.images(f"@{older}")
        self.progress()
        # Two points later: writes of before are in it.
        newer = self.next_point(self.next_point(older))
        self.chain.stop()
        after = self.images(f"@{newer}")
        self.assertGreater(chains.check(after), chains.check(before))
        for host in range(3):
            for all, other in ((before, after), (after, before)):
                mixed = list(all)
                mixed[host] = other[host]
                with self.assertRaises(AssertionError):
                    chains.check(mixed)
        host, offset = chains.place(chains.check(after), 3)
        torn = list(after)
        torn[host] = torn[host][:offset + 512] + bytes(512) + torn[host][offset + 1024:]
        with self.assertRaises(AssertionError):
            chains.check(torn)


class Kills(SeveralHosts):
    """A site is killed at a random moment, and perhaps comes back; then all remotes fail over to one point, led by any of them."""

    def kill_and_fail_over(self, candidates, comes_back):
        for turn in range(REPEAT):
            faulthandler.dump_traceback_later(120, exit=True)
            seed = random.randrange(1 << 32)
            self.random = random.Random(seed)
            victim, leader = self.random.choice(candidates), self.random.choice(sorted(set(REMOTES.values())))
            others_die = self.random.random() < 0.5
            self.several()
            with self.told(seed=seed, turn=turn, victim=victim, leader=leader, others_die=others_die):
                self.begin_chain()
                self.next_point(self.common()[-1])
                self.chain.expect_losses()
                time.sleep(self.random.random())
                self.all[victim].kill()
                time.sleep(self.random.random() * 0.3)
                if comes_back:
                    self.all[victim].start()
                    time.sleep(self.random.random())
                if others_die:
                    for host in self.hosts.values():
                        if host.process:
                            host.kill()
                before = self.common()[-1]
                done = self.remotes[leader].farcopy("failover", "shop", "--json")
                self.assertEqual(done.stderr, "", "the other remotes have followed")
                number = json.loads(done.stdout)["id"]
                self.assertGreaterEqual(number, before, "what was committed at all remotes is not given up")
                last = self.failed_over(number)
                self.chain.stop()
                self.assertGreater(last, 0)
                self.assertLessEqual(last, self.chain.acknowledged + 1)
            self.put_away(*self.all.values())

    def test_a_host_dies(self):
        self.kill_and_fail_over(["east2", "east3"], comes_back=False)

    def test_the_master_dies(self):
        self.kill_and_fail_over([MASTER], comes_back=False)

    def test_a_remote_dies_and_comes_back(self):
        self.kill_and_fail_over(["west1", "west2"], comes_back=True)

    def test_both_remotes_are_told_at_once(self):
        """While hosts write on: neither waits for the other, and both go to one point."""
        for _ in range(REPEAT):
            faulthandler.dump_traceback_later(120, exit=True)
            self.several()
            self.begin_chain()
            self.next_point(self.common()[-1])
            self.chain.expect_losses()
            time.sleep(random.random() * 0.3)
            commands = [
                self.spawn(FARCOPY, "failover", "shop", "--control", remote.control, stdout=subprocess.DEVNULL)
                for remote in self.remotes.values()]
            with self.told():
                self.assertEqual([command.wait(timeout=60) for command in commands], [0, 0])
                last = self.failed_over()
                self.chain.stop()
                self.assertGreater(last, 0)
                self.assertLessEqual(last, self.chain.acknowledged + 1)
            self.put_away(*self.all.values())

    def test_operators_want_different_points_at_once(self):
        """Whoever is refused has changed nothing, and goes to the same point when asked again."""
        for turn in range(4 * REPEAT):
            faulthandler.dump_traceback_later(120, exit=True)
            self.several()
            self.begin_chain()
            self.next_point(self.common()[-1] + 2)
            self.chain.expect_losses()
            west1, west2 = self.remotes["west1"], self.remotes["west2"]
            older = self.common()[0]
            ways = [(west1, ["--point", str(older)]), (west2, [] if turn % 2 else ["--point", str(older + 1)])]
            commands = [
                self.spawn(FARCOPY, "failover", "shop", *words, "--control", remote.control, stdout=subprocess.DEVNULL,
                           stderr=subprocess.PIPE, text=True)
                for remote, words in ways]
            with self.told(turn=turn):
                codes, errors = [], []
                for command in commands:
                    errors.append(command.communicate(timeout=60)[1])
                    codes.append(command.returncode)
                self.assertNotEqual(codes, [0, 0] if not turn % 2 else None, errors)
                for (remote, _), code, words in zip(ways, codes, errors):
                    if code == 1:
                        self.assertRegex(words, "nothing has changed|has failed over to point|is under way")
                for remote in (west1, west2):
                    remote.farcopy("failover", "shop")
                self.failed_over()
            self.chain.stop()
            self.put_away(*self.all.values())

    def test_the_exit_code_says_that_a_remote_was_not_led(self):
        self.several(interval="manual")
        number = self.master.cycle()
        wait_for(lambda: number in self.common(), what=f"point {number} at all remotes")
        west1, west2 = self.remotes["west1"], self.remotes["west2"]
        west2.kill()
        done = west1.farcopy("failover", "shop", check=False)
        self.assertEqual(done.returncode, 3, done)
        self.assertIn("'west2' has not followed", done.stderr)
        self.assertIn(f"failed over to point {number}", done.stdout)
        self.assertEqual(west1.farcopy("failover", "shop", "--json", check=False).returncode, 3, "asked again")
        west2.start()
        self.assertIn(f"failed over to point {number}", west2.farcopy("failover", "shop").stdout)
        self.assertEqual(west1.farcopy("failover", "shop").stderr, "")

    def test_any_dies_and_comes_back(self):
        self.kill_and_fail_over(list(REMOTES) + ["west1", "west2"], comes_back=True)


class Restarts(SeveralHosts):
    """A site that was killed is started again: points go on, and nothing is lost."""

    def kill_and_start(self, candidates):
        seed = random.randrange(1 << 32)
        self.random = random.Random(seed)
        self.several()
        with self.told(seed=seed):
            self.begin_chain()
            self.chain.expect_losses()
            number = self.next_point()
            for turn in range(2 * REPEAT):
                faulthandler.dump_traceback_later(120, exit=True)
                victim = self.random.choice(candidates)
                time.sleep(self.random.random() * 0.5)
                before = self.common()[-1]
                self.all[victim].kill()
                time.sleep(self.random.random() * 0.3)
                self.all[victim].start()
                with self.told(victim=victim, turn=turn, before=before):
                    number = self.next_point(before)
                    last = self.cut(number)
                    self.progress()
                    later = self.next_point(self.next_point(number))
                    self.assertGreater(self.cut(later), last)
            self.settled()
            for host in self.hosts.values():
                group = host.group()
                self.assertEqual((group["state"], group.get("notice")), ("mirroring", None), (host.name, group))

    def test_a_host(self):
        self.kill_and_start(["east2", "east3"])

    def test_the_master(self):
        self.kill_and_start([MASTER])

    def test_a_remote(self):
        self.kill_and_start(["west1", "west2"])

    def test_a_point_is_given_up_while_a_session_is_asked_for(self):
        """A new master gives up what may be half formed, at a host that is just connecting to its remote."""
        words, session = self.link(), self.link()
        self.several(start=False)
        self.wire(words, self.master, self.hosts["east2"])
        self.wire(session, self.hosts["east3"], self.remotes["west2"])
        for host in self.hosts.values():
            host.edit('interval = "0s"', 'interval = "0s"\nmax_coordination = "1s"')
        self.start_all()
        self.begin_chain()
        self.chain.expect_losses()
        for _ in range(2 * REPEAT):
            words.delay = 0.1  # so that points spend most of their time half formed; the next one does now
            time.sleep(0.3 + 0.3 * random.random())
            before = self.common()[-1]
            self.master.kill()
            self.remotes["west2"].kill()
            words.delay = 0
            session.stall()
            crossed = session.bytes
            self.remotes["west2"].start()
            wait_for(lambda: session.bytes > crossed, what="east3 asking for a session")
            self.master.start()
            until = time.monotonic() + 1
            while time.monotonic() < until and not self.master.group().get("notice"):
                pass  # it gives up a point, or drains on one that was formed, and then has nothing to say
            session.stall(False)
            with self.told():
                self.next_point(self.next_point(before))
        self.settled()

    def test_hosts_go_on_without_the_master(self):
        """Points do not, and the lag shows it."""
        hosts = ("east2", "east3")
        self.several()
        self.begin_chain(hosts)
        self.next_point(self.common()[-1])
        self.master.kill()
        self.progress()
        # What was under way at the remotes has ended.
        before, lags = self.common(), [self.hosts[host].group()["lag_seconds"] for host in hosts]
        self.progress(2000)
        wait_for(lambda: all(
            self.hosts[host].group()["lag_seconds"] > lag + 1 for host, lag in zip(hosts, lags)), what="a lag that grows")
        self.assertEqual(self.common(), before, "points need the master")
        self.chain.stop()
        self.assertLess(self.chain.longest, 1, "nobody is held")
        self.chain.start()
        self.master.start()
        last = self.cut(self.next_point(before[-1]), hosts)
        self.progress()
        number = self.next_point(self.next_point(self.common()[-1]))
        self.assertGreater(self.cut(number, hosts), last)
        self.chain.stop()
        number = self.master.cycle()
        wait_for(lambda: number in self.common(), what="the last point")
        self.assertEqual(self.cut(number, hosts), self.chain.acknowledged)


class InDoubt(SeveralHosts):
    """A remote that has prepared a point, and does not hear what became of it."""

    def prepared(self, remote="west1"):
        """The point that the remote has prepared, for each of its hosts, and that is not decided there; None if there is none."""
        found = set()
        hosts = [host for host in REMOTES if REMOTES[host] == remote]
        for host in hosts:
            # A remote of one host has no more than one pair.
            pair = f"shop@{host}" if len(hosts) > 1 else "shop"
            _, points = call(self.remotes[remote], "GET", f"/v1/groups/{pair}/points")
            found.add(next((point["id"] for point in points if point["state"] in ("prepared", "in doubt")), None))
        return found.pop() if len(found) == 1 else None

    def only_west1_prepares(self):
        """The master's word does not reach west2: returns the point that west1 has prepared and west2 has not."""
        self.way = self.link()
        self.several(start=False)
        self.wire(self.way, self.master, self.remotes["west2"])
        self.start_all()
        self.begin_chain()
        self.chain.expect_losses()
        self.next_point(self.common()[-1])
        return self.caught(self.way.stall, lambda: self.way.stall(False), lambda number: self.prepared("west2") is None)

    def west2_has_committed(self):
        """The master's word to west1 takes a while: returns the point that west2 has committed, and west1 only prepared."""
        self.way = self.link()
        self.several(start=False)
        self.wire(self.way, self.master, self.remotes["west1"])
        self.start_all()
        self.begin_chain()
        self.chain.expect_losses()
        self.next_point(self.common()[-1])
        self.way.delay = 0.3  # less than the time after which the master asks anew
        number = self.caught(lambda: self.cut_off_after(lambda: self.prepared() in self.committed("west2")), self.way.mend,
                             lambda number: number in self.committed("west2"))
        self.master.kill()
        return number

    def cut_off_after(self, condition):
        wait_for(condition, what="a commit at west2 alone")
        self.way.cut()

    def caught(self, begin, end, condition):
        """Begins something until it finds west1 with a prepared point of which the condition holds: returns that. What was under way
        at the moment may be another phase of a point, which then ends first."""
        for _ in range(20):
            begin()
            until = time.monotonic() + 2
            while time.monotonic() < until:
                number = self.prepared()
                if number and condition(number):
                    return number
            end()
            self.next_point(self.common()[-1])
        raise AssertionError("west1 was never left with a point that it has prepared")

    def refuses(self, number):
        """West1 does not decide alone."""
        done = self.remotes["west1"].farcopy("failover", "shop", check=False)
        self.assertEqual(done.returncode, 1, done)
        for words in (f"point {number} is in doubt", "'west2'", "cannot be reached", f"--alone {number}"):
            self.assertIn(words, done.stderr)
        self.assertEqual(self.remotes["west1"].group()["role"], "secondary")
        self.assertEqual(self.prepared(), number, "and nothing is decided")
        return done.stderr

    def test_what_another_remote_had_not_prepared_is_dropped(self):
        number = self.only_west1_prepares()
        self.master.kill()
        self.remotes["west2"].kill()
        words = self.refuses(number)
        newest = max(self.committed("west1"))
        self.assertIn(f"--alone {newest}", words)
        self.remotes["west2"].start()
        self.assertEqual(self.remotes["west1"].farcopy("failover", "shop").stderr, "")
        self.assertGreater(self.failed_over(newest), 0)

    def test_what_another_remote_has_committed_counts(self):
        number = self.west2_has_committed()
        self.remotes["west2"].kill()
        self.refuses(number)
        self.remotes["west2"].start()
        self.assertEqual(self.remotes["west1"].farcopy("failover", "shop").stderr, "")
        self.assertGreater(self.failed_over(number), 0)

    def test_the_other_remote_leads_to_what_it_has_committed(self):
        number = self.west2_has_committed()
        self.assertEqual(self.remotes["west2"].farcopy("failover", "shop").stderr, "")
        self.assertGreater(self.failed_over(number), 0)

    def test_the_other_remote_leads_back_from_what_it_has_not_prepared(self):
        number = self.only_west1_prepares()
        newest = max(self.committed("west2"))
        self.assertLess(newest, number)
        self.master.kill()
        self.assertEqual(self.remotes["west2"].farcopy("failover", "shop").stderr, "")
        self.assertGreater(self.failed_over(newest), 0)

    def test_an_operator_takes_the_point_alone(self):
        number = self.west2_has_committed()
        self.remotes["west2"].kill()
        self.refuses(number)
        west1 = self.remotes["west1"]
        report = json.loads(west1.farcopy("failover", "shop", "--alone", str(number), "--json").stdout)
        self.assertEqual(report["id"], number)
        self.assertEqual(west1.group()["state"], "failed-over")
        last = chains.check(self.images(hosts=("east1", "east2"), at=west1) + [None])
        self.assertGreater(last, 0)
        # The other one, which had committed it, goes to the same point when it is back.
        self.remotes["west2"].start()
        self.assertEqual(self.remotes["west2"].farcopy("failover", "shop").stderr, "")
        self.assertGreaterEqual(self.failed_over(number), last)

    def test_a_slip_of_the_operator_decides_nothing(self):
        number = self.west2_has_committed()
        west1, west2 = self.remotes["west1"], self.remotes["west2"]
        west2.kill()
        self.assertIn(f"no point {number + 1}", west1.farcopy("failover", "shop", "--alone", str(number + 1), check=False).stderr)
        self.refuses(number)
        west2.start()
        self.assertEqual(west1.farcopy("failover", "shop").stderr, "")
        self.assertGreater(self.failed_over(number), 0)

    def test_an_operator_drops_the_point_alone(self):
        number = self.only_west1_prepares()
        self.master.kill()
        self.remotes["west2"].kill()
        self.refuses(number)
        west1, newest = self.remotes["west1"], max(self.committed("west1"))
        cut = chains.check(self.images(f"@{newest}", ("east1", "east2"), at=west1) + [None])
        report = json.loads(west1.farcopy("failover", "shop", "--alone", str(newest), "--json").stdout)
        self.assertEqual(report["id"], newest)
        self.assertEqual(chains.check(self.images(hosts=("east1", "east2"), at=west1) + [None]), cut)
        self.remotes["west2"].start()
        self.assertEqual(self.remotes["west2"].farcopy("failover", "shop").stderr, "")
        self.assertGreaterEqual(self.failed_over(newest), cut)

    def test_master_and_remote_die_while_a_point_is_prepared(self):
        """At random moments, whatever the decision was by then."""
        self.several()
        self.begin_chain()
        self.chain.expect_losses()
        # A point with writes in it is there.
        self.progress(50)
        self.next_point(self.common()[-1] + 1)
        west2 = self.remotes["west2"]
        for _ in range(2):
            time.sleep(random.random() * 0.2)
            self.master.kill()
            west2.kill()
            number = self.prepared()
            if number:
                break
            before = max(self.committed("west1"))
            west2.start()
            self.master.start()
            self.next_point(before)
        else:
            number = self.stopped_at_a_prepared_point()
            self.master.kill()
            west2.kill()
            self.assertEqual(self.prepared(), number)
        with self.told(number=number):
            self.refuses(number)
            newest = max(self.committed("west1"))
            west2.start()
            self.assertEqual(self.remotes["west1"].farcopy("failover", "shop").stderr, "")
            group = json.loads(self.remotes["west1"].farcopy("failover", "shop", "--json").stdout)
            self.assertIn(group["id"], (number, newest))
            self.assertGreater(self.failed_over(group["id"]), 0)

    def stopped_at_a_prepared_point(self):
        """The master stands still, and west1 has prepared a point."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            time.sleep(random.random() * 0.1)
            self.master.process.send_signal(signal.SIGSTOP)
            number = self.prepared()
            if number:
                time.sleep(0.1)  # what the master has said before arrives
                if self.prepared() == number:
                    return number
            self.master.process.send_signal(signal.SIGCONT)
        raise AssertionError("no point was seen prepared")

    def test_a_session_waits_while_a_point_is_prepared(self):
        """Data of the next point would be in it. It goes on by itself when the point is decided."""
        number = self.only_west1_prepares()
        self.master.kill()
        host = self.hosts["east2"]
        host.kill()
        host.start()
        wait_for(lambda: "not decided" in (host.group().get("reason") or ""), what="the refusal of its session")
        self.assertIn(f"'west1' has prepared point {number}", host.group()["reason"])
        self.assertEqual(self.prepared(), number)
        self.way.stall(False)
        self.master.start()
        later = self.next_point(number)
        last = self.cut(later)
        self.progress()
        self.assertGreater(self.cut(self.next_point(self.next_point(later))), last)
        self.settled()
        self.assertEqual(host.group()["state"], "mirroring")


class ControlPath(SeveralHosts):
    """What sites ask of each other goes through a link."""

    def linked(self, coordination, **link):
        self.way = self.link(**link)
        self.several(options=f'max_coordination = "{coordination}"', start=False)
        for here in self.all.values():
            for there in self.all.values():
                # Hosts know every site, remotes their hosts and each other.
                if here is not there and (here.name in self.hosts or there.name in self.remotes or REMOTES[there.name] == here.name):
                    self.wire(self.way, here, there)

    def test_points_form_over_a_slow_path(self):
        self.linked("200ms", delay=0.02)
        self.start_all()
        self.begin_chain()
        number, cuts = 0, []
        for _ in range(4):
            number = self.next_point(number)
            cuts.append(self.cut(number))
            self.progress(50)
        self.assertEqual(cuts, sorted(set(cuts)))
        self.settled()
        self.assertLess(self.chain.longest, 1)

    def test_points_are_given_up_over_a_path_slower_than_the_bound(self):
        self.linked("10ms")
        self.start_all()
        self.begin_chain()
        self.next_point(self.common()[-1])
        self.way.delay = 0.02
        wait_for(lambda: "given up" in (self.master.group().get("notice") or ""), what="the notice")
        notice = self.master.group()["notice"]
        self.assertRegex(notice, r"point \d+ was given up: .*(had not formed in time|at the deadline|let go by itself)")
        before = self.common()[-1]
        self.progress()
        wait_for(lambda: f"point {before}" not in notice and self.master.group()["lag_seconds"] > 2, what="a lag")
        self.assertEqual(self.common()[-1], before, "none is formed")
        self.way.delay = 0
        number = self.next_point(before)
        self.assertGreater(self.cut(number), 0)
        self.settled()
        self.assertIsNone(self.master.group().get("notice"))
        self.assertLess(self.chain.longest, 1, "hosts are let go at the bound")

    def test_connections_are_reset_at_random(self):
        self.linked("200ms")
        self.start_all()
        self.begin_chain()
        end = time.monotonic() + 3
        while time.monotonic() < end:
            time.sleep(random.random() * 0.05)
            self.way.cut()
            time.sleep(random.random() * 0.02)
            self.way.mend()
            self.common()
        self.assertLess(self.chain.longest, 1)
        before = self.common()[-1]
        number = self.next_point(before, 30)
        last = self.cut(number)
        self.progress()
        self.assertGreater(self.cut(self.next_point(self.next_point(number))), last)
        self.settled()
        for host in self.hosts.values():
            group = host.group()
            self.assertEqual((group["state"], group.get("notice")), ("mirroring", None), (host.name, group))


class Claims(SeveralHosts):
    """Whose a volume of a remote is, the first host that names it says."""

    def two_hosts_of_one_volume(self):
        self.several(start=False)
        west1, east1, east2 = self.remotes["west1"], self.hosts["east1"], self.hosts["east2"]
        east2.edit('volumes = ["v-east2"]', 'volumes = ["v-east1"]')
        east2.edit("[volumes.v-east2]", "[volumes.v-east1]")
        return west1, east1, east2

    def refused(self, second):
        words = "volume 'v-east1' of group 'shop' at 'west1' is mirrored by 'east1', and 'east2' has it too"
        wait_for(lambda: words in (second.group().get("reason") or ""), what="the refusal")
        self.assertEqual(second.group()["state"], "suspended")

    def test_a_volume_is_one_hosts(self):
        west1, east1, east2 = self.two_hosts_of_one_volume()
        west1.start()
        east1.start()
        wait_for(lambda: "'east1' mirrors v-east1 here" in west1.farcopy("events").stdout, what="the claim")
        east2.start()
        self.refused(east2)
        self.assertNotIn("'east2' mirrors", west1.farcopy("events").stdout)
        self.assertNotEqual(east1.group()["state"], "suspended")

    def test_claims_outlast_a_restart(self):
        west1, east1, east2 = self.two_hosts_of_one_volume()
        west1.start()
        east1.start()
        wait_for(lambda: "'east1' mirrors v-east1 here" in west1.farcopy("events").stdout, what="the claim")
        east1.kill()
        west1.kill()
        west1.start()
        east2.start()  # while the first one is away
        self.refused(east2)
        east2.kill()
        east1.start()
        wait_for(lambda: east1.group()["state"] in ("copying", "mirroring"), what="east1's session")
        self.assertNotIn("mirrors v-east1 here", west1.farcopy("events").stdout, "it is its own already")

    def test_a_remote_that_restarts_goes_on_with_the_same_volumes(self):
        self.several()
        self.begin_chain()
        before = self.next_point()
        west1 = self.remotes["west1"]
        west1.stop()
        west1.start()
        number = self.next_point(before)
        self.assertGreater(self.cut(number), 0)
        self.assertEqual(sorted(west1.group()["volumes"]), ["v-east1", "v-east2"])
        self.assertNotIn("mirrors v-east", west1.farcopy("events").stdout, "nobody claims anew")
        self.settled()


class Configuration(SiteTest):
    """What a group of several hosts and remotes says wrongly is told with the line of its section, or of the key."""

    HOST = {"role": '"primary"', "peer": '"west1"', "hosts": '["east1", "east2"]', "remotes": '["west1", "west2"]'}
    REMOTE = {"role": '"secondary"', "peers": '["east1", "east2"]', "remotes": '["west1", "west2"]'}

    def group_errors(self, site, basis, peers, cases):
        for changes, expected in cases:
            group = {"volumes": '["disk"]', "mode": '"global-mirror"', **basis, **changes}
            lines = "".join(f"{key} = {value}\n" for key, value in group.items() if value is not None)
            with self.subTest(changes=changes):
                self.refused(expected, site, peers, f"[groups.shop]\n{lines}")

    def refused(self, expected, name, peers, groups):
        site = self.site(name, {"disk": "1MiB"}, start=False, peers=peers, groups=groups)
        try:
            site.start()
        except AssertionError as error:
            self.assertEqual(site.process.returncode, 1, error)
            self.assertRegex(str(error), r"site\.toml:\d+: ")
            self.assertIn(expected, str(error))
        else:
            self.fail(f"accepted, where '{expected}' should be said")
        finally:
            self.put_away(site)

    def accepted(self, site, basis, peers):
        lines = "".join(f"{key} = {value}\n" for key, value in {"volumes": '["disk"]', "mode": '"global-mirror"', **basis}.items())
        self.put_away(self.site(site, {"disk": "1MiB"}, peers=peers, groups=f"[groups.shop]\n{lines}"))

    def test_a_hosts(self):
        peers = ["east2", "west1", "west2"]
        self.accepted("east1", {**self.HOST, "master": '"east2"', "max_coordination": '"1s"'}, peers)
        many = json.dumps([f"east{number}" for number in range(1, 18)])
        other = {"mode": '"flashcopy"', "hosts": None, "remotes": None}
        self.group_errors("east1", self.HOST, peers, [
            ({**other, "peers": '["west1"]'}, 'groups.shop.peers is for groups with mode = "global-mirror" or "change-volume"'),
            ({**other, "hosts": '["east1", "east2"]'}, 'groups.shop.hosts is for groups with mode = "global-mirror" or "change-volume"'),
            ({**other, "remotes": '["west1"]'}, 'groups.shop.remotes is for groups with mode = "global-mirror" or "change-volume"'),
            ({**other, "master": '"east1"'}, 'groups.shop.master is for groups with mode = "global-mirror" or "change-volume"'),
            ({**other, "max_coordination": '"50ms"'}, 'groups.shop.max_coordination is for groups with mode = "global-mirror" or "change-volume"'),
            ({"peers": '["west1"]', "peer": None},
             "groups.shop.peers is for remotes; a host has one 'peer', the remote that its volumes go to"),
            ({"peers": '["west1"]'}, "groups.shop.peers is for remotes; a host has one 'peer', the remote that its volumes go to"),
            ({"remotes": '["west2"]'}, "groups.shop.remotes must name 'west1', the peer of this site, as well"),
            ({"hosts": None}, "groups.shop.remotes are several, so 'hosts' must be there: each host has one remote"),
            ({"hosts": None, "remotes": None, "master": '"east1"'}, "groups.shop.master is for groups with several 'hosts'"),
            ({"hosts": None, "remotes": None, "max_coordination": '"50ms"'},
             "groups.shop.max_coordination is for groups with several 'hosts'"),
            ({"hosts": '["east2", "east3"]'}, "groups.shop.hosts must name 'east1', this site, as well"),
            ({"hosts": "[]"}, "groups.shop.hosts must name 1 to 16 sites, each once"),
            ({"hosts": '["east1", "east1"]'}, "groups.shop.hosts must name 1 to 16 sites, each once"),
            ({"hosts": many}, "groups.shop.hosts must name 1 to 16 sites, each once"),
            ({"hosts": '"east1"'}, "groups.shop.hosts must be a list of strings"),
            ({"hosts": "[1, 2]"}, "groups.shop.hosts must be a list of strings"),
            ({"remotes": '["west1", "west1"]'}, "groups.shop.remotes must name 1 to 16 sites, each once"),
            ({"remotes": "[]"}, "groups.shop.remotes must name 1 to 16 sites, each once"),
            ({"master": '"east3"'}, "groups.shop.master is 'east3', which is none of 'hosts'"),
            ({"master": '["east1"]'}, "groups.shop.master must be a string"),
            ({"max_coordination": '"2s"'}, "groups.shop.max_coordination is '2s'; write a time from \"0.001s\" to \"1.0s\""),
            ({"max_coordination": '"0s"'}, "groups.shop.max_coordination is '0s'; write a time from \"0.001s\" to \"1.0s\""),
            ({"max_coordination": '"soon"'}, "groups.shop.max_coordination is 'soon'; write a time from"),
        ])

    def test_a_hosts_others(self):
        self.group_errors("east1", self.HOST, ["west1", "west2"], [({}, "group 'shop': there is no [peers.east2]")])

    def test_keys_of_several_hosts_where_there_is_one(self):
        """What would be of no effect is told."""
        peers = ["west1", "west2"]
        alone = {"hosts": '["east1"]'}
        self.group_errors("east1", self.HOST, peers, [
            ({**alone, "remotes": '["west1"]', "max_coordination": '"50ms"'},
             "groups.shop.max_coordination is for groups with several 'hosts'"),
            ({**alone, "remotes": '["west1"]', "master": '"nobody"'}, "groups.shop.master is"),
            (alone, "groups.shop.remotes are several"),
        ])

    def test_a_remotes(self):
        peers = ["east1", "east2", "west2"]
        self.accepted("west1", self.REMOTE, peers)
        self.group_errors("west1", self.REMOTE, peers, [
            ({"mode": '"flashcopy"', "remotes": None}, 'groups.shop.peers is for groups with mode = "global-mirror" or "change-volume"'),
            ({"hosts": '["east1", "east2"]'}, "groups.shop.hosts is for hosts; this site's role is 'secondary'"),
            ({"master": '"east1"'}, "groups.shop.master is for hosts; this site's role is 'secondary'"),
            ({"max_coordination": '"50ms"'}, "groups.shop.max_coordination is for hosts; this site's role is 'secondary'"),
            ({"peer": '"east1"'}, "groups.shop.peer and 'peers' say the same; leave one of them out"),
            ({"remotes": '["west2"]'}, "groups.shop.remotes must name 'west1', this site, as well"),
            ({"remotes": '["west1", "west1"]'}, "groups.shop.remotes must name 1 to 16 sites, each once"),
            ({"peers": "[]"}, "groups.shop.peers must name 1 to 16 sites, each once"),
            ({"peers": '["east1", "east1"]'}, "groups.shop.peers must name 1 to 16 sites, each once"),
            ({"peers": '["east1", "east9"]'}, "there is no [peers.east9]"),
            ({"remotes": '["west1", "west9"]'}, "there is no [peers.west9]"),
        ])

    def test_sites_without_a_control_api(self):
        """A coordinator, and a remote in doubt, must be able to ask."""
        self.refused(
            "group 'shop': peers.east2 needs 'control', since the group has several hosts or remotes", "east1", ["west1", "west2"],
            '[peers.east2]\nnbd = "unix:/tmp/none"\n[groups.shop]\nvolumes = ["disk"]\nmode = "global-mirror"\nrole = "primary"\n'
            'peer = "west1"\nhosts = ["east1", "east2"]\nremotes = ["west1", "west2"]\n')
