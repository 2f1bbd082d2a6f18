"""What a secondary takes from a peer, and what it refuses: the test plays the primary by hand, with requests that come late, from sessions that
have ended, or from a site that is stale."""

import http.server
import json
import os
import secrets
import socketserver
import threading
import time

import nbd

from control import call
from laboratory import LaboratoryTest
from sites import SiteTest, wait_for

MIB = 1 << 20
PAGE = 4096
SIZE = 32 * MIB


class Peer:
    """The replicator of `east`, by hand."""

    def __init__(self, site):
        self.site, self.identity, self.handles = site, secrets.token_hex(16), []

    def ask(self, word, **body):
        return call(self.site, "POST", f"/v1/peer/groups/shop/{word}", body)

    def try_session(self, *generations):
        return self.ask(
            "session", site="east", siteID=self.identity, volumes=[dict(name="orders", size=SIZE)], generations=generations)

    def session(self, *generations):
        """Opens one; its number and a connection to the intake."""
        status, answer = self.try_session(*(generations or ("first",)))
        assert status == 200, answer
        handle = nbd.NBD()
        handle.set_export_name(answer["exports"][0])
        handle.connect_unix(self.site.socket)
        self.handles.append(handle)  # a connection that is forgotten is closed
        return answer["state"]["session"], handle

    def commit(self, session, number, previous=None):
        body = dict(siteID=self.identity, session=session, number=number, formedAt=time.time())
        return self.ask("commit", **body, **({} if previous is None else dict(previous=previous)))

    def promote(self, session, point):
        return self.ask("promote", siteID=self.identity, session=session, point=point)


