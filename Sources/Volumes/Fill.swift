// Fill.swift: work that nobody waits for: background copies, hand-overs of copies that leave, restores.
//
//   fill(copy, run): read what the copy holds, wherever that lies ─► write it to the copy's target ─► set its bits
//
// A background copy fills every grain of its own target; a copy that leaves fills its heir with what the heir reads
// through it. The driver calls `runBackground` once a turn; each call starts a few jobs only, so that hosts come between.
//
// Must be prevented:
//   a copy leaves while its heir lacks something that only it has, or has it with a bit that power loss may take
//   work begins on a chain that is only half taken up after a restart, and reads past copies that are still to come
//   a background copy takes the volume's copy jobs or the driver's turn from hosts

import Base

extension Volume {
    private static let backgroundStarts = 4

    /// Starts what background work may start just now.
    package func runBackground() {
        backgroundDue = false
        isStarved = false
        // Memory for copy jobs is shared: another volume may have given some back.
        if activeJobCount == 0, !starvedWaiters.isEmpty { wakeStarved() }
        resumeCollided()
        guard backgroundWork, !isResuming, !isBarred else { return }
        backgroundAllowance = Self.backgroundStarts
        advanceRestore()
        advanceLeaving()
        advanceFills()
        advanceMirror()
        if backgroundAllowance == 0 { backgroundDue = true }
        backgroundAllowance = 0
    }

    /// Chain, role and restore of an earlier run are taken up between the two calls.
    package func beginResuming() { isResuming = true }

    package func finishResuming() {
        isResuming = false
        backgroundDue = backgroundWork
    }

    var backgroundMayStart: Bool {
        backgroundAllowance > 0 && activeJobCount < Limits.copyJobsPerVolume / 4
    }

    /// It must be told the time (`advanceClock`).
    package var followsClock: Bool { fillsWithRate || collisions.isWaiting }

    /// Tells the time, in nanoseconds from any origin; background copies with a rate, and what writes wait for, go on by it.
    package func advanceClock(to now: UInt64) {
        if collisions.isWaiting { endCollisionWaits(now) }
        guard fillsWithRate else { return }
        let elapsed = clock == 0 ? 0 : min(now &- clock, 1_000_000_000)
        clock = now
        for index in 0..<chainCount where chain[index].needsFilling && chain[index].rate > 0 {
            let rate = chain[index].rate
            let earned = Int64(
                clamping: rate / 1_000_000 * (elapsed / 1000) + rate % 1_000_000 * (elapsed / 1000) / 1_000_000)
            // A quarter of a second may be saved up, so that a slow turn costs no rate.
            let most = Int64(clamping: max(rate / 4, UInt64(Limits.copyJobBytes)))
            chain[index].fillBudget = min(most, chain[index].fillBudget &+ earned)
        }
        backgroundDue = true
    }

    /// Changes the rate of a background copy; 0 = as fast as it goes.
    package func setRate(_ id: CopyID, _ rate: UInt64) {
        guard let index = chainIndex(id) else { return }
        chain[index].rate = rate
        chain[index].fillBudget = 0
        reviewChain()
    }

    // MARK: Background copies

    private func advanceFills() {
        var index = 0
        while index < chainCount {
            if chain[index].needsFilling { fill(index) }
            index += 1
        }
    }

    private func fill(_ index: Int) {
        let count = geometry.grainCount
        var wrapped = chain[index].fillCursor == 0
        while backgroundMayStart, chain[index].rate == 0 || chain[index].fillBudget > 0 {
            let start = min(chain[index].fillCursor, count)
            guard let first = chain[index].preserved.firstClear(in: start..<count) else {
                if wrapped { return }
                wrapped = true
                chain[index].fillCursor = 0
                continue
            }
            let bound = first..<min(count, first + jobGrains)
            let run = first..<(chain[index].preserved.firstSet(in: bound) ?? bound.upperBound)
            guard let job = startFill(index, run) else {
                chain[index].fillCursor = first + 1  // in use just now; another round comes by
                if wrapped { return }
                continue
            }
            chain[index].fillCursor = jobs[Int(job)].grains.upperBound
            chain[index].fillBudget -= Int64(jobs[Int(job)].grainCount * geometry.grain)
        }
    }

