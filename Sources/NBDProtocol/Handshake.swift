// Handshake.swift: fixed newstyle negotiation as a state machine without I/O.
//
// The caller feeds bytes and carries out the actions in order. Must hold:
//   H1  an option is answered exactly once, and the machine stays in step after any malformed or unknown option;
//   H2  no memory is taken on a length that the client merely claims;
//       nor on options that are sent by the thousand without waiting for the answers;
//   H3  bytes behind the option that starts transmission are left to the transmission phase, untouched;
//   H4  what came in the clear has no effect after STARTTLS: bytes that follow it end the connection, and whatever was
//       negotiated before is forgotten.
//
// Source: doc/proto.md, "Fixed newstyle negotiation", "Option types", "TLS".

import Base

package struct Handshake {
    package enum Action {
        case send([UInt8])
        /// After what was queued is sent, TLS begins; then call `secured`.
        case startTLS
        /// Transmission begins; unread input belongs to it.
        case start(ExportDescription, Negotiated)
        /// Send what was queued, then close.
        case close
    }

    private enum State {
        case clientFlags
        case option
        case optionData(option: UInt32, length: Int)
        case skipping(option: UInt32, remaining: Int)
        /// TLS is being set up by the caller; no byte is ours until it is.
        case securing
        case finished
    }

    private let policy: TLSPolicy
    private var isSecure = false
    private var state = State.clientFlags
    private var input: [UInt8] = []
    private var inputStart = 0
    private var clientFlags: UInt32 = 0
    private var style = ReplyStyle.simple
    /// The export that the contexts were selected for, and they.
    private var contexts: (export: String, selected: [SelectedContext]) = ("", [])

    package init(tls policy: TLSPolicy = .off) { self.policy = policy }

    /// The 18 bytes that the server sends unasked.
    package static var greeting: [UInt8] {
        var bytes: [UInt8] = []
        bytes.appendBigEndian(NBDMAGIC)
        bytes.appendBigEndian(IHAVEOPT)
        bytes.appendBigEndian(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)
        return bytes
    }

    /// Bytes received but not part of the handshake; meaningful after `.start`.
    package var unread: ArraySlice<UInt8> { input[inputStart...] }

    /// Takes received bytes and returns what to do, in order.
    package mutating func receive(
        _ bytes: UnsafeRawBufferPointer, catalog: some ExportCatalog
    ) -> [Action] {
        input.append(contentsOf: bytes)
        var actions: [Action] = []
        var weighed = 0
        var replyBytes = 0
        while step(catalog: catalog, &actions) {
            for case .send(let reply) in actions[weighed...] { replyBytes += reply.count }
            weighed = actions.count
            // A client waits for one option's answer before it sends the next; thousands of lists at once are an attack.
            if replyBytes > Limits.maximumHandshakeReplies, case .option = state {
                _ = close(&actions)
            }
        }
        if inputStart > 0, case .finished = state {} else { dropConsumed() }
        return actions
    }

    /// TLS is up: negotiation begins anew over it (H4).
    package mutating func secured() {
        guard case .securing = state else { return }
        isSecure = true
        style = .simple
        contexts = ("", [])
        input = []
        inputStart = 0
        state = .option
    }

    private mutating func dropConsumed() {
        input.removeSubrange(0..<inputStart)
        inputStart = 0
    }

    private var available: Int { input.count - inputStart }

    private func peek<T: FixedWidthInteger & BitwiseCopyable>(_ type: T.Type, _ offset: Int) -> T {
        invariant(available >= offset + T.bitWidth / 8, "the handshake reads only what has arrived")
        return input.withUnsafeBytes {
            ($0.baseAddress! + inputStart).loadBigEndian(T.self, at: offset)
        }
    }

    /// One transition; false when more input is needed or the handshake is over.
    private mutating func step(catalog: some ExportCatalog, _ actions: inout [Action]) -> Bool {
        switch state {
        case .clientFlags:
            guard available >= 4 else { return false }
            clientFlags = peek(UInt32.self, 0)
            inputStart += 4
            let known = NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES
            guard clientFlags & ~known == 0 else { return close(&actions) }
            state = .option
            return true
        case .option:
            guard available >= 16 else { return false }
            return beginOption(&actions)
        case .optionData(let option, let length):
            guard available >= length else { return false }
            let data = Array(input[inputStart..<inputStart + length])
            inputStart += length
            state = .option
            answer(option, data, catalog, &actions)
            return true
        case .skipping(let option, let remaining):
            let count = min(remaining, available)
            inputStart += count
            if count < remaining {
                state = .skipping(option: option, remaining: remaining - count)
                return false
            }
            state = .option
            var type = Self.isKnown(option) ? NBD_REP_ERR_TOO_BIG : NBD_REP_ERR_UNSUP
            if mustSecureFirst(option) { type = NBD_REP_ERR_TLS_REQD }
            actions.append(.send(OptionReply(option: option).encode(type)))
            return true
        case .securing, .finished:
            return false
        }
    }

    private mutating func beginOption(_ actions: inout [Action]) -> Bool {
        guard peek(UInt64.self, 0) == IHAVEOPT else { return close(&actions) }
        let option = peek(UInt32.self, 8)
        let length = Int(peek(UInt32.self, 12))
        inputStart += 16
        // A client that did not choose fixed newstyle may send nothing but EXPORT_NAME.
        if clientFlags & NBD_FLAG_C_FIXED_NEWSTYLE == 0, option != NBD_OPT_EXPORT_NAME {
            return close(&actions)
        }
        if length > Limits.maximumSkippedOptionLength { return close(&actions) }
        if length > Limits.maximumOptionLength {
            // EXPORT_NAME has no way to report an error.
            if option == NBD_OPT_EXPORT_NAME { return close(&actions) }
            state = .skipping(option: option, remaining: length)
        } else {
            state = .optionData(option: option, length: length)
        }
        return true
    }

    private mutating func close(_ actions: inout [Action]) -> Bool {
        state = .finished
        actions.append(.close)
        return false
    }

    private static func isKnown(_ option: UInt32) -> Bool {
        option >= NBD_OPT_EXPORT_NAME && option <= NBD_OPT_EXTENDED_HEADERS && option != 4
    }

    /// FORCEDTLS: nothing but STARTTLS and ABORT is answered in the clear.
    private func mustSecureFirst(_ option: UInt32) -> Bool {
        policy == .require && !isSecure && option != NBD_OPT_STARTTLS && option != NBD_OPT_ABORT
    }

    private mutating func answer(
        _ option: UInt32, _ data: [UInt8], _ catalog: some ExportCatalog, _ actions: inout [Action]
    ) {
        let reply = OptionReply(option: option)
        if mustSecureFirst(option) {
            if option == NBD_OPT_EXPORT_NAME {
                _ = close(&actions)
            } else {
                actions.append(.send(reply.error(NBD_REP_ERR_TLS_REQD, "this server wants TLS first")))
            }
            return
        }
        switch option {
        case NBD_OPT_EXPORT_NAME: exportName(data, catalog, &actions)
        case NBD_OPT_ABORT:
            actions.append(.send(reply.acknowledgement))
            _ = close(&actions)
        case NBD_OPT_STARTTLS: startTLS(data, &actions)
        case NBD_OPT_INFO, NBD_OPT_GO: infoOrGo(option, data, catalog, &actions)
        default: actions.append(.send(answerInPlace(reply, data, catalog)))
        }
    }

    /// Options whose answer changes nothing but what was negotiated.
    private mutating func answerInPlace(
        _ reply: OptionReply, _ data: [UInt8], _ catalog: some ExportCatalog
    ) -> [UInt8] {
        switch reply.option {
        case NBD_OPT_LIST:
            guard data.isEmpty else { return reply.error(NBD_REP_ERR_INVALID, "LIST takes no data") }
            return reply.list(catalog.exportNames())
        case NBD_OPT_STRUCTURED_REPLY:
            guard data.isEmpty else { return reply.error(NBD_REP_ERR_INVALID, "STRUCTURED_REPLY takes no data") }
            guard style != .extended else {
                return reply.error(NBD_REP_ERR_EXT_HEADER_REQD, "extended headers are in use")
            }
            style = .structured
            return reply.acknowledgement
        case NBD_OPT_EXTENDED_HEADERS:
            guard data.isEmpty else { return reply.error(NBD_REP_ERR_INVALID, "EXTENDED_HEADERS takes no data") }
            style = .extended
            return reply.acknowledgement
        case NBD_OPT_LIST_META_CONTEXT, NBD_OPT_SET_META_CONTEXT: return metaContexts(reply, data, catalog)
        default: return reply.encode(NBD_REP_ERR_UNSUP)
        }
    }

    // MARK: TLS

    private mutating func startTLS(_ data: [UInt8], _ actions: inout [Action]) {
        let reply = OptionReply(option: NBD_OPT_STARTTLS)
        if !data.isEmpty {
            actions.append(.send(reply.error(NBD_REP_ERR_INVALID, "STARTTLS takes no data")))
        } else if isSecure {
            actions.append(.send(reply.error(NBD_REP_ERR_INVALID, "TLS is on already")))
        } else if policy == .off {
            actions.append(.send(reply.error(NBD_REP_ERR_POLICY, "TLS is not configured here")))
        } else if available > 0 {
            // H4: whoever speaks before the answer speaks without TLS, perhaps in the client's name.
            _ = close(&actions)
        } else {
            actions.append(.send(reply.acknowledgement))
            actions.append(.startTLS)
            state = .securing
        }
    }

    // MARK: Exports

    /// What an export offers to this session.
    private func described(_ export: ExportDescription) -> ExportDescription {
        var export = export
        if style != .simple { export.flags.insert(.sendDF) }
        return export
    }

    private func negotiated(for name: String) -> Negotiated {
        var negotiated = Negotiated()
        negotiated.style = style
        if contexts.export == name { negotiated.contexts = contexts.selected }
        return negotiated
    }

    private mutating func exportName(
        _ data: [UInt8], _ catalog: some ExportCatalog, _ actions: inout [Action]
    ) {
        guard style != .extended, let name = OptionData.string(data[...]),
            case .found(let found) = catalog.describe(export: name)
        else {
            _ = close(&actions)
            return
        }
        let export = described(found)
        var bytes: [UInt8] = []
        bytes.appendBigEndian(export.size)
        bytes.appendBigEndian(export.flags.rawValue)
        if clientFlags & NBD_FLAG_C_NO_ZEROES == 0 {
            bytes.append(contentsOf: repeatElement(0, count: 124))
        }
        actions.append(.send(bytes))
        actions.append(.start(export, negotiated(for: name)))
        state = .finished
    }

    private mutating func infoOrGo(
        _ option: UInt32, _ data: [UInt8], _ catalog: some ExportCatalog, _ actions: inout [Action]
    ) {
        let reply = OptionReply(option: option)
        guard let query = InfoQuery(data) else {
            actions.append(.send(reply.error(NBD_REP_ERR_INVALID, "malformed name or list of infos")))
            return
        }
        guard let export = find(query.name, reply, catalog, &actions) else { return }
        actions.append(.send(reply.infos(export, asked: query.asked) + reply.acknowledgement))
        if option == NBD_OPT_GO {
            actions.append(.start(export, negotiated(for: query.name)))
            state = .finished
        }
    }

    /// Nil when the refusal is queued.
    private func find(
        _ name: String, _ reply: OptionReply, _ catalog: some ExportCatalog, _ actions: inout [Action]
    ) -> ExportDescription? {
        switch catalog.describe(export: name) {
        case .found(let export): return described(export)
        case .unknown:
            let shown = String(name.prefix(200))
            actions.append(.send(reply.error(NBD_REP_ERR_UNKNOWN, "export '\(shown)' is not available")))
        case .needsTLS:
            actions.append(.send(reply.error(NBD_REP_ERR_TLS_REQD, "this export wants TLS first")))
        }
        return nil
    }

    // MARK: Metadata contexts

    private mutating func metaContexts(
        _ reply: OptionReply, _ data: [UInt8], _ catalog: some ExportCatalog
    ) -> [UInt8] {
        let selects = reply.option == NBD_OPT_SET_META_CONTEXT
        // The earlier selection is gone even if this one fails.
        if selects { contexts = ("", []) }
        guard style != .simple else {
            return reply.error(NBD_REP_ERR_INVALID, "structured replies come first")
        }
        guard let query = MetaContextQuery(data) else {
            return reply.error(NBD_REP_ERR_INVALID, "malformed name or list of queries")
        }
        var refusals: [Action] = []
        guard let export = find(query.name, reply, catalog, &refusals) else {
            // SELECTIVETLS may say TLS_REQD to INFO and GO only.
            return reply.error(NBD_REP_ERR_UNKNOWN, "that export is not available")
        }
        guard selects else {
            return reply.contexts(query.listed(of: export.contexts).map { SelectedContext(id: 0, name: $0) })
        }
        let names = query.selected(of: export.contexts)
        guard names.count <= Limits.contextsPerConnection else {
            return reply.error(
                NBD_REP_ERR_TOO_BIG, "at most \(Limits.contextsPerConnection) contexts can be selected")
        }
        let selected = names.enumerated().map { SelectedContext(id: UInt32($0.offset) + 1, name: $0.element) }
        contexts = (query.name, selected)
        return reply.contexts(selected)
    }
}
