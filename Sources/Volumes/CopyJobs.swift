// CopyJobs.swift: moving grains between source and targets: preserve, fill, restore.
//
//   reading ─► writing (one or two targets) ─► [durable: wait for a flush shared by many jobs ─► set bits
//            ─► flush the bitmap] ─► set bits ─► wake the waiters, who plan anew
//
// Must be prevented:
//   a restore writes to the source although a copy has come to need what is there since the job began
//   two jobs on one grain at a time (a late write of the first would overwrite the second's)
//   old content read from the source after a newer copy came to have it, and a host write no longer waited
//   old content read from the source while a write that was in flight at the cut is still changing it
//   a durable copy's bit on stable storage before its data
//   a write goes ahead because of a durable copy's bit that is set but not yet on stable storage

import Base

struct CopyJob: BitwiseCopyable {
    enum Purpose: UInt8, BitwiseCopyable { case preserve, fill, restore, mirror }

    var purpose = Purpose.preserve
    var generation: UInt16 = 0
    var firstGrain = 0
    var grainCount = 0
    var buffer: UnsafeMutableRawPointer?
    var readFile: StoreFile = 0
    /// Number of the point whose target takes the content; 0 = none.
    var targetPoint: UInt64 = 0
    var pointFile: StoreFile = 0
    /// The copy whose target takes the content; -1 = none.
    var targetCopy: CopyID = -1
    var copyFile: StoreFile = 0
    var durable = false
    /// Fills a heir; if it fails for want of the data, everything older has lost it, too.
    var handsOver = false
    /// `Volume.retakes` when it began.
    var retakes: UInt32 = 0
    /// What was read is a hole; the buffer was not filled.
    var isHole = false
    /// The target reads as zeroes where nothing was written.
    var targetIsZero = false
    var writesLeft: Int8 = 0
    var readError: Int32 = 0
    var pointError: Int32 = 0
    var copyError: Int32 = 0
    var waiters = SlotList()
    /// Links jobs that wait for the same flush.
    var next: Int32 = -1

    var grains: Range<Int> { firstGrain..<firstGrain + grainCount }
    /// The file whose flush makes the job's data durable.
    var flushFile: StoreFile { purpose == .restore ? Volume.source : copyFile }
}

/// Jobs that share one flush of their target, and one of their bitmap.
struct FlushBatch: BitwiseCopyable {
    enum Stage: UInt8, BitwiseCopyable { case idle, data, record }
    var stage = Stage.idle
    var waitingHead: Int32 = -1
    var waitingTail: Int32 = -1
    var runningHead: Int32 = -1
}

extension Volume {
    var jobGrains: Int { max(1, Limits.copyJobBytes / geometry.grain) }

    // MARK: What is needed

    /// Why a grain must be copied before a host may overwrite it.
    private struct Need: Equatable {
        var point: Bool
        var copy: Bool
    }

    private func neededBits(_ word: Int) -> UInt64 {
        var bits: UInt64 = 0
        if let hold { bits |= hold.needed(word, unsent: leg.outOfSync) }
        if preserveIndex >= 0 { bits |= ~preservedBits(word) }
        if let restore { bits |= restore.pending.word(word) }
        return bits
    }

    /// Set = the chain has the grain: in the copy that preserves, or in a newer one that will hand it over when it leaves.
    private func preservedBits(_ word: Int) -> UInt64 {
        var bits = chain[preserveIndex].preserved.word(word)
        var index = preserveIndex + 1
        while index < chainCount {
            bits |= chain[index].preserved.word(word) & chain[index].changes.word(word)
            index += 1
        }
        return bits
    }

    /// The first grain that must be copied before it is overwritten.
    func firstNeeded(in grains: Range<Int>) -> Int? {
        guard !grains.isEmpty else { return nil }
        for word in grains.lowerBound >> 6...(grains.upperBound - 1) >> 6 {
            let bits = neededBits(word) & Bitmap.mask(grains, word: word)
            if bits != 0 { return word << 6 | bits.trailingZeroBitCount }
        }
        return nil
    }

