import NBDProtocol
import NBDServer
import Testing

@Test("exports are found by name, and hidden ones are not listed")
func directory() throws {
    let exports = ExportDirectory()
    let reactor = try Reactor.start(number: 90, exports: exports)
    var own = VolumeExports(own: ExportEntry(size: 4096, kind: .volume, readOnly: false, reactor: reactor, volume: 0))
    exports.set("a", own)
    own.intake = ("secret", 7, AccessList())
    exports.set("b", own)
    #expect(exports.listed() == ["a", "b"])
    #expect(exports.find("b@secret")?.kind == .intake(session: 7))
    #expect(exports.find("a@secret") == nil && exports.find("c") == nil && exports.find("a@") == nil)
    exports.set("a", nil)
    #expect(exports.listed() == ["b"])
}

@Test("a recovery point is read where the volume's files of it, or of an older one, lie")
func recoveryPoints() throws {
    let exports = ExportDirectory()
    let reactor = try Reactor.start(number: 92, exports: exports)
    var offered = VolumeExports(
        own: ExportEntry(size: 4096, kind: .volume, readOnly: false, reactor: reactor, volume: 0))
    let points = RecoveryPoints()
    (offered.points, offered.carriers, offered.joinedAfter) = (points, [3, 6], 3)
    offered.showsNewestPoint = true
    offered.copies = [.init(id: 1 << 62, name: "monday", order: 45, text: "FlashCopy", readOnly: false)]
    exports.set("a", offered)
    #expect(exports.names(of: "a") == ["a@monday"] && exports.find("a") == nil)
    points.all = [3, 4, 5, 6, 7].map { RecoveryPoints.Point(number: $0, order: $0 * 10, text: "point \($0)") }
    #expect(exports.names(of: "a") == ["a", "a@4", "a@5", "a@6", "a@7", "a@monday"])
    #expect([4, 5, 6, 7].map { exports.find("a@\($0)")?.kind } == [.copy(3), .copy(3), .copy(6), .copy(6)])
    #expect(exports.find("a")?.kind == .copy(6) && exports.find("a@3") == nil)
    #expect(exports.find("a@5")?.bases.map(\.name) == ["4", "monday"])
    #expect(exports.find("a@monday")?.readOnly == false && exports.find("a@7")?.readOnly == true)
    exports.setCarriers("a", [6])
    #expect(exports.find("a@5") == nil && exports.find("a@7")?.kind == .copy(6))
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
