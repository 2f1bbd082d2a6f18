// ReadPath.swift: reads of the volume, of the point being drained, and of FlashCopies.
//
// Point-in-time data of a grain lies in a target or still on the source. A read that went to the source is checked
// after it completed: if the grain was preserved meanwhile, a host write may have overtaken the read, and the target
// is read instead. A bit changes once, so a grain is read at most once more for each copy in the chain.

import Base

extension Volume {
    /// Brings a read as far as it can go just now: one run of grains that lies in one file at a time.
    func advanceRead(_ slot: Int32) {
        let request = requests + Int(slot)
        if request.pointee.view == .point {
            if hold?.isInMemory == true { copyImages(request) }
            if awaitsCopies(slot) { return }
        }
        guard request.pointee.cursor < request.pointee.end else {
            finish(slot)
            return
        }
        let view = request.pointee.view
        let cursor = request.pointee.cursor
        if view == .volume, restore == nil {
            issueRead(slot, file: Self.source, until: request.pointee.end)
            return
        }
        let grains = geometry.grains(offset: cursor, length: request.pointee.end - cursor)
        guard let (file, run) = resolve(view, grains) else {
            finish(slot, error: 5)  // EIO: the copy has failed or is gone
            return
        }
        var end = min(request.pointee.end, geometry.offset(ofGrain: run))
        if let unsettled = unsettledGrains(in: grains.lowerBound..<run, of: file, seenBy: view) {
            if unsettled.lowerBound == grains.lowerBound {
                request.pointee.state = .waiting
                settleWaiters.append(slot, in: requests)
                return
            }
            end = min(end, geometry.offset(ofGrain: unsettled.lowerBound))
        }
        issueRead(slot, file: file, until: end)
    }

    /// Copies what is in memory, up to the first grain that is not.
    private func copyImages(_ request: UnsafeMutablePointer<Request>) {
        while request.pointee.cursor < request.pointee.end {
            let cursor = request.pointee.cursor
            let grain = Int(cursor / UInt64(geometry.grain))
            guard images!.preserved.contains(grain) else { return }
            let (start, end) = (
                geometry.offset(ofGrain: grain), min(request.pointee.end, geometry.offset(ofGrain: grain + 1))
            )
            let image = UnsafeRawPointer(images!.image(of: grain)) + Int(cursor - start)
            request.pointee.buffer.map { $0 + Int(cursor - request.pointee.offset) }?
                .copyMemory(from: image, byteCount: Int(end - cursor))
            if omits(.discardUnsent) { images!.discard(grain..<grain + 1) }
            request.pointee.cursor = end
        }
    }

    private func issueRead(_ slot: Int32, file: StoreFile, until segmentEnd: UInt64) {
        let request = requests + Int(slot)
        let cursor = request.pointee.cursor
        request.pointee.segmentEnd = segmentEnd
        request.pointee.segmentFile = file
        request.pointee.state = .issued
        issue(
            StoreIO(
                operation: .read, fua: false, noHole: false, file: file, offset: cursor,
                length: segmentEnd - cursor,
                buffer: request.pointee.buffer.map { $0 + Int(cursor - request.pointee.offset) },
                token: token(slot)))
    }

    func completeRead(_ slot: Int32, _ errno: Int32) {
        let request = requests + Int(slot)
        if errno != 0 {
            finish(slot, error: errno)
            return
        }
        request.pointee.state = .waiting
        if stillHolds(slot) { request.pointee.cursor = request.pointee.segmentEnd }
        advanceRead(slot)
    }

    /// Whether what was read is still where the view says that its data lies.
    private func stillHolds(_ slot: Int32) -> Bool {
        let request = requests[Int(slot)]
        // The volume's own data is where it is; during a restore it may be in a copy that clients write to.
        if request.view == .volume && request.segmentFile == Self.source || omits(.skipReadCheck) {
            return true
        }
        let segment = geometry.grains(
            offset: request.cursor, length: request.segmentEnd - request.cursor)
        guard let (file, run) = resolve(request.view, segment) else { return false }
        return file == request.segmentFile && run == segment.upperBound
    }

    /// The file that holds the view's data of the first grain of `grains`, and the end of the run for which that is so.
    func resolve(_ view: View, _ grains: Range<Int>) -> (file: StoreFile, runEnd: Int)? {
        switch view {
        case .volume: return resolveVolume(grains)
        case .point:
            return hold?.location(of: grains)
        default:
            guard let index = chainIndex(view.rawValue), chain[index].state != .failed else {
                return nil
            }
            return resolveCopy(index, grains)
        }
    }

    private func resolveVolume(_ grains: Range<Int>) -> (file: StoreFile, runEnd: Int)? {
        guard let restore else { return (Self.source, grains.upperBound) }
        if restore.pending.contains(grains.lowerBound) {
            let run = restore.pending.firstClear(in: grains) ?? grains.upperBound
            // Even when the copy has failed since: what it had preserved, and all that is pending is preserved, is whole.
            guard let index = chainIndex(restore.copy) else { return nil }
            return resolveCopy(index, grains.lowerBound..<run)
        }
        return (Self.source, restore.pending.firstSet(in: grains) ?? grains.upperBound)
    }

    /// A copy reads through every newer one before it reads the source.
    func resolveCopy(_ index: Int, _ grains: Range<Int>) -> (file: StoreFile, runEnd: Int) {
        var run = grains.upperBound
        for newer in index..<chainCount {
            let preserved = chain[newer].preserved
            if preserved.contains(grains.lowerBound) {
                let end = preserved.firstClear(in: grains.lowerBound..<run) ?? run
                return (chain[newer].targetFile, end)
            }
            run = preserved.firstSet(in: grains.lowerBound..<run) ?? run
        }
        return (Self.source, run)
    }
}
