import NBDProtocol
import Testing

private struct OneExport: ExportCatalog {
    func exportNames() -> [String] { ["disk"] }
    func describe(export name: String) -> ExportLookup {
        switch name {
        case "disk":
            .found(
                ExportDescription(
                    name: name, text: "a disk", size: 4096, flags: [.hasFlags],
                    contexts: [
                        "base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b",
                    ]))
        case "private": .needsTLS
        default: .unknown
        }
    }
}

private func option(_ number: UInt32, _ data: [UInt8] = []) -> [UInt8] {
    var bytes: [UInt8] = []
    bytes.appendBigEndian(IHAVEOPT)
    bytes.appendBigEndian(number)
    bytes.appendBigEndian(UInt32(data.count))
    return bytes + data
}

private let clientFlags: [UInt8] = [0, 0, 0, 3]
private let go: [UInt8] = [0, 0, 0, 4] + Array("disk".utf8) + [0, 0]

/// Replies as (option, type) pairs, and what else happened.
private func feed(
    _ bytes: [UInt8], pieces: Int = .max, tls: TLSPolicy = .off
) -> (replies: [UInt32], started: Bool, closed: Bool, unread: Int) {
    var machine = Handshake(tls: tls)
    var output: [UInt8] = []
    var started = false
    var closed = false
    var rest = bytes[...]
    while !rest.isEmpty, !started, !closed {
        let piece = Array(rest.prefix(pieces))
        rest = rest.dropFirst(piece.count)
        for action in piece.withUnsafeBytes({ machine.receive($0, catalog: OneExport()) }) {
            switch action {
            case .send(let sent): output += sent
            case .start: started = true
            case .close: closed = true
            case .startTLS: break
            }
        }
    }
    var types: [UInt32] = []
    var at = 0
    while at + 20 <= output.count {
        func word(_ offset: Int) -> UInt32 { output[at + offset..<at + offset + 4].reduce(0) { $0 << 8 | UInt32($1) } }
        types.append(word(12))
        at += 20 + Int(word(16))
    }
    return (types, started, closed, machine.unread.count + rest.count)
}

@Test(
    "B3 unknown option: payload skipped, ERR_UNSUP, next option still parsed, however the bytes are cut",
    arguments: [1, 3, 7, 1000])
func unknownOption(pieces: Int) {
    let result = feed(
        clientFlags + option(0x765_4321, [1, 2, 3, 4]) + option(NBD_OPT_GO, go) + [9, 9], pieces: pieces)
    #expect(result.replies == [NBD_REP_ERR_UNSUP, NBD_REP_INFO, NBD_REP_ACK])
    #expect(result.started)
    #expect(result.unread == 2, "what follows belongs to the transmission phase")
}

@Test("C6.1 inconsistent lengths of INFO are invalid and the session stays in step")
func malformedInfo() {
    let malformed: [[UInt8]] = [[], [0, 0, 0, 9, 1, 2], go + [1], [255, 255, 255, 255, 0, 0], [0, 0, 0, 1, 0, 0, 0]]
    let bytes = malformed.flatMap { option(NBD_OPT_INFO, $0) } + option(NBD_OPT_ABORT)
    let result = feed(clientFlags + bytes)
    #expect(result.replies == Array(repeating: NBD_REP_ERR_INVALID, count: malformed.count) + [NBD_REP_ACK])
    #expect(result.closed)
}

@Test("A3 unknown client flags, and B1 wrong magic, end the connection")
func violations() {
    #expect(feed([0, 0, 0, 4]).closed)
    #expect(feed(clientFlags + Array(repeating: 7, count: 16)).closed)
}

@Test("H2 a claimed length takes no memory: too long is skipped, absurd ends the connection")
func hugeOptions() {
    var claimed = option(NBD_OPT_GO)
    claimed.replaceSubrange(12..<16, with: [255, 255, 255, 255])
    #expect(feed(clientFlags + claimed).closed)
    let skipped = feed(clientFlags + option(NBD_OPT_INFO, Array(repeating: 0, count: 100_000)) + option(NBD_OPT_ABORT))
    #expect(skipped.replies == [NBD_REP_ERR_TOO_BIG, NBD_REP_ACK])
}

@Test("A5 without fixed newstyle only EXPORT_NAME is spoken")
func oldClient() {
    #expect(feed([0, 0, 0, 0] + option(NBD_OPT_LIST)).closed)
    #expect(feed([0, 0, 0, 0] + option(NBD_OPT_EXPORT_NAME, Array("disk".utf8))).started)
}

