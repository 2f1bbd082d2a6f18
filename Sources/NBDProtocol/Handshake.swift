// Handshake.swift: fixed newstyle negotiation as a state machine without I/O.
//
// The caller feeds bytes and carries out the actions in order. Must hold:
//   H1  an option is answered exactly once, and the machine stays in step after any malformed or unknown option;
//   H2  no memory is taken on a length that the client merely claims;
//       nor on options that are sent by the thousand without waiting for the answers;
//   H3  bytes behind the option that starts transmission are left to the transmission phase, untouched.
//
// Source: doc/proto.md, "Fixed newstyle negotiation", "Option types".

import Base

/// What INFO, GO and EXPORT_NAME tell about an export.
package struct ExportDescription: Sendable {
    package var name: String
    package var size: UInt64
    package var flags: TransmissionFlags
    package var minimumBlockSize: UInt32
    package var preferredBlockSize: UInt32
    package var maximumPayload: UInt32

    package init(
        name: String, size: UInt64, flags: TransmissionFlags, minimumBlockSize: UInt32 = 1,
        preferredBlockSize: UInt32 = 4096, maximumPayload: UInt32 = UInt32(Limits.maximumPayload)
    ) {
        self.name = name
        self.size = size
        self.flags = flags
        self.minimumBlockSize = minimumBlockSize
        self.preferredBlockSize = preferredBlockSize
        self.maximumPayload = maximumPayload
    }
}

/// Where the handshake looks exports up.
package protocol ExportCatalog {
    /// Names to show in answer to LIST.
    func exportNames() -> [String]
    /// Nil when there is no such export, or it is not open to the asker.
    func describe(export name: String) -> ExportDescription?
}

