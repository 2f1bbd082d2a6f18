"""TLS: certificates and pre-shared keys as other people's clients use them, and attacks on its beginning."""

import os
import random
import shutil
import socket
import struct

import nbd

from certificates import Authority, psk_file
from rawclient import ACK, INVALID, POLICY, TLS_REQD, UNSUP, Raw
from sites import SiteTest, run, wait_for

MIB = 1 << 20


class TLS(SiteTest):
    def setUp(self):
        super().setUp()
        self.pki = os.path.join(self.directory, "pki")
        self.authority = Authority(self.pki)
        self.client = self.authority.client(os.path.join(self.directory, "client"), "db1")

    def serve(self, policy="require", lines="", volumes=None, **options):
        site = self.site("solo", volumes or {"disk": "64MiB"}, start=False, **options)
        site.edit("[nbd]\n", f'[nbd]\ntls = "{policy}"\ntls_certificates = "{self.pki}"\n{lines}')
        return site.start()

    def connect(self, site, export="disk", directory=None, mode=nbd.TLS_REQUIRE):
        handle = nbd.NBD()
        handle.set_tls(mode)
        handle.set_tls_certificates(directory or self.client)
        handle.set_export_name(export)
        handle.connect_unix(site.socket)
        return handle

    def refused(self, *words, **options):
        with self.assertRaises(nbd.Error):
            self.connect(*words, **options)

    # Clients of other people.

    def test_libnbd_with_certificates(self):
        site = self.serve()
        handle = self.connect(site)
        self.assertTrue(handle.get_tls_negotiated())
        data = random.randbytes(20 * MIB)
        handle.pwrite(data, 12345)
        self.assertEqual(handle.pread(len(data), 12345), data)
        handle.flush()
        handle.shutdown()
        with open(f"{site.path}/disk.img", "rb") as file:
            file.seek(12345)
            self.assertEqual(file.read(len(data)), data)

    def test_many_requests_in_flight(self):
        site = self.serve()
        uri = f"nbds+unix:///disk?socket={site.socket}&tls-certificates={self.client}"
        image = os.path.join(self.directory, "random.img")
        with open(image, "wb") as file:
            file.write(random.randbytes(64 * MIB))
        run("nbdcopy", "--connections=4", "--requests=64", image, uri)
        run("nbdcopy", "--connections=4", "--requests=64", uri, f"{image}.back")
        run("cmp", image, f"{image}.back")

    def test_qemu_img_over_tcp(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.serve(nbd_listen=[f"127.0.0.1:{port}"])
        image = os.path.join(self.directory, "image.img")
        with open(image, "wb") as file:
            file.write(random.randbytes(5 * MIB) + bytes(59 * MIB))
        secured = ("--object", f"tls-creds-x509,id=tls0,endpoint=client,dir={self.client}")
        target = (f"driver=raw,file.driver=nbd,file.host=localhost,file.port={port},file.export=disk,"
                  "file.tls-creds=tls0")
        run("qemu-img", "convert", *secured, "-n", "-f", "raw", image, "--target-image-opts", target)
        run("qemu-img", "compare", *secured, "--image-opts", f"driver=raw,file.filename={image}", target)

    def test_psk(self):
        keys = psk_file(os.path.join(self.directory, "keys.psk"), "alice", "bob")
        site = self.site("solo", {"disk": "1MiB"}, start=False, extra='')
        site.edit("[nbd]\n", f'[nbd]\ntls = "require"\ntls_psk_file = "{keys}"\n')
        site.start()

        def connect(user, path):
            handle = nbd.NBD()
            handle.set_tls(nbd.TLS_REQUIRE)
            handle.set_tls_psk_file(path)
            handle.set_tls_username(user)
            handle.set_export_name("disk")
            handle.connect_unix(site.socket)
            return handle
        handle = connect("alice", keys)
        handle.pwrite(b"psk!" * 128, 0)
        self.assertEqual(connect("bob", keys).pread(512, 0), b"psk!" * 128)
        others = psk_file(os.path.join(self.directory, "others.psk"), "alice")
        with self.assertRaises(nbd.Error):
            connect("alice", others)

    # Who is let in.

    def test_a_client_without_a_certificate_or_with_a_foreign_one_is_refused(self):
        site = self.serve()
        bare = os.path.join(self.directory, "bare")
        os.makedirs(bare)
        os.link(os.path.join(self.pki, "ca-cert.pem"), os.path.join(bare, "ca-cert.pem"))
        self.refused(site, directory=bare)
        # A client shows no certificate whose issuer the server has not named, so one of the authorities has the right name.
        for name in ("Another authority", "Test authority"):
            foreign = Authority(os.path.join(self.directory, name), name)
            stranger = foreign.client(os.path.join(self.directory, f"stranger of {name}"), "db1")
            shutil.copy(os.path.join(self.pki, "ca-cert.pem"), stranger)
            self.refused(site, directory=stranger)
        self.assertIn("TLS handshake", open(site.log).read())
        self.connect(site).shutdown()

    def test_without_verification_any_client_comes_in(self):
        site = self.serve(lines="tls_verify_peer = false\n")
        bare = os.path.join(self.directory, "bare")
        os.makedirs(bare)
        os.link(os.path.join(self.pki, "ca-cert.pem"), os.path.join(bare, "ca-cert.pem"))
        self.connect(site, directory=bare).shutdown()

    def test_a_withdrawn_certificate_is_refused(self):
        other = self.authority.client(os.path.join(self.directory, "other"), "db2")
        self.authority.revoke(other)
        site = self.serve()
        self.refused(site, directory=other)
        self.connect(site).shutdown()

    def test_names_open_exports(self):
        site = self.serve(
            "allow", volumes={"open": "1MiB"},
            extra=f'[volumes.private]\npath = "{self.directory}/private.img"\nsize = "1MiB"\nallow_clients = ["db2"]\n')
        second = self.authority.client(os.path.join(self.directory, "second"), "db2")
        self.connect(site, "private", directory=second).pwrite(b"p" * 512, 0)
        self.refused(site, "private")
        self.connect(site, "open").shutdown()
        raw = Raw(site)
        self.assertEqual(raw.go(b"private")[-1][1], TLS_REQD)
        self.assertEqual(raw.go(b"open", 6)[-1][1], ACK)
        raw.option(3)
        self.assertEqual(raw.reply()[2][4:], b"open")
        self.assertEqual(raw.reply()[1], ACK, "what is not open is not listed")
        log = open(site.log).read()
        self.assertIn("refused 'db1' at a unix socket export 'private'", log)

    # How TLS begins.

    def test_everything_waits_for_tls_where_it_is_required(self):
        raw = Raw(self.serve())
        for option, data in ((3, b""), (6, b"\0\0\0\4disk\0\0"), (7, b"\0\0\0\4disk\0\0"), (8, b""), (9, b""), (10, b""),
                             (11, b""), (0x7654321, b"x"), (6, b"z" * 70_000)):
            raw.option(option, data)
            self.assertEqual(raw.reply()[1], TLS_REQD, option)
        raw.option(2)
        self.assertEqual(raw.reply()[1], ACK)
        site = self.sites[0]
        raw = Raw(site)
        raw.option(1, b"disk")
        self.assertTrue(raw.is_closed())
        raw = Raw(site, flags=2)
        raw.option(1, b"disk")
        self.assertTrue(raw.is_closed())

    def test_starttls_refused_where_tls_is_off(self):
        site = self.site("solo", {"disk": "1MiB"})
        raw = Raw(site)
        raw.option(5)
        self.assertIn(raw.reply()[1], (POLICY, UNSUP))
        self.assertEqual(raw.go(b"disk")[-1][1], ACK)
        self.refused(site)
        self.connect(site, mode=nbd.TLS_ALLOW).shutdown()

    def test_starttls_with_data_is_invalid(self):
        raw = Raw(self.serve("allow"))
        raw.option(5, b"x")
        self.assertEqual(raw.reply()[1], INVALID)
        self.assertEqual(raw.go(b"disk")[-1][1], ACK)

    def test_plaintext_behind_starttls_ends_the_connection(self):
        """CVE-2021-3716's kind: options injected in the clear must not count as the client's."""
        site = self.serve("allow")
        raw = Raw(site, flags=None)
        raw.socket.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 5, 0)
                           + b"IHAVEOPT" + struct.pack(">II", 8, 0))
        self.assertTrue(raw.is_closed())
        raw = Raw(site)
        raw.option(5)
        self.assertEqual(raw.reply()[1], ACK)
        raw.socket.sendall(b"IHAVEOPT" + struct.pack(">II", 8, 0) + b"\0" * 100)
        try:
            while raw.socket.recv(4096):
                pass
        except ConnectionError:
            pass

    def test_nothing_negotiated_in_the_clear_survives(self):
        """Structured replies before STARTTLS are forgotten: a second STARTTLS session begins with simple ones."""
        site = self.serve("allow")
        import ssl
        raw = Raw(site)
        raw.negotiate(11)
        raw.option(5)
        self.assertEqual(raw.reply()[1], ACK)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(os.path.join(self.client, "ca-cert.pem"))
        context.load_cert_chain(os.path.join(self.client, "client-cert.pem"), os.path.join(self.client, "client-key.pem"))
        raw.socket = context.wrap_socket(raw.socket, server_hostname="localhost")
        self.assertIn(raw.socket.version(), ("TLSv1.2", "TLSv1.3"))
        raw.option(5)
        self.assertEqual(raw.reply()[1], INVALID, "TLS is on already")
        self.assertEqual(raw.go(b"disk")[-1][1], ACK)
        raw.request(0, 0, 512, cookie=77)
        self.assertEqual(raw.answer(512), (0, 77, bytes(512)))

    def test_old_versions_are_refused(self):
        import ssl
        raw = Raw(self.serve())
        raw.option(5)
        self.assertEqual(raw.reply()[1], ACK)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        with self.assertRaises((ssl.SSLError, ConnectionError)):
            context.wrap_socket(raw.socket)

    def test_clients_that_vanish_or_stall_in_the_tls_handshake(self):
        site = self.serve(lines='handshake_timeout = "1s"\n')
        stalled = []
        for index in range(15):
            raw = Raw(site)
            raw.option(5)
            self.assertEqual(raw.reply()[1], ACK)
            raw.socket.sendall(b"\x16\x03\x01\x02\x00" + b"\x01" * (index % 7))
            if index % 2:
                raw.socket.close()
            else:
                stalled.append(raw)
        self.connect(site).shutdown()
        for raw in stalled:
            while not raw.is_closed():
                pass  # the alert that says why
        wait_for(lambda: site.sockets() < 8, what="closed sockets")
        self.assertIn("within 1 s", open(site.log).read())

    def test_a_client_that_never_reads_over_tls(self):
        site = self.serve()
        stubborn = self.connect(site)
        for _ in range(64):
            stubborn.aio_pread(nbd.Buffer(MIB), 0)
        other = self.connect(site)
        other.pwrite(b"alive" * 100, 0)
        self.assertEqual(other.pread(500, 0), b"alive" * 100)

    # Configuration.

    def test_wrong_configurations_are_named(self):
        for lines, words in ((f'tls = "require"\n', "tls_certificates"), ('tls = "maybe"\n', "maybe"),
                             (f'tls = "require"\ntls_certificates = "{self.directory}/none"\n', "ca-cert.pem"),
                             (f'tls = "require"\ntls_psk_file = "{self.directory}/none"\n', "none")):
            site = self.site("wrong", {"disk": "1MiB"}, start=False)
            site.edit("[nbd]\n", f"[nbd]\n{lines}")
            site.start(wait=False)
            self.assertEqual(site.process.wait(20), 1)
            self.assertIn(words, site.tail())

    # The replicator's link.

    def test_replication_over_tls(self):
        self.authority.client(self.pki, "farcopy")
        east, west = self.pair({"disk": "16MiB"}, interval="manual", start=False)
        for site in (east, west):
            site.edit("[nbd]\n", f'[nbd]\ntls = "require"\ntls_certificates = "{self.pki}"\n')
        west.start()
        east.start()
        handle = self.connect(east)
        data = random.randbytes(3 * MIB)
        handle.pwrite(data, MIB)
        point = east.cycle()
        copy = self.connect(west, f"disk@{point}")
        self.assertEqual(copy.pread(3 * MIB, MIB), data)
        # A link without TLS is turned away.
        east.stop()
        east.edit('[peers.west]\n', '[peers.west]\ntls = "off"\n')
        east.start()
        wait_for(lambda: east.group()["state"] == "suspended", what="a refused link")
        self.assertIn("TLS", east.group()["reason"])
