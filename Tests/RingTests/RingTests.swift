import Glibc
import Ring
import Testing

private func temporaryFile() throws -> OpenFile {
    var template = Array("/tmp/farcopy-ring-XXXXXX".utf8CString)
    let descriptor = mkstemp(&template)
    unlink(template)
    return OpenFile(descriptor: descriptor, path: "temporary file")
}

@Test("what is written through a ring is read back, each completion once")
func writeAndRead() throws {
    let file = try temporaryFile()
    var ring = try Ring(entryCount: 8)
    let buffer = UnsafeMutableRawPointer.allocate(byteCount: 4096 * 32, alignment: 4096)
    let completions = UnsafeMutablePointer<Completion>.allocate(capacity: 64)
    defer {
        buffer.deallocate()
        completions.deallocate()
    }
    for index in 0..<32 {
        buffer.advanced(by: index * 4096).initializeMemory(as: UInt8.self, repeating: UInt8(index), count: 4096)
        // More than the submission queue holds: it is handed over as it fills.
        ring.write(
            file.descriptor, buffer + index * 4096, 4096, at: UInt64(index) * 4096, durable: index % 5 == 0,
            UserData(kind: 1, generation: 7, slot: UInt32(index)))
    }
    var seen: Set<UInt32> = []
    while seen.count < 32 {
        ring.submitAndWait(milliseconds: 1000)
        for index in 0..<ring.reap(into: completions, capacity: 64) {
            #expect(completions[index].result == 4096 && completions[index].userData.generation == 7)
            #expect(seen.insert(completions[index].userData.slot).inserted)
        }
    }
    #expect(ring.inFlight == 0)
    #expect(try file.readAll() == (0..<32).flatMap { Array(repeating: UInt8($0), count: 4096) })
}

@Test("a wait ends by itself when nothing happens")
func timeout() throws {
    var ring = try Ring(entryCount: 8)
    ring.submitAndWait(milliseconds: 10)
    let completions = UnsafeMutablePointer<Completion>.allocate(capacity: 1)
    defer { completions.deallocate() }
    #expect(ring.reap(into: completions, capacity: 1) == 0)
}

@Test("messages of many threads arrive once each, in each sender's order; a full mailbox says so")
func mailbox() throws {
    let mailbox = try Mailbox<Int>(capacity: 1 << 20)
    for sender in 0..<4 {
        startThread(name: "sender") { for number in 0..<1000 { mailbox.send(sender * 1000 + number) } }
    }
    var received: [Int] = []
    var entry = pollfd(fd: mailbox.eventDescriptor, events: Int16(POLLIN), revents: 0)
    while received.count < 4000 {
        #expect(poll(&entry, 1, 10_000) == 1)
        received += mailbox.drain()
    }
    for sender in 0..<4 { #expect(received.filter { $0 / 1000 == sender } == (0..<1000).map { sender * 1000 + $0 }) }
    let small = try Mailbox<Int>(capacity: 1)
    #expect(small.send(1) && !small.send(2))
}

@Test("a mapping of another size than the file is refused")
func mapping() throws {
    let path = "/tmp/farcopy-map-\(getpid())"
    defer { unlink(path) }
    let mapping = try MappedFile(path: path, byteCount: 8192, create: true)
    mapping.memory.storeBytes(of: 0xAB, toByteOffset: 8191, as: UInt8.self)
    #expect(try mapping.file.open().readAll().last == 0xAB)
    #expect(throws: SystemError.self) { try MappedFile(path: path, byteCount: 4096, create: false) }
}

@Test("a flush that failed is known to the next process that maps the file, until one succeeds")
func failedFlush() throws {
    let path = "/tmp/farcopy-flush-\(getpid())"
    defer { unlink(path) }
    func mark() throws -> UInt8 { try OpenFile(path: path, flags: O_RDONLY).read(at: 152, count: 1)[0] }
    let mapping = try MappedFile(path: path, byteCount: 8192, create: true, markOffset: 152)
    mapping.memory.storeBytes(of: 7, toByteOffset: 5000, as: UInt8.self)
    mapping.flushFailed()
    #expect(try mark() == 1)
    let next = try MappedFile(path: path, byteCount: 8192, create: false, markOffset: 152)
    try next.synchronize()
    #expect(try mark() == 0)
    #expect(next.memory.load(fromByteOffset: 5000, as: UInt8.self) == 7)
}

@Test("what cannot be looked at is not missing")
func existence() throws {
    let path = "/tmp/farcopy-exists-\(getpid())"
    defer { unlink(path) }
    #expect(try !exists(path))
    #expect(symlink(path, path) == 0)
    #expect(throws: SystemError.self) { try exists(path) }
    #expect(try exists("/tmp") && !exists("/etc/passwd/below"))
}

@Test("a store that the file does not take is made in memory, and no flush of the mapping succeeds from then on")
func storesThatTheFileDoesNotTake() throws {
    let path = "/tmp/farcopy-guarded-\(getpid())"
    defer { unlink(path) }
    let mapping = try MappedFile(path: path, byteCount: 12288, create: true)
    let other = try MappedFile(path: path + ".other", byteCount: 8192, create: true)
    defer { unlink(path + ".other") }
    (mapping.memory + 100).storeBytes(of: 7, as: UInt8.self)
    try mapping.synchronize()
    #expect(!mapping.isLost)
    try mapping.file.open().truncate(to: 4096)  // what lies behind has no page any more
    (mapping.memory + 5000).storeBytes(of: 9, as: UInt8.self)
    #expect(mapping.isLost && !other.isLost)
    #expect(mapping.memory.load(fromByteOffset: 5000, as: UInt8.self) == 9)
    #expect(mapping.memory.load(fromByteOffset: 100, as: UInt8.self) == 7)
    #expect(
        mapping.memory.load(fromByteOffset: 5001, as: UInt8.self) == 0xFF, "of what cannot be read the worst is assumed"
    )
    #expect(throws: SystemError.self) { try mapping.synchronize() }
    try other.synchronize()
}
