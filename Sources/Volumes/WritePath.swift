// WritePath.swift: WRITE, WRITE_ZEROES and TRIM from arrival to acknowledgement.
//
//   advanceWrite ── its regions in the activity log? ── no ─► log them, wait, ask again
//        │ yes
//   some grain needed by point, chain or restore? ── yes ─► copy jobs, wait, ask again
//        │ no
//   mark CR ─► issue ─► completed ─► marked in an older epoch? mark again ─► acknowledge (or hold)
//
// A write to a FlashCopy goes to its target (TargetWrites.swift).
//
// A request over a large range goes through in windows, so that the memory for old content is bounded.

import Base

extension Volume {
    /// Whether any write has to look at bitmaps other than CR.
    private var preserves: Bool { hold != nil || preserveIndex >= 0 || restore != nil }

    /// Brings a modifying request as far as it can go just now.
    func advanceWrite(_ slot: Int32) {
        let request = requests + Int(slot)
        guard request.pointee.cursor < request.pointee.end else {
            finish(slot)
            return
        }
        if orphanCount > 0, !request.pointee.orphaned, overlapsOrphan(slot) {
            orphanWaiters.append(slot, in: requests)
            return
        }
        if isBarred {
            barrierWaiters.append(slot, in: requests)
            return
        }
        if request.pointee.view != .volume {
            advanceTargetWrite(slot)
            return
        }
        if activity.isOn, !omits(.skipActivityLog), !enterRegions(slot) { return }
        var segmentEnd = request.pointee.end
        if preserves {
            let grains = geometry.grains(
                offset: request.pointee.cursor,
                length: request.pointee.end - request.pointee.cursor)
            if let first = firstNeeded(in: grains) {
                if first == grains.lowerBound {
                    let windowEnd = grains.lowerBound + max(1, Limits.writeWindowBytes / geometry.grain)
                    startCopies(in: first..<min(grains.upperBound, windowEnd), for: slot)
                    return
                }
                segmentEnd = geometry.offset(ofGrain: first)
            }
        }
        let cursor = request.pointee.cursor
        if waitsForRecord(slot, geometry.grains(offset: cursor, length: segmentEnd - cursor)) { return }
        if recording || recordsCopyChanges {
            recordChanges(geometry.grains(offset: cursor, length: segmentEnd - cursor))
        }
        request.pointee.epoch = epoch
        if request.pointee.awaitedCount > 0, segmentEnd == request.pointee.end { noteCollisionWait(slot) }
        issueWrite(slot, to: Self.source, until: segmentEnd)
    }

    /// Whether a write has to be noted for a FlashCopy.
    private var recordsCopyChanges: Bool {
        refreshingCount > 0 || preserveIndex >= 0 && chain[preserveIndex].recordsChanges
    }

    func issueWrite(_ slot: Int32, to file: StoreFile, until segmentEnd: UInt64) {
        let request = requests + Int(slot)
        let cursor = request.pointee.cursor
        let length = segmentEnd - cursor
        request.pointee.segmentEnd = segmentEnd
        request.pointee.segmentFile = file
        request.pointee.state = .issued
        let operation: StoreIO.Operation =
            switch request.pointee.operation {
            case .write: .write
            case .writeZeroes: .zero
            default: .trim
            }
        issue(
            StoreIO(
                operation: operation, fua: request.pointee.fua, noHole: request.pointee.noHole,
                file: file, offset: cursor, length: length,
                buffer: request.pointee.buffer.map { $0 + Int(cursor - request.pointee.offset) },
                token: token(slot), fast: request.pointee.fast))
    }

