"""The control API: what a page in a browser cannot do with it, where targets may lie, how many may use it at once."""

import json
import os
import socket
import subprocess

import nbd

from sites import SiteTest, run

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
