"""What a review of `master = "etcd"` has found: masters that die, stall or come back at bad moments, and an etcd in which stands what no
master has written, or nothing any more.

The sites are those of `test_elections`, with a real etcd."""

import contextlib
import os
import random
import shutil
import signal
import socket
import threading
import time

import test_elections
import test_several_hosts
import test_several_reviewed
from sites import run, wait_for
from test_several_hosts import REMOTES, SeveralHosts

RECORD = "farcopy/shop/record"


class Gate(test_elections.Proxy):
    """Passes connections on while it is open."""

    def close(self):
        self.takes = False
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def open(self):
        self.takes = True


class StallingProxy(test_elections.Proxy):
    """Passes on; once it stalls, of every answer only the head and a little of the body."""

    stalls = False

    def __init__(self, port):
        self.over = threading.Event()
        super().__init__(port)

    def answer(self, source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self.stalls:
                    head = data.find(b"\r\n\r\n")
                    if head >= 0:
                        sink.sendall(data[:head + 8])
                    self.over.wait()  # the rest never comes
                    return
                sink.sendall(data)

    def cut(self):
        self.over.set()
        super().cut()


class Elected(SeveralHosts):
    """Hosts elect their master; what `test_elections` has for it, without its tests."""

    elect = test_elections.Elections.elect
    masters = test_elections.Elections.masters

    def through(self, kind, hosts):
        """The endpoints of hosts that reach etcd through a proxy of this kind each: `self.proxies`."""
        self.proxies = {}

        def url(name):
            self.proxies[name] = proxy = kind(self.etcd.client)
            self.addCleanup(proxy.cut)
            return proxy.url
        return {name: lambda name=name: url(name) for name in hosts}


class GoesOn(Elected):
    """Points go on without a host that is lost: those of west1 are the points of the pair of `self.pair`."""

    pair = "east1"

    def several(self, options="", **more):
        super().several(f'{options}\non_host_lost = "go-on"', **more)

    committed = test_several_reviewed.GoesOn.committed

    def points_go_on(self, remote, what, seconds=40):
        began, before = time.monotonic(), max(self.committed(remote))
        with self.told(masters=self.masters(), before=before, what=what):
            wait_for(lambda: max(self.committed(remote)) > before + 2, seconds, what=what)
        print(f"  {what}: after {time.monotonic() - began:.1f} s")


class LostMasters(GoesOn):
    def test_points_go_on_without_a_master_that_is_killed(self):
        self.elect()
        self.start_all()
        name = self.masters()[-1][1]
        if name == "east1":
            self.pair = "east2"
        others = [host for host in self.hosts if host != name]
        self.begin_chain(others)
        self.chain.expect_losses()
        self.next_point(self.common()[-1] + 1)
        handle = self.hosts[name].connect(f"v-{name}")
        handle.pwrite(b"1" * (1 << 20), 0)
        handle.shutdown()
        time.sleep(random.random() * 0.2)
        self.hosts[name].kill()
        self.points_go_on("west1", f"points without {name}, the master")
        self.chain.stop()


class Returns(GoesOn):
    pair = "east2"

    def test_points_go_on_under_a_host_that_comes_back_and_is_elected(self):
        """East1 is cut off from hosts and etcd in the middle of a point, and the others go on without it."""
        self.elect(self.through(Gate, REMOTES))
        way = self.link()
        for name in ("east2", "east3"):
            self.wire(way, self.hosts[name], self.hosts["east1"])
        self.start_all()
        self.begin_chain()
        self.chain.expect_losses()
        self.next_point(self.common()[-1] + 1)
        time.sleep(random.random() * 0.3)
        self.proxies["east1"].close()
        way.cut()
        self.points_go_on("west2", "points without east1")
        way.mend()
        before = len(self.masters())
        self.proxies["east3"].close()
        if self.masters()[-1][1] == "east2":
            self.hosts["east2"].kill()
        else:
            self.proxies["east2"].close()
        self.proxies["east1"].open()
        wait_for(lambda: len(self.masters()) > before and self.masters()[-1][1] == "east1", 30, what="east1 is elected")
        self.chain.stop()
        self.begin_chain(["east3"])
        self.chain.expect_losses()
        self.points_go_on("west2", "points under east1")
        self.chain.stop()


class ForeignRecords(Elected):
    """Under the record's key stands what no master has written."""

    def etcdctl(self, *words):
        return run("etcdctl", "--endpoints", self.etcd.url, *words, env={**os.environ, "ETCDCTL_API": "3"}).stdout

    def assert_alive(self):
        for site in self.all.values():
            self.assertIsNone(site.process.poll(), f"{site.name} has ended\n{site.tail()}")

    def is_told_and_gone_on_after(self, record):
        def notices():
            self.assert_alive()
            return [host.group().get("notice") or "" for host in self.hosts.values()]

        self.elect()
        self.start_all()
        self.begin_chain()
        self.next_point()
        # No point is under way, so that no remote has prepared one that nobody knows of when the key is gone.
        self.chain.stop()
        number = self.hosts[self.masters()[-1][1]].cycle()
        wait_for(lambda: number in self.common(), what=f"point {number} at all remotes")
        self.etcdctl("put", RECORD, record)
        self.chain.start()
        with self.told(record=record):
            wait_for(lambda: any(RECORD in notice for notice in notices()), what="a notice with the key")
            time.sleep(3)  # for each of the hosts to have tried
            self.assert_alive()
            before = max(map(max, map(self.committed, self.remotes)))
            self.etcdctl("del", RECORD)
            number = self.next_point(before + 1, 40)
            self.assertGreater(self.cut(number), 0)
            self.assert_alive()
        self.chain.stop()

    def test_a_record_with_more_committed_than_counted(self):
        self.is_told_and_gone_on_after('{"epoch":5,"lastNumber":100000,"point":"none","committed":200000}')

    def test_a_record_with_the_highest_number_of_all(self):
        self.is_told_and_gone_on_after('{"epoch":5,"lastNumber":18446744073709551615,"point":"none","committed":1}')

    def test_a_record_with_the_highest_epoch_of_all(self):
        self.is_told_and_gone_on_after('{"epoch":18446744073709551615,"lastNumber":100000,"point":"none","committed":1}')

    def test_a_record_of_pairs_that_are_not_there(self):
        self.is_told_and_gone_on_after(
            '{"epoch":5,"lastNumber":100000,"point":"formed","committed":1,"names":["x"],"absent":[0,1,2,77],"left":{"9":3}}')

    def test_a_record_that_is_none(self):
        self.is_told_and_gone_on_after("garbage")


class Stalls(Elected):
    def test_a_master_whose_etcd_begins_to_answer_and_does_not_end_is_followed_and_stops(self):
        self.elect(self.through(StallingProxy, REMOTES))
        self.start_all()
        self.begin_chain()
        self.chain.expect_losses()
        self.next_point()
        name = self.masters()[-1][1]
        self.proxies[name].stalls = True
        with self.told(name=name):
            wait_for(lambda: self.masters()[-1][1] != name, 30, what="another host is elected")
            self.cut(self.next_point(self.common()[-1] + 2, 40))
            process, began = self.hosts[name].process, time.monotonic()
            process.send_signal(signal.SIGTERM)
            wait_for(lambda: process.poll() is not None, 20, what=f"{name} stops")
        print(f"  stopped in {time.monotonic() - began:.1f} s")
        self.chain.stop()


class EmptyEtcd(Elected):
    prepared = test_several_hosts.InDoubt.prepared
    caught = test_several_hosts.InDoubt.caught
    cut_off_after = test_several_hosts.InDoubt.cut_off_after

    def test_remotes_fail_over_to_one_point_after_etcd_has_lost_a_decision(self):
        """West1 has prepared a point, west2 has committed it, and the host that is elected next has been started again."""
        self.way = self.link()
        self.elect(self.through(test_elections.Proxy, ("east1", "east2")))
        for host in self.hosts.values():
            self.wire(self.way, host, self.remotes["west1"])
        self.start_all()
        self.begin_chain()
        self.chain.expect_losses()
        self.next_point(self.common()[-1])
        self.way.delay = 0.3  # less than the time after which the master asks anew
        number = self.caught(lambda: self.cut_off_after(lambda: self.prepared() in self.committed("west2")), self.way.mend,
                             lambda number: number in self.committed("west2"))
        self.etcd.kill()
        for proxy in self.proxies.values():
            proxy.cut()
        shutil.rmtree(self.etcd.directory)
        self.hosts["east3"].kill()
        self.etcd.start()
        self.hosts["east3"].start()
        with self.told(number=number):
            wait_for(lambda: self.masters()[-1][1] == "east3", 20, what="the election of east3")
            self.way.delay = 0
            self.way.mend()
            time.sleep(8)  # for it to decide what it knows nothing of
            for host in self.hosts.values():
                host.kill()
            self.chain.stop()
            self.assertEqual(self.remotes["west1"].farcopy("failover", "shop").stderr, "", "the other remote has followed")
            self.assertGreater(self.failed_over(), 0)
