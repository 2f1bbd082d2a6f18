"""What operators do beside changing roles: practise, verify, retention, schedules, alerts and their commands."""

import json
import os
import random
import subprocess
import time

from sites import SiteTest, end_group, run, wait_for

MIB = 1 << 20


class Operations(SiteTest):
    def test_practice_leaves_mirroring_and_lag_alone(self):
        east, west = self.pair({"orders": "16MiB", "wal": "4MiB"}, interval="0s", keep=3)
        handle = east.connect("orders")
        handle.pwrite(b"before" * 1000, 0)
        point = east.cycle()
        self.assertIn("practise at 'west'", east.farcopy("practice", "shop", check=False).stderr)
        exports = west.farcopy("practice", "shop", "--point", str(point)).stdout.split()
        self.assertEqual(exports, ["orders@practice", "wal@practice"])
        trial = west.connect("orders@practice")
        self.assertEqual(trial.pread(6, 0), b"before")
        lags = []
        for round in range(20):
            trial.pwrite(bytes([round]) * 4096, round * 4096)
            handle.pwrite(bytes([255 - round]) * 4096, MIB + round * 4096)
            newest = east.cycle()
            lags.append(west.group()["lag_seconds"])
            self.assertEqual(west.group()["state"], "mirroring")
        self.assertLess(max(lags), 3, f"lag during practice: {lags}")
        self.assertEqual(trial.pread(4096, 19 * 4096), bytes([19]) * 4096)
        self.assertEqual(west.read(f"orders@{newest}"), east.read("orders"))
        west.kill()
        west.start()
        self.assertEqual(west.connect("orders@practice").pread(4096, 19 * 4096), bytes([19]) * 4096)
        self.assertIn("practised with already", west.farcopy("practice", "shop", check=False).stderr)
        west.farcopy("practice", "shop", "--end")
        self.assertNotIn("practice", west.farcopy("status").stdout)
        self.assertIn("not being practised", west.farcopy("practice", "shop", "--end", check=False).stderr)

    def test_verify_finds_what_differs_under_load_and_repairs_it(self):
        east, west = self.pair({"orders": "32MiB", "wal": "4MiB"}, interval="0s", keep=2)
        handle = east.connect("orders")
        for at in range(0, 32 * MIB, MIB):
            handle.pwrite(random.randbytes(MIB), at)
        east.cycle()
        report = json.loads(east.farcopy("verify", "shop", "--json").stdout)
        self.assertEqual((report["compared_bytes"], report["differing_bytes"]), (36 * MIB, 0))
        # Somebody writes to the secondary's file behind its back.
        with open(f"{west.path}/orders.img", "r+b") as file:
            for page in (3, 4, 5000):
                file.seek(page * 4096)
                file.write(os.urandom(4096))
        hosts = self.load(east)
        done = east.farcopy("verify", "shop", "--json", check=False)
        end_group(hosts)
        self.assertEqual(done.returncode, 1)
        self.assertIn("--repair", done.stderr)
        report = json.loads(done.stdout)
        self.assertEqual(
            [(d["volume"], d["offset"], d["length"]) for d in report["differences"]],
            [("orders", 3 * 4096, 8192), ("orders", 5000 * 4096, 4096)])
        metrics = run("curl", "-s", "--unix-socket", east.control[5:], "http://x/metrics").stdout
        self.assertIn('farcopy_verify_differences_total{group="shop"} 2', metrics)
        self.assertIn('farcopy_hold_seconds_bucket{group="shop",le="0.001"}', metrics)
        east.farcopy("verify", "shop", "--repair")
        east.cycle()
        self.assertEqual(json.loads(east.farcopy("verify", "shop", "--json").stdout)["differing_bytes"], 0)
        # Whichever point is the newest by now: nobody writes any more, and points are formed all the while.
        self.assertEqual(west.read("orders"), east.read("orders"))
        for site in (east, west):
            self.assertEqual(json.loads(site.farcopy("flashcopy", "list", "--json").stdout), [], "nothing stays behind")
        self.assertIn("is secondary", west.farcopy("verify", "shop", check=False).stderr)

    def test_verify_repairs_more_than_it_lists(self):
        east, west = self.pair({"orders": "16MiB"}, interval="manual")
        east.connect("orders").pwrite(random.randbytes(16 * MIB), 0)
        east.cycle()
        with open(f"{west.path}/orders.img", "r+b") as file:
            for page in range(0, 4096, 2):
                file.seek(page * 4096)
                file.write(os.urandom(16))
        report = json.loads(east.farcopy("verify", "shop", "--repair", "--json").stdout)
        self.assertEqual((report["difference_count"], len(report["differences"])), (2048, 1000))
        point = east.cycle()
        self.assertEqual(west.read(f"orders@{point}"), east.read("orders"))

    def load(self, site):
        """A host that writes to the volume's last quarter all the while."""
        return self.spawn(
            "fio", "--thread", "--name=load", "--ioengine=nbd", f"--uri={site.uri('orders')}", "--rw=randwrite", "--bs=4k", "--iodepth=4",
            "--offset=24m", "--size=8m", "--time_based", "--runtime=60", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def test_verify_is_bounded_aborted_and_cleans_up_after_a_kill(self):
        east, west = self.pair({"orders": "64MiB"}, interval="manual")
        east.connect("orders").pwrite(random.randbytes(8 * MIB), 0)
        east.cycle()
        for end in ("abort", "kill"):
            running = self.spawn(
                east.program, "verify", "shop", "--rate", "1MiB", "--control", east.control, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True)
            wait_for(lambda: "compared" in (east.group().get("operation") or {}).get("step", ""), what="its progress")
            self.assertEqual(east.group()["operation"]["name"], "verify:shop")
            self.assertIn("is in a verify", east.farcopy("switchover", "shop", check=False).stderr)
            if end == "abort":
                east.farcopy("abort", "verify:shop")
                self.assertIn("aborted by the operator", running.communicate(timeout=30)[1])
            else:
                east.kill()
                running.communicate(timeout=30)
                east.start()
            wait_for(lambda: not os.listdir(f"{east.path}/state/volumes/orders/copies"), what="the FlashCopy to go")
            east.cycle()

    def test_points_are_kept_by_hours_and_days(self):
        east, west = self.pair({"orders": "1MiB"}, interval="manual", keep="{ last = 2, hourly = 3, daily = 2 }")
        handle = east.connect("orders")
        images = {}
        for number in range(6):
            handle.pwrite(bytes([number + 1]) * 4096, 0)
            images[east.cycle()] = number + 1
        points = [point["id"] for point in west.points()]
        self.assertIn(len(points), (2, 3), "all of one hour: the newest, or two when the hour has just changed")
        for point in points:
            self.assertEqual(west.connect(f"orders@{point}").pread(1, 0)[0], images[point])

    def test_a_group_of_sixty_four_volumes(self):
        names = [f"disk{number}" for number in range(64)]
        east, west = self.pair({name: "1MiB" for name in names}, interval="0s", keep=2)
        handles = [east.connect(name) for name in names]
        for number, handle in enumerate(handles):
            handle.pwrite(bytes([number + 1]) * 4096, 0)
        point = east.cycle()
        for number, name in enumerate(names):
            self.assertEqual(west.connect(f"{name}@{point}").pread(1, 0)[0], number + 1)
        east.kill()
        west.farcopy("failover", "shop")
        for number, name in enumerate(names):
            self.assertEqual(west.connect(name).pread(1, 0)[0], number + 1)

    def test_a_full_remote_suspends_and_hosts_go_on(self):
        """Needs root for a small tmpfs under the secondary."""
        if os.geteuid() != 0:
            self.skipTest("mounting a small tmpfs needs root")
        east, west = self.pair({"orders": "16MiB"}, interval="manual", start=False)
        os.makedirs(f"{west.path}/small")
        run("mount", "-t", "tmpfs", "-o", "size=8m", "farcopy-test", f"{west.path}/small")
        self.addCleanup(run, "umount", "-l", f"{west.path}/small", check=False)
        west.edit(f"{west.path}/orders.img", f"{west.path}/small/orders.img")
        west.start()
        east.start()
        handle = east.connect("orders")
        handle.pwrite(random.randbytes(4 * MIB), 0)
        point = east.cycle()
        image = west.read(f"orders@{point}")
        data = random.randbytes(12 * MIB)
        handle.pwrite(data, 0)
        east.farcopy("cycle", "shop")
        wait_for(lambda: east.group()["state"] == "suspended", what="the suspension")
        self.assertIn("No space", east.group()["reason"] + east.farcopy("events").stdout)
        handle.pwrite(b"on" * 2048, 0)
        self.assertEqual(west.read("orders"), image, "the remote shows its last point")
        self.assertIn(f"{west.path}/small/orders.img: No space left on device", west.group()["reason"])
        run("mount", "-o", "remount,size=40m", f"{west.path}/small")
        east.farcopy("resume", "shop")
        wait_for(lambda: east.group()["state"] in ("mirroring", "resyncing"), what="the link")
        point = east.cycle()
        self.assertEqual(west.read(f"orders@{point}"), east.read("orders"))

    def test_a_first_copy_is_aborted_and_goes_on(self):
        east, west = self.pair({"orders": "32MiB"}, interval="manual", start=False, options='rate = "4MiB"')
        with open(f"{east.path}/orders.img", "wb") as file:
            file.write(random.randbytes(32 * MIB))
        west.start()
        east.start()
        wait_for(lambda: (east.group().get("operation") or {}).get("name") == "copy:shop", what="the first copy")
        east.farcopy("abort", "copy:shop")
        wait_for(lambda: east.group()["state"] == "suspended", what="the suspension")
        self.assertEqual(east.farcopy("abort", "copy:shop", check=False).returncode, 1)
        east.stop()
        east.start()
        self.assertIn("operator", east.group()["reason"], "after a restart as well")
        east.farcopy("rate", "shop", "unlimited")
        east.farcopy("resume", "shop")
        wait_for(lambda: west.points(), what="the first copy")
        self.assertEqual(west.read("orders"), east.read("orders"))

    def test_cycles_and_scrubs_by_schedule(self):
        east, west = self.pair({"orders": "1MiB"}, interval="manual", options='schedule = "* * * * *"\nscrub = "* * * * *"')
        wait_for(lambda: west.points(), what="the first copy")
        first = west.points()[-1]["id"]
        wait_for(lambda: west.points()[-1]["id"] > first, seconds=75, what="a point by the clock")
        wait_for(lambda: east.group().get("last_verify"), seconds=20, what="a scrub by the clock")

    def test_alerts_run_their_commands_once(self):
        log = os.path.join(self.directory, "alerts")
        command = f"echo $FARCOPY_EVENT $FARCOPY_GROUP $FARCOPY_SITE $FARCOPY_REASON >> {log}"
        options = "\n".join(
            f'{event} = "{command}"' for event in
            ("on_lag_exceeded", "on_suspended", "on_split_brain", "before_failover", "after_failover"))
        east, west = self.pair({"orders": "4MiB"}, interval="0s", options=options + '\nlag_limit = "1s"\ndrain_limit = "1s"')
        east.cycle()
        west.kill()
        wait_for(lambda: os.path.exists(log) and "on_lag_exceeded" in open(log).read(), what="the command")
        time.sleep(0.7)
        lines = open(log).read().splitlines()
        self.assertEqual(sum("on_lag_exceeded shop east" in line for line in lines), 1, lines)
        self.assertEqual(sum("on_suspended shop east" in line for line in lines), 1, lines)
        self.assertEqual(len(east.group()["alerts"]), 2)
        west.start()
        wait_for(lambda: not east.group().get("alerts"), what="the end of the alerts")
        self.assertIn("alert over: lag", east.farcopy("events").stdout)
        # A drain that cannot end: its point is held, and told.
        east.farcopy("rate", "shop", "16KiB")
        east.connect("orders").pwrite(random.randbytes(MIB), 0)
        wait_for(lambda: any("drain" in a for a in east.group().get("alerts", [])), what="the slow drain")
        east.farcopy("abort", "cycle:shop")
        east.farcopy("rate", "shop", "default")
        wait_for(lambda: east.group()["state"] == "mirroring", what="the next point")
        east.cycle()
        east.kill()
        west.farcopy("failover", "shop")
        lines = open(log).read().splitlines()
        self.assertTrue(any(line.startswith("before_failover shop west") for line in lines))
        self.assertTrue(any(line.startswith("after_failover shop west") for line in lines))