    func completeWrite(_ slot: Int32, _ errno: Int32) {
        let request = requests + Int(slot)
        let start = request.pointee.cursor
        let segment = geometry.grains(offset: start, length: request.pointee.segmentEnd - start)
        // V1: the mark that was set before the issue went to the point; the data may have come after the cut.
        if recording, request.pointee.view == .volume, request.pointee.epoch != epoch,
            !omits(.forgetInFlightMark)
        {
            leg.mark(segment)
        }
        if request.pointee.unsettled { settle(slot) }
        if errno != 0 {
            finish(slot, error: errno)
            return
        }
        request.pointee.cursor = request.pointee.segmentEnd
        request.pointee.state = .waiting
        if request.pointee.cursor < request.pointee.end {
            advanceWrite(slot)
        } else if request.pointee.fua, restore != nil, request.pointee.view == .volume {
            issueFlush(slot)  // the record of what was restored is part of the write's durability
        } else {
            finish(slot)
        }
    }

    // MARK: Writes in flight when a point or FlashCopy is taken

    /// Flags every write that is on its way to a file. Until it ends, what it touches belongs to neither side of
    /// the cut for sure, and nobody may read that range of the file as point-in-time data.
    func unsettleWritesInFlight(to file: StoreFile) {
        guard modifyingInFlight > 0, !omits(.ignoreUnsettled) else { return }
        for slot in 0..<requestsUsed {
            let request = requests + slot
            if request.pointee.isModifying, request.pointee.state == .issued, request.pointee.segmentFile == file,
                !request.pointee.unsettled, request.pointee.flushesLeft == 0  // else its data is there already
            {
                request.pointee.unsettled = true
                unsettledCount += 1
            }
        }
    }

    private func settle(_ slot: Int32) {
        requests[Int(slot)].unsettled = false
        unsettledCount -= 1
        resumeAll(settleWaiters.takeAll())
        if backgroundWork { backgroundDue = true }
    }

    /// The grains of the first unsettled write to a file that overlaps `grains`, cut to it.
    func unsettledGrains(in grains: Range<Int>, of file: StoreFile) -> Range<Int>? {
        guard unsettledCount > 0 else { return nil }
        var found: Range<Int>?
        for slot in 0..<requestsUsed where requests[slot].unsettled && requests[slot].segmentFile == file {
            let request = requests + slot
            let touched = geometry.grains(
                offset: request.pointee.cursor,
                length: request.pointee.segmentEnd - request.pointee.cursor)
            let overlap = touched.clamped(to: grains)
            if !overlap.isEmpty, overlap.lowerBound < found?.lowerBound ?? Int.max { found = overlap }
        }
        return found
    }

    /// The same for a reader: the volume's own data is whatever it is just now.
    func unsettledGrains(in grains: Range<Int>, of file: StoreFile, seenBy view: View) -> Range<Int>? {
        view == .volume && file == Self.source ? nil : unsettledGrains(in: grains, of: file)
    }

    // MARK: Writes of clients that are gone

    /// Tells that the owner of requests is gone. A client with several connections sends what was not answered again on
    /// another one; so whatever comes later and overlaps waits until these have ended.
    package func orphanRequests(of owner: UInt64) {
        for slot in 0..<requestsUsed {
            let request = requests + slot
            guard request.pointee.owner == owner, request.pointee.isModifying, !request.pointee.orphaned,
                request.pointee.state == .waiting || request.pointee.state == .issued
            else { continue }
            request.pointee.orphaned = true
            orphanCount += 1
        }
    }

    private func overlapsOrphan(_ slot: Int32) -> Bool {
        let request = requests[Int(slot)]
        for other in 0..<requestsUsed
        where requests[other].orphaned && requests[other].view == request.view
            && requests[other].offset < request.end && request.offset < requests[other].end
        {
            return true
        }
        return false
    }

    func releaseOrphan(_ slot: Int32) {
        requests[Int(slot)].orphaned = false
        orphanCount -= 1
        resumeAll(orphanWaiters.takeAll())
    }

    /// Takes up requests that waited, in order; what waits again is in another list.
    func resumeAll(_ waiters: SlotList) {
        var waiters = waiters
        while let waiter = waiters.popFirst(in: requests) { resume(waiter) }
    }

    /// Takes up a request that waited.
    func resume(_ slot: Int32) {
        requests[Int(slot)].operation == .read ? advanceRead(slot) : advanceWrite(slot)
    }
}
