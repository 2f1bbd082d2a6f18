"""Recovery points cost what has changed: a volume that did not has no files of a point, and is read through older ones."""

import os
import random
import resource

import nbd

from sites import FARCOPY, ROOT, SiteTest, rewrite_record, run, wait_for
from test_full_remote import fill_up
from test_order import OrderTest

MIB = 1 << 20
PAGE = 4096


class Points(SiteTest):
    def setUp(self):
        super().setUp()
        self.images = {}

    def write(self, site, volume, count=1):
        handle = site.connect(volume)
        for _ in range(count):
            handle.pwrite(random.randbytes(PAGE), random.randrange(MIB // PAGE) * PAGE)
        handle.flush()
        handle.shutdown()

    def cycle(self, east, *volumes):
        """A point before which these volumes were written to."""
        for volume in volumes:
            self.write(east, volume)
        number = east.cycle()
        self.images[number] = {volume: east.read(volume) for volume in ("a", "b", "c")}
        return number

    def files(self, site, volume):
        directory = f"{site.state}/volumes/{volume}/copies"
        return {int(name.split(".")[0]) for name in os.listdir(directory) if name.endswith(".bitmap")}

    def check(self, west, points):
        self.assertEqual([point["id"] for point in west.points()], points)
        for number in points:
            for volume, image in self.images[number].items():
                self.assertEqual(west.read(f"{volume}@{number}"), image, f"{volume}@{number}")

    def volumes(self, **options):
        east, west = self.pair({"a": "1MiB", "b": "1MiB", "c": "1MiB"}, interval="manual", **options)
        wait_for(west.points, what="the first copy")  # made unasked: point 1
        self.images[1] = {volume: bytes(MIB) for volume in "abc"}
        return east, west

    def series(self, east, west):
        """Points of which each has something else changed; the last three are kept."""
        first = self.cycle(east, "a", "b", "c")
        points = [first, *(self.cycle(east, *changed) for changed in ("a", "ab", "", "b", "a"))]
        kept = points[-3:]
        wait_for(lambda: self.files(west, "a") == {points[2], points[5]}, what="files of a to be those of points that changed it")
        self.assertEqual(self.files(west, "b"), {points[2], points[4]})
        self.assertEqual(self.files(west, "c"), {first}, "nothing was ever written to it again")
        self.check(west, kept)
        return kept

    def test_only_volumes_that_have_changed_have_files_of_a_point(self):
        east, west = self.volumes(keep=3)
        kept = self.series(east, west)
        for end in (west.kill, west.stop, west.lose_power):
            end()
            west.start()
            self.check(west, kept)
            # Nobody knows any more what was written since, or everybody does: no file is made in vain.
            wait_for(lambda: east.group()["state"] == "mirroring", what="the link")
            newest = self.cycle(east)
            kept = [*kept[1:], newest]
            self.check(west, kept)
            self.assertNotIn(newest, self.files(west, "a") | self.files(west, "b") | self.files(west, "c"))

    def test_an_older_point_becomes_the_volumes(self):
        """Of each volume whatever files hold it; and back again."""
        east, west = self.volumes(keep=3)
        kept = self.series(east, west)
        east.kill()
        west.farcopy("failover", "shop", "--point", str(kept[0]))
        for volume in "abc":
            self.assertEqual(west.read(volume), self.images[kept[0]][volume])
        wait_for(lambda: not any(volume["restoring_bytes"] for volume in west.status()["volumes"].values()), what="the restore")
        self.write(west, "c")
        self.check(west, kept)
        west.kill()
        west.start()
        self.check(west, kept)
        east.start()
        west.farcopy("resync", "shop", "--discard", "east", "--yes")
        wait_for(lambda: west.group()["state"] == "mirroring", what="the other direction")
        number = west.cycle()
        for volume in "abc":
            self.assertEqual(east.read(f"{volume}@{number}"), west.read(volume))

    def test_changes_between_points_that_one_copy_holds(self):
        """What NBD clients ask a point: which blocks differ from an older one, or from a FlashCopy."""
        east, west = self.volumes(keep=4)
        self.cycle(east, "a", "b", "c")
        older = self.cycle(east, "a")
        west.farcopy("flashcopy", "clone", "a", str(older), "trial")
        middle, newer = self.cycle(east), self.cycle(east, "a")

        def dirty(point, base):
            handle = nbd.NBD()
            handle.add_meta_context(f"qemu:dirty-bitmap:{base}")
            handle.connect_uri(west.uri(f"a@{point}"))
            found, at = [], 0
            handle.block_status(MIB, 0, lambda name, offset, entries, error: found.extend(entries) or 0)
            pages = set()
            for length, flags in zip(found[::2], found[1::2]):
                if flags:
                    pages |= set(range(at // PAGE, (at + length) // PAGE))
                at += length
            handle.shutdown()
            return pages

        def differing(one, other):
            one, other = self.images[one]["a"], self.images[other]["a"]
            return {page for page in range(MIB // PAGE) if one[page * PAGE:][:PAGE] != other[page * PAGE:][:PAGE]}
        self.assertEqual(dirty(middle, older), set())
        self.assertEqual(dirty(middle, "trial"), set())
        for base in (older, middle):
            self.assertTrue(differing(newer, base) <= dirty(newer, base))
            self.assertEqual(len(dirty(newer, base)), len(differing(newer, base)))

    def test_readers_keep_what_holds_their_point(self):
        """Whoever opened a point of a volume that did not change reads on when that point leaves, and files go after him."""
        east, west = self.volumes(keep=2)
        first = self.cycle(east, "a", "b", "c")
        second = self.cycle(east)
        reader = west.connect(f"b@{second}")
        for _ in range(4):
            self.cycle(east, "a", "b")
        self.assertIn(first, self.files(west, "b"))
        self.assertEqual(bytes(reader.pread(MIB, 0)), self.images[second]["b"])
        reader.shutdown()
        wait_for(lambda: first not in self.files(west, "b"), what="the files to go")
        self.assertEqual(self.files(west, "c"), {first})

    def test_points_are_dropped_whose_files_others_need(self):
        east, west = self.volumes(keep=8)
        points = [self.cycle(east, "a", "b", "c"), *(self.cycle(east, "a") for _ in range(3))]
        self.check(west, [1, *points])
        west.farcopy("points", "shop", "--drop", "1", str(points[0]), "--yes")
        self.check(west, points[1:])
        wait_for(lambda: self.files(west, "a") == set(points[1:]), what="the files of a to go")
        self.assertEqual(self.files(west, "b"), {points[0]})
        west.kill()
        west.start()
        self.check(west, points[1:])
        reader = west.connect(f"b@{points[1]}")
        west.farcopy("points", "shop", "--drop", str(points[1]), "--yes")
        self.assertEqual(bytes(reader.pread(MIB, 0)), self.images[points[2]]["b"], "it is the same of a later point")
        refused = west.farcopy("points", "shop", "--drop", str(points[3]), "--yes", check=False)
        self.assertIn("is the newest", refused.stderr)

    def test_a_state_directory_of_the_version_before(self):
        """Kept in states/: format 2 of the group's record, in which every volume has files of every point."""
        east, west = self.pair({"orders": "1MiB", "wal": "1MiB"}, interval="manual", keep=3, start=False)
        run("tar", "-xzf", f"{ROOT}/Tests/blackbox/states/format-2.tar.gz", "-C", self.directory, "--exclude=site.toml")
        for site in (east, west):
            for volume in ("orders", "wal"):
                # The files are others, and of another machine.
                rewrite_record(f"{site.state}/volumes/{volume}/volume.record", lambda record: record.update(file=None))
            site.start()
        self.assertEqual([point["id"] for point in west.points()], [4, 5, 6])

        def text(site, export):
            handle = site.connect(export)
            found = bytes(handle.pread(512, 8192)).rstrip(b".").decode()
            handle.shutdown()
            return found
        self.assertEqual([text(west, f"orders@{number}") for number in (4, 5, 6)], [f"orders as of point {n}" for n in (3, 4, 5)])
        self.assertEqual([text(west, f"wal@{number}") for number in (4, 5, 6)], [f"wal as of point {n}" for n in (1, 4, 4)])
        self.assertEqual(text(west, "orders@kept"), "orders as of point 3")
        self.assertEqual(text(east, "orders@monday"), "orders as of point 5")
        self.assertEqual(text(east, "orders"), "not yet sent")
        wait_for(lambda: east.group()["state"] == "mirroring", what="the link")
        number = east.cycle()
        self.assertEqual(text(west, f"orders@{number}"), "not yet sent")
        self.assertEqual(self.files(west, "wal") & {number}, set(), "it has not changed")
        self.assertIn('{"format":3,', run(FARCOPY, "inspect", f"{west.state}/groups/shop/group.record").stdout)
        for site in (west, east):
            site.kill()
            site.start()
        self.assertEqual([text(west, f"wal@{point}") for point in (5, 6, number)], ["wal as of point 4"] * 3)


class Descriptors(SiteTest):
    def open_files(self, site, what):
        directory, found = f"/proc/{site.process.pid}/fd", set()
        for number in os.listdir(directory):
            try:
                path = os.readlink(f"{directory}/{number}")
            except FileNotFoundError:
                continue
            if what in path:
                found.add(os.path.basename(path))
        return found

    def test_files_of_old_points_are_open_while_somebody_reads_them(self):
        east, west = self.pair({"a": "4MiB"}, interval="manual", keep=8)
        wait_for(west.points, what="the first copy")
        images, handle = {}, east.connect("a")
        for _ in range(6):
            handle.pwrite(random.randbytes(MIB), random.randrange(4) * MIB)
            images[east.cycle()] = bytes(handle.pread(4 * MIB, 0))
        newest = max(images)
        mine = {f"{newest}.target", f"{newest}.bitmap"}

        def settled():
            return self.open_files(west, "/copies/") == mine
        wait_for(settled, what="old files to be closed")
        for start in (lambda: None, lambda: (west.kill(), west.start()), lambda: (west.stop(), west.start())):
            start()
            wait_for(settled, what="old files to be closed after a start")
            readers = {number: west.connect(f"a@{number}") for number in sorted(images)[1:4]}
            for number, reader in readers.items():
                self.assertEqual(bytes(reader.pread(4 * MIB, 0)), images[number])
            self.assertIn(f"{min(readers)}.target", self.open_files(west, "/copies/"))
            for reader in readers.values():
                reader.shutdown()
            wait_for(settled, what="old files to be closed after their readers")
            for number, image in images.items():
                self.assertEqual(west.read(f"a@{number}"), image)
        # Whatever is under way in the background: a clone is handed over what it needs of points that leave.
        second = sorted(images)[1]
        west.farcopy("flashcopy", "clone", "a", str(second), "trial")
        handle.pwrite(random.randbytes(4 * MIB), 0)
        wait_for(lambda: east.group()["state"] == "mirroring", what="the link")
        east.cycle()
        west.farcopy("points", "shop", "--drop", *map(str, sorted(images)[:4]), "--yes")
        self.assertEqual(west.read("a@trial"), images[second])
        east.kill()
        west.farcopy("failover", "shop", "--point", str(sorted(images)[4]))
        self.assertEqual(west.read("a"), images[sorted(images)[4]])
        wait_for(lambda: not west.status()["volumes"]["a"]["restoring_bytes"], what="the restore")
        self.assertEqual(west.read("a"), images[sorted(images)[4]])

    def test_a_reader_waits_while_there_is_no_descriptor(self):
        east, west = self.pair({"a": "1MiB"}, interval="manual", keep=4, start=False)
        west.start()
        east.start()
        wait_for(west.points, what="the first copy")
        handle = east.connect("a")
        points = []
        for number in range(3):
            handle.pwrite(bytes([number + 1]) * PAGE, 0)
            points.append(east.cycle())
        reader = west.connect(f"a@{points[0]}")
        wait_for(lambda: self.open_files(west, "/copies/") == {f"{points[2]}.target", f"{points[2]}.bitmap"}, what="old files to be closed")
        hard = resource.prlimit(west.process.pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(west.process.pid, resource.RLIMIT_NOFILE, (3, hard))
        self.addCleanup(lambda: west.process and resource.prlimit(west.process.pid, resource.RLIMIT_NOFILE, (hard, hard)))
        buffer = nbd.Buffer(PAGE)
        cookie = reader.aio_pread(buffer, 0)
        for _ in range(10):
            reader.poll(50)
            self.assertFalse(reader.aio_command_completed(cookie))
        resource.prlimit(west.process.pid, resource.RLIMIT_NOFILE, (hard, hard))
        wait_for(lambda: reader.poll(50) >= 0 and reader.aio_command_completed(cookie), what="the answer")
        self.assertEqual(bytes(buffer.to_bytearray()), bytes([1]) * PAGE)


class UnsaidPoints(OrderTest):
    def test_files_of_points_that_failed_stay_until_that_is_recorded(self):
        """Otherwise a start, which finds the points in the record and not their files, voids every point up to there."""
        east, west = self.pair({"disk": "16MiB"}, interval="manual", start=False)
        state = f"{west.path}/state"
        os.makedirs(state)
        run("mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", state)
        self.addCleanup(run, "umount", "-l", state, check=False)
        west.start()
        east.start()
        for _ in range(4):
            self.write(east)
            east.cycle()
        east.kill()
        west.farcopy("failover", "shop")
        wait_for(lambda: not west.status()["volumes"]["disk"]["restoring_bytes"], what="the restore")
        before = [point["id"] for point in west.points()]
        filler = fill_up(state)
        west.recorder.fail("fdatasync", "group.record", count=1000)
        handle = west.connect("disk")
        handle.pwrite(random.randbytes(16 * MIB), 0)
        wait_for(lambda: "has failed" in west.farcopy("events").stdout, what="the failure")
        wait_for(lambda: west.recorder.failed() < 1000, what="a save that fails")
        west.kill()
        os.unlink(filler)
        west.recorder.fail("none", "")
        west.start()
        events = west.farcopy("events", "shop").stdout
        self.assertNotIn("void", events)
        self.assertIn("had failed when the last process ended", events)
        self.assertTrue({point["id"] for point in west.points()} <= set(before))
