import NBDProtocol
import NBDServer
import Testing

@Test("exports are found by name, and hidden ones are not listed")
func directory() throws {
    let exports = ExportDirectory()
    let reactor = try Reactor.start(number: 90, exports: exports)
    func entry(listed: Bool = true) -> ExportEntry {
        var entry = ExportEntry(size: 4096, kind: .volume, readOnly: false, reactor: reactor, volume: 0)
        entry.listed = listed
        return entry
    }
    exports.replace(where: { _ in true }, with: ["b": entry(), "a": entry(), "secret": entry(listed: false)])
    #expect(exports.listed() == ["a", "b"])
    #expect(exports.find("secret") != nil && exports.find("c") == nil)
    exports.replace(where: { $0 == "a" }, with: [:])
    #expect(exports.listed() == ["b"])
}

@Test("address ranges are networks of either family, or the unix sockets")
func ranges() {
    for text in ["", "10.0.0.0/33", "10.0.0", "::/129", "10.0.0.1/x", "host", "10.0.0.0/-1"] {
        #expect(AddressRange(text) == nil, "\(text)")
    }
    for text in ["unix", "10.0.0.0/8", "127.0.0.1", "::1", "fd00::/8", "0.0.0.0/0"] {
        #expect(AddressRange(text) != nil, "\(text)")
    }
}

@Test("a reactor takes messages in order and ends when asked")
func reactor() async throws {
    let handle = try Reactor.start(number: 91, exports: ExportDirectory())
    for number in 0..<100 { #expect(await handle.run { _ in number } == number) }
    await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
        Reactor.stop(handle) { continuation.resume() }
    }
}
