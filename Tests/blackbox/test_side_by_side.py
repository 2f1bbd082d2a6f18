"""Groups of a site go on side by side: what one waits for, no other waits for, nor who asks how the site is."""

import subprocess

from sites import FARCOPY, run, wait_for
from test_order import OrderTest

SLOW = -8  # seconds that a call takes


class SideBySide(OrderTest):
    def groups(self):
        """Two groups of a volume each, over the same two sites."""
        sites = {}
        for name, role, peer in (("west", "secondary", "east"), ("east", "primary", "west")):
            sites[name] = self.site(
                name, {"a": "4MiB", "b": "4MiB"}, peers=[peer], groups="".join(
                    f'[groups.{volume}]\nvolumes = ["{volume}"]\nrole = "{role}"\npeer = "{peer}"\ninterval = "manual"\n'
                    for volume in "ab"))
        for group in "ab":
            wait_for(lambda: sites["west"].points(group), what="the first copy")
        return sites["east"], sites["west"]

    def slow(self, site, suffix, *words):
        """A command that is on its way when a call with such a path takes long."""
        site.recorder.fail("fdatasync", suffix, SLOW)
        command = self.spawn(FARCOPY, *words, "--control", site.control, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        wait_for(lambda: site.recorder.failed() == 0, what="the slow call")
        return command

    def is_complete(self, site):
        """The background copy is finished, and its data on stable storage."""
        return "the background copy of 'copy' is complete" in site.farcopy("events").stdout

    def test_a_target_that_takes_long(self):
        """The flush of a background copy, which may be of gigabytes: commits and commands of the other group go on meanwhile."""
        for name in ("east", "west"):
            with self.subTest(name):
                east, west = self.groups()
                site = {"east": east, "west": west}[name]
                if name == "east":
                    words = ("create", "a", "copy")
                else:
                    words = ("clone", "a", str(west.points("a")[-1]["id"]), "copy")
                target = f"{site.path}/slow.target"
                site.farcopy("flashcopy", *words, "--copy", "--rate", "2MiB", "--target", target)
                site.recorder.fail("fdatasync", "slow.target", SLOW)
                wait_for(lambda: site.recorder.failed() == 0, what="the slow call")
                for _ in range(3):
                    number = east.cycle("b")
                self.assertEqual(west.points("b")[-1]["id"], number)
                site.farcopy("flashcopy", "create" if name == "east" else "clone", "b",
                             *([] if name == "east" else [str(number)]), "other")
                self.assertFalse(self.is_complete(site), "nobody has waited for it")
                wait_for(lambda: self.is_complete(site), what="the end of the copy")
                self.put_away(east, west)

    def test_who_asks_waits_for_nobody(self):
        """The site's own thread waits for a record; status, points, events and metrics are answered."""
        east, west = self.groups()
        command = self.slow(east, "volumes/a/volume.record", "flashcopy", "create", "a", "copy")
        self.assertEqual(east.status()["groups"]["b"]["state"], "mirroring")
        east.farcopy("points", "b")
        east.farcopy("events")
        self.assertIn("farcopy_", run("curl", "-s", "--unix-socket", east.control[5:], "http://x/metrics").stdout)
        self.assertIsNone(command.poll(), "nobody has waited for it")
        self.assertEqual(command.wait(timeout=60), 0)