    private func need(_ grain: Int) -> Need {
        let bit = UInt64(1) << UInt64(grain & 63)
        let word = grain >> 6
        return Need(
            point: hold.map { $0.needed(word, unsent: leg.outOfSync) & bit != 0 } ?? false,
            copy: preserveIndex >= 0 && preservedBits(word) & bit == 0)
    }

    /// Whether the point or a copy needs what lies on the source of some grain.
    private func isNeeded(_ grains: Range<Int>) -> Bool {
        for grain in grains where need(grain) != Need(point: false, copy: false) { return true }
        return false
    }

    // MARK: Starting

    /// Starts jobs for the grains of `grains` that need one, and lets `waiter` plan anew when the last of them is done.
    func startCopies(in grains: Range<Int>, for waiter: Int32?) {
        var lastJob: Int32 = -1
        var grain = grains.lowerBound
        var blockedByUnsettled = false
        var unsent: Range<Int>?
        while let first = firstNeeded(in: grain..<grains.upperBound) {
            if let restore, restore.paused, need(first) == Need(point: false, copy: false) { break }
            if let job = activeJob(overlapping: first..<first + 1) {
                lastJob = job
                grain = jobs[Int(job)].grains.upperBound
                if grain >= grains.upperBound { break }
                continue
            }
            let unsettled = firstUnsettled(first..<grains.upperBound)
            if let unsettled, unsettled.lowerBound == first {
                blockedByUnsettled = true
                break
            }
            var run = jobRun(first..<min(grains.upperBound, unsettled?.lowerBound ?? Int.max))
            let needsImages = hold?.isInMemory == true && need(first).point
            if needsImages {
                let held = reserveImages(run, for: waiter)
                if held.isEmpty {
                    unsent = run
                    break
                }
                run = held
            }
            guard let job = takeJob(run) else {
                if needsImages { releaseImages(run) }
                break
            }
            startJob(job)
            lastJob = job
            grain = run.upperBound
            if grain >= grains.upperBound { break }
        }
        guard let waiter else {
            if let unsent { ask(unsent) }
            return
        }
        if lastJob < 0, !blockedByUnsettled, let unsent {
            requests[Int(waiter)].state = .waiting
            return sendFirst(unsent, for: waiter)
        }
        wait(waiter, forJob: lastJob, orUnsettled: blockedByUnsettled)
    }

    /// Lets a request plan anew when a job is done; without one, when what is in flight has ended, or there is room.
    func wait(_ waiter: Int32, forJob job: Int32, orUnsettled isUnsettled: Bool) {
        requests[Int(waiter)].state = .waiting
        if job >= 0 {
            jobs[Int(job)].waiters.append(waiter, in: requests)
        } else if isUnsettled {
            settleWaiters.append(waiter, in: requests)
        } else {
            starvedWaiters.append(waiter, in: requests)
        }
    }

    /// Writes in flight to the source, and, where data is restored, to the file that it comes from.
    private func firstUnsettled(_ grains: Range<Int>) -> Range<Int>? {
        guard unsettledCount > 0 else { return nil }
        let source = unsettledGrains(in: grains, of: Self.source)
        guard need(grains.lowerBound) == Need(point: false, copy: false),
            let file = resolve(.volume, grains.lowerBound..<grains.lowerBound + 1)?.file,
            let other = unsettledGrains(in: grains, of: file)
        else { return source }
        return source.map { $0.lowerBound < other.lowerBound ? $0 : other } ?? other
    }

    /// The longest run from the start of `bound` that one job can move: all needed for the same reason, in one file,
    /// no other job on it.
    private func jobRun(_ bound: Range<Int>) -> Range<Int> {
        let first = bound.lowerBound
        var end = cutAtJobs(first..<min(bound.upperBound, first + jobGrains)).upperBound
        let wanted = need(first)
        if !wanted.point && !wanted.copy, let (_, run) = resolve(.volume, first..<end) {
            end = run
        }
        var grain = first + 1
        while grain < end, need(grain) == wanted,
            wanted.point || wanted.copy || restore!.pending.contains(grain)
        {
            grain += 1
        }
        return first..<grain
    }

