// TargetWrites.swift: writes to a FlashCopy that is exported writable.
//
//   next older copy lacks a grain and reads it through this one? ─► fill it there first
//   the target lacks a grain? ─► fill it here first
//   then write to the target
//
// Must be prevented:
//   a write to a target reaches the source, or what an older copy holds
//   part of a grain is written to a target that does not have the rest of it
//   a write changes what a restore is bringing back

import Base

extension Volume {
    func advanceTargetWrite(_ slot: Int32) {
        let request = requests + Int(slot)
        guard let index = chainIndex(request.pointee.view.rawValue), chain[index].state == .active else {
            finish(slot, error: 5)  // EIO: the copy has failed or is gone
            return
        }
        guard restore?.copy != chain[index].id else {
            finish(slot, error: 30)  // EROFS
            return
        }
        // The copy that is being restored would be given what lies here first; one that has failed takes nothing any more.
        if let restore, let restored = chainIndex(restore.copy), restored < index, chain[restored].state != .active {
            finish(slot, error: 5)
            return
        }
        let grains = geometry.grains(
            offset: request.pointee.cursor, length: request.pointee.end - request.pointee.cursor)
        if let heir = heir(of: index), !omits(.forgetHeir),
            !prepareGrains(of: heir, in: grains, for: slot, handsOver: true)
        {
            return
        }
        if let heir = heir(of: index), chain[heir].recordsChanges { chain[heir].changes.set(grains) }
        guard prepareGrains(of: index, in: grains, for: slot, handsOver: false) else { return }
        if waitsForRecord(slot, grains) { return }
        if chain[index].recordsChanges { chain[index].changes.set(grains) }
        issueWrite(slot, to: chain[index].targetFile, until: request.pointee.end)
    }

    /// Whether a copy's own target has all of `grains`; if not, fills them, and the request asks again.
    private func prepareGrains(of index: Int, in grains: Range<Int>, for slot: Int32, handsOver: Bool) -> Bool {
        guard let first = chain[index].preserved.firstClear(in: grains) else { return true }
        let window = grains.lowerBound + max(1, Limits.writeWindowBytes / geometry.grain)
        let bound = first..<min(grains.upperBound, max(window, first + 1))
        let run = first..<(chain[index].preserved.firstSet(in: bound) ?? bound.upperBound)
        requests[Int(slot)].state = .waiting
        if let job = activeJob(overlapping: first..<first + 1) ?? startFill(index, run, handsOver: handsOver) {
            jobs[Int(job)].waiters.append(slot, in: requests)
        } else if unsettledCount > 0 {
            settleWaiters.append(slot, in: requests)
        } else {
            starvedWaiters.append(slot, in: requests)
        }
        return false
    }
}
