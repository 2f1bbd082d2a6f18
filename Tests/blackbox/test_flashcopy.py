"""FlashCopies as a user takes them."""

import json
import random
import threading

import nbd

import closedcut
from sites import SiteTest, read_handle, wait_for

SIZE = 16 << 20
CUT = 8 << 20


class FlashCopies(SiteTest):
    def fill(self, handle, seed):
        data = random.Random(seed).randbytes(SIZE)
        for at in range(0, SIZE, 1 << 20):
            handle.pwrite(data[at:at + (1 << 20)], at)
        return data

    def overwrite(self, handle, model, count=300):
        """Writes, zeroes and trims of odd sizes at random places; the model follows."""
        model = bytearray(model)
        for _ in range(count):
            at = random.randrange(SIZE // 512) * 512
            length = min(SIZE - at, random.choice([512, 1024, 4096, 5120, 65536, 300_032, 1 << 20]))
            if random.random() < 0.2:
                handle.zero(length, at)
                model[at:at + length] = bytes(length)
            else:
                piece = random.randbytes(length)
                handle.pwrite(piece, at)
                model[at:at + length] = piece
        return bytes(model)

    def list(self, site):
        return json.loads(site.farcopy("flashcopy", "list", "--json").stdout)

    def test_copy_is_the_moment(self):
        site = self.site("solo", {"disk": "16MiB"})
        handle = site.connect("disk")
        first = self.fill(handle, 1)
        self.assertEqual(site.farcopy("flashcopy", "create", "disk", "one").stdout, "disk@one\n")
        now = self.overwrite(handle, first)
        site.farcopy("flashcopy", "create", "disk", "two")
        second = now
        now = self.overwrite(handle, now)
        self.assertEqual(site.read("disk@one"), first)
        self.assertEqual(site.read("disk@two"), second)
        self.assertEqual(site.read("disk"), now)
        with self.assertRaises(nbd.Error):
            site.connect("disk@one").pwrite(b"x" * 512, 0)

    def test_survives_sigkill_and_clean_restart(self):
        site = self.site("solo", {"disk": "16MiB"})
        now = first = self.fill(site.connect("disk"), 2)
        site.farcopy("flashcopy", "create", "disk", "kept")
        for _ in range(8):
            handle = site.connect("disk")
            stop = threading.Event()

            def load():
                try:
                    while not stop.is_set():
                        handle.pwrite(random.randbytes(8192), random.randrange(SIZE - 8192))
                except nbd.Error:
                    pass
            thread = threading.Thread(target=load)
            thread.start()
            stop.wait(random.uniform(0.05, 0.4))
            site.kill()
            stop.set()
            thread.join()
            site.start()
            self.assertEqual(site.read("disk@kept"), first)
        now = site.read("disk")
        site.stop()
        site.start()
        self.assertEqual(site.read("disk@kept"), first)
        self.assertEqual(site.read("disk"), now)

    def test_withdraw_in_the_middle_hands_over(self):
        site = self.site("solo", {"disk": "16MiB"})
        handle = site.connect("disk")
        now = self.fill(handle, 3)
        images = {}
        for name in ("a", "b", "c", "d"):
            site.farcopy("flashcopy", "create", "disk", name)
            images[name] = now
            now = self.overwrite(handle, now, 80)
        for name in ("c", "b"):
            site.farcopy("flashcopy", "withdraw", "disk", name)
            wait_for(lambda: name not in [copy["name"] for copy in self.list(site)], what=f"the end of {name}")
            del images[name]
            now = self.overwrite(handle, now, 40)
            for left, image in images.items():
                self.assertEqual(site.read(f"disk@{left}"), image, f"{left} after {name} was withdrawn")
        with self.assertRaises(nbd.Error):
            site.connect("disk@b")

    def test_several_volumes_at_one_instant(self):
        site = self.site("solo", {"data": "8MiB", "log": "8MiB"})
        writers = closedcut.Writers(lambda: (site.connect("data"), site.connect("log")), CUT, 4)
        writers.start()
        for number in range(15):
            site.farcopy("flashcopy", "create", "data", "log", f"cut{number}")
        for number in range(15):
            images = [read_handle(site.connect(f"{name}@cut{number}")) for name in ("data", "log")]
            closedcut.check(*images, 4, CUT)
        writers.stop()
        self.assertEqual(writers.errors, [])

    def test_refusals(self):
        site = self.site("solo", {"disk": "16MiB"})
        site.farcopy("flashcopy", "create", "disk", "one")
        for words, expected in (
                (("create", "disk", "one"), "already"), (("create", "nothing", "x"), "no volume 'nothing'"),
                (("create", "disk", "12"), "no name"), (("withdraw", "disk", "two"), "no FlashCopy 'two'")):
            done = site.farcopy("flashcopy", *words, check=False)
            self.assertEqual(done.returncode, 1, words)
            self.assertIn(expected, done.stderr)