    /// The part of a run before the next job; none is on its first grain.
    func cutAtJobs(_ run: Range<Int>) -> Range<Int> {
        var end = run.upperBound
        for index in 0..<activeJobCount {
            let other = jobs[Int(activeJobs[index])].grains
            if other.lowerBound > run.lowerBound { end = min(end, other.lowerBound) }
        }
        return run.lowerBound..<end
    }

    func activeJob(overlapping grains: Range<Int>) -> Int32? {
        for index in 0..<activeJobCount
        where jobs[Int(activeJobs[index])].grains.overlaps(grains) {
            return activeJobs[index]
        }
        return nil
    }

    func hasJob(_ purpose: CopyJob.Purpose) -> Bool {
        for index in 0..<activeJobCount where jobs[Int(activeJobs[index])].purpose == purpose {
            return true
        }
        return false
    }

    /// A free job slot with a buffer for the run, or nil when slots or memory are lent out.
    func takeJob(_ run: Range<Int>) -> Int32? {
        invariant(activeJob(overlapping: run) == nil, "one copy job on a grain at a time")
        guard let slot = freeJobs.popFirst() ?? unusedJob() else { return nil }
        let range = geometry.byteRange(run)
        guard let buffer = copyBuffers.take(Int(range.upperBound - range.lowerBound)) else {
            freeJobs.append(slot)
            isStarved = true
            return nil
        }
        let generation = jobs[Int(slot)].generation &+ 1
        jobs[Int(slot)] = CopyJob()
        jobs[Int(slot)].generation = generation
        jobs[Int(slot)].firstGrain = run.lowerBound
        jobs[Int(slot)].grainCount = run.count
        jobs[Int(slot)].buffer = buffer
        jobs[Int(slot)].retakes = retakes
        activeJobs[activeJobCount] = slot
        activeJobCount += 1
        if backgroundAllowance > 0 { backgroundAllowance -= 1 }
        return slot
    }

    private func unusedJob() -> Int32? {
        guard jobsUsed < Limits.copyJobsPerVolume else { return nil }
        (jobs + jobsUsed).initialize(to: CopyJob())
        jobsUsed += 1
        return Int32(jobsUsed - 1)
    }

    private func startJob(_ slot: Int32) {
        let job = jobs + Int(slot)
        let wanted = need(job.pointee.firstGrain)
        if wanted.point || wanted.copy {
            job.pointee.purpose = .preserve
            if wanted.point {
                job.pointee.targetPoint = hold!.number
                job.pointee.pointFile = hold!.file
            }
            if wanted.copy { aim(job, at: chain[preserveIndex]) }
        } else {
            job.pointee.purpose = .restore
            job.pointee.durable = true
            job.pointee.readFile = resolve(.volume, job.pointee.grains)?.file ?? Self.source
        }
        issueJob(slot, .read, job.pointee.readFile)
    }

    func aim(_ job: UnsafeMutablePointer<CopyJob>, at copy: FlashCopy) {
        job.pointee.targetCopy = copy.id
        job.pointee.copyFile = copy.targetFile
        job.pointee.durable = copy.durable && !omits(.skipDurability)
        job.pointee.targetIsZero = copy.targetIsZero
    }

    func issueJob(
        _ slot: Int32, _ operation: StoreIO.Operation, _ file: StoreFile, seeksHole: Bool = false
    ) {
        let job = jobs[Int(slot)]
        let range = geometry.byteRange(job.grains)
        issue(
            StoreIO(
                operation: operation, fua: false, noHole: false, file: file,
                offset: range.lowerBound, length: range.upperBound - range.lowerBound,
                buffer: job.buffer,
                token: IOToken(owner: .copyJob, slot: slot, generation: job.generation), seeksHole: seeksHole))
    }

    // MARK: Completing

    func completeJob(_ slot: Int32, _ io: StoreIO, _ errno: Int32) {
        let job = jobs + Int(slot)
        if io.operation == .read {
            if errno == StoreIO.hole {
                job.pointee.isHole = true
                writeTargets(slot)
            } else if errno != 0 {
                job.pointee.readError = errno
                endJob(slot)
            } else {
                writeTargets(slot)
            }
            return
        }
        if errno != 0 {
            if job.pointee.targetPoint != 0, io.file == job.pointee.pointFile {
                job.pointee.pointError = errno
            } else {
                job.pointee.copyError = errno
            }
        }
        job.pointee.writesLeft -= 1
        if job.pointee.writesLeft == 0 { moved(slot) }
    }

