// FlashCopy.swift: the chain of FlashCopies of one source, recovery points included.
//
// Old content goes once, into the newest active copy; an older copy reads through the newer ones. A copy that is
// withdrawn first hands to the next older one what that still needs (Fill.swift).
//
// Must be prevented:
//   an older copy reads the source for a grain that only the withdrawn copy had preserved
//   a copy that is leaving counts as having a grain that it will not hand over
//   something is handed over to a copy that leaves, after it has looked at what it must hand over itself (it looks again)
//   a reader of a copy that leaves, as of a recovery point past its retention, reads what a newer one took with it
//   a file is closed while an I/O on it is in flight
//
// Invariants:
//   C1  A grain that the source has changed since a copy was taken is set in `changes` of that copy or of a newer one.
//   C2  `changes` of a copy lies within its `preserved`, except for what was written after the copy began to leave.
//   C3  A copy that is newer than a durable one is durable, since the durable one reads through it.

import Base

package struct FlashCopy: BitwiseCopyable {
    package enum State: UInt8, Sendable, BitwiseCopyable {
        case active
        /// Leaves the chain to be taken anew (`retakeCopy`); what the source changes is still recorded.
        case refreshing
        case withdrawing
        /// Lost old content of its own; what it has preserved is whole and serves older copies.
        case failed
    }

    package let id: CopyID
    package let targetFile: StoreFile
    package let bitmapFile: StoreFile
    /// The FlashCopy bitmap, inverted, so that a new one is a hole of zeros: set = the point-in-time data of this
    /// grain is in the target.
    package let preserved: Bitmap
    /// Set = source or target was written to here since; `preserved` itself unless `recordsChanges`.
    package let changes: Bitmap
    /// Has a bitmap of its own for changes, since a background copy fills `preserved`.
    package let recordsChanges: Bool
    /// 1 = the copy has failed; lies beside the bits, so that neither a crash of the process nor, for a durable copy, power loss makes
    /// it whole again before anybody has written that down.
    let failureMark: UnsafeMutablePointer<UInt64>?
    /// Old content and its bit are on stable storage before the source is overwritten.
    package let durable: Bool
    /// The target holds zeroes where it was never written.
    package let targetIsZero: Bool
    /// Every grain is copied to the target in the background.
    package let isFilled: Bool
    /// Bytes a second of the background copy; 0 = as fast as it goes.
    package var rate: UInt64

    package internal(set) var state = State.active
    /// Connections that have it open; it stays until they leave.
    package var readers: Int32 = 0
    /// Grains whose point-in-time data is in the target.
    package internal(set) var preservedCount: Int
    /// A flush of the target has failed: nothing that is written there counts any more until it is opened anew.
    var targetError: Int32 = 0
    var handoverCursor = 0
    var fillCursor = 0
    /// Bytes that the background copy may still move before the clock goes on.
    var fillBudget: Int64 = 0
    /// `changes` is whole, so that a refresh need not copy everything.
    var isIncremental: Bool
    /// The control plane was told that it can be taken anew.
    var readyTold = false

    /// - Parameters:
    ///   - preserved, changes: a bit for each grain, over memory that outlives a process crash and is backed by
    ///     `bitmapFile`; `changes` is nil for copies without background copy.
    ///   - failureMark: in the same file.
    package init(
        id: CopyID, targetFile: StoreFile, bitmapFile: StoreFile, preserved: Bitmap, changes: Bitmap? = nil,
        failureMark: UnsafeMutablePointer<UInt64>? = nil, durable: Bool, targetIsZero: Bool = true,
        isFilled: Bool = false, rate: UInt64 = 0
    ) {
        invariant(changes != nil || !isFilled, "a background copy needs a bitmap for changes")
        self.id = id
        self.targetFile = targetFile
        self.bitmapFile = bitmapFile
        self.preserved = preserved
        self.changes = changes ?? preserved
        recordsChanges = changes != nil
        isIncremental = changes != nil
        self.failureMark = failureMark
        self.durable = durable
        self.targetIsZero = targetIsZero
        self.isFilled = isFilled
        self.rate = rate
        preservedCount = preserved.population()
    }

    /// The target is an image by itself.
    package var isComplete: Bool { preservedCount == preserved.count }
    /// It leaves, and somebody still has it open.
    var isRead: Bool { state == .withdrawing && readers > 0 }
    var isLeaving: Bool { state == .withdrawing || state == .refreshing }
    var needsFilling: Bool { isFilled && state == .active && !isComplete }
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
    /// Whether the source holds what it held when a copy was taken: none from then on has taken old content. What is under way is
    /// not looked at (`modifyingInFlight`).
    package func isUnchanged(since id: CopyID) -> Bool {
        guard let first = chainIndex(id), restore == nil else { return false }
        for index in first..<chainCount where chain[index].state != .active || chain[index].preservedCount > 0 {
            return false
        }
        return true
    }

    /// Whether some copy of the chain must survive power loss, so that a newer one has to as well (C3).
    package var chainIsDurable: Bool {
        for index in 0..<chainCount where chain[index].durable && chain[index].state != .failed { return true }
        return false
    }

    // MARK: Establishing

    /// Establishes a FlashCopy of this instant as the newest of the chain.
    ///
    /// For a copy over several volumes hold acknowledgements first (`hold`) on all of them.
    package func addCopy(_ copy: FlashCopy) {
        invariant(restore == nil, "no copy is taken of a volume that is being restored")
        insert(copy, at: chainCount)
        unsettleWritesInFlight(to: Self.source)
    }

    /// Establishes a copy of what a copy of the chain holds at this instant, right below it.
    package func cloneCopy(_ id: CopyID, as clone: FlashCopy) {
        guard let index = chainIndex(id), chain[index].state == .active else {
            invariantFailed("a clone is taken of an active copy", #fileID, #line)
        }
        insert(clone, at: index)
        unsettleWritesInFlight(to: chain[index + 1].targetFile)
    }

    /// Whether a copy whose refresh has begun is out of use just now. It may come into use again: when the copy that it has
    /// handed over to leaves, the next older one needs the same.
    package func mayRetake(_ id: CopyID) -> Bool {
        guard let index = chainIndex(id) else { return false }
        return chain[index].state == .refreshing && chain[index].readyTold && isIdle(index)
    }

    /// Takes a copy anew that has handed over what others need and has no readers: it leaves the chain, and `renewed`,
    /// over the same target, is the newest. Only what changed on either side since has to be copied.
    ///
    /// - Parameter renewed: its bitmaps are clear.
    package func retakeCopy(_ id: CopyID, as renewed: FlashCopy) {
        guard let index = chainIndex(id), mayRetake(id) else {
            invariantFailed("a copy is taken anew when it is out of use", #fileID, #line)
        }
        let old = chain[index]
        var renewed = renewed
        renewed.targetError = old.targetError
        if old.isIncremental, renewed.recordsChanges {
            // C1: what changed since is noted here or in a newer copy.
            renewed.preserved.formDifference(old.preserved, old.changes)
            for newer in index + 1..<max(index + 1, chainCount) {
                renewed.preserved.formDifference(renewed.preserved, chain[newer].changes)
            }
            renewed.preservedCount = renewed.preserved.population()
        }
        remove(index)
        addCopy(renewed)
        retakes &+= 1
        if renewed.durable { raiseBarrier(renewed.bitmapFile, .retaken) }
    }

    // MARK: The barrier after a copy was taken anew, or has failed

    /// A host write that finds a durable copy's bit set goes straight to the source; so it waits until the bits that a copy
    /// begins with are on stable storage. Nor is anything copied to the target before: until its bitmap says that it was taken
    /// anew, the target is the old copy's.
    ///
    /// That a durable copy has failed must be on stable storage as well before a host overwrites what it lacks.
    private func raiseBarrier(_ bitmapFile: StoreFile, _ reason: BarrierReason) {
        barriers += 1
        issue(flushIO(bitmapFile, IOToken(owner: .barrier, slot: reason.rawValue, generation: 0)))
    }

    private enum BarrierReason: Int32 { case retaken, failed }

    func completeBarrier(_ io: StoreIO, _ errno: Int32) {
        if errno != 0, io.token.slot == BarrierReason.failed.rawValue {
            for index in 0..<chainCount where chain[index].bitmapFile == io.file {
                return emit(.failureUnwritten(id: chain[index].id, errno: errno))
            }
        } else if errno != 0, preserveIndex >= 0 {
            failCopy(preserveIndex, errno: errno)
        }
        lowerBarrier()
    }

    private func lowerBarrier() {
        barriers -= 1
        backgroundDue = backgroundWork
        if !isBarred { resumeAll(barrierWaiters.takeAll()) }
    }

    /// It is written down elsewhere that a copy has failed, or that could not be done in time: the host comes first. Answers
    /// `failureUnwritten`.
    package func failureIsWritten() {
        invariant(barriers > 0, "each failure that could not be written is answered once")
        lowerBarrier()
    }

    /// Takes up the chain of an earlier run; copies come oldest first. The bitmap of a durable copy is on stable
    /// storage: a write that finds its bit set goes straight to the source.
    package func resumeCopy(_ copy: FlashCopy, failed: Bool) {
        var copy = copy
        if failed {
            copy.state = .failed
            copy.isIncremental = false
        }
        insert(copy, at: chainCount)
    }

    private func insert(_ copy: FlashCopy, at place: Int) {
        invariant(chainCount < Limits.copiesPerVolume, "the chain has a limit")
        invariant(chainIndex(copy.id) == nil, "identifiers of copies are not reused")
        (chain + chainCount).initialize(to: copy)
        var index = chainCount
        while index > place {
            chain[index] = chain[index - 1]
            index -= 1
        }
        chain[place] = copy
        chainCount += 1
        reviewChain()
    }

    /// Holds acknowledgements while FlashCopies of several volumes are established.
    package func holdAcknowledgements() { holding = true }

    /// After a change of the chain: who takes old content, and whether there is work in the background.
    func reviewChain() {
        preserveIndex = chainCount - 1
        while preserveIndex >= 0, chain[preserveIndex].state != .active { preserveIndex -= 1 }
        refreshingCount = 0
        backgroundWork = restore != nil || lacksGrains
        fillsWithRate = false
        for index in 0..<chainCount {
            if chain[index].state == .refreshing { refreshingCount += 1 }
            if chain[index].isLeaving || chain[index].needsFilling { backgroundWork = true }
            if chain[index].needsFilling, chain[index].rate > 0 { fillsWithRate = true }
        }
        backgroundDue = backgroundWork
    }

    // MARK: Leaving

    /// Begins to take a copy out of the chain; `.copyWithdrawn` tells when it is out.
    package func withdrawCopy(_ id: CopyID) { leave(id, .withdrawing) }

    /// Begins to take a copy out of use so that it can be taken anew; `.copyReady` tells when.
    package func beginRefresh(_ id: CopyID) { leave(id, .refreshing) }

    private func leave(_ id: CopyID, _ state: FlashCopy.State) {
        guard let index = chainIndex(id), chain[index].state != .withdrawing else { return }
        chain[index].state = state
        rewindHandovers(from: index)
        reviewChain()
        wakeStarved()
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
        if chain[index].readers == 0, chain[index].state == .withdrawing { rewindHandovers(from: index) }
        backgroundDue = backgroundWork
    }

    /// The next older copy that still needs its data. One that leaves and has no readers any more needs nothing: what it hands over,
    /// its own heir has from here as well.
    func heir(of index: Int) -> Int? {
        var older = index - 1
        while older >= 0 {
            if chain[older].state == .active || chain[older].isRead { return older }
            older -= 1
        }
        return nil
    }

    /// Grains that copies which leave together may have to hand over to older ones, at most.
    package func handoverBound(of leaving: [CopyID]) -> Int {
        var grains = 0
        var hasHeir = false
        for index in 0..<chainCount {
            if !leaving.contains(chain[index].id) {
                hasHeir = hasHeir || chain[index].state == .active
            } else if hasHeir {
                grains += chain[index].preservedCount
            }
        }
        return grains
    }

    /// Whether nothing reads or writes the files of a copy.
    func isIdle(_ index: Int) -> Bool {
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

    /// Copies that take no old content, survive power loss, and that nothing reads or writes just now: their files may be closed.
    package func forEachIdleOldCopy(_ body: (FlashCopy) -> Void) {
        for index in 0..<max(0, preserveIndex) where chain[index].durable && !chain[index].isFilled && isIdle(index) {
            body(chain[index])
        }
    }

    func remove(_ index: Int) {
        // C1: what the source changed while this was the newest, it changed since the older ones were taken, too.
        var older = index - 1
        while older >= 0 {
            let keeps = chain[older].state == .active || chain[older].state == .refreshing || chain[older].isRead
            if keeps, chain[older].recordsChanges { chain[older].changes.formUnion(chain[index].changes) }
            if chain[older].state == .active { break }
            older -= 1
        }
        for later in index..<chainCount - 1 { chain[later] = chain[later + 1] }
        chainCount -= 1
        reviewChain()
    }

    // MARK: Failing

    /// Ends a copy whose target did not take old content. Older ones go on: the next of them takes it.
    func failCopy(_ index: Int, errno: Int32) {
        guard chain[index].state == .active || chain[index].state == .refreshing || chain[index].isRead else { return }
        chain[index].state = .failed
        chain[index].isIncremental = false
        chain[index].failureMark?.pointee = 1
        if chain[index].durable { raiseBarrier(chain[index].bitmapFile, .failed) }
        emit(.copyFailed(id: chain[index].id, errno: errno))
        rewindHandovers(from: index)
        reviewChain()
    }

    /// Whoever hands over to this copy has another heir now.
    func rewindHandovers(from index: Int) {
        for newer in index..<chainCount {
            chain[newer].handoverCursor = 0
            chain[newer].readyTold = false
        }
    }

    /// Ends every copy that needed content which could not be read.
    func failCopies(upTo index: Int, errno: Int32) {
        for older in 0...index { failCopy(older, errno: errno) }
    }

    /// C1: the source, which is about to be written, differs here from every copy.
    func recordChanges(_ grains: Range<Int>) {
        if recording, !omits(.forgetMark) { leg.mark(grains) }  // V1
        guard !omits(.forgetChanges) else { return }
        if preserveIndex >= 0, chain[preserveIndex].recordsChanges { chain[preserveIndex].changes.set(grains) }
        guard refreshingCount > 0 else { return }
        for index in 0..<chainCount where chain[index].state == .refreshing && chain[index].recordsChanges {
            chain[index].changes.set(grains)
        }
    }
}
