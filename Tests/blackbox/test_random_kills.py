"""FlashCopies through fifty random kills: each still is exactly the image of its moment."""

import faulthandler
import json
import random
import threading

import nbd

from sites import SiteTest, wait_for

SIZE = 8 << 20


class Writer(threading.Thread):
    """Writes at random places until the server is gone."""

    def __init__(self, site, seed):
        super().__init__(daemon=True)
        self.handle, self.random = site.connect("disk"), random.Random(seed)
        self.paused, self.idle = threading.Event(), threading.Event()

    def run(self):
        try:
            while True:
                while self.paused.is_set():
                    self.idle.set()
                    if self.handle.pread(512, 0) is None:
                        return
                self.idle.clear()
                at = self.random.randrange(SIZE // 512 - 128) * 512
                self.handle.pwrite(self.random.randbytes(self.random.choice([512, 4096, 12288, 65536])), at)
        except nbd.Error:
            self.idle.set()


class RandomKills(SiteTest):
    def test_fifty_kills(self):
        faulthandler.dump_traceback_later(500, exit=True)
        seed = random.randrange(1 << 32)
        self.random = random.Random(seed)
        site = self.site("solo", {"disk": "8MiB"})
        images = {}
        try:
            for number in range(50):
                self.round(site, images, number)
        except BaseException:
            print(f"seed {seed}")
            raise

    def round(self, site, images, number):
        writer = Writer(site, self.random.randrange(1 << 32))
        writer.start()
        killer = threading.Timer(self.random.uniform(0.1, 0.9), site.kill)
        killer.start()
        # Commands whose answer did not come may have been carried out, or not.
        unsure = None
        try:
            for step in range(20):
                unsure = self.command(site, images, writer, f"n{number}-{step}")
        except (AssertionError, nbd.Error):
            unsure = self.tried
        killer.join()
        writer.paused.clear()
        writer.join(timeout=30)
        self.assertFalse(writer.is_alive())
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

    def command(self, site, images, writer, fresh):
        self.tried = None
        names = sorted(images)
        kind = self.random.choice(["create", "create", "clone", "write", "refresh", "withdraw"])
        name = self.random.choice(names) if names else None
        options = self.random.sample([["--copy", "--rate", "0"], ["--writable"], ["--durable"]], k=self.random.randrange(3))
        options = [word for option in options for word in option]
        if kind == "create" and len(names) < 10:
            self.tried = fresh
            writer.paused.set()
            writer.idle.wait(timeout=30)
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
            writer.paused.set()
            writer.idle.wait(timeout=30)
            image = site.read("disk")
            site.farcopy("flashcopy", "refresh", "disk", name)
            writer.paused.clear()
            images[name] = image
        elif kind == "withdraw" and name and len(names) > 3:
            self.tried = name
            del images[name]
            site.farcopy("flashcopy", "withdraw", "disk", name)
            wait_for(lambda: f"disk@{name}\t" not in site.farcopy("flashcopy", "list").stdout, what="the withdrawal")
        self.tried = None
        return None
