// SessionTests.swift: connections to a reactor with volumes, over socket pairs.

import Base
import CLibURing
import Glibc
import NBDServer
import Ring
import Synchronization
import Testing
import Volumes

/// A reactor with volumes of 16 MiB, and what they lie in.
private struct Server {
    static let size: UInt64 = 16 << 20
    let exports = ExportDirectory()
    let reactor: ReactorHandle
    let directory: String

    init(number: Int) throws {
        reactor = try Reactor.start(number: number, exports: exports)
        var template = Array("/var/tmp/farcopy-test-XXXXXX".utf8CString)
        directory = String(cString: mkdtemp(&template))
    }

    /// Hosts a volume for hosts to write to.
    func host(_ source: OpenFile, named name: String) async throws -> VolumeNumber {
        let geometry = Geometry(size: Self.size, grain: 4096)!
        let header = BitmapHeader(.recording, volume: (0, 0), geometry: geometry, bitmaps: 2)
        let setup = VolumeSetup(
            name: name, geometry: geometry, source: source,
            recording: try MappedFile(path: "\(directory)/\(name).recording", byteCount: header.fileBytes, create: true)
        )
        return await reactor.run { reactor in
            let number = reactor.host(setup)
            reactor.hosted(number).writable = true
            return number
        }
    }

    func file(_ name: String, flags: Int32 = 0) throws -> OpenFile {
        let file = try OpenFile(path: "\(directory)/\(name)", flags: O_RDWR | O_CREAT | flags)
        try file.truncate(to: Self.size)
        return file
    }

    /// Hosts a volume in a file, and exports it.
    func serve(_ name: String) async throws -> VolumeNumber {
        let number = try await host(try file(name), named: name)
        export(name, number)
        return number
    }

    /// From now on writes to the volume wait until their region is in the log, a pipe that takes nothing until it is emptied.
    func fullLog(_ number: VolumeNumber) async -> Pipe {
        let pipe = Pipe()
        pipe.fill()
        await reactor.run { reactor in
            let hosted = reactor.hosted(number)
            hosted.volume.startActivityLog(
                file: hosted.addFile(pipe.input), contents: UnsafeRawBufferPointer(start: nil, count: 0),
                recordingFile: hosted.recordingFile)
        }
        return pipe
    }

    func export(_ name: String, _ volume: VolumeNumber, _ kind: ExportEntry.Kind = .volume) {
        exports.set(
            name,
            VolumeExports(
                own: ExportEntry(size: Self.size, kind: kind, readOnly: false, reactor: reactor, volume: volume)))
    }

    /// A client that has chosen the export; nil when the server ended the connection instead of serving it.
    func connect(_ name: String) async -> Client? {
        var ends: [Int32] = [-1, -1]
        socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &ends)
        let (client, served) = (Client(socket: ends[0]), ends[1])
        await reactor.run { $0.open(served) }
        guard client.receive(18) != nil else { return nil }
        client.send(
            [0, 0, 0, 3] + Array("IHAVEOPT".utf8) + [0, 0, 0, 1, 0, 0, 0, UInt8(name.utf8.count)] + Array(name.utf8))
        // The last answer of the handshake says nothing of what the volume's reactor makes of it; a flush does.
        guard client.receive(10) != nil else { return nil }
        client.send([0x25, 0x60, 0x95, 0x13, 0, 0, 0, 3] + [UInt8](repeating: 0, count: 20))
        return client.reply() == nil ? nil : client
    }

    /// Waits, at most ten seconds, until `condition` holds on the reactor.
    func comes(_ condition: @escaping @Sendable (Reactor) -> Bool) async -> Bool {
        for _ in 0..<1000 {
            if await reactor.run(condition) { return true }
            usleep(10_000)
        }
        return false
    }

    func end() async {
        await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
            Reactor.stop(reactor) { continuation.resume() }
        }
        for name in ["disk", "disk.recording"] + (0..<5).map({ "pipe\($0).recording" }) {
            unlink("\(directory)/\(name)")
        }
        rmdir(directory)
    }
}

