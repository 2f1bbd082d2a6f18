"""FlashCopies through fifty random kills: each still is exactly the image of its moment. Until the kill begins every command succeeds, and
in the end enough of each kind have."""

import collections
import faulthandler
import json
import random
import threading
import time

import nbd

from sites import SiteTest, wait_for

SIZE = 8 << 20
# What has succeeded at least; on a busy machine it takes more than fifty rounds.
LEAST = {"create": 10, "clone": 6, "write": 6, "refresh": 6, "withdraw": 5, "compare": 60}


class Killer(threading.Thread):
    """Kills a site after a while. Only after `begun` may anything of it be gone."""

    def __init__(self, site, seconds):
        super().__init__(daemon=True)
        self.site, self.seconds = site, seconds
        self.begun, self.problem = threading.Event(), None

    def run(self):
        time.sleep(self.seconds)
        self.begun.set()
        try:
            self.site.kill()
        except BaseException as error:  # it had ended by itself
            self.problem = error

    def end(self):
        self.join(timeout=60)
        if self.problem:
            raise self.problem


class Writer(threading.Thread):
    """Writes at random places until the server is gone."""

    def __init__(self, site, seed, killer):
        super().__init__(daemon=True)
        self.handle, self.random = site.connect("disk"), random.Random(seed)
        self.killer, self.problem = killer, None
        self.paused, self.idle = threading.Event(), threading.Event()

    def pause(self):
        """On return nothing of it is under way, or it has ended with the server."""
        self.paused.set()
        self.idle.clear()
        while not self.idle.wait(timeout=0.05) and self.is_alive():
            pass

    def run(self):
        try:
            while True:
                while self.paused.is_set():
                    self.idle.set()
                    self.handle.pread(512, 0)  # fails when the server is gone
                self.idle.clear()
                at = self.random.randrange(SIZE // 512 - 128) * 512
                self.handle.pwrite(self.random.randbytes(self.random.choice([512, 4096, 12288, 65536])), at)
        except nbd.Error as error:
            self.problem = None if self.killer.begun.is_set() else error
            self.idle.set()


class RandomKills(SiteTest):
    def test_fifty_kills(self):
        faulthandler.dump_traceback_later(500, exit=True)
        seed = random.randrange(1 << 32)
        self.random = random.Random(seed)
        site = self.site("solo", {"disk": "8MiB"})
        images = {}
        self.succeeded = collections.Counter()
        try:
            for number in range(150):
                if number >= 50 and all(self.succeeded[kind] >= least for kind, least in LEAST.items()):
                    break
                self.round(site, images, number)
        except BaseException:
            print(f"seed {seed}")
            raise
        print(f"  {dict(self.succeeded)}")
        for kind, least in LEAST.items():
            self.assertGreaterEqual(self.succeeded[kind], least, f"too few of {kind} have succeeded for this to test anything")

    def round(self, site, images, number):
        killer = Killer(site, self.random.uniform(0.1, 0.9))
        writer = Writer(site, self.random.randrange(1 << 32), killer)
        writer.start()
        killer.start()
        # Commands whose answer did not come may have been carried out, or not.
        unsure = None
        try:
            for step in range(20):
                unsure = self.command(site, images, writer, f"n{number}-{step}")
        except (AssertionError, nbd.Error):
            if not killer.begun.is_set():
                raise
            unsure = self.tried
        killer.end()
        writer.paused.clear()
        writer.join(timeout=30)
        self.assertFalse(writer.is_alive())
        if writer.problem:
            raise writer.problem
        site.start()
        found = json.loads(site.farcopy("flashcopy", "list", "--json").stdout)
        states = {c["name"]: c["state"] for c in found}
        if unsure:
            images.pop(unsure, None)
            if unsure in states and states[unsure] not in ("withdrawing", "creating"):
                site.farcopy("flashcopy", "withdraw", "disk", unsure, check=False)
        for name, image in images.items():
            self.assertEqual(states.get(name), "active", (name, found, site.farcopy("events").stdout, site.tail()))
            self.assertEqual(site.read(f"disk@{name}"), image, f"{name} in round {number}")
            self.succeeded["compare"] += 1

    def command(self, site, images, writer, fresh):
        self.tried = None
        names = sorted(images)
        kind = self.random.choice(["create", "create", "clone", "write", "refresh", "withdraw"])
        name = self.random.choice(names) if names else None
        options = self.random.sample([["--copy", "--rate", "0"], ["--writable"], ["--durable"]], k=self.random.randrange(3))
        options = [word for option in options for word in option]
        if kind == "create" and len(names) < 10:
            self.tried = fresh
            writer.pause()
            image = site.read("disk")
            site.farcopy("flashcopy", "create", "disk", fresh, *options)
            writer.paused.clear()
            images[fresh] = image
        elif kind == "clone" and name and len(names) < 10:
            self.tried = fresh
            words = [word for word in options if word != "--durable"]
            site.farcopy("flashcopy", "clone", "disk", name, fresh, *words)
            images[fresh] = images[name]
        elif kind == "write" and name:
            self.tried = name
            site.farcopy("flashcopy", "set", "disk", name, "--writable")
            handle = site.connect(f"disk@{name}")
            image = bytearray(images[name])
            for _ in range(10):
                at, piece = self.random.randrange(SIZE - 8192), self.random.randbytes(self.random.randrange(1, 8192))
                handle.pwrite(piece, at)
                image[at:at + len(piece)] = piece
            images[name] = bytes(image)
        elif kind == "refresh" and name:
            self.tried = name
            writer.pause()
            image = site.read("disk")
            site.farcopy("flashcopy", "refresh", "disk", name)
            writer.paused.clear()
            images[name] = image
        elif kind == "withdraw" and name and len(names) > 3:
            self.tried = name
            del images[name]
            site.farcopy("flashcopy", "withdraw", "disk", name)
            wait_for(lambda: f"disk@{name}\t" not in site.farcopy("flashcopy", "list").stdout, what="the withdrawal")
        if self.tried:
            self.succeeded[kind] += 1
        self.tried = None
        return None
