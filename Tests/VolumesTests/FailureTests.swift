import Base
import Testing
import Volumes

@Test(
    "a flush of the source that failed for the activity log counts for every later flush, and nothing leaves the log any more"
)
func flushThatFailedForAnother() {
    let bench = Bench(grains: 4096)
    bench.startActivityLog()
    bench.submit(.write, grain: 1500)
    _ = bench.settle()
    bench.volume.sweepActivity()
    bench.volume.sweepActivity()
    let flushes = bench.pending()
    #expect(flushes.map(\.file).sorted() == [0, 2])
    for io in flushes { bench.volume.complete(io, errno: io.file == 0 ? 5 : 0) }
    #expect(bench.volume.popEvent() == .sourceLost(errno: 5))
    #expect(bench.volume.activeBytes == 4 << 20, "the region stays")
    bench.volume.sweepActivity()
    #expect(bench.pending().isEmpty, "a flush that succeeds would say nothing")
    let flush = bench.submit(.flush, grain: 0)
    #expect(bench.settle() == [flush])
    #expect(bench.volume.request(flush).pointee.error == 5)
}

@Test(
    "a flush that ended before an earlier one is believed once that has ended, and not if it failed",
    arguments: [Int32(0), 5])
func flushesThatOvertake(errno: Int32) {
    let bench = Bench()
    let slots = [bench.submit(.flush, grain: 0), bench.submit(.flush, grain: 0)]
    let flushes = bench.pending()
    bench.volume.complete(flushes[1], errno: 0)
    #expect(bench.volume.popFinished() == nil, "the error may have been meant for it")
    bench.volume.complete(flushes[0], errno: errno)
    #expect(Set(bench.settle()) == Set(slots))
    for slot in slots { #expect(bench.volume.request(slot).pointee.error == errno) }
}

@Test(
    "a write with FUA that failed counts like a flush, unless it was refused: then nothing of before is lost",
    arguments: [Int32(5), 30, 28, 95])
func writeThroughThatFailed(errno: Int32) {
    let bench = Bench()
    let slot = bench.volume.takeRequest()!
    let request = bench.volume.request(slot)
    request.pointee.operation = .writeZeroes
    request.pointee.length = 4096
    request.pointee.fua = true
    bench.volume.submit(slot)
    bench.volume.complete(bench.pending()[0], errno: errno)
    #expect(bench.settle() == [slot])
    #expect(bench.volume.request(slot).pointee.error == errno)
    let flush = bench.submit(.flush, grain: 0)
    #expect(bench.settle() == [flush])
    #expect(bench.volume.request(flush).pointee.error == (errno == 95 ? 0 : errno))
}

@Test("a flush during a restore has failed when either of its parts has", arguments: [Volume.source, 8])
func flushDuringARestore(failing: StoreFile) {
    let bench = Bench()
    bench.addCopy(1)
    let memory = UnsafeMutableRawPointer.allocate(byteCount: 64, alignment: 8)
    defer { memory.deallocate() }
    let pending = Bitmap(memory: memory, count: 512)
    pending.clearAll()
    bench.volume.startRestore(from: 1, pending: pending, bitmapFile: 8, paused: true)
    let slot = bench.submit(.flush, grain: 0)
    let flushes = bench.pending().sorted { one, _ in one.file == failing }
    #expect(Set(flushes.map(\.file)) == [Volume.source, 8])
    for io in flushes { bench.volume.complete(io, errno: io.file == failing ? 5 : 0) }
    #expect(bench.settle() == [slot] && bench.volume.request(slot).pointee.error == 5)
}

@Test("bits of a recording bitmap that could not be flushed are all set")
func bitsThatWereNotFlushed() {
    let bench = Bench(grains: 4096)
    bench.startActivityLog()
    bench.submit(.write, grain: 1500)
    _ = bench.settle()
    bench.volume.sweepActivity()
    bench.volume.sweepActivity()
    for io in bench.pending() { bench.volume.complete(io, errno: io.file == 2 ? 5 : 0) }
    #expect(bench.volume.changedGrains == 4096)
    #expect(bench.volume.popEvent() == .activityLogFailed(errno: 5))
}

@Test("a write whose region cannot be logged waits until that is written down elsewhere")
func logThatCannotBeWritten() {
    let bench = Bench(grains: 4096)
    bench.startActivityLog()
    let known = bench.submit(.write, grain: 1)
    #expect(bench.settle() == [known])
    bench.submit(.write, grain: 1500)
    let log = bench.pending()
    #expect(log.map(\.file) == [1])
    bench.volume.complete(log[0], errno: 5)
    #expect(bench.volume.popEvent() == .activityLogFailed(errno: 5))
    bench.submit(.write, grain: 3000)
    #expect(bench.pending().isEmpty, "neither of them is issued, nor is the log written again")
    let slot = bench.submit(.write, grain: 2)  // of a region that the log has
    #expect(bench.settle() == [slot])
    bench.volume.distrustActivityLog()
    #expect(bench.settle().count == 2)
    bench.volume.sweepActivity()
    #expect(bench.pending().isEmpty && bench.volume.popEvent() == nil)
}

@Test("a write of the log that a disk does not answer holds hosts up from one sweep to the next at most")
func logThatIsNotAnswered() {
    let bench = Bench(grains: 4096)
    bench.startActivityLog()
    for round in 0..<3 {  // a busy log is not a late one
        bench.submit(.write, grain: 1100 * round)
        let log = bench.pending()
        #expect(log.map(\.file) == [1])
        bench.volume.sweepActivity()
        #expect(bench.volume.popEvent() == nil)
        if round < 2 {
            bench.volume.complete(log[0], errno: 0)
            _ = bench.settle()
        }
    }
    bench.volume.sweepActivity()
    #expect(bench.volume.popEvent() == .activityLogFailed(errno: 110))
    bench.volume.distrustActivityLog()
    #expect(bench.settle().count == 1)
}

/// A point with something to send in grain 7 is formed and given up.
///
/// - Returns: the flush of the bitmaps, which is under way.
private func giveUpPoint(_ bench: Bench) -> [StoreIO] {
    bench.startActivityLog()
    bench.submit(.write, grain: 7)
    _ = bench.settle()
    bench.formPoint(1)
    #expect(bench.volume.outOfSyncGrains == 1)
    bench.volume.giveUpPoint()
    let flush = bench.pending()
    #expect(flush.map(\.file) == [2] && flush[0].operation == .flush)
    return flush
}

@Test("a merge whose flush failed keeps the bits until it is written down that they are not to be relied on")
func mergeThatFails() {
    let bench = Bench()
    let flush = giveUpPoint(bench)
    bench.volume.complete(flush[0], errno: 5)
    #expect(bench.volume.popEvent() == .activityLogFailed(errno: 5))
    #expect(bench.volume.outOfSync.firstSet(in: 0..<512) == 7 && !bench.volume.mayFormPoint)
    bench.volume.distrustActivityLog()
    #expect(bench.volume.outOfSync.firstSet(in: 0..<512) == nil && bench.volume.mayFormPoint)
    #expect(bench.volume.changedGrains == 512)
}

@Test(
    "a merge whose flush is under way ends with that, and not earlier: it would clear what the next point has to send")
func mergeThatIsUnderWay() {
    let bench = Bench()
    let flush = giveUpPoint(bench)
    bench.volume.distrustActivityLog()
    bench.volume.giveUpPoint()
    #expect(bench.pending().isEmpty)
    #expect(!bench.volume.mayFormPoint, "the flush is not answered")
    bench.volume.complete(flush[0], errno: 0)
    #expect(bench.volume.mayFormPoint)
    bench.formPoint(2)
    #expect(bench.volume.outOfSyncGrains == 1)
    #expect(bench.volume.outOfSync.firstSet(in: 0..<512) == 7)
}

@Test("that a durable copy has failed is flushed before the host overwrites what it lacks", arguments: [true, false])
func durableCopyThatFails(isWritten: Bool) {
    let bench = Bench()
    let mark = bench.addCopy(1, durable: true)
    let slot = bench.submit(.write, grain: 3)
    bench.volume.complete(bench.pending()[0], errno: 0)  // the old content was read
    let write = bench.pending()
    #expect(write.map(\.file) == [2])
    #expect(mark.pointee == 0)
    bench.volume.complete(write[0], errno: 28)
    #expect(mark.pointee == 1)
    let barrier = bench.pending()
    #expect(barrier.map(\.file) == [3] && barrier[0].operation == .flush, "the host's write waits for the mark")
    #expect(bench.volume.popEvent() == .copyFailed(id: 1, errno: 28))
    if isWritten {
        bench.volume.complete(barrier[0], errno: 0)
    } else {
        bench.volume.complete(barrier[0], errno: 5)
        #expect(bench.pending().isEmpty, "nor does it go on before that is written down elsewhere")
        #expect(bench.volume.popEvent() == .failureUnwritten(id: 1, errno: 5))
        bench.volume.failureIsWritten()
    }
    let host = bench.pending()
    #expect(host.map(\.file) == [0] && host[0].operation == .write)
    bench.volume.complete(host[0], errno: 0)
    #expect(bench.settle() == [slot])
}

@Test("that a durable copy has failed is flushed before a client overwrites what it lacks in a newer copy")
func durableCopyThatFailsUnderAWriteToACopy() {
    let bench = Bench()
    let mark = bench.addCopy(1, durable: true)
    bench.addCopy(2, durable: true)
    let slot = bench.submit(.write, view: .copy(2), grain: 3)
    bench.volume.complete(bench.pending()[0], errno: 0)  // what the older one needs was read
    bench.volume.complete(bench.pending()[0], errno: 28)
    #expect(mark.pointee == 1)
    let barrier = bench.pending()
    #expect(barrier.map(\.file) == [3] && barrier[0].operation == .flush, "the client's write waits for the mark")
    bench.volume.complete(barrier[0], errno: 0)
    let rest = bench.pending()
    #expect(rest.map(\.operation) == [.read], "it goes on: the rest of the grain is brought in")
    bench.volume.complete(rest[0], errno: 0)
    #expect(bench.settle() == [slot])
}

@Test("a write that comes again does not go ahead on a durable bit whose flush failed")
func bitWhoseFlushFailed() {
    let bench = Bench()
    bench.volume.policy = .copiesFirst
    bench.addCopy(1, durable: true)
    let slot = bench.submit(.write, grain: 3)
    bench.volume.complete(bench.pending()[0], errno: 0)
    bench.volume.complete(bench.pending()[0], errno: 0)
    bench.volume.complete(bench.pending()[0], errno: 0)  // the data is flushed
    let record = bench.pending()
    #expect(record.map(\.file) == [3])
    bench.volume.complete(record[0], errno: 5)
    #expect(bench.settle() == [slot])
    #expect(bench.volume.request(slot).pointee.error == 5)
    bench.submit(.write, grain: 3)
    let again = bench.pending()
    #expect(again.map(\.operation) == [.read], "the old content is preserved first")
}

@Test("who reads a copy that leaves keeps what newer ones take with them, and so does the next older one")
func readerOfACopyThatLeaves() {
    let bench = Bench()
    bench.addCopy(1)
    bench.addCopy(2)
    #expect(bench.volume.retainCopy(2))
    bench.addCopy(3)
    bench.volume.withdrawCopy(2)
    bench.submit(.write, grain: 7)
    _ = bench.settle()
    bench.addCopy(4)
    bench.volume.withdrawCopy(3)
    _ = bench.settle()
    #expect(bench.volume.copy(3) == nil && bench.volume.copy(2) != nil)
    #expect(bench.volume.location(.copy(2), offset: 7 * 4096, length: 4096)?.depth == 1, "it has the grain itself")
    bench.volume.releaseCopy(2)
    _ = bench.settle()
    #expect(bench.volume.copy(2) == nil)
    #expect(bench.volume.location(.copy(1), offset: 7 * 4096, length: 4096)?.depth == 1)
}

@Test("a copy is in use until what its durable heir has of it, for whatever reason, is on stable storage")
func heirThatIsStillFlushing() {
    let bench = Bench()
    bench.addCopyToTakeAnew()
    // Copy 1 preserves a grain, and copy 3 begins with the same one before that is flushed; so a second write does not wait.
    bench.submit(.write, grain: 5)
    for _ in 0..<2 { bench.volume.complete(bench.pending()[0], errno: 0) }  // read, written
    let flush = bench.pending()
    bench.volume.retakeCopy(2, as: bench.makeCopy(3, filled: true, durable: true, target: 4).0)
    bench.volume.complete(bench.pending()[0], errno: 0)  // the bits that copy 3 begins with
    let second = bench.submit(.write, grain: 5)
    let write = bench.pending()
    #expect(flush.map(\.file) == [2] && write.map(\.file) == [0])
    bench.volume.complete(write[0], errno: 0)
    #expect(bench.volume.popFinished() == second)
    bench.volume.complete(flush[0], errno: 0)
    let record = bench.pending()
    #expect(record.map(\.file) == [3] && bench.volume.copy(1)!.preserved.contains(5))
    while bench.volume.popEvent() != nil {}
    bench.volume.beginRefresh(3)
    bench.volume.runBackground()
    #expect(bench.volume.popEvent() == nil && !bench.volume.mayRetake(3))
    bench.volume.complete(record[0], errno: 0)
    _ = bench.settle()
    #expect(bench.volume.popEvent() == .copyReady(id: 3) && bench.volume.mayRetake(3))
}
