// Intermediate.swift: mode `change-volume`: the first intermediate, a volume beside the source that takes each grain of a point before the
// grain is sent.
//
//   forming: CR becomes OOS, what is required and not yet mirrored ─► a read of the drain, or a host's write: copy job ─► the intermediate
//   ─► `preserved`, read from there and sent ─► both sides flushed ─► OOS cleared ─► all is committed: `advanced` is void
//
// So what hosts overwrite meanwhile is copied first as in mode `flashcopy`, and once a point is committed the intermediate holds it.
//
// Invariants:
//   M1  A grain in which the intermediate and the source may differ is in CR, OOS or `lacking`.
//   M2  A grain that the intermediate does not have as the last committed point does is in `advanced` or `lacking`.
//
// Must be prevented:
//   a grain is sent that the intermediate has not taken
//   a grain of the next point is written there before M2 says so
//   what hosts have written since the point was formed is taken for the point's
//   a grain of OOS is cleared before the intermediate has it on stable storage (the drain flushes it before)

import Base

/// The intermediate of one volume.
package struct Intermediate: BitwiseCopyable, @unchecked Sendable {
    // Safe because: the bitmaps are the volume's reactor's, but for the time between two points, when whoever prepares the next has `advanced`.
    let file: StoreFile
    /// What lies there may be newer than the last committed point.
    let advanced: Bitmap
    /// What lies there may be anything: nothing was copied there since it became the volume's intermediate.
    let lacking: Bitmap
    /// 1 = all that `advanced` says was committed.
    let isVoid: UnsafeMutablePointer<UInt64>
    package internal(set) var lackingCount: Int
    /// No grain before this one is lacking and could be copied now.
    var cursor = 0
    /// It does not take what it lacks; it is not tried again before the site is restarted.
    var hasFailed = false

    /// - Parameters: bitmaps, and the word, over memory that outlives a process crash.
    package init(file: StoreFile, advanced: Bitmap, lacking: Bitmap, isVoid: UnsafeMutablePointer<UInt64>) {
        (self.file, self.advanced, self.lacking, self.isVoid) = (file, advanced, lacking, isVoid)
        lackingCount = lacking.population()
    }

    /// Bits that say nothing go. No point is held.
    package func forgetCommitted() {
        if isVoid.pointee != 0 { advanced.clearAll() }
    }

    /// There are such grains.
    package var hasElsewhere: Bool {
        lackingCount > 0 || isVoid.pointee == 0 && advanced.firstSet(in: 0..<advanced.count) != nil
    }

    /// Grains whose content of the last committed point is elsewhere.
    ///
    /// - Parameter into: all clear.
    package func addElsewhere(into bits: Bitmap) {
        bits.formUnion(lacking)
        if isVoid.pointee == 0 { bits.formUnion(advanced) }
    }
}

extension Volume {
    /// From now on points are held in the intermediate, and what it lacks flows there.
    ///
    /// - Parameter trusted: its bits are as the last process left them; else each grain that may have been copied since the last commit
    ///   counts as newer than that.
    package func useIntermediate(_ intermediate: Intermediate, trusted: Bool) {
        self.intermediate = intermediate
        if !trusted {
            intermediate.isVoid.pointee = 0
            intermediate.advanced.formUnion(changeRecording)
            intermediate.advanced.formUnion(outOfSync)
        }
        reviewChain()
    }

    /// What it has is not to be relied on: all of it is copied anew, and is not the last committed point's for sure before the next one is
    /// committed, since of a point that was given up some grains may have been sent, and are marked no more.
    package func distrustIntermediate() {
        guard let intermediate else { return }
        intermediate.lacking.setAll()
        intermediate.advanced.setAll()
        intermediate.isVoid.pointee = 0
        (self.intermediate!.lackingCount, self.intermediate!.cursor) = (intermediate.lacking.count, 0)
        reviewChain()
    }

    /// The point that is held takes all that it sends.
    private var holdTakesAll: Bool { intermediate != nil && hold?.file == intermediate?.file }

    /// A point takes its grains from now on: what the marks said of the one before is forgotten already.
    func beginAdvancing() {
        guard holdTakesAll else { return }
        intermediate!.isVoid.pointee = 0
    }

    /// The point is committed: the intermediate holds it.
    func endAdvancing() {
        guard holdTakesAll else { return }
        intermediate!.isVoid.pointee = 1
    }

    /// Whether a read of the point must wait until its grains were copied; they are being copied then.
    func awaitsCopies(_ slot: Int32) -> Bool {
        guard holdTakesAll, !omits(.skipIntermediate) else { return false }
        let request = requests[Int(slot)]
        let grains = geometry.grains(offset: request.cursor, length: request.end - request.cursor)
        guard let first = firstRequired(in: grains) else { return false }
        copyRequired(first..<grains.upperBound, for: slot)
        return true
    }

    /// The first grain that is to be sent and that the intermediate has not taken.
    private func firstRequired(in grains: Range<Int>) -> Int? {
        guard !grains.isEmpty else { return nil }
        for word in grains.lowerBound >> 6...(grains.upperBound - 1) >> 6 {
            let bits = hold!.needed(word, unsent: outOfSync) & Bitmap.mask(grains, word: word)
            if bits != 0 { return word << 6 | bits.trailingZeroBitCount }
        }
        return nil
    }