class ShortAnswers(http.server.BaseHTTPRequestHandler):
    """Passes a control API on, and names one export less than it does."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        status, answer = call(self.server.site, "POST", self.path, json.loads(body or b"{}"))
        if isinstance(answer, dict) and "exports" in answer:
            answer["exports"] = answer["exports"][:-1]
        data = json.dumps(answer if status < 300 else {"error": answer}).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass

    def address_string(self):
        return "a socket"


class ByHand:
    def secondary(self, **options):
        _, west = self.pair({"orders": "32MiB"}, interval="manual", start=False, **options)
        west.start()
        return west, Peer(west)

    def points(self, west):
        return [point["id"] for point in west.points()]

    def page(self, letter):
        return letter * PAGE


class PeerSessions(ByHand, SiteTest):
    def assert_goes_on(self, west, peer, session, handle, newest):
        """The session is as good as before."""
        handle.pwrite(self.page(b"z"), 0)
        handle.flush()
        status, answer = peer.commit(session, newest + 1, newest or None)
        self.assertEqual(status, 200, answer)
        self.assertEqual(self.points(west)[-1], newest + 1)
        self.assertEqual(west.connect(f"orders@{newest + 1}").pread(PAGE, 0), self.page(b"z"))
        self.assertEqual(west.group()["role"], "secondary")

    def test_a_session_of_an_older_generation(self):
        """A site that has not heard of a failover is stale, whatever it says; the one that has goes on."""
        west, peer = self.secondary()
        peer.session("first")
        session, handle = peer.session("second", "first")
        for generations in (("first",), ("third", "first"), ()):
            status, words = peer.try_session(*generations)
            self.assertEqual(status, 403, words)
            self.assertIn("older generation", words)
        self.assert_goes_on(west, peer, session, handle, 0)

    def test_a_commit_from_a_session_that_has_ended(self):
        west, peer = self.secondary()
        ended, late = peer.session()
        late.pwrite(self.page(b"a"), 0)
        session, handle = peer.session()
        for number in (ended, 0, session ^ 1):
            status, words = peer.commit(number, 1)
            self.assertEqual(status, 403, words)
            self.assertIn("session that has ended", words)
        with self.assertRaises(nbd.Error):
            late.pwrite(self.page(b"b"), 0)
        self.assertEqual(self.points(west), [])
        self.assert_goes_on(west, peer, session, handle, 0)
        # Also of a point that is there: nobody else is told that it was committed.
        self.assertEqual(peer.commit(ended, 1)[0], 403)

    def test_a_promotion_from_a_session_that_has_ended(self):
        west, peer = self.secondary()
        ended, _ = peer.session()
        self.assertEqual(peer.commit(ended, 1)[0], 200)
        session, handle = peer.session()
        for number in (ended, 0, session ^ 1):
            status, words = peer.promote(number, 1)
            self.assertEqual(status, 403, words)
            self.assertIn("session that has ended", words)
        self.assert_goes_on(west, peer, session, handle, 1)

    def test_a_promotion_at_another_point_than_the_newest(self):
        """What the old primary's hosts had last would be missing, or be what nobody has."""
        west, peer = self.secondary()
        session, handle = peer.session()
        self.assertEqual(peer.promote(session, 1)[0], 403, "there is no point at all")
        for number, previous in ((1, None), (2, 1)):
            self.assertEqual(peer.commit(session, number, previous)[0], 200)
        for point in (1, 3):
            status, words = peer.promote(session, point)
            self.assertEqual(status, 403, words)
            self.assertIn("is not the newest", words)
        self.assert_goes_on(west, peer, session, handle, 2)
        self.assertEqual(peer.promote(session, 3)[0], 200)
        self.assertEqual(west.group()["role"], "primary")

    def test_a_commit_while_writes_are_under_way(self):
        """It would be half in the point and half not. What is in a point is in it when the commit is answered, whole."""
        west, peer = self.secondary()
        session, handle = peer.session()
        old, new = b"o" * SIZE, b"n" * SIZE
        handle.pwrite(old, 0)
        number, refused = 0, 0
        for attempt in range(20):
            status, words = peer.commit(session, number + 1, number or None)
            self.assertEqual(status, 200, words)
            number += 1
            # Every grain's old content goes to the point first, so this takes a while.
            write = handle.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(new)), 0)
            while not handle.aio_is_ready():
                handle.poll(-1)
            status, words = peer.commit(session, number + 1, number)
            if status == 200:
                # Before all of it had arrived, or after its end.
                number += 1
                taken = west.connect(f"orders@{number}").pread(SIZE, 0)
                self.assertTrue(taken in (old, new), "the point has a part of the write")
            else:
                self.assertIn("under way", words)
                refused += 1
            while not handle.aio_command_completed(write):
                handle.poll(-1)
            if status == 200:
                self.assertTrue(west.connect(f"orders@{number}").pread(SIZE, 0) == taken, "the point has changed")
            if refused == 2:
                break
            old, new = new, old
        self.assertEqual(refused, 2, "no commit met a write in twenty tries")
        self.assertEqual(self.points(west)[-1], number)

    def test_what_flows_back_after_a_failover_counts_as_changed(self):
        """The old primary takes it for sent, and so does not remember it: only the new one does."""
        west, peer = self.secondary()
        session, handle = peer.session()
        handle.pwrite(bytes(range(256)) * (SIZE // 256), 0)
        handle.flush()
        self.assertEqual(peer.commit(session, 1)[0], 200)
        grain = west.status()["volumes"]["orders"]["grain"]
        sent = {5, 6, 9, 700}
        for index in sent:
            handle.pwrite(self.page(b"s"), index * grain)
        handle.flush()
        west.farcopy("failover", "shop")
        wait_for(lambda: west.status()["volumes"]["orders"]["restoring_bytes"] == 0, what="the restore")
        for _ in range(2):
            status, answer = call(west, "GET", "/v1/peer/groups/shop/changes?volume=orders&from=0")
            self.assertEqual(status, 200, answer)
            changed = {64 * index + bit for index, word in enumerate(answer["words"]) for bit in range(64) if word >> bit & 1}
            self.assertEqual(changed, sent)
            self.assertEqual(west.group()["pending_bytes"], len(sent) * grain)
            west.kill()
            west.start()

    def test_numbers_come_in_order(self):
        west, peer = self.secondary()
        session, handle = peer.session()
        self.assertEqual(peer.commit(session, 4)[0], 200)
        for number, previous in ((5, None), (5, 3), (3, 4), (5, 5)):
            status, words = peer.commit(session, number, previous)
            self.assertEqual(status, 403, (number, previous))
            self.assertIn("out of order", words)
        self.assertEqual(peer.commit(session, 4, 4)[0], 200, "asked again")
        self.assertEqual(self.points(west), [4])
        self.assert_goes_on(west, peer, session, handle, 4)


class OddAnswers(SiteTest):
    """What a peer says, a primary looks at before it relies on it."""

    def test_fewer_exports_than_volumes(self):
        east, west = self.pair({"orders": "1MiB", "wal": "1MiB"}, interval="0s", start=False)
        west.start()
        path = os.path.join(self.directory, "between.sock")
        between = socketserver.ThreadingUnixStreamServer(path, ShortAnswers)
        between.site = west
        threading.Thread(target=between.serve_forever, daemon=True).start()
        self.addCleanup(between.server_close)
        self.addCleanup(between.shutdown)
        east.edit(f'control = "{west.control}"', f'control = "unix:{path}"')
        east.start()
        host = east.connect("orders")
        host.pwrite(b"a" * PAGE, 0)
        words = "the peer names 1 exports for 2 volumes"
        wait_for(lambda: words in east.group().get("reason", ""), what="the answer to be refused")
        self.assertEqual(host.pread(PAGE, 0), b"a" * PAGE)
        self.assertEqual(west.points(), [])


class PeersThatDoNotFlush(ByHand, LaboratoryTest):
    """A point that was reported as committed is there after power loss, also if the peer has not flushed."""

    def test_power_is_lost_after_a_commit(self):
        with open(self.image_before_start(), "wb") as file:
            file.write(b"i" * SIZE)
            os.fsync(file.fileno())
        self.west.start()
        peer = Peer(self.west)
        session, handle = peer.session()
        self.assertEqual(peer.commit(session, 1)[0], 200)
        handle.pwrite(b"w" * 4 * MIB, 8 * MIB)
        self.assertEqual(peer.commit(session, 2, 1)[0], 200)
        self.west.lose_power()
        self.west.start()
        self.assertEqual(self.points(self.west), [1, 2])
        for point, letter in ((1, b"i"), (2, b"w")):
            self.assertEqual(self.west.connect(f"orders@{point}").pread(PAGE, 8 * MIB), letter * PAGE, f"point {point}")

    def image_before_start(self):
        """The blocks are there before, or a file system writes new ones with its own log."""
        _, self.west = self.pair({"orders": "32MiB"}, interval="manual", start=False)
        return self.west.image("orders")


if __name__ == "__main__":
    import unittest
    unittest.main()
