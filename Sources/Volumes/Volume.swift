// Volume.swift: the engine of one volume: requests in, block-store I/O out, completions in, finished requests out.
//
// It makes no system call and owns no thread: a reactor or the simulator drives it. All state is touched by that
// one driver.
//
// Must be prevented:
//   a host write reaches the source before the old content that a point or FlashCopy needs is safe       (Preserve.swift)
//   a drain reads new data as the point's, because the write came between its check and its read        (ReadPath.swift)
//   a write in flight across the forming of a point is acknowledged without a mark in the new CR bitmap (WritePath.swift)
//   a write issued after an acknowledgement is in a point that lacks the acknowledged write              (Point.swift)
//   a write of a client that died lands on one that was acknowledged after its repetition                (WritePath.swift)
//
// Invariants:
//   V1  A grain's CR bit is set before a host write to it is issued, and again before the write is acknowledged
//       if the bitmaps changed roles in between.
//   V2  A grain's `preserved` bit is set only when its old content is in the target (durably, for durable copies).
//   V3  A host write is issued only when no grain of it is needed by the point, the chain or a restore.
//   V4  Each I/O in the outbox is answered once; a slot is reused only after that.

import Base

/// What gives way when old content cannot be preserved.
package enum PreservePolicy: Sendable {
    /// The host comes first: the point or FlashCopy is given up (every volume that hosts write to).
    case hostFirst
    /// The copies come first: the write fails (the secondary, where the recovery points are what counts).
    case copiesFirst
}