    /// Starts a job that brings what a copy holds of the start of `run` into its target; nil when another job is there,
    /// a write to the file that has it is in flight, or nothing more may start.
    func startFill(_ index: Int, _ run: Range<Int>, handsOver: Bool = false) -> Int32? {
        guard activeJob(overlapping: run.lowerBound..<run.lowerBound + 1) == nil else { return nil }
        let (file, end) = resolveCopy(index, run)
        var part = cutAtJobs(run.lowerBound..<end)
        if let unsettled = unsettledGrains(in: part, of: file) {
            guard unsettled.lowerBound > part.lowerBound else { return nil }
            part = part.lowerBound..<unsettled.lowerBound
        }
        guard let slot = takeJob(part) else { return nil }
        let job = jobs + Int(slot)
        job.pointee.purpose = .fill
        job.pointee.handsOver = handsOver
        job.pointee.readFile = file
        aim(job, at: chain[index])
        issueJob(slot, .read, file, seeksHole: true)
        return slot
    }

    // MARK: Copies that leave

    /// Moves copies that leave on: hand over, then wait for readers and I/O, then go.
    private func advanceLeaving() {
        var index = chainCount - 1
        while index >= 0 {
            if chain[index].isLeaving, handOver(index), isIdle(index) {
                if chain[index].state == .withdrawing {
                    let id = chain[index].id
                    remove(index)
                    emit(.copyWithdrawn(id: id))
                } else if !chain[index].readyTold {
                    chain[index].readyTold = true
                    emit(.copyReady(id: chain[index].id))
                }
            }
            index -= 1
        }
    }

    /// Starts jobs that copy what the next older copy lacks; true when nothing is left to hand over.
    private func handOver(_ index: Int) -> Bool {
        // A restore goes on although its copy has failed, and then has nobody to hand over to.
        if let restore, let restored = chainIndex(restore.copy), restored < index, chain[restored].state != .active {
            return false
        }
        guard let heir = heir(of: index), !omits(.dropHandover) else { return true }
        let id = chain[index].id
        for active in 0..<activeJobCount where jobs[Int(activeJobs[active])].targetCopy == id {
            return false  // its outcome decides what there is to hand over
        }
        while let run = nextHandover(chain[index], chain[heir].preserved) {
            guard backgroundMayStart, let job = startFill(heir, run, handsOver: true) else { return false }
            chain[index].handoverCursor = jobs[Int(job)].grains.upperBound
        }
        // Whoever began the job: until it ends, the heir's bit may be set and not on stable storage, or be cleared again.
        for active in 0..<activeJobCount {
            let job = jobs[Int(activeJobs[active])]
            if job.targetCopy == chain[heir].id, isHandedOver(chain[index], in: job.grains) { return false }
        }
        return true
    }

    private func isHandedOver(_ copy: FlashCopy, in grains: Range<Int>) -> Bool {
        for grain in grains where copy.changes.contains(grain) && copy.preserved.contains(grain) { return true }
        return false
    }

    /// The next run that the source has changed since `from` was taken, that `from` has, and that `to` lacks; at most
    /// one job long.
    private func nextHandover(_ from: FlashCopy, _ to: Bitmap) -> Range<Int>? {
        var grain = from.handoverCursor
        while grain < geometry.grainCount {
            guard let first = from.changes.firstSet(in: grain..<geometry.grainCount) else { return nil }
            let bound = first..<min(geometry.grainCount, first + jobGrains)
            var end = from.changes.firstClear(in: bound) ?? bound.upperBound
            if to.contains(first) {
                grain = to.firstClear(in: first..<geometry.grainCount) ?? geometry.grainCount
                continue
            }
            guard from.preserved.contains(first) else {
                grain = from.preserved.firstSet(in: first..<geometry.grainCount) ?? geometry.grainCount
                continue
            }
            end = from.preserved.firstClear(in: first..<end) ?? end
            return first..<(to.firstSet(in: first..<end) ?? end)
        }
        return nil
    }
}
