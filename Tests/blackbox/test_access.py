"""Who may come in, how many at once, and sockets that systemd opened."""

import os
import re
import socket
import subprocess
import sys
import time

import nbd

from rawclient import ACK, UNKNOWN, Raw
from sites import FARCOPY, SiteTest, die_with_parent, run, wait_for


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Access(SiteTest):
    def test_addresses_open_exports(self):
        port = free_port()
        site = self.site(
            "solo", {"open": "1MiB"}, nbd_listen=[f"127.0.0.1:{port}"],
            extra=f'[volumes.local]\npath = "{self.directory}/local.img"\nsize = "1MiB"\nallow_addresses = ["unix"]\n'
                  f'[volumes.net]\npath = "{self.directory}/net.img"\nsize = "1MiB"\nallow_addresses = ["127.0.0.0/8"]\n'
                  f'[volumes.far]\npath = "{self.directory}/far.img"\nsize = "1MiB"\nallow_addresses = ["10.0.0.0/8", "::1"]\n')
        self.assertEqual([name for name in ("open", "local", "net", "far") if self.opens(site.uri(name))], ["open", "local"])
        over_net = [name for name in ("open", "local", "net", "far") if self.opens(f"nbd://127.0.0.1:{port}/{name}")]
        self.assertEqual(over_net, ["open", "net"])
        log = open(site.log).read()
        self.assertIn("refused 127.0.0.1 export 'local': its address is not in allow_addresses", log)

    def test_prefixes_count_by_the_bit(self):
        """What is called is the same address of this machine in every case."""
        port = free_port()
        ranges = {"127.0.0.0/31": True, "127.0.0.0/32": False, "127.0.0.2/31": False, "127.128.0.0/9": False, "127.0.0.0/9": True,
                  "64.0.0.0/3": False, "64.0.0.0/2": True, "0.0.0.0/1": True, "128.0.0.0/1": False, "0.0.0.0/2": False,
                  "255.255.255.255/0": True}
        site = self.site("solo", {"open": "1MiB"}, nbd_listen=[f"127.0.0.1:{port}"], extra="".join(
            f'[volumes.v{number}]\npath = "{self.directory}/v{number}.img"\nsize = "1MiB"\nallow_addresses = ["{text}"]\n'
            for number, text in enumerate(ranges)))
        self.assertTrue(self.opens(f"nbd://127.0.0.1:{port}/open"))
        found = {text: self.opens(f"nbd://127.0.0.1:{port}/v{number}") for number, text in enumerate(ranges)}
        self.assertEqual(found, ranges)
        self.assertFalse(self.opens(site.uri("v0")), "a unix socket has no address")

    def opens(self, uri):
        handle = nbd.NBD()
        try:
            handle.connect_uri(uri)
            return True
        except nbd.Error:
            return False

    def test_a_groups_list_covers_its_volumes_and_copies(self):
        east, _ = self.pair({"disk": "1MiB"}, interval="manual", start=False)
        east.edit('role = "primary"\n', 'role = "primary"\nallow_addresses = ["10.0.0.1"]\n')
        self.sites[1].start()
        east.start()
        east.farcopy("flashcopy", "create", "disk", "copy")
        raw = Raw(east)
        self.assertEqual(raw.go(b"disk")[-1][1], UNKNOWN)
        self.assertEqual(raw.go(b"disk@copy")[-1][1], UNKNOWN)

    def test_a_read_only_export(self):
        site = self.site("solo", {}, extra=(
            f'[volumes.disk]\npath = "{self.directory}/disk.img"\nsize = "1MiB"\nread_only = true\n'))
        handle = site.connect("disk")
        self.assertTrue(handle.is_read_only())
        handle.set_strict_mode(0)
        for attempt in (lambda: handle.pwrite(b"x" * 512, 0), lambda: handle.zero(512, 0), lambda: handle.trim(512, 0)):
            with self.assertRaises(nbd.Error) as error:
                attempt()
            self.assertEqual(error.exception.errno, "EPERM")
        self.assertEqual(handle.pread(512, 0), bytes(512))

    def test_connections_have_limits_that_are_told(self):
        port = free_port()
        site = self.site("solo", {"disk": "1MiB"}, start=False, nbd_listen=[f"127.0.0.1:{port}"])
        site.edit("[nbd]\n", "[nbd]\nmax_connections = 12\nmax_connections_per_address = 5\n")
        site.start()

        def connect():
            handle = nbd.NBD()
            handle.connect_uri(f"nbd://127.0.0.1:{port}/disk")
            return handle
        remote = [connect() for _ in range(5)]
        with self.assertRaises(nbd.Error):
            connect()
        local = [site.connect("disk") for _ in range(7)]
        with self.assertRaises(nbd.Error):
            site.connect("disk")
        log = open(site.log).read()
        self.assertIn("refused 127.0.0.1: it has 5 connections already", log)
        self.assertIn("refused a unix socket: all 12 connections are in use", log)
        remote.pop().shutdown()
        local.pop().shutdown()
        wait_for(lambda: self.opens(f"nbd://127.0.0.1:{port}/disk"), what="a place that became free")
        for handle in remote + local:
            handle.pread(512, 0)

    def test_handshakes_have_limits(self):
        site = self.site("solo", {"disk": "1MiB"}, start=False)
        site.edit("[nbd]\n", '[nbd]\nmax_handshakes = 10\nhandshake_timeout = "2s"\n')
        site.start()
        working = site.connect("disk")
        idle = [Raw(site) for _ in range(10)]
        with self.assertRaises(nbd.Error):
            site.connect("disk")
        working.pread(512, 0)
        for raw in idle:
            self.assertTrue(raw.is_closed())
        site.connect("disk").shutdown()
        log = open(site.log).read()
        self.assertIn("10 clients are in their handshake already", log)
        self.assertIn("no export chosen within 2 s", log)

    def test_refusals_do_not_flood_the_log(self):
        site = self.site("solo", {"disk": "1MiB"}, start=False)
        site.edit("[nbd]\n", "[nbd]\nmax_connections = 1\n")
        site.start()
        kept = site.connect("disk")
        for _ in range(500):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(site.socket)
        kept.pread(512, 0)
        self.assertLess(open(site.log).read().count("refused"), 60)

    def test_a_slow_client_has_time_and_no_more(self):
        site = self.site("solo", {"disk": "1MiB"}, start=False)
        site.edit("[nbd]\n", '[nbd]\nhandshake_timeout = "1s"\n')
        site.start()
        raw = Raw(site)
        started = time.monotonic()
        with self.assertRaises((ConnectionError, EOFError)):
            for byte in b"IHAVEOPT" * 100:
                raw.socket.sendall(bytes([byte]))
                time.sleep(0.3)
        self.assertLess(time.monotonic() - started, 15)

    def test_socket_activation(self):
        """As systemd does it: the socket is open before the server is there, and stays while it restarts."""
        path = os.path.join(self.directory, "activated.sock")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(10)
        self.addCleanup(listener.close)
        site = self.site("solo", {"disk": "1MiB"}, start=False)
        with open(site.config) as file:
            text = file.read()
        site.edit(next(line for line in text.splitlines() if line.startswith("listen")) + "\n", "")

        def serve():
            def child():
                die_with_parent()
                os.dup2(listener.fileno(), 3)
                os.environ["LISTEN_FDS"], os.environ["LISTEN_PID"] = "1", str(os.getpid())
                os.execv(FARCOPY, [FARCOPY, "serve", "--config", site.config])
            site.process = subprocess.Popen(
                [sys.executable, "-c", "pass"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                preexec_fn=child, pass_fds=(3,))
            self.assertEqual(site.process.stdout.readline(), "ready\n")
        serve()
        handle = nbd.NBD()
        handle.connect_uri(f"nbd+unix:///disk?socket={path}")
        handle.pwrite(b"a" * 512, 0)
        site.stop()
        # Nobody serves just now: the client waits in the socket's queue instead of being refused.
        waiting = nbd.NBD()
        waiting.set_export_name("disk")
        waiting.aio_connect_unix(path)
        serve()
        while not waiting.aio_is_ready():
            waiting.poll(10_000)
        self.assertEqual(waiting.pread(512, 0), b"a" * 512)
        self.assertTrue(os.path.exists(path), "the socket is systemd's to remove")

    def test_the_intake_is_for_addresses_and_names_of_the_peer(self):
        east, west = self.pair({"disk": "16MiB"}, interval="manual", start=False)
        peer = f'[peers.east]\nnbd = "unix:{east.socket}"\n'
        west.edit(peer, peer + 'allow_addresses = ["10.0.0.0/8"]\n')
        west.edit("[groups.shop]", '[groups.shop]\nallow_addresses = ["unix"]')
        west.start()
        east.start()
        wait_for(lambda: "its address is not in allow_addresses" in self.text(west), what="the refusal")
        wait_for(lambda: east.group()["state"] == "suspended", what="the suspension")
        west.stop()
        west.edit('allow_addresses = ["10.0.0.0/8"]', 'allow_addresses = ["unix"]')
        # What hosts may do here is apart from that.
        west.edit('[groups.shop]\nallow_addresses = ["unix"]', '[groups.shop]\nallow_addresses = ["10.0.0.0/8"]')
        west.start()
        east.farcopy("resume", "shop")
        wait_for(lambda: east.group()["state"] == "mirroring", what="mirroring")
        with self.assertRaises(nbd.Error):
            west.connect("disk")

    def text(self, site):
        with open(site.log) as file:
            return file.read()

    def test_wrong_settings_are_named_with_their_line(self):
        for line, words in (('max_connections = 0', "max_connections"), ('handshake_timeout = "soon"', "soon"),
                            ('allow = ["x"]', "unknown key")):
            site = self.site("wrong", {"disk": "1MiB"}, start=False)
            site.edit("[nbd]\n", f"[nbd]\n{line}\n")
            site.start(wait=False)
            self.assertEqual(site.process.wait(20), 1)
            self.assertRegex(site.tail(), rf"site.toml:7: .*{re.escape(words)}")
