import Groups
import Testing

@Test("bits are cleared only for data acknowledged before the flush began")
func drainClearsBehindTheFlush() {
    var drain = Drain(MoveShape(volumes: [0], window: 2, pace: MovePace(limit: 2, checkpointBytes: 100)))
    #expect(drain.handle(.begin).count == 2)
    _ = drain.handle(.read(slot: 0, grains: 0..<1, offset: 0, length: 100))
    _ = drain.handle(.read(slot: 1, grains: 1..<2, offset: 100, length: 100))
    #expect(drain.handle(.sent(slot: 0, wire: 100)).contains(.flush(volumes: [0])))
    let late = drain.handle(.sent(slot: 1, wire: 100))
    #expect(!late.contains(.flush(volumes: [0])), "one flush at a time")
    let flushed = drain.handle(.flushed)
    #expect(flushed.first == .clear([VolumeRun(volume: 0, grains: 0..<1)]))
    #expect(flushed.contains(.flush(volumes: [0])), "the second run has a flush of its own")
    _ = drain.handle(.read(slot: 0, grains: nil, offset: 0, length: 0))
    _ = drain.handle(.read(slot: 1, grains: nil, offset: 0, length: 0))
    #expect(!drain.isDone)
    #expect(drain.handle(.flushed) == [.clear([VolumeRun(volume: 0, grains: 1..<2)])])
    #expect(drain.isDone)
}

@Test("a drain ends when a flush has ended that began after everything was acknowledged, however little that is")
func lastFlushOfADrain() {
    var drain = Drain(MoveShape(volumes: [0], window: 1, pace: MovePace(limit: 1, checkpointBytes: 1 << 20)))
    _ = drain.handle(.begin)
    _ = drain.handle(.read(slot: 0, grains: 0..<1, offset: 0, length: 100))
    #expect(drain.handle(.sent(slot: 0, wire: 100)) == [.read(slot: 0, volume: 0)])
    #expect(drain.handle(.read(slot: 0, grains: nil, offset: 0, length: 0)) == [.flush(volumes: [0])])
    #expect(!drain.isDone)
    #expect(drain.handle(.flushed) == [.clear([VolumeRun(volume: 0, grains: 0..<1)])])
    #expect(drain.isDone)
}

@Test("only volumes that have something to send are read and flushed, and a point without any is done at once")
func volumesWithoutChanges() {
    var drain = Drain(MoveShape(volumes: [3, 5], window: 3, pace: MovePace(limit: 3, checkpointBytes: 1 << 20)))
    #expect(drain.handle(.begin) == [.read(slot: 0, volume: 3), .read(slot: 1, volume: 5), .read(slot: 2, volume: 3)])
    _ = drain.handle(.read(slot: 0, grains: 0..<1, offset: 0, length: 100))
    #expect(drain.handle(.read(slot: 1, grains: nil, offset: 0, length: 0)) == [.read(slot: 1, volume: 3)])
    _ = drain.handle(.read(slot: 2, grains: nil, offset: 0, length: 0))
    _ = drain.handle(.read(slot: 1, grains: nil, offset: 0, length: 0))
    #expect(drain.handle(.sent(slot: 0, wire: 100)) == [.flush(volumes: [3])])
    var empty = Drain(MoveShape(volumes: [], window: 3, pace: MovePace(limit: 3, checkpointBytes: 1 << 20)))
    #expect(empty.handle(.begin) == [] && empty.isDone)
}

/// A drain with a slot for what hosts wait for, whose others all read.
private func busyDrain() -> Drain {
    var shape = MoveShape(volumes: [0, 1], window: 3, pace: MovePace(limit: 3, checkpointBytes: 1 << 20))
    shape.urgentSlots = 1
    var drain = Drain(shape)
    #expect(drain.handle(.begin) == [.read(slot: 0, volume: 0), .read(slot: 1, volume: 1)])
    return drain
}

@Test(
    "what hosts wait for is read though every other slot is busy, sent at once, and cleared once it is durable, without a flush"
)
func urgentReads() {
    var drain = busyDrain()
    #expect(drain.handle(.wanted(volume: 1)) == [.read(slot: 2, volume: 1)])
    #expect(
        drain.handle(.read(slot: 2, grains: 7..<8, offset: 700, length: 100, urgent: true))
            == [.send(slot: 2, volume: 1, offset: 700, length: 100, urgent: true)])
    let sent = drain.handle(.sent(slot: 2, wire: 100, durable: true))
    #expect(sent == [.clear([VolumeRun(volume: 1, grains: 7..<8)]), .read(slot: 2, volume: 1)], "there may be more")
    // There is not: what it read was its turn's.
    #expect(
        drain.handle(.read(slot: 2, grains: 0..<1, offset: 0, length: 100))
            == [.send(slot: 2, volume: 1, offset: 0, length: 100)])
    #expect(drain.handle(.sent(slot: 2, wire: 100)) == [])
}

@Test("where the remote knows no FUA, what hosts wait for is flushed at once; so is what was on its way already")
func urgentFlushes() {
    var drain = busyDrain()
    _ = drain.handle(.read(slot: 0, grains: 0..<1, offset: 0, length: 100))
    _ = drain.handle(.read(slot: 1, grains: 0..<1, offset: 0, length: 100))
    #expect(
        drain.handle(.wanted(volume: 1)) == [.hurry(volume: 1), .read(slot: 2, volume: 1)],
        "it may wait for its turn to be sent")
    #expect(drain.handle(.wanted(volume: 1)).isEmpty, "once")
    #expect(!drain.handle(.sent(slot: 0, wire: 100)).contains(.flush(volumes: [0])), "nobody waits for that")
    #expect(drain.handle(.sent(slot: 1, wire: 100)).contains(.flush(volumes: [0, 1])))
    _ = drain.handle(.read(slot: 2, grains: 5..<6, offset: 500, length: 100, urgent: true))
    _ = drain.handle(.sent(slot: 2, wire: 100))
    let flushed = drain.handle(.flushed)
    #expect(flushed.contains(.flush(volumes: [1])), "one flush at a time")
    // What was being read is sent at once.
    var reading = busyDrain()
    _ = reading.handle(.wanted(volume: 0))
    #expect(
        reading.handle(.read(slot: 0, grains: 0..<1, offset: 0, length: 100))
            == [.send(slot: 0, volume: 0, offset: 0, length: 100, urgent: true)])
    // And what was acknowledged before anybody waited.
    var other = busyDrain()
    _ = other.handle(.read(slot: 0, grains: 0..<1, offset: 0, length: 100))
    _ = other.handle(.sent(slot: 0, wire: 100))
    #expect(other.handle(.wanted(volume: 0)).contains(.flush(volumes: [0])))
}
