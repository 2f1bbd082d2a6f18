// ReactorMessages.swift: what other threads ask of a reactor.

import Base
import NBDProtocol
import Ring
import Volumes

/// How others hold a reactor: they leave messages, nothing else.
package struct ReactorHandle: Sendable {
    let mailbox: Mailbox<ReactorMessage>
    package let number: Int

    /// Runs `body` on the reactor's thread with the reactor; control plane and group coordination only.
    package func perform(_ body: @escaping @Sendable (Reactor) -> Void) { leave(.perform(body)) }

    /// Reads the next run of the point's data that must be sent.
    package func read(_ drain: DrainRead) { leave(.drain(drain)) }

    /// Reads a range of a volume or copy.
    ///
    /// - Returns: 0, or a positive errno; ENOENT when the copy is not there.
    package func read(
        _ volume: VolumeNumber, _ view: View, offset: UInt64, length: Int, into buffer: PoolMemory
    ) async -> Int32 {
        await range(volume, .read, view, offset: offset, length: length, buffer)
    }

    /// Writes a range of a volume, as for a host.
    ///
    /// - Returns: 0, or a positive errno.
    package func write(
        _ volume: VolumeNumber, offset: UInt64, length: Int, from buffer: PoolMemory
    ) async -> Int32 {
        await range(volume, .write, .volume, offset: offset, length: length, buffer)
    }

    /// Flushes a volume's own file, as for a host.
    ///
    /// - Returns: 0, or a positive errno: of this flush, or of the first since the volume was opened that failed.
    package func flush(_ volume: VolumeNumber) async -> Int32 {
        await range(volume, .flush, .volume, offset: 0, length: 0, nil)
    }

    private func range(
        _ volume: VolumeNumber, _ operation: Request.Operation, _ view: View, offset: UInt64, length: Int,
        _ buffer: PoolMemory?
    ) async -> Int32 {
        await withCheckedContinuation { continuation in
            let request = RangeRequest(
                volume: volume, operation: operation, view: view, offset: offset, length: length, buffer: buffer
            ) { continuation.resume(returning: $0) }
            leave(.range(request))
        }
    }

    /// Senders are few and bounded, so a full mailbox means a reactor that has stopped; a restart mends that.
    func leave(_ message: ReactorMessage) {
        invariant(mailbox.send(message), "a reactor empties its mailbox")
    }

    /// Performs `body` and waits for its result without blocking the caller's thread.
    package func run<Result: Sendable>(
        _ body: @escaping @Sendable (Reactor) -> Result
    ) async -> Result {
        await withCheckedContinuation { continuation in
            perform { continuation.resume(returning: body($0)) }
        }
    }
}

enum ReactorMessage: Sendable {
    case perform(@Sendable (Reactor) -> Void)
    case adopt(Handoff)
    case drain(DrainRead)
    case range(RangeRequest)
    case stop(@Sendable () -> Void)
}

/// A connection on its way from the handshake to the reactor of its volume.
struct Handoff: Sendable {
    var socket: Int32
    var client: Client
    // Safe because: the sender forgets it; one reactor at a time has it.
    nonisolated(unsafe) var tls: TLSTransport?
    var entry: ExportEntry
    var negotiated: Negotiated
    var unread: [UInt8]
}

/// A read, a write or a flush for the control plane.
struct RangeRequest: Sendable {
    var volume: VolumeNumber
    var operation: Request.Operation
    var view: View
    var offset: UInt64
    var length: Int
    /// Filled with the data, or has it; the reactor's until the answer. A flush has none.
    var buffer: PoolMemory?
    var answer: @Sendable (Int32) -> Void
}

/// A read of the next run of the point being drained.
package struct DrainRead: Sendable {
    package var volume: VolumeNumber
    package var point: UInt64
    /// Bytes that fit the buffer; at least one grain.
    package var capacity: Int
    /// Filled with the data; the caller's until the answer.
    package nonisolated(unsafe) var buffer: UnsafeMutableRawPointer
    package var answer: @Sendable (Answer) -> Void
    /// Writes wait for what it reads.
    var isUrgent = false

    package enum Answer: Sendable {
        /// `urgent`: writes wait until the remote has it.
        case data(grains: Range<Int>, offset: UInt64, length: Int, urgent: Bool)
        /// The run is zeroes; the buffer is not filled, and the length may be more than it holds.
        case zeroes(grains: Range<Int>, offset: UInt64, length: Int)
        /// Every run of the point was given out since the drain was rewound.
        case nothing
        /// The point is no longer held.
        case gone
        /// The volume could not hold it.
        case lost(errno: Int32)
        case failed(errno: Int32)
    }

    package init(
        volume: VolumeNumber, point: UInt64, capacity: Int,
        buffer: UnsafeMutableRawPointer, answer: @escaping @Sendable (Answer) -> Void
    ) {
        self.volume = volume
        self.point = point
        self.capacity = capacity
        self.buffer = buffer
        self.answer = answer
    }
}
