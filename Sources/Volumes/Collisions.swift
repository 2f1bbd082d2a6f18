// Collisions.swift: host writes to grains that the point being drained still needs, when the point is held in memory.
//
//   hold-image   the old image goes to memory, the write goes on; if there is no room, as send-first
//   send-first   the write waits until the remote has the old image, which is sent ahead of the drain. After `longestWait`, or when nothing can
//                be sent, as hold-image; if there is no room either, the point is given up. It goes on as soon as there is room in memory when
//                other requests cannot be taken since it waits
//
// Must be prevented:
//   a host waits longer than it may, for a remote, for memory, or for reads that cannot be made since waiting writes have every slot
//   requests that nobody counts yet wait behind writes that do
//   a write goes on before the old image is in memory or at the remote
//   what was asked for on a link that was lost is not asked for again

import Base

/// What becomes of a host's write to a grain that must still be sent.
package struct CollisionRules: Sendable, Equatable {
    package var sendsFirst: Bool
    /// Nanoseconds.
    package var longestWait: UInt64

    package init(sendsFirst: Bool = false, longestWait: UInt64 = 500_000_000) {
        (self.sendsFirst, self.longestWait) = (sendsFirst, longestWait)
    }
}

/// What collisions have cost, since the volume was opened.
package struct CollisionFigures: Sendable, Equatable {
    /// Grains whose old image was kept, in a target or in memory.
    package var heldGrains: UInt64 = 0
    /// Writes that waited until an old image was sent.
    package var waits: UInt64 = 0
    /// How long, in seconds.
    package var waitedSeconds = 0.0
    package static let bounds = [0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1]
    package var counts = Array(repeating: UInt64(0), count: bounds.count + 1)
    /// Points that could not be held.
    package var pointsGivenUp: UInt64 = 0

    package init() {}

    mutating func waited(_ nanoseconds: UInt64) {
        let seconds = Double(nanoseconds) / 1e9
        waits += 1
        waitedSeconds += seconds
        counts[Self.bounds.firstIndex { seconds <= $0 } ?? Self.bounds.count] += 1
    }
}

struct Collisions: ~Copyable {
    var rules = CollisionRules()
    /// What is sent first arrives in time: not on a lost link, and not after some write has waited for too long until something was sent again.
    var maySend = false
    /// The drain was told that something is wanted, and has read nothing since.
    var isTold = false
    /// Writes that wait for their grains to be sent.
    var waiters = SlotList()
    var isWaiting: Bool { !waiters.isEmpty }
    /// Something that they wait for was sent.
    var isDue = false
    /// Some wait though there may be room in memory.
    var mayHurry = false
    struct Run: BitwiseCopyable {
        var first: Int
        var count: Int
    }
    /// What must be sent first, in order.
    var urgent = FixedQueue<Run>(capacity: Limits.requestsPerVolume)
    /// By the driver, in nanoseconds; as of its last turn in which somebody waited.
    var now: UInt64 = 0
    /// Some have begun to wait since.
    var isUndated = false
    private var lookedAt: UInt64 = 0
    private static let lookInterval: UInt64 = 2_000_000

    /// Whether it is time to look how long writes have waited.
    mutating func mayBeOver() -> Bool {
        guard isWaiting, now &- lookedAt >= Self.lookInterval else { return false }
        lookedAt = now
        return true
    }
}

extension Volume {
    /// Makes room for the old images of the first grains of a run; an empty part: there is none, and they must be sent first.
    func reserveImages(_ run: Range<Int>, for waiter: Int32?) -> Range<Int> {
        let isOver = waiter.map { requests[Int($0)].waitIsOver || requests[Int($0)].isHurried } ?? false
        // What nobody waits for is no host's write: a restore goes on.
        guard waiter == nil || !collisions.rules.sendsFirst || !collisions.maySend || isOver else {
            return run.prefix(0)
        }
        var grain = run.lowerBound
        while grain < run.upperBound, images!.reserve(grain) { grain += 1 }
        return run.lowerBound..<grain
    }

    func releaseImages(_ grains: Range<Int>) {
        for grain in grains { images!.release(grain) }
    }

    /// A write waits until these grains were sent; or does not, since that cannot be.
    func sendFirst(_ grains: Range<Int>, for waiter: Int32) {
        if omits(.overwriteUnsent) {
            leg.sent(grains)
            return resume(waiter)
        }
        guard collisions.maySend, !requests[Int(waiter)].waitIsOver else {
            giveUpPoint(errno: 105)  // ENOBUFS
            collisionFigures.pointsGivenUp += 1
            return resume(waiter)
        }
        let request = requests + Int(waiter)
        if request.pointee.waitsSince == 0 { collisions.isUndated = true }
        let isAsked = isAskedFor(grains.lowerBound)
        (request.pointee.awaitedGrain, request.pointee.awaitedCount) = (grains.lowerBound, grains.count)
        collisions.waiters.append(waiter, in: requests)
        if collisions.rules.sendsFirst, !request.pointee.isHurried { collisions.mayHurry = true }
        if !isAsked { ask(grains) }
    }

