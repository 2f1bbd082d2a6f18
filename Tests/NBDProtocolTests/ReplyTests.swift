import NBDProtocol
import Testing

private func word<T: FixedWidthInteger>(_ type: T.Type, _ bytes: ArraySlice<UInt8>) -> T {
    bytes.prefix(T.bitWidth / 8).reduce(0) { $0 << 8 | T($1) }
}

/// The bytes that an encoder wrote.
private func written(_ body: (UnsafeMutableRawPointer) -> Int) -> [UInt8] {
    var bytes = [UInt8](repeating: 0xEE, count: 4096)
    let count = bytes.withUnsafeMutableBytes { body($0.baseAddress!) }
    #expect(bytes[count] == 0xEE, "nothing is written behind the end")
    return Array(bytes[..<count])
}

@Test("I2 structured chunks", arguments: [ReplyStyle.structured, .extended])
func chunks(style: ReplyStyle) {
    let chunk = ReplyChunk(style: style, cookie: 0xC0, offset: 0x55)
    let header = style == .extended ? 32 : 20
    let data = written { chunk.encodeData(at: 9, count: 100, done: false, into: $0) }
    #expect(data.count == header + 8)
    #expect(
        word(UInt32.self, data[0...]) == (style == .extended ? NBD_EXTENDED_REPLY_MAGIC : NBD_STRUCTURED_REPLY_MAGIC))
    #expect(word(UInt16.self, data[4...]) == 0 && word(UInt16.self, data[6...]) == NBD_REPLY_TYPE_OFFSET_DATA)
    #expect(word(UInt64.self, data[8...]) == 0xC0)
    if style == .extended {
        #expect(word(UInt64.self, data[16...]) == 0x55 && word(UInt64.self, data[24...]) == 108)
    } else {
        #expect(word(UInt32.self, data[16...]) == 108)
    }
    let hole = written { chunk.encodeHole(at: 7, count: 4096, done: true, into: $0) }
    #expect(word(UInt16.self, hole[4...]) == NBD_REPLY_FLAG_DONE && hole.count == header + 12)
    #expect(word(UInt32.self, hole[(header + 8)...]) == 4096)
    let error = written { chunk.encodeError(.noSpace, into: $0) }
    #expect(word(UInt32.self, error[header...]) == 28)
    #expect(Int(word(UInt16.self, error[(header + 4)...])) == error.count - header - 6)
    #expect(String(validating: error[(header + 6)...], as: UTF8.self)!.contains("space"))
    #expect(error.count <= ReplyChunk.maximumErrorByteCount)
}

@Test("H8.5 equal neighbours are one descriptor, empty extents none, and a full chunk says so")
func statusChunk() {
    let chunk = ReplyChunk(style: .structured, cookie: 1, offset: 0)
    let bytes = written { memory in
        var status = BlockStatusChunk(memory: memory, capacity: 2, chunk: chunk, context: 5)
        var fits: [Bool] = []
        for (length, flags) in [(10, 3), (0, 0), (5, 3), (7, 0), (1, 3)] as [(UInt64, UInt32)] {
            fits.append(status.append(length: length, flags: flags))
        }
        #expect(fits == [true, true, true, true, false], "there is no third descriptor")
        return status.finish(done: true)
    }
    #expect(word(UInt32.self, bytes[16...]) == 20 && word(UInt32.self, bytes[20...]) == 5)
    #expect([24, 28, 32, 36].map { word(UInt32.self, bytes[$0...]) } == [15, 3, 7, 0])
    let extended = written { memory in
        var status = BlockStatusChunk(
            memory: memory, capacity: 1, chunk: ReplyChunk(style: .extended, cookie: 1, offset: 0), context: 5)
        let fits = status.append(length: 1 << 40, flags: 1)
        #expect(fits)
        return status.finish(done: false)
    }
    #expect(word(UInt32.self, extended[36...]) == 1 && word(UInt64.self, extended[40...]) == 1 << 40)
    #expect(extended.count <= BlockStatusChunk.byteCount(descriptors: 1))
}

@Test("P2 a payload is announced by WRITE or by its flag, and thrown away where the command has none")
func extendedPayloads() {
    func header(_ type: UInt16, _ flags: UInt16, _ length: UInt64) -> RequestHeader {
        var bytes: [UInt8] = []
        bytes.appendBigEndian(NBD_EXTENDED_REQUEST_MAGIC)
        bytes.appendBigEndian(flags)
        bytes.appendBigEndian(type)
        bytes.appendBigEndian(UInt64(1))
        bytes.appendBigEndian(UInt64(0))
        bytes.appendBigEndian(length)
        return bytes.withUnsafeBytes { RequestHeader($0.baseAddress!, style: .extended)! }
    }
    let limits = ExportLimits(size: 1 << 40, readOnly: false, maximumPayload: 32 << 20, style: .extended)
    #expect(header(1, 32, 512).payloadLength == 512 && header(1, 0, 512).payloadLength == 512)
    #expect(header(3, 32, 9).payloadLength == 9 && header(4, 0, 1 << 39).payloadLength == 0)
    guard case .failure(.invalid) = header(3, 32, 9).validate(for: limits),
        case .success(.trim) = header(4, 0, 1 << 39).validate(for: limits),
        case .failure(.overflow) = header(0, 0, 33 << 20).validate(for: limits),
        case .failure(.invalid) = header(7, 0, 512).validate(for: limits)
    else {
        Issue.record("validation of extended requests")
        return
    }
}
