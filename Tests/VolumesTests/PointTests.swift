// PointTests.swift: a volume's part in a consistency point.

import Base
import Testing
import Volumes

extension Bench {
    /// Forms a point whose old content goes to file 9.
    ///
    /// - Returns: which grains are there.
    @discardableResult
    func formPoint(_ number: UInt64) -> Bitmap {
        let count = volume.geometry.grainCount
        let bits = UnsafeMutableRawPointer.allocate(byteCount: Bitmap.byteCount(bits: count), alignment: 8)
        let preserved = Bitmap(memory: bits, count: count)  // as long as the test
        preserved.clearAll()
        volume.recording = true
        volume.formPoint(number: number, in: .target(9, preserved: preserved))
        return preserved
    }
}

@Test(
    "while a write is in flight that began before a point, nothing of the source is taken for the point's at a glance")
func pointWithWritesInFlight() {
    let bench = Bench()
    bench.volume.recording = true
    bench.submit(.write, grain: 4)
    let write = bench.pending()
    bench.formPoint(1)
    bench.volume.releaseHold()
    #expect(!bench.volume.pointLiesOnSource(0..<8))
    let drain = bench.submit(.read, view: .point, grain: 4)
    #expect(bench.pending().isEmpty, "what the point has there is not decided")
    bench.volume.complete(write[0], errno: 0)
    #expect(bench.volume.pointLiesOnSource(0..<8))
    #expect(bench.pending().map(\.file) == [0])
    _ = drain
}

@Test("acknowledgements are held from the exchange of the bitmaps until all volumes have formed, and go in order")
func held() {
    let bench = Bench()
    bench.volume.recording = true
    let before = bench.submit(.write, grain: 1)
    let write = bench.pending()
    bench.formPoint(1)
    bench.volume.complete(write[0], errno: 0)
    let reading = bench.submit(.read, grain: 9)
    #expect(bench.settle() == [reading], "who reads is not held")
    bench.volume.releaseHold()
    #expect(bench.settle() == [before])
}

@Test("a write in flight across the exchange of the bitmaps counts as changed after it as well")
func markedAgain() {
    let bench = Bench()
    bench.volume.recording = true
    bench.submit(.write, grain: 3)
    let write = bench.pending()
    bench.formPoint(1)
    bench.volume.releaseHold()
    #expect(bench.volume.changedGrains == 0 && bench.volume.outOfSyncGrains == 1)
    bench.volume.complete(write[0], errno: 0)
    #expect(bench.volume.changedGrains == 1 && bench.volume.outOfSyncGrains == 1)
}

@Test("old content that the point needs goes to its target before a host's write, and only where it must still be sent")
func preservedForThePoint() {
    let bench = Bench()
    bench.volume.recording = true
    bench.submit(.write, grain: 3)
    _ = bench.settle()
    let preserved = bench.formPoint(1)
    bench.volume.releaseHold()
    bench.submit(.write, grain: 5)
    #expect(bench.pending().map(\.operation) == [.write], "nothing of it is sent")
    bench.submit(.write, grain: 3)
    let read = bench.pending()
    #expect(read.map(\.operation) == [.read] && read[0].file == 0)
    bench.volume.complete(read[0], errno: 0)
    let write = bench.pending()
    #expect(write.map(\.file) == [9] && !preserved.contains(3))
    bench.volume.complete(write[0], errno: 0)
    #expect(preserved.contains(3) && bench.pending().map(\.file) == [0])
}

@Test(
    "what was not sent of a point that is given up counts as changed, and bits move only once they are on stable storage"
)
func givenUp() {
    let bench = Bench(grains: 4096)
    bench.startActivityLog()
    bench.submit(.write, grain: 3, count: 2)
    _ = bench.settle()
    bench.formPoint(1)
    bench.volume.releaseHold()
    bench.volume.clearOutOfSync(3..<4, point: 1)
    bench.volume.clearOutOfSync(4..<5, point: 7)
    #expect(bench.volume.outOfSyncGrains == 1, "only of this very point")
    bench.volume.giveUpPoint()
    #expect(bench.volume.changedGrains == 1 && bench.volume.outOfSyncGrains == 0)
    let flush = bench.pending()
    #expect(flush.map(\.file) == [2] && bench.volume.outOfSync.contains(4) && !bench.volume.mayFormPoint)
    bench.volume.complete(flush[0], errno: 0)
    #expect(
        !bench.volume.outOfSync.contains(4) && bench.volume.changeRecording.contains(4) && bench.volume.mayFormPoint)
}

@Test(
    "a durable copy's bits are flushed before a host's write relies on them, also when a job for the point alone came in between"
)
func jobForThePointAlone() {
    let bench = Bench()
    bench.addCopyToTakeAnew()
    bench.volume.recording = true
    bench.volume.markChanged([5 * 4096..<8 * 4096])
    bench.formPoint(1)
    bench.volume.releaseHold()
    // Point and copy 1 need all three grains. One is being flushed, one has been written, one is being read when copy 3 has it as well.
    bench.submit(.write, grain: 5)
    bench.volume.complete(bench.pending()[0], errno: 0)
    for write in bench.pending() { bench.volume.complete(write, errno: 0) }
    let flush = bench.pending()
    bench.submit(.write, grain: 6)
    bench.volume.complete(bench.pending()[0], errno: 0)
    for write in bench.pending() { bench.volume.complete(write, errno: 0) }
    bench.submit(.write, grain: 7)
    let read = bench.pending()
    bench.volume.retakeCopy(2, as: bench.makeCopy(3, filled: true, durable: true, target: 4).0)
    bench.volume.complete(bench.pending()[0], errno: 0)  // the bits that copy 3 begins with
    bench.volume.complete(read[0], errno: 0)
    let write = bench.pending()
    #expect(flush.map(\.file) == [2] && read.map(\.operation) == [.read] && write.map(\.file) == [9])
    bench.volume.complete(write[0], errno: 0)
    _ = bench.pending()
    bench.volume.complete(flush[0], errno: 0)
    bench.volume.complete(bench.pending()[0], errno: 0)  // bits of the first grain
    let second = bench.pending().filter { $0.operation == .flush }
    #expect(second.map(\.file) == [2])
    bench.volume.complete(second[0], errno: 0)
    let next = bench.pending()
    #expect(
        next.map(\.operation) == [.flush] && next.map(\.file) == [3], "the bit of the second, before its host's write")
}
