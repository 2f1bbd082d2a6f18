"""Roles of a group over several hosts: all pairs change theirs together, at one point; and hosts that are lost, left out, and taken out.

The hosts, remotes and the chain are those of `test_several_hosts`."""

import json
import os

import chains
from sites import read_handle, wait_for
from test_several_hosts import REMOTES, SeveralHosts


class SeveralRoles(SeveralHosts):
    def chain_at(self, sites):
        """The chain goes on over the same volumes at other sites."""
        before = self.chain.acknowledged if self.chain else 0
        self.chain = chains.Chain([sites[host] for host in REMOTES], [f"v-{host}" for host in REMOTES])
        self.chain.acknowledged = before
        self.chain.start()

    def at_remotes(self):
        return {host: self.remotes[remote] for host, remote in REMOTES.items()}

    def cut_at(self, sites, suffix=""):
        images = []
        for host in REMOTES:
            handle = sites[host].connect(f"v-{host}{suffix}")
            images.append(read_handle(handle))
            handle.shutdown()
        return chains.check(images)

    def roles(self, hosts, remotes):
        for site in self.hosts.values():
            self.assertEqual(site.group()["role"], hosts, site.name)
        for site in self.remotes.values():
            self.assertEqual(site.group()["role"], remotes, site.name)

    def test_a_switchover_and_back_lose_nothing_anywhere(self):
        self.several()
        self.begin_chain()
        self.progress()
        self.chain.stop()
        self.hosts["east2"].farcopy("switchover", "shop")
        self.roles("secondary", "primary")
        self.assertEqual(self.cut_at(self.at_remotes()), self.chain.acknowledged)
        self.chain_at(self.at_remotes())
        self.progress()
        # Points are closed cuts in the other direction as well.
        self.remotes["west2"].farcopy("cycle", "shop", "--wait")

        def common():
            return set.intersection(*({point["id"] for point in host.points()} for host in self.hosts.values()))
        number = max(common())
        self.assertGreater(self.cut_at(self.hosts, f"@{number}"), 0)
        self.chain.stop()
        self.remotes["west1"].farcopy("switchover", "shop")
        self.roles("primary", "secondary")
        self.assertEqual(self.cut_at(self.hosts), self.chain.acknowledged)
        self.chain_at(self.hosts)
        self.progress()
        self.settled()

    def test_pairs_that_a_switchover_has_left_behind_follow_alone(self):
        self.several()
        self.begin_chain()
        self.progress()
        self.chain.stop()
        # As if a host had died in the last step: one pair has not exchanged its roles with the others.
        for host in ("east1", "east2"):
            self.hosts[host].farcopy("switchover", "shop", "--alone")
        self.assertEqual([site.group()["role"] for site in self.hosts.values()], ["secondary", "secondary", "primary"])
        refused = self.hosts["east3"].farcopy("switchover", "shop", check=False)
        self.assertEqual(refused.returncode, 1, refused.stdout)
        self.hosts["east3"].farcopy("switchover", "shop", "--alone")
        self.roles("secondary", "primary")
        self.assertEqual(self.cut_at(self.at_remotes()), self.chain.acknowledged)
        self.chain_at(self.at_remotes())
        self.progress()
        self.chain.stop()
        self.remotes["west1"].farcopy("cycle", "shop", "--wait")

    def failed_over_and_hosts_are_back(self):
        """All hosts were lost, all remotes have failed over: returns the last write there."""
        self.several()
        self.begin_chain()
        self.next_point(3)
        self.chain.expect_losses()
        for host in self.hosts.values():
            host.kill()
        self.chain.stop()
        self.remotes["west2"].farcopy("failover", "shop")
        last = self.failed_over()
        for host in self.hosts.values():
            host.start()
        return last

    def test_a_failback_after_a_failover_of_all(self):
        last = self.failed_over_and_hosts_are_back()
        preview = json.loads(self.remotes["west1"].farcopy("failback", "shop", "--preview", "--json").stdout)
        self.assertEqual((preview["from"], preview["to"]), ("west1, west2", "east1, east2, east3"))
        self.remotes["west1"].farcopy("failback", "shop", "--yes")
        self.roles("primary", "secondary")
        self.assertEqual(self.cut_at(self.hosts), last)
        self.chain.acknowledged = last
        self.chain_at(self.hosts)
        self.progress()
        # The coordinator's record was of before the failover.
        self.settled()

    def test_a_group_is_suspended_resumed_and_asked_for_points_from_any_host(self):
        self.several(interval="manual")
        self.hosts["east3"].farcopy("suspend", "shop")
        for host in self.hosts.values():
            wait_for(lambda: host.group().get("reason") == "suspended by the operator", what=f"{host.name} is suspended")
        self.hosts["east2"].farcopy("resume", "shop")
        for host in self.hosts.values():
            wait_for(lambda: host.group()["state"] == "mirroring", what=f"{host.name} mirrors")
        before = self.common()[-1]
        number = self.hosts["east3"].cycle()
        self.assertGreater(number, before)
        self.assertIn(number, self.common())

    def test_practice_is_one_moment_at_all_remotes(self):
        self.several()
        self.begin_chain()
        self.next_point(3)
        self.remotes["west2"].farcopy("practice", "shop")
        self.assertGreater(chains.check(self.images("@practice")), 0)
        self.remotes["west1"].farcopy("practice", "shop", "--end")
        for remote in self.remotes.values():
            self.assertNotIn("practice", str(remote.status()["volumes"]))
        self.chain.stop()

    def test_the_status_of_any_site_shows_every_other(self):
        self.several()
        for site in self.all.values():
            others = sorted(set(self.all) - {site.name})
            wait_for(lambda: [member["site"] for member in site.group().get("members") or [] if member.get("role")] == others, 15,
                     what=f"{site.name} knows {others}")
        self.hosts["east3"].kill()
        wait_for(lambda: any("reached" in (member.get("problem") or "") for member in self.remotes["west1"].group()["members"]), 15,
                 what="west1, which does not know east3, hears that it is gone")
        wait_for(lambda: "'east3'" in (self.master.group().get("notice") or ""), 15, what="the master says who holds points up")

    def test_a_comparison_of_the_group_is_one_of_every_pair(self):
        self.several()
        self.begin_chain()
        self.next_point(3)
        report = json.loads(self.hosts["east3"].farcopy("verify", "shop", "--json").stdout)
        self.assertEqual((report["compared_bytes"], report["differing_bytes"]), (3 * 4 << 20, 0))
        # Somebody writes to the secondaries' files behind their backs, where no host does.
        self.chain.stop()
        for host, place in (("east2", 8192), ("east3", 12288)):
            with open(self.remotes[REMOTES[host]].image(f"v-{host}"), "r+b") as file:
                file.seek((4 << 20) - place)
                file.write(os.urandom(4096))
        done = self.hosts["east1"].farcopy("verify", "shop", "--json", check=False)
        self.assertEqual(done.returncode, 1, done.stderr)
        found = sorted((each["site"], each["volume"], each["offset"]) for each in json.loads(done.stdout)["differences"])
        self.assertEqual(found, [("east2", "v-east2", (4 << 20) - 8192), ("east3", "v-east3", (4 << 20) - 12288)])
        self.hosts["east2"].farcopy("verify", "shop", "--repair")
        self.hosts["east2"].farcopy("cycle", "shop", "--wait")
        self.assertEqual(json.loads(self.hosts["east1"].farcopy("verify", "shop", "--json").stdout)["differing_bytes"], 0)
        # Nothing stays behind, and who cannot be asked is named.
        for site in self.all.values():
            self.assertEqual(json.loads(site.farcopy("flashcopy", "list", "--json").stdout), [], site.name)
        self.hosts["east3"].kill()
        refused = self.hosts["east1"].farcopy("verify", "shop", check=False)
        self.assertEqual(refused.returncode, 1)
        self.assertIn("east3", refused.stderr)

    def test_a_resync_of_the_group_discards_what_is_named_and_nothing_else(self):
        last = self.failed_over_and_hosts_are_back()
        all = ",".join(REMOTES)
        wrong = self.remotes["west1"].farcopy("resync", "shop", "--discard", f"{all},north", "--yes", check=False)
        self.assertIn("'north'", wrong.stderr)
        both = self.remotes["west1"].farcopy("resync", "shop", "--discard", "east1,west1", "--yes", check=False)
        self.assertIn("mirror to each other", both.stderr)
        mixed = self.remotes["west1"].farcopy("resync", "shop", "--discard", "east1,west2", "--yes", check=False)
        self.assertIn("all discard their changes, or none", mixed.stderr)
        self.assertEqual({site.group()["state"] for site in self.remotes.values()}, {"failed-over"}, "nothing was done")
        # Of one site, as with one host.
        self.remotes["west1"].farcopy("resync", "shop", "--discard", "east2", "--yes")
        self.assertEqual(self.hosts["east1"].group()["role"], "primary")
        # At any site, also one whose changes are discarded.
        preview = json.loads(self.hosts["east3"].farcopy("resync", "shop", "--discard", all, "--preview", "--json").stdout)
        self.assertEqual((preview["from"], preview["to"]), ("west1, west2", "east1, east2, east3"))
        self.hosts["east1"].farcopy("resync", "shop", "--discard", all, "--yes")
        self.roles("secondary", "primary")
        self.assertEqual(self.cut_at(self.at_remotes()), last)
        self.chain.acknowledged = last
        self.chain_at(self.at_remotes())
        self.progress()
        self.remotes["west2"].farcopy("cycle", "shop", "--wait")
        self.chain.stop()
        self.remotes["west1"].farcopy("switchover", "shop")
        self.roles("primary", "secondary")
        self.assertEqual(self.cut_at(self.hosts), self.chain.acknowledged)