/// The client's end of a connection.
private final class Client: Sendable {
    let socket: Int32
    init(socket: Int32) { self.socket = socket }
    deinit { close(socket) }

    /// The server may have closed already, which `receive` finds.
    func send(_ bytes: [UInt8]) { _ = Glibc.send(socket, bytes, bytes.count, Int32(MSG_NOSIGNAL)) }

    /// Nil when the server has closed.
    func receive(_ count: Int) -> [UInt8]? {
        var bytes = [UInt8](repeating: 0, count: count)
        let received = recv(socket, &bytes, count, Int32(MSG_WAITALL))
        return received == count ? bytes : nil
    }

    static func write(_ cookie: UInt8, at offset: UInt32, _ byte: UInt8, count: UInt32) -> [UInt8] {
        func bytes(_ value: UInt32) -> [UInt8] {
            (0..<4).reversed().map { UInt8(truncatingIfNeeded: value >> (8 * $0)) }
        }
        let head: [UInt8] = [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, cookie, 0, 0, 0, 0]
        return head + bytes(offset) + bytes(count) + Array(repeating: byte, count: Int(count))
    }

    /// The cookie of the next reply, which must be one of success.
    func reply() -> UInt8? {
        guard let reply = receive(16) else { return nil }
        #expect(Array(reply[4..<8]) == [0, 0, 0, 0], "error")
        return reply[15]
    }
}

/// A pipe; I/O on either end waits in the ring.
private struct Pipe {
    let output: OpenFile
    let input: OpenFile

    init() {
        var ends: [Int32] = [-1, -1]
        pipe(&ends)
        output = OpenFile(descriptor: ends[0], path: "pipe")
        input = OpenFile(descriptor: ends[1], path: "pipe")
    }

    /// Fills it, so that the next write waits.
    func fill() {
        _ = fcntl(input.descriptor, F_SETFL, O_NONBLOCK)
        let bytes = [UInt8](repeating: 0, count: 4096)
        while write(input.descriptor, bytes, bytes.count) > 0 {}
        _ = fcntl(input.descriptor, F_SETFL, 0)
    }

    func empty() {
        _ = fcntl(output.descriptor, F_SETFL, O_NONBLOCK)
        var bytes = [UInt8](repeating: 0, count: 4096)
        while read(output.descriptor, &bytes, bytes.count) > 0 {}
        _ = fcntl(output.descriptor, F_SETFL, 0)
    }
}

@Test(
    "a write of a client that is gone, or was sent away, goes before what others send to its range, however long it waits",
    arguments: [false, true])
func writesOfAClientThatIsGone(isSentAway: Bool) async throws {
    let server = try Server(number: isSentAway ? 91 : 92)
    let number = try await server.serve("disk")
    // The volume's writes wait until their region is in the activity log, and that cannot be written.
    let log = await server.fullLog(number)
    var stale = await server.connect("disk")
    stale?.send(Client.write(1, at: 4096, UInt8(ascii: "a"), count: 4096))
    #expect(await server.comes { $0.hosted(number).volume.modifyingInFlight == 1 })
    if isSentAway {
        stale?.send([UInt8](repeating: 7, count: 28))  // no request
        #expect(stale?.receive(1) == nil)
    } else {
        stale = nil  // which is seen before the next client is served
    }
    let client = await server.connect("disk")
    client?.send(Client.write(2, at: 4096, UInt8(ascii: "b"), count: 4096))
    #expect(await server.comes { $0.hosted(number).volume.modifyingInFlight == 2 })
    #expect(await server.reactor.run { $0.hosted(number).volume.waiting }.contains("orphans"))
    log.empty()
    #expect(client?.reply() == 2)
    #expect(try server.file("disk").read(at: 4096, count: 4096) == Array(repeating: UInt8(ascii: "b"), count: 4096))
    await server.end()
}

