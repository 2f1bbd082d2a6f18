// ActivityLog.swift: which regions of a volume may have changes that the bitmaps on stable storage do not show.
//
// The bitmaps are mapped files: they outlive the process, but after power loss they are as old as their last flush. So
// a region is written down, durably, before the first write to it. It is taken out lazily: once nothing was written to
// it for a while, and data and bitmaps were flushed since. After power loss what is set in the bitmaps, and every grain of
// the regions in the log, is what may have changed (as with md's write-intent bitmap; DRBD's activity log bounds the
// number of regions instead, and so has to wait for one to leave).
//
// One bit a region, in sectors of 512 bytes with a checksum each. A sector that is torn or damaged counts as all set.
//
// Must be prevented:
//   a write is issued before its region is on stable storage
//   a region leaves before the bits of its writes are on stable storage
//   a region leaves before its writes are: what was sent is cleared, and power loss takes it back at this site only
//   a region leaves while a write to it is in flight, whose bits are set once more when it ends
//   the log cannot be written any more, and a write goes on before it is written down, elsewhere if need be, that the next start must
//     not rely on it: the disk with the log may come back after power loss as it was
//
// Owner: the reactor of the volume.

import Base

package final class ActivityLog {
    /// Bytes of bits in a sector; a sequence number (64), the sector's index (32) and a CRC-32C (32) follow.
    package static let bitBytes = 496
    package static let sectorBytes = 512
    /// The log begins behind the file's header.
    package static let fileOffset = BitmapHeader.byteCount
    package static let smallestRegion: UInt64 = 4 << 20
    private static let mostRegions = 1 << 16

    package let regionShift: UInt64
    package let regionCount: Int
    package var sectorCount: Int { Self.sectors(of: regionCount) }
    package fileprivate(set) var isOn = false
    fileprivate var file: StoreFile = -1
    /// The recording bitmaps.
    fileprivate(set) var recordingFile: StoreFile = -1

    /// On stable storage.
    fileprivate let logged: Bitmap
    /// In the write under way.
    fileprivate let entering: Bitmap
    /// Wanted by writes that wait.
    fileprivate let wanted: Bitmap
    /// Written to since the last sweep.
    fileprivate let touched: Bitmap
    /// May leave when the flush under way is done.
    fileprivate let leaving: Bitmap
    private let memory: UnsafeMutableRawPointer
    fileprivate let image: UnsafeMutableRawPointer
    private var sequence: UInt64 = 0
    fileprivate var writing = false
    /// Writes of the file that were issued, and how many there were at the last sweep.
    fileprivate var writes: UInt64 = 0
    fileprivate var writesAtSweep: UInt64 = 0
    /// Regions left; the file shows more than there are.
    fileprivate var stale = false
    fileprivate var flushesLeft = 0
    fileprivate var flushFailed = false
    fileprivate var health = Health.well
    fileprivate var waiters = SlotList()

    fileprivate enum Health {
        case well
        /// It, or a bitmap that it vouches for, could not be written, and the control plane was told: writes to regions that are not in
        /// it wait for `distrustActivityLog`.
        case failed
        /// The next start will not rely on it: nothing is logged any more.
        case distrusted
    }

    package static func sectors(of regions: Int) -> Int { (regions + 8 * bitBytes - 1) / (8 * bitBytes) }

    /// Bytes of one region of a volume, as a power of two, and how many regions there are.
    ///
    /// - Parameter smallest: bytes of a region of a small volume; a power of two.
    package static func layout(size: UInt64, smallest smallestRegion: UInt64 = smallestRegion) -> (
        shift: UInt64, count: Int
    ) {
        var shift = UInt64(smallestRegion.trailingZeroBitCount)
        while (size - 1) >> shift >= UInt64(mostRegions) { shift += 1 }
        return (shift, Int((size - 1) >> shift) + 1)
    }

    init(geometry: Geometry, smallestRegion: UInt64) {
        (regionShift, regionCount) = Self.layout(size: geometry.size, smallest: smallestRegion)
        let bytes = Bitmap.byteCount(bits: regionCount)
        memory = .allocate(byteCount: 5 * bytes, alignment: 8)
        memory.initializeMemory(as: UInt8.self, repeating: 0, count: 5 * bytes)
        logged = Bitmap(memory: memory, count: regionCount)
        wanted = Bitmap(memory: memory + bytes, count: regionCount)
        touched = Bitmap(memory: memory + 2 * bytes, count: regionCount)
        leaving = Bitmap(memory: memory + 3 * bytes, count: regionCount)
        entering = Bitmap(memory: memory + 4 * bytes, count: regionCount)
        let imageBytes = Self.sectors(of: regionCount) * Self.sectorBytes
        image = .allocate(byteCount: imageBytes, alignment: 4096)
        image.initializeMemory(as: UInt8.self, repeating: 0, count: imageBytes)
    }

    deinit {
        memory.deallocate()
        image.deallocate()
    }

    var isWaitedFor: Bool { !waiters.isEmpty }

    func regions(offset: UInt64, length: UInt64) -> Range<Int> {
        Int(offset >> regionShift)..<Int((offset + length - 1) >> regionShift) + 1
    }

    /// Lays the bits out as they go to the file.
    fileprivate func encode() {
        sequence += 1
        for sector in 0..<sectorCount {
            let base = image + sector * Self.sectorBytes
            for word in 0..<Self.bitBytes / 8 {
                let index = sector * Self.bitBytes / 8 + word
                let inside = index << 6 < regionCount
                let bits = inside ? logged.word(index) | entering.word(index) : 0
                (base + 8 * word).storeBytes(of: bits.littleEndian, as: UInt64.self)
            }
            (base + 496).storeBytes(of: sequence.littleEndian, as: UInt64.self)
            (base + 504).storeBytes(of: UInt32(sector).littleEndian, as: UInt32.self)
            let checksum = CRC32C.checksum(UnsafeRawBufferPointer(start: base, count: 508))
            (base + 508).storeBytes(of: checksum.littleEndian, as: UInt32.self)
        }
    }

    /// Sets in `regions` what the bytes of a log say; those of a damaged sector are all set.
    ///
    /// - Returns: how many sectors were damaged. A sector that was never written, all zero, is sound and empty.
    package static func decode(_ bytes: UnsafeRawBufferPointer, into regions: Bitmap) -> Int {
        var damaged = 0
        for sector in 0..<sectors(of: regions.count) {
            let bits = sector * 8 * bitBytes..<min(regions.count, (sector + 1) * 8 * bitBytes)
            let start = sector * sectorBytes
            guard start + sectorBytes <= bytes.count else {
                damaged += 1
                regions.set(bits)
                continue
            }
            let part = UnsafeRawBufferPointer(rebasing: bytes[start..<start + sectorBytes])
            if !part.contains(where: { $0 != 0 }) { continue }
            let index = UInt32(littleEndian: part.loadUnaligned(fromByteOffset: 504, as: UInt32.self))
            let checksum = UInt32(littleEndian: part.loadUnaligned(fromByteOffset: 508, as: UInt32.self))
            guard index == UInt32(sector), CRC32C.checksum(UnsafeRawBufferPointer(rebasing: part[..<508])) == checksum
            else {
                damaged += 1
                regions.set(bits)
                continue
            }
            for bit in bits where part[(bit - bits.lowerBound) >> 3] >> UInt8(bit & 7) & 1 != 0 {
                regions.set(bit..<bit + 1)
            }
        }
        return damaged
    }
}

