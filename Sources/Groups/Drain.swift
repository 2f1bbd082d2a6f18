// Drain.swift: sends what a point still has to send, as a state machine without I/O.
//
// Must be prevented:
//   a bit is cleared for data that the remote holds only in memory (the remote loses power, the primary forgets)
//   a bit is cleared for data that was acknowledged after the flush that is taken as its proof
//
// Each window slot reads a run of a volume, sends it, and is free again. Acknowledged runs collect until a flush that
// began after their acknowledgement has ended; then their bits are cleared.

/// A run of grains of one volume of the group, by the volume's index in the group.
package struct VolumeRun: Sendable, Equatable {
    package var volume: Int
    package var grains: Range<Int>
    package init(volume: Int, grains: Range<Int>) {
        self.volume = volume
        self.grains = grains
    }
}

package struct Drain {
    package enum Action: Equatable {
        /// Read the volume's next run into the slot's buffer.
        case read(slot: Int, volume: Int)
        /// Send the slot's buffer.
        case send(slot: Int, volume: Int, offset: UInt64, length: Int)
        /// Everything that these volumes have acknowledged.
        case flush(volumes: [Int])
        case clear([VolumeRun])
        /// Every bit of the point is cleared.
        case finished
    }

    private enum Slot {
        case free
        case reading(volume: Int)
        case sending(VolumeRun)
    }

    private var slots: [Slot]
    private var freeSlots: [Int]
    /// How many slots may be busy.
    package var limit: Int
    /// Volumes that may have more to read, and whose turn it is.
    private var unread: [Int]
    private var turn = 0
    private var acknowledged: [VolumeRun] = []
    private var acknowledgedBytes = 0
    private var flushing: [VolumeRun]?
    /// A flush is asked for after this much, so that a lost link costs no more than that.
    package var checkpointBytes: Int
    private static let checkpointRuns = 64 << 10
    /// Bytes that crossed the link; zeroes count as nothing.
    package private(set) var bytesSent: UInt64 = 0

    /// - Parameters:
    ///   - volumes: those that may have something to send; the others are left alone.
    ///   - window: reads and sends under way at a time.
    package init(volumes: [Int], window: Int, checkpointBytes: Int) {
        slots = Array(repeating: .free, count: window)
        freeSlots = Array((0..<window).reversed())
        limit = window
        unread = volumes
        self.checkpointBytes = checkpointBytes
    }

    package mutating func start() -> [Action] { advance() }

    /// A read ended: with data, or with nothing left in that volume.
    package mutating func didRead(
        slot: Int, grains: Range<Int>?, offset: UInt64, length: Int
    ) -> [Action] {
        guard case .reading(let volume) = slots[slot] else { return [] }
        guard let grains else {
            free(slot)
            if let index = unread.firstIndex(of: volume) { unread.remove(at: index) }
            return advance()
        }
        slots[slot] = .sending(VolumeRun(volume: volume, grains: grains))
        return [.send(slot: slot, volume: volume, offset: offset, length: length)]
    }

    /// The remote acknowledged the slot's data, or has it already.
    ///
    /// - Parameter wire: bytes that crossed the link for it.
    package mutating func didSend(slot: Int, wire: Int) -> [Action] {
        guard case .sending(let run) = slots[slot] else { return [] }
        free(slot)
        acknowledged.append(run)
        acknowledgedBytes += wire
        bytesSent += UInt64(wire)
        return advance()
    }

    private mutating func free(_ slot: Int) {
        slots[slot] = .free
        freeSlots.append(slot)
    }

    /// The flush ended, of every volume that it was asked of.
    package mutating func didFlush() -> [Action] {
        guard let flushed = flushing else { return [] }
        flushing = nil
        return (flushed.isEmpty ? [] : [.clear(flushed)]) + advance()
    }

    /// Slots that read or send.
    package var busy: Int { slots.count - freeSlots.count }

    private mutating func advance() -> [Action] {
        var actions: [Action] = []
        while busy < limit, let slot = freeSlots.last, let volume = volumeToRead() {
            freeSlots.removeLast()
            slots[slot] = .reading(volume: volume)
            actions.append(.read(slot: slot, volume: volume))
        }
        guard flushing == nil else { return actions }
        let done = busy == 0 && unread.isEmpty
        if acknowledgedBytes >= checkpointBytes || acknowledged.count >= Self.checkpointRuns
            || (done && !acknowledged.isEmpty)
        {
            flushing = acknowledged
            acknowledged = []
            acknowledgedBytes = 0
            actions.append(.flush(volumes: Set(flushing!.map(\.volume)).sorted()))
        } else if done {
            actions.append(.finished)
        }
        return actions
    }

    /// Volumes take turns, so that one large volume does not hold up the small ones.
    private mutating func volumeToRead() -> Int? {
        guard !unread.isEmpty else { return nil }
        turn %= unread.count
        defer { turn += 1 }
        return unread[turn]
    }
}
