"""`farcopy flashcopy restore` under hosts: who is disconnected, what is kept, and what a kill at any step leaves."""

import json
import os
import pty
import random
import subprocess
import threading
import time

import nbd

from sites import ROOT, SiteTest, run, wait_for

GRAIN = 4096
MIB = 1 << 20
SIZE = 8 * MIB


def fill(handle):
    data = random.randbytes(SIZE)
    for at in range(0, SIZE, MIB):
        handle.pwrite(data[at:at + MIB], at)
    return data


def end(*handles):
    for handle in handles:
        handle.shutdown()


class Restore(SiteTest):
    def solo(self, volumes=("disk",), **options):
        return self.site("solo", {name: "8MiB" for name in volumes}, **options)

    def restore(self, site, *words, check=True):
        return site.farcopy("flashcopy", "restore", *words, check=check)

    def finished(self, site):
        wait_for(lambda: all(v["restoring_bytes"] == 0 for v in site.status()["volumes"].values()), what="the end of the restore")

    def state(self, site, volume, name):
        return json.loads(site.farcopy("flashcopy", "show", volume, name, "--json").stdout)[0]

    # Hosts

    def test_refused_under_a_host_that_may_write(self):
        site = self.solo()
        handle = site.connect("disk")
        first = fill(handle)
        site.farcopy("flashcopy", "create", "disk", "good")
        handle.pwrite(b"n" * 3 * GRAIN, 0)
        done = self.restore(site, "disk", "good", check=False)
        self.assertEqual(done.returncode, 1)
        for words in ("'disk' is open for writing over 1 connections", "1 from a unix socket", "nmount", "--yes"):
            self.assertIn(words, done.stderr)
        handle.pwrite(b"m" * GRAIN, 0)
        self.assertEqual(site.read("disk")[:GRAIN], b"m" * GRAIN, "nothing has changed")
        self.assertEqual(len(site.status()["volumes"]["disk"]["flashcopies"]), 1, "nothing was kept")
        body = json.dumps({"name": "good", "volumes": ["disk"]})
        call = ("curl", "-s", "-w", "%{http_code}", "--unix-socket", site.control[5:], "-H", "content-type: application/json",
                "http://x/v1/flashcopies/restore", "-d")
        self.assertTrue(run(*call, body).stdout.endswith("412"))
        end(handle)
        wait_for(lambda: self.restore(site, "disk", "good", check=False).returncode == 0, what="the host to be gone")
        self.assertEqual(site.read("disk"), first)

    def test_a_terminal_is_asked(self):
        site = self.solo()
        handle = site.connect("disk")
        first = fill(handle)
        site.farcopy("flashcopy", "create", "disk", "good")
        handle.pwrite(b"n" * GRAIN, 0)
        for answer, code in ((b"n\n", 1), (b"y\n", 0)):
            ours, theirs = pty.openpty()
            os.write(ours, answer)
            done = subprocess.run(
                [site.program, "flashcopy", "restore", "disk", "good", "--control", site.control], stdin=theirs,
                capture_output=True, text=True, timeout=60)
            os.close(ours)
            os.close(theirs)
            self.assertEqual(done.returncode, code, done.stderr)
            self.assertIn("disconnect them? [y/N]", done.stdout)
            self.assertEqual(site.read("disk"), first if code == 0 else b"n" * GRAIN + first[GRAIN:])

    def test_hosts_are_disconnected_and_what_they_had_asked_for_is_kept(self):
        site = self.solo()
        handle, reader = site.connect("disk"), site.connect("disk")
        first = fill(handle)
        site.farcopy("flashcopy", "create", "disk", "good")
        # So many that some are still under way.
        pieces = [random.randbytes(64 << 10) for _ in range(SIZE // (64 << 10))]
        buffers = [nbd.Buffer.from_bytearray(bytearray(piece)) for piece in pieces]
        answered = set()

        def done_with(index):
            return lambda error: (error.value == 0 and answered.add(index), 1)[1]
        for index, buffer in enumerate(buffers):
            handle.aio_pwrite(buffer, index * (64 << 10), completion=done_with(index))
        done = self.restore(site, "disk", "good", "--yes")
        self.assertIn("kept as FlashCopy before-restore-1", done.stdout)
        self.assertIn("2 connections ended", done.stdout)
        self.drain(handle)
        for client in (handle, reader):
            with self.assertRaises(nbd.Error, msg="a later write fails"):
                client.pwrite(b"late" * 1024, 0)
        kept = site.read("disk@before-restore-1")
        for index, piece in enumerate(pieces):
            at = index * (64 << 10)
            if index in answered:
                self.assertEqual(kept[at:at + len(piece)], piece, "what was acknowledged is kept")
        self.assertEqual(site.read("disk"), first)
        handle = site.connect("disk")
        handle.pwrite(b"new" * 1024, 0)
        self.assertEqual(handle.pread(3, 0), b"new", "hosts may write again")
        self.assertIn(", restored 20", run("nbdinfo", site.uri("disk")).stdout, "clients can see that it is another volume now")

    def drain(self, handle):
        while handle.aio_in_flight() and not handle.aio_is_dead() and not handle.aio_is_closed():
            try:
                handle.poll(1000)
            except nbd.Error:
                return

    def test_a_host_that_comes_again_and_again_writes_before_or_after(self):
        site = self.solo()
        handle = site.connect("disk")
        first = fill(handle)
        site.farcopy("flashcopy", "create", "disk", "good")
        end(handle)
        acknowledged, over = [], threading.Event()

        def host():
            for slot in range(SIZE // GRAIN):
                if over.is_set():
                    return
                try:
                    handle = site.connect("disk")
                    handle.pwrite(slot.to_bytes(4, "big") * (GRAIN // 4), slot * GRAIN)
                    acknowledged.append(slot)
                    handle.shutdown()
                except nbd.Error:
                    pass
                time.sleep(0.001)  # there are places left when the restore is over
        thread = threading.Thread(target=host)
        thread.start()
        try:
            time.sleep(0.2)
            self.restore(site, "disk", "good", "--yes")
            time.sleep(0.2)
        finally:
            over.set()
            thread.join()
        self.finished(site)
        kept, now = site.read("disk@before-restore-1"), site.read("disk")
        places = []
        for slot in acknowledged:
            at, marker = slot * GRAIN, slot.to_bytes(4, "big") * (GRAIN // 4)
            places.append((kept[at:at + GRAIN] == marker, now[at:at + GRAIN] == marker))
        before = places.count((True, False))
        self.assertGreater(before, 0)
        self.assertLess(before, len(places))
        self.assertEqual(places, [(True, False)] * before + [(False, True)] * (len(places) - before))
        for slot in set(range(SIZE // GRAIN)) - set(acknowledged[before:]):
            self.assertEqual(now[slot * GRAIN:(slot + 1) * GRAIN], first[slot * GRAIN:(slot + 1) * GRAIN], slot)

    def test_readers_do_not_stop_a_restore_and_are_disconnected(self):
        site = self.solo()
        handle = site.connect("disk")
        first = fill(handle)
        site.farcopy("flashcopy", "create", "disk", "good")
        handle.pwrite(b"n" * GRAIN, 0)
        end(handle)
        site.stop()
        site.edit("[volumes.disk]\n", "[volumes.disk]\nread_only = true\n")
        site.start()
        reader = site.connect("disk")
        self.assertEqual(reader.pread(1, 0), b"n")
        self.assertIn("1 connections ended", self.restore(site, "disk", "good").stdout)
        with self.assertRaises(nbd.Error):
            reader.pread(1, 0)
        self.assertEqual(site.read("disk"), first)
        with self.assertRaises(nbd.Error):
            site.connect("disk").pwrite(b"x" * 512, 0)

    # What is kept

    def test_what_is_discarded_is_kept_of_one_instant_over_all_volumes(self):
        site = self.solo(("disk", "wal"))
        handles = {name: site.connect(name) for name in ("disk", "wal")}
        first = {name: fill(handle) for name, handle in handles.items()}
        site.farcopy("flashcopy", "create", "disk", "wal", "good")
        now = {name: fill(handle) for name, handle in handles.items()}
        site.farcopy("flashcopy", "create", "wal", "before-restore-1")
        done = self.restore(site, "disk", "wal", "good", "--yes")
        self.assertIn("before-restore-2", done.stdout)
        for name in handles:
            self.assertEqual(site.read(name), first[name], "at once")
            self.assertEqual(site.read(f"{name}@before-restore-2"), now[name], "while it flows back")
        handle = site.connect("disk")
        handle.pwrite(b"h" * 10 * GRAIN, 5 * GRAIN)
        self.finished(site)
        image = first["disk"][:5 * GRAIN] + b"h" * 10 * GRAIN + first["disk"][15 * GRAIN:]
        expected = {"disk": image, "wal": first["wal"]}
        for restarted in (False, True):
            for name in handles:
                self.assertEqual(site.read(name), expected[name])
                self.assertEqual(site.read(f"{name}@before-restore-2"), now[name])
                self.assertEqual(site.read(f"{name}@good"), first[name])
            site.kill()
            site.start()
        # There and back again.
        self.restore(site, "disk", "wal", "before-restore-2")
        for name in handles:
            self.assertEqual(site.read(name), now[name])
            self.assertEqual(site.read(f"{name}@before-restore-3"), expected[name])
        self.finished(site)
        site.farcopy("flashcopy", "withdraw", "disk", "wal", "before-restore-3")
        wait_for(lambda: "restore-3" not in site.farcopy("flashcopy", "list").stdout, what="the withdrawal")
        for name in handles:
            self.assertEqual(site.read(name), now[name])
            self.assertEqual(site.read(f"{name}@good"), first[name])

    def test_it_survives_power_loss_if_the_chain_does(self):
        site = self.solo()
        handle = site.connect("disk")
        fill(handle)
        site.farcopy("flashcopy", "create", "disk", "loose")
        now = fill(handle)
        self.restore(site, "disk", "loose", "--yes")
        self.finished(site)
        self.assertFalse(self.state(site, "disk", "before-restore-1")["survives_power_loss"])
        site.farcopy("flashcopy", "withdraw", "disk", "loose")
        site.farcopy("flashcopy", "withdraw", "disk", "before-restore-1")
        wait_for(lambda: site.farcopy("flashcopy", "list").stdout == "", what="the withdrawals")
        handle = site.connect("disk")
        now = fill(handle)
        site.farcopy("flashcopy", "create", "disk", "good", "--durable")
        later = fill(handle)
        self.restore(site, "disk", "good", "--yes")
        self.assertTrue(self.state(site, "disk", "before-restore-1")["survives_power_loss"])
        site.lose_power()
        site.start()
        self.assertEqual(site.read("disk"), now)
        self.assertEqual(site.read("disk@before-restore-1"), later)
        self.finished(site)
        self.assertEqual(site.read("disk@before-restore-1"), later)

    def test_a_full_target_ends_what_is_kept_and_the_restore_goes_on(self):
        site = self.solo(start=False)
        state = f"{site.path}/state"
        os.makedirs(state)
        run("mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", state)
        self.addCleanup(run, "umount", "-l", state, check=False)
        site.start()
        handle = site.connect("disk")
        first = fill(handle)
        outside = os.path.join(self.directory, "good.img")
        site.farcopy("flashcopy", "create", "disk", "good", "--target", outside)
        fill(handle)
        end(handle)
        filler = f"{state}/filler"
        room = os.statvfs(state)
        with open(filler, "wb") as file:
            file.write(bytes(room.f_bavail * room.f_bsize - 2 * MIB))
        wait_for(lambda: self.restore(site, "disk", "good", check=False).returncode == 0, what="the host to be gone")
        self.finished(site)
        kept = self.state(site, "disk", "before-restore-1")
        self.assertEqual(kept["state"], "failed")
        self.assertIn("No space left", kept["reason"])
        self.assertIn("'before-restore-1' has failed", site.farcopy("events").stdout)
        self.assertEqual(site.read("disk"), first)
        site.kill()
        os.unlink(filler)
        site.start()
        self.assertEqual(site.read("disk"), first)

    # Steps

    def test_a_kill_at_any_step_leaves_all_or_nothing(self):
        library = os.path.join(self.directory, "kill_at_flush.so")
        run("clang", "-O1", "-shared", "-fPIC", "-o", library, os.path.join(ROOT, "Tests/blackbox/kill_at_flush.c"))
        order = os.path.join(self.directory, "kill-at")
        site = self.solo(("disk", "wal"), start=False)
        site.environment = {**os.environ, "LD_PRELOAD": library, "FARCOPY_KILL_AT": order}
        site.start()
        handles = {name: site.connect(name) for name in ("disk", "wal")}
        first = {name: fill(handle) for name, handle in handles.items()}
        site.farcopy("flashcopy", "create", "disk", "wal", "good")
        now = {name: fill(handle) for name, handle in handles.items()}
        end(*handles.values())
        outcomes = []
        for step in range(1, 100):
            with open(order, "w") as file:
                file.write(str(step))
            done = self.restore(site, "disk", "wal", "good", "--yes", check=False)
            os.unlink(order)
            if done.returncode == 0:
                break
            site.process.wait(timeout=20)
            site.end()
            site.start()
            restored = site.read("disk") == first["disk"]
            expected = first if restored else now
            outcomes.append(restored)
            for name in handles:
                self.assertEqual(site.read(name), expected[name], f"{name}, killed at flush {step}, restored: {restored}")
            copies = {name: [c["name"] for c in site.status()["volumes"][name]["flashcopies"]] for name in handles}
            if not restored:
                wait_for(lambda: all([c["name"] for c in v["flashcopies"]] == ["good"] for v in site.status()["volumes"].values()),
                         what="what was kept to go")
                continue
            self.assertEqual(copies, {name: ["good", "before-restore-1"] for name in handles})
            for name in handles:
                self.assertEqual(site.read(f"{name}@before-restore-1"), now[name])
            self.finished(site)
            # Back to where this began.
            self.restore(site, "disk", "wal", "before-restore-1", "--yes")
            self.finished(site)
            for name in handles:
                self.assertEqual(site.read(name), now[name])
            for copy in ("before-restore-2", "before-restore-1"):
                site.farcopy("flashcopy", "withdraw", "disk", "wal", copy)
            wait_for(lambda: "restore-" not in site.farcopy("flashcopy", "list").stdout, what="the withdrawals")
        else:
            self.fail("it never came to an end")
        time.sleep(0.2)
        if site.process.poll() is not None:  # at a flush of what goes on behind the answer
            site.end()
            site.start()
        self.assertGreater(outcomes.count(False), 5)
        self.assertGreater(outcomes.count(True), 0, "between the first decision and the last")
        for name in handles:
            self.assertEqual(site.read(name), first[name])
