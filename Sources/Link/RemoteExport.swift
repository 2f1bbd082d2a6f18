// RemoteExport.swift: reads an export of a peer, one range at a time, for who may wait.

import CLibNBD
import Glibc
import NBDProtocol
import Ring

/// An export of a peer that is read. One thread at a time has it.
package final class RemoteExport: @unchecked Sendable {
    // Safe because: who has made it asks for one read at a time.
    private let connection: LinkConnection
    private let slab = CompletionSlab(count: 1)
    private let name: String
    private static let seconds = 30

    /// Connects.
    ///
    /// - Throws: why not, after 30 s at most.
    package init(address: Address, tls: LinkTLS, export: String) throws(SystemError) {
        name = "\(export) at \(address)"
        connection = try LinkConnection(address: address, tls: tls, export: export, slab: slab)
        let deadline = monotonicNanoseconds() + UInt64(Self.seconds) * 1_000_000_000
        while !connection.isReady { try wait(until: deadline, "connect to") }
    }

    package var size: Int64 { connection.size }

    /// Fills `buffer` with `count` bytes from `offset`.
    package func read(_ buffer: UnsafeMutableRawPointer, _ count: Int, at offset: UInt64) throws(SystemError) {
        let deadline = monotonicNanoseconds() + UInt64(Self.seconds) * 1_000_000_000
        guard connection.read(buffer, count, at: offset, slab.slots) else {
            throw LinkConnection.failure("read \(name)")
        }
        while slab.takeAnswered() == nil { try wait(until: deadline, "read") }
        guard slab.slots[0].error == 0 else { throw SystemError("read \(name)", errno: slab.slots[0].error) }
    }

    private func wait(until deadline: UInt64, _ attempt: String) throws(SystemError) {
        guard monotonicNanoseconds() < deadline else {
            throw SystemError("\(attempt) \(name): no answer for \(Self.seconds) s", errno: ETIMEDOUT)
        }
        var entry = connection.pollEntry()
        poll(&entry, 1, 100)
        guard connection.notify(entry.revents), !connection.hasEnded else {
            throw LinkConnection.failure("\(attempt) \(name)")
        }
    }
}
