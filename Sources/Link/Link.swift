// Link.swift: libnbd connections to the intake exports of the peer, driven by one thread's poll loop.
//
// A completion only notes its outcome in memory that lives as long as the link; the loop looks there after each
// notification. Buffers handed to libnbd stay untouched until then, or until the connection is closed.

import CLibNBD
import Glibc
import NBDProtocol
import Ring
import TLS

/// How a link proves who it is, and asks the peer to.
package struct LinkTLS: Sendable {
    package var policy: TLSPolicy
    package var files: TLSFiles
    package var user: String

    package init(policy: TLSPolicy = .off, files: TLSFiles, user: String) {
        self.policy = policy
        self.files = files
        self.user = user
    }

    /// Tells a handle before it connects; false when libnbd refuses.
    func apply(to handle: OpaquePointer) -> Bool {
        guard policy != .off else { return true }
        let wanted = policy == .require ? LIBNBD_TLS_REQUIRE : LIBNBD_TLS_ALLOW
        var fine = nbd_set_tls(handle, Int32(wanted)) == 0
        if let directory = files.certificates { fine = fine && nbd_set_tls_certificates(handle, directory) == 0 }
        if let path = files.pskFile {
            fine = fine && nbd_set_tls_psk_file(handle, path) == 0 && nbd_set_tls_username(handle, user) == 0
        }
        fine = fine && nbd_set_tls_verify_peer(handle, files.verifyPeer) == 0
        return fine
    }
}

/// One asynchronous command, as libnbd's callback sees it.
struct LinkCompletion {
    // Safe because: the slab outlives every connection that was given a pointer into it.
    unowned(unsafe) let slab: CompletionSlab
    let index: Int32
    var error: Int32 = 0
}

/// The completions of a link; every connection holds it until libnbd has let go of the last pointer into it.
final class CompletionSlab {
    let slots: UnsafeMutablePointer<LinkCompletion>
    let count: Int
    /// Commands that libnbd has and has not answered.
    fileprivate(set) var pending = 0
    private let answered: UnsafeMutablePointer<Int32>
    private var answeredCount = 0

    init(count: Int) {
        self.count = count
        slots = .allocate(capacity: count)
        answered = .allocate(capacity: count)
        for index in 0..<count { (slots + index).initialize(to: LinkCompletion(slab: self, index: Int32(index))) }
    }

    deinit {
        slots.deallocate()
        answered.deallocate()
    }

    fileprivate func note(_ index: Int32) {
        answered[answeredCount] = index
        answeredCount += 1
        pending -= 1
    }

    /// A command that was answered and not looked at yet.
    func takeAnswered() -> Int? {
        guard answeredCount > 0 else { return nil }
        answeredCount -= 1
        return Int(answered[answeredCount])
    }
}

final class LinkConnection {
    private let handle: OpaquePointer
    private let slab: CompletionSlab

    /// Begins to connect; `isReady` tells when it is.
    init(
        address: Address, tls: LinkTLS, export: String, slab: CompletionSlab
    ) throws(SystemError) {
        guard let handle = nbd_create() else { throw Self.failure("create a connection") }
        self.handle = handle
        self.slab = slab
        nbd_set_handle_name(handle, export)
        var result = nbd_set_export_name(handle, export)
        if !tls.apply(to: handle) { result = -1 }
        if result == 0 {
            switch address {
            case .unix(let path): result = nbd_aio_connect_unix(handle, path)
            case .tcp(let host, let port):
                result = nbd_aio_connect_tcp(handle, host, String(port))
            }
        }
        guard result == 0 else {
            let error = Self.failure("connect to \(address)")
            nbd_close(handle)
            throw error
        }
    }

    deinit { nbd_close(handle) }

    static func failure(_ attempt: String) -> SystemError {
        let text = nbd_get_error().map { String(cString: $0) } ?? "unknown error"
        return SystemError("\(attempt): \(text)", errno: nbd_get_errno())
    }

    var isReady: Bool { nbd_aio_is_ready(handle) == 1 }
    var isConnecting: Bool { nbd_aio_is_connecting(handle) == 1 }
    var hasEnded: Bool { nbd_aio_is_dead(handle) == 1 || nbd_aio_is_closed(handle) == 1 }
    var size: Int64 { nbd_get_size(handle) }

    /// What to poll for.
    func pollEntry() -> pollfd {
        let direction = Int32(nbd_aio_get_direction(handle))
        var events: Int16 = 0
        if direction & LIBNBD_AIO_DIRECTION_READ != 0 { events |= Int16(POLLIN) }
        if direction & LIBNBD_AIO_DIRECTION_WRITE != 0 { events |= Int16(POLLOUT) }
        return pollfd(fd: nbd_aio_get_fd(handle), events: events, revents: 0)
    }

