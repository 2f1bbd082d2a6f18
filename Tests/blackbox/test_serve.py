"""Starting a site: what is wrong is told with file, line or object, before anything is touched. Commands and exit codes."""

import os
import subprocess

from sites import FARCOPY, Site, SiteTest, run


class Serve(SiteTest):
    def refused(self, site, *expected):
        done = subprocess.run([FARCOPY, "serve", "--config", site.config], capture_output=True, text=True, timeout=30,
                              stdin=subprocess.DEVNULL)
        self.assertEqual(done.returncode, 1, done.stderr)
        self.assertEqual(done.stdout, "")
        for words in expected:
            self.assertIn(words, done.stderr)
        return done.stderr

    def changed(self, old, new, volumes={"disk": "1MiB"}, **options):
        site = self.site("solo", dict(volumes), start=False, **options)
        site.edit(old, new)
        return site

    def assert_untouched(self, site):
        self.assertEqual(sorted(os.listdir(site.path)), ["log", "site.toml"] if os.path.exists(site.log) else ["site.toml"])

    def test_unknown_key(self):
        site = self.changed('size = "1MiB"', 'size = "1MiB"\nsise = 3')
        self.refused(site, "site.toml:11: unknown key 'volumes.disk.sise'")
        self.assert_untouched(site)

    def test_syntax_error(self):
        self.refused(self.changed('[nbd]', '[nbd'), "site.toml:6")

    def test_wrong_types_and_impossible_values(self):
        for old, new, expected in (
                ('size = "1MiB"', 'size = "1 apple"', "is '1 apple'"), ('size = "1MiB"', 'size = "1000"', "multiple of 512"),
                ('size = "1MiB"', 'size = ["x"]', "must be a string"), ('size = "1MiB"', 'size = "0"', "more than 0"),
                ('size = "1MiB"', 'size = "1MiB"\ngrain = "3KiB"', "power of two"), ('name = "solo"', 'name = 7', "site.name must be a string"),
                ('control = [', 'control = "x" #', "must be a list"), ('[nbd]', '[nbd]\nlisten2 = 1', "unknown key 'nbd.listen2'")):
            site = self.changed(old, new)
            self.refused(site, "site.toml:", expected)
            self.assert_untouched(site)

    def test_group_errors(self):
        group = '[groups.g]\nvolumes = ["disk"]\nrole = "primary"\npeer = "far"\n'
        peer = '[peers.far]\nnbd = "unix:/tmp/x"\ncontrol = "unix:/tmp/y"\n'
        for text, expected in (
                (group, "there is no [peers.far]"), (group.replace('"disk"', '"disc"') + peer, "there is no [volumes.disc]"),
                (group.replace("primary", "boss") + peer, "must be 'primary' or 'secondary'"),
                (group + 'mode = "journal"\n' + peer, "it must be one of 'flashcopy', 'global-mirror'"),
                (group + 'interval = "soon"\n' + peer, "write a time such as"), (group + "keep = 0\n" + peer, "from 1 to 192"),
                (group + group.replace("groups.g", "groups.h") + peer, "a volume belongs to one group")):
            self.refused(self.site("solo", {"disk": "1MiB"}, start=False, groups=text), "site.toml:", expected)

    def test_missing_file_without_size(self):
        site = self.changed('size = "1MiB"\n', "")
        self.refused(site, "volume 'disk'", "does not exist; give 'size'")
        self.assert_untouched(site)

    def test_size_differs_from_the_file(self):
        site = self.site("solo", {"disk": "1MiB"}, start=False)
        with open(f"{site.path}/disk.img", "wb") as file:
            file.truncate(12 << 10)
        self.refused(site, "has 12288 bytes, the configuration says 1048576")

    def test_file_changed_its_size_or_went_away(self):
        site = self.site("solo", {"disk": "1MiB"})
        site.stop()
        os.truncate(f"{site.path}/disk.img", 2 << 20)
        self.refused(site, "has 2097152 bytes, the configuration says 1048576")
        site.edit('"1MiB"', '"2MiB"')
        site.start()  # it has grown
        self.assertEqual(site.connect("disk").get_size(), 2 << 20)
        site.stop()
        os.truncate(f"{site.path}/disk.img", 1 << 20)
        site.edit('"2MiB"', '"1MiB"')
        self.refused(site, "had 2097152 when it was served last", "can grow and not shrink")
        os.unlink(f"{site.path}/disk.img")
        self.refused(site, "is missing, but this site has served it before")

    def test_busy_and_stale_sockets(self):
        site = self.site("solo", {"disk": "1MiB"})
        other = self.changed_copy(site)
        self.refused(other, f"socket {site.socket} is in use by another process")
        site.kill()
        self.assertTrue(os.path.exists(site.socket), "a killed process leaves its socket file")
        site.start()
        self.assertEqual(site.connect("disk").get_size(), 1 << 20)

    def changed_copy(self, site):
        """A second site with volumes and state of its own on the first one's NBD socket."""
        other = Site(self.directory, "second", {"disk": "1MiB"})
        other.edit(other.socket, site.socket)
        return other

    def test_two_processes_on_one_state_directory(self):
        site = self.site("solo", {"disk": "1MiB"})
        other = Site(self.directory, "second", {"disk": "1MiB"})
        other.edit(f"{other.path}/state", f"{site.path}/state")
        other.edit(f"{other.path}/disk.img", f"{site.path}/disk.img")
        self.refused(other, "is in use by another farcopy process")

    def test_two_processes_on_one_volume(self):
        site = self.site("solo", {"disk": "1MiB"})
        other = Site(self.directory, "second", {"disk": "1MiB"})
        other.edit(f"{other.path}/disk.img", f"{site.path}/disk.img")
        self.refused(other, "is served by another farcopy process")

    def test_torn_record_is_recognised(self):
        site = self.site("solo", {"disk": "1MiB"})
        site.stop()
        with open(f"{site.path}/state/volumes/disk/volume.record", "r+b") as file:
            for start in (0, 256 << 10):
                file.seek(start + 40)
                file.write(b"\0\0\0\0")
        self.refused(site, "volume.record holds no valid record")

    def test_volume_is_a_raw_file(self):
        site = self.site("solo", {"disk": "1MiB"})
        handle = site.connect("disk")
        handle.pwrite(b"raw " * 256, 4096)
        handle.flush()
        with open(f"{site.path}/disk.img", "rb") as file:
            self.assertEqual(file.read()[4096:5120], b"raw " * 256)

    def test_a_block_device_as_volume(self):
        """A loop device, with its size from the device; reads, writes, zeroes, trims and a FlashCopy."""
        if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
            self.skipTest("loop devices need root")
        image = os.path.join(self.directory, "device.img")
        with open(image, "wb") as file:
            file.truncate(16 << 20)
        loop = run("losetup", "-f", "--show", image).stdout.strip()
        self.addCleanup(run, "losetup", "-d", loop, check=False)
        site = self.site("solo", {}, start=False, extra=f'[volumes.device]\npath = "{loop}"\n')
        site.start()
        self.addCleanup(site.end)
        handle = site.connect("device")
        self.assertEqual(handle.get_size(), 16 << 20)
        handle.pwrite(b"d" * 65536, 1 << 20)
        site.farcopy("flashcopy", "create", "device", "before")
        handle.zero(32768, 1 << 20)
        handle.trim(1 << 20, 4 << 20)
        handle.pwrite(b"e" * 1000, 3)
        handle.flush()
        self.assertEqual(handle.pread(65536, 1 << 20), bytes(32768) + b"d" * 32768)
        self.assertEqual(handle.pread(1003, 0), bytes(3) + b"e" * 1000)
        self.assertEqual(site.connect("device@before").pread(65536, 1 << 20), b"d" * 65536)

    def test_exit_codes(self):
        site = self.site("solo", {"disk": "1MiB"})
        for words, code, expected in (
                (["status"], 0, ""), (["status", "nothing"], 1, "there is no group 'nothing'"),
                (["cycle", "nothing", "--wait"], 1, "there is no group"), (["failover", "nothing"], 1, "there is no group"),
                (["points"], 2, "group"), (["frobnicate"], 2, ""), (["failover", "g", "--point", "x"], 2, "point"),
                (["flashcopy", "create", "disk"], 2, "VOLUME")):
            done = site.farcopy(*words, check=False)
            self.assertEqual(done.returncode, code, (words, done.stderr))
            self.assertIn(expected, done.stderr)
        done = run(FARCOPY, "status", check=False, env={})
        self.assertEqual(done.returncode, 2)
        self.assertIn("FARCOPY_CONTROL", done.stderr)
        done = run(FARCOPY, "status", "--control", "unix:/nonexistent/socket", check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn("is `farcopy serve` running there?", done.stderr)
        self.assertEqual(run(FARCOPY, "--version").stdout.strip(), "0.1.0")
        done = run(FARCOPY, "status", env={"FARCOPY_CONTROL": site.control})
        self.assertIn("volume disk: 1.0 MiB", done.stdout)

    def test_metrics(self):
        site = self.site("solo", {"disk": "1MiB"})
        text = run("curl", "-s", "--unix-socket", site.control[5:], "http://x/metrics").stdout
        self.assertIn('farcopy_volume_size_bytes{volume="disk"} 1048576', text)
