"""A link between two sites that tests can cut, delay, bound and make lossy: a proxy for sockets in user space.

Loss is modelled as TCP shows it to its users: a lost packet holds up the connection that it belongs to until it was sent
again, one round trip later; other connections go on. Bytes waiting for the wire are bounded, like a router's queue.
"""

import heapq
import os
import random
import selectors
import socket
import threading
import time

PACKET = 1448


class Pipe:
    """One direction of one connection."""

    def __init__(self, source, sink):
        self.source = source
        self.sink = sink
        self.queue = []          # (due, data) in order
        self.unsent = b""
        self.held_until = 0.0    # a lost packet is on its way again
        self.ended = False


class Direction:
    """The wire in one direction, shared by all connections."""

    def __init__(self):
        self.free_at = 0.0
        self.waiting = 0
        self.bytes = 0


class Link:
    """Forwards unix sockets: `forward(listen, target)`. Delay is one way, in seconds; rate in bytes a second each way."""

    def __init__(self, delay=0.0, rate=0, loss=0.0, queue=1 << 20):
        self.delay, self.rate, self.loss, self.queue = delay, rate, loss, queue
        self.selector = selectors.DefaultSelector()
        self.listeners = {}
        self.pipes = {}          # source socket -> Pipe
        self.paused = []
        self.directions = {True: Direction(), False: Direction()}
        self.timers = []
        self.count = 0
        self.is_cut = False
        self.stalled = False
        self.lock = threading.Lock()
        self.wake_read, self.wake_write = socket.socketpair()
        self.wake_read.setblocking(False)
        self.selector.register(self.wake_read, selectors.EVENT_READ)
        self.running = True
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def forward(self, listen, target):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(listen)
        listener.listen(64)
        listener.setblocking(False)
        with self.lock:
            self.listeners[listener] = target
            self.selector.register(listener, selectors.EVENT_READ)
        self.wake()

    def join(self, *sites):
        """Puts the link between two sites that are not running."""
        for here, there in (sites, sites[::-1]):
            for socket in ("nbd.sock", "control.sock"):
                self.forward(f"{here.path}/link-{socket}", f"{there.path}/{socket}")
                here.edit(f"{there.path}/{socket}", f"{here.path}/link-{socket}")

    def wake(self):
        self.wake_write.send(b"x")

    def cut(self):
        """Ends every connection and lets no new one through."""
        with self.lock:
            self.is_cut = True
            for pipe in list(self.pipes.values()):
                self.end(pipe)
        self.wake()

    def mend(self):
        with self.lock:
            self.is_cut = False

    def stall(self, on=True):
        """Connections stay, nothing gets through."""
        with self.lock:
            self.stalled = on
        self.wake()

    @property
    def bytes(self):
        """Bytes that crossed, both ways."""
        return sum(direction.bytes for direction in self.directions.values())

    def close(self):
        if not self.running:
            return
        self.running = False
        self.wake()
        self.thread.join(10)
        for pipe in list(self.pipes.values()):
            self.end(pipe)
        for listener in self.listeners:
            listener.close()
        self.selector.close()
        self.wake_read.close()
        self.wake_write.close()

    # The thread.

    def run(self):
        while self.running:
            with self.lock:
                timeout = 1.0
                if self.timers and not self.stalled:
                    timeout = max(0.0, min(1.0, self.timers[0][0] - time.monotonic()))
            events = self.selector.select(timeout)
            with self.lock:
                for key, mask in events:
                    if key.fileobj is self.wake_read:
                        try:
                            self.wake_read.recv(4096)
                        except BlockingIOError:
                            pass
                    elif key.fileobj in self.listeners:
                        self.accept(key.fileobj)
                    elif key.fileobj in self.pipes:
                        pipe = self.pipes[key.fileobj]
                        if mask & selectors.EVENT_READ:
                            self.receive(pipe)
                        if mask & selectors.EVENT_WRITE and key.fileobj in self.pipes:
                            self.flush(pipe.back)
                self.deliver()

    def accept(self, listener):
        try:
            client, _ = listener.accept()
        except OSError:
            return
        if self.is_cut:
            client.close()
            return
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(self.listeners[listener])
        except OSError:
            client.close()
            server.close()
            return
        for sock in (client, server):
            sock.setblocking(False)
        up, down = Pipe(client, server), Pipe(server, client)
        up.back, down.back = down, up
        up.upward, down.upward = True, False
        self.pipes[client], self.pipes[server] = up, down
        for sock in (client, server):
            self.selector.register(sock, selectors.EVENT_READ)

    def receive(self, pipe):
        direction = self.directions[pipe.upward]
        if self.rate and direction.waiting >= self.queue:
            self.mask(pipe.source, read=False)
            self.paused.append(pipe)
            return
        try:
            data = pipe.source.recv(64 << 10)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            return self.end(pipe)
        now = time.monotonic()
        sent = now
        if self.rate:
            direction.free_at = max(now, direction.free_at) + len(data) / self.rate
            sent = direction.free_at
        due = sent + self.delay
        if self.loss:
            packets = -(-len(data) // PACKET)
            if random.random() < 1 - (1 - self.loss) ** packets:
                due += 2 * self.delay
        due = max(due, pipe.held_until)
        pipe.held_until = due
        direction.waiting += len(data)
        direction.bytes += len(data)
        self.count += 2
        heapq.heappush(self.timers, (sent, self.count, None, len(data), direction))
        heapq.heappush(self.timers, (due, self.count + 1, pipe, data, direction))

    def deliver(self):
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now and not self.stalled:
            _, _, pipe, data, direction = heapq.heappop(self.timers)
            if pipe is None:
                direction.waiting -= data
                continue
            if pipe.ended:
                continue
            pipe.unsent += data
            self.flush(pipe)
        paused, self.paused = self.paused, []
        for pipe in paused:
            if pipe.ended:
                continue
            if self.directions[pipe.upward].waiting >= self.queue:
                self.paused.append(pipe)
            else:
                self.mask(pipe.source, read=True)

    def flush(self, pipe):
        try:
            while pipe.unsent:
                done = pipe.sink.send(pipe.unsent)
                pipe.unsent = pipe.unsent[done:]
        except BlockingIOError:
            pass
        except OSError:
            return self.end(pipe)
        self.mask(pipe.sink, write=bool(pipe.unsent))

    def mask(self, sock, read=None, write=None):
        """Changes what is waited for on a socket of a pipe that has not ended."""
        key = self.selector.get_map().get(sock)
        events = before = key.events if key else 0
        for wanted, bit in ((read, selectors.EVENT_READ), (write, selectors.EVENT_WRITE)):
            if wanted is not None:
                events = events | bit if wanted else events & ~bit
        if events == before:
            return
        if not before:
            self.selector.register(sock, events)
        elif events:
            self.selector.modify(sock, events)
        else:
            self.selector.unregister(sock)

    def end(self, pipe):
        for each in (pipe, pipe.back):
            each.ended = True
            if each.source in self.pipes:
                del self.pipes[each.source]
                if each.source in self.selector.get_map():
                    self.selector.unregister(each.source)
                each.source.close()
