// Drain.swift: sends what a point still has to send, as a state machine without I/O.
//
// Must be prevented:
//   a bit is cleared for data that the remote holds only in memory (the remote loses power, the primary forgets)
//   a bit is cleared for data that was acknowledged after the flush that is taken as its proof
//
// Each window slot reads a run of a volume, sends it, and is free again. Acknowledged runs collect until a flush that
// began after their acknowledgement has ended; then their bits are cleared.

package struct Drain: Mover {
    private enum Slot {
        case free
        case reading(volume: Int)
        case sending(VolumeRun)
    }

    private var slots: [Slot]
    private var freeSlots: [Int]
    package var pace: MovePace
    /// Volumes that may have more to read, and whose turn it is.
    private var unread: [Int]
    private var turn = 0
    private var acknowledged: [VolumeRun] = []
    private var acknowledgedBytes = 0
    private var flushing: [VolumeRun]?
    private static let checkpointRuns = 64 << 10
    package private(set) var bytesSent: UInt64 = 0

    package init(_ shape: MoveShape) {
        slots = Array(repeating: .free, count: shape.window)
        freeSlots = Array((0..<shape.window).reversed())
        unread = shape.volumes
        pace = shape.pace
    }

    package var isDone: Bool { busy == 0 && unread.isEmpty && acknowledged.isEmpty && flushing == nil }

    package mutating func handle(_ event: MoveEvent) -> [MoveAction] {
        switch event {
        case .begin: advance()
        case .read(let slot, let grains, let offset, let length): didRead(slot, grains, offset, length)
        case .sent(let slot, let wire): didSend(slot, wire)
        case .flushed: didFlush()
        }
    }

    private mutating func didRead(_ slot: Int, _ grains: Range<Int>?, _ offset: UInt64, _ length: Int) -> [MoveAction] {
        guard case .reading(let volume) = slots[slot] else { return [] }
        guard let grains else {
            free(slot)
            if let index = unread.firstIndex(of: volume) { unread.remove(at: index) }
            return advance()
        }
        slots[slot] = .sending(VolumeRun(volume: volume, grains: grains))
        return [.send(slot: slot, volume: volume, offset: offset, length: length)]
    }

    private mutating func didSend(_ slot: Int, _ wire: Int) -> [MoveAction] {
        guard case .sending(let run) = slots[slot] else { return [] }
        free(slot)
        acknowledged.append(run)
        acknowledgedBytes += wire
        bytesSent += UInt64(wire)
        return advance()
    }

    private mutating func didFlush() -> [MoveAction] {
        guard let flushed = flushing else { return [] }
        flushing = nil
        return (flushed.isEmpty ? [] : [.clear(flushed)]) + advance()
    }

    private mutating func free(_ slot: Int) {
        slots[slot] = .free
        freeSlots.append(slot)
    }

    /// Slots that read or send.
    private var busy: Int { slots.count - freeSlots.count }

    private mutating func advance() -> [MoveAction] {
        var actions: [MoveAction] = []
        while busy < pace.limit, let slot = freeSlots.last, let volume = volumeToRead() {
            freeSlots.removeLast()
            slots[slot] = .reading(volume: volume)
            actions.append(.read(slot: slot, volume: volume))
        }
        let isLast = busy == 0 && unread.isEmpty && !acknowledged.isEmpty
        if flushing == nil,
            acknowledgedBytes >= pace.checkpointBytes || acknowledged.count >= Self.checkpointRuns || isLast
        {
            flushing = acknowledged
            acknowledged = []
            acknowledgedBytes = 0
            actions.append(.flush(volumes: Set(flushing!.map(\.volume)).sorted()))
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