    /// What was read is not to be relied on for the copy: it is done again. A job that goes on for the point has no part in a flush of the
    /// copy's target, whose bits the others' writes wait for.
    private func drop(_ job: UnsafeMutablePointer<CopyJob>) {
        job.pointee.targetCopy = -1
        job.pointee.durable = false
        if job.pointee.handsOver { rewindHandovers(from: 0) }
    }

    /// Whether what was read is what the target lacks: no host write can have come before the read.
    private func stillReads(_ slot: Int32) -> Bool {
        guard !omits(.skipReadCheck) else { return true }
        let job = jobs[Int(slot)]
        switch job.purpose {
        case .preserve:
            // Host writes to a grain that is needed wait; only a copy that begins with grains ends the need.
            return job.retakes == retakes
        case .fill:
            guard let index = chainIndex(job.targetCopy), job.retakes == retakes else { return false }
            return resolveCopy(index, job.grains) == (job.readFile, job.grains.upperBound)
        case .restore:
            guard let found = resolve(.volume, job.grains) else { return false }
            return found == (job.readFile, job.grains.upperBound)
        case .mirror: return true
        }
    }

    private func moved(_ slot: Int32) {
        let job = jobs + Int(slot)
        if let index = chainIndex(job.pointee.targetCopy), chain[index].targetError != 0 {
            job.pointee.copyError = chain[index].targetError
        }
        if job.pointee.durable, job.pointee.copyError == 0 {
            awaitFlush(slot)
        } else {
            markMoved(slot)
            endJob(slot)
        }
    }

    private func writeTargets(_ slot: Int32) {
        let job = jobs + Int(slot)
        if job.pointee.purpose == .restore {
            // Who takes old content may have changed since the job began.
            guard !isNeeded(job.pointee.grains), stillReads(slot) else { return endJob(slot) }
            job.pointee.writesLeft = 1
            recordChanges(job.pointee.grains)
            issueJob(slot, .write, Self.source)
            return
        }
        if job.pointee.purpose == .mirror { return writeMirror(slot) }
        // A copy that was taken anew meanwhile may have the grains: a host write did not wait, and may have overtaken the
        // read, but the older copy finds them there.
        if job.pointee.targetCopy >= 0, !stillReads(slot) { drop(job) }
        // The point may have ended while its old content was read; nobody needs it then.
        if job.pointee.targetPoint != heldPoint ?? 0 { job.pointee.targetPoint = 0 }
        if job.pointee.targetPoint != 0 { advance(job.pointee.grains) }
        if job.pointee.isHole {
            if job.pointee.targetPoint != 0 {
                job.pointee.writesLeft = 1
                return issueJob(slot, .zero, job.pointee.pointFile)
            }
            guard job.pointee.targetCopy >= 0 else { return endJob(slot) }
            // An untouched target reads as zeroes already.
            if job.pointee.targetIsZero { return moved(slot) }
            job.pointee.writesLeft = 1
            issueJob(slot, .zero, job.pointee.copyFile)
            return
        }
        let writesPoint = job.pointee.targetPoint != 0 && job.pointee.pointFile != Self.memory
        job.pointee.writesLeft = (writesPoint ? 1 : 0) + (job.pointee.targetCopy >= 0 ? 1 : 0)
        guard job.pointee.writesLeft > 0 else { return job.pointee.targetPoint != 0 ? moved(slot) : endJob(slot) }
        if writesPoint { issueJob(slot, .write, job.pointee.pointFile) }
        if job.pointee.targetCopy >= 0 { issueJob(slot, .write, job.pointee.copyFile) }
    }

