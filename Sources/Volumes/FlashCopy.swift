// FlashCopy.swift: the chain of FlashCopies of one source, recovery points included.
//
// Old content goes once, into the newest active copy; an older copy reads through the newer ones. A copy that is
// withdrawn first hands to the next older one what that still needs.
//
// Must be prevented:
//   an older copy reads the source for a grain that only the withdrawn copy had preserved
//   a file is closed while an I/O on it is in flight

import Base

package struct FlashCopy: BitwiseCopyable {
    package enum State: UInt8, Sendable, BitwiseCopyable { case active, withdrawing, failed }
    package let id: CopyID
    package let targetFile: StoreFile
    package let bitmapFile: StoreFile
    /// The FlashCopy bitmap, inverted, so that a new one is a hole of zeros: set = the point-in-time data of this
    /// grain is in the target.
    package let preserved: Bitmap
    /// Old content and its bit are on stable storage before the source is overwritten.
    package let durable: Bool
    package internal(set) var state = State.active
    /// Connections that have it open; it stays until they leave.
    package var readers: Int32 = 0
    var handoverCursor = 0

    package init(
        id: CopyID, targetFile: StoreFile, bitmapFile: StoreFile, preserved: Bitmap, durable: Bool
    ) {
        self.id = id
        self.targetFile = targetFile
        self.bitmapFile = bitmapFile
        self.preserved = preserved
        self.durable = durable
    }
}

extension Volume {
    func chainIndex(_ id: CopyID) -> Int? {
        var index = chainCount - 1
        while index >= 0 {
            if chain[index].id == id { return index }
            index -= 1
        }
        return nil
    }

    package func copy(_ id: CopyID) -> FlashCopy? { chainIndex(id).map { chain[$0] } }
    package var oldestCopy: FlashCopy? { chainCount > 0 ? chain[0] : nil }

    /// Establishes a FlashCopy of this instant as the newest of the chain.
    ///
    /// For a copy over several volumes hold acknowledgements first (`hold`) on all of them.
    package func addCopy(_ copy: FlashCopy) {
        invariant(chainCount < Limits.copiesPerVolume, "the chain has a limit")
        invariant(chainIndex(copy.id) == nil, "identifiers of copies are not reused")
        (chain + chainCount).initialize(to: copy)
        chainCount += 1
        choosePreserving()
        unsettleWritesInFlight()
    }

    /// Takes up the chain of an earlier run; copies come oldest first. The bitmap of a durable copy is on stable
    /// storage: a write that finds its bit set goes straight to the source.
    package func resumeCopy(_ copy: FlashCopy, failed: Bool) {
        invariant(chainCount < Limits.copiesPerVolume, "the chain has a limit")
        (chain + chainCount).initialize(to: copy)
        if failed { chain[chainCount].state = .failed }
        chainCount += 1
        choosePreserving()
    }

    /// Holds acknowledgements while FlashCopies of several volumes are established.
    package func hold() { holding = true }

    func choosePreserving() {
        preserveIndex = chainCount - 1
        while preserveIndex >= 0, chain[preserveIndex].state != .active { preserveIndex -= 1 }
    }

    /// Begins to take a copy out of the chain; `.copyWithdrawn` tells when it is out.
    package func withdrawCopy(_ id: CopyID) {
        guard let index = chainIndex(id), chain[index].state != .withdrawing else { return }
        if chain[index].state == .active { chain[index].state = .withdrawing }
        if chain[index].state == .failed {
            chain[index].state = .withdrawing
            chain[index].handoverCursor = geometry.grainCount  // nothing of it is whole
        }
        choosePreserving()
        wakeStarved()
        pumpBackground()
    }

    package func retainCopy(_ id: CopyID) -> Bool {
        guard let index = chainIndex(id), chain[index].state == .active else { return false }
        chain[index].readers += 1
        return true
    }

    package func releaseCopy(_ id: CopyID) {
        guard let index = chainIndex(id) else { return }
        chain[index].readers -= 1
        invariant(chain[index].readers >= 0, "a copy is released once for each reader")
        pumpBackground()
    }

    /// The next older copy that still needs its data.
    func heir(of index: Int) -> Int? {
        var older = index - 1
        while older >= 0 {
            if chain[older].state != .failed { return older }
            older -= 1
        }
        return nil
    }

    /// Moves withdrawals on: hand over, then wait for readers and I/O, then leave.
    func advanceWithdrawals() {
        var index = chainCount - 1
        while index >= 0 {
            if chain[index].state == .withdrawing, handOver(index), isIdle(index) { remove(index) }
            index -= 1
        }
    }

    private func isIdle(_ index: Int) -> Bool {
        let copy = chain[index]
        guard copy.readers == 0, fileInFlight[Int(copy.targetFile)] == 0,
            fileInFlight[Int(copy.bitmapFile)] == 0, restore?.copy != copy.id
        else { return false }
        for active in 0..<activeJobCount {
            let job = jobs + Int(activeJobs[active])
            if job.pointee.readFile == copy.targetFile || job.pointee.targetCopy == copy.id { return false }
        }
        return true
    }

    private func remove(_ index: Int) {
        let id = chain[index].id
        for later in index..<chainCount - 1 { chain[later] = chain[later + 1] }
        chainCount -= 1
        choosePreserving()
        emit(.copyWithdrawn(id: id))
    }

    /// Starts jobs that copy what the next older copy lacks; true when nothing is left to hand over.
    private func handOver(_ index: Int) -> Bool {
        guard let heir = heir(of: index) else { return true }
        let from = chain[index]
        let to = chain[heir]
        var unfinished = false
        for active in 0..<activeJobCount where jobs[Int(activeJobs[active])].targetCopy == from.id {
            return false  // a preserve into it is under way; its outcome decides what there is to hand over
        }
        while let run = nextHandover(
            from.preserved, to.preserved, from: chain[index].handoverCursor)
        {
            if activeJob(overlapping: run) != nil { return false }
            guard backgroundMayStart, let job = takeJob(run) else { return false }
            chain[index].handoverCursor = run.upperBound
            unfinished = true
            startHandover(job, from: from, to: to)
        }
        for active in 0..<activeJobCount
        where jobs[Int(activeJobs[active])].purpose == .handOver
            && jobs[Int(activeJobs[active])].readFile == from.targetFile
        { unfinished = true }
        return !unfinished
    }

    /// The next run preserved in `from` and not in `to`, at most one job long.
    private func nextHandover(_ from: Bitmap, _ to: Bitmap, from start: Int) -> Range<Int>? {
        var grain = start
        while grain < geometry.grainCount {
            guard let first = from.firstSet(in: grain..<geometry.grainCount) else { return nil }
            let bound = first..<min(geometry.grainCount, first + jobGrains)
            let end = from.firstClear(in: bound) ?? bound.upperBound
            guard let lacking = to.firstClear(in: first..<end) else {
                grain = end
                continue
            }
            return lacking..<(to.firstSet(in: lacking..<end) ?? end)
        }
        return nil
    }

    /// Ends every copy that would have taken the content that could not be preserved.
    func failCopies(upTo index: Int, errno: Int32) {
        for older in 0...index where chain[older].state == .active {
            chain[older].state = .failed
            emit(.copyFailed(id: chain[older].id, errno: errno))
        }
        choosePreserving()
    }
}
