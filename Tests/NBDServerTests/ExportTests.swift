import NBDProtocol
import NBDServer
import Testing

@Test("exports are found by name, hidden ones are not listed, read-only ones say so")
func directory() throws {
    let exports = ExportDirectory()
    let reactor = try Reactor.start(number: 90, exports: exports)
    func entry(_ readOnly: Bool, listed: Bool = true) -> ExportEntry {
        ExportEntry(size: 4096, kind: .volume, readOnly: readOnly, reactor: reactor, volume: 0, listed: listed)
    }
    exports.replace(
        where: { _ in true }, with: ["b": entry(false), "a": entry(true), "secret": entry(false, listed: false)])
    #expect(exports.exportNames() == ["a", "b"])
    #expect(exports.describe(export: "secret") != nil && exports.describe(export: "c") == nil)
    #expect(exports.describe(export: "a")!.flags.contains(.readOnly))
    #expect(!exports.describe(export: "b")!.flags.contains(.readOnly))
    #expect(exports.describe(export: "b")!.flags.isSuperset(of: [.sendFlush, .sendFUA, .sendTrim, .canMultiConn]))
    exports.replace(where: { $0 == "a" }, with: [:])
    #expect(exports.exportNames() == ["b"])
}

@Test("a reactor takes messages in order and ends when asked")
func reactor() async throws {
    let handle = try Reactor.start(number: 91, exports: ExportDirectory())
    for number in 0..<100 { #expect(await handle.run { _ in number } == number) }
    await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
        Reactor.stop(handle) { continuation.resume() }
    }
}