    /// Lets libnbd act on what poll reported; false when the connection has failed.
    func notify(_ revents: Int16) -> Bool {
        let direction = Int32(nbd_aio_get_direction(handle))
        let failing = Int16(POLLHUP) | Int16(POLLERR)
        if revents & (Int16(POLLIN) | failing) != 0, direction & LIBNBD_AIO_DIRECTION_READ != 0 {
            return nbd_aio_notify_read(handle) == 0
        }
        if revents & (Int16(POLLOUT) | failing) != 0, direction & LIBNBD_AIO_DIRECTION_WRITE != 0 {
            return nbd_aio_notify_write(handle) == 0
        }
        return revents & failing == 0
    }

    private func callback(
        _ completion: UnsafeMutablePointer<LinkCompletion>
    ) -> nbd_completion_callback {
        completion.pointee.error = 0
        slab.pending += 1
        return nbd_completion_callback(
            callback: { data, error in
                let completion = data!.assumingMemoryBound(to: LinkCompletion.self)
                completion.pointee.error = error?.pointee ?? 0
                completion.pointee.slab.note(completion.pointee.index)
                return 1  // libnbd may forget the command
            }, user_data: completion, free: nil)
    }

    /// The peer takes writes that are on stable storage when they are answered.
    var takesFUA: Bool { nbd_can_fua(handle) == 1 }

    func read(
        _ buffer: UnsafeMutableRawPointer, _ length: Int, at offset: UInt64,
        _ completion: UnsafeMutablePointer<LinkCompletion>
    ) -> Bool {
        nbd_aio_pread(handle, buffer, length, offset, callback(completion), 0) >= 0
    }

    func write(
        _ buffer: UnsafeRawPointer, _ length: Int, at offset: UInt64, fua: Bool,
        _ completion: UnsafeMutablePointer<LinkCompletion>
    ) -> Bool {
        nbd_aio_pwrite(handle, buffer, length, offset, callback(completion), fua ? UInt32(LIBNBD_CMD_FLAG_FUA) : 0) >= 0
    }

    func zero(
        _ length: Int, at offset: UInt64, fua: Bool, _ completion: UnsafeMutablePointer<LinkCompletion>
    ) -> Bool {
        nbd_aio_zero(handle, UInt64(length), offset, callback(completion), fua ? UInt32(LIBNBD_CMD_FLAG_FUA) : 0) >= 0
    }

    func flush(_ completion: UnsafeMutablePointer<LinkCompletion>) -> Bool {
        nbd_aio_flush(handle, callback(completion), 0) >= 0
    }
}

/// The connections to every volume of a group.
final class NBDLink {
    let connections: [[LinkConnection]]
    /// `partsPerSlot` for each window slot, then one for each connection's flush.
    let completions: CompletionSlab
    static let partsPerSlot = 8
    private var next = 0
    private var failed = false

    init(
        address: Address, tls: LinkTLS, exports: [String], connectionsPerVolume: Int, window: Int
    ) throws(SystemError) {
        completions = CompletionSlab(count: window * Self.partsPerSlot + exports.count * connectionsPerVolume)
        var connections: [[LinkConnection]] = []
        for export in exports {
            var ofVolume: [LinkConnection] = []
            for _ in 0..<connectionsPerVolume {
                ofVolume.append(
                    try LinkConnection(address: address, tls: tls, export: export, slab: completions))
            }
            connections.append(ofVolume)
        }
        self.connections = connections
    }

    var isReady: Bool { connections.joined().allSatisfy(\.isReady) }
    var isConnecting: Bool { connections.joined().contains(where: \.isConnecting) }
    var hasFailed: Bool { failed || connections.joined().contains(where: \.hasEnded) }

    func pollEntries() -> [pollfd] { connections.joined().map { $0.pollEntry() } }

    func notify(_ entries: ArraySlice<pollfd>) {
        for (connection, entry) in zip(connections.joined(), entries) where entry.revents != 0 {
            if !connection.notify(entry.revents) { failed = true }
        }
    }

    /// Flushes every connection of a volume.
    ///
    /// - Parameter first: the index of the first flush's completion.
    /// - Returns: false when the link takes nothing any more.
    func flush(_ volume: Int, firstCompletion first: Int) -> Bool {
        let start = first + volume * connections[volume].count
        for (index, connection) in connections[volume].enumerated()
        where !connection.flush(completions.slots + start + index) { return false }
        return true
    }

    /// Connections of a volume take turns.
    func connection(forVolume volume: Int) -> LinkConnection {
        next &+= 1
        let ofVolume = connections[volume]
        return ofVolume[next % ofVolume.count]
    }
}