class LostHosts(SeveralHosts):
    def lose(self, host="east3"):
        """The others go on, and write."""
        self.hosts[host].kill()
        before = self.committed("west1")
        handle = self.hosts["east1"].connect("v-east1")
        number = 0

        def moved():
            nonlocal number
            number += 1
            handle.pwrite(bytes([number % 250 + 1]) * 4096, 0)
            return max(self.committed("west1")) > max(before) + 1
        wait_for(moved, 30, what="points are formed without the lost host")
        handle.shutdown()

    def test_others_go_on_and_who_returns_takes_part_again(self):
        self.several('on_host_lost = "go-on"')
        self.lose()
        self.assertIn("'east3'", self.master.group()["notice"])
        self.assertIn("behind", self.master.group()["notice"])
        self.hosts["east3"].start()
        newest = max(self.committed("west1"))
        wait_for(lambda: max(self.committed("west2")) > newest, 30, what="the host takes part again")

    def test_a_failover_takes_the_lost_hosts_volumes_to_their_newest_point(self):
        self.several('on_host_lost = "go-on"')
        behind = max(self.committed("west2"))
        self.lose()
        self.remotes["west2"].farcopy("failover", "shop")
        self.assertIn(f"point {behind}", self.remotes["west2"].group()["reason"])
        self.assertGreater(self.remotes["west1"].group()["point"]["id"], behind)

    def test_a_lost_host_is_taken_out_of_the_group(self):
        self.several('on_host_lost = "go-on"')
        self.lose()
        for host in ("east1", "east2"):
            self.hosts[host].stop()
        for host in ("east1", "east2"):
            self.hosts[host].edit('hosts = ["east1", "east2", "east3"]', 'hosts = ["east1", "east2"]')
            self.hosts[host].start()
        newest = max(self.committed("west1"))
        wait_for(lambda: max(self.committed("west1")) > newest, 30, what="points of the others")

    def test_without_it_points_wait_for_a_lost_host(self):
        self.several()
        self.hosts["east3"].kill()
        before = self.common()[-1]
        wait_for(lambda: "'east3'" in (self.master.group().get("notice") or ""), 15, what="the master names it")
        self.assertEqual(self.common()[-1], before)
        self.hosts["east3"].start()
        self.next_point(before)