    /// V2: the data is where the bits will say.
    private func markMoved(_ slot: Int32) {
        let job = jobs[Int(slot)]
        if job.purpose == .restore {
            if job.copyError == 0 { markRestored(job.grains) }
            return
        }
        if job.purpose == .mirror {
            if job.copyError == 0 { wasMirrored(job.grains) }
            return
        }
        if job.targetPoint != 0, job.pointError == 0, let hold, hold.number == job.targetPoint {
            if hold.isInMemory { storeImages(job) } else { took(job.grains, in: hold) }
            collisionFigures.heldGrains += UInt64(job.grainCount)
        }
        if job.targetCopy >= 0, job.copyError == 0, let index = chainIndex(job.targetCopy) {
            chain[index].preservedCount += chain[index].preserved.set(job.grains)
            if chain[index].isLeaving { chain[index].handoverCursor = 0 }
            if chain[index].isFilled, chain[index].isComplete, chain[index].state == .active {
                emit(.copyCompleted(id: job.targetCopy))
                reviewChain()
            }
        }
    }

    /// The file that holds the point has these.
    func took(_ grains: Range<Int>, in hold: Hold) {
        hold.took(grains)
        if hold.file == intermediate?.file { wasMirrored(grains) }
        pointBitmapIsDirty = true
    }

    /// What was sent while it was read is not needed any more.
    private func storeImages(_ job: CopyJob) {
        for grain in job.grains where !outOfSync.contains(grain) { images!.release(grain) }
        let range = geometry.byteRange(job.grains)
        images!.store(job.grains, Int(range.upperBound - range.lowerBound), from: job.buffer!)
    }

    /// A flush of a file has failed, for whomever: what jobs wrote there and have not flushed yet may be gone, and the next flush would
    /// not tell. Nor is what is written to the same place again sure to be there after a flush that succeeds: a file system may take
    /// blocks for written whose first write has failed (seen on ext4). So the target takes nothing more.
    func failJobs(writingTo file: StoreFile, _ errno: Int32) {
        for index in 0..<chainCount where chain[index].targetFile == file { chain[index].targetError = errno }
        for index in 0..<activeJobCount {
            let job = jobs + Int(activeJobs[index])
            if job.pointee.targetCopy >= 0, job.pointee.copyFile == file { job.pointee.copyError = errno }
        }
    }

    /// A flush by the control plane of a copy's target has failed.
    package func targetFlushFailed(_ id: CopyID, errno: Int32) {
        guard let index = chainIndex(id) else { return }
        failJobs(writingTo: chain[index].targetFile, errno)
        if policy == .hostFirst { failCopy(index, errno: errno) }
    }

    /// The bits may not be on stable storage: a write that comes again must not go ahead because of them.
    private func unmarkMoved(_ slot: Int32) {
        let job = jobs[Int(slot)]
        guard let index = chainIndex(job.targetCopy) else { return }
        chain[index].preservedCount -= chain[index].preserved.clear(job.grains)
    }

    func endJob(_ slot: Int32) {
        let job = jobs[Int(slot)]
        var waiters = job.waiters
        removeJob(slot)
        let refused = applyFailure(job)
        while let waiter = waiters.popFirst(in: requests) {
            if refused != 0 { finish(waiter, error: refused) } else { resume(waiter) }
        }
        wakeStarved()
        if backgroundWork { backgroundDue = true }
    }

    /// Who gives way: the point and the copy (0 is returned and the host write goes on), or the write (its errno).
    private func applyFailure(_ job: CopyJob) -> Int32 {
        let pointError = job.readError != 0 ? job.readError : job.pointError
        let copyError = job.readError != 0 ? job.readError : job.copyError
        switch job.purpose {
        case .preserve:
            if pointError != 0, job.targetPoint != 0, heldPoint == job.targetPoint {
                giveUpPoint(errno: pointError)
            }
            guard copyError != 0, job.targetCopy >= 0 else { return 0 }
            if policy == .copiesFirst {
                tellRefusal(job.targetCopy, copyError)
                return copyError
            }
            if let index = chainIndex(job.targetCopy) {
                // A target that does not take old content ends its own copy; the next older one may have room. Old
                // content that cannot be read is lost to all.
                if job.readError != 0 {
                    failCopies(upTo: index, errno: copyError)
                } else {
                    failCopy(index, errno: copyError)
                }
            }
            return 0
        case .fill:
            guard copyError != 0, let index = chainIndex(job.targetCopy) else { return 0 }
            if job.readError != 0, job.handsOver {
                failCopies(upTo: index, errno: copyError)
            } else {
                failCopy(index, errno: copyError)
            }
            return 0
        case .restore:
            guard copyError != 0, restore != nil else { return copyError }
            restore!.stalled = true
            emit(.restoreFailed(grain: job.firstGrain, errno: copyError))
            return copyError
        case .mirror:
            if copyError != 0 { mirrorFailed(copyError) }
            return 0
        }
    }

