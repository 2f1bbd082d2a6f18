// Extents.swift: where a view's data lies, and what changed since a FlashCopy: what BLOCK_STATUS tells.
//
// Both only look; the caller asks and acts within one turn, so that no write comes between.

import Base

extension Volume {
    /// A run of a view whose data lies in one file, at the same offset there.
    package struct Location {
        package var file: StoreFile
        /// End of the run, in bytes.
        package var end: UInt64
        /// 1 = the view's own file; more = read through that many further files.
        package var depth: UInt32
        /// A write is in flight there whose outcome the view has still to learn.
        package var unsettled: Bool
    }

    /// Where the data at `offset` of a view lies; nil when the view is gone or has failed.
    package func location(_ view: View, offset: UInt64, length: UInt64) -> Location? {
        let grains = geometry.grains(offset: offset, length: length)
        guard let (file, run) = resolve(view, grains) else { return nil }
        let end = min(offset + length, geometry.offset(ofGrain: run))
        let found = Location(file: file, end: end, depth: depth(view, of: file), unsettled: false)
        guard let unsettled = unsettledGrains(in: grains.lowerBound..<run, of: file, seenBy: view) else {
            return found
        }
        if unsettled.lowerBound > grains.lowerBound {
            return Location(
                file: file, end: min(end, geometry.offset(ofGrain: unsettled.lowerBound)), depth: found.depth,
                unsettled: false)
        }
        return Location(
            file: file, end: min(end, geometry.offset(ofGrain: unsettled.upperBound)), depth: found.depth,
            unsettled: true)
    }

    private func depth(_ view: View, of file: StoreFile) -> UInt32 {
        guard view != .volume, let index = chainIndex(view.rawValue) else { return 1 }
        if file == Self.source { return UInt32(chainCount - index + 1) }
        for newer in index..<chainCount where chain[newer].targetFile == file { return UInt32(newer - index + 1) }
        return 1
    }

    /// A run of a view that differs, or does not, from what a FlashCopy holds.
    package struct ChangedRun {
        package var changed: Bool
        /// End of the run, in bytes.
        package var end: UInt64
    }

    /// Words of the bitmaps looked at for one run, all copies together.
    private static let changeScanWords = 1 << 18

    /// Whether the data at `offset` of a view may differ from FlashCopy `base`, and how far that goes. Everything counts
    /// as changed when the copy is gone or has failed.
    package func changedRun(since base: CopyID, in view: View, offset: UInt64, length: UInt64) -> ChangedRun {
        let all = ChangedRun(changed: true, end: offset + length)
        guard var first = chainIndex(base), chain[first].state != .failed else { return all }
        var last = chainCount
        if view != .volume {
            guard let index = chainIndex(view.rawValue) else { return all }
            // Recovery points that one copy holds are alike; and one that an older copy holds than the base is like any newer.
            if index == first { return ChangedRun(changed: false, end: all.end) }
            (first, last) = (min(first, index), max(first, index))
        }
        let grains = geometry.grains(offset: offset, length: length)
        let pending = view == .volume ? restore?.pending : nil
        let changed =
            changedBits(grains.lowerBound >> 6, first..<last, pending) >> UInt64(grains.lowerBound & 63) & 1 != 0
        let bound = Self.changeScanWords / (last - first) * 64
        let end = runEnd(
            grains.lowerBound..<min(grains.upperBound, grains.lowerBound + max(64, bound)), changed, first..<last,
            pending)
        return ChangedRun(changed: changed, end: min(offset + length, geometry.offset(ofGrain: end)))
    }

    private func changedBits(_ word: Int, _ copies: Range<Int>, _ pending: Bitmap?) -> UInt64 {
        var bits = pending?.word(word) ?? 0
        for index in copies { bits |= chain[index].changes.word(word) }
        return bits
    }

    /// The first grain after the start whose state is not `changed`.
    private func runEnd(_ grains: Range<Int>, _ changed: Bool, _ copies: Range<Int>, _ pending: Bitmap?) -> Int {
        var grain = grains.lowerBound + 1
        while grain < grains.upperBound {
            let bits = changedBits(grain >> 6, copies, pending)
            let differing = (changed ? ~bits : bits) & (~0 << UInt64(grain & 63))
            if differing != 0 { return min(grains.upperBound, grain & ~63 | differing.trailingZeroBitCount) }
            grain = (grain & ~63) + 64
        }
        return grains.upperBound
    }
}