extension Volume {
    /// Writes to the volume are logged from now on.
    ///
    /// - Parameters:
    ///   - contents: what `file` holds behind its header; empty for a log that is all zeros.
    ///   - recordingFile: file of the recording bitmaps.
    package func startActivityLog(file: StoreFile, contents: UnsafeRawBufferPointer, recordingFile: StoreFile) {
        if !contents.isEmpty { _ = ActivityLog.decode(contents, into: activity.logged) }
        activity.touched.setAll()  // nobody knows; the first sweep lets them be
        activity.file = file
        activity.recordingFile = recordingFile
        activity.isOn = true
    }

    /// Bytes of the regions in the log; nil while it is off.
    package var activeBytes: UInt64? {
        activity.isOn ? min(geometry.size, UInt64(activity.logged.population()) << activity.regionShift) : nil
    }

    /// After power loss: what is set in either recording bitmap, and all of `regions`, may have changed.
    package func recoverChanges(regions: Bitmap) {
        mergeOutOfSync()
        forEachGrainRun(of: regions) { leg.mark($0) }
    }

    /// The same for what changed since a FlashCopy that survived.
    package func recoverChanges(of id: CopyID, regions: Bitmap) {
        guard let index = chainIndex(id) else { return }
        forEachGrainRun(of: regions) { chain[index].changes.set($0) }
    }

    private func forEachGrainRun(of regions: Bitmap, _ body: (Range<Int>) -> Void) {
        var region = 0
        while let first = regions.firstSet(in: region..<regions.count) {
            let start = UInt64(first) << activity.regionShift
            let end = min(geometry.size, UInt64(first + 1) << activity.regionShift)
            body(geometry.grains(offset: start, length: end - start))
            region = first + 1
        }
    }

    // MARK: Entering

    /// Whether the regions of a write are in the log; if not, they are being put there, and the request asks again.
    func enterRegions(_ slot: Int32) -> Bool {
        let request = requests + Int(slot)
        let regions = activity.regions(
            offset: request.pointee.cursor, length: request.pointee.end - request.pointee.cursor)
        if admit(regions) { return true }
        request.pointee.state = .waiting
        activity.waiters.append(slot, in: requests)
        return false
    }

