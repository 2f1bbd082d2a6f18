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

@Test("what a copy's record means after a restart")
func resumption() {
    func record(_ state: CopyRecord.State, durable: Bool = false, complete: Bool = false) -> CopyRecord {
        var record = CopyRecord(id: 1, name: "a", createdAt: 0, order: 1, state: state)
        record.isDurable = durable
        record.isComplete = complete
        return record
    }
    func resume(_ record: CopyRecord, trusted: Bool, overtaken: Bool = false) -> (
        CopyRecord.Resumption, CopyRecord.State
    ) {
        var record = record
        return (record.resume(trusted: trusted, overtaken: overtaken), record.state)
    }
    #expect(resume(record(.active), trusted: true) == (.serves, .active))
    #expect(resume(record(.creating), trusted: true) == (.leaves, .creating))
    #expect(resume(record(.failed), trusted: true) == (.servesOlder, .failed))
    #expect(resume(record(.refreshing), trusted: true) == (.leaves, .refreshing))
    #expect(resume(record(.refreshing), trusted: true, overtaken: true) == (.absent, .lost))
    #expect(resume(record(.active), trusted: false) == (.absent, .lost))
    #expect(resume(record(.creating), trusted: false) == (.forgotten, .lost))
    #expect(resume(record(.withdrawing), trusted: false) == (.forgotten, .lost))
    #expect(resume(record(.active, durable: true), trusted: false) == (.serves, .active))
    #expect(resume(record(.active, complete: true), trusted: false) == (.serves, .active))
    #expect(resume(record(.refreshing, complete: true), trusted: false) == (.absent, .lost))
    var grown = record(.active)
    grown.completeBytes = 4096
    #expect(resume(grown, trusted: false) == (.serves, .active))
}

@Test("after power loss a copy may lack changes where clients could write to it, or to a newer one, or that is lost")
func changesAfterPowerLoss() {
    func record(_ id: CopyID, _ state: CopyRecord.State = .active, writable: Bool = false) -> CopyRecord {
        var record = CopyRecord(id: id, name: "c\(id)", createdAt: 0, order: UInt64(id), state: state)
        record.isWritable = writable
        return record
    }
    func lacking(_ chain: [CopyRecord]) -> [CopyID] { chain.filter { $0.mayLackChanges(in: chain) }.map(\.id) }
    #expect(lacking([record(1), record(2), record(3)]).isEmpty)
    #expect(lacking([record(1), record(2, writable: true), record(3)]) == [1, 2])
    #expect(lacking([record(1), record(2, .lost), record(3)]) == [1])
    #expect(lacking([record(1), record(2, .refreshing, writable: true)]) == [1, 2])
    var closed = record(2, writable: true)
    closed.allowWrites(false)
    #expect(!closed.isWritable && lacking([record(1), closed]) == [1, 2], "it was written to before")
    closed.allowWrites(false)
    #expect(lacking([record(1), closed]) == [1, 2])
    var untouched = record(2)
    untouched.allowWrites(false)
    #expect(lacking([record(1), untouched]).isEmpty)
}

@Test("what power loss took of a copy that nobody is to be told of is forgotten, also by a start after one that ended")
func forgottenCopies() {
    for state in [CopyRecord.State.creating, .withdrawing] {
        var record = CopyRecord(id: 1, name: "c", createdAt: 0, order: 1, state: state)
        #expect(record.resume(trusted: false, overtaken: false) == .forgotten)
        #expect(record.resume(trusted: false, overtaken: false) == .forgotten)
        #expect(record.resume(trusted: true, overtaken: false) == .forgotten)
    }
    var record = CopyRecord(id: 1, name: "c", createdAt: 0, order: 1, state: .active)
    #expect(record.resume(trusted: false, overtaken: false) == .absent)
    #expect(record.resume(trusted: true, overtaken: false) == .absent)
}

@Test("a copy that has failed before its record says that it is there stays failed")
func copyThatFailedBeforeItWasActive() {
    for (state, then) in [
        (CopyRecord.State.creating, CopyRecord.State.active), (.failed, .failed), (.withdrawing, .withdrawing),
    ] {
        var record = CopyRecord(id: 1, name: "copy", createdAt: 0, order: 1, state: state)
        record.beActive()
        #expect(record.state == then)
    }
}
