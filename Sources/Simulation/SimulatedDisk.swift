// SimulatedDisk.swift: files with a volatile cache, and the I/O of one volume's engine on them.
//
// A write takes effect at some moment between its issue and its completion; so does a read. A process crash leaves each
// write under way done, undone or torn at a sector. Power loss keeps what was flushed and, of the sectors written since,
// any subset, each as it was last or as it was in between. Mapped memory is the same, byte by byte, without any I/O: the
// kernel writes pages back at any time or never.

import Base
import Volumes

/// SplitMix64: the whole run follows from the seed.
package struct SeededGenerator: RandomNumberGenerator {
    private var state: UInt64
    package init(seed: UInt64) { state = seed &* 0x9E37_79B9_7F4A_7C15 &+ 0x1234_5678 }
    package mutating func next() -> UInt64 {
        state &+= 0x9E37_79B9_7F4A_7C15
        var z = state
        z = (z ^ (z >> 30)) &* 0xBF58_476D_1CE4_E5B9
        z = (z ^ (z >> 27)) &* 0x94D0_49BB_1331_11EB
        return z ^ (z >> 31)
    }
    mutating func chance(_ percent: Int) -> Bool { Int(next() % 100) < percent }
    mutating func below(_ bound: Int) -> Int { Int(next() % UInt64(bound)) }
    mutating func one<Element>(of elements: [Element]) -> Element? {
        elements.isEmpty ? nil : elements[below(elements.count)]
    }
    /// One of the elements, each as often as its weight says.
    mutating func one<Element>(of elements: [Element], weights: [Int]) -> Element {
        var left = below(weights.reduce(0, +))
        for (element, weight) in zip(elements, weights) {
            if left < weight { return element }
            left -= weight
        }
        invariantFailed("one of the weights is not 0", #fileID, #line)
    }
}

final class SimulatedFile {
    static let sector = 512
    var cached: [UInt8]
    private(set) var durable: [UInt8]
    private var unsynced: Set<Int> = []
    /// Sectors that cannot be read until they are written again.
    var latent: Set<Int> = []
    /// Sectors that may still be taken by first writes; nil = any number.
    var spaceLeft: Int?
    private var allocated: Set<Int> = []
    /// Every write fails.
    var refusesWrites = false
    /// The disk under it is dead: every write and flush fails, and it comes back as it was.
    var isDead = false

    init(byteCount: Int) {
        cached = Array(repeating: 0, count: byteCount)
        durable = cached
    }

    /// Random contents, on stable storage: each sector one byte over and over, never zero.
    func fill(_ random: inout SeededGenerator) {
        for start in stride(from: 0, to: cached.count, by: Self.sector) {
            let byte = UInt8(1 + random.below(255))
            for index in start..<min(start + Self.sector, cached.count) { cached[index] = byte }
        }
        durable = cached
    }

    private func sectors(_ offset: Int, _ count: Int) -> ClosedRange<Int> {
        offset / Self.sector...(offset + max(1, count) - 1) / Self.sector
    }

    func isReadable(_ offset: Int, _ count: Int) -> Bool {
        latent.isEmpty || !sectors(offset, count).contains { latent.contains($0) }
    }

    /// Takes space for a write; the errno when there is none.
    func claim(_ offset: Int, _ count: Int) -> Int32 {
        if refusesWrites || isDead { return 5 }  // EIO
        guard let left = spaceLeft else { return 0 }
        let new = sectors(offset, count).filter { !allocated.contains($0) }
        guard new.count <= left else { return 28 }  // ENOSPC
        spaceLeft = left - new.count
        allocated.formUnion(new)
        return 0
    }

    func write(_ offset: Int, _ bytes: UnsafeRawBufferPointer) {
        cached.withUnsafeMutableBytes { target in
            UnsafeMutableRawBufferPointer(rebasing: target[offset..<offset + bytes.count])
                .copyMemory(from: bytes)
        }
        markUnsynced(offset, bytes.count)
    }

    func zero(_ offset: Int, _ count: Int) {
        for index in offset..<offset + count { cached[index] = 0 }
        markUnsynced(offset, count)
    }

    private func markUnsynced(_ offset: Int, _ count: Int) {
        guard count > 0 else { return }
        for sector in sectors(offset, count) {
            unsynced.insert(sector)
            latent.remove(sector)
        }
    }

    /// - Returns: an errno.
    @discardableResult
    func flush() -> Int32 {
        if isDead { return 5 }
        for sector in unsynced { copySector(sector, from: cached, to: &durable) }
        unsynced = []
        return 0
    }

    /// What a write with FUA makes durable: itself.
    func flushRange(_ offset: Int, _ count: Int) {
        for sector in sectors(offset, count) where unsynced.remove(sector) != nil {
            copySector(sector, from: cached, to: &durable)
        }
    }

    private func copySector(_ sector: Int, from: [UInt8], to: inout [UInt8]) {
        let start = sector * Self.sector
        let end = min(start + Self.sector, to.count)
        to.replaceSubrange(start..<end, with: from[start..<end])
    }

    /// The kernel writes some of what is dirty back by itself.
    func writeBack(_ random: inout SeededGenerator) {
        guard !isDead else { return }
        for sector in unsynced.sorted() where random.chance(30) { copySector(sector, from: cached, to: &durable) }
    }

    func losePower(_ random: inout SeededGenerator) {
        var survivor = durable
        for sector in unsynced.sorted() where !isDead && random.chance(50) {
            copySector(sector, from: cached, to: &survivor)
        }
        durable = survivor
        cached = survivor
        unsynced = []
    }
}

/// A mapped file: memory that the engine stores to, flushed like any file.
final class SimulatedBitmap {
    let memory: UnsafeMutableRawPointer
    let byteCount: Int
    /// Bytes that reach the disk together.
    private let unit: Int
    private var durable: [UInt8]
    /// As for a file.
    var isDead = false

    /// - Parameter unit: 1 for bits, any of which may be old; 8 for words that are stored at once.
    init(bits: Int, unit: Int = 1) {
        byteCount = Bitmap.byteCount(bits: bits)
        self.unit = unit
        memory = .allocate(byteCount: byteCount, alignment: 8)
        memory.initializeMemory(as: UInt8.self, repeating: 0, count: byteCount)
        durable = Array(repeating: 0, count: byteCount)
    }

    deinit { memory.deallocate() }

    /// - Returns: an errno.
    @discardableResult
    func flush() -> Int32 {
        if isDead { return 5 }
        durable = Array(UnsafeRawBufferPointer(start: memory, count: byteCount))
        return 0
    }

    /// The kernel writes some of it back by itself.
    func writeBack(_ random: inout SeededGenerator) {
        guard !isDead else { return }
        for start in changedUnits where random.chance(50) { keep(start) }
    }

    /// Each unit is as it was when the kernel wrote it back, just now or earlier, or at the last flush. Often nothing of a
    /// file was written back: it stays old as a whole.
    func losePower(_ random: inout SeededGenerator) {
        let fresh = isDead ? 0 : [0, 0, 50, 90][random.below(4)]
        for start in changedUnits where random.chance(fresh) { keep(start) }
        memory.copyMemory(from: durable, byteCount: byteCount)
    }

    private var changedUnits: [Int] {
        let bytes = UnsafeRawBufferPointer(start: memory, count: byteCount)
        return stride(from: 0, to: byteCount, by: unit).filter { start in
            (start..<start + unit).contains { bytes[$0] != durable[$0] }
        }
    }

    private func keep(_ start: Int) {
        for index in start..<start + unit { durable[index] = memory.load(fromByteOffset: index, as: UInt8.self) }
    }

    func bitmap(_ bits: Int) -> Bitmap { Bitmap(memory: memory, count: bits) }
}

/// What a StoreFile number stands for.
enum SimulatedStore {
    case file(SimulatedFile)
    case bitmap(SimulatedBitmap)
    /// Several in one file.
    case bitmaps([SimulatedBitmap])
}

/// The I/O of one engine that is under way.
struct PendingIO {
    var io: StoreIO
    var applied = false
    var errno: Int32 = 0
}

/// An engine with its files; drives it as a reactor would.
final class SimulatedVolume {
    let volume: Volume
    var stores: [SimulatedStore?] = []
    var pending: [PendingIO] = []
    /// Called with a request that has finished; the callee releases it.
    var onFinished: [Int32: (Request) -> Void] = [:]
    private(set) var events: [VolumeEvent] = []
    /// Faults put in on purpose.
    var skipFlushes = false

    /// The time, for what goes on by it.
    private let now: (() -> UInt64)?

    init(volume: Volume, now: (() -> UInt64)? = nil) { (self.volume, self.now) = (volume, now) }

    func addStore(_ store: SimulatedStore) -> StoreFile {
        if let free = stores.firstIndex(where: { $0 == nil }) {
            stores[free] = store
            return StoreFile(free)
        }
        stores.append(store)
        return StoreFile(stores.count - 1)
    }

    func takeEvents() -> [VolumeEvent] {
        defer { events = [] }
        return events
    }

    /// Moves everything that the engine wants to say.
    func pump() {
        if volume.followsClock, let now { volume.advanceClock(to: now()) }
        if volume.backgroundDue || volume.isStarved { volume.runBackground() }
        var busy = true
        while busy {
            busy = false
            while let io = volume.popIO() {
                pending.append(PendingIO(io: io))
                busy = true
            }
            while let slot = volume.popFinished() {
                let request = volume.request(slot).pointee
                volume.releaseRequest(slot)
                onFinished.removeValue(forKey: slot)?(request)
                request.buffer?.deallocate()
                busy = true
            }
            while let event = volume.popEvent() { events.append(event) }
        }
    }

    /// Starts a request; false when every slot is taken.
    func submit(
        _ operation: Request.Operation, view: View = .volume, offset: Int, length: Int,
        data: [UInt8]? = nil, fua: Bool = false, ofClient: Bool = true, before: () -> Void = {},
        done: @escaping (Request) -> Void
    ) -> Bool {
        guard let slot = volume.takeRequest(ofClient: ofClient) else {
            volume.hurryCollisions()
            return false
        }
        before()
        let request = volume.request(slot)
        request.pointee.operation = operation
        request.pointee.view = view
        request.pointee.offset = UInt64(offset)
        request.pointee.length = UInt64(length)
        request.pointee.fua = fua
        if operation == .read || operation == .write {
            let buffer = UnsafeMutableRawPointer.allocate(byteCount: max(1, length), alignment: 16)
            data?.withUnsafeBytes { buffer.copyMemory(from: $0.baseAddress!, byteCount: length) }
            request.pointee.buffer = buffer
        }
        onFinished[slot] = done
        volume.submit(slot)
        pump()
        return true
    }

    /// Lets one I/O take effect or complete.
    func step(_ random: inout SeededGenerator) {
        guard !pending.isEmpty else { return pump() }
        let index = random.below(pending.count)
        if !pending[index].applied {
            pending[index].errno = apply(pending[index].io, bytes: Int(pending[index].io.length))
            pending[index].applied = true
            if random.chance(50) { return }
        }
        let ended = pending.remove(at: index)
        volume.complete(ended.io, errno: ended.errno)
        pump()
    }

    private func apply(_ io: StoreIO, bytes: Int) -> Int32 {
        guard let store = stores[Int(io.file)] else { return 5 }
        let offset = Int(io.offset)
        switch store {
        case .bitmap(let bitmap):
            return skipFlushes ? 0 : bitmap.flush()
        case .bitmaps(let bitmaps):
            return skipFlushes ? 0 : bitmaps.map { $0.flush() }.max() ?? 0
        case .file(let file):
            switch io.operation {
            case .read:
                guard file.isReadable(offset, bytes) else { return 5 }
                file.cached.withUnsafeBytes { source in
                    UnsafeMutableRawBufferPointer(start: io.buffer, count: bytes).copyMemory(
                        from: UnsafeRawBufferPointer(rebasing: source[offset..<offset + bytes]))
                }
            case .write:
                let errno = file.claim(offset, bytes)
                if errno != 0 { return errno }
                file.write(offset, UnsafeRawBufferPointer(start: io.buffer, count: bytes))
            case .zero, .trim: file.zero(offset, bytes)
            case .flush: return skipFlushes ? 0 : file.flush()
            }
            if io.fua, !skipFlushes { file.flushRange(offset, bytes) }
        }
        return 0
    }

    /// The process ends: each I/O under way is done, undone or torn.
    func crash(_ random: inout SeededGenerator) {
        for pending in pending where !pending.applied {
            let modifies =
                pending.io.operation == .write || pending.io.operation == .zero || pending.io.operation == .trim
            guard modifies, random.chance(70) else { continue }
            let sectors = (Int(pending.io.length) + SimulatedFile.sector - 1) / SimulatedFile.sector
            let bytes =
                random.chance(50)
                ? Int(pending.io.length) : min(Int(pending.io.length), random.below(sectors + 1) * SimulatedFile.sector)
            _ = apply(pending.io, bytes: bytes)
        }
        for slot in onFinished.keys { volume.request(slot).pointee.buffer?.deallocate() }
        pending = []
        onFinished = [:]
    }
}