    /// The same for work in the background, which is done again when they are.
    func requireRegions(_ grains: Range<Int>) -> Bool {
        guard activity.isOn else { return true }
        let range = geometry.byteRange(grains)
        return admit(activity.regions(offset: range.lowerBound, length: range.upperBound - range.lowerBound))
    }

    private func admit(_ regions: Range<Int>) -> Bool {
        activity.touched.set(regions)
        if activity.health == .distrusted || activity.logged.containsAll(regions) { return true }
        if activity.health == .failed { return false }
        if !activity.entering.containsAll(regions) {
            activity.wanted.set(regions)
            writeActivity()
        }
        return false
    }

    private func writeActivity() {
        guard !activity.writing else {
            activity.stale = true
            return
        }
        activity.writing = true
        activity.writes &+= 1
        activity.stale = false
        activity.entering.formUnion(activity.wanted)
        activity.wanted.clearAll()
        activity.encode()
        issue(
            StoreIO(
                operation: .write, fua: true, noHole: false, file: activity.file,
                offset: UInt64(ActivityLog.fileOffset), length: UInt64(activity.sectorCount * ActivityLog.sectorBytes),
                buffer: activity.image, token: IOToken(owner: .activityWrite, slot: 0, generation: 0)))
    }

    func completeActivityWrite(_ errno: Int32) {
        activity.writing = false
        guard errno == 0 else { return loseActivityLog(errno) }
        activity.logged.formUnion(activity.entering)
        activity.entering.clearAll()
        if activity.stale, activity.health == .well { writeActivity() }
        if backgroundWork { backgroundDue = true }
        resumeAll(activity.waiters.takeAll())
    }

    // MARK: Failing

    /// After power loss the log and the bitmaps do not say what has changed, and that has to be written down somewhere.
    func loseActivityLog(_ errno: Int32) {
        guard activity.health == .well else { return }
        activity.health = .failed
        emit(.activityLogFailed(errno: errno))
    }

    /// It is written down that everything may have changed by the next start, or that could not be done in time: the host comes
    /// first. Answers `activityLogFailed`.
    package func distrustActivityLog() {
        activity.health = .distrusted
        activity.entering.clearAll()
        activity.wanted.clearAll()
        if leg.merge == .failed { leg.finishMerge() }
        if backgroundWork { backgroundDue = true }
        resumeAll(activity.waiters.takeAll())
    }

    /// Whether bits need not be on stable storage before others are cleared.
    var mayForgetBits: Bool { !activity.isOn || activity.health == .distrusted }

    // MARK: Leaving

    /// Lets regions go to which nothing was written since the sweep before; the driver calls it every few seconds.
    package func sweepActivity() {
        // Once the source could not be flushed, a flush that succeeds says nothing of what was written before.
        guard activity.isOn, activity.health == .well else { return }
        // A disk that does not answer is as bad as one that fails: hosts wait for this write.
        if activity.writing, activity.writes == activity.writesAtSweep { return loseActivityLog(110) }  // ETIMEDOUT
        activity.writesAtSweep = activity.writes
        guard activity.flushesLeft == 0, flushError == 0 else { return }
        for slot in 0..<requestsUsed {
            let request = requests + slot
            guard request.pointee.isModifying, request.pointee.view == .volume, request.pointee.state == .issued else {
                continue
            }
            activity.touched.set(
                activity.regions(
                    offset: request.pointee.cursor, length: request.pointee.segmentEnd - request.pointee.cursor))
        }
        activity.leaving.formDifference(activity.logged, activity.touched)
        activity.touched.clearAll()
        guard activity.leaving.firstSet(in: 0..<activity.regionCount) != nil else { return }
        activity.flushesLeft = 2
        activity.flushFailed = false
        let token = IOToken(owner: .activityFlush, slot: 0, generation: 0)
        issue(flushIO(Self.source, token))
        issue(flushIO(activity.recordingFile, token))
        for index in 0..<chainCount where chain[index].recordsChanges {
            activity.flushesLeft += 1
            issue(flushIO(chain[index].bitmapFile, token))
        }
    }

    func completeActivityFlush(_ file: StoreFile, _ errno: Int32) {
        activity.flushesLeft -= 1
        if errno != 0 {
            activity.flushFailed = true
            if file != Self.source { loseBits(of: file, errno) }
        }
        guard activity.flushesLeft == 0, !activity.flushFailed, activity.health == .well else { return }
        activity.leaving.formDifference(activity.leaving, activity.touched)
        activity.logged.formDifference(activity.logged, activity.leaving)
        writeActivity()
    }

    /// The kernel may have dropped bits that a flush did not bring to storage, and does not tell again: all are set, which makes every
    /// page one that has to be written.
    private func loseBits(of file: StoreFile, _ errno: Int32) {
        if file == activity.recordingFile {
            markAllChanged()
        } else {
            for index in 0..<chainCount where chain[index].bitmapFile == file { chain[index].changes.setAll() }
        }
        loseActivityLog(errno)
    }
}
