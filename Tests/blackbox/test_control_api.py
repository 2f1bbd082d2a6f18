"""The control API: what a page in a browser cannot do with it, where targets may lie, how many may use it at once."""

import json
import os
import resource
import socket
import subprocess
import time

import nbd

from sites import FARCOPY, SiteTest, run, wait_for

SIZE = 16 << 20
JSON = {"Content-Type": "application/json"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ControlAPI(SiteTest):
    def solo(self, **options):
        site = self.site("solo", {"disk": "16MiB"}, start=False, **options)
        site.port = free_port()
        site.edit(', "/dev"]', "]")
        site.edit('control.sock"]', f'control.sock", "127.0.0.1:{site.port}"]')
        return site

    def ask(self, site, method, path, headers=(), body=None, socket_path=None):
        """Status and answer of one request; headers replace curl's own."""
        words = ["curl", "-s", "-X", method, "-w", "\n%{http_code}"]
        for name, value in dict(headers).items():
            words += ["-H", f"{name}: {value}"]
        if body is not None:
            words += ["--data-binary", body]
        if socket_path:
            words += ["--unix-socket", socket_path, f"http://x{path}"]
        else:
            words += [f"http://127.0.0.1:{site.port}{path}"]
        answer, status = run(*words).stdout.rsplit("\n", 1)
        return int(status), answer

    def test_pages_of_other_sites_change_nothing(self):
        site = self.solo().start()
        body = json.dumps({"name": "copy", "volumes": ["disk"]})
        own = f"127.0.0.1:{site.port}"
        refused = (
            # What a page may send anywhere without being asked.
            ({"Content-Type": "text/plain"}, 415, "application/json"),
            ({"Content-Type": "application/x-www-form-urlencoded"}, 415, "application/json"),
            ({"Content-Type": "text/plain; application/json"}, 415, "application/json"),
            ({"Content-Type": ""}, 415, "application/json"),
            (JSON | {"Origin": "http://elsewhere.example"}, 403, "elsewhere.example"),
            (JSON | {"Origin": "null"}, 403, "null"),
            (JSON | {"Origin": "http://127.0.0.1:1"}, 403, "127.0.0.1:1"),
            # A name of somebody else's that was made to lead here.
            (JSON | {"Host": f"elsewhere.example:{site.port}"}, 403, "control_names"),
            (JSON | {"Host": "elsewhere.example", "Origin": "http://elsewhere.example"}, 403, "control_names"),
            (JSON | {"Host": "localhost.elsewhere.example"}, 403, "control_names"),
        )
        for headers, code, words in refused:
            for method, path in (("POST", "/v1/flashcopies"), ("POST", "/v1/abort?operation=x"),
                                 ("DELETE", "/v1/groups/shop/practice")):
                with self.subTest(headers=headers, path=path):
                    status, answer = self.ask(site, method, path, headers, body if path == "/v1/flashcopies" else None)
                    self.assertEqual(status, code, answer)
                    self.assertIn(words, json.loads(answer)["error"])
        self.assertEqual(json.loads(self.ask(site, "GET", "/v1/flashcopies")[1]), [])
        status, answer = self.ask(
            site, "POST", "/v1/flashcopies", JSON | {"Origin": "http://elsewhere.example"}, body, site.control[5:])
        self.assertEqual(status, 403, answer)

        def create(name, headers, path=None):
            status, answer = self.ask(
                site, "POST", "/v1/flashcopies", headers, json.dumps({"name": name, "volumes": ["disk"]}), path)
            self.assertEqual(status, 200, answer)
        create("a", JSON)
        create("b", {"Content-Type": "application/json; charset=utf-8", "Origin": f"http://{own}"})
        create("c", JSON | {"Host": f"LOCALHOST:{site.port}"})
        create("d", JSON | {"Host": f"[::1]:{site.port}"})
        create("e", JSON | {"Host": socket.gethostname()})
        create("f", JSON | {"Host": "any.name"}, site.control[5:])

    def test_metrics_are_the_figures_of_the_status(self):
        east, west = self.pair({"disk": "16MiB"}, interval="manual")
        handle = east.connect("disk")
        handle.pwrite(b"1" * 65536, 0)
        east.cycle()
        handle.pwrite(b"2" * 8192, 0)
        text = run("curl", "-s", "--unix-socket", east.control[5:], "http://x/metrics").stdout
        figures = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        group = east.group()
        for name, value in (("window_bytes", group["window_bytes"]), ("pending_bytes", 8192), ("spared_bytes_total", group["spared_bytes"]),
                            ("point_bytes", group["point"]["bytes"]), ("point", group["point"]["id"])):
            self.assertEqual(float(figures[f'farcopy_{name}{{group="shop"}}']), value, name)
        self.assertGreaterEqual(group["window_bytes"], 1 << 20)

    def test_names_of_the_control_api_can_be_configured(self):
        site = self.solo()
        site.edit("[nbd]", 'control_names = ["store.example"]\n[nbd]')
        site.start()
        status, answer = self.ask(
            site, "POST", "/v1/flashcopies", JSON | {"Host": f"Store.Example:{site.port}"},
            json.dumps({"name": "copy", "volumes": ["disk"]}))
        self.assertEqual(status, 200, answer)

    def create(self, site, name, target):
        return site.farcopy("flashcopy", "create", "disk", name, "--target", target, check=False)

    def test_targets_lie_where_the_configuration_says(self):
        site = self.solo()
        allowed = os.path.join(self.directory, "allowed")
        outside = os.path.join(self.directory, "outside")
        os.mkdir(allowed)
        os.mkdir(outside)
        victim = os.path.join(outside, "victim")
        with open(victim, "wb") as file:
            file.write(b"v" * SIZE)
        os.symlink(victim, f"{allowed}/link")
        os.symlink(f"{outside}/new", f"{allowed}/dangling")
        os.symlink(outside, f"{allowed}/directory")
        os.symlink(allowed, f"{outside}/way")
        named = os.path.join(outside, "named")
        site.edit(f'targets = ["{self.directory}"]', f'targets = ["{allowed}/", "{named}"]')
        site.start()
        for target in (victim, f"{allowed}/../outside/victim", f"{allowed}/link", f"{allowed}/dangling",
                       f"{allowed}/directory/victim", f"{allowed}x", f"{named}/x", "/dev/null", f"{site.path}/new",
                       f"{site.path}/state/volumes/disk/point.target", f"{site.path}/state/image"):
            with self.subTest(target=target):
                done = self.create(site, "bad", target)
                self.assertEqual(done.returncode, 1)
                self.assertIn(target, done.stderr)
                self.assertIn("site.targets" if "named/x" not in target else "does not exist", done.stderr)
        with open(victim, "rb") as file:
            self.assertEqual(file.read(), b"v" * SIZE)
        self.assertEqual(sorted(os.listdir(outside)), ["victim", "way"])
        for number, target in enumerate((f"{allowed}/image", named, f"{outside}/way/through")):
            done = self.create(site, f"good{number}", target)
            self.assertEqual(done.returncode, 0, done.stderr)
        # The same for what is made of another copy.
        done = site.farcopy("flashcopy", "clone", "disk", "good0", "bad", "--target", victim, check=False)
        self.assertIn("site.targets", done.stderr)
        # What a copy uses already stays in use.
        handle = site.connect("disk")
        handle.pwrite(b"n" * 65536, 0)
        handle.flush()
        site.kill()
        site.edit(f'targets = ["{allowed}/", "{named}"]', "")
        site.start()
        self.assertEqual(site.read("disk@good0"), bytes(SIZE))
        # Without the key: in the state directory, and never what the site itself keeps there.
        done = self.create(site, "more", f"{site.path}/state/image")
        self.assertEqual(done.returncode, 0, done.stderr)
        for target in (f"{allowed}/other", f"{site.path}/state/volumes/disk/point.target", f"{site.path}/state/site.record"):
            done = self.create(site, "bad", target)
            self.assertEqual(done.returncode, 1)
            self.assertIn("site.targets", done.stderr)

    def test_devices_are_targets_where_the_configuration_says(self):
        backing = os.path.join(self.directory, "backing")
        with open(backing, "wb") as file:
            file.truncate(SIZE)
        device = run("losetup", "--find", "--show", backing).stdout.strip()
        self.addCleanup(lambda: subprocess.run(["losetup", "-d", device], check=False))
        link = os.path.join(self.directory, "link")
        os.symlink(device, link)
        site = self.solo().start()
        for target in (device, link):
            done = self.create(site, "bad", target)
            self.assertEqual(done.returncode, 1)
            self.assertIn("site.targets", done.stderr)
        site.stop()
        site.edit(f'targets = ["{self.directory}"]', f'targets = ["{device}"]')
        site.start()
        done = self.create(site, "good", link)
        self.assertEqual(done.returncode, 0, done.stderr)
        site.stop()


class Descriptors(SiteTest):
    def limited(self, name, volumes, limit, **options):
        """A site that may have so many descriptors."""
        site = self.site(name, volumes, start=False, **options)
        return self.limit(site, limit)

    def limit(self, site, limit):
        site.program = os.path.join(site.path, "limited")
        with open(site.program, "w") as file:
            file.write(f'#!/bin/sh\nulimit -n {limit}\nexec {FARCOPY} "$@"\n')
        os.chmod(site.program, 0o755)
        return site

    def clients(self, family, address, count):
        """Connections that say nothing."""
        made = []
        for _ in range(count):
            client = socket.socket(family)
            self.addCleanup(client.close)
            client.connect(address)
            client.settimeout(10)
            made.append(client)
        return made

    def log(self, site):
        with open(site.log) as file:
            return file.read()

    def open_descriptors(self, site):
        return len(os.listdir(f"/proc/{site.process.pid}/fd"))

    def seconds_of_processor(self, site):
        with open(f"/proc/{site.process.pid}/stat") as file:
            words = file.read().rsplit(")", 1)[1].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    def test_idle_control_connections_leave_room_for_all_others(self):
        east, west = self.pair({"disk": "16MiB"}, interval="manual", start=False)
        port = free_port()
        east.edit('control.sock"]', f'control.sock", "127.0.0.1:{port}"]')
        west.start()
        self.limit(east, 512).start()
        handle = east.connect("disk")
        handle.pwrite(b"1" * 65536, 0)
        east.cycle()
        idle = self.clients(socket.AF_INET, ("127.0.0.1", port), 700)
        wait_for(lambda: "the control API has" in self.log(east), what="a refusal in words")
        self.assertLess(self.open_descriptors(east), 512 - 32)
        before = self.seconds_of_processor(east)
        time.sleep(1)
        self.assertLess(self.seconds_of_processor(east) - before, 0.5, "idle connections cost nothing")
        # The operator's socket, hosts and the peer go on.
        east.connect("disk").pwrite(b"2" * 65536, 65536)
        point = east.cycle()
        self.assertEqual(west.read(f"disk@{point}")[:131072], b"1" * 65536 + b"2" * 65536)
        east.farcopy("flashcopy", "create", "disk", "copy")
        clients = self.clients(socket.AF_UNIX, east.control[5:], 700)
        self.assertLess(self.open_descriptors(east), 512 - 32)
        for client in idle + clients:
            client.close()
        wait_for(lambda: east.farcopy("status", check=False).returncode == 0, what="room after they have ended")
        handle.pwrite(b"3" * 65536, 0)
        east.cycle()

    def test_clients_beyond_the_descriptors_are_refused_and_the_others_served(self):
        site = self.limited("solo", {"disk": "16MiB"}, 512)
        site.edit("[volumes.disk]", "max_handshakes = 1024\n[volumes.disk]")
        site.start()
        self.assertIn("the limit of 512 descriptors leaves room for", self.log(site))
        handle = site.connect("disk")
        others = [site.connect("disk") for _ in range(100)]
        idle = self.clients(socket.AF_UNIX, site.socket, 600)
        wait_for(lambda: "connections are in use" in self.log(site), what="a refusal in words")
        self.assertLess(self.open_descriptors(site), 512 - 32)
        before = self.seconds_of_processor(site)
        time.sleep(1)
        self.assertLess(self.seconds_of_processor(site) - before, 0.5)
        for number, client in enumerate([handle] + others):
            client.pwrite(bytes([number]) * 4096, number * 4096)
            self.assertEqual(bytes(client.pread(4096, number * 4096)), bytes([number]) * 4096)
        site.farcopy("flashcopy", "create", "disk", "copy")
        site.status()
        for client in idle:
            client.close()
        wait_for(lambda: self.connects(site), what="a client that gets in again")

    def connects(self, site):
        try:
            site.connect("disk")
            return True
        except nbd.Error:
            return False

    def test_listeners_rest_while_there_is_no_descriptor(self):
        """What takes the last descriptor may come from elsewhere: a limit that is lowered while the site runs."""
        site = self.site("solo", {"disk": "16MiB"})
        handle = site.connect("disk")
        handle.pread(512, 0)  # it is in service: handing it to the volume's reactor is over
        pid = site.process.pid
        _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (16, hard))
        waiting = self.clients(socket.AF_UNIX, site.socket, 1) + self.clients(socket.AF_UNIX, site.control[5:], 1)
        time.sleep(0.3)
        before = self.seconds_of_processor(site)
        time.sleep(1)
        self.assertLess(self.seconds_of_processor(site) - before, 0.2, "a listener that cannot accept rests")
        handle.pwrite(b"x" * 4096, 0)
        self.assertEqual(bytes(handle.pread(4096, 0)), b"x" * 4096)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
        self.assertEqual(waiting[0].recv(8), b"NBDMAGIC")
        waiting[1].sendall(b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n")
        self.assertIn(b"200 OK", waiting[1].recv(100))
        site.status()

    def test_what_cannot_fit_is_refused_at_the_start(self):
        volumes = {f"disk{number}": "1MiB" for number in range(60)}
        east, west = self.pair(volumes, keep=100, start=False)
        self.limit(west, 640).start(wait=False)
        self.assertEqual(west.process.wait(timeout=30), 1)
        words = self.log(west)
        for part in (r"needs \d+ descriptors and may have 640", f"{60 * 2 * 2} for recovery points", "ulimit -n", "LimitNOFILE"):
            self.assertRegex(words, part)
        self.assertFalse(os.path.exists(f"{west.path}/state/volumes"), "nothing was made")
        west.process.stdout.close()
        west.process = None
        # The primary has no such points yet: it is told, and serves its hosts.
        self.limit(east, 640).start()
        self.assertIn("before roles are exchanged", self.log(east))
        self.limit(west, 2048).start()
        wait_for(lambda: east.group()["state"] == "mirroring", what="mirroring")

    def test_a_commit_without_descriptors_is_refused_in_words(self):
        volumes = {f"disk{number}": "1MiB" for number in range(4)}
        east, west = self.pair(volumes, interval="manual", keep=2, start=False)
        self.limit(west, 400).start()
        east.start()
        point = east.cycle()
        names = []
        while len(names) < 200:
            name = f"copy{len(names)}"
            done = west.farcopy("flashcopy", "clone", *volumes, str(point), name, check=False)
            if done.returncode:
                break
            names.append(name)
        self.assertIn("descriptors", done.stderr)
        self.assertIn("withdraw", done.stderr)
        self.assertGreater(len(names), 2)
        handle = east.connect("disk0")
        handle.pwrite(b"a" * 65536, 0)
        # The points that the group keeps have theirs.
        numbers = [east.cycle() for _ in range(4)]
        self.assertEqual(west.read(f"disk0@{numbers[-1]}")[:65536], b"a" * 65536)
        for name in names:
            west.farcopy("flashcopy", "withdraw", *volumes, name)
        west.farcopy("flashcopy", "clone", *volumes, str(numbers[-1]), "again")
