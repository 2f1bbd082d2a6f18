// CollisionTests.swift: writes to what must still be sent of a point that is held in memory.

import Base
import Testing
import Volumes

extension Bench {
    /// Memory for so many grains' old images.
    func imageMemory(_ grains: Int) -> ImageMemory {
        let region = UnsafeMutableRawPointer.allocate(byteCount: grains * 4096, alignment: 4096)  // as long as the test
        return ImageMemory(base: region, byteCount: grains * 4096, chunkBytes: 4096 * min(grains, 2))
    }

    /// Zero, as long as the test.
    func marks() -> UnsafeMutableRawPointer {
        let bytes = HoldPlace.markBytes(volume.geometry)
        let marks = UnsafeMutableRawPointer.allocate(byteCount: bytes, alignment: 8)
        marks.initializeMemory(as: UInt8.self, repeating: 0, count: bytes)
        return marks
    }

    /// Grains 0 to 7 hold their own numbers and are written; point 1 is formed in memory.
    func formInMemory(_ memory: ImageMemory, sendsFirst: Bool = false) {
        volume.recording = true
        volume.markChanged([0..<8 * 4096])
        volume.formPoint(
            number: 1,
            in: .memory(memory, CollisionRules(sendsFirst: sendsFirst, longestWait: 500_000_000), marks: marks()))
        volume.releaseHold()
    }

    /// Answers reads of the source with each grain's number.
    func answer(_ ios: [StoreIO]) {
        for io in ios {
            if io.operation == .read, let buffer = io.buffer {
                for grain in 0..<Int(io.length) / 4096 {
                    (buffer + grain * 4096).initializeMemory(
                        as: UInt8.self, repeating: UInt8(Int(io.offset) / 4096 + grain + 1), count: 4096)
                }
            }
            volume.complete(io, errno: 0)
        }
    }

    /// The point's data of a grain, as the drain reads it.
    func pointsData(_ grain: Int) -> UInt8 {
        data.initializeMemory(as: UInt8.self, repeating: 0xEE, count: 4096)
        submit(.read, view: .point, grain: grain)
        answer(pending())
        _ = settle()
        return data.load(as: UInt8.self)
    }

    /// A read of the source, which the write waits for, and then the write.
    func overwrite(_ grain: Int, count: Int = 1) {
        submit(.write, grain: grain, count: count)
        let reads = pending()
        #expect(reads.allSatisfy { $0.operation == .read && $0.file == Volume.source })
        answer(reads)
        let writes = pending()
        #expect(writes.map(\.operation) == [.write] && writes[0].file == Volume.source, "no other file is written to")
        answer(writes)
        #expect(settle().count == 1)
    }
}

@Test("hold-image: the old image goes to memory without a write, is what the drain reads, and leaves once it was sent")
func imageHeld() {
    let bench = Bench()
    let memory = bench.imageMemory(8)
    bench.formInMemory(memory)
    bench.overwrite(3)
    #expect(memory.bytesInUse == 8192 && bench.volume.collisionFigures.heldGrains == 1)
    #expect(bench.pointsData(3) == 4)
    bench.overwrite(5, count: 2)
    bench.submit(.write, grain: 3)
    #expect(bench.pending().map(\.operation) == [.write], "the image is there: what comes later is the new one's")
    #expect([3, 4, 5, 6].map { bench.pointsData($0) } == [4, 5, 6, 7])
    bench.volume.clearOutOfSync(3..<4, point: 1)
    bench.volume.clearOutOfSync(5..<6, point: 1)
    #expect(memory.bytesInUse == 8192, "of one chunk half is in use")
    bench.volume.clearOutOfSync(6..<7, point: 1)
    #expect(memory.bytesInUse == 0 && memory.peakBytes == 16384)
}