    /// Starts jobs for what is required of `grains`; the read goes on when the last of them is done.
    private func copyRequired(_ grains: Range<Int>, for slot: Int32) {
        var lastJob: Int32 = -1
        var isUnsettled = false
        var grain = grains.lowerBound
        while let first = firstRequired(in: grain..<grains.upperBound) {
            if let job = activeJob(overlapping: first..<first + 1) {
                lastJob = job
                grain = min(grains.upperBound, jobs[Int(job)].grains.upperBound)
                continue
            }
            var end = min(grains.upperBound, first + jobGrains)
            if let unsettled = unsettledGrains(in: first..<end, of: Self.source) {
                isUnsettled = unsettled.lowerBound == first
                if isUnsettled { break }
                end = unsettled.lowerBound
            }
            let run = first..<requiredEnd(first..<end)
            // Hosts wait for the other half.
            guard activeJobCount < Limits.copyJobsPerVolume / 2, let job = takeJob(cutAtJobs(run)) else { break }
            jobs[Int(job)].targetPoint = hold!.number
            jobs[Int(job)].pointFile = hold!.file
            issueJob(job, .read, Self.source, seeksHole: true)
            lastJob = job
            grain = jobs[Int(job)].grains.upperBound
        }
        wait(slot, forJob: lastJob, orUnsettled: isUnsettled)
    }

    private func requiredEnd(_ bound: Range<Int>) -> Int {
        var grain = bound.lowerBound + 1
        while grain < bound.upperBound, firstRequired(in: grain..<grain + 1) != nil { grain += 1 }
        return grain
    }

    /// The intermediate, while the point that is held takes all that it sends.
    package var takingIntermediate: StoreFile? { holdTakesAll ? intermediate?.file : nil }

    /// These grains of the point are a hole of the source and of the intermediate, which need not be copied.
    ///
    /// - Returns: false when something of them is on its way there.
    package func tookHole(_ grains: Range<Int>) -> Bool {
        guard let hold, activeJob(overlapping: grains) == nil else { return false }
        advance(grains)
        took(grains, in: hold)
        return true
    }

    // MARK: What it takes

    /// Before what a job has read of a point is written there.
    func advance(_ grains: Range<Int>) {
        guard holdTakesAll, !omits(.advanceUnmarked) else { return }
        intermediate!.advanced.set(grains)
    }

    /// It has taken these.
    func wasMirrored(_ grains: Range<Int>) {
        guard let count = intermediate?.lackingCount, count > 0 else { return }
        let found = intermediate!.lacking.clear(grains)
        intermediate!.lackingCount = count - found
        guard found == count else { return }
        emit(.intermediateFilled)
        reviewChain()
    }

    /// A write there has failed.
    func mirrorFailed(_ errno: Int32) {
        intermediate?.hasFailed = true
        emit(.intermediateFailed(errno: errno))
        reviewChain()
    }

    /// There is something that it lacks and could take.
    var lacksGrains: Bool { intermediate.map { $0.lackingCount > 0 && !$0.hasFailed } ?? false }

    /// Starts jobs for what it lacks. What is in CR or OOS comes with a point, and nothing leaves these without that: one way through all
    /// grains is enough.
    func advanceMirror() {
        guard lacksGrains, restore == nil else { return }
        let count = geometry.grainCount
        for _ in 0..<Self.mirrorWords {
            let cursor = intermediate!.cursor
            guard cursor < count else { return }
            let word = cursor >> 6
            let bits = mirrorable(word) & (~0 << UInt64(cursor & 63))
            guard bits != 0 else {
                intermediate!.cursor = (word + 1) << 6
                continue
            }
            // Whatever keeps it from starting ends, and comes back here.
            guard backgroundMayStart, let end = startMirror(word << 6 | bits.trailingZeroBitCount) else { return }
            intermediate!.cursor = end
        }
        backgroundDue = true
    }
    /// A turn looks at no more.
    private static let mirrorWords = 4096

    private func mirrorable(_ word: Int) -> UInt64 {
        intermediate!.lacking.word(word) & ~changeRecording.word(word) & ~outOfSync.word(word)
    }

    private func isMirrorable(_ grains: Range<Int>) -> Bool {
        grains.allSatisfy { mirrorable($0 >> 6) & (1 << UInt64($0 & 63)) != 0 }
    }

    /// - Returns: the end of the job's run; nil when none could begin.
    private func startMirror(_ first: Int) -> Int? {
        guard activeJob(overlapping: first..<first + 1) == nil else { return nil }
        var end = first + 1
        let bound = min(geometry.grainCount, first + jobGrains)
        while end < bound, mirrorable(end >> 6) & (1 << UInt64(end & 63)) != 0 { end += 1 }
        guard let job = takeJob(cutAtJobs(first..<end)) else { return nil }
        jobs[Int(job)].purpose = .mirror
        jobs[Int(job)].pointFile = intermediate!.file
        issueJob(job, .read, Self.source, seeksHole: true)
        return jobs[Int(job)].grains.upperBound
    }

    /// What a job has read of what the intermediate lacks. No host's write was issued before the read if none is marked; what is marked
    /// comes with a point.
    func writeMirror(_ slot: Int32) {
        let job = jobs + Int(slot)
        guard let current = intermediate else { return endJob(slot) }
        guard restore == nil, isMirrorable(job.pointee.grains) else {
            intermediate!.cursor = min(current.cursor, job.pointee.firstGrain)
            return endJob(slot)
        }
        job.pointee.writesLeft = 1
        issueJob(slot, job.pointee.isHole ? .zero : .write, job.pointee.pointFile)
    }
}
