"""What lies on disk: damage is recognised, and refused or mended, never taken for good; `inspect` and `adopt`."""

import json
import os
import random
import shutil
import struct
import tempfile
import time

import nbd

from sites import FARCOPY, SiteTest, crc32c, rewrite_record, run, wait_for
from test_order import OrderTest


class Metadata(SiteTest):
    def volume(self, site, name="disk"):
        return os.path.join(site.path, "state", "volumes", name)

    def flip(self, path, offset, bit=1):
        with open(path, "r+b") as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ bit]))

    def solo(self):
        site = self.site("solo", {"disk": "16MiB"})
        handle = site.connect("disk")
        data = random.randbytes(4 << 20)
        handle.pwrite(data, 0)
        site.farcopy("flashcopy", "create", "disk", "copy")
        handle.pwrite(bytes(1 << 20), 1 << 20)
        return site, data + bytes(12 << 20)

    def test_a_torn_record_falls_back_and_a_broken_one_is_refused(self):
        site, image = self.solo()
        site.stop()
        record = f"{self.volume(site)}/volume.record"
        shown = run(FARCOPY, "inspect", record).stdout
        newest = next(line for line in shown.splitlines() if "current" in line)
        offset = int(newest.split()[2].rstrip(":"))
        self.flip(record, offset + 60)
        self.assertIn(f"copy at {offset}: damaged", run(FARCOPY, "inspect", record).stdout)
        # The record before says that the copy was there, but not that the stop was clean.
        site.start()
        self.assertEqual(site.read("disk@copy"), image)
        site.stop()
        for at in (0, 256 << 10):
            self.flip(record, at + 60)
        self.refused(site, "volume.record holds no valid record", "remove it to begin anew")

    def test_flipped_bits_and_short_files_end_the_copies_that_they_describe(self):
        for damage in ("flip", "short", "missing", "killed", "header", "target"):
            with self.subTest(damage):
                site = self.site(f"solo-{damage}", {"disk": "16MiB"})
                handle = site.connect("disk")
                for name in ("a", "b", "c"):
                    site.farcopy("flashcopy", "create", "disk", name)
                    handle.pwrite(random.randbytes(64 << 10), random.randrange(16) << 20)
                image = site.read("disk@c")
                now = site.read("disk")
                # Only a stop in order leaves checksums.
                site.kill() if damage == "killed" else site.stop()
                ids = sorted(name for name in os.listdir(f"{self.volume(site)}/copies") if name.endswith(".bitmap"))
                path = f"{self.volume(site)}/copies/{ids[1]}"
                if damage == "flip":
                    self.flip(path, 4096 + 17)
                elif damage == "short":
                    os.truncate(path, 4096)
                elif damage in ("missing", "killed"):
                    os.unlink(path)
                elif damage == "target":
                    os.truncate(path.replace(".bitmap", ".target"), 1 << 20)
                else:
                    self.flip(path, 20)
                site.start()
                states = {c["name"]: c for c in json.loads(site.farcopy("flashcopy", "list", "--json").stdout)}
                self.assertEqual([states[n]["state"] for n in "abc"], ["lost", "lost", "active"])
                self.assertIn("damaged", states["b"]["reason"])
                self.assertEqual(site.read("disk@c"), image)
                self.assertEqual(site.read("disk"), now)
                site.farcopy("flashcopy", "withdraw", "disk", "b")
                self.assertNotIn("disk@b", site.farcopy("flashcopy", "list").stdout)

    def test_damaged_recording_bitmaps_compare_everything(self):
        for damage in ("flip", "short"):
            with self.subTest(damage):
                east, west = self.pair({"disk": "8MiB"}, interval="manual")
                handle = east.connect("disk")
                handle.pwrite(random.randbytes(2 << 20), 0)
                east.cycle()
                handle.pwrite(random.randbytes(64 << 10), 1 << 20)
                east.stop()
                path = f"{self.volume(east)}/recording.bitmap"
                if damage == "flip":
                    self.flip(path, 4096 + 40)
                else:
                    os.truncate(path, 5000)
                east.start()
                self.assertIn("recording.bitmap", east.farcopy("events").stdout)
                self.assertEqual(east.status()["groups"]["shop"]["pending_bytes"], 8 << 20)
                wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")
                point = east.cycle()
                self.assertEqual(west.read(f"disk@{point}"), east.read("disk"))
                self.put_away(east, west)

    def test_a_start_that_ends_after_it_found_damage_is_not_trusted_by_the_next(self):
        """What takes the place of the damaged bitmap says the worst from the beginning."""
        east, west = self.pair({"disk": "8MiB"}, interval="manual")
        handle = east.connect("disk")
        handle.pwrite(random.randbytes(2 << 20), 0)
        east.cycle()
        west.stop()
        handle.pwrite(random.randbytes(64 << 10), 1 << 20)
        east.kill()
        self.flip(f"{self.volume(east)}/recording.bitmap", 20)
        east.edit('isolation_timeout = "300ms"', 'isolation_timeout = "60s"')
        east.start(wait=False)  # it waits for its peer before it serves anything
        wait_for(lambda: "the worst is assumed" in open(east.log).read(), what="the finding")
        east.kill()
        east.edit('isolation_timeout = "60s"', 'isolation_timeout = "300ms"')
        west.start()
        east.start()
        wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")
        point = east.cycle()
        self.assertEqual(west.read(f"disk@{point}"), east.read("disk"))

    def test_a_damaged_recovery_point_voids_it_and_older_ones(self):
        east, west = self.pair({"disk": "8MiB"}, interval="manual")
        handle = east.connect("disk")
        points = []
        for number in range(4):
            handle.pwrite(random.randbytes(64 << 10), number << 20)
            points.append(east.cycle())
        image = west.read(f"disk@{points[3]}")
        west.stop()
        self.flip(f"{self.volume(west)}/copies/{points[1]}.bitmap", 4096 + 3)
        west.start()
        self.assertEqual([p["id"] for p in west.points()], points[2:])
        self.assertEqual(west.read(f"disk@{points[3]}"), image)
        self.assertIn("are void", west.farcopy("events").stdout)
        wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")
        west.stop()
        self.flip(f"{self.volume(west)}/copies/{points[3]}.bitmap", 4096 + 3)
        west.start()
        self.assertEqual(west.points(), [])
        wait_for(lambda: east.group()["state"] in ("copying", "mirroring"), what="the first copy")
        point = east.cycle()
        self.assertEqual(west.read(f"disk@{point}"), east.read("disk"))

    def test_metadata_of_another_volume_or_a_newer_version_is_refused(self):
        site = self.site("solo", {"disk": "16MiB", "other": "16MiB"})
        for name in ("disk", "other"):
            site.farcopy("flashcopy", "create", name, "copy", "--copy")  # with a log of changes
        site.stop()
        kept = os.path.join(self.directory, "kept")
        shutil.copytree(self.volume(site), kept)
        # The bitmap of another volume.
        shutil.copy(f"{self.volume(site, 'other')}/recording.bitmap", f"{self.volume(site)}/recording.bitmap")
        self.refused(site, "recording.bitmap belongs to something else")
        # The whole directory of another volume.
        shutil.rmtree(self.volume(site))
        shutil.copytree(self.volume(site, "other"), self.volume(site))
        self.refused(site, "is of volume 'other'")
        # A newer record, and a newer bitmap.
        shutil.rmtree(self.volume(site))
        shutil.copytree(kept, self.volume(site))
        rewrite_record(f"{self.volume(site)}/volume.record", lambda record: record.update(format=99))
        self.refused(site, "written by a newer farcopy (format 99")
        for name in ("recording.bitmap", "activity.log"):
            shutil.rmtree(self.volume(site))
            shutil.copytree(kept, self.volume(site))
            with open(f"{self.volume(site)}/{name}", "r+b") as file:
                head = bytearray(file.read(68))
                head[8:12] = struct.pack("<I", 99)
                head[64:68] = struct.pack("<I", crc32c(head[:64]))
                file.seek(0)
                file.write(head)
            self.refused(site, f"{name} was written by a newer farcopy (format 99")
        shutil.rmtree(self.volume(site))
        shutil.copytree(kept, self.volume(site))
        site.start()
        self.assertIn("disk@copy", site.farcopy("flashcopy", "list").stdout)

    def test_an_exchanged_or_changed_volume_file_is_refused_until_adopted(self):
        for change in ("exchanged", "written"):
            with self.subTest(change):
                site = self.site(f"solo-{change}", {"disk": "16MiB"})
                site.connect("disk").pwrite(random.randbytes(1 << 20), 0)
                site.farcopy("flashcopy", "create", "disk", "copy")
                site.stop()
                path = f"{site.path}/disk.img"
                if change == "exchanged":
                    shutil.copy(path, path + ".new")
                    os.rename(path + ".new", path)
                    expected = "is another file than the one that was served last"
                else:
                    time.sleep(0.02)
                    with open(path, "r+b") as file:
                        file.write(b"behind your back")
                    expected = "while Farcopy was stopped"
                self.refused(site, expected, "the FlashCopies 'copy' would be lost", "farcopy adopt disk")
                done = run(FARCOPY, "adopt", "disk", "--config", site.config)
                self.assertIn("lost FlashCopies: copy", done.stdout)
                site.start()
                states = json.loads(site.farcopy("flashcopy", "list", "--json").stdout)
                self.assertEqual([c["state"] for c in states], ["lost"])
                with open(path, "rb") as file:
                    self.assertEqual(site.read("disk"), file.read())

    def test_points_of_a_primary_are_void_once_its_file_is_adopted(self):
        """It keeps them from when it was secondary, and they read through the file."""
        east, west = self.pair({"disk": "8MiB"}, interval="manual")
        east.connect("disk").pwrite(random.randbytes(8 << 20), 0)
        point = east.cycle()
        east.kill()
        west.farcopy("failover", "shop")
        wait_for(lambda: west.status()["volumes"]["disk"]["restoring_bytes"] == 0, what="the restore")
        self.assertIn(point, [one["id"] for one in west.points()])
        west.stop()
        time.sleep(0.02)
        with open(west.image("disk"), "r+b") as file:
            file.write(b"behind your back")
        self.refused(west, "its recovery points would be lost", "farcopy adopt disk")
        run(FARCOPY, "adopt", "disk", "--config", west.config)
        west.start()
        self.assertEqual(west.points(), [])
        with self.assertRaises(nbd.Error):
            west.connect(f"disk@{point}")

    def test_a_changed_primary_without_copies_is_sent_anew(self):
        east, west = self.pair({"disk": "8MiB"}, interval="manual")
        east.connect("disk").pwrite(random.randbytes(1 << 20), 0)
        east.cycle()
        east.stop()
        time.sleep(0.02)
        with open(f"{east.path}/disk.img", "r+b") as file:
            file.seek(5 << 20)
            file.write(b"behind your back")
        east.start()
        self.assertIn("every grain counts as changed", east.farcopy("events").stdout)
        wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")
        point = east.cycle()
        self.assertEqual(west.read(f"disk@{point}"), east.read("disk"))

    def test_inspect_tells_what_there_is(self):
        site, _ = self.solo()
        site.farcopy("flashcopy", "create", "disk", "filled", "--copy")  # only those have changes logged
        state = os.path.join(site.path, "state")
        shown = run(FARCOPY, "inspect", state).stdout
        for text in ("site.record: record", "volume.record: record", "recording, format 1", "activityLog, format 1",
                     "bitmap 0 at 4096: 256 of 4096 bits set", "grains of 4096"):
            self.assertIn(text, shown)
        done = run(FARCOPY, "inspect", site.config, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn("neither a record nor a bitmap file", done.stderr)

    def test_sixteen_tebibytes_open_and_copy(self):
        # ext4 has no files of this size; tmpfs has.
        self.directory = tempfile.mkdtemp(prefix="farcopy-test-", dir="/dev/shm")
        site = self.site("solo", {"disk": "16TiB"})
        handle = site.connect("disk")
        handle.pwrite(b"far" * 1000, (16 << 40) - 3000)
        site.farcopy("flashcopy", "create", "disk", "copy")
        handle.pwrite(bytes(3000), (16 << 40) - 3000)
        self.assertEqual(site.connect("disk@copy").pread(3000, (16 << 40) - 3000), b"far" * 1000)
        site.kill()
        site.start()
        self.assertEqual(site.connect("disk@copy").pread(3000, (16 << 40) - 3000), b"far" * 1000)
        self.assertLess(site.resident(), 400 << 20)


class Start(OrderTest):
    def test_a_record_that_is_found_is_made_durable(self):
        """What a killed process had written and not flushed counts from here on."""
        site = self.site("solo", {"disk": "16MiB"})
        site.kill()
        site.recorder.events()
        site.start()
        self.assertIn("fdatasync", [kind for kind, path in site.recorder.events() if path.endswith("/site.record")])
