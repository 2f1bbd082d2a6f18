// FuzzSession.swift: libFuzzer plays the client of a real reactor, with a volume in memory, over a socket pair.
//
// Each input is one connection from the greeting to its end; the first byte says whether the bytes are sent at once or in
// two parts, and whether the client reads the replies. Checked: the reactor neither traps nor hangs, and afterwards it
// serves as before.

import Base
import Glibc
import NBDProtocol
import NBDServer
import Ring
import Volumes

private let volumeBytes: UInt64 = 1 << 20

/// Everything below is made once, at the first input.
private struct Server {
    let greeter: ReactorHandle

    init() {
        do {
            let exports = ExportDirectory()
            let reactor = try Reactor.start(number: 0, exports: exports)
            greeter = try Reactor.start(number: 1, exports: exports)
            let source = try Self.memory("disk", Int(volumeBytes))
            let setup = VolumeSetup(
                name: "disk", geometry: Geometry(size: volumeBytes, grain: 4096)!, source: source,
                recording: try Self.mapping("recording"))
            let done = Latch()
            reactor.perform { reactor in
                let number = reactor.host(setup)
                reactor.hosted(number).writable = true
                exports.set(
                    "disk",
                    VolumeExports(
                        own: ExportEntry(
                            size: volumeBytes, kind: .volume, readOnly: false, reactor: ReactorReference.handle!,
                            volume: number)))
                done.open()
            }
            ReactorReference.handle = reactor
            done.wait()
        } catch {
            fatalError("\(error)")
        }
    }

    private static func memory(_ name: String, _ count: Int) throws -> OpenFile {
        let file = try OpenFile(path: "/dev/shm/farcopy-fuzz-\(getpid())-\(name)", flags: O_RDWR | O_CREAT)
        unlink(file.path)
        try file.truncate(to: UInt64(count))
        return file
    }

    private static func mapping(_ name: String) throws -> MappedFile {
        let path = "/dev/shm/farcopy-fuzz-\(getpid())-map-\(name)"
        defer { unlink(path) }
        return try MappedFile(path: path, byteCount: 3 * 4096, create: true)
    }
}

/// How the reactor's own message finds its handle.
private enum ReactorReference {
    // Safe because: set before the latch is waited for, and read by the message that opens it.
    nonisolated(unsafe) static var handle: ReactorHandle?
}

/// Opened once; `wait` returns from then on.
private final class Latch: Sendable {
    private let descriptors: [Int32]

    init() {
        var pair: [Int32] = [0, 0]
        pipe(&pair)
        descriptors = pair
    }

    func open() {
        var byte: UInt8 = 1
        write(descriptors[1], &byte, 1)
    }

    func wait() {
        var byte: UInt8 = 0
        read(descriptors[0], &byte, 1)
    }
}

private let server = Server()

@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzSession(_ data: UnsafePointer<UInt8>, _ count: Int) -> CInt {
    guard count > 0 else { return 0 }
    converse(UnsafeRawBufferPointer(start: data + 1, count: count - 1), choice: data[0])
    return 0
}

/// One connection; it must end within ten seconds.
private func converse(_ bytes: UnsafeRawBufferPointer, choice: UInt8) {
    var pair: [Int32] = [0, 0]
    guard socketpair(AF_UNIX, Int32(SOCK_STREAM.rawValue), 0, &pair) == 0 else { return }
    var limit = timeval(tv_sec: 10, tv_usec: 0)
    setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &limit, socklen_t(MemoryLayout<timeval>.size))
    let socket = pair[1]
    server.greeter.perform { $0.open(socket) }
    let cut = choice & 1 == 1 ? bytes.count / 2 : bytes.count
    sendAll(pair[0], UnsafeRawBufferPointer(rebasing: bytes[..<cut]))
    sendAll(pair[0], UnsafeRawBufferPointer(rebasing: bytes[cut...]))
    if choice & 2 == 0 {
        shutdown(pair[0], Int32(SHUT_WR))
        var reply = [UInt8](repeating: 0, count: 65536)
        while true {
            let received = recv(pair[0], &reply, reply.count, 0)
            if received < 0, errno == EAGAIN { fatalError("a connection did not end") }
            if received <= 0 { break }
        }
    }
    close(pair[0])
}

private func sendAll(_ socket: Int32, _ bytes: UnsafeRawBufferPointer) {
    var rest = bytes
    while !rest.isEmpty {
        let sent = send(socket, rest.baseAddress, rest.count, Int32(MSG_NOSIGNAL) | Int32(MSG_DONTWAIT))
        if sent <= 0 { return }
        rest = UnsafeRawBufferPointer(rebasing: rest[sent...])
    }
}
