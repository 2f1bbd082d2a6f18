// Point.swift: how a volume takes part in a consistency point (DESIGN section 4).
//
// form: hold acknowledgements, exchange the roles of CR and OOS. When every volume of the group has formed, the group
// lets go of all. A write acknowledged before any hold is complete, so it is in; a write that depends on an
// acknowledgement given after the release was issued after every exchange, so it is out, and meets copy-on-write.
// Between the two no acknowledgement of a volume that has formed leaves.

import Base

extension Volume {
    /// What `formPoint` will need, so that it need not be made while acknowledgements are held.
    package func prepareHold(_ place: HoldPlace) {
        guard case .memory(let memory, let rules, let marks) = place else { return }
        collisions.rules = rules
        guard hold?.isInMemory != true, images?.memory !== memory else { return }
        invariant(images?.count ?? 0 == 0, "images go with their point")
        images = HeldImages(geometry, memory, marks: marks)
        leg.giveAhead(in: images!.ahead)
    }

    /// Takes the volume's part of point `number` and holds acknowledgements until `releaseHold`.
    package func formPoint(number: UInt64, in place: HoldPlace) {
        invariant(leg.isRecording, "only a recording volume forms points")
        invariant(hold == nil && mayFormPoint, "a point waits for the one before")
        holding = true
        epoch &+= 1
        collisions.maySend = true
        switch place {
        case .target(let file, let preserved):
            pointBitmapIsDirty = false
            hold = Hold(point: number, file: file, preserved: preserved)
            beginAdvancing()
        case .memory:
            prepareHold(place)
            hold = Hold(point: number, file: Self.memory, preserved: images!.preserved)
        }
        leg.exchange(point: number, outlivesProcess: hold?.isInMemory == false)
        unsettleWritesInFlight(to: Self.source)
    }

    /// Lets acknowledgements go: every volume of the group has formed the point, or the point is given up.
    package func releaseHold() {
        holding = false
        releaseHeld()
    }

    /// Takes up a point that was being drained when the process ended, from its target.
    package func resumePoint(number: UInt64, targetFile: StoreFile, preserved: Bitmap) {
        invariant(hold == nil, "a volume has one point")
        hold = Hold(point: number, file: targetFile, preserved: preserved)
    }

    /// The point that is held and drained.
    package var heldPoint: UInt64? { hold?.number }

    /// Begins the drain from the first grain again: after a lost link, what was not acknowledged is sent anew.
    package func rewindDrain() {
        leg.rewind()
        askAgain()
    }

    /// The next run of grains that must be sent and was not given out since the last rewind; at most `limit` grains.
    package func nextOutOfSync(limit: Int) -> Range<Int>? { leg.next(limit: limit) }

    /// Takes back the end of the run that `nextOutOfSync` gave last.
    package func returnOutOfSync(from grain: Int) { leg.giveBack(from: grain) }

    /// Whether the point's data of the whole run lies on the source and nothing on its way there may change it.
    package func pointLiesOnSource(_ grains: Range<Int>) -> Bool {
        guard let hold, unsettledCount == 0 else { return false }
        let (file, end) = hold.location(of: grains)
        return file == Self.source && end == grains.upperBound
    }

    /// The remote has the point's data of these grains on stable storage.
    package func clearOutOfSync(_ grains: Range<Int>, point number: UInt64) {
        guard let hold, hold.number == number else { return }
        leg.sent(grains)
        guard hold.isInMemory else { return }
        collisions.maySend = true
        images?.discard(grains)
        if collisions.isWaiting { (collisions.isDue, backgroundDue) = (true, true) }
        if backgroundWork { backgroundDue = true }
    }

    /// The remote has committed the point: nothing of it is needed any more.
    package func endPoint(number: UInt64) {
        guard heldPoint == number else { return }
        invariant(leg.outOfSyncCount == 0, "a point ends when all of it was sent")
        endAdvancing()
        endHold()
    }

    private func endHold() {
        if hold?.isInMemory == true { images?.discardAll() }
        hold = nil
        wakeStarved()
        if backgroundWork { backgroundDue = true }
        resumeAll(collisions.waiters.takeAll())
    }

    /// The point cannot be held or sent: what it had still to send is changed again.
    package func giveUpPoint(errno: Int32 = 0) {
        leg.roles.pointee.heldPoint = 0
        guard let number = heldPoint else { return mergeOutOfSync() }
        // Before writes go on, so that none of them needs anything of it.
        mergeOutOfSync()
        if errno != 0 {
            lostPoint = (number, errno)
            emit(.pointGivenUp(number: number, errno: errno))
        }
        endHold()
    }

    /// Rule 2: no bit is lost when a point is. Bits move from one bitmap to the other, and power loss may keep the old state
    /// of either, so the ones are on stable storage before the others are cleared.
    package func mergeOutOfSync() {
        leg.addOutOfSync()
        // Its end clears them: when the next point has bits of its own, it must be over.
        guard leg.merge == .none else { return }
        guard !mayForgetBits else { return leg.finishMerge() }
        leg.merge = .flushing
        issue(flushIO(activity.recordingFile, IOToken(owner: .mergeFlush, slot: 0, generation: 0)))
    }

    /// A merge that cannot be made durable ends once it is written down that the bitmaps are not to be relied on.
    func completeMerge(_ errno: Int32) {
        invariant(leg.merge == .flushing, "a merge waits for its own flush")
        guard errno != 0, !mayForgetBits else { return leg.finishMerge() }
        markAllChanged()  // as in `loseBits`
        leg.merge = .failed
        loseActivityLog(errno)
    }

    /// Whether a point may be formed: hosts see what lies on the volume, and the next out-of-sync bitmap is empty.
    package var mayFormPoint: Bool { restore == nil && leg.merge == .none }

    /// The grains of these byte ranges may differ from the peer's for other reasons than a host's write.
    package func markChanged(_ ranges: [Range<UInt64>]) {
        for range in ranges where !range.isEmpty {
            leg.mark(geometry.grains(offset: range.lowerBound, length: range.upperBound - range.lowerBound))
        }
    }

    /// Counts the changed grains anew, after somebody else has cleared bits.
    package func recountChanges() { leg.recount() }

    /// What flows back from a recovery point is not what the old primary's bitmaps take for granted.
    package func markChanged(_ differences: Bitmap) { leg.mark(differences) }

    /// The peer has taken what the bitmaps said into its own.
    package func forgetChanges() {
        invariant(!leg.isRecording && hold == nil, "only a secondary forgets what it was before")
        leg.forget()
    }

    /// Words of CR and OOS together, for the peer.
    package func changedWords(from first: Int, count: Int) -> [UInt64] { leg.words(from: first, count: count) }

    /// Every grain may differ from the secondary's.
    package func markAllChanged() { leg.markAll() }

    /// Whether what hosts write is recorded for a remote.
    package var recording: Bool {
        get { leg.isRecording }
        set {
            leg.isRecording = newValue
            // What comes from a primary is in no intermediate here.
            if !newValue { intermediate = nil }
        }
    }
    package var changeRecording: Bitmap { leg.changeRecording }
    package var outOfSync: Bitmap { leg.outOfSync }
}