package struct Handshake {
    package enum Action {
        case send([UInt8])
        /// Transmission begins; unread input belongs to it.
        case start(ExportDescription)
        /// Send what was queued, then close.
        case close
    }

    private enum State {
        case clientFlags
        case option
        case optionData(option: UInt32, length: Int)
        case skipping(option: UInt32, remaining: Int)
        case finished
    }

    private var state = State.clientFlags
    private var input: [UInt8] = []
    private var inputStart = 0
    private var clientFlags: UInt32 = 0

    package init() {}

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
            let type = Self.isKnown(option) ? NBD_REP_ERR_TOO_BIG : NBD_REP_ERR_UNSUP
            actions.append(.send(Self.reply(option, type)))
            return true
        case .finished:
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
        [NBD_OPT_EXPORT_NAME, NBD_OPT_ABORT, NBD_OPT_LIST, NBD_OPT_INFO, NBD_OPT_GO].contains(option)
    }

    private mutating func answer(
        _ option: UInt32, _ data: [UInt8], _ catalog: some ExportCatalog, _ actions: inout [Action]
    ) {
        switch option {
        case NBD_OPT_EXPORT_NAME: exportName(data, catalog, &actions)
        case NBD_OPT_ABORT:
            actions.append(.send(Self.reply(option, NBD_REP_ACK)))
            _ = close(&actions)
        case NBD_OPT_LIST:
            guard data.isEmpty else {
                actions.append(.send(Self.error(option, NBD_REP_ERR_INVALID, "LIST takes no data")))
                return
            }
            actions.append(.send(Self.list(catalog.exportNames())))
        case NBD_OPT_INFO, NBD_OPT_GO: infoOrGo(option, data, catalog, &actions)
        default: actions.append(.send(Self.reply(option, NBD_REP_ERR_UNSUP)))
        }
    }

    private mutating func exportName(
        _ data: [UInt8], _ catalog: some ExportCatalog, _ actions: inout [Action]
    ) {
        guard let name = Self.name(data[...]), let export = catalog.describe(export: name) else {
            _ = close(&actions)
            return
        }
        var bytes: [UInt8] = []
        bytes.appendBigEndian(export.size)
        bytes.appendBigEndian(export.flags.rawValue)
        if clientFlags & NBD_FLAG_C_NO_ZEROES == 0 {
            bytes.append(contentsOf: repeatElement(0, count: 124))
        }
        actions.append(.send(bytes))
        actions.append(.start(export))
        state = .finished
    }

    private mutating func infoOrGo(
        _ option: UInt32, _ data: [UInt8], _ catalog: some ExportCatalog, _ actions: inout [Action]
    ) {
        guard let (name, asksBlockSize) = Self.parseInfo(data) else {
            actions.append(
                .send(Self.error(option, NBD_REP_ERR_INVALID, "malformed name or list of infos")))
            return
        }
        guard let export = catalog.describe(export: name) else {
            let shown = String(name.prefix(200))
            actions.append(
                .send(Self.error(option, NBD_REP_ERR_UNKNOWN, "export '\(shown)' is not available")))
            return
        }
        var bytes = Self.exportInfo(option, export)
        if asksBlockSize { bytes += Self.blockSizeInfo(option, export) }
        bytes += Self.reply(option, NBD_REP_ACK)
        actions.append(.send(bytes))
        if option == NBD_OPT_GO {
            actions.append(.start(export))
            state = .finished
        }
    }

    /// Nil unless the lengths agree with each other and with the option's.
    private static func parseInfo(_ data: [UInt8]) -> (name: String, asksBlockSize: Bool)? {
        guard data.count >= 6 else { return nil }
        let nameLength = data.withUnsafeBytes {
            Int($0.baseAddress!.loadBigEndian(UInt32.self, at: 0))
        }
        guard nameLength <= data.count - 6, let name = name(data[4..<4 + nameLength]) else {
            return nil
        }
        return data.withUnsafeBytes { bytes in
            let base = bytes.baseAddress!
            let count = Int(base.loadBigEndian(UInt16.self, at: 4 + nameLength))
            guard data.count == 6 + nameLength + 2 * count else { return nil }
            var asksBlockSize = false
            for index in 0..<count {
                let info = base.loadBigEndian(UInt16.self, at: 6 + nameLength + 2 * index)
                if info == NBD_INFO_BLOCK_SIZE { asksBlockSize = true }
            }
            return (name, asksBlockSize)
        }
    }

    /// Nil when the name is too long, holds a NUL, or is not UTF-8.
    private static func name(_ bytes: ArraySlice<UInt8>) -> String? {
        guard bytes.count <= Limits.maximumNameLength, !bytes.contains(0) else { return nil }
        return String(validating: bytes, as: UTF8.self)
    }

    private static func reply(_ option: UInt32, _ type: UInt32, _ data: [UInt8] = []) -> [UInt8] {
        var bytes: [UInt8] = []
        bytes.appendBigEndian(NBD_REP_MAGIC)
        bytes.appendBigEndian(option)
        bytes.appendBigEndian(type)
        bytes.appendBigEndian(UInt32(data.count))
        return bytes + data
    }

    private static func error(_ option: UInt32, _ type: UInt32, _ message: String) -> [UInt8] {
        reply(option, type, Array(message.utf8.prefix(Limits.maximumNameLength)))
    }

    private static func list(_ names: [String]) -> [UInt8] {
        var bytes: [UInt8] = []
        for name in names {
            var data: [UInt8] = []
            data.appendBigEndian(UInt32(name.utf8.count))
            data.append(contentsOf: name.utf8)
            bytes += reply(NBD_OPT_LIST, NBD_REP_SERVER, data)
        }
        return bytes + reply(NBD_OPT_LIST, NBD_REP_ACK)
    }

    private static func exportInfo(_ option: UInt32, _ export: ExportDescription) -> [UInt8] {
        var data: [UInt8] = []
        data.appendBigEndian(NBD_INFO_EXPORT)
        data.appendBigEndian(export.size)
        data.appendBigEndian(export.flags.rawValue)
        return reply(option, NBD_REP_INFO, data)
    }

    private static func blockSizeInfo(_ option: UInt32, _ export: ExportDescription) -> [UInt8] {
        var data: [UInt8] = []
        data.appendBigEndian(NBD_INFO_BLOCK_SIZE)
        data.appendBigEndian(export.minimumBlockSize)
        data.appendBigEndian(export.preferredBlockSize)
        data.appendBigEndian(export.maximumPayload)
        return reply(option, NBD_REP_INFO, data)
    }
}
