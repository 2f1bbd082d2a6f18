// Restore.swift: the source becomes a point in time again, at once; the data flows back in the background.
//
// Until a grain is back it is read from the copy, and a host write to it waits for it.
//
// Must be prevented:
//   after power loss, a grain counts as restored although its data was not yet on stable storage
//   after power loss, a grain is restored again over a host write that was acknowledged and flushed
//   the source changes before the decision to restore is on stable storage (the restore then begins paused)
// Therefore: a pending bit is cleared only when the restored data is durable, and a host's FLUSH or FUA write also
// flushes the bitmap of pending grains.

import Base

struct Restore {
    let copy: CopyID
    /// Set = the source does not yet hold the copy's data of this grain.
    let pending: Bitmap
    let bitmapFile: StoreFile
    var pendingCount: Int
    var cursor = 0
    var stalled = false
    /// Hosts see the copy's data already; nothing flows yet.
    var paused = false
    /// Every bit is clear; the bitmap is being flushed before the restore may be called finished.
    var finishing = false
}

extension Volume {
    package var isRestoring: Bool { restore != nil }
    package var restoringGrains: Int { restore?.pendingCount ?? 0 }

    /// Writes into `pending` every grain in which the source may differ from the copy.
    package func markDifferences(from id: CopyID, in pending: Bitmap) {
        guard let index = chainIndex(id) else { return }
        for newer in index..<chainCount { pending.formUnion(chain[newer].changes) }
    }

    /// Starts, or takes up, a restore of the source from a copy of its chain. `pending` says which grains are still
    /// to be restored; it lies in memory backed by `bitmapFile`.
    package func startRestore(from id: CopyID, pending: Bitmap, bitmapFile: StoreFile, paused: Bool = false) {
        invariant(restore == nil, "one restore at a time")
        invariant(chainIndex(id) != nil, "a restore reads a copy of the chain")
        restore = Restore(
            copy: id, pending: pending, bitmapFile: bitmapFile, pendingCount: pending.population(), paused: paused)
        unsettleWritesInFlight(to: Self.source)
        reviewChain()
    }

    /// Lets the data of a restore that began paused flow back.
    package func continueRestore() {
        restore?.paused = false
        wakeStarved()
        reviewChain()
    }

    /// Ends a restore that began paused, as if it had not been asked for.
    package func cancelRestore() {
        guard let current = restore, current.paused else { return }
        restore = nil
        wakeStarved()
        reviewChain()
    }

    /// Ends a restore that cannot go on: grains whose data cannot be read, or written, stay as they are.
    ///
    /// - Returns: how many; nil when the restore has not stalled, or something of it is still under way.
    package func abandonRestore() -> Int? {
        guard let current = restore, current.stalled, !current.finishing, !hasJob(.restore) else { return nil }
        restore = nil
        wakeStarved()
        reviewChain()
        emit(.restoreFinished)
        return current.pendingCount
    }

    func markRestored(_ grains: Range<Int>) {
        guard restore != nil else { return }
        restore!.pendingCount -= restore!.pending.clear(grains)
    }

    func advanceRestore() {
        guard let current = restore, !current.paused else { return }
        if current.pendingCount > 0 {
            sweepRestore()
        } else if !current.finishing, !hasJob(.restore) {
            // Until the cleared bits are durable, the restore goes on for hosts that flush: after power loss a bit that
            // came back would be restored over what they wrote.
            restore!.finishing = true
            issue(flushIO(current.bitmapFile, IOToken(owner: .restoreFlush, slot: 0, generation: 0)))
        }
    }

    func completeRestore(_ errno: Int32) {
        guard errno == 0 else {
            restore!.stalled = true
            emit(.restoreFailed(grain: 0, errno: errno))
            return
        }
        restore = nil
        emit(.restoreFinished)
        reviewChain()
    }

    private func sweepRestore() {
        let count = geometry.grainCount
        var wrapped = false
        while let current = restore, !current.stalled, backgroundMayStart {
            guard let first = current.pending.firstSet(in: min(current.cursor, count)..<count) else {
                if wrapped || current.cursor == 0 { return }
                wrapped = true
                restore!.cursor = 0
                continue
            }
            // No further than what is overwritten: what lies beside it would be preserved for nothing, and on a full disk cost the copy.
            let limit = first..<min(count, first + jobGrains)
            let bound = current.pending.firstClear(in: limit) ?? limit.upperBound
            guard requireRegions(first..<bound) else { return }
            restore!.cursor = bound
            let jobs = activeJobCount
            startCopies(in: first..<bound, for: nil)
            // There is no room, or others are there: whatever ends comes back here, and what is pending is not searched in vain meanwhile.
            guard activeJobCount > jobs else { return }
        }
    }
}