@Test("an intake connection whose session has ended between handshake and hand-over is not served")
func intakeOfAnEarlierSession() async throws {
    let server = try Server(number: 93)
    let number = try await server.host(try server.file("disk"), named: "disk")
    for session: UInt64 in [5, 6] { server.export("intake-\(session)", number, .intake(session: session)) }
    await server.reactor.run { $0.hosted(number).intakeSession = 6 }
    #expect(await server.connect("intake-5") == nil)
    #expect(await server.connect("intake-6") != nil)
    await server.end()
}

@Test("a volume that hosts must not write to any more takes no connection that was chosen before")
func hostOfAVolumeThatIsClosed() async throws {
    let server = try Server(number: 94)
    let number = try await server.serve("disk")
    #expect(await server.connect("disk") != nil)
    await server.reactor.run { $0.hosted(number).writable = false }
    #expect(await server.connect("disk") == nil)
    await server.end()
}

@Test("what waited for an unaligned write waits on while there is no room for more I/O")
func deferredWritesWithoutRoom() async throws {
    let server = try Server(number: 95)
    let number = try await server.host(
        try server.file("disk", flags: farcopy_open_direct), named: "disk")
    server.export("disk", number)
    // Reads of empty pipes take the room for I/O: nearly all of it at first, the rest once writes are waiting.
    let pipes = (0..<5).map { _ in Pipe() }
    var volumes: [VolumeNumber] = []
    for (index, pipe) in pipes.enumerated() {
        volumes.append(try await server.host(pipe.output, named: "pipe\(index)"))
    }
    let (buffer, reactor, waiting) = (try PoolMemory(byteCount: 4096), server.reactor, volumes)
    let readers = volumes.flatMap { Array(repeating: $0, count: 820) }
    let first = 3900
    await withTaskGroup(of: Int32.self) { group in
        for volume in readers[..<first] {
            group.addTask { await reactor.read(volume, .volume, offset: 0, length: 1, into: buffer) }
        }
        let started = await server.comes { reactor in
            waiting.reduce(0) { $0 + reactor.hosted($1).volume.requestsInUse } == first
        }
        #expect(started)
        let client = await server.connect("disk")
        var requests = Client.write(1, at: 100, UInt8(ascii: "u"), count: 100)
        for cookie in UInt8(2)...9 { requests += Client.write(cookie, at: 0, cookie, count: 4096) }
        // All of this is there when the reactor looks again.
        reactor.perform { _ in usleep(200_000) }
        for volume in readers[first...] {
            group.addTask { await reactor.read(volume, .volume, offset: 0, length: 1, into: buffer) }
        }
        client?.send(requests)
        var answered: Set<UInt8> = []
        for _ in 1...9 { if let cookie = client?.reply() { answered.insert(cookie) } }
        #expect(answered == Set(1...9))
        for (pipe, volume) in zip(pipes, volumes) {
            let waiting = await reactor.run { $0.hosted(volume).volume.requestsInUse }
            let bytes = [UInt8](repeating: 1, count: waiting)
            #expect(write(pipe.input.descriptor, bytes, bytes.count) == waiting)
        }
        for await error in group { #expect(error == 0) }
    }
    await server.end()
}

@Test("whoever waits for a volume's clients to go waits for what they had asked for as well")
func clientsThatAreSentAway() async throws {
    final class Flag: Sendable {
        private let value = Atomic(false)
        var isSet: Bool { value.load(ordering: .relaxed) }
        func set() { value.store(true, ordering: .relaxed) }
    }
    let server = try Server(number: 96)
    let number = try await server.serve("disk")
    let log = await server.fullLog(number)
    let client = await server.connect("disk")
    client?.send(Client.write(1, at: 4096, UInt8(ascii: "a"), count: 4096))
    #expect(await server.comes { $0.hosted(number).volume.modifyingInFlight == 1 })
    let gone = Flag()
    server.reactor.perform { $0.disconnect(number, .hosts) { gone.set() } }
    #expect(client?.receive(1) == nil)
    for _ in 0..<10 { await server.reactor.run { _ in } }
    #expect(!gone.isSet, "a write of the client's is still to come")
    log.empty()
    #expect(await server.comes { _ in gone.isSet })
    await server.end()
}

@Test("acknowledgements are held until the last who holds them lets go, or for too long, which is told")
func holds() async throws {
    let server = try Server(number: 97)
    let number = try await server.host(try server.file("disk"), named: "disk")
    let held = await server.reactor.run { reactor in
        reactor.hold(number)
        reactor.hold(number)
        let first = reactor.releaseHold(number)
        let stays = reactor.hosted(number).volume.holding
        let second = reactor.releaseHold(number)
        return [first, stays, second, reactor.hosted(number).volume.holding]
    }
    #expect(held == [true, true, true, false])
    await server.reactor.run { $0.hold(number) }
    #expect(await server.comes { !$0.hosted(number).volume.holding })
    #expect(await server.reactor.run { !$0.releaseHold(number) }, "the cut may not be closed")
    await server.end()
}

@Test(
    "something is done on volumes of several reactors while all of them are held, and it is told when a deadline let go"
)
func holdsTogether() async throws {
    let (one, other) = (try Server(number: 101), try Server(number: 102))
    let places = [
        ServedVolume(one.reactor, try await one.host(try one.file("a"), named: "a")),
        ServedVolume(one.reactor, try await one.host(try one.file("b"), named: "b")),
        ServedVolume(other.reactor, try await other.host(try other.file("c"), named: "c")),
    ]
    for isSlow in [false, true] {
        let takes = Takes()
        let look = Task {
            while takes.seen.withLock({ $0.count }) < 2 { try await Task.sleep(for: .microseconds(100)) }
            let held = await places[0].reactor.run { reactor in
                places.prefix(2).map { reactor.hosted($0.number).volume.holding }
            }
            takes.others.withLock { $0 = held }
        }
        let outcome = await withCheckedContinuation { continuation in
            holdTogether(places) { reactor, index in
                if isSlow, index == 2 { usleep(UInt32(3000 * Limits.holdMilliseconds)) }
                // The last one takes its part once somebody has looked at the others.
                var looks = index == 2 ? 8 * Limits.holdMilliseconds : 0
                while looks > 0, takes.others.withLock({ $0.isEmpty }) {
                    usleep(100)
                    looks -= 1
                }
                let isHeld = reactor.hosted(places[index].number).volume.holding
                takes.seen.withLock { $0.append("\(index) takes \(isHeld)") }
            } done: {
                continuation.resume(returning: $0)
            }
        }
        try await look.value
        #expect(outcome.isIntact == !isSlow, "each is held until it goes")
        #expect(takes.others.withLock { $0 } == [true, true], "all have taken before one goes")
        #expect(takes.seen.withLock { $0 }.sorted() == (0..<3).map { "\($0) takes true" })
        for place in places {
            #expect(await place.reactor.run { !$0.hosted(place.number).volume.holding })
        }
    }
    await one.end()
    await other.end()
}

private final class Takes: Sendable {
    let seen = Mutex<[String]>([])
    /// Whether the others are held when the last one takes its part.
    let others = Mutex<[Bool]>([])
}

@Test("requests of a client that does not read its replies are bounded")
func requestsOfAClientThatDoesNotRead() async throws {
    let server = try Server(number: 98)
    let number = try await server.serve("disk")
    let log = await server.fullLog(number)
    let client = await server.connect("disk")
    let count = Limits.requestsPerConnection + 50
    client?.send((0..<count).flatMap { Client.write(1, at: UInt32($0), 1, count: 1) })
    #expect(await server.comes { $0.hosted(number).volume.requestsInUse >= Limits.requestsPerConnection })
    for _ in 0..<10 { await server.reactor.run { _ in } }
    #expect(await server.reactor.run { $0.hosted(number).volume.requestsInUse } == Limits.requestsPerConnection)
    log.empty()
    for _ in 0..<count { #expect(client?.reply() == 1) }
    await server.end()
}
