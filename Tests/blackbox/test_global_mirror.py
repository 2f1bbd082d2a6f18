"""Mode `global-mirror`, one host: no target; what hosts overwrite is held in memory, or sent first."""

import json
import os
import random
import threading
import time

import nbd

import closedcut
from sites import SiteTest, read_handle, wait_for

PAGE = 4096
MIB = 1 << 20
SIZE = 8 * MIB
VOLUMES = {"data": "8MiB", "log": "8MiB"}


def lines(policy="hold-image", memory="256MiB", wait="500ms"):
    return f'mode = "global-mirror"\ncollision = "{policy}"\ncollision_memory = "{memory}"\nmax_collision_wait = "{wait}"\n'


class GlobalMirror(SiteTest):
    def linked(self, volumes, interval="manual", **rules):
        return super().linked(volumes, interval, options=lines(**rules))

    def draining(self, east, megabytes=8):
        """A point that goes slowly is under way, all b"1", number `self.number`; returns a connection."""
        self.number = east.group()["point"]["id"] + 1
        handle = east.connect("orders")
        for at in range(0, megabytes * MIB, MIB):
            handle.pwrite(b"1" * MIB, at)
        east.farcopy("rate", "shop", "64KiB")
        east.farcopy("cycle", "shop")
        wait_for(lambda: east.group()["rate_bytes_per_second"] > 0, what="the drain")
        return handle

    def alike(self, primary, secondary):
        wait_for(lambda: primary.group()["state"] == "mirroring", what="mirroring")
        number = primary.cycle()
        self.assertEqual(secondary.read(f"orders@{number}"), primary.read("orders"))

    def test_no_target_and_nothing_written_but_what_hosts_write(self):
        east, west = self.linked({"orders": "16MiB"})
        east.cycle()
        handle = self.draining(east)
        state = os.path.join(east.state, "volumes", "orders")
        self.assertEqual([name for name in os.listdir(state) if name.startswith("point.")], [])
        def allocated():
            return sum(os.stat(os.path.join(folder, name)).st_blocks * 512
                       for folder, _, names in os.walk(east.state) for name in names)

        before = allocated()
        for page in range(1024, 1280):
            handle.pwrite(b"2" * PAGE, page * PAGE)
        found = east.group()
        self.assertEqual(found["mode"], "global-mirror")
        self.assertEqual(found["collisions"]["policy"], "hold-image")
        self.assertEqual(found["collisions"]["held_bytes"], MIB)
        self.assertGreaterEqual(found["collisions"]["memory_bytes"], MIB)
        self.assertEqual(found["collisions"]["waits"], 0)
        self.assertLess(allocated() - before, 64 << 10, "old images are in no file")
        self.assertIn("collisions: hold-image", east.farcopy("status").stdout)
        east.farcopy("rate", "shop", "unlimited")
        wait_for(lambda: west.points()[-1]["id"] == self.number, what="the commit")
        point = west.connect(f"orders@{self.number}")
        self.assertEqual(read_handle(point)[:8 * MIB], b"1" * 8 * MIB, "what was overwritten meanwhile is the next point's")
        found = east.group()["collisions"]
        self.assertEqual(found["memory_bytes"], 0)
        self.assertGreaterEqual(found["memory_peak_bytes"], MIB)
        east.cycle()
        self.assertEqual(west.read("orders"), east.read("orders"))

    def cut_under_load(self, delay, **rules):
        """Dependent writes over two volumes while points form; every point that is looked at is a closed cut, and so is the last."""
        east, west = self.linked(VOLUMES, interval="0s", **rules)
        east.cycle()
        self.link.delay = delay
        writers = closedcut.Writers(lambda: (east.connect("data"), east.connect("log")), SIZE)
        writers.start()
        looked = closedcut.look(west, 6, 6, SIZE)
        found = east.group()
        writers.stop()
        self.link.delay = 0
        self.assertGreater(looked, 5)
        number = east.cycle()
        handles = (west.connect(f"data@{number}"), west.connect(f"log@{number}"))
        self.assertEqual(closedcut.check(*(read_handle(handle) for handle in handles), 6, SIZE), writers.steps)
        print(f"  {looked} looks, {sum(writers.steps)} steps, point {number}, {found['collisions']}")
        return found["collisions"]

    def test_images_in_memory_are_part_of_a_closed_cut(self):
        found = self.cut_under_load(0.02)
        self.assertGreater(found["held_bytes"], 0)
        self.assertEqual((found["waits"], found["points_given_up"]), (0, 0))

    def test_what_is_sent_first_is_part_of_a_closed_cut(self):
        found = self.cut_under_load(0.005, policy="send-first")
        self.assertGreater(found["waits"], 0)
        self.assertEqual(found["points_given_up"], 0)
        self.assertEqual(sum(found["wait_counts"]), found["waits"])

    def test_a_killed_primary_gives_the_point_up_and_loses_nothing(self):
        east, west = self.linked({"orders": "16MiB"})
        east.cycle()
        handle = self.draining(east)
        pages = random.sample(range(2048), 300)
        for page in pages:
            handle.pwrite(b"2" * PAGE, page * PAGE)
        self.assertGreater(east.group()["collisions"]["memory_bytes"], 0)
        before = west.points()[-1]["id"]
        east.kill()
        self.assertEqual(west.points()[-1]["id"], before)
        self.assertEqual(west.read("orders"), bytes(16 * MIB), "the remote keeps its last point")
        east.start()
        east.farcopy("rate", "shop", "unlimited")
        number = east.cycle()
        self.assertGreater(number, before + 1, "the number of the point that was given up is not used again")
        self.assertEqual(west.read(f"orders@{number}"), east.read("orders"))
        reader = east.connect("orders")
        self.assertTrue(all(reader.pread(PAGE, page * PAGE) == b"2" * PAGE for page in pages))

    def longest_write(self, handle, pages, seconds=None):
        longest = 0.0
        for page in pages:
            began = time.monotonic()
            handle.pwrite(b"2" * PAGE, page * PAGE)
            longest = max(longest, time.monotonic() - began)
        return longest

    def test_full_memory_costs_a_point_and_a_bounded_wait(self):
        east, west = self.linked({"orders": "16MiB"}, memory="1MiB", wait="300ms")
        east.cycle()
        handle = self.draining(east)
        self.link.stall(True)  # nothing is lost, nothing arrives
        longest = self.longest_write(handle, range(2047, 1400, -1))
        self.link.stall(False)
        self.assertLess(longest, 10, "far below the time after which a stalled link counts as lost")
        found = east.group()["collisions"]
        self.assertEqual((found["points_given_up"], found["memory_peak_bytes"]), (1, MIB))
        self.assertGreater(found["waits"], 0)
        self.assertIn("collision_memory", found["last_given_up"])
        self.assertIn("1048576", east.farcopy("status").stdout)
        self.assertTrue(any("could not hold point" in event["text"] for event in json.loads(east.farcopy("events", "--json").stdout)))
        east.farcopy("rate", "shop", "unlimited")
        self.alike(east, west)

    def test_full_memory_is_emptied_by_sending_first(self):
        """Hosts outrun the memory; each waits for its own grain, and the point is committed."""
        east, west = self.linked({"orders": "16MiB"}, memory="1MiB", wait="10s")
        east.cycle()
        handle = self.draining(east)
        east.farcopy("rate", "shop", "4MiB")
        pages = list(range(2047, 1023, -1))
        handles = [handle] + [east.connect("orders") for _ in range(3)]
        threads = [threading.Thread(target=self.longest_write, args=(each, pages[number::4])) for number, each in enumerate(handles)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        found = east.group()["collisions"]
        self.assertEqual((found["points_given_up"], found["memory_peak_bytes"]), (0, MIB))
        east.farcopy("rate", "shop", "unlimited")
        wait_for(lambda: west.points()[-1]["id"] == self.number, what="the commit")
        self.assertEqual(west.read(f"orders@{self.number}")[:8 * MIB], b"1" * 8 * MIB)
        self.assertGreater(found["waits"], 0)
        east.cycle()
        self.assertEqual(west.read("orders"), east.read("orders"))

    def test_send_first_does_not_wait_for_a_lost_link(self):
        east, west = self.linked({"orders": "16MiB"}, policy="send-first", wait="5s")
        east.cycle()
        handle = self.draining(east)
        self.link.cut()
        wait_for(lambda: east.group()["state"] == "suspended", what="the suspension")
        longest = self.longest_write(handle, range(1500, 1800))
        self.assertLess(longest, 2, "memory takes the images")
        self.assertEqual(east.group()["collisions"]["held_bytes"], 300 * PAGE)
        self.link.mend()
        east.farcopy("rate", "shop", "unlimited")
        east.farcopy("resume", "shop")
        wait_for(lambda: west.points()[-1]["id"] == self.number, what="the commit")
        self.assertEqual(west.read(f"orders@{self.number}")[:8 * MIB], b"1" * 8 * MIB, "the point was held over the loss of the link")
        east.cycle()
        self.assertEqual(west.read("orders"), east.read("orders"))

    def test_waiting_writes_go_on_when_the_link_is_lost(self):
        east, west = self.linked({"orders": "16MiB"}, policy="send-first", wait="10s")
        east.cycle()
        handle = self.draining(east)
        self.link.stall(True)
        took = []
        thread = threading.Thread(target=lambda: took.append(self.longest_write(handle, [2000])))
        thread.start()
        time.sleep(0.5)
        self.assertEqual(took, [], "it waits until the remote has the old image")
        self.link.cut()
        thread.join(5)
        self.assertEqual(len(took), 1, "nobody waits for a link that is lost")
        self.link.stall(False)
        self.link.mend()
        east.farcopy("rate", "shop", "unlimited")
        east.farcopy("resume", "shop")
        self.alike(east, west)

    def test_modes_are_changed_under_a_held_point(self):
        """What a target has of an older point is not taken for a point that memory held, and the other way round."""
        east, west = self.linked({"orders": "16MiB"})
        mode = lines()
        for site in (east, west):
            site.stop()
            site.edit(mode, "")
            site.start()
        self.alike(east, west)
        for before, after in (("", mode), (mode, ""), ("", mode)):
            handle = self.draining(east)
            for page in random.sample(range(2048), 200):
                handle.pwrite(random.randbytes(PAGE), page * PAGE)
            handle.shutdown()
            if before:
                east.kill()
            else:
                east.stop()
            east.edit(f'keep = 8\nisolation_timeout = "300ms"\n{before}', f'keep = 8\nisolation_timeout = "300ms"\n{after}')
            east.start()
            east.farcopy("rate", "shop", "unlimited")
            self.alike(east, west)

    def test_roles_are_exchanged_and_come_back(self):
        """Both sites are configured alike; hosts collide at either."""
        east, west = self.linked({"orders": "16MiB"})
        east.cycle()
        self.draining(east).shutdown()
        east.farcopy("rate", "shop", "unlimited")
        east.farcopy("switchover", "shop")
        handle = self.draining(west)
        self.longest_write(handle, range(100, 200))
        self.assertEqual(west.group()["collisions"]["held_bytes"], 100 * PAGE)
        handle.shutdown()
        west.kill()
        east.farcopy("failover", "shop")
        west.start()
        wait_for(lambda: all(v["restoring_bytes"] == 0 for v in east.status()["volumes"].values()), what="restore")
        wait_for(lambda: west.group()["state"] != "mirroring", what="its finding that it is stale")
        east.farcopy("resync", "shop", "--discard", "west", "--yes")
        self.alike(east, west)

    def test_a_restore_goes_on_while_a_point_is_sent(self):
        """With send-first only hosts' writes wait; what flows back takes memory."""
        east, west = self.linked({"orders": "16MiB"}, policy="send-first", wait="5s")
        east.cycle()
        self.draining(east).shutdown()
        east.farcopy("rate", "shop", "unlimited")
        wait_for(lambda: west.points()[-1]["id"] == self.number, what="the commit")
        east.farcopy("flashcopy", "create", "orders", "before")
        handle = self.draining(east)
        handle.shutdown()
        began = time.monotonic()
        east.farcopy("flashcopy", "restore", "orders", "before")
        wait_for(lambda: east.status()["volumes"]["orders"]["restoring_bytes"] == 0, what="the restore")
        self.assertLess(time.monotonic() - began, 20)
        self.assertGreater(east.group()["collisions"]["held_bytes"], 0)
        east.farcopy("rate", "shop", "unlimited")
        self.alike(east, west)

    def test_one_wait_in_vain_is_enough(self):
        """Over a link that is stalled and not yet lost, a writer does not wait as long for each of its writes."""
        east, west = self.linked({"orders": "16MiB"}, policy="send-first", wait="500ms")
        east.cycle()
        handle = self.draining(east)
        self.link.stall(True)
        began = time.monotonic()
        self.longest_write(handle, range(1900, 1940))
        self.assertLess(time.monotonic() - began, 5, "forty writes")
        self.link.stall(False)
        east.farcopy("rate", "shop", "unlimited")
        self.alike(east, west)

    def test_requests_do_not_wait_behind_writes_that_wait(self):
        """With send-first over a stalled link, as many writes wait as there is room for; the next ones make them go to memory."""
        east, west = self.linked({"orders": "16MiB"}, policy="send-first", wait="10s")
        east.cycle()
        handle = self.draining(east)
        self.link.stall(True)
        began = time.monotonic()
        block = nbd.Buffer.from_bytearray(bytearray(b"2" * PAGE))
        done = 0
        cookies = [handle.aio_pwrite(block, page * PAGE) for page in range(1000, 1600)]
        while done < 300 and time.monotonic() - began < 6:
            handle.poll(100)
            finished = [cookie for cookie in cookies if handle.aio_command_completed(cookie)]
            done += len(finished)
            cookies = [cookie for cookie in cookies if cookie not in finished]
        self.assertGreaterEqual(done, 300)
        self.assertEqual(east.group()["collisions"]["points_given_up"], 0)
        self.link.stall(False)
        east.farcopy("rate", "shop", "unlimited")
        while cookies:
            handle.poll(100)
            cookies = [cookie for cookie in cookies if not handle.aio_command_completed(cookie)]
        wait_for(lambda: west.points()[-1]["id"] == self.number, what="the commit")
        self.assertEqual(west.read(f"orders@{self.number}")[:8 * MIB], b"1" * 8 * MIB, "the point has what was overwritten")
        self.alike(east, west)
