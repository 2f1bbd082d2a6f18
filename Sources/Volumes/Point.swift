// Point.swift: how a volume takes part in a consistency point (DESIGN section 4).
//
// form: hold acknowledgements, exchange the roles of CR and OOS. When every volume of the group has formed, the group
// lets go of all. A write acknowledged before any hold is complete, so it is in; a write that depends on an
// acknowledgement given after the release was issued after every exchange, so it is out, and meets copy-on-write.
// Between the two no acknowledgement of a volume that has formed leaves.

import Base

/// The primary half of the point being drained: old content of the grains that must still be sent.
package struct PointHold {
    package let number: UInt64
    package let targetFile: StoreFile
    /// The FlashCopy bitmap, inverted: set = the point's data of this grain is in the target.
    package let preserved: Bitmap
}

extension Volume {
    /// Takes the volume's part of point `number` and holds acknowledgements until `releaseHold`.
    ///
    /// - Parameter preserved: all clear; over memory that outlives a process crash.
    package func formPoint(number: UInt64, targetFile: StoreFile, preserved: Bitmap) {
        invariant(recording, "only a recording volume forms points")
        invariant(point == nil && outOfSyncCount == 0 && mayFormPoint, "a point waits for the one before")
        holding = true
        epoch &+= 1
        pointBitmapIsDirty = false
        point = PointHold(number: number, targetFile: targetFile, preserved: preserved)
        roles.pointee.changeRecordingIndex ^= 1
        roles.pointee.heldPoint = number
        outOfSyncCount = changeCount
        changeCount = 0
        drainCursor = 0
        unsettleWritesInFlight(to: Self.source)
    }

    /// Lets acknowledgements go: every volume of the group has formed the point, or the point is given up.
    package func releaseHold() {
        holding = false
        releaseHeld()
    }

    /// Takes up a point that was being drained when the process ended.
    package func resumePoint(number: UInt64, targetFile: StoreFile, preserved: Bitmap) {
        invariant(point == nil, "a volume has one point")
        point = PointHold(number: number, targetFile: targetFile, preserved: preserved)
    }

    /// Begins the drain from the first grain again: after a lost link, what was not acknowledged is sent anew.
    package func rewindDrain() { drainCursor = 0 }

    /// The next run of grains that must be sent and was not given out since the last rewind; at most `limit` grains.
    package func nextOutOfSync(limit: Int) -> Range<Int>? {
        guard drainCursor < geometry.grainCount, outOfSyncCount > 0,
            let first = outOfSync.firstSet(in: drainCursor..<geometry.grainCount)
        else { return nil }
        let bound = first..<min(geometry.grainCount, first + limit)
        let run = first..<(outOfSync.firstClear(in: bound) ?? bound.upperBound)
        drainCursor = run.upperBound
        return run
    }

    /// Takes back the end of the run that `nextOutOfSync` gave last.
    package func returnOutOfSync(from grain: Int) {
        invariant(grain <= drainCursor, "only what was given out is taken back")
        drainCursor = grain
    }

    /// Whether the point's data of the whole run lies on the source and nothing on its way there may change it.
    package func pointLiesOnSource(_ grains: Range<Int>) -> Bool {
        guard let point, unsettledCount == 0 else { return false }
        return point.preserved.firstSet(in: grains) == nil
    }

    /// The remote has the point's data of these grains on stable storage.
    package func clearOutOfSync(_ grains: Range<Int>, point number: UInt64) {
        guard let point, point.number == number else { return }
        outOfSyncCount -= outOfSync.clear(grains)
    }

    /// The remote has committed the point: nothing of it is needed any more.
    package func endPoint(number: UInt64) {
        guard let point, point.number == number else { return }
        invariant(outOfSyncCount == 0, "a point ends when all of it was sent")
        self.point = nil
        wakeStarved()
    }

    /// The point cannot be held or sent: what it had still to send is changed again.
    package func giveUpPoint(errno: Int32 = 0) {
        roles.pointee.heldPoint = 0
        guard let point else { return mergeOutOfSync() }
        self.point = nil
        mergeOutOfSync()
        if errno != 0 { emit(.pointGivenUp(number: point.number, errno: errno)) }
        wakeStarved()
    }

    /// Rule 2: no bit is lost when a point is. Bits move from one bitmap to the other, and power loss may keep the old state
    /// of either, so the ones are on stable storage before the others are cleared.
    package func mergeOutOfSync() {
        changeCount += changeRecording.add(outOfSync)
        outOfSyncCount = 0
        guard !mayForgetBits else { return outOfSync.clearAll() }
        guard !isMerging else { return }
        isMerging = true
        issue(flushIO(activity.recordingFile, IOToken(owner: .mergeFlush, slot: 0, generation: 0)))
    }

    /// A merge that cannot be made durable ends once it is written down that the bitmaps are not to be relied on.
    func completeMerge(_ errno: Int32) {
        guard errno != 0, !mayForgetBits else { return finishMerge() }
        markAllChanged()  // as in `loseBits`
        mergeFailed = true
        loseActivityLog(errno)
    }

    func finishMerge() {
        isMerging = false
        mergeFailed = false
        outOfSync.clearAll()
    }

    /// Whether a point may be formed: hosts see what lies on the volume, and the next out-of-sync bitmap is empty.
    package var mayFormPoint: Bool { restore == nil && !isMerging }

    /// Counts the changed grains anew, after somebody else has cleared bits.
    package func recountChanges() { changeCount = changeRecording.population() }

    /// The grains of these byte ranges may differ from the peer's for other reasons than a host's write.
    package func markChanged(_ ranges: [Range<UInt64>]) {
        for range in ranges where !range.isEmpty {
            mark(geometry.grains(offset: range.lowerBound, length: range.upperBound - range.lowerBound))
        }
    }

    /// What flows back from a recovery point is not what the old primary's bitmaps take for granted.
    package func markChanged(_ differences: Bitmap) { changeCount += changeRecording.add(differences) }

    /// The peer has taken what the bitmaps said into its own.
    package func forgetChanges() {
        invariant(!recording && point == nil, "only a secondary forgets what it was before")
        changeRecording.clearAll()
        outOfSync.clearAll()
        changeCount = 0
        outOfSyncCount = 0
    }

    /// Words of CR and OOS together, for the peer.
    package func changedWords(from first: Int, count: Int) -> [UInt64] {
        let words = (geometry.grainCount + 63) / 64
        guard (0..<words).contains(first) else { return [] }
        let end = min(first + count, words)
        return first < end ? (first..<end).map { changeRecording.word($0) | outOfSync.word($0) } : []
    }

    /// Every grain may differ from the secondary's.
    package func markAllChanged() {
        changeRecording.setAll()
        changeCount = geometry.grainCount
    }
}
