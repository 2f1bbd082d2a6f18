import Base
import Testing
import Volumes

@Test("M4 a later write that overlaps one of a dead client waits until that one has ended")
func orphans() {
    let bench = Bench()
    let stale = bench.submit(.write, grain: 10, count: 4, owner: 7)
    let staleIO = bench.pending()
    #expect(staleIO.count == 1)
    bench.volume.orphanRequests(of: 7)
    let again = bench.submit(.write, grain: 12, owner: 8)
    let elsewhere = bench.submit(.write, grain: 20, owner: 8)
    let reading = bench.submit(.read, grain: 10, owner: 8)
    let issued = bench.pending()
    #expect(issued.count == 2, "only what overlaps a stale write waits")
    for io in issued { bench.volume.complete(io, errno: 0) }
    #expect([bench.volume.popFinished(), bench.volume.popFinished()] == [elsewhere, reading])
    bench.volume.complete(staleIO[0], errno: 0)
    #expect(bench.settle() == [stale, again])
}

@Test("M4 a stale write that waits for a grain to be preserved goes before its repetition")
func orphansThatWait() {
    let bench = Bench()
    bench.addCopy(5)
    let stale = bench.submit(.write, grain: 3, owner: 7)
    bench.volume.orphanRequests(of: 7)
    let again = bench.submit(.writeZeroes, grain: 3, owner: 8)
    #expect(bench.settle() == [stale, again])
}

@Test("a finished request of a dead client holds nobody up")
func finishedOrphans() {
    let bench = Bench()
    let done = bench.submit(.write, grain: 1, owner: 7)
    #expect(bench.settle() == [done])
    bench.volume.orphanRequests(of: 7)
    let next = bench.submit(.write, grain: 1, owner: 8)
    #expect(bench.settle() == [next])
}

/// Runs of `changedRun` over the whole view, as grains.
private func changes(_ bench: Bench, since base: CopyID, in view: View = .volume) -> [Range<Int>] {
    var runs: [Range<Int>] = []
    var offset: UInt64 = 0
    let size = bench.volume.geometry.size
    while offset < size {
        let run = bench.volume.changedRun(since: base, in: view, offset: offset, length: size - offset)
        #expect(run.end > offset && run.end <= size)
        if run.changed { runs.append(Int(offset / 4096)..<Int(run.end / 4096)) }
        offset = run.end
    }
    return runs
}

@Test("what changed since a copy is what was written since, also when newer copies hold it")
func changedSince() {
    let bench = Bench()
    bench.addCopy(1)
    #expect(changes(bench, since: 1) == [])
    bench.submit(.write, grain: 64, count: 65)
    bench.submit(.trim, grain: 0)
    _ = bench.settle()
    #expect(changes(bench, since: 1) == [0..<1, 64..<129])
    bench.addCopy(2)
    bench.submit(.writeZeroes, grain: 500, count: 12)
    _ = bench.settle()
    #expect(changes(bench, since: 1) == [0..<1, 64..<129, 500..<512])
    #expect(changes(bench, since: 2) == [500..<512])
    #expect(changes(bench, since: 1, in: .copy(2)) == [0..<1, 64..<129])
    #expect(changes(bench, since: 2, in: .copy(1)) == [0..<1, 64..<129], "two copies differ in the same, either way")
    #expect(changes(bench, since: 2, in: .copy(2)) == [])
    #expect(changes(bench, since: 99) == [0..<512], "without its base everything may have changed")
}

