"""Operations on FlashCopies that fail or end half-way: what is found afterwards, at once and after a start."""

import errno
import os
import subprocess
import time

import control
from sites import FARCOPY, SiteTest, wait_for
from test_order import OrderTest

BLOCK = 4096


def names(site, volume):
    return {copy["name"]: copy["state"] for copy in site.status()["volumes"][volume]["flashcopies"]}


class SavesThatFail(OrderTest):
    """Two volumes, and a record that cannot be saved from some moment on, but reaches its file."""

    def two(self):
        site = self.site("solo", {"a": "1MiB", "b": "1MiB"})
        self.fill(site, b"old!")
        site.farcopy("flashcopy", "create", "a", "b", "good")
        self.fill(site, b"new!")
        return site

    def fill(self, site, word):
        for volume in "ab":
            handle = site.connect(volume)
            handle.pwrite(word * (BLOCK // 4), 0)
            handle.flush()
            handle.shutdown()

    def saves_fail(self, site, volume, skip):
        # Also where a file in its place is made.
        site.recorder.fail("fdatasync", f"~volumes/{volume}/volume.record", error=errno.EIO, count=1000, skip=skip)

    def test_a_restore_of_two_volumes_is_of_both_or_of_none(self):
        """The decision is in the first one's file although its save failed; the process is killed before that is mended."""
        for skip in range(4):
            with self.subTest(skip=skip):
                site = self.two()
                self.saves_fail(site, "a", skip)
                done = site.farcopy("flashcopy", "restore", "a", "b", "good", "--yes", check=False)
                time.sleep(0.3)
                site.kill()
                site.recorder.fail("none", "")
                site.start()
                wait_for(lambda: not any(v["restoring_bytes"] for v in site.status()["volumes"].values()))
                found = [site.read(volume)[:4] for volume in "ab"]
                self.assertEqual(found[0], found[1], f"after {done.stderr}")
                if done.returncode == 0:
                    self.assertEqual(found[0], b"old!")
                self.put_away(site)

    def test_hosts_are_let_in_where_no_restore_can_have_been_decided(self):
        site = self.two()
        self.saves_fail(site, "a", 0)
        self.assertNotEqual(site.farcopy("flashcopy", "restore", "a", "b", "good", "--yes", check=False).returncode, 0)
        for volume in "ab":
            handle = site.connect(volume)
            self.assertFalse(handle.is_read_only(), volume)
            handle.pwrite(b"more" * (BLOCK // 4), BLOCK)
            handle.shutdown()
        site.recorder.fail("none", "")
        site.farcopy("flashcopy", "restore", "a", "b", "good", "--yes")
        self.assertEqual([site.read(volume)[:4] for volume in "ab"], [b"old!", b"old!"])

    def test_half_of_what_failed_is_not_withdrawn_alone(self):
        """The create has failed, and the first record may say that its copy is there: all of it leaves, or none."""
        for skip in (0, 1):
            with self.subTest(skip=skip):
                site = self.two()
                self.saves_fail(site, "a", skip)
                self.assertNotEqual(site.farcopy("flashcopy", "create", "a", "b", "more", check=False).returncode, 0)
                site.farcopy("flashcopy", "withdraw", "b", "more", check=False)
                time.sleep(0.5)
                site.kill()
                site.recorder.fail("none", "")
                site.start()
                found = [names(site, volume).get("more") for volume in "ab"]
                self.assertEqual(found[0], found[1])
                self.put_away(site)


class Limits(SiteTest):
    def test_copies_that_are_lost_are_not_taken_anew_beyond_the_limit(self):
        site = self.site("solo", {"disk": "64KiB"})

        def create(name):
            return control.call(site, "POST", "/v1/flashcopies", {"name": name, "volumes": ["disk"]})
        for number in range(12):
            self.assertEqual(create(f"old{number}")[0], 200)
        site.lose_power()
        site.start()
        self.assertEqual(set(names(site, "disk").values()), {"lost"})
        count = 0
        while create(f"new{count}")[0] == 200:
            count += 1
        self.assertGreater(count, 200)
        refused = site.farcopy("flashcopy", "refresh", "disk", "old0", check=False)
        self.assertNotEqual(refused.returncode, 0)
        self.assertIn("which is the limit", refused.stderr)
        site.farcopy("flashcopy", "withdraw", "disk", "new0")
        site.farcopy("flashcopy", "refresh", "disk", "old0")
        site.kill()
        site.start()
        self.assertEqual(names(site, "disk")["old1"], "lost")

    def test_a_role_that_is_not_given_up_leaves_no_copies(self):
        """Asked again and again, a site without descriptors keeps what its peer lacks once at a time."""
        east, west = self.pair({"disk": "64KiB"}, interval="manual", start=False)
        east.prefix = ["bash", "-c", 'ulimit -n 700; exec "$@"', "-"]
        west.start()
        east.start()
        wait_for(west.points)
        count = 0
        while control.call(east, "POST", "/v1/flashcopies", {"name": f"c{count}", "volumes": ["disk"]})[0] == 200:
            count += 1
        handle = east.connect("disk")
        handle.pwrite(b"unsent" * 100, 0)
        handle.flush()
        handle.shutdown()
        west.farcopy("failover", "shop")
        other = west.connect("disk")
        other.pwrite(b"other" * 100, BLOCK)
        other.shutdown()
        wait_for(lambda: not any(v["restoring_bytes"] for v in west.status()["volumes"].values()))
        asks = self.spawn(
            FARCOPY, "resync", "shop", "--discard", "east", "--yes", "--control", west.control,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        most = 0
        for _ in range(30):
            time.sleep(0.1)
            most = max(most, sum(name.startswith("unsent") for name in names(east, "disk")))
        self.assertLessEqual(most, 1)
        for number in range(min(count, 20)):
            east.farcopy("flashcopy", "withdraw", "disk", f"c{number}", check=False)
        self.assertEqual(asks.wait(60), 0, asks.stdout.read())
        wait_for(lambda: sum(name.startswith("unsent") for name in names(east, "disk")) == 1, what="what was unsent is kept")


class RoleNotGivenUp(OrderTest):
    """The old primary has not heard of the failover, and serves hosts; asked to give up its role, it cannot save its record at first."""

    def test_hosts_are_not_let_in_while_the_next_try_gives_the_role_up(self):
        # Often the record is mended between the two tries: then hosts are let in, and shut out again.
        for _ in range(4):
            east, west = self.pair({"disk": "64KiB"}, interval="manual")
            wait_for(west.points)
            east.farcopy("suspend", "shop")
            self.write(east, b"unsent" * 100)
            self.fail_over(west)
            east.recorder.fail("fdatasync", "~groups/shop/group.record", error=errno.EIO, count=1000)
            resync = ("resync", "shop", "--discard", "east", "--yes")
            self.assertNotEqual(west.farcopy(*resync, check=False).returncode, 0)
            # The next try saves the record, and then takes long to make its files.
            east.recorder.fail("fsync", "/copies", error=-2)
            gives_up = self.spawn(FARCOPY, *resync, "--control", west.control)
            wait_for(lambda: east.recorder.failed() == 0)
            time.sleep(1)
            self.assertIsNone(gives_up.poll())
            self.check_shut_out(east)
            self.assertEqual(gives_up.wait(60), 0)
            wait_for(lambda: west.group()["state"] == "mirroring")
            self.check_shut_out(east)
            self.assertEqual([name for name in names(east, "disk") if name.startswith("unsent")], ["unsent-after-1-2"])
            self.put_away(east, west)

    def test_hosts_are_not_let_in_by_command_while_the_role_is_given_up(self):
        """The old primary waits for its peer, which is primary, comes back, and is faster than the next question; an operator is as well."""
        for _ in range(3):
            east, west = self.pair({"disk": "64KiB"}, interval="manual", options='on_isolated = "refuse"\n')
            wait_for(west.points)
            self.write(east, b"unsent" * 100)
            east.stop()
            self.fail_over(west)
            west.stop()
            east.start()
            self.assertIn("does not answer", east.group()["reason"])
            west.start()
            east.recorder.fail("fsync", "/copies", error=-2)
            gives_up = self.spawn(FARCOPY, "resync", "shop", "--discard", "east", "--yes", "--control", west.control)
            wait_for(lambda: east.recorder.failed() == 0)
            resumes = self.spawn(
                FARCOPY, "resume", "shop", "--isolated", "--control", east.control, stderr=subprocess.PIPE, text=True)
            time.sleep(0.5)
            self.assertIsNone(gives_up.poll())
            self.check_shut_out(east)
            self.assertEqual(gives_up.wait(60), 0)
            self.assertEqual(resumes.wait(60), 1)
            self.assertIn("does not wait for its peer", resumes.stderr.read())
            self.assertEqual(east.group()["role"], "secondary")
            self.put_away(east, west)

    def test_what_an_earlier_role_was_given_up_with_stays(self):
        east, west = self.pair({"disk": "64KiB"}, interval="manual")
        wait_for(west.points)
        for word in (b"one.", b"two."):
            east.farcopy("suspend", "shop")
            self.write(east, word * 128)
            self.fail_over(west)
            west.farcopy("resync", "shop", "--discard", "east", "--yes")
            wait_for(lambda: west.group()["state"] == "mirroring")
            west.cycle()
            west.farcopy("switchover", "shop")
            wait_for(lambda: east.group()["state"] == "mirroring")
            east.cycle()
        kept = sorted(name for name in names(east, "disk") if name.startswith("unsent"))
        self.assertEqual([east.read(f"disk@{name}")[:4] for name in kept], [b"one.", b"two."])

    def write(self, site, data):
        handle = site.connect("disk")
        handle.pwrite(data, 0)
        handle.flush()
        handle.shutdown()

    def fail_over(self, site):
        site.farcopy("failover", "shop")
        wait_for(lambda: not any(v["restoring_bytes"] for v in site.status()["volumes"].values()))

    def check_shut_out(self, site):
        handle = site.connect("disk")
        self.assertTrue(handle.is_read_only(), site.farcopy("events").stdout)
        handle.shutdown()


class Interrupted(SiteTest):
    def test_a_clone_beside_a_point_past_its_retention(self):
        """A reader keeps that point in the chain: the clone is newer, and stays so after a kill."""
        east, west = self.pair({"disk": "1MiB"}, keep=1)
        handle = east.connect("disk")
        for word in (b"1", b"2", b"3"):
            handle.pwrite(word * (1 << 20 if word == b"1" else BLOCK), 0)
            point = east.cycle()
        reader = west.connect(f"disk@{point}")
        handle.pwrite(b"4" * BLOCK, 0)
        east.cycle()
        self.assertEqual(reader.pread(4, 0), b"3333")
        west.farcopy("practice", "shop")
        self.assertEqual(west.read("disk@practice")[:4], b"4444")
        west.kill()
        west.start()
        self.assertEqual(west.read("disk@practice")[:4], b"4444")

    def test_practice_of_which_half_has_gone_can_be_ended(self):
        east, west = self.pair({"a": "64KiB", "b": "64KiB"}, interval="manual")
        wait_for(west.points)
        west.farcopy("practice", "shop")
        west.farcopy("flashcopy", "withdraw", "a", "practice")
        wait_for(lambda: "practice" not in names(west, "a"))
        west.farcopy("practice", "shop", "--end")
        wait_for(lambda: "practice" not in names(west, "b"))
        west.farcopy("practice", "shop")

    def test_a_comparison_whose_primary_dies_leaves_nothing_for_good(self):
        east, west = self.pair({"disk": "16MiB"}, interval="manual", keep=1)
        wait_for(west.points)

        def pinned():
            folder = os.path.join(west.state, "volumes/disk/copies")
            return [name for name in os.listdir(folder) if name.endswith(".bitmap") and len(name) > 20]
        for number in range(3):
            handle = east.connect("disk")
            handle.pwrite(bytes([number + 1]) * (1 << 20), number << 20)
            handle.shutdown()
            compares = self.spawn(
                FARCOPY, "verify", "shop", "--rate", "1MiB", "--control", east.control,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            wait_for(pinned)
            time.sleep(0.5)
            self.assertIsNone(compares.poll())
            self.assertLessEqual(len(pinned()), 1)
            east.kill()
            compares.wait(30)
            east.start()
            wait_for(lambda: east.group()["state"] == "mirroring")
        east.farcopy("verify", "shop")
        wait_for(lambda: not pinned(), what="the last comparison's copy leaves")

    def test_a_failover_does_not_wait_for_a_copy_of_another_volume(self):
        east, west = self.pair(
            {"disk": "1MiB"}, interval="manual", start=False,
            extra='[volumes.other]\npath = "%s/NAME-other.img"\nsize = "1MiB"\non_freeze = "sleep 15"\nhook_timeout = "60s"\n'
            % self.directory)
        for site in (east, west):
            site.edit("NAME-other.img", f"{site.name}-other.img")
        west.start()
        east.start()
        wait_for(west.points)
        east.kill()

        def spawn(*words):
            return self.spawn(FARCOPY, *words, "--control", west.control, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        creates = spawn("flashcopy", "create", "other", "mine")
        time.sleep(0.5)
        restores = spawn("flashcopy", "restore", "disk", "nothing", "--yes")
        time.sleep(0.5)
        west.farcopy("failover", "shop")
        self.assertIsNone(creates.poll(), "the copy of the other volume was over before")
        self.assertNotEqual(restores.wait(30), 0)
        self.assertEqual(creates.wait(60), 0)

    def test_a_refresh_that_cannot_freeze_says_what_has_become_of_the_copy(self):
        site = self.site("solo", {"disk": "1MiB"}, start=False)
        site.edit("[volumes.disk]\n", f'[volumes.disk]\non_freeze = "test ! -e {self.directory}/bad"\n')
        site.start()
        site.farcopy("flashcopy", "create", "disk", "good", "--durable")
        with open(f"{self.directory}/bad", "w"):
            pass
        refused = site.farcopy("flashcopy", "refresh", "disk", "good", check=False)
        self.assertNotEqual(refused.returncode, 0)
        self.assertIn("is not kept any more since its refresh began", refused.stderr)
        os.unlink(f"{self.directory}/bad")
        site.farcopy("flashcopy", "refresh", "disk", "good")
        self.assertEqual(names(site, "disk"), {"good": "active"})

    def test_a_stop_ends_a_failback_that_the_next_start_goes_on_with(self):
        east, west = self.pair({"disk": "16MiB"}, interval="manual")
        wait_for(west.points)
        east.stop()
        west.farcopy("failover", "shop")
        wait_for(lambda: not any(v["restoring_bytes"] for v in west.status()["volumes"].values()))
        handle = west.connect("disk")
        handle.pwrite(os.urandom(16 << 20), 0)
        handle.flush()
        handle.shutdown()
        west.farcopy("rate", "shop", "100KiB")
        east.start()
        for _ in range(2):
            asks = self.spawn(FARCOPY, "failback", "shop", "--yes", "--control", west.control, stderr=subprocess.PIPE, text=True)
            wait_for(lambda: "failback" in str(west.group().get("operation")) and east.group()["role"] == "secondary")
            time.sleep(0.5)
            west.stop()  # at once, although a client waits
            self.assertNotEqual(asks.wait(30), 0)
            west.start()
            wait_for(lambda: "failback" in str(west.group().get("operation")), what="the failback goes on")
            # Nobody waits for this one.
            west.stop()
            west.start()
            wait_for(lambda: "failback" in str(west.group().get("operation")), what="the failback goes on")
            west.farcopy("abort", "failback:shop")
            wait_for(lambda: "failback" not in str(west.group().get("operation")))


if __name__ == "__main__":
    import unittest
    unittest.main()
