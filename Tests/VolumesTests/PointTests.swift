// PointTests.swift: a volume's part in a consistency point.

import Base
import Testing
import Volumes

extension Bench {
    /// Forms a point whose old content goes to file 9.
    ///
    /// - Returns: which grains are there.
    @discardableResult
    fileprivate func formPoint(_ number: UInt64) -> Bitmap {
        let count = volume.geometry.grainCount
        let bits = UnsafeMutableRawPointer.allocate(byteCount: Bitmap.byteCount(bits: count), alignment: 8)
        let preserved = Bitmap(memory: bits, count: count)  // as long as the test
        preserved.clearAll()
        volume.recording = true
        volume.formPoint(number: number, targetFile: 9, preserved: preserved)
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