package final class Volume {
    package let geometry: Geometry
    package static let source: StoreFile = 0
    /// Not a file: old content that lies in memory.
    static let memory: StoreFile = -1

    // Requests.
    let requests: UnsafeMutablePointer<Request>
    let requestCapacity: Int
    private var freeRequests = SlotList()
    /// Slots that were ever used; the memory of the others is not touched, so that a volume costs what is asked of it.
    private(set) var requestsUsed = 0
    package private(set) var requestsInUse = 0
    /// Modifying requests that were submitted and have not finished.
    package private(set) var modifyingInFlight = 0
    var settleWaiters = SlotList()
    var starvedWaiters = SlotList()
    var heldAcknowledgements = SlotList()
    private var finished = SlotList()
    /// Unfinished modifying requests of clients that are gone.
    var orphanCount = 0
    var orphanWaiters = SlotList()

    /// The first error of a flush, reported by every later one until the volume is opened anew.
    package private(set) var flushError: Int32 = 0

    // Traffic with the driver.
    private var outbox: FixedQueue<StoreIO>
    /// Rare: at most a few for each copy and point.
    private var events: [VolumeEvent] = []
    let fileInFlight: UnsafeMutablePointer<Int32>
    package static let fileCapacity = 2 * Limits.copiesPerVolume + 8

    // Change recording and the point.
    /// What the remote lacks.
    package var leg: Leg
    package internal(set) var hold: Hold?
    /// The bitmap of the next point must be cleared first: the last one has set bits there, or nobody knows.
    package internal(set) var pointBitmapIsDirty = true
    /// The last point that could not be held, and why: an errno.
    package internal(set) var lostPoint: (number: UInt64, errno: Int32) = (0, 0)
    /// Mode `change-volume`.
    package internal(set) var intermediate: Intermediate?
    /// Of a point that is held in memory.
    var images: HeldImages?
    var collisions = Collisions()
    package internal(set) var collisionFigures = CollisionFigures()
    var epoch: UInt32 = 0
    package internal(set) var holding = false
    var unsettledCount = 0

    // FlashCopies, oldest first.
    let chain: UnsafeMutablePointer<FlashCopy>
    package internal(set) var chainCount = 0
    /// Index of the copy that takes old content: the newest that is active; -1 = none.
    var preserveIndex = -1
    package var policy = PreservePolicy.hostFirst

    /// Copies that are to be taken anew.
    var refreshingCount = 0
    /// How many copies were taken anew, and so began with grains.
    var retakes: UInt32 = 0
    /// Writes to the source wait for so many flushes.
    var barriers = 0
    var isBarred: Bool { barriers > 0 }
    var barrierWaiters = SlotList()

    // A restore under way.
    var restore: Restore?

    // Work in the background.
    /// There is some: a restore, copies that leave, background copies.
    var backgroundWork = false
    /// `runBackground` has something to do at once.
    package internal(set) var backgroundDue = false
    /// Memory for copy jobs, which other volumes share, was short; `runBackground` tries again when asked.
    package internal(set) var isStarved = false
    /// The chain is not complete yet.
    var isResuming = false
    /// Jobs that this turn's background work may still start; 0 outside of it.
    var backgroundAllowance = 0
    /// Some background copy has a rate: the driver tells the time by `advanceClock`.
    package internal(set) var fillsWithRate = false
    var clock: UInt64 = 0

    let activity: ActivityLog
    private var flushGate: FlushGate
    #if DELIBERATE_FAULTS
        let faults: EngineFaults
    #endif

    // Copy jobs.
    let jobs: UnsafeMutablePointer<CopyJob>
    var freeJobs: FixedQueue<Int32>
    /// As `requestsUsed`.
    var jobsUsed = 0
    var activeJobs: UnsafeMutablePointer<Int32>
    var activeJobCount = 0
    var flushBatch = FlushBatch()
    let copyBuffers: CopyBuffers

    /// - Parameters:
    ///   - bitmaps: two bitmaps of `geometry.grainCount` bits over memory that outlives a process crash.
    ///   - roles: which of the two records changes; in the same kind of memory.
    ///   - copyBuffers: buffers of `Limits.copyJobBytes` for copy jobs.
    package init(
        geometry: Geometry, bitmaps: (Bitmap, Bitmap), roles: UnsafeMutablePointer<RecordingRoles>,
        copyBuffers: CopyBuffers, requestCapacity: Int = Limits.requestsPerVolume,
        smallestRegion: UInt64 = ActivityLog.smallestRegion, faults: EngineFaults = []
    ) {
        #if DELIBERATE_FAULTS
            self.faults = faults
        #else
            invariant(faults.isEmpty, "this build makes no deliberate faults")
        #endif
        activity = ActivityLog(geometry: geometry, smallestRegion: smallestRegion)
        invariant(
            bitmaps.0.count == geometry.grainCount && bitmaps.1.count == geometry.grainCount,
            "a bitmap has a bit for each grain")
        self.geometry = geometry
        self.requestCapacity = requestCapacity
        leg = Leg(bitmaps: bitmaps, roles: roles)
        self.copyBuffers = copyBuffers
        requests = .allocate(capacity: requestCapacity)
        // Each request has at most two I/Os in flight (a flush during a restore), each job two, plus the batch's flush.
        // The activity log writes once and flushes every bitmap file at a time; each copy may fail once.
        outbox = FixedQueue(
            capacity: 2 * requestCapacity + 2 * Limits.copyJobsPerVolume + 2 * Limits.copiesPerVolume + 8)
        // Each request and each batch has at most one flush of the source, or write with FUA, and so has the activity log.
        flushGate = FlushGate(capacity: 2 * requestCapacity + 64)
        fileInFlight = .allocate(capacity: Self.fileCapacity)
        fileInFlight.initialize(repeating: 0, count: Self.fileCapacity)
        chain = .allocate(capacity: Limits.copiesPerVolume)
        jobs = .allocate(capacity: Limits.copyJobsPerVolume)
        freeJobs = FixedQueue(capacity: Limits.copyJobsPerVolume)
        activeJobs = .allocate(capacity: Limits.copyJobsPerVolume)
    }

    deinit {
        requests.deallocate()
        fileInFlight.deallocate()
        chain.deallocate()
        jobs.deallocate()
        activeJobs.deallocate()
    }

    // MARK: Requests

    /// A free slot for the caller to fill, or nil when the volume has as many requests as it may.
    ///
    /// - Parameter ofClient: leaves some for the drain, which clients' writes may wait for.
    package func takeRequest(ofClient: Bool = true) -> Int32? {
        if ofClient, requestsInUse >= requestCapacity - Limits.requestsOfDrain { return nil }
        guard let slot = freeRequests.popFirst(in: requests) ?? unusedRequest() else { return nil }
        let generation = requests[Int(slot)].generation &+ 1
        requests[Int(slot)] = Request()
        requests[Int(slot)].generation = generation
        requests[Int(slot)].state = .taken
        requestsInUse += 1
        return slot
    }

    private func unusedRequest() -> Int32? {
        guard requestsUsed < requestCapacity else { return nil }
        (requests + requestsUsed).initialize(to: Request())
        requestsUsed += 1
        return Int32(requestsUsed - 1)
    }

    /// The slot's memory; valid until it is released.
    @inline(__always)
    package func request(_ slot: Int32) -> UnsafeMutablePointer<Request> { requests + Int(slot) }

    /// Gives back a slot that was taken and not submitted, or that has finished.
    package func releaseRequest(_ slot: Int32) {
        let state = requests[Int(slot)].state
        invariant(state == .taken || state == .finished, "a request in flight is not released")
        requests[Int(slot)].state = .free
        requestsInUse -= 1
        freeRequests.append(slot, in: requests)
    }

    /// Starts a request whose range lies inside the volume.
    package func submit(_ slot: Int32) {
        let request = requests + Int(slot)
        invariant(request.pointee.state == .taken, "a request is submitted once")
        invariant(
            request.pointee.operation == .flush
                || (request.pointee.offset <= geometry.size
                    && request.pointee.length <= geometry.size - request.pointee.offset),
            "a submitted request lies inside the volume")
        request.pointee.cursor = request.pointee.offset
        request.pointee.state = .waiting
        if request.pointee.isModifying { modifyingInFlight += 1 }
        switch request.pointee.operation {
        case .flush: issueFlush(slot)
        case .read: advanceRead(slot)
        case .write, .writeZeroes, .trim: advanceWrite(slot)
        }
    }

    /// Ends a request that was taken and is not to be carried out; the caller replies and releases it.
    package func refuse(_ slot: Int32, errno: Int32) {
        invariant(requests[Int(slot)].state == .taken, "a submitted request is not refused")
        requests[Int(slot)].error = errno
        requests[Int(slot)].state = .finished
    }

    func finish(_ slot: Int32, error: Int32 = 0) {
        let request = requests + Int(slot)
        if error != 0 { request.pointee.error = error }
        request.pointee.state = .finished
        if request.pointee.orphaned { releaseOrphan(slot) }
        if request.pointee.isModifying {
            modifyingInFlight -= 1
            if holding {
                heldAcknowledgements.append(slot, in: requests)
                return
            }
        }
        finished.append(slot, in: requests)
    }

    /// Lets held acknowledgements go, in order.
    func releaseHeld() {
        while let slot = heldAcknowledgements.popFirst(in: requests) {
            finished.append(slot, in: requests)
        }
    }

    /// The next request that has finished; the caller replies and then releases the slot.
    package func popFinished() -> Int32? { finished.popFirst(in: requests) }

    // MARK: Driver

    /// It has something to do without being asked or answered.
    package var mayGoOn: Bool {
        !outbox.isEmpty || !finished.isEmpty || backgroundDue || isStarved || followsClock
    }

    package func popIO() -> StoreIO? { outbox.popFirst() }
    package func popEvent() -> VolumeEvent? { events.isEmpty ? nil : events.removeFirst() }
    func emit(_ event: VolumeEvent) { events.append(event) }

    func issue(_ io: StoreIO) {
        var io = io
        fileInFlight[Int(io.file)] += 1
        // Once one has failed, all have.
        if io.makesSourceDurable { io.flushNumber = flushError == 0 ? flushGate.begin() : .max }
        outbox.append(io)
    }

    /// Tells the outcome of one I/O. `errno` is positive, or 0 for success over the whole length.
    package func complete(_ io: StoreIO, errno: Int32) {
        fileInFlight[Int(io.file)] -= 1
        invariant(fileInFlight[Int(io.file)] >= 0, "an I/O is answered once")
        guard io.makesSourceDurable else {
            if errno > 0, io.operation == .flush || io.fua { failJobs(writingTo: io.file, errno) }
            return deliver(io, errno)
        }
        if errno != 0, io.operation == .flush || !StoreIO.wasRefused(errno) { loseSource(errno: errno) }
        if flushError != 0 || errno != 0 {
            if io.flushNumber != .max { flushGate.failed(io) }
            deliver(io, flushError != 0 ? flushError : errno)
        } else {
            flushGate.succeeded(io)
        }
        while let believed = flushGate.pop(all: flushError != 0) { deliver(believed, flushError) }
    }

    private func deliver(_ io: StoreIO, _ errno: Int32) {
        // A copy that leaves waits until nothing uses its files.
        if backgroundWork, io.file != Self.source { backgroundDue = true }
        switch io.token.owner {
        case .request:
            let request = requests + Int(io.token.slot)
            invariant(
                request.pointee.state == .issued
                    && request.pointee.generation == io.token.generation,
                "a completion belongs to the request that is in its slot")
            completeRequest(io.token.slot, io, errno)
        case .copyJob:
            invariant(
                jobs[Int(io.token.slot)].generation == io.token.generation,
                "a completion belongs to the copy job that is in its slot")
            completeJob(io.token.slot, io, errno)
        case .copyFlush:
            completeBatchFlush(errno)
        case .restoreFlush:
            completeRestore(errno)
        case .activityWrite:
            completeActivityWrite(errno)
        case .activityFlush:
            completeActivityFlush(io.file, errno)
        case .mergeFlush:
            completeMerge(errno)
        case .barrier:
            completeBarrier(io, errno)
        }
    }

    /// A write with FUA may end in a flush, so the I/O decides, not the request.
    private func completeRequest(_ slot: Int32, _ io: StoreIO, _ errno: Int32) {
        if errno != 0, io.operation != .read, io.file == Self.source { tellRefusal(nil, errno) }
        switch io.operation {
        case .flush: completeFlush(slot, errno)
        case .read: completeRead(slot, errno)
        case .write, .zero, .trim: completeWrite(slot, errno)
        }
    }

    /// A primary knows from the answer that its secondary refused something; this is for those who run the secondary.
    func tellRefusal(_ copy: CopyID?, _ errno: Int32) {
        if policy == .copiesFirst { emit(.writeRefused(copy: copy, errno: errno)) }
    }

    func token(_ slot: Int32) -> IOToken {
        IOToken(owner: .request, slot: slot, generation: requests[Int(slot)].generation)
    }

    // MARK: Flush

    /// A flush of the source has failed. The kernel tells a write-back error once, and may have dropped the pages: whoever flushed, with
    /// FUA or without, nothing may call what was written durable any more until the volume is opened anew.
    private func loseSource(errno: Int32) {
        leg.roles.pointee.sourceLost = 1
        guard flushError == 0 else { return }
        flushError = errno
        emit(.sourceLost(errno: errno))
    }

    /// A flush covers every write finished before it; during a restore also the record of what was restored.
    func issueFlush(_ slot: Int32) {
        let request = requests + Int(slot)
        request.pointee.state = .issued
        request.pointee.flushesLeft = 1
        guard request.pointee.view == .volume else {
            issue(
                flushIO(
                    chainIndex(request.pointee.view.rawValue).map { chain[$0].targetFile } ?? Self.source, token(slot)))
            return
        }
        if let restore {
            request.pointee.flushesLeft = 2
            issue(flushIO(restore.bitmapFile, token(slot)))
        }
        issue(flushIO(Self.source, token(slot)))
    }

    func flushIO(_ file: StoreFile, _ token: IOToken) -> StoreIO {
        StoreIO(
            operation: .flush, fua: false, noHole: false, file: file, offset: 0, length: 0,
            buffer: nil, token: token)
    }

    func completeFlush(_ slot: Int32, _ errno: Int32) {
        let request = requests + Int(slot)
        request.pointee.flushesLeft -= 1
        if request.pointee.view != .volume {
            if errno != 0, let index = chainIndex(request.pointee.view.rawValue) { failCopy(index, errno: errno) }
            finish(slot, error: errno)
            return
        }
        // Of the record of what was restored: its bits may have been dropped as well, so it counts like the source's.
        if errno != 0, flushError == 0 { loseSource(errno: errno) }
        if request.pointee.flushesLeft == 0 { finish(slot, error: flushError) }
    }

    // MARK: Figures

    /// What requests wait for, for people who look for a hang.
    package var waiting: String {
        var lists: [String] = []
        for (name, list) in [
            ("writes in flight", settleWaiters), ("memory for copies", starvedWaiters), ("orphans", orphanWaiters),
            ("a barrier", barrierWaiters), ("the hold", heldAcknowledgements),
            ("old images to be sent", collisions.waiters),
        ] where !list.isEmpty { lists.append(name) }
        if activity.isWaitedFor { lists.append("the activity log") }
        return
            "requests wait for [\(lists.joined(separator: ", "))]; \(activeJobCount) copy jobs, \(unsettledCount) unsettled "
            + "writes, \(modifyingInFlight) writes, \(restoringGrains) grains to restore, flush stage \(flushBatch.stage)"
    }

    /// Grains written since the last point was formed.
    package var changedGrains: Int { leg.changeCount }
    /// Grains still to be sent for the point being drained.
    package var outOfSyncGrains: Int { leg.outOfSyncCount }
}

/// The buffers of copy jobs, shared by the volumes of one reactor.
package final class CopyBuffers {
    private var pool: BufferPool

    package init(pool: consuming BufferPool) { self.pool = pool }

    func take(_ count: Int) -> UnsafeMutableRawPointer? { pool.take(count) }
    func give(_ buffer: UnsafeMutableRawPointer) { pool.give(buffer) }
}
