import NBDProtocol
import Testing

private let export = ExportLimits(size: 1 << 20, readOnly: false, maximumPayload: 32 << 20)

private func header(_ type: UInt16, _ offset: UInt64, _ length: UInt32, flags: UInt16 = 0) -> RequestHeader {
    var bytes: [UInt8] = []
    bytes.appendBigEndian(NBD_REQUEST_MAGIC)
    bytes.appendBigEndian(flags)
    bytes.appendBigEndian(type)
    bytes.appendBigEndian(UInt64(0xC00C1E))
    bytes.appendBigEndian(offset)
    bytes.appendBigEndian(length)
    return bytes.withUnsafeBytes { RequestHeader($0.baseAddress!, style: .simple)! }
}

private func error(_ header: RequestHeader, _ limits: ExportLimits = export) -> NBDError? {
    if case .failure(let error) = header.validate(for: limits) { error } else { nil }
}

@Test("the header's fields stand where the document puts them")
func layout() {
    let parsed = header(6, 0x1122_3344_5566_7788, 0x99AA_BBCC, flags: 3)
    #expect(parsed.type == 6 && parsed.flags == 3 && parsed.cookie == 0xC00C1E)
    #expect(parsed.offset == 0x1122_3344_5566_7788 && parsed.length == 0x99AA_BBCC)
    #expect(header(1, 0, 77).payloadLength == 77 && header(0, 0, 77).payloadLength == 0)
}

@Test("G5 ranges are checked without overflow; writes past the end are ENOSPC, the rest EINVAL")
func ranges() {
    for (offset, length) in [(UInt64.max, 1), (1 << 20, 1), ((1 << 20) - 1, 2), (1 << 63, UInt32.max)]
        as [(UInt64, UInt32)]
    {
        #expect(error(header(0, offset, length)) == .invalid)
        #expect(error(header(4, offset, length)) == .invalid)
        #expect(error(header(6, offset, length)) == .noSpace)
    }
    #expect(error(header(1, UInt64.max, 1)) == .noSpace)
    #expect(error(header(0, 1 << 20, 0)) == nil)
    #expect(error(header(0, 0, 1 << 20)) == nil)
    let large = ExportLimits(size: 1 << 30, readOnly: false, maximumPayload: 1 << 20)
    for type: UInt16 in [0, 1] {
        #expect(error(header(type, 0, 1 << 20), large) == nil)
        #expect(error(header(type, 0, (1 << 20) + 1), large) == .invalid, "more than memory is taken for")
    }
    for type: UInt16 in [4, 6] { #expect(error(header(type, 0, 1 << 30), large) == nil, "no payload") }
}

@Test("G4 flags belong to commands; FUA to all")
func flags() {
    for type: UInt16 in [0, 1, 3, 4, 5, 6] { #expect(error(header(type, 0, 0, flags: 1)) == nil) }
    for type: UInt16 in [0, 1, 3, 4] { #expect(error(header(type, 0, 0, flags: 2)) == .invalid) }
    #expect(error(header(6, 0, 0, flags: 3)) == nil)
    for bit: UInt16 in [2, 3, 5, 6, 7, 15] { #expect(error(header(6, 0, 0, flags: 1 << bit)) == .invalid) }
}

@Test("G3, G6 unknown commands are EINVAL, a read-only export answers EPERM before anything else")
func commands() {
    #expect(error(header(8, 0, 0)) == .invalid)
    let readOnly = ExportLimits(size: 1 << 20, readOnly: true, maximumPayload: 1 << 20)
    for type: UInt16 in [1, 4, 6] {
        #expect(error(header(type, UInt64.max, 1, flags: 0xFFF0), readOnly) == .notPermitted)
    }
    #expect(error(header(3, 0, 0), readOnly) == nil)
}

@Test("J1 only the document's errors reach the wire")
func errnos() {
    #expect(NBDError(errno: 30) == .notPermitted && NBDError(errno: 122) == .noSpace && NBDError(errno: 27) == .noSpace)
    #expect(NBDError(errno: 5) == .inputOutput && NBDError(errno: 71) == .inputOutput)
}
