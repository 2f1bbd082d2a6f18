// SimulatedComparisons.swift: the parts of `Verify`, as a simulated site carries them out: FlashCopies of the primary's volumes in the instant
// of a point, and that point, which its peer keeps meanwhile. The two must be alike.

import FlashCopies
import Groups
import Volumes

/// A comparison that is under way at a primary.
struct SimulatedComparison {
    /// Of its FlashCopies; another one each time.
    let id: CopyID
    /// The one that is formed in the instant of the copies.
    var point: UInt64?
    /// No copy is taken any more.
    var isOver = false
    /// The peer was asked to let go of the point, whatever came of that.
    var hasUnpinned = false
}

/// A point that a secondary keeps for a comparison.
struct PinnedPoint {
    let id: CopyID
    /// By volume.
    var carriers: [CopyID] = []
}

final class SimulatedComparisons: PartOfSite {
    unowned let site: SimulatedSite
    /// The one that is under way, and how many there were.
    private var comparison: SimulatedComparison?
    private var count = 0
    private var pinned: PinnedPoint?

    init(_ site: SimulatedSite) { self.site = site }

    /// The process has ended.
    func die() { (comparison, pinned) = (nil, nil) }

    /// The operator has a point compared while mirroring goes on.
    func verify() {
        guard site.isUp, !site.executor.isBusy, site.group.cycle != nil, site.record.isMirroring else { return }
        count += 1
        let id = comparisonCopy
        site.executor.run(Verify()) { [unowned self] outcome in
            if case .success = outcome { world.figures.comparisons += 1 }
            if volumes.contains(where: { $0.volume.copy(id)?.state == .active }) {
                world.fail("a FlashCopy stays behind after a comparison")
            }
            if peer.comparisons.pinned?.id == id, comparison?.hasUnpinned != true {
                world.fail("the peer keeps a point after a comparison")
            }
            comparison = nil
        }
    }

    private var comparisonCopy: CopyID { CopyTable.firstID + CopyID(count) }

    func copyAtPoint(_ done: @escaping (Answer) -> Void) {
        guard site.group.cycle != nil else { return done(.failed(Refusal("it does not mirror"))) }
        comparison = SimulatedComparison(id: comparisonCopy)
        site.replicator.handle(.request)
        site.executor.wait { [unowned self] in
            guard let point = comparison?.point, site.group.cycle?.suspension == nil else {
                return site.group.cycle?.suspension != nil
            }
            return max(site.record.lastCommitted?.number ?? 0, site.record.lastNumber - 1) >= point
        } then: { [unowned self] in
            if let point = site.record.lastCommitted, point.number == comparison?.point { return done(.point(point)) }
            dropCopies { done(.failed(Refusal("the point was not committed", .passing))) }
        }
    }

    /// The one that forms is compared, if one is waited for.
    func note(_ point: UInt64) {
        if let comparison, comparison.point == nil, !comparison.isOver { self.comparison?.point = point }
    }

    /// In the instant in which the volume forms the point.
    func copy(_ index: Int, _ simulated: SimulatedVolume, at point: UInt64) {
        guard let id = comparison?.id, comparison?.point == point else { return }
        let files = (SimulatedFile(byteCount: World.size), SimulatedBitmap(bits: World.grains))
        site.copies[index][id] = files
        simulated.volume.addCopy(
            FlashCopy(
                id: id, targetFile: simulated.addStore(.file(files.0)),
                bitmapFile: simulated.addStore(.bitmap(files.1)), preserved: files.1.bitmap(World.grains), durable: true
            ))
    }

    /// Behind what the volumes have been asked before.
    func dropCopies(_ done: @escaping () -> Void) {
        let id = comparisonCopy
        comparison?.isOver = true
        site.replicator.everyVolume({ $1.volume.withdrawCopy(id) }, then: done)
    }

    func pinPoint(_ point: UInt64, _ done: @escaping (Answer) -> Void) {
        let id = comparisonCopy
        site.executor.ask(done) { peer, answered in answered(peer.comparisons.pin(point, id)) }
    }

    func unpinPoint(_ done: @escaping (Answer) -> Void) {
        comparison?.hasUnpinned = true
        site.executor.ask(done) { peer, answered in
            peer.comparisons.unpin()
            answered(.done)
        }
    }

    func comparePoint(_ done: @escaping (Answer) -> Void) {
        site.executor.ask(done) { [unowned self] peer, answered in
            compare(0, peer, (life, peer.life), answered)
        }
    }

    /// One volume after the other, as long as both processes live.
    private func compare(
        _ index: Int, _ peer: SimulatedSite, _ lives: (Int, Int), _ answered: @escaping (Answer) -> Void
    ) {
        guard index < World.volumes else { return answered(.done) }
        guard lives == (life, peer.life), let id = comparison?.id, let pinned = peer.comparisons.pinned, pinned.id == id
        else {
            return answered(.failed(Refusal("the point is not kept", .passing)))
        }
        read(id, of: index) { [unowned self] ours in
            peer.comparisons.read(pinned.carriers[index], of: index) { [unowned self] theirs in
                guard let ours, let theirs else { return answered(.failed(Refusal("it cannot be read", .passing))) }
                // Nobody hears what comes when the copies have been let go of: hosts may have overwritten what they are read through.
                let isHeard = comparison?.id == id && comparison?.isOver == false
                if isHeard, !isSame(ours, theirs) {
                    world.fail("volume \(index) of point \(comparison?.point ?? 0) is not alike at both sites")
                }
                compare(index + 1, peer, lives, answered)
            }
        }
    }

    /// - Parameter done: is given nil when it cannot be read, and not called if the process ends before.
    private func read(_ id: CopyID, of index: Int, _ done: @escaping ([UInt8]?) -> Void) {
        let process = life
        guard site.isUp else { return }
        // As a reactor does: what the comparison waits for may be over, and the copy about to leave.
        let volume = volumes[index]
        guard volume.volume.retainCopy(id) else { return done(nil) }
        let accepted = volume.submit(.read, view: .copy(id), offset: 0, length: World.size) { request in
            volume.volume.releaseCopy(id)
            done(request.error == 0 ? Array(UnsafeRawBufferPointer(start: request.buffer, count: World.size)) : nil)
        }
        if !accepted { volume.volume.releaseCopy(id) }
        if !accepted { world.tasks.append { [unowned self] in if process == life { read(id, of: index, done) } } }
    }

    // MARK: A secondary's

    /// What an earlier comparison has left is let go of.
    private func pin(_ point: UInt64, _ id: CopyID) -> Answer {
        unpin()
        guard site.points.contains(point) else { return .failed(Refusal("there is no point \(point)")) }
        pinned = PinnedPoint(id: id)
        for index in volumes.indices {
            let carrier = CopyID(site.carrier(of: point, index))
            guard volumes[index].volume.retainCopy(carrier) else {
                unpin()
                return .failed(Refusal("point \(point) is not in volume \(index)'s chain", .passing))
            }
            pinned?.carriers.append(carrier)
        }
        return .done
    }

    private func unpin() {
        for (index, carrier) in (pinned?.carriers ?? []).enumerated() {
            volumes[index].volume.releaseCopy(carrier)
            volumes[index].pump()
        }
        pinned = nil
    }
}
