"""What a review of groups over several hosts and several remotes has found: a master that has lost its disk, pairs without a part in a point, a
remote that fails over by itself, a host that stands still, and a second practice.

The hosts, remotes and the chain are those of `test_several_hosts`, but for hosts that are lost: with `on_host_lost = "go-on"` points go on
without them, and the chain goes over the others."""

import json
import os
import shutil
import signal
import time

import nbd

import chains
import test_several_hosts
from control import call
from sites import read_handle, wait_for
from test_several_hosts import SeveralHosts

GO_ON = 'on_host_lost = "go-on"'


class GoesOn(SeveralHosts):
    """Points go on without a host that is lost: those of west1 are the points of the pair of `self.pair`."""

    pair = "east1"

    def committed(self, remote):
        status, points = call(self.remotes[remote], "GET", f"/v1/groups/{f'shop@{self.pair}' if remote == 'west1' else 'shop'}/points")
        self.assertEqual(status, 200, points)
        return {point["id"] for point in points if point["state"] == "committed"}


class WithoutTheMastersDisk(SeveralHosts):
    caught = test_several_hosts.InDoubt.caught
    cut_off_after = test_several_hosts.InDoubt.cut_off_after

    def prepared(self, remote="west2"):
        return test_several_hosts.InDoubt.prepared(self, remote)

    def west1_has_committed(self):
        """The master's word to west2 takes a while: returns the point that west1 has committed, and west2 only prepared. The master is
        gone."""
        self.way = self.link()
        self.several(start=False)
        self.wire(self.way, self.master, self.remotes["west2"])
        self.start_all()
        self.begin_chain()
        self.chain.expect_losses()
        self.next_point(self.common()[-1] + 1)
        self.way.delay = 0.3  # less than the time after which the master asks anew
        number = self.caught(lambda: self.cut_off_after(lambda: self.prepared() in self.committed("west1")), self.way.mend,
                             lambda number: number in self.committed("west1"))
        self.master.kill()
        return number

    def test_a_point_that_is_decided_after_the_masters_disk_was_replaced_has_nothing_newer(self):
        """The master is paired anew while west2 has prepared a point that west1 has committed; meanwhile east3 writes on."""
        number = self.west1_has_committed()
        self.chain.stop()
        west1, west2 = self.remotes["west1"], self.remotes["west2"]
        shutil.rmtree(self.master.state)
        os.unlink(self.master.image("v-east1"))
        self.master.start()
        self.way.delay = 0
        self.way.mend()
        wait_for(lambda: "belongs to another" in (self.master.group().get("reason") or ""), what="the refusal")
        west1.stop()
        shutil.rmtree(os.path.join(west1.state, "groups", "shop@east1"))
        west1.start()
        self.master.farcopy("resume", "shop")
        newer = b"\xee" * 4096
        handle = self.hosts["east3"].connect("v-east3")
        handle.pwrite(newer * chains.BLOCKS, 0)
        handle.shutdown()
        time.sleep(8)  # for what should not happen
        with self.told(number=number):
            west2.farcopy("abort", "cycle:shop")
            wait_for(lambda: number in self.committed("west2"), what=f"point {number} at west2")
            images = []
            for remote, host in ((west1, "east2"), (west2, "east3")):
                handle = remote.connect(f"v-{host}@{number}")
                images.append(read_handle(handle))
                handle.shutdown()
            blocks = range(0, chains.BLOCKS * chains.BLOCK, chains.BLOCK)
            self.assertEqual(sum(images[1][at:at + chains.BLOCK] == newer for at in blocks), 0, "blocks that were written after the point")
            self.assertGreater(chains.check([None, *images]), 0)


