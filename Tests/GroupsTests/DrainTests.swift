import Groups
import Testing

@Test("bits are cleared only for data acknowledged before the flush began")
func drainClearsBehindTheFlush() {
    var drain = Drain(volumes: 1, window: 2, checkpointBytes: 100)
    #expect(drain.start().count == 2)
    _ = drain.didRead(slot: 0, grains: 0..<1, offset: 0, length: 100)
    _ = drain.didRead(slot: 1, grains: 1..<2, offset: 100, length: 100)
    #expect(drain.didSend(slot: 0, wire: 100).contains(.flush))
    let late = drain.didSend(slot: 1, wire: 100)
    #expect(!late.contains(.flush), "one flush at a time")
    let flushed = drain.didFlush()
    #expect(flushed.first == .clear([VolumeRun(volume: 0, grains: 0..<1)]))
    #expect(flushed.contains(.flush), "the second run has a flush of its own")
    _ = drain.didRead(slot: 0, grains: nil, offset: 0, length: 0)
    _ = drain.didRead(slot: 1, grains: nil, offset: 0, length: 0)
    #expect(drain.didFlush() == [.clear([VolumeRun(volume: 0, grains: 1..<2)]), .finished])
}

@Test("a drain ends when a flush has ended that began after everything was acknowledged, however little that is")
func lastFlushOfADrain() {
    var drain = Drain(volumes: 1, window: 1, checkpointBytes: 1 << 20)
    _ = drain.start()
    _ = drain.didRead(slot: 0, grains: 0..<1, offset: 0, length: 100)
    #expect(drain.didSend(slot: 0, wire: 100) == [.read(slot: 0, volume: 0)])
    #expect(drain.didRead(slot: 0, grains: nil, offset: 0, length: 0) == [.flush])
    #expect(drain.didFlush() == [.clear([VolumeRun(volume: 0, grains: 0..<1)]), .finished])
}