@Test("an image's place is found, and given back, whatever others came and went")
func imagesFound() {
    var random = SystemRandomNumberGenerator()
    let bench = Bench()
    let memory = bench.imageMemory(256)
    bench.volume.recording = true
    bench.volume.markChanged([0..<200 * 4096])
    bench.volume.formPoint(number: 1, in: .memory(memory, CollisionRules(), marks: bench.marks()))
    bench.volume.releaseHold()
    var held: Set<Int> = []
    var unsent = Set(0..<200)
    for grain in (0..<200).shuffled(using: &random) {
        bench.overwrite(grain)
        held.insert(grain)
        if let sent = held.randomElement(using: &random), UInt8.random(in: 0..<2, using: &random) == 0 {
            bench.volume.clearOutOfSync(sent..<sent + 1, point: 1)
            held.remove(sent)
            unsent.remove(sent)
        }
    }
    for grain in held { #expect(bench.pointsData(grain) == UInt8(truncatingIfNeeded: grain + 1)) }
    for grain in unsent { bench.volume.clearOutOfSync(grain..<grain + 1, point: 1) }
    #expect(memory.bytesInUse == 0)
    bench.volume.endPoint(number: 1)
}

@Test("when memory is full a write waits until its grain was sent, ahead of the others, and not for longer than it may")
func memoryFull() {
    let bench = Bench()
    let memory = bench.imageMemory(2)
    bench.formInMemory(memory)
    bench.overwrite(0, count: 2)
    let waits = bench.submit(.write, grain: 4)
    bench.volume.advanceClock(to: 1_000_000_000)
    #expect(bench.pending().isEmpty && bench.volume.popEvent() == .imagesWanted && bench.volume.followsClock)
    #expect(bench.volume.nextUrgent(limit: 8) == 4..<5)
    #expect(bench.volume.nextUrgent(limit: 8) == nil)
    #expect(bench.volume.nextOutOfSync(limit: 8) == 0..<4 && bench.volume.nextOutOfSync(limit: 8) == 5..<8, "once each")
    bench.volume.advanceClock(to: 1_010_000_000)
    bench.volume.clearOutOfSync(4..<5, point: 1)
    #expect(bench.settle() == [waits] && !bench.volume.followsClock)
    let figures = bench.volume.collisionFigures
    #expect(figures.waits == 1 && (figures.waitedSeconds * 1000).rounded() == 10 && figures.counts[3] == 1)
    // Another waits in vain: it goes on, and the point does not.
    let late = bench.submit(.write, grain: 5)
    bench.volume.advanceClock(to: 2_000_000_000)
    bench.volume.advanceClock(to: 2_499_000_000)
    #expect(bench.pending().isEmpty)
    bench.volume.advanceClock(to: 2_501_000_000)
    #expect(bench.settle() == [late])
    #expect(bench.volume.popEvent() == .imagesWanted && bench.volume.popEvent() == .pointGivenUp(number: 1, errno: 105))
    #expect(bench.volume.heldPoint == nil && bench.volume.changedGrains == 8 && memory.bytesInUse == 0)
    #expect(bench.volume.collisionFigures.pointsGivenUp == 1)
}

@Test(
    "send-first: a write waits though there is memory; when that takes too long, or the link is lost, memory takes the image"
)
func sentFirst() {
    let bench = Bench()
    let memory = bench.imageMemory(8)
    bench.formInMemory(memory, sendsFirst: true)
    let first = bench.submit(.write, grain: 1, count: 2)
    bench.submit(.write, grain: 2)
    #expect(bench.pending().isEmpty && memory.bytesInUse == 0)
    #expect(
        bench.volume.nextUrgent(limit: 1) == 1..<2 && bench.volume.nextUrgent(limit: 8) == 2..<3, "no more than fits")
    bench.volume.clearOutOfSync(1..<2, point: 1)
    #expect(bench.settle().isEmpty, "half of what they wait for")
    bench.volume.clearOutOfSync(2..<3, point: 1)
    #expect(bench.settle().contains(first) && memory.bytesInUse == 0)
    let slow = bench.submit(.write, grain: 4)
    bench.volume.advanceClock(to: 1_000_000_000)
    bench.volume.advanceClock(to: 1_600_000_000)
    bench.answer(bench.pending())
    #expect(bench.settle() == [slow] && bench.pointsData(4) == 5 && memory.bytesInUse == 8192)
    bench.overwrite(5)
    #expect(bench.pointsData(5) == 6, "after one has waited in vain, others do not wait as long")
    bench.volume.clearOutOfSync(3..<4, point: 1)
    let lost = bench.submit(.write, grain: 6)
    #expect(bench.pending().isEmpty, "until something was sent")
    bench.volume.cannotSendFirst()
    bench.answer(bench.pending())
    #expect(bench.settle() == [lost] && bench.pointsData(6) == 7)
    bench.overwrite(7)
    #expect(bench.pointsData(7) == 8)
    // On a new link they wait again.
    bench.volume.rewindDrain()
    bench.submit(.write, grain: 0)
    #expect(bench.pending().isEmpty && bench.volume.nextUrgent(limit: 8) == 0..<1)
    bench.volume.rewindDrain()
    #expect(bench.volume.nextUrgent(limit: 8) == 0..<1, "it was asked for on a link that was lost")
}

