// Leg.swift: what a volume keeps for one remote: which grains that lacks, and how far their transfer is.
//
// CR (change recording) has what was written since the last point was formed; OOS (out of sync) what must still be sent of that
// point. They exchange their roles at every point.
//
// Must be prevented:
//   a bit is lost: when the roles are exchanged, when a point is given up, when power is lost between the two
//   a bit is cleared for anything but what the remote has on stable storage

import Base

package struct Leg {
    /// `roles.changeRecordingIndex` says which is which.
    private let bitmaps: (Bitmap, Bitmap)
    let roles: UnsafeMutablePointer<RecordingRoles>
    /// Whether writes are recorded (the volume is the primary of a group).
    package var isRecording = false
    private(set) var changeCount: Int
    private(set) var outOfSyncCount: Int
    /// The drain has been given every run before this grain.
    private var cursor = 0
    /// Grains behind the cursor's place that were given out ahead of it; nil while that is not done.
    private var ahead: Bitmap?
    private var aheadCount = 0

    enum Merge: UInt8, BitwiseCopyable {
        case none
        /// Bits of a point that was given up are in both bitmaps until they are on stable storage in the one.
        case flushing
        /// That has failed; it ends once it is written down that the bitmaps are not to be relied on.
        case failed
    }
    var merge = Merge.none

    init(bitmaps: (Bitmap, Bitmap), roles: UnsafeMutablePointer<RecordingRoles>) {
        self.bitmaps = bitmaps
        self.roles = roles
        let recordsInFirst = roles.pointee.changeRecordingIndex == 0
        changeCount = (recordsInFirst ? bitmaps.0 : bitmaps.1).population()
        outOfSyncCount = (recordsInFirst ? bitmaps.1 : bitmaps.0).population()
    }

    var changeRecording: Bitmap { roles.pointee.changeRecordingIndex == 0 ? bitmaps.0 : bitmaps.1 }
    var outOfSync: Bitmap { roles.pointee.changeRecordingIndex == 0 ? bitmaps.1 : bitmaps.0 }

    // MARK: Recording

    @inline(__always)
    mutating func mark(_ grains: Range<Int>) { changeCount += changeRecording.set(grains) }
    mutating func mark(_ grains: Bitmap) { changeCount += changeRecording.add(grains) }
    mutating func markAll() {
        changeRecording.setAll()
        changeCount = changeRecording.count
    }

    /// Counts anew, after somebody else has changed bits.
    mutating func recount() { changeCount = changeRecording.population() }

    mutating func forget() {
        changeRecording.clearAll()
        outOfSync.clearAll()
        (changeCount, outOfSyncCount) = (0, 0)
    }

    /// Words of both together.
    func words(from first: Int, count: Int) -> [UInt64] {
        let words = (changeRecording.count + 63) / 64
        guard (0..<words).contains(first) else { return [] }
        let end = min(first + count, words)
        return first < end ? (first..<end).map { changeRecording.word($0) | outOfSync.word($0) } : []
    }

    // MARK: Points

    /// What has changed up to now is point `number`'s to send; one aligned store changes the roles of both bitmaps at once.
    ///
    /// - Parameter outlivesProcess: what holds it does; else a start gives it up, since no bitmap is of it.
    mutating func exchange(point number: UInt64, outlivesProcess: Bool) {
        invariant(outOfSyncCount == 0 && merge == .none, "a point waits for the one before")
        roles.pointee.changeRecordingIndex ^= 1
        roles.pointee.heldPoint = outlivesProcess ? number : 0
        (outOfSyncCount, changeCount) = (changeCount, 0)
        invariant(aheadCount == 0, "what was given out ahead was sent, or given up")
        cursor = 0
    }

    /// Begins the drain from the first grain again.
    mutating func rewind() {
        cursor = 0
        forgetAhead()
    }

    /// The next run of grains that must be sent and was not given out since the last rewind; at most `limit` grains.
    mutating func next(limit: Int) -> Range<Int>? {
        let count = outOfSync.count
        guard outOfSyncCount > 0 else { return nil }
        while cursor < count, let first = outOfSync.firstSet(in: cursor..<count) {
            let bound = first..<min(count, first + limit)
            var run = first..<(outOfSync.firstClear(in: bound) ?? bound.upperBound)
            if aheadCount > 0, let ahead {
                if ahead.contains(first) {
                    cursor = ahead.firstClear(in: first..<count) ?? count
                    continue
                }
                run = first..<(ahead.firstSet(in: run) ?? run.upperBound)
            }
            cursor = run.upperBound
            return run
        }
        return nil
    }

    // MARK: Out of turn

    /// - Parameter memory: all clear, and there until it is replaced.
    mutating func giveAhead(in memory: Bitmap) {
        invariant(aheadCount == 0, "what was given out ahead was sent, or given up")
        ahead = memory
    }

    /// The first run among these grains that must be sent and was not given out, ahead of its turn.
    ///
    /// - Parameter notes: it is not given out again.
    mutating func nextAhead(in grains: Range<Int>, limit: Int, notes: Bool = true) -> Range<Int>? {
        guard let ahead else { return nil }
        var from = max(grains.lowerBound, cursor)
        while from < grains.upperBound, let first = outOfSync.firstSet(in: from..<grains.upperBound) {
            guard !ahead.contains(first) else {
                from = first + 1
                continue
            }
            let bound = first..<min(grains.upperBound, first + limit)
            let end = outOfSync.firstClear(in: bound) ?? bound.upperBound
            let run = first..<(ahead.firstSet(in: first..<end) ?? end)
            if notes { aheadCount += ahead.set(run) }
            return run
        }
        return nil
    }

    private mutating func forgetAhead() {
        if aheadCount > 0 { ahead?.clearAll() }
        aheadCount = 0
    }

    /// Takes back the end of the run that `next` gave last.
    mutating func giveBack(from grain: Int) {
        invariant(grain <= cursor, "only what was given out is taken back")
        cursor = grain
    }

    /// The remote has these on stable storage.
    mutating func sent(_ grains: Range<Int>) {
        outOfSyncCount -= outOfSync.clear(grains)
        if aheadCount > 0, let ahead { aheadCount -= ahead.clear(grains) }
    }

    // MARK: Giving a point up

    /// What is still to be sent counts as changed again. The bits stay in OOS until `finishMerge`.
    mutating func addOutOfSync() {
        changeCount += changeRecording.add(outOfSync)
        outOfSyncCount = 0
        forgetAhead()
    }

    mutating func finishMerge() {
        invariant(outOfSyncCount == 0, "only what counts as changed is cleared")
        merge = .none
        outOfSync.clearAll()
    }
}

/// Which of a volume's two recording bitmaps records changes; lies in mapped memory and outlives a process crash.
package struct RecordingRoles: BitwiseCopyable {
    /// 0 or 1; one aligned store changes the roles of both bitmaps at once.
    package var changeRecordingIndex: UInt64 = 0
    /// The point that the other bitmap and the point's target belong to; 0 once it was given up here, or if it is held in memory. The group's
    /// record learns that later, and a crash may come between.
    package var heldPoint: UInt64 = 0
    /// 1 = a flush of the volume's own file has failed since it was opened: what was written before may be gone, as after power loss.
    package var sourceLost: UInt64 = 0
    package init() {}
}
