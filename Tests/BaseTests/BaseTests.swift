import Base
import Testing

@Test("limits hold their relations")
func limits() { Limits.validate() }

@Test("CRC-32C of the check string of RFC 3720")
func crc32c() {
    #expect(CRC32C.checksum(Array("123456789".utf8)) == 0xE306_9283)
}

@Test("a fixed queue is first-in first-out across its wrap")
func fixedQueue() {
    var queue = FixedQueue<Int>(capacity: 3)  // rounded up to 4
    var taken: [Int] = []
    for round in 0..<10 {
        while queue.tryAppend(round * 10 + queue.count) {}
        while let value = queue.popFirst() { taken.append(value) }
    }
    #expect(taken.count == 40)
    #expect(taken.prefix(5) == [0, 1, 2, 3, 10])
}
