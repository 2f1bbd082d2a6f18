// FuzzHandshake.swift: libFuzzer feeds the handshake's state machine and the request parser, without I/O.
//
// The first byte chooses the TLS policy and into how many pieces the rest is cut; what follows a started transmission is
// taken as requests. Checked: nothing traps, options are answered at most once each, and a reply that claims
// transmission comes with a known export.

import Base
import NBDProtocol

private struct Catalog: ExportCatalog {
    func exportNames() -> [String] { ["disk", "disk@copy"] }
    func describe(export name: String) -> ExportLookup {
        switch name {
        case "disk", "":
            .found(
                ExportDescription(
                    name: name, text: "a disk", size: 1 << 20, flags: [.hasFlags],
                    contexts: ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:copy"]))
        case "private": .needsTLS
        default: .unknown
        }
    }
}

@_cdecl("LLVMFuzzerTestOneInput")
public func fuzzHandshake(_ data: UnsafePointer<UInt8>, _ count: Int) -> CInt {
    guard count > 0 else { return 0 }
    let choice = data[0]
    let policy: TLSPolicy = [.off, .allow, .require][Int(choice % 3)]
    let piece = choice & 0x80 != 0 ? 1 + Int(choice >> 2 & 15) : count
    var machine = Handshake(tls: policy)
    var position = 1
    while position < count {
        let length = min(piece, count - position)
        let bytes = UnsafeRawBufferPointer(start: data + position, count: length)
        position += length
        for action in machine.receive(bytes, catalog: Catalog()) {
            switch action {
            case .send(let reply): invariant(!reply.isEmpty, "a reply has bytes")
            case .close: return 0
            case .startTLS: machine.secured()
            case .start(let export, let negotiated):
                invariant(export.name == "disk" || export.name.isEmpty, "only a known export is opened")
                invariant(negotiated.contexts.count <= 3, "only known contexts are selected")
                let rest = Array(machine.unread) + UnsafeRawBufferPointer(start: data + position, count: count - position)
                requests(rest, negotiated)
                return 0
            }
        }
    }
    return 0
}

/// Takes requests apart as the transmission phase does.
private func requests(_ bytes: [UInt8], _ negotiated: Negotiated) {
    let limits = ExportLimits(
        size: 1 << 20, readOnly: bytes.count & 1 == 1, maximumPayload: 32 << 20, style: negotiated.style,
        hasContexts: !negotiated.contexts.isEmpty)
    var position = 0
    bytes.withUnsafeBytes { bytes in
        while bytes.count - position >= limits.style.requestByteCount {
            guard let header = RequestHeader(bytes.baseAddress! + position, style: limits.style) else { return }
            if case .success(let request) = header.validate(for: limits) { check(request, header, limits) }
            guard header.payloadLength <= UInt64(bytes.count) else { return }
            position += limits.style.requestByteCount + Int(header.payloadLength)
        }
    }
}

private func check(_ request: ValidatedRequest, _ header: RequestHeader, _ limits: ExportLimits) {
    switch request {
    case .disconnect, .flush: return
    case .write, .writeZeroes, .trim: invariant(!limits.readOnly, "a read-only export is not modified")
    case .blockStatus: invariant(limits.hasContexts && header.length > 0, "status needs contexts and a range")
    case .read: invariant(header.length <= UInt64(limits.maximumPayload), "a read is bounded")
    case .cache: break
    }
    invariant(
        header.offset <= limits.size && header.length <= limits.size - header.offset,
        "a valid request lies inside the export")
}
