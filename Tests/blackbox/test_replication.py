"""A group of two sites: first copy, cycles, suspension, restarts, refusals, recovery points, failover."""

import json
import os
import random
import subprocess
import time

import nbd

from sites import SiteTest, byte_count, not_on_devices, read_handle, run, wait_for

SIZE = 32 << 20
VOLUMES = {"orders": "32MiB", "wal": "4MiB"}


class Replication(SiteTest):
    def api(self, site, method, path, body=None):
        words = ["curl", "-s", "-X", method, "-H", "Content-Type: application/json", "--unix-socket", site.control[5:],
                 f"http://x{path}"]
        if body is not None:
            words += ["-d", json.dumps(body)]
        return json.loads(run(*words).stdout)

    def assert_same(self, east, west, point):
        for volume in VOLUMES:
            self.assertEqual(west.read(f"{volume}@{point}"), east.read(volume), volume)

    @not_on_devices
    def test_first_copy_of_existing_data_sends_zeroes_as_zeroes(self):
        east, west = self.pair(VOLUMES, interval="manual", start=False)
        data = random.randbytes(3 << 20)
        with open(f"{east.path}/orders.img", "wb") as file:
            file.truncate(SIZE)
            file.seek(20 << 20)
            file.write(data)
        west.start()
        east.start()
        wait_for(lambda: east.group().get("point"), what="the first copy")
        self.assertEqual(east.group()["state"], "mirroring")
        point = east.cycle()
        self.assert_same(east, west, point)
        self.assertLess(os.stat(f"{west.path}/orders.img").st_blocks * 512, 8 << 20, "zeroes stay holes")

    @not_on_devices
    def test_grains_that_are_larger_than_holes(self):
        """Data that begins and ends within a grain, holes of less than one: first copy, points, a FlashCopy, a suspension."""
        for grain in ("64KiB", "1MiB"):
            with self.subTest(grain):
                try:
                    self.copy_with_grain(grain)
                finally:
                    self.put_away(*self.sites)

    def copy_with_grain(self, grain):
        east, west = self.pair(VOLUMES, interval="manual", start=False)
        for site in (east, west):
            for size in VOLUMES.values():
                site.edit(f'size = "{size}"\n', f'size = "{size}"\ngrain = "{grain}"\n')
        with open(east.image("orders"), "wb") as file:
            file.truncate(SIZE)
            for at, length in ((3 * 4096, 4096), ((8 << 20) + 3 * 4096, 8192), ((9 << 20) + (60 << 10), 8192),
                               ((20 << 20) - 4096, 4096), (SIZE - (20 << 10), 4096)):
                file.seek(at)
                file.write(random.randbytes(length))
        west.start()
        east.start()
        wait_for(lambda: east.group().get("point"), what="the first copy")
        # Of what the first copy brought: nothing was written since.
        self.assert_same(east, west, west.points()[-1]["id"])
        handle = east.connect("orders")
        east.farcopy("flashcopy", "create", "orders", "kept")
        kept = east.read("orders")
        for _ in range(40):
            handle.pwrite(random.randbytes(512), random.randrange(SIZE // 512) * 512)
        self.assertEqual(east.read("orders@kept"), kept)
        point = east.cycle()
        self.assert_same(east, west, point)
        image = east.read("orders")
        east.farcopy("suspend", "shop")
        handle.zero(4096, (8 << 20) + 4096)
        handle.pwrite(b"x" * 100, (30 << 20) + 100)
        self.assertEqual(east.group()["pending_bytes"], 2 * byte_count(grain))
        east.farcopy("resume", "shop")
        wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")
        newer = east.cycle()
        self.assert_same(east, west, newer)
        self.assertEqual(west.read(f"orders@{point}"), image)

    def test_points_keep_and_read_side_by_side(self):
        east, west = self.pair(VOLUMES, interval="manual", keep=3)
        handle = east.connect("orders")
        pages = {}
        for value in range(1, 7):
            handle.pwrite(bytes([value]) * 4096, 8192)
            pages[east.cycle()] = value
        points = [point["id"] for point in west.points()]
        self.assertEqual(points, sorted(pages)[-3:])
        for point in points:
            self.assertEqual(west.connect(f"orders@{point}").pread(4096, 8192), bytes([pages[point]]) * 4096)
        self.assertEqual(west.connect("orders").pread(4096, 8192), bytes([6]) * 4096)
        reader = west.connect("orders")
        for value in range(7, 13):
            handle.pwrite(bytes([value]) * 4096, 8192)
            east.cycle()
        self.assertEqual(reader.pread(4096, 8192), bytes([6]) * 4096, "a client keeps the point that it opened")
        with self.assertRaises(nbd.Error):
            reader.pwrite(b"x" * 512, 0)

    def test_a_reader_keeps_its_point_when_the_next_ones_leave(self):
        """Whoever opened a point reads through newer ones, which are retired before it is: they hand over to it all the same."""
        east, west = self.pair(VOLUMES, interval="manual", keep=2)
        handle = east.connect("orders")
        handle.pwrite(b"a" * 65536, 0)
        point = east.cycle()
        reader = west.connect(f"orders@{point}")
        for page in range(8):
            handle.pwrite(bytes([page]) * 4096, page * 4096)
            east.cycle()
            self.assertEqual(reader.pread(65536, 0), b"a" * 65536, f"after {page + 1} more points")

    def test_suspend_and_resume_send_the_difference(self):
        east, west = self.pair(VOLUMES, interval="0s")
        handle = east.connect("orders")
        for at in range(0, SIZE, 1 << 20):
            handle.pwrite(random.randbytes(1 << 20), at)
        east.cycle()
        east.farcopy("suspend", "shop")
        wait_for(lambda: east.group()["state"] == "suspended", what="the suspension")
        self.assertIn("operator", east.group()["reason"])
        self.assertEqual(east.farcopy("cycle", "shop", "--wait", check=False).returncode, 1)
        before = west.status()["volumes"]["orders"]["bytes_written"]
        for _ in range(20):
            handle.pwrite(random.randbytes(4096), random.randrange(SIZE // 4096) * 4096)
        self.assertLessEqual(east.group()["pending_bytes"], 20 * 4096)
        east.kill()
        east.start()
        self.assertEqual(east.group()["state"], "suspended", "it stays suspended through a restart")
        east.farcopy("resume", "shop")
        wait_for(lambda: east.group()["state"] == "mirroring", what="mirroring")
        point = east.cycle()
        self.assert_same(east, west, point)
        sent = west.status()["volumes"]["orders"]["bytes_written"] - before
        self.assertLessEqual(sent, 20 * 4096, "only the difference is sent")

    def test_lost_peer_is_told_and_comes_back(self):
        east, west = self.pair(VOLUMES, interval="0s")
        east.cycle()
        west.kill()
        handle = east.connect("orders")
        handle.pwrite(b"meanwhile" * 100, 4096)
        wait_for(lambda: east.group()["state"] == "suspended", what="the suspension")
        status = east.group()
        self.assertTrue(status["reason"])
        lag = status["lag_seconds"]
        time.sleep(0.5)
        self.assertGreater(east.group()["lag_seconds"], lag, "lag rises while anything is stuck")
        west.start()
        wait_for(lambda: east.group()["state"] == "mirroring", what="mirroring")
        self.assert_same(east, west, east.cycle())

    def test_volumes_written_outside_the_group_are_compared_anew(self):
        """At either site: the group is taken out of the configuration, hosts write, the group comes back."""
        east, west = self.pair(VOLUMES, interval="manual")
        east.connect("orders").pwrite(b"before" * 100, 0)
        east.cycle()
        for site in (east, west):
            site.stop()
            with open(site.config) as file:
                whole = file.read()
            with open(site.config, "w") as file:
                file.write(whole[:whole.index("[groups.shop]")])
            site.start()
            site.connect("orders").pwrite(site.name.encode() * 128, 1 << 20)
            site.stop()
            with open(site.config, "w") as file:
                file.write(whole)
            site.start()
            wait_for(lambda: east.group()["state"] != "suspended", what="the link")
            self.assert_same(east, west, east.cycle())

    def test_over_tcp(self):
        """NBD and control API over TCP, as between two hosts."""
        import socket
        ports = []
        for _ in range(4):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                ports.append(probe.getsockname()[1])
        east, west = self.pair(VOLUMES, interval="manual", start=False)
        for site, mine, theirs in ((east, ports[:2], ports[2:]), (west, ports[2:], ports[:2])):
            other = west if site is east else east
            with open(site.config) as file:
                text = file.read()
            text = text.replace(f'listen = ["unix:{site.socket}"]', f'listen = ["unix:{site.socket}", "127.0.0.1:{mine[0]}"]')
            text = text.replace(f'control = ["{site.control}"]', f'control = ["{site.control}", "127.0.0.1:{mine[1]}"]')
            text = text.replace(f'nbd = "unix:{other.socket}"', f'nbd = "127.0.0.1:{theirs[0]}"')
            text = text.replace(f'control = "{other.control}"', f'control = "127.0.0.1:{theirs[1]}"')
            with open(site.config, "w") as file:
                file.write(text)
        west.start()
        east.start()
        east.connect("orders").pwrite(random.randbytes(1 << 20), 0)
        self.assert_same(east, west, east.cycle())
        run("nbdinfo", f"nbd://127.0.0.1:{ports[2]}/orders")

    def test_clean_restart_of_both(self):
        east, west = self.pair(VOLUMES, interval="0s")
        handle = east.connect("orders")
        handle.pwrite(b"before" * 1000, 0)
        point = east.cycle()
        east.stop()
        west.stop()
        self.assertFalse(os.path.exists(east.socket))
        west.start()
        self.assertIn(point, [p["id"] for p in west.points()])
        east.start()
        self.assert_same(east, west, east.cycle())

    def test_power_loss_compares_everything_and_keeps_points(self):
        """Another boot id without a clean stop: the primary resends, the secondary's points are as they were."""
        east, west = self.pair(VOLUMES, interval="manual")
        east.connect("orders").pwrite(random.randbytes(1 << 20), 1 << 20)
        point = east.cycle()
        image = west.read(f"orders@{point}")
        for site in (east, west):
            site.lose_power()
        west.start()
        east.start()
        self.assertEqual(west.read(f"orders@{point}"), image)
        wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")
        self.assert_same(east, west, east.cycle())

    def test_power_loss_resends_the_active_regions_only(self):
        east, west = self.pair({"orders": "256MiB"}, interval="manual")
        handle = east.connect("orders")
        data = random.randbytes(1 << 20)
        for at in range(0, 256 << 20, 1 << 20):
            handle.pwrite(data, at)
        east.cycle()
        east.stop()
        east.start()
        # After a restart the log still has every region that was written; give it a clean start.
        self.assertGreater(east.status()["volumes"]["orders"]["active_bytes"], 0)
        wait_for(lambda: east.status()["volumes"]["orders"]["active_bytes"] == 0, seconds=60, what="idle regions to leave")
        east.connect("orders").pwrite(b"x" * 4096, 100 << 20)
        self.assertEqual(east.status()["volumes"]["orders"]["active_bytes"], 4 << 20)
        east.lose_power()
        east.start()
        wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")
        point = east.cycle()
        sent = json.loads(east.farcopy("points", "shop", "--json").stdout)[0]["bytes"]
        self.assertGreater(sent, 0)
        self.assertLessEqual(sent, 4 << 20)
        self.assertEqual(west.read(f"orders@{point}"), east.read("orders"))

    def test_intake_is_closed_to_others(self):
        east, west = self.pair(VOLUMES)
        east.cycle()
        for name in ("orders@secondary", "orders@secondary:0", "orders@secondary:1"):
            with self.assertRaises(nbd.Error):
                west.connect(name)
        listed = run("nbdinfo", "--list", "--json", west.uri("")).stdout
        self.assertNotIn("secondary", listed)
        answer = self.api(west, "POST", "/v1/peer/groups/shop/session", {
            "site": "mallory", "siteID": "00", "volumes": [], "generations": []})
        self.assertIn("has the peer 'east'", answer["error"])
        answer = self.api(west, "POST", "/v1/peer/groups/shop/session", {
            "site": "east", "siteID": "00", "volumes": [], "generations": []})
        self.assertIn("belongs to another 'east'", answer["error"])
        answer = self.api(west, "POST", "/v1/peer/groups/shop/commit", {
            "siteID": "00", "session": 1, "number": 10**6, "formedAt": 0})
        self.assertIn("session that has ended", answer["error"])
        east.cycle()

    def test_points_out_of_order_are_refused_and_commit_is_idempotent(self):
        east, west = self.pair(VOLUMES, interval="manual")
        point = east.cycle()
        east.kill()
        record = json.loads(self.record(f"{east.path}/state/site.record"))
        group = json.loads(self.record(f"{east.path}/state/groups/shop/group.record"))
        opened = self.api(west, "POST", "/v1/peer/groups/shop/session", {
            "site": "east", "siteID": record["id"], "generations": group["generations"],
            "volumes": [{"name": "orders", "size": SIZE}, {"name": "wal", "size": 4 << 20}]})
        self.assertEqual(opened["state"]["committed"]["number"], point)

        def commit(number, previous):
            return self.api(west, "POST", "/v1/peer/groups/shop/commit", {
                "siteID": record["id"], "session": opened["state"]["session"], "number": number,
                "previous": previous, "formedAt": time.time()})
        self.assertIn("out of order", commit(point + 2, point + 1)["error"])
        self.assertIn("out of order", commit(point - 1, point)["error"])
        first = commit(point + 1, point)
        self.assertEqual(commit(point + 1, point), first, "asked again, the same answer")
        self.assertEqual([p["id"] for p in west.points()][-2:], [point, point + 1])

    def test_a_new_session_ends_what_the_one_before_could_write(self):
        east, west = self.pair(VOLUMES, interval="manual")
        point = east.cycle()
        east.kill()
        record = json.loads(self.record(f"{east.path}/state/site.record"))
        group = json.loads(self.record(f"{east.path}/state/groups/shop/group.record"))

        def session():
            return self.api(west, "POST", "/v1/peer/groups/shop/session", {
                "site": "east", "siteID": record["id"], "generations": group["generations"],
                "volumes": [{"name": "orders", "size": SIZE}, {"name": "wal", "size": 4 << 20}]})

        def commit(of):
            return self.api(west, "POST", "/v1/peer/groups/shop/commit", {
                "siteID": record["id"], "session": of["state"]["session"], "number": point + 1, "previous": point,
                "formedAt": time.time()})
        first = session()
        stale = west.connect(first["exports"][0])
        stale.pwrite(b"first" * 100, 0)
        second = session()
        with self.assertRaises(nbd.Error, msg="a connection of the session before writes after the next has begun"):
            stale.pwrite(b"stale" * 100, 0)
        with self.assertRaises(nbd.Error):
            west.connect(first["exports"][0])
        self.assertIn("session that has ended", commit(first)["error"])
        west.connect(second["exports"][0]).pwrite(b"second" * 100, 0)
        self.assertNotIn("error", commit(second))
        self.assertEqual(west.connect(f"orders@{point + 1}").pread(600, 0), b"second" * 100)

    def record(self, path):
        """The newest payload of a record file."""
        import struct
        with open(path, "rb") as file:
            data = file.read()
        copies = []
        for start in (0, 256 << 10):
            if data[start:start + 8] == b"FARCOPY1":
                sequence, length = struct.unpack("<QI", data[start + 8:start + 20])
                copies.append((sequence, data[start + 32:start + 32 + length]))
        return max(copies)[1]

    @not_on_devices
    def test_a_volume_of_another_size_is_refused(self):
        east, west = self.pair(VOLUMES, start=False)
        west.edit('size = "4MiB"', 'size = "8MiB"')
        west.start()
        east.start()
        wait_for(lambda: east.group()["state"] == "suspended", what="the refusal")
        self.assertIn("volume 'wal' of group 'shop' has 8388608 bytes at 'west' and 4194304 at 'east'", east.group()["reason"])

    def test_failover_to_an_earlier_point_and_stale_primary(self):
        east, west = self.pair(VOLUMES, interval="manual", keep=5)
        handle = east.connect("orders")
        images = {}
        for round in range(4):
            for _ in range(30):
                handle.pwrite(random.randbytes(65536), random.randrange(SIZE // 512 - 128) * 512)
            point = east.cycle()
            images[point] = east.read("orders")
        chosen = sorted(images)[1]
        east.kill()
        self.assertEqual(west.farcopy("failover", "shop", "--point", "999", check=False).returncode, 1)
        west.farcopy("failover", "shop", "--point", str(chosen))
        self.assertEqual(west.read("orders"), images[chosen])
        west.connect("orders").pwrite(b"new work" * 64, 0)
        for point, image in images.items():
            self.assertEqual(west.read(f"orders@{point}"), image, f"point {point} is still there")
        west.kill()
        west.start()
        now = b"new work" * 64 + images[chosen][512:]
        self.assertEqual(west.read("orders"), now, "a restart in mid-restore goes on")
        wait_for(lambda: west.status()["volumes"]["orders"]["restoring_bytes"] == 0, what="the restore")
        with open(f"{west.path}/orders.img", "rb") as file:
            self.assertEqual(file.read(), now)
        east.start()
        wait_for(lambda: east.group()["state"] == "suspended", what="the refusal of the stale primary")
        self.assertIn("has taken over", east.group()["reason"])
        self.assertEqual(west.read("orders"), now, "the stale primary has changed nothing")

    def test_a_full_target_gives_the_point_up_and_the_host_goes_on(self):
        """Rule 5. Needs root for a small tmpfs under the primary's state."""
        if os.geteuid() != 0:
            self.skipTest("mounting a small tmpfs needs root")
        east, west = self.pair(VOLUMES, interval="manual", start=False)
        os.makedirs(f"{east.path}/state")
        run("mount", "-t", "tmpfs", "-o", "size=4m", "farcopy-test", f"{east.path}/state")
        self.addCleanup(run, "umount", "-l", f"{east.path}/state", check=False)
        west.start()
        east.start()
        handle = east.connect("orders")
        handle.pwrite(random.randbytes(30 << 20), 0)
        wait_for(lambda: east.group().get("point"), what="the first copy")
        done = json.loads(east.farcopy("flashcopy", "create", "orders", "doomed", "--json").stdout)
        self.assertEqual(done[0]["state"], "active")
        data = random.randbytes(30 << 20)
        handle.pwrite(data, 0)
        self.assertEqual(bytes(handle.pread(30 << 20, 0)), data, "the host's write succeeds")
        wait_for(lambda: json.loads(east.farcopy("flashcopy", "list", "--json").stdout)[0]["state"] == "failed", what="the end of the copy")
        self.assertIn("No space", json.loads(east.farcopy("flashcopy", "list", "--json").stdout)[0]["reason"])
        east.farcopy("flashcopy", "withdraw", "orders", "doomed")
        wait_for(lambda: json.loads(east.farcopy("flashcopy", "list", "--json").stdout) == [], what="the withdrawal")
        self.assert_same(east, west, east.cycle())