@Test("random bytes never start a transmission and never trap")
func noise() {
    var generator = SystemRandomNumberGenerator()
    for _ in 0..<2000 {
        var bytes =
            clientFlags
            + option(
                UInt32.random(in: 0...12),
                (0..<Int.random(in: 0...40)).map { _ in UInt8.random(in: 0...255, using: &generator) })
        if Bool.random() { bytes[Int.random(in: 0..<bytes.count)] ^= UInt8.random(in: 1...255) }
        #expect(!feed(bytes, pieces: Int.random(in: 1...50)).started)
    }
}

@Test("E3 where TLS is required every option but STARTTLS and ABORT waits for it")
func forcedTLS() {
    var options = (0...12).filter { ![1, 2, 5].contains($0) }.map { option(UInt32($0)) }.flatMap { $0 }
    options += option(0x765_4321, [1, 2, 3]) + option(NBD_OPT_ABORT)
    let result = feed(clientFlags + options, tls: .require)
    #expect(result.replies == Array(repeating: NBD_REP_ERR_TLS_REQD, count: 11) + [NBD_REP_ACK])
    #expect(feed(clientFlags + option(NBD_OPT_EXPORT_NAME, Array("disk".utf8)), tls: .require).closed)
    #expect(feed([0, 0, 0, 2] + option(NBD_OPT_STARTTLS), tls: .require).closed, "A5: no TLS without fixed newstyle")
}

@Test("E5 TLS_REQD is for INFO and GO where TLS is a choice, and never said once it is on")
func selectiveTLS() {
    let wanted = [0, 0, 0, 7] + Array("private".utf8) + [0, 0] as [UInt8]
    let context = [0, 0, 0, 7] + Array("private".utf8) + [0, 0, 0, 0] as [UInt8]
    let result = feed(
        clientFlags + option(NBD_OPT_STRUCTURED_REPLY) + option(NBD_OPT_INFO, wanted)
            + option(NBD_OPT_SET_META_CONTEXT, context), tls: .allow)
    #expect(result.replies == [NBD_REP_ACK, NBD_REP_ERR_TLS_REQD, NBD_REP_ERR_UNKNOWN])
}

@Test("C5.5 bytes behind STARTTLS end the connection; C5.4 nothing from before it survives")
func startTLS() {
    #expect(feed(clientFlags + option(NBD_OPT_STARTTLS) + option(NBD_OPT_LIST), tls: .allow).closed)
    #expect(feed(clientFlags + option(NBD_OPT_STARTTLS, [1]), tls: .allow).replies == [NBD_REP_ERR_INVALID])
    #expect(feed(clientFlags + option(NBD_OPT_STARTTLS)).replies == [NBD_REP_ERR_POLICY])
    var machine = Handshake(tls: .allow)
    func receive(_ bytes: [UInt8]) -> [Handshake.Action] {
        bytes.withUnsafeBytes { machine.receive($0, catalog: OneExport()) }
    }
    let query =
        [0, 0, 0, 4] + Array("disk".utf8) + [0, 0, 0, 1, 0, 0, 0, 15] + Array("base:allocation".utf8) as [UInt8]
    _ = receive(clientFlags + option(NBD_OPT_EXTENDED_HEADERS))
    _ = receive(option(NBD_OPT_SET_META_CONTEXT, query))
    _ = receive(option(NBD_OPT_STARTTLS))
    machine.secured()
    for action in receive(option(NBD_OPT_GO, go)) {
        if case .start(let export, let negotiated) = action {
            #expect(negotiated.style == .simple && negotiated.contexts.isEmpty && !export.flags.contains(.sendDF))
        }
    }
}

@Test("C8.6, C8.8 a selection is replaced by the next, and void for another export")
func selections() {
    func selected(_ steps: [UInt8]) -> [String]? {
        var machine = Handshake()
        let bytes = clientFlags + option(NBD_OPT_STRUCTURED_REPLY) + steps + option(NBD_OPT_GO, go)
        for action in bytes.withUnsafeBytes({ machine.receive($0, catalog: OneExport()) }) {
            if case .start(_, let negotiated) = action { return negotiated.contexts.map(\.name) }
        }
        return nil
    }
    func set(_ export: String, _ queries: [String]) -> [UInt8] {
        var data: [UInt8] = []
        for (index, text) in ([export] + queries).enumerated() {
            data.appendBigEndian(UInt32(text.utf8.count))
            data += Array(text.utf8)
            if index == 0 { data.appendBigEndian(UInt32(queries.count)) }
        }
        return option(NBD_OPT_SET_META_CONTEXT, data)
    }
    let all = ["base:allocation", "qemu:dirty-bitmap:b"]
    #expect(selected(set("disk", all + ["base:", "x:y", "base:allocation"])) == all)
    #expect(selected(set("disk", all) + set("disk", [])) == [])
    #expect(selected(set("disk", all) + set("nothing", all)) == [])
    #expect(selected(set("disk", all) + option(NBD_OPT_SET_META_CONTEXT, [9])) == [])
    #expect(selected(set("nothing", all)) == [])
}
