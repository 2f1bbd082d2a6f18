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
        case flush
        case clear([VolumeRun])
        /// Every bit of the point is cleared.
        case finished
    }

    private enum Slot {
        case free
        case reading(volume: Int)
        case sending(VolumeRun, length: Int)
    }

    private var slots: [Slot]
    private var exhausted: [Bool]
    private var nextVolume = 0
    private var acknowledged: [VolumeRun] = []
    private var acknowledgedBytes = 0
    private var flushing: [VolumeRun]?
    private let checkpointBytes: Int
    package private(set) var bytesSent: UInt64 = 0

    /// - Parameters:
    ///   - window: reads and sends under way at a time.
    ///   - checkpointBytes: a flush is asked for after this much, so that a lost link costs no more than that.
    package init(volumes: Int, window: Int, checkpointBytes: Int) {
        slots = Array(repeating: .free, count: window)
        exhausted = Array(repeating: false, count: volumes)
        self.checkpointBytes = checkpointBytes
    }

    package mutating func start() -> [Action] { advance() }

    /// A read ended: with data, or with nothing left in that volume.
    package mutating func didRead(
        slot: Int, grains: Range<Int>?, offset: UInt64, length: Int
    ) -> [Action] {
        guard case .reading(let volume) = slots[slot] else { return [] }
        guard let grains else {
            slots[slot] = .free
            exhausted[volume] = true
            return advance()
        }
        slots[slot] = .sending(VolumeRun(volume: volume, grains: grains), length: length)
        return [.send(slot: slot, volume: volume, offset: offset, length: length)]
    }

    /// The remote acknowledged the slot's data.
    package mutating func didSend(slot: Int) -> [Action] {
        guard case .sending(let run, let length) = slots[slot] else { return [] }
        slots[slot] = .free
        acknowledged.append(run)
        acknowledgedBytes += length
        bytesSent += UInt64(length)
        return advance()
    }

    /// Every connection's flush ended.
    package mutating func didFlush() -> [Action] {
        guard let flushed = flushing else { return [] }
        flushing = nil
        return (flushed.isEmpty ? [] : [.clear(flushed)]) + advance()
    }

    private var busy: Bool {
        slots.contains { if case .free = $0 { false } else { true } }
    }

    private mutating func advance() -> [Action] {
        var actions: [Action] = []
        for slot in slots.indices {
            guard case .free = slots[slot], let volume = volumeToRead() else { continue }
            slots[slot] = .reading(volume: volume)
            actions.append(.read(slot: slot, volume: volume))
        }
        guard flushing == nil else { return actions }
        let done = !busy && !exhausted.contains(false)
        if acknowledgedBytes >= checkpointBytes || (done && !acknowledged.isEmpty) {
            flushing = acknowledged
            acknowledged = []
            acknowledgedBytes = 0
            actions.append(.flush)
        } else if done {
            actions.append(.finished)
        }
        return actions
    }

    /// Volumes take turns, so that one large volume does not hold up the small ones.
    private mutating func volumeToRead() -> Int? {
        for step in 0..<exhausted.count {
            let volume = (nextVolume + step) % exhausted.count
            if !exhausted[volume] {
                nextVolume = volume + 1
                return volume
            }
        }
        return nil
    }
}