    private func removeJob(_ slot: Int32) {
        copyBuffers.give(jobs[Int(slot)].buffer!)
        jobs[Int(slot)].buffer = nil
        for index in 0..<activeJobCount where activeJobs[index] == slot {
            activeJobCount -= 1
            activeJobs[index] = activeJobs[activeJobCount]
            break
        }
        freeJobs.append(slot)
    }

    func wakeStarved() {
        resumeAll(starvedWaiters.takeAll())
    }

    // MARK: Durable jobs

    private func awaitFlush(_ slot: Int32) {
        jobs[Int(slot)].next = -1
        if flushBatch.waitingTail >= 0 {
            jobs[Int(flushBatch.waitingTail)].next = slot
        } else {
            flushBatch.waitingHead = slot
        }
        flushBatch.waitingTail = slot
        startBatch()
    }

    /// Takes every waiting job of the first one's target into one flush.
    private func startBatch() {
        guard flushBatch.stage == .idle, flushBatch.waitingHead >= 0 else { return }
        let file = jobs[Int(flushBatch.waitingHead)].flushFile
        var slot = flushBatch.waitingHead
        flushBatch.waitingHead = -1
        flushBatch.waitingTail = -1
        while slot >= 0 {
            let next = jobs[Int(slot)].next
            if jobs[Int(slot)].flushFile == file {
                jobs[Int(slot)].next = flushBatch.runningHead
                flushBatch.runningHead = slot
            } else {
                jobs[Int(slot)].next = -1
                if flushBatch.waitingTail >= 0 {
                    jobs[Int(flushBatch.waitingTail)].next = slot
                } else {
                    flushBatch.waitingHead = slot
                }
                flushBatch.waitingTail = slot
            }
            slot = next
        }
        flushBatch.stage = .data
        issue(flushIO(file, IOToken(owner: .copyFlush, slot: 0, generation: 0)))
    }

    /// Whether a write has to wait because bits that let it go are set, but not yet on stable storage.
    func waitsForRecord(_ slot: Int32, _ grains: Range<Int>) -> Bool {
        guard flushBatch.stage == .record, !omits(.skipDurability) else { return false }
        var job = flushBatch.runningHead
        while job >= 0 {
            if jobs[Int(job)].grains.overlaps(grains) {
                requests[Int(slot)].state = .waiting
                jobs[Int(job)].waiters.append(slot, in: requests)
                return true
            }
            job = jobs[Int(job)].next
        }
        return false
    }

    func completeBatchFlush(_ errno: Int32) {
        var slot = flushBatch.runningHead
        invariant(slot >= 0 && flushBatch.stage != .idle, "a flush of copy jobs has jobs")
        let first = jobs[Int(slot)]
        invariant(first.purpose == .restore || first.targetCopy >= 0, "who waits for a copy's flush serves the copy")
        while slot >= 0 {
            if errno != 0 { jobs[Int(slot)].copyError = errno }
            if flushBatch.stage == .data { markMoved(slot) }
            if flushBatch.stage == .record, jobs[Int(slot)].copyError != 0 { unmarkMoved(slot) }
            slot = jobs[Int(slot)].next
        }
        if errno == 0, flushBatch.stage == .data, first.purpose != .restore,
            let index = chainIndex(first.targetCopy)
        {
            flushBatch.stage = .record
            issue(
                flushIO(
                    chain[index].bitmapFile, IOToken(owner: .copyFlush, slot: 0, generation: 0)))
            return
        }
        var running = flushBatch.runningHead
        flushBatch.runningHead = -1
        flushBatch.stage = .idle
        startBatch()
        while running >= 0 {
            let next = jobs[Int(running)].next
            endJob(running)
            running = next
        }
    }
}