class LeftOutHost(GoesOn):
    """East2 is lost, and its pair at west1 has no part in a point that west2 has committed, and west1 only prepared."""

    caught = test_several_hosts.InDoubt.caught
    cut_off_after = test_several_hosts.InDoubt.cut_off_after

    def prepared(self):
        _, points = call(self.remotes["west1"], "GET", "/v1/groups/shop@east1/points")
        return next((point["id"] for point in points if point["state"] in ("prepared", "in doubt")), None)

    def west2_has_committed(self):
        """Returns the point. All hosts are gone."""
        def goes_on_without():
            notice = self.master.group().get("notice") or ""
            return "'east2'" in notice and "without" in notice

        self.way = self.link()
        self.several(GO_ON, start=False)
        self.wire(self.way, self.master, self.remotes["west1"])
        self.start_all()
        self.begin_chain(("east1", "east3"))
        self.chain.expect_losses()
        self.next_point(self.common()[-1])
        self.hosts["east2"].kill()
        wait_for(goes_on_without, what="points without east2")
        self.next_point(self.common()[-1] + 1)
        self.way.delay = 0.3  # less than the time after which the master asks anew
        number = self.caught(lambda: self.cut_off_after(lambda: self.prepared() in self.committed("west2")), self.way.mend,
                             lambda number: number in self.committed("west2"))
        for host in self.hosts.values():
            if host.process:
                host.kill()
        self.chain.stop()
        return number

    def refused_then_followed(self, number):
        """West2 does not answer, and then it does."""
        west1, west2 = self.remotes["west1"], self.remotes["west2"]
        with self.told(number=number):
            done = west1.farcopy("failover", "shop", check=False)
            self.assertEqual(done.returncode, 1, done)
            for words in (f"point {number}", "in doubt", "'west2'"):
                self.assertIn(words, done.stderr)
            self.assertEqual(west1.group()["role"], "secondary")
            west2.start()
            for remote in (west1, west2):
                done = remote.farcopy("failover", "shop", "--json")
                self.assertEqual(done.stderr, "", "the other remote is there as well")
                self.assertEqual((remote.group()["role"], remote.group()["state"]), ("primary", "failed-over"))
            self.assertEqual(json.loads(done.stdout)["id"], number)
            self.assertIn(f"\tshop@east1\tfailed over to point {number}\n", west1.farcopy("events").stdout)
            self.assertGreater(chains.check(self.images(hosts=("east1", "east3"))), 0)

    def test_a_pair_without_a_part_in_a_point_does_not_speak_for_a_remote_that_is_silent(self):
        number = self.west2_has_committed()
        self.remotes["west2"].kill()
        self.refused_then_followed(number)

    def test_a_pair_without_a_part_in_a_point_does_not_speak_for_a_remote_that_has_failed_over(self):
        number = self.west2_has_committed()
        west1, west2 = self.remotes["west1"], self.remotes["west2"]
        west1.kill()
        done = west2.farcopy("failover", "shop", "--json", check=False)
        self.assertEqual((done.returncode, json.loads(done.stdout)["id"]), (3, number), done)
        west2.kill()
        west1.start()
        self.refused_then_followed(number)


class OneRemoteFailsOver(GoesOn):
    def test_no_points_go_on_without_a_host_whose_remote_has_failed_over(self):
        """West2 fails over while it cannot reach west1. Its host is not lost, and what the others commit could not be failed over to."""
        way = self.link()
        self.several(GO_ON, start=False)
        west1, west2 = self.remotes["west1"], self.remotes["west2"]
        self.wire(way, west2, west1)
        self.start_all()
        self.begin_chain()
        self.progress(200)
        self.settled()
        way.cut()
        done = west2.farcopy("failover", "shop", "--json", check=False)
        self.assertEqual(done.returncode, 3, done)
        number = json.loads(done.stdout)["id"]
        way.mend()
        handle = self.hosts["east1"].connect("v-east1")
        end, written = time.monotonic() + 6, 0
        while time.monotonic() < end:
            try:
                handle.pwrite(bytes([written % 250 + 1]) * 4096, 3 << 20)
                written += 1
            except nbd.Error as error:
                self.fail(f"east1, whose remote has not failed over, goes on: {error}")
            time.sleep(0.05)
        handle.shutdown()
        with self.told(number=number):
            self.assertLessEqual(max(self.committed("west1")), number, "no point is committed that west2 cannot have")
            self.assertIn("its remote has failed over", self.master.group().get("notice") or "")
            for remote in (west1, west2):
                done = remote.farcopy("failover", "shop", "--json")
                self.assertEqual((json.loads(done.stdout)["id"], done.stderr), (number, ""), remote.name)


class StandsStill(GoesOn):
    def test_a_host_that_stands_still_is_gone_on_without(self):
        """It does not refuse connections, as one whose process has ended does."""
        self.several(GO_ON)
        self.begin_chain(("east1", "east2"))
        self.chain.expect_losses()
        self.next_point(self.common()[-1] + 1)
        host = self.hosts["east3"]
        handle = host.connect("v-east3")
        handle.pwrite(b"1" * (1 << 20), 0)
        handle.shutdown()
        host.process.send_signal(signal.SIGSTOP)
        try:
            began, before = time.monotonic(), max(self.committed("west1"))
            with self.told(before=before):
                wait_for(lambda: max(self.committed("west1")) > before + 2, 30, what="points without east3")
            print(f"  after {time.monotonic() - began:.1f} s, the longest write took {self.chain.longest:.3f} s")
        finally:
            host.process.send_signal(signal.SIGCONT)
        self.chain.stop()
        self.assertLess(self.chain.longest, 2)


class Practice(SeveralHosts):
    def test_a_second_practice_is_refused_and_leaves_the_first_alone(self):
        self.several()
        self.begin_chain()
        self.progress(100)
        self.chain.stop()
        self.master.cycle()
        west1, west2 = self.remotes["west1"], self.remotes["west2"]
        west1.farcopy("practice", "shop")
        work = b"written while practising".ljust(4096, b"x")
        handles = {host: remote.connect(f"v-{host}@practice") for host, remote in (("east1", west1), ("east3", west2))}
        for handle in handles.values():
            handle.pwrite(work, 0)
            handle.shutdown()
        for remote in (west2, west1):
            done = remote.farcopy("practice", "shop", check=False)
            self.assertEqual(done.returncode, 1, done)
            self.assertIn("practi", done.stderr)
        for host, remote in (("east1", west1), ("east3", west2)):
            handle = remote.connect(f"v-{host}@practice")
            self.assertEqual(bytes(handle.pread(4096, 0)), work, host)
            handle.shutdown()
