// SeveralVolume.swift: a host's volume in the scenario `SeveralHosts`, as little of it as points need: a value for each grain, CR and OOS, what
// is held of a point, and acknowledgements that a reactor holds. (The production's is in the scenarios `World` and `CopyWorld`.)
//
// Its reactor takes one message after the other (`mailbox`), and keeps the deadline of a hold by itself.

final class SeveralVolume {
    static let grainCount = 3

    // What outlives the process.
    var grains = Array(repeating: WrittenGrain(), count: grainCount)
    private(set) var recording: Set<Int> = []
    private(set) var outOfSync: Set<Int> = []
    /// The point, and what the volume was when it formed.
    private(set) var hold: (point: UInt64, image: [Int])?
    /// The same, as a start finds it: also of a point that has ended.
    private var kept: (point: UInt64, image: [Int])?
    var keptPoint: UInt64? { kept?.point }

    // The process's.
    var mailbox: [() -> Void] = []
    /// Bits of a point that was given up are in both bitmaps until those of CR are on stable storage.
    private(set) var isMerging = false
    /// A restore is under way.
    var isBusy = false
    private var given: Set<Int> = []
    private(set) var holders = 0
    private var isExpired = false
    private(set) var deadline: UInt64?
    /// Grains whose writes are done, and whose acknowledgement is held.
    private(set) var waiting: [Int] = []

    var contents: [Int] { grains.map(\.content) }
    var mayFormPoint: Bool { !isBusy && !isMerging }
    var isChanged: Bool { !recording.isEmpty }
    /// Where host and remote may differ, by the bitmaps.
    func isMarked(_ grain: Int) -> Bool { recording.contains(grain) || outOfSync.contains(grain) }

    // MARK: Points

    func mark(_ grain: Int) { recording.insert(grain) }
    func markAll() { recording = Set(grains.indices) }

    /// - Returns: what is wrong.
    func form(_ point: UInt64) -> String? {
        if hold != nil || isMerging || !outOfSync.isEmpty { return "a point is formed over what is left of the last" }
        (outOfSync, recording, given) = (recording, [], [])
        hold = (point, contents)
        kept = hold
        return nil
    }

    func rewind() { given = [] }

    /// The next grain that is to be sent and was not given out.
    func next(of point: UInt64) -> (grain: Int, content: Int)? {
        guard let hold, hold.point == point, let grain = outOfSync.subtracting(given).min() else { return nil }
        given.insert(grain)
        return (grain, hold.image[grain])
    }

    func clear(_ grain: Int, point: UInt64) { if hold?.point == point { outOfSync.remove(grain) } }

    /// - Returns: what is wrong.
    func end(_ point: UInt64) -> String? {
        guard hold?.point == point else { return nil }
        hold = nil
        return outOfSync.isEmpty ? nil : "a point ends of which something is still to be sent"
    }

    /// - Returns: whether the merge is to be ended later.
    func giveUp() -> Bool {
        recording.formUnion(outOfSync)
        (hold, kept) = (nil, nil)
        guard !isMerging, !outOfSync.isEmpty else { return false }
        isMerging = true
        return true
    }

    func endMerge() { (outOfSync, isMerging) = ([], false) }

    // MARK: Acknowledgements

    func holdAcknowledgements(until deadline: UInt64) {
        if holders == 0 { isExpired = false }
        holders += 1
        self.deadline = deadline
    }

    /// - Returns: nil while others hold as well; and whether the deadline had let go already.
    func release() -> (writes: [Int], isIntact: Bool) {
        holders -= 1
        guard holders == 0 else { return ([], !isExpired) }
        deadline = nil
        return (takeWaiting(), !isExpired)
    }

    /// The deadline: acknowledgements go by themselves.
    func expire() -> [Int] {
        (isExpired, deadline) = (true, nil)
        return takeWaiting()
    }

    /// - Returns: whether the acknowledgement may go.
    func isDone(_ grain: Int) -> Bool {
        guard deadline != nil else { return true }
        waiting.append(grain)
        return false
    }

    private func takeWaiting() -> [Int] {
        defer { waiting = [] }
        return waiting
    }

    // MARK: Processes

    /// - Parameter keepsPoint: what is held of a point is on a disk, and power is not lost.
    func die(keepsPoint: Bool) {
        (mailbox, isMerging, isBusy, given) = ([], false, false, [])
        (holders, isExpired, deadline, waiting) = (0, false, nil, [])
        hold = nil
        if !keepsPoint { kept = nil }
    }

    /// - Parameter held: the point that is held, by the record.
    func start(_ held: UInt64?) {
        if let kept, kept.point == held { return hold = kept }
        recording.formUnion(outOfSync)
        (outOfSync, kept) = ([], nil)
    }
}
