// HeldImages.swift: old images of one volume's grains in the group's memory: where each lies.
//
// A hash table with linear probing from grains to images; images lie in chunks of the group's memory, which go back when nothing of theirs
// is in use any more.
//
// Must be prevented:
//   an image is taken for another grain's, or for that of an earlier point
//   what was sent stays in memory
//
// Owner: the reactor of the volume.

import Base

final class HeldImages {
    let memory: ImageMemory
    private let grain: Int
    private let perChunk: Int
    /// Set = the point's data of this grain is here.
    let preserved: Bitmap
    /// Memory for grains that are sent ahead of their turn (`Leg`).
    let ahead: Bitmap

    /// `grain + 1`, or 0 where nothing is; images are numbered through the memory, in units of the grain.
    private struct Entry: BitwiseCopyable {
        var key: UInt64 = 0
        var image: UInt64 = 0
    }
    private var entries: UnsafeMutablePointer<Entry>
    private var mask: Int
    /// Grains that have a place.
    private(set) var count = 0
    /// The first of the chunks that have room.
    private var roomy: Int32 = -1

    /// Bytes of `marks`.
    static func markBytes(_ geometry: Geometry) -> Int { 2 * Bitmap.byteCount(bits: geometry.grainCount) }

    /// - Parameter marks: zero, and there as long as this.
    init(_ geometry: Geometry, _ memory: ImageMemory, marks: UnsafeMutableRawPointer) {
        self.memory = memory
        grain = geometry.grain
        perChunk = memory.chunkBytes(grain: grain) / grain
        preserved = Bitmap(memory: marks, count: geometry.grainCount)
        ahead = Bitmap(memory: marks + Self.markBytes(geometry) / 2, count: geometry.grainCount)
        mask = 63
        entries = .allocate(capacity: mask + 1)
        entries.initialize(repeating: Entry(), count: mask + 1)
    }

    deinit {
        entries.deallocate()
    }

    // MARK: Grains

    /// Makes room for a grain's image; false when there is none.
    func reserve(_ grain: Int) -> Bool {
        if 2 * (count + 1) > mask { grow() }
        let slot = find(grain)
        guard entries[slot].key == 0 else { return true }
        guard let image = takeImage() else { return false }
        entries[slot] = Entry(key: UInt64(grain) + 1, image: image)
        count += 1
        return true
    }

    /// Takes the content of grains that have room; others are not needed any more.
    func store(_ grains: Range<Int>, _ bytes: Int, from buffer: UnsafeMutableRawPointer) {
        for index in grains {
            let entry = entries[find(index)]
            guard entry.key != 0 else { continue }
            let start = (index - grains.lowerBound) * grain
            address(entry.image).copyMemory(from: buffer + start, byteCount: min(grain, bytes - start))
            preserved.set(index..<index + 1)
        }
    }

    /// The image of a grain that `preserved` says is here.
    func image(of grain: Int) -> UnsafeMutableRawPointer {
        let entry = entries[find(grain)]
        invariant(entry.key != 0, "what is preserved has an image")
        return address(entry.image)
    }

    /// Nobody needs the images of these grains any more.
    func discard(_ grains: Range<Int>) {
        guard count > 0 else { return }
        var from = grains.lowerBound
        while let grain = preserved.firstSet(in: from..<grains.upperBound) {
            preserved.clear(grain..<grain + 1)
            release(grain)
            from = grain + 1
        }
    }

    /// Gives up room that was made.
    func release(_ grain: Int) {
        var hole = find(grain)
        guard entries[hole].key != 0 else { return }
        freeImage(entries[hole].image)
        count -= 1
        // Those behind it that would have been found in its place move up.
        var next = (hole + 1) & mask
        while entries[next].key != 0 {
            let home = place(entries[next].key)
            if (next &- home) & mask >= (next &- hole) & mask {
                entries[hole] = entries[next]
                hole = next
            }
            next = (next + 1) & mask
        }
        entries[hole].key = 0
    }

    /// Nothing of the point is needed any more.
    func discardAll() {
        guard count > 0 else { return }
        for slot in 0...mask where entries[slot].key != 0 {
            let grain = Int(entries[slot].key - 1)
            preserved.clear(grain..<grain + 1)
            freeImage(entries[slot].image)
            entries[slot].key = 0
        }
        count = 0
    }

    // MARK: The table

    private func place(_ key: UInt64) -> Int {
        Int(truncatingIfNeeded: (key &* 0x9E37_79B9_7F4A_7C15) >> 32) & mask
    }

    /// Where a grain's entry is, or would be.
    private func find(_ grain: Int) -> Int {
        let key = UInt64(grain) + 1
        var slot = place(key)
        while entries[slot].key != 0, entries[slot].key != key { slot = (slot + 1) & mask }
        return slot
    }

    private func grow() {
        let (old, size) = (entries, mask + 1)
        mask = 2 * size - 1
        entries = .allocate(capacity: 2 * size)
        entries.initialize(repeating: Entry(), count: 2 * size)
        for slot in 0..<size where old[slot].key != 0 { entries[find(Int(old[slot].key - 1))] = old[slot] }
        old.deallocate()
    }

    // MARK: Chunks

    private func address(_ image: UInt64) -> UnsafeMutableRawPointer { memory.base + Int(image) * grain }

    private func takeImage() -> UInt64? {
        if roomy < 0 {
            guard let taken = memory.take(grain: grain) else { return nil }
            memory.chunks[Int(taken)] = ImageMemory.Chunk()
            roomy = taken
        }
        let chunk = roomy
        let free = (~memory.chunks[Int(chunk)].images).trailingZeroBitCount
        memory.chunks[Int(chunk)].images |= 1 << UInt64(free)
        if memory.chunks[Int(chunk)].images.nonzeroBitCount == perChunk { unlink(chunk) }
        return UInt64(Int(chunk) * memory.chunkBytes / grain + free)
    }

    private func freeImage(_ image: UInt64) {
        let offset = Int(image) * grain
        let bytes = memory.chunkBytes(grain: grain)
        let chunk = Int32(offset / bytes * (bytes / memory.chunkBytes))
        let wasFull = memory.chunks[Int(chunk)].images.nonzeroBitCount == perChunk
        memory.chunks[Int(chunk)].images &= ~(1 << UInt64(offset % bytes / grain))
        if wasFull { link(chunk) }
        guard memory.chunks[Int(chunk)].images == 0 else { return }
        unlink(chunk)
        memory.give(chunk, grain: grain)
    }

    private func link(_ chunk: Int32) {
        memory.chunks[Int(chunk)].next = roomy
        memory.chunks[Int(chunk)].previous = -1
        if roomy >= 0 { memory.chunks[Int(roomy)].previous = chunk }
        roomy = chunk
    }

    private func unlink(_ chunk: Int32) {
        let (next, previous) = (memory.chunks[Int(chunk)].next, memory.chunks[Int(chunk)].previous)
        if previous >= 0 { memory.chunks[Int(previous)].next = next } else { roomy = next }
        if next >= 0 { memory.chunks[Int(next)].previous = previous }
    }
}