@Test("the source is as it was when a copy was taken until that, or a newer one, takes old content")
func unchangedSince() {
    let bench = Bench()
    #expect(!bench.volume.isUnchanged(since: 1), "without the copy nobody knows")
    bench.addCopy(1)
    #expect(bench.volume.isUnchanged(since: 1))
    bench.submit(.write, grain: 3)
    _ = bench.settle()
    #expect(!bench.volume.isUnchanged(since: 1))
    bench.addCopy(2)
    bench.addCopy(3)
    #expect(bench.volume.isUnchanged(since: 2))
    bench.submit(.trim, grain: 9)
    _ = bench.settle()
    #expect(!bench.volume.isUnchanged(since: 2), "the newer copy has taken what was there")
    bench.addCopy(4)
    bench.volume.withdrawCopy(4)
    #expect(!bench.volume.isUnchanged(since: 4), "a copy that leaves vouches for nothing")
}

@Test("where a copy's data lies: its own target, a newer one's, or the source")
func locations() {
    let bench = Bench()
    bench.addCopy(1)
    bench.submit(.write, grain: 0, count: 2)
    _ = bench.settle()
    bench.addCopy(2)
    bench.submit(.write, grain: 2, count: 2)
    _ = bench.settle()
    var found: [UInt32] = []
    var offset: UInt64 = 0
    while offset < 6 * 4096 {
        let location = bench.volume.location(.copy(1), offset: offset, length: 6 * 4096 - offset)!
        found += Array(repeating: location.depth, count: Int(location.end - offset) / 4096)
        offset = location.end
    }
    #expect(found == [1, 1, 2, 2, 3, 3])
    #expect(bench.volume.location(.copy(9), offset: 0, length: 4096) == nil)
}

@Test("a write in flight when a copy is taken leaves its range open until it ends")
func unsettledLocation() {
    let bench = Bench()
    bench.submit(.write, grain: 4)
    let inFlight = bench.pending()
    bench.addCopy(1)
    #expect(bench.volume.location(.copy(1), offset: 0, length: 8 * 4096)!.end == 4 * 4096)
    #expect(bench.volume.location(.copy(1), offset: 4 * 4096, length: 4096)!.unsettled)
    bench.volume.complete(inFlight[0], errno: 0)
    #expect(!bench.volume.location(.copy(1), offset: 4 * 4096, length: 4096)!.unsettled)
}

@Test("a copy that is being restored takes no writes, whoever let the client in")
func writesToWhatIsRestored() {
    let bench = Bench()
    bench.addCopy(1)
    bench.submit(.write, grain: 3)
    _ = bench.settle()
    let memory = UnsafeMutableRawPointer.allocate(byteCount: 64, alignment: 8)
    defer { memory.deallocate() }
    let pending = Bitmap(memory: memory, count: 512)
    pending.clearAll()
    pending.set(3..<4)
    bench.volume.startRestore(from: 1, pending: pending, bitmapFile: 8, paused: true)
    let slot = bench.submit(.write, view: .copy(1), grain: 3)
    #expect(bench.pending().isEmpty)
    #expect(bench.volume.popFinished() == slot && bench.volume.request(slot).pointee.error == 30)
}

@Test("a copy below a writable one hands over what clients wrote there, although power loss took the note of it")
func handsOverAfterPowerLoss() {
    let bench = Bench()
    bench.addCopy(1)
    bench.addCopy(2, filled: true)
    bench.addCopy(3)
    bench.submit(.write, view: .copy(3), grain: 1)
    _ = bench.settle()
    let left = bench.volume.copy(2)!
    #expect(left.changes.contains(1) && !bench.volume.copy(1)!.preserved.contains(1))
    // The note is in mapped memory, and the activity log knows only of writes to the volume.
    left.changes.clearAll()
    let memory = UnsafeMutableRawPointer.allocate(byteCount: 8, alignment: 8)
    defer { memory.deallocate() }
    let regions = Bitmap(memory: memory, count: 1)
    regions.setAll()  // as `CopyRecord.mayLackChanges` says, since a newer one takes writes
    bench.volume.recoverChanges(of: 2, regions: regions)
    bench.volume.withdrawCopy(2)
    _ = bench.settle()
    #expect(bench.volume.copy(2) == nil && bench.volume.copy(1)!.preserved.contains(1))
}
