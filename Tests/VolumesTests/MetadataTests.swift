import Base
import Testing
import Volumes

private let largeGeometry = Geometry(size: 64 << 30, grain: 4096)!

@Test("CRC-32C of RFC 3720, and of pieces as of the whole")
func checksum() {
    #expect(CRC32C.checksum(Array("123456789".utf8)) == 0xE306_9283)
    #expect(CRC32C.checksum([UInt8](repeating: 0, count: 32)) == 0x8A91_36AA)
    let bytes = (0..<1000).map { UInt8(truncatingIfNeeded: $0 &* 7) }
    let first = bytes[..<333].withUnsafeBytes { CRC32C.checksum($0) }
    #expect(bytes[333...].withUnsafeBytes { CRC32C.checksum($0, after: first) } == CRC32C.checksum(bytes))
}

@Test("a bitmap file's header says whose it is, and no damage goes unseen")
func header() throws {
    let header = BitmapHeader(.copy, volume: (7, 8), geometry: largeGeometry, copy: 1 << 62, bitmaps: 2)
    let bytes = header.encoded
    #expect(try bytes.withUnsafeBytes { bytes throws(BitmapHeader.Fault) in try BitmapHeader(bytes) } == header)
    #expect(header.fileBytes == 4096 + 2 * (2 << 20))
    for index in bytes.indices {
        var damaged = bytes
        damaged[index] ^= 0x10
        #expect(throws: BitmapHeader.Fault.damaged) {
            try damaged.withUnsafeBytes { bytes throws(BitmapHeader.Fault) in try BitmapHeader(bytes) }
        }
    }
}

@Test("a bitmap file of a newer format is not taken for one of this format")
func newerHeader() {
    var bytes = BitmapHeader(.recording, volume: (7, 8), geometry: largeGeometry, bitmaps: 2).encoded
    bytes[8] += 1
    let checksum = CRC32C.checksum(Array(bytes[..<64]))
    for index in 0..<4 { bytes[64 + index] = UInt8(truncatingIfNeeded: checksum >> UInt32(8 * index)) }
    #expect(throws: BitmapHeader.Fault.newer(format: 2)) {
        try bytes.withUnsafeBytes { bytes throws(BitmapHeader.Fault) in try BitmapHeader(bytes) }
    }
}

/// An activity log's bytes, and what is decoded from them.
private func decode(_ bytes: [UInt8], count: Int) -> (set: [Int], damaged: Int) {
    let memory = UnsafeMutableRawPointer.allocate(byteCount: Bitmap.byteCount(bits: count), alignment: 8)
    defer { memory.deallocate() }
    memory.initializeMemory(as: UInt8.self, repeating: 0, count: Bitmap.byteCount(bits: count))
    let regions = Bitmap(memory: memory, count: count)
    let damaged = bytes.withUnsafeBytes { ActivityLog.decode($0, into: regions) }
    return ((0..<count).filter { regions.contains($0) }, damaged)
}

@Test("a write waits until its region is in the activity log, and later ones to it do not")
func activityLog() {
    let bench = Bench(grains: 4096)
    bench.startActivityLog()
    let slot = bench.submit(.write, grain: 1500)
    let log = bench.pending()
    #expect(log.count == 1 && log[0].file == 1 && log[0].fua && log[0].offset == 4096)
    let bytes = Array(UnsafeRawBufferPointer(start: log[0].buffer, count: Int(log[0].length)))
    #expect(decode(bytes, count: 4).set == [1], "1500 grains of 4 KiB lie in the second region of 4 MiB")
    let other = bench.submit(.write, grain: 3)
    #expect(bench.pending().isEmpty, "one write of the log at a time")
    bench.volume.complete(log[0], errno: 0)
    let next = bench.pending()
    #expect(next.map(\.file).sorted() == [0, 1], "the first write goes, and the log again")
    for io in next { bench.volume.complete(io, errno: 0) }
    #expect(Set(bench.settle()) == [slot, other])
    bench.submit(.write, grain: 1501)
    #expect(bench.pending().map(\.file) == [0])
}

@Test("a region leaves the log after two sweeps without a write, once data and bitmaps are flushed")
func activityLeaves() {
    let bench = Bench(grains: 4096)
    bench.startActivityLog()
    bench.submit(.write, grain: 10)
    _ = bench.settle()
    #expect(bench.volume.activeBytes == 4 << 20)
    bench.volume.sweepActivity()
    #expect(bench.pending().isEmpty, "it was written to since the last sweep")
    bench.volume.sweepActivity()
    let flushes = bench.pending()
    #expect(flushes.map(\.operation) == [.flush, .flush] && Set(flushes.map(\.file)) == [0, 2])
    bench.volume.complete(flushes[0], errno: 0)
    #expect(bench.volume.activeBytes == 4 << 20)
    bench.volume.complete(flushes[1], errno: 0)
    #expect(bench.volume.activeBytes == 0)
}

@Test("a region to which a write is in flight stays in the log, however many sweeps come")
func activityOfWritesInFlight() {
    let bench = Bench(grains: 4096)
    bench.startActivityLog()
    bench.submit(.write, grain: 10)
    bench.volume.complete(bench.pending()[0], errno: 0)  // the log's
    let write = bench.pending()
    #expect(write.map(\.file) == [0])
    for _ in 0..<4 { bench.volume.sweepActivity() }
    #expect(bench.pending().isEmpty && bench.volume.activeBytes == 4 << 20)
    bench.volume.complete(write[0], errno: 0)
    for _ in 0..<2 { bench.volume.sweepActivity() }
    #expect(bench.pending().map(\.operation) == [.flush, .flush])
}

@Test("a region to which something is written while its bits are flushed stays in the log")
func activityWhileFlushing() {
    let bench = Bench(grains: 4096)
    bench.startActivityLog()
    bench.submit(.write, grain: 10)
    _ = bench.settle()
    for _ in 0..<2 { bench.volume.sweepActivity() }
    let flushes = bench.pending()
    bench.submit(.write, grain: 11)
    #expect(bench.pending().map(\.file) == [0])
    for io in flushes { bench.volume.complete(io, errno: 0) }
    #expect(bench.volume.activeBytes == 4 << 20)
}

@Test("damaged sectors of the log count as all set, untouched ones as empty")
func damagedLog() {
    let count = 3968 + 100
    #expect(decode([UInt8](repeating: 0, count: 1024), count: count).set.isEmpty)
    var torn = [UInt8](repeating: 0, count: 1024)
    torn[600] = 1
    let found = decode(torn, count: count)
    #expect(found.damaged == 1 && found.set == Array(3968..<count))
    #expect(decode([], count: count).set.count == count, "a log that is cut short says nothing")
}
