import Link
import Testing

/// A link of so many bytes a second and nanoseconds there and back, on which `window` bytes are always on their way.
private func carry(_ flow: inout Window, rate: Double, trip: UInt64, seconds: Double, part: Int = 64 << 10) {
    var now: UInt64 = 1_000_000_000
    let end = now + UInt64(seconds * 1e9)
    var wireFree = Double(now)
    var pending: [(due: UInt64, Window.Sending)] = []
    while now < end {
        while Double(pending.count * part) < flow.bytes {
            wireFree = max(wireFree, Double(now)) + Double(part) / rate * 1e9
            pending.append((UInt64(wireFree) + trip, flow.sending(at: now)))
        }
        let (due, sending) = pending.removeFirst()
        now = max(now, due)
        flow.acknowledged(sending, bytes: part, now: now)
    }
}

@Test("the window grows to twice what a long link holds, and no further")
func windowFollowsTheLink() {
    var flow = Window(floor: 64 << 10)
    carry(&flow, rate: 12.5e6, trip: 50_000_000, seconds: 5)
    let product = 12.5e6 * 0.05
    #expect(flow.bytes > 1.5 * product && flow.bytes < 3 * product, "\(flow.bytes)")
    #expect(flow.bytesPerSecond > 11e6 && flow.bytesPerSecond < 14e6, "\(flow.bytesPerSecond)")
    // The link becomes slower: what it could do before is forgotten.
    carry(&flow, rate: 1.25e6, trip: 50_000_000, seconds: 30)
    #expect(flow.bytesPerSecond < 2e6, "\(flow.bytesPerSecond)")
}

@Test("a token bucket lets its rate through, and no burst of what was not used long ago")
func bucketBoundsTheRate() {
    var bucket = TokenBucket(rate: 1_000_000)
    var (now, passed) = (UInt64(5_000_000_000), 0)
    let end = now + 2_000_000_000
    while now < end {
        if bucket.mayPass(now: now) {
            bucket.pass(10_000)
            passed += 10_000
        } else {
            now += bucket.wait
        }
    }
    #expect(passed >= 2_000_000 && passed <= 2_200_000, "\(passed)")
    bucket.rate = 0
    #expect(bucket.mayPass(now: now) && bucket.wait == 0)
}

@Test("a drain has no buffers that a read of an earlier one may still be written into")
func buffersOfEarlierDrains() {
    var memory = DrainMemory(window: 2, slotBytes: 4096)
    let first = memory.beginRead(epoch: 1)
    #expect(first != nil && memory.beginRead(epoch: 1) === first)
    memory.endRead()
    // The link was lost; one read of the drain before is not answered yet.
    let second = memory.beginRead(epoch: 2)
    #expect(second != nil && second !== first)
    #expect(memory.beginRead(epoch: 2) === second && memory.buffers === second)
    for _ in 0..<3 { memory.endRead() }
    #expect(memory.beginRead(epoch: 3) === second, "what nobody writes into any more is used again")
}

@Test("differing blocks become few runs, joined across the narrowest gaps")
func differingBlocksBecomeRuns() {
    let (size, block) = (16, Comparison.block)
    func digests(_ different: Set<Int>) -> [UInt8] {
        (0..<64).flatMap { Array(repeating: UInt8(different.contains($0) ? 1 : 0), count: size) }
    }
    let same = digests([])
    #expect(Sender.differing(same, same, 64 * block, runs: 8).isEmpty)
    #expect(Sender.differing(digests([0, 1, 5]), same, 64 * block, runs: 8) == [0..<2 * block, 5 * block..<6 * block])
    #expect(Sender.differing(digests([63]), same, 63 * block + 100, runs: 8) == [63 * block..<63 * block + 100])
    let joined = Sender.differing(digests([0, 10, 12, 30]), same, 64 * block, runs: 3)
    #expect(joined == [0..<block, 10 * block..<13 * block, 30 * block..<31 * block])
}

/// When the last of `bytes` passes, in milliseconds, in parts of 4 KiB, all of which are there from the start.
private func spread(_ spread: inout Spread, point: UInt64, bytes: Int, from start: UInt64 = 1_000_000_000) -> Double {
    var (now, left, longest) = (start, bytes, 0)
    spread.sends(point: point, now: start)
    while left > 0 {
        var together = 0
        while left > 0, spread.mayPass(now: now) {
            spread.pass(4096)
            together += 4096
            left -= 4096
        }
        longest = max(longest, together)
        now += left > 0 ? max(1_000_000, spread.wait(now: now)) : 0
    }
    if point == 2 { #expect(longest <= bytes / 8, "\(longest) of \(bytes) at once") }
    return Double(now - start) / 1e6
}

@Test(
    "a point like the last one is sent over some milliseconds, little at once; a small one at once, a large one hardly later"
)
func pointsAreSpread() {
    var spreading = Spread()
    _ = spread(&spreading, point: 1, bytes: 2 << 20)
    let alike = spread(&spreading, point: 2, bytes: 2 << 20)
    #expect(alike > 20 && alike < 27, "\(alike)")
    #expect(spread(&spreading, point: 3, bytes: 32 << 10) == 0)
    // A hundred times as much as was expected.
    _ = spread(&spreading, point: 4, bytes: 1 << 20)
    let large = spread(&spreading, point: 5, bytes: 100 << 20)
    #expect(large < 55, "\(large)")
    // The same point over a new link has waited already.
    spreading.sends(point: 5, now: 10_000_000_000)
    #expect(spreading.mayPass(now: 10_000_000_000))
}
