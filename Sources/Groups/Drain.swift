// Drain.swift: sends what a point still has to send, as a state machine without I/O.
//
// Must be prevented:
//   a bit is cleared for data that the remote holds only in memory (the remote loses power, the primary forgets)
//   a bit is cleared for data that was acknowledged after the flush that is taken as its proof
//
// What hosts wait for is read ahead of the rest and sent to stable storage at once, or flushed at once where the remote cannot do that.
// Each window slot reads a run of a volume, sends it, and is free again. Acknowledged runs collect until a flush that
// began after their acknowledgement has ended; then their bits are cleared.

package struct Drain: Mover {
    private enum Slot {
        case free
        /// `urgent`: hosts wait for something that may be this.
        case reading(volume: Int, urgent: Bool)
        case sending(VolumeRun, urgent: Bool)
    }

    private var slots: [Slot]
    private var freeSlots: [Int]
    package var pace: MovePace
    /// Slots that only urgent reads take.
    private let urgentSlots: Int
    /// Volumes whose next read has what hosts wait for; and whether something that they wait for was acknowledged and not flushed.
    private var wanted: [Int] = []
    private var wantsFlush = false
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
        urgentSlots = shape.urgentSlots
        pace = shape.pace
    }

    package var isDone: Bool { busy == 0 && unread.isEmpty && acknowledged.isEmpty && flushing == nil }

    package mutating func handle(_ event: MoveEvent) -> [MoveAction] {
        switch event {
        case .begin: advance()
        case .read(let slot, let grains, let offset, let length, let urgent):
            didRead(slot, grains, offset, length, urgent)
        case .sent(let slot, let wire, let durable): didSend(slot, wire, durable)
        case .wanted(let volume): want(volume)
        case .flushed: didFlush()
        }
    }

    private mutating func want(_ volume: Int) -> [MoveAction] {
        wantMore(volume)
        // It may be on its way already.
        var waits = false
        for slot in slots.indices {
            switch slots[slot] {
            case .reading(volume, _): slots[slot] = .reading(volume: volume, urgent: true)
            case .sending(let run, let urgent) where run.volume == volume:
                slots[slot] = .sending(run, urgent: true)
                waits = waits || !urgent
            default: break
            }
        }
        if acknowledged.contains(where: { $0.volume == volume }) { wantsFlush = true }
        return (waits ? [.hurry(volume: volume)] : []) + advance()
    }

    private mutating func didRead(
        _ slot: Int, _ grains: Range<Int>?, _ offset: UInt64, _ length: Int, _ urgent: Bool
    ) -> [MoveAction] {
        guard case .reading(let volume, let isAwaited) = slots[slot] else { return [] }
        // Whatever was wanted since that was read is told anew.
        if urgent { wantMore(volume) }
        guard let grains else {
            free(slot)
            if let index = unread.firstIndex(of: volume) { unread.remove(at: index) }
            return advance()
        }
        let isUrgent = urgent || isAwaited
        slots[slot] = .sending(VolumeRun(volume: volume, grains: grains), urgent: isUrgent)
        let send = MoveAction.send(slot: slot, volume: volume, offset: offset, length: length, urgent: isUrgent)
        return urgent ? [send] + advance() : [send]
    }

    private mutating func didSend(_ slot: Int, _ wire: Int, _ durable: Bool) -> [MoveAction] {
        guard case .sending(let run, let urgent) = slots[slot] else { return [] }
        free(slot)
        bytesSent += UInt64(wire)
        guard !durable else { return [.clear([run])] + advance() }
        acknowledged.append(run)
        acknowledgedBytes += wire
        if urgent { wantsFlush = true }
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
        while let slot = freeSlots.last, let volume = wanted.first ?? volumeToRead() {
            freeSlots.removeLast()
            if !wanted.isEmpty { wanted.removeFirst() }
            slots[slot] = .reading(volume: volume, urgent: false)
            actions.append(.read(slot: slot, volume: volume))
        }
        let isLast = busy == 0 && unread.isEmpty && !acknowledged.isEmpty
        if flushing == nil,
            acknowledgedBytes >= pace.checkpointBytes || acknowledged.count >= Self.checkpointRuns || isLast
                || wantsFlush
        {
            wantsFlush = false
            flushing = acknowledged
            acknowledged = []
            acknowledgedBytes = 0
            actions.append(.flush(volumes: Set(flushing!.map(\.volume)).sorted()))
        }
        return actions
    }

    private mutating func wantMore(_ volume: Int) {
        if !wanted.contains(volume) { wanted.append(volume) }
    }

    /// Volumes take turns, so that one large volume does not hold up the small ones.
    private mutating func volumeToRead() -> Int? {
        guard busy < min(pace.limit, slots.count - urgentSlots), !unread.isEmpty else { return nil }
        turn %= unread.count
        defer { turn += 1 }
        return unread[turn]
    }
}
