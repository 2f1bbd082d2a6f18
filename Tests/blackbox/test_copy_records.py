"""FlashCopies and their records at the moments that matter: a copy is written down before it takes old content, and what a killed process had
only in its mapping is on stable storage before anybody relies on it."""

import random
import threading

import nbd

from test_order import FLUSHES, MIB, PAGE, OrderTest


class Writer(threading.Thread):
    """Overwrites a volume until the server is gone."""

    def __init__(self, site):
        super().__init__(daemon=True)
        self.handle, self.count = site.connect("disk"), 0

    def run(self):
        try:
            while True:
                self.handle.pwrite(random.randbytes(PAGE), random.randrange(4 * MIB // PAGE) * PAGE)
                self.count += 1
        except nbd.Error:
            pass


class CopyRecords(OrderTest):
    def test_kills_while_a_copy_is_created(self):
        """From the moment that it takes old content an older copy reads through it; so it must be found again, and hand over."""
        for skip in (0, 1):
            for call in ("pwrite", "fdatasync"):
                with self.subTest(call, skip=skip):
                    site = self.solo()
                    site.farcopy("flashcopy", "create", "disk", "older")
                    image = site.read("disk@older")
                    writers = [Writer(site) for _ in range(4)]
                    for writer in writers:
                        writer.start()
                    site.recorder.fail(call, "volume.record", 0, skip=skip)
                    # What a durable one relies on is flushed between its two records.
                    site.farcopy("flashcopy", "create", "disk", "newer", "--durable", check=False)
                    self.assertEqual(site.process.wait(30), -9, "the record was not saved so often")
                    for writer in writers:
                        writer.join(30)
                        self.assertGreater(writer.count, 0)
                    site.end()
                    site.recorder.fail("none", "")
                    site.start()
                    self.assertEqual(site.read("disk@older"), image)
                    if (call, skip) != ("fdatasync", 1):  # then it had been written that it is there
                        self.assertNotIn("newer", site.farcopy("flashcopy", "list").stdout)
                    self.put_away(site)

    def test_copies_taken_together_are_all_there_or_none(self):
        """The last record cannot be saved any more once it may say that its copy is there: the command has failed, and the site ends."""
        for call in ("pwrite", "fdatasync"):
            with self.subTest(call):
                site = self.site("solo", {"a": "1MiB", "b": "1MiB", "c": "1MiB"})
                site.recorder.fail(call, "volumes/c/volume.record", skip=1, count=1000)
                done = site.farcopy("flashcopy", "create", "a", "b", "c", "copy", "--durable", check=False)
                self.assertNotEqual(done.returncode, 0)
                site.kill()
                site.recorder.fail("none", "")
                site.start()
                self.assertIn(site.farcopy("flashcopy", "list").stdout.count("@copy"), (0, 3))
                self.put_away(site)

    def test_bits_that_a_killed_process_had_are_flushed_before_the_site_is_ready(self):
        """A write relies on the bit of a durable copy; power loss must not take one back that was in the mapping alone."""
        site = self.solo()
        for name, options in (("plain", ()), ("durable", ("--durable",)), ("filled", ("--copy", "--rate", "0"))):
            site.farcopy("flashcopy", "create", "disk", name, *options)
        self.write(site)
        site.kill()
        site.recorder.events()
        site.start()
        flushed = {path for kind, path in site.recorder.events() if kind in FLUSHES}
        bitmaps = [path for path in flushed if path.startswith("/state/volumes/disk/copies/") and path.endswith(".bitmap")]
        self.assertEqual(len(bitmaps), 3, flushed)


if __name__ == "__main__":
    import unittest
    unittest.main()