    private func isAskedFor(_ grain: Int) -> Bool {
        var slot = collisions.waiters.head
        while slot >= 0 {
            let request = requests[Int(slot)]
            if request.awaitedGrain <= grain, grain < request.awaitedGrain + request.awaitedCount { return true }
            slot = request.next
        }
        return false
    }

    /// If there are too many, the drain will come by all the same, or the wait ends. The drain is told once until it reads something of the
    /// volume: what is asked for until then, it finds; or it was given out before the drain was told, which hurries that.
    func ask(_ grains: Range<Int>) {
        guard collisions.urgent.tryAppend(Collisions.Run(first: grains.lowerBound, count: grains.count)) else { return }
        if !collisions.isTold { emit(.imagesWanted) }
        collisions.isTold = true
    }

    /// On a new link: what was asked for on the last one.
    func askAgain() {
        (collisions.maySend, collisions.isTold) = (true, false)
        while collisions.urgent.popFirst() != nil {}
        var slot = collisions.waiters.head
        while slot >= 0 {
            let request = requests[Int(slot)]
            ask(request.awaitedGrain..<request.awaitedGrain + request.awaitedCount)
            slot = request.next
        }
    }

    /// The link is lost: nobody waits for it.
    package func cannotSendFirst() {
        collisions.maySend = false
        if backgroundWork { backgroundDue = true }
        resumeAll(collisions.waiters.takeAll())
    }

    /// Some write waits for what is sent.
    package var isWaitingToSend: Bool { collisions.isWaiting }

    /// Other requests wait for the room of those that wait here: memory takes the images, as far as there is any.
    package func hurryCollisions() {
        guard collisions.mayHurry, collisions.isWaiting else { return }
        collisions.mayHurry = false
        review { request in
            let isNew = !request.pointee.isHurried
            request.pointee.isHurried = true
            return isNew
        }
    }

    /// The next run of grains that writes wait for, as far as it was not sent; at most `limit` grains.
    package func nextUrgent(limit: Int) -> Range<Int>? {
        collisions.isTold = false
        while let run = collisions.urgent.popFirst() {
            let bound = run.first..<run.first + run.count
            guard let found = leg.nextAhead(in: bound, limit: limit, notes: !omits(.giveOutTwice)) else { continue }
            if found.upperBound < bound.upperBound { ask(found.upperBound..<bound.upperBound) }
            return found
        }
        return nil
    }

    /// Takes up writes whose grains were sent meanwhile.
    func resumeCollided() {
        guard collisions.isDue else { return }
        collisions.isDue = false
        review { _ in false }
    }

    /// Ends waits that are too long.
    func endCollisionWaits(_ now: UInt64) {
        collisions.now = now
        if collisions.isUndated { dateWaits() }
        guard collisions.mayBeOver() else { return }
        var isLate = false
        review { request in
            guard collisions.now &- request.pointee.waitsSince >= collisions.rules.longestWait else { return false }
            request.pointee.waitIsOver = true
            isLate = true
            return true
        }
        // Others do not find out by waiting as long.
        if isLate { cannotSendFirst() }
    }

    private func dateWaits() {
        collisions.isUndated = false
        var slot = collisions.waiters.head
        while slot >= 0 {
            let request = requests + Int(slot)
            if request.pointee.waitsSince == 0 { request.pointee.waitsSince = max(1, collisions.now) }
            slot = request.pointee.next
        }
    }

    /// Takes up the writes that wait for nothing any more, or that `isOver` says have waited for too long.
    private func review(_ isOver: (UnsafeMutablePointer<Request>) -> Bool) {
        var waiters = collisions.waiters.takeAll()
        var ready = SlotList()
        while let slot = waiters.popFirst(in: requests) {
            let request = requests + Int(slot)
            let isSent = !outOfSync.contains(request.pointee.awaitedGrain)
            if isSent || isOver(request) {
                ready.append(slot, in: requests)
            } else {
                collisions.waiters.append(slot, in: requests)
            }
        }
        resumeAll(ready)
    }

    /// A write that has waited goes on.
    func noteCollisionWait(_ slot: Int32) {
        let request = requests + Int(slot)
        let since = request.pointee.waitsSince
        collisionFigures.waited(since == 0 ? 0 : collisions.now &- since)
        (request.pointee.awaitedCount, request.pointee.waitsSince) = (0, 0)
    }
}
