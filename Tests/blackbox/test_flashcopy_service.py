"""FlashCopies as a service: background copies, targets, writable copies, clones, refresh, restore, hooks, full targets."""

import json
import os
import random
import subprocess
import threading

import nbd

from sites import SiteTest, not_on_devices, read_handle, run, wait_for

SIZE = 16 << 20
GRAIN = 4096


class FlashCopyService(SiteTest):
    def solo(self, **options):
        site = self.site("solo", {"disk": "16MiB"}, **options)
        handle = site.connect("disk")
        data = random.randbytes(SIZE)
        for at in range(0, SIZE, 1 << 20):
            handle.pwrite(data[at:at + (1 << 20)], at)
        return site, handle, data

    def scribble(self, handle, model, count=100, largest=300_032):
        """Writes, zeroes and trims at random places; returns what must be there afterwards."""
        model = bytearray(model)
        for _ in range(count):
            at = random.randrange(SIZE // 512) * 512
            length = min(SIZE - at, random.choice([512, 4096, 5120, 65536, largest]))
            if random.random() < 0.2:
                handle.zero(length, at)
                model[at:at + length] = bytes(length)
            else:
                piece = random.randbytes(length)
                handle.pwrite(piece, at)
                model[at:at + length] = piece
        return bytes(model)

    def show(self, site, name, *volumes):
        return json.loads(site.farcopy("flashcopy", "show", *(volumes or ["disk"]), name, "--json").stdout)

    def complete(self, site, name):
        wait_for(lambda: self.show(site, name)[0]["background_copy"]["complete"], what=f"the background copy {name}")

    def target(self, site, name):
        with open(self.show(site, name)[0]["target"], "rb") as file:
            return file.read()

    # Background copies

    def test_background_copy_makes_an_independent_image(self):
        site, handle, first = self.solo()
        site.farcopy("flashcopy", "create", "disk", "older")
        site.farcopy("flashcopy", "create", "disk", "image", "--copy", "--rate", "2MiB")
        report = self.show(site, "image")[0]
        self.assertFalse(report["background_copy"]["complete"])
        self.assertEqual(report["background_copy"]["rate_bytes_per_second"], 2 << 20)
        self.assertFalse(report["survives_power_loss"])
        now = self.scribble(handle, first)
        self.assertIsNotNone(self.show(site, "image")[0]["background_copy"]["eta_seconds"])
        self.assertIn("ETA", site.farcopy("flashcopy", "list").stdout)
        site.farcopy("flashcopy", "set", "disk", "image", "--rate", "0")
        self.complete(site, "image")
        now = self.scribble(handle, now)
        self.assertEqual(self.target(site, "image"), first)
        self.assertTrue(self.show(site, "image")[0]["survives_power_loss"])
        self.assertEqual(site.read("disk@image"), first)
        self.assertEqual(site.read("disk@older"), first)
        site.lose_power()
        site.start()
        self.assertEqual(site.read("disk@image"), first)
        self.assertEqual(self.show(site, "older")[0]["state"], "lost")
        self.assertIn("machine went down", self.show(site, "older")[0]["reason"])
        self.assertEqual(site.read("disk"), now)

    @not_on_devices
    def test_a_background_copy_is_complete_once(self):
        """A small one is often complete while it is still being entered; two ways tell of that."""
        site = self.site("solo", {"disk": "64KiB"})
        site.connect("disk").pwrite(b"a" * 65536, 0)
        for index in range(20):
            name = f"image{index}"
            site.farcopy("flashcopy", "create", "disk", name, "--copy", "--rate", "0")
            self.complete(site, name)
            wait_for(lambda: f"copy of '{name}' is complete" in site.farcopy("events").stdout, what="that it is said")
            site.farcopy("flashcopy", "withdraw", "disk", name)
            self.assertEqual(site.farcopy("events").stdout.count(f"copy of '{name}' is complete"), 1)

    def test_background_copy_goes_on_after_sigkill(self):
        site, handle, first = self.solo()
        site.farcopy("flashcopy", "create", "disk", "image", "--copy", "--rate", "4MiB")
        now = self.scribble(handle, first, 30)
        wait_for(lambda: self.show(site, "image")[0]["preserved_bytes"] > 4 << 20, what="some progress")
        site.kill()
        site.start()
        self.assertGreater(self.show(site, "image")[0]["preserved_bytes"], 4 << 20)
        site.farcopy("flashcopy", "set", "disk", "image", "--rate", "0")
        self.complete(site, "image")
        self.assertEqual(self.target(site, "image"), first)
        self.assertEqual(site.read("disk"), now)

    @not_on_devices
    def test_a_sparse_volume_stays_sparse_in_its_copy(self):
        site = self.site("solo", {"disk": "1GiB"})
        handle = site.connect("disk")
        handle.pwrite(b"a" * 8192, 700 << 20)
        site.farcopy("flashcopy", "create", "disk", "image", "--copy", "--rate", "0")
        self.complete(site, "image")
        path = self.show(site, "image")[0]["target"]
        self.assertLess(os.stat(path).st_blocks * 512, 4 << 20)
        with open(path, "rb") as file:
            file.seek(700 << 20)
            self.assertEqual(file.read(8192), b"a" * 8192)

    def test_targets_of_the_operator(self):
        site, handle, first = self.solo()
        path = os.path.join(self.directory, "backup.img")
        used = os.path.join(self.directory, "used.img")
        with open(used, "wb") as file:
            file.write(b"\xff" * SIZE)
        handle.zero(1 << 20, 2 << 20)
        first = first[:2 << 20] + bytes(1 << 20) + first[3 << 20:]
        site.farcopy("flashcopy", "create", "disk", "one", "--copy", "--rate", "0", "--target", path)
        site.farcopy("flashcopy", "create", "disk", "two", "--copy", "--rate", "0", "--target", used)
        for name in ("one", "two"):
            self.complete(site, name)
        now = self.scribble(handle, first)
        for name, file in (("one", path), ("two", used)):
            with open(file, "rb") as opened:
                self.assertEqual(opened.read(), first, name)
        small = os.path.join(self.directory, "small.img")
        with open(small, "wb") as file:
            file.truncate(SIZE - 4096)
        for target, expected in ((small, "has 16773120 bytes"), (path, "in use"), (f"{site.path}/disk.img", "in use")):
            done = site.farcopy("flashcopy", "create", "disk", "bad", "--target", target, check=False)
            self.assertEqual(done.returncode, 1)
            self.assertIn(expected, done.stderr)
        site.farcopy("flashcopy", "withdraw", "disk", "one")
        wait_for(lambda: "disk@one" not in site.farcopy("flashcopy", "list").stdout, what="the withdrawal")
        with open(path, "rb") as file:
            self.assertEqual(file.read(), first, "an image outlives its FlashCopy")
        self.assertEqual(site.read("disk"), now)

    # Writable copies and clones

    def test_writes_to_a_copy_stay_there(self):
        site, handle, first = self.solo()
        site.farcopy("flashcopy", "create", "disk", "a")
        now = self.scribble(handle, first)
        site.farcopy("flashcopy", "create", "disk", "b", "--writable")
        second = now
        now = self.scribble(handle, now)
        site.farcopy("flashcopy", "create", "disk", "c")
        third = now
        copy = site.connect("disk@b")
        written = self.scribble(copy, second)
        now = self.scribble(handle, now)
        site.farcopy("flashcopy", "clone", "disk", "b", "clone", "--writable")
        cloned = written
        written = self.scribble(copy, written)
        changed = self.scribble(site.connect("disk@clone"), cloned)
        copy.flush()
        expected = {"disk": now, "disk@a": first, "disk@b": written, "disk@c": third, "disk@clone": changed}
        for name, image in expected.items():
            self.assertEqual(site.read(name), image, name)
        site.kill()
        site.start()
        for name, image in expected.items():
            self.assertEqual(site.read(name), image, f"{name} after SIGKILL")
        for gone in ("b", "clone", "c"):
            site.farcopy("flashcopy", "withdraw", "disk", gone)
            wait_for(lambda: f"disk@{gone}\t" not in site.farcopy("flashcopy", "list").stdout, what=f"the end of {gone}")
            del expected[f"disk@{gone}"]
            for name, image in expected.items():
                self.assertEqual(site.read(name), image, f"{name} after {gone} was withdrawn")

    def test_read_only_by_default_writable_on_demand(self):
        site, _, _ = self.solo()
        site.farcopy("flashcopy", "create", "disk", "a")
        with self.assertRaises(nbd.Error):
            site.connect("disk@a").pwrite(bytes(512), 0)
        site.farcopy("flashcopy", "set", "disk", "a", "--writable")
        site.connect("disk@a").pwrite(b"w" * 512, 0)
        site.farcopy("flashcopy", "set", "disk", "a", "--read-only")
        handle = site.connect("disk@a")
        self.assertEqual(handle.pread(512, 0), b"w" * 512)
        with self.assertRaises(nbd.Error):
            handle.pwrite(bytes(512), 0)

    def test_a_recovery_point_can_be_cloned_and_written_to(self):
        east, west = self.pair({"disk": "16MiB"}, interval="manual", keep=2)
        handle = east.connect("disk")
        handle.pwrite(b"one" * 4096, 0)
        point = east.cycle()
        west.farcopy("flashcopy", "clone", "disk", str(point), "trial", "--writable")
        image = west.read(f"disk@{point}")
        written = self.scribble(west.connect("disk@trial"), image)
        for number in range(4):
            handle.pwrite(bytes([number]) * 8192, number * 4096)
            last = east.cycle()
        self.assertEqual(west.read("disk@trial"), written)
        self.assertEqual(west.read(f"disk@{last}"), east.read("disk"))
        west.lose_power()
        west.start()
        self.assertEqual(west.read(f"disk@{last}"), east.read("disk"))

    # Refresh and restore

    def test_refresh_copies_what_changed_on_either_side(self):
        site, handle, first = self.solo()
        site.farcopy("flashcopy", "create", "disk", "old")
        site.farcopy("flashcopy", "create", "disk", "nightly", "--copy", "--rate", "0", "--writable")
        self.complete(site, "nightly")
        handle.pwrite(b"n" * GRAIN, 5 * GRAIN)
        site.connect("disk@nightly").pwrite(b"t" * GRAIN, 9 * GRAIN)
        now = bytearray(first)
        now[5 * GRAIN:6 * GRAIN] = b"n" * GRAIN
        site.farcopy("flashcopy", "set", "disk", "nightly", "--rate", "1")
        site.farcopy("flashcopy", "refresh", "disk", "nightly")
        self.assertGreaterEqual(self.show(site, "nightly")[0]["preserved_bytes"], SIZE - 2 * GRAIN, "only two grains are copied")
        self.assertEqual(site.read("disk@nightly"), bytes(now), "it is complete at once")
        site.farcopy("flashcopy", "set", "disk", "nightly", "--rate", "0")
        self.complete(site, "nightly")
        self.assertEqual(self.target(site, "nightly"), bytes(now))
        self.assertEqual(site.read("disk@old"), first)
        for _ in range(4):
            handle = site.connect("disk")
            now = self.scribble(handle, now, 40)
            image = now
            site.farcopy("flashcopy", "refresh", "disk", "nightly")
            now = self.scribble(handle, now, 40)
            site.kill()
            site.start()
            self.assertEqual(site.read("disk@nightly"), image)
            self.assertEqual(site.read("disk@old"), first)
        self.complete(site, "nightly")
        self.assertEqual(self.target(site, "nightly"), image)

    def test_refresh_without_background_copy_begins_anew(self):
        site, handle, first = self.solo()
        site.farcopy("flashcopy", "create", "disk", "a")
        now = self.scribble(handle, first)
        self.assertGreater(self.show(site, "a")[0]["preserved_bytes"], 0)
        site.farcopy("flashcopy", "refresh", "disk", "a")
        self.assertEqual(self.show(site, "a")[0]["preserved_bytes"], 0)
        self.scribble(handle, now)
        self.assertEqual(site.read("disk@a"), now)

    def test_restore_at_once_while_hosts_go_on(self):
        site, handle, first = self.solo()
        site.farcopy("flashcopy", "create", "disk", "a")
        now = self.scribble(handle, first)
        site.farcopy("flashcopy", "create", "disk", "b")
        second = now
        now = self.scribble(handle, now)
        site.farcopy("flashcopy", "restore", "disk", "a", "--yes")
        handle = site.connect("disk")
        self.assertEqual(read_handle(handle), first)
        now = self.scribble(handle, first)
        self.assertEqual(read_handle(handle), now)
        self.assertEqual(site.read("disk@a"), first)
        self.assertEqual(site.read("disk@b"), second)
        wait_for(lambda: "restoring" not in site.farcopy("status").stdout, what="the end of the restore")
        site.farcopy("flashcopy", "restore", "disk", "b", "--yes")
        site.kill()
        site.start()
        self.assertEqual(site.read("disk"), second)
        wait_for(lambda: "restoring" not in site.farcopy("status").stdout, what="the end of the second restore")
        site.stop()
        with open(f"{site.path}/disk.img", "rb") as file:
            self.assertEqual(file.read(), second)

    def test_a_restore_that_cannot_go_on_is_given_up(self):
        """Part of the copy's target is gone: what could not be restored stays as it was."""
        target = os.path.join(self.directory, "target.img")
        for restarted in (False, True):
            with self.subTest(restarted=restarted):
                site, handle, data = self.solo()
                site.farcopy("flashcopy", "create", "disk", "copy", "--target", target)
                for at in range(0, SIZE, 1 << 20):
                    handle.pwrite(bytes(1 << 20), at)
                self.assertIn("not being restored", site.farcopy("abort", "restore:disk", check=False).stderr)
                os.truncate(target, SIZE // 2)
                site.farcopy("flashcopy", "restore", "disk", "copy", "--yes")
                wait_for(lambda: "could not be restored" in site.farcopy("events").stdout, what="the stall")
                if restarted:
                    # A target that was cut short is not taken for the copy's.
                    site.kill()
                    site.start()
                    self.assertIn("cut short", site.farcopy("events").stdout)
                    self.assertIn("that is lost", site.farcopy("events").stdout)
                else:
                    wait_for(lambda: site.farcopy("abort", "restore:disk", check=False).returncode == 0, what="the end")
                self.assertEqual(site.status()["volumes"]["disk"]["restoring_bytes"], 0)
                now = site.read("disk")
                self.assertEqual(now[SIZE // 2:], bytes(SIZE // 2), "what is gone stays as it was")
                for at in range(0, SIZE, GRAIN):
                    self.assertIn(now[at:at + GRAIN], (data[at:at + GRAIN], bytes(GRAIN)))
                site.connect("disk").pwrite(b"on" * 256, 0)
                self.put_away(site)
                os.unlink(target)

    def test_restore_of_a_mirrored_volume_reaches_the_secondary(self):
        east, west = self.pair({"disk": "16MiB"}, interval="0s")
        handle = east.connect("disk")
        handle.pwrite(random.randbytes(4 << 20), 0)
        east.cycle()
        east.farcopy("flashcopy", "create", "disk", "good")
        image = east.read("disk")
        handle.pwrite(random.randbytes(8 << 20), 1 << 20)
        east.cycle()
        east.farcopy("flashcopy", "restore", "disk", "good", "--yes")
        point = east.cycle()
        self.assertEqual(east.read("disk"), image)
        self.assertEqual(west.read(f"disk@{point}"), image)

    # Several volumes, hooks, limits

    def test_hooks_surround_the_instant(self):
        log = os.path.join(self.directory, "hooks")
        hooks = f"""on_freeze = "echo freeze $FARCOPY_NAME $FARCOPY_VOLUMES >> {log}"
on_thaw = "echo thaw >> {log}"
hook_timeout = "2s"
"""
        site = self.site("solo", {"disk": "16MiB"}, start=False)
        site.edit("[volumes.disk]\n", "[volumes.disk]\n" + hooks)
        site.start()
        site.farcopy("flashcopy", "create", "disk", "a")
        with open(log) as file:
            self.assertEqual(file.read(), "freeze a disk\nthaw\n")
        for command, expected in (("exit 3", "ended with 3"), ("sleep 60", "took longer than 2")):
            site.stop()
            site.edit("echo freeze $FARCOPY_NAME", "exit 3; echo freeze $FARCOPY_NAME") if command == "exit 3" else site.edit(
                "exit 3", "sleep 60")
            site.start()
            done = site.farcopy("flashcopy", "create", "disk", "b", check=False)
            self.assertEqual(done.returncode, 1)
            self.assertIn(expected, done.stderr)
            self.assertNotIn("disk@b", site.farcopy("flashcopy", "list").stdout)
        with open(log) as file:
            self.assertEqual(file.read().count("thaw"), 3, "what could not be frozen is thawed all the same")

    def test_a_full_target_ends_its_own_copy_only(self):
        small = os.path.join(self.directory, "small")
        os.mkdir(small)
        run("mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", small)
        self.addCleanup(lambda: subprocess.run(["umount", "-l", small], check=False))
        site, handle, first = self.solo()
        site.farcopy("flashcopy", "create", "disk", "older")
        site.farcopy("flashcopy", "create", "disk", "full", "--target", f"{small}/target")
        now = self.scribble(handle, first, 200)
        wait_for(lambda: self.show(site, "full")[0]["state"] == "failed", what="the failure")
        self.assertIn("No space left", self.show(site, "full")[0]["reason"])
        self.assertIn("No space left", site.farcopy("status").stdout)
        self.assertEqual(site.read("disk"), now)
        self.assertEqual(site.read("disk@older"), first)
        with self.assertRaises(nbd.Error):
            site.connect("disk@full")
        site.kill()
        site.start()
        self.assertEqual(site.read("disk@older"), first)
        site.farcopy("flashcopy", "withdraw", "disk", "full")
        wait_for(lambda: "disk@full" not in site.farcopy("flashcopy", "list").stdout, what="the withdrawal")
        self.assertEqual(site.read("disk@older"), first)

    def test_many_copies_of_one_volume(self):
        site, handle, now = self.solo()
        images = {}
        for number in range(64):
            site.farcopy("flashcopy", "create", "disk", f"c{number}")
            images[number] = now
            now = self.scribble(handle, now, 5, largest=20480)
        for number in random.sample(range(64), 12):
            self.assertEqual(site.read(f"disk@c{number}"), images[number])
        before = self.show(site, "c63")[0]["preserved_bytes"]
        handle.pwrite(bytes(SIZE // 2), 0)
        self.assertGreater(self.show(site, "c63")[0]["preserved_bytes"], before)
        self.assertEqual(site.read("disk@c0"), images[0])
        self.assertEqual(site.read("disk@c63"), images[63])

    def test_refusals(self):
        site, _, _ = self.solo()
        site.farcopy("flashcopy", "create", "disk", "one")
        for words, code, expected in (
                (("clone", "disk", "two", "x"), 1, "no FlashCopy 'two'; it has one"), (("refresh", "disk", "two"), 1, "no FlashCopy"),
                (("restore", "disk", "two"), 1, "no FlashCopy"), (("create", "disk", "y", "--rate", "1MiB"), 2, "needs --copy"),
                (("create", "disk", "y", "--copy", "--nocopy"), 2, "exclude"), (("create", "disk", "y", "--copy", "--rate", "x"), 2, "no rate"),
                (("create", "disk", "y", "--target", "/a", "--target", "/b"), 1, "2 targets for 1 volumes")):
            done = site.farcopy("flashcopy", *words, check=False)
            self.assertEqual(done.returncode, code, (words, done.stderr))
            self.assertIn(expected, done.stderr)
