"""What crosses the link, and how fast: few bytes, a slow and lossy way, a stalled peer, rates, seeded secondaries, outages."""

import json
import os
import random
import shutil
import time

from sites import SECTOR, SiteTest, run, wait_for

MIB = 1 << 20


class LinkTest(SiteTest):
    def mirroring(self, east, seconds=60):
        wait_for(lambda: east.group()["state"] == "mirroring", seconds=seconds, what="mirroring")

    def crossed(self, body):
        before = self.link.bytes
        body()
        return self.link.bytes - before

    def test_a_long_slow_lossy_link_is_used(self):
        """50 ms there and back, 100 Mbit/s, one packet of a thousand lost: at least 90 % of the link."""
        rate = 100e6 / 8
        east, west = self.linked({"orders": "128MiB"}, delay=0.025, rate=rate, loss=0.001)
        self.mirroring(east)
        data = random.randbytes(60 * MIB)
        handle = east.connect("orders")
        handle.pwrite(data[:32 * MIB], 0)
        handle.pwrite(data[32 * MIB:], 32 * MIB)
        # From the middle of the drain: the start and the commit's round trips are no part of the link's use.
        east.farcopy("cycle", "shop")
        start = self.link.directions[True].bytes
        wait_for(lambda: self.link.directions[True].bytes - start > 4 * MIB, what="the drain")
        before, begin = self.link.directions[True].bytes, time.monotonic()
        wait_for(lambda: self.link.directions[True].bytes - start > 56 * MIB, what="the drain")
        used = (self.link.directions[True].bytes - before) / (time.monotonic() - begin) / rate
        print(f"  {used:.2f} of the link used, window {east.group()['window_bytes']} bytes", flush=True)
        self.assertGreaterEqual(used, 0.9)
        point = east.cycle()
        self.assertEqual(west.read(f"orders@{point}")[:60 * MIB], data)

    def test_an_outage_sends_the_difference_only(self):
        """One per cent of the volume changes while the link is down."""
        size = 1 << 30
        east, west = self.linked({"orders": str(size)})
        self.mirroring(east)
        handle = east.connect("orders")
        block = random.randbytes(MIB)
        for at in range(0, size, MIB):
            handle.pwrite(block, at)
        east.cycle()
        newest = west.points()[-1]["id"]
        image = west.connect("orders").pread(MIB, 0)
        self.link.cut()
        wait_for(lambda: east.group()["state"] == "suspended", what="the suspension")
        pages = random.sample(range(size // 4096), size // 4096 // 100)
        for page in pages:
            handle.pwrite(random.randbytes(4096), page * 4096)
        self.assertEqual(east.group()["pending_bytes"], len(pages) * 4096)
        self.assertEqual(west.points()[-1]["id"], newest)
        self.link.mend()
        before = self.link.bytes
        wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")
        self.assertEqual(west.connect("orders").pread(MIB, 0), image, "the recovery volume shows the last point meanwhile")
        east.cycle()
        crossed = self.link.bytes - before
        print(f"  {crossed} bytes crossed for {len(pages) * 4096} changed", flush=True)
        self.assertLess(crossed, len(pages) * 4096 * 1.15)

    def test_a_stalled_peer_is_noticed_and_hosts_go_on(self):
        east, west = self.linked({"orders": "64MiB"}, interval="0s", options='stall_timeout = "1s"')
        self.mirroring(east)
        handle = east.connect("orders")
        self.link.stall()
        handle.pwrite(random.randbytes(8 * MIB), 0)
        wait_for(lambda: east.group()["state"] == "suspended", seconds=15, what="the stall to be noticed")
        self.assertIn("acknowledged nothing for 1.0 s", east.farcopy("events").stdout)
        lag = east.group()["lag_seconds"]
        handle.pwrite(b"on" * 2048, 0)
        time.sleep(0.3)
        self.assertGreater(east.group()["lag_seconds"], lag)
        self.assertGreater(west.group()["lag_seconds"], lag, "the same figure at both sites")
        self.link.stall(False)
        self.mirroring(east)
        point = east.cycle()
        self.assertEqual(west.read(f"orders@{point}"), east.read("orders"))

    def test_a_rate_is_held_after_a_stall(self):
        """What was let through at the rate while nothing arrived must not arrive all at once."""
        east, west = self.linked({"orders": "64MiB"}, rate=200e6)
        self.mirroring(east)
        handle = east.connect("orders")
        # Short runs first: many of them fit the window, and so many long ones do at first.
        for page in range(8192, 16384, 16):
            handle.pwrite(random.randbytes(4096), page * 4096)
        east.cycle()
        east.farcopy("rate", "shop", "3MiB")
        handle.pwrite(random.randbytes(32 * MIB), 0)
        before = self.link.bytes
        east.farcopy("cycle", "shop")
        wait_for(lambda: self.link.bytes - before > MIB, what="the drain")
        self.link.stall()
        time.sleep(3)
        before = self.link.bytes
        self.link.stall(False)
        time.sleep(1)
        self.assertLess(self.link.bytes - before, 6 * MIB)
        east.farcopy("rate", "shop", "unlimited")
        point = east.cycle()
        self.assertEqual(west.read(f"orders@{point}"), east.read("orders"))

    def test_a_silent_link_is_told(self):
        east, west = self.linked({"orders": "16MiB"}, interval="0s")
        self.mirroring(east)
        handle = east.connect("orders")
        handle.pwrite(random.randbytes(8 * MIB), 0)
        wait_for(lambda: east.group()["pending_bytes"] == 0, what="the point")
        self.assertNotIn("notice", east.group())
        time.sleep(2.5)
        self.assertNotIn("notice", east.group(), "nothing to send is no silence")
        self.link.stall()
        handle.pwrite(random.randbytes(8 * MIB), 0)
        wait_for(lambda: "notice" in east.group(), seconds=10, what="a word about the silence")
        group = east.group()
        self.assertRegex(group["notice"], r"the link is silent for \d+ s")
        self.assertIn("silent", east.farcopy("status").stdout)
        self.assertEqual((group["state"], group["rate_bytes_per_second"]), ("mirroring", 0))
        self.assertNotIn("eta_seconds", group)
        self.link.stall(False)
        wait_for(lambda: "notice" not in east.group(), what="the end of the silence")

    def test_alerts_of_a_former_role_end(self):
        east, west = self.linked({"orders": "16MiB"}, interval="0s")
        self.mirroring(east)
        self.link.cut()
        wait_for(lambda: "suspended" in str(east.group().get("alerts")), what="the alert")
        west.farcopy("failover", "shop")
        self.link.mend()
        wait_for(lambda: "stale" in (east.group().get("reason") or ""), what="the stale primary")
        west.farcopy("resync", "shop", "--discard", "east", "--yes")
        wait_for(lambda: east.group()["role"] == "secondary", what="the new role")
        wait_for(lambda: not east.group().get("alerts"), seconds=5, what="the end of the alerts")

    def test_the_rate_is_bounded_and_changed_while_it_runs(self):
        east, west = self.linked({"orders": "64MiB"}, options='rate = "2MiB"')
        self.mirroring(east)
        self.assertEqual(east.group()["rate_limit"], 2 * MIB)
        east.connect("orders").pwrite(random.randbytes(24 * MIB), 0)
        before = self.link.bytes
        east.farcopy("cycle", "shop")
        time.sleep(2)
        crossed = self.link.bytes - before
        self.assertLess(crossed, 6 * MIB)
        self.assertGreater(crossed, 1 * MIB)
        self.assertGreater(east.group()["eta_seconds"], 1)
        self.assertEqual(east.farcopy("rate", "shop", "1KiB", check=False).returncode, 2)
        east.farcopy("rate", "shop", "unlimited")
        wait_for(lambda: east.group()["pending_bytes"] == 0, seconds=5, what="the rest at full speed")
        east.farcopy("rate", "shop", "3MiB")
        east.stop()
        east.start()
        self.assertEqual(east.group()["rate_limit"], 3 * MIB, "through a restart")
        east.farcopy("rate", "shop", "default")
        self.assertEqual(east.group()["rate_limit"], 2 * MIB)

    def test_rates_by_time_of_day(self):
        now = time.localtime()
        hour = f"{now.tm_hour:02}:00"
        window = f'{{ from = "{hour}", to = "{hour}", rate = "7MiB" }}'
        other = f'{{ from = "{(now.tm_hour + 2) % 24:02}:00", to = "{(now.tm_hour + 3) % 24:02}:00", rate = "unlimited" }}'
        east, _ = self.linked({"orders": "1MiB"}, options=f'rate = "2MiB"\nrates = [{other}, {window}]')
        self.mirroring(east)
        self.assertEqual(east.group()["rate_limit"], 7 * MIB)

    def test_a_seeded_secondary_is_sent_what_differs(self):
        """The image was carried over; since then a few pages have changed at the primary."""
        east, west = self.linked({"orders": "64MiB"}, start=False)
        image = bytearray(random.randbytes(64 * MIB))
        with open(f"{west.path}/orders.img", "wb") as file:
            file.write(image)
        for page in range(0, 16384, 1000):
            image[page * 4096:page * 4096 + 4096] = random.randbytes(4096)
        with open(f"{east.path}/orders.img", "wb") as file:
            file.write(image)
        self.link.cut()
        east.start()
        west.start()
        east.farcopy("resume", "shop", "--from-image")
        # The wish survives a restart.
        east.stop()
        east.start()
        self.link.mend()
        before = self.link.bytes
        self.mirroring(east)
        crossed = self.link.bytes - before
        self.assertEqual(west.read("orders"), bytes(image))
        print(f"  {crossed} bytes crossed for 17 pages of {64 * MIB} bytes", flush=True)
        self.assertLess(crossed, 3 * MIB)
        self.assertGreater(east.group()["spared_bytes"], 60 * MIB)

    def test_a_replaced_secondary_is_seeded_from_a_backup(self):
        """As docs/OPERATIONS.md says it: the group has committed points before."""
        east, west = self.linked({"orders": "32MiB"})
        east.connect("orders").pwrite(random.randbytes(24 * MIB), 0)
        east.cycle()
        east.farcopy("suspend", "shop")
        west.stop()
        shutil.rmtree(f"{west.path}/state")
        backup = bytearray(east.read("orders"))
        backup[MIB:MIB + 4096] = bytes(4096)
        backup[2 * MIB + 4095] ^= 1
        with open(f"{west.path}/orders.img", "wb") as file:
            file.write(backup)
        west.start()
        before = self.link.bytes
        east.farcopy("resume", "shop", "--from-image")
        wait_for(lambda: west.points(), what="the comparison")
        crossed = self.link.bytes - before
        self.assertEqual(west.read("orders"), east.read("orders"))
        self.assertLess(crossed, 2 * MIB)

    def test_unchanged_content_is_found_by_itself_where_the_link_is_slow(self):
        """A file is written again with what it held: most of it need not cross a slow link."""
        east, west = self.linked({"orders": "32MiB"}, rate=8 * MIB, delay=0.002)
        self.mirroring(east)
        handle = east.connect("orders")
        data = random.randbytes(24 * MIB)
        handle.pwrite(data, 0)
        east.cycle()
        before = self.link.bytes
        handle.pwrite(data, 0)
        handle.pwrite(b"new" * 1000, 5 * MIB)
        point = east.cycle()
        crossed = self.link.bytes - before
        self.assertLess(crossed, 12 * MIB)
        self.assertEqual(west.read(f"orders@{point}"), east.read("orders"))

    def test_the_first_copy_goes_on_after_restarts_and_tells_how_far_it_is(self):
        east, west = self.linked({"orders": "64MiB"}, start=False, options='rate = "6MiB"')
        data = random.randbytes(40 * MIB)
        with open(f"{east.path}/orders.img", "wb") as file:
            if not SECTOR:
                file.truncate(64 * MIB)
            file.write(data)
        west.start()
        east.start()
        handle = east.connect("orders")
        handle.pwrite(b"while it is copied" * 100, 30 * MIB)
        wait_for(lambda: east.group().get("progress", 0) > 0.5, what="some progress")
        status = east.group()
        self.assertEqual(status["state"], "copying")
        self.assertLess(status["progress"], 1)
        self.assertGreater(status["eta_seconds"], 0)
        self.assertGreater(status["rate_bytes_per_second"], 0)
        before = self.link.bytes
        random.choice((east, west)).kill()
        for site in (east, west):
            if site.process is None:
                site.start()
        east.farcopy("rate", "shop", "unlimited")
        self.mirroring(east)
        self.assertLess(self.link.bytes - before, 40 * MIB, "what had arrived is not sent again")
        point = east.cycle()
        self.assertEqual(west.read(f"orders@{point}"), east.read("orders"))

    def test_a_flush_counts_once_every_connection_has_answered_it(self):
        """The peer has several connections, and each flush covers what was acknowledged on its own: one of them waits."""
        held, go, committed = (os.path.join(self.directory, name) for name in ("held", "go", "committed"))
        socket = os.path.join(self.directory, "plain.sock")
        self.spawn(
            "nbdkit", "-f", "-U", socket, "eval", "get_size=echo 8388608", "thread_model=echo parallel", "pread=head -c $3 /dev/zero",
            "pwrite=cat >/dev/null", "can_zero=exit 0", "zero=exit 0", "can_multi_conn=exit 0",
            # Of all flushes one waits, and which one it is does not matter.
            f"flush=if mkdir {held} 2>/dev/null; then until test -e {go}; do sleep 0.02; done; fi")
        wait_for(lambda: os.path.exists(socket), what="nbdkit")
        site = self.site(
            "east", {"orders": "8MiB"}, extra=f'[peers.array]\nnbd = "unix:{socket}"\ncommit_command = "touch {committed}"\n',
            groups='[groups.shop]\nvolumes = ["orders"]\nrole = "primary"\npeer = "array"\ninterval = "manual"\n'
                   'stall_timeout = "60s"\n')
        wait_for(lambda: os.path.exists(held), what="the flushes")
        # Nothing would happen at all, so there is nothing to wait for.
        time.sleep(1)
        self.assertFalse(os.path.exists(committed), "the point was committed while a flush was not answered")
        self.assertGreater(site.group()["pending_bytes"], 0, "what one connection has not flushed is still to be sent")
        open(go, "w").close()
        wait_for(lambda: os.path.exists(committed), what="the commit")

    def test_a_plain_remote_gets_points_by_command(self):
        """The secondary is nbdkit; the command that commits takes a copy of its file."""
        remote = os.path.join(self.directory, "remote.img")
        with open(remote, "wb") as file:
            file.truncate(8 * MIB)
        socket = os.path.join(self.directory, "plain.sock")
        run("nbdkit", "-U", socket, "-P", f"{self.directory}/pid", "file", remote)
        self.addCleanup(lambda: os.kill(int(open(f"{self.directory}/pid").read()), 15))
        copy = f"cp {remote} {self.directory}/point-$FARCOPY_POINT && test -n $FARCOPY_GROUP"
        for command in (None, copy):
            extra = f'[peers.array]\nnbd = "unix:{socket}"\n' + (f'commit_command = "{command}"\n' if command else "")
            site = self.site(
                f"east-{bool(command)}", {"orders": "8MiB"}, extra=extra,
                groups='[groups.shop]\nvolumes = ["orders"]\nrole = "primary"\npeer = "array"\ninterval = "manual"\n')
            handle = site.connect("orders")
            data = random.randbytes(2 * MIB)
            handle.pwrite(data, MIB)
            point = site.cycle()
            status = site.group()
            self.assertEqual(status["state"], "mirroring")
            if command:
                self.assertNotIn("notice", status)
                with open(f"{self.directory}/point-{point}", "rb") as file:
                    self.assertEqual(file.read(), site.read("orders"))
            else:
                self.assertIn("not consistent between points", status["notice"])
                with open(remote, "rb") as file:
                    self.assertEqual(file.read(), site.read("orders"))
            # A restart goes on with the difference.
            site.kill()
            site.start()
            site.connect("orders").pwrite(b"y" * 4096, 0)
            wait_for(lambda: site.group()["state"] in ("mirroring", "resyncing"), what="the link")
            self.assertEqual(site.group()["pending_bytes"], 4096)
            site.cycle()
            self.assertIn("no Farcopy site", site.farcopy("switchover", "shop", check=False).stderr)
            self.assertIn("no Farcopy site", site.farcopy("verify", "shop", check=False).stderr)
            site.stop()