@Test("send-first: what waits goes to memory when other requests wait for its room; where there is no room it waits on")
func hurried() {
    let bench = Bench()
    let memory = bench.imageMemory(2)
    bench.formInMemory(memory, sendsFirst: true)
    let waiting = (0..<4).map { bench.submit(.write, grain: $0) }
    #expect(bench.pending().isEmpty)
    bench.volume.hurryCollisions()
    bench.answer(bench.pending())
    bench.answer(bench.pending())
    #expect(Set(bench.settle()) == Set(waiting[..<2]) && memory.bytesInUse == 8192)
    bench.volume.hurryCollisions()
    #expect(
        bench.pending().isEmpty && bench.volume.heldPoint == 1,
        "the others wait for what is sent, as if there were no memory")
    #expect(bench.pointsData(0) == 1 && bench.pointsData(1) == 2)
    while let run = bench.volume.nextUrgent(limit: 1) { bench.volume.clearOutOfSync(run, point: 1) }
    #expect(Set(bench.settle()) == Set(waiting[2...]))
    #expect(bench.volume.collisionFigures.pointsGivenUp == 0)
}

@Test("clients that wait leave requests for the drain, which they wait for")
func requestsForTheDrain() {
    let bench = Bench()
    bench.formInMemory(bench.imageMemory(8), sendsFirst: true)
    var taken = 0
    while let slot = bench.volume.takeRequest() {
        taken += 1
        let request = bench.volume.request(slot)
        (request.pointee.operation, request.pointee.length, request.pointee.buffer) = (.write, 4096, bench.data)
        bench.volume.submit(slot)
    }
    #expect(
        taken == Limits.requestsPerVolume - Limits.requestsOfDrain && bench.volume.takeRequest(ofClient: false) != nil)
    var wanted = 0
    while let event = bench.volume.popEvent() { wanted += event == .imagesWanted ? 1 : 0 }
    #expect(wanted == 1, "what all of them wait for is asked for once")
    bench.volume.clearOutOfSync(0..<1, point: 1)
    #expect(bench.settle().count == taken)
}

@Test("a point that memory holds is not what the bitmaps are of: a start gives it up")
func imagesGoWithTheProcess() {
    let bench = Bench()
    bench.formInMemory(bench.imageMemory(8))
    #expect(bench.volume.heldPoint == 1 && bench.roles.heldPoint == 0)
}

@Test("what was sent while its old image was read for memory is not kept there")
func sentWhileItWasRead() {
    let bench = Bench()
    let memory = bench.imageMemory(8)
    bench.formInMemory(memory)
    bench.submit(.write, grain: 3, count: 2)
    let read = bench.pending()
    bench.volume.clearOutOfSync(3..<4, point: 1)
    bench.answer(read)
    bench.volume.clearOutOfSync(4..<5, point: 1)
    #expect(memory.bytesInUse == 0)
}

@Test("the drain is told once of what is wanted until it has read something; then of what is wanted since")
func toldOnce() {
    let bench = Bench()
    bench.formInMemory(bench.imageMemory(8), sendsFirst: true)
    for grain in 0..<5 { bench.submit(.write, grain: grain) }
    #expect(bench.volume.popEvent() == .imagesWanted && bench.volume.popEvent() == nil)
    #expect(bench.volume.nextUrgent(limit: 8) == 0..<1)
    bench.submit(.write, grain: 5)
    #expect(bench.volume.popEvent() == .imagesWanted && bench.volume.popEvent() == nil)
}
