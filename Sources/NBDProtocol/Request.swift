// Request.swift: the request header and its complete validation.

/// How the two sides frame requests and replies, as negotiated.
package enum ReplyStyle: UInt8, Sendable, BitwiseCopyable {
    case simple
    /// STRUCTURED_REPLY: replies in chunks.
    case structured
    /// EXTENDED_HEADERS: requests and reply chunks with 64-bit lengths.
    case extended

    @inlinable package var requestByteCount: Int { self == .extended ? 32 : 28 }
}

/// A request as it stands on the wire: 28 bytes ("Compact request message") or 32 ("Extended request message").
package struct RequestHeader: Sendable, BitwiseCopyable {
    package var flags: UInt16
    package var type: UInt16
    package var cookie: UInt64
    package var offset: UInt64
    package var length: UInt64
    /// Bytes that follow the header on the wire, whether or not the request is valid.
    package var payloadLength: UInt64

    /// Nil when the magic is wrong: the stream is out of step and the connection must end.
    @inlinable
    package init?(_ bytes: UnsafeRawPointer, style: ReplyStyle) {
        let magic = bytes.loadBigEndian(UInt32.self, at: 0)
        flags = bytes.loadBigEndian(UInt16.self, at: 4)
        type = bytes.loadBigEndian(UInt16.self, at: 6)
        cookie = bytes.loadBigEndian(UInt64.self, at: 8)
        offset = bytes.loadBigEndian(UInt64.self, at: 16)
        if style == .extended {
            guard magic == NBD_EXTENDED_REQUEST_MAGIC else { return nil }
            length = bytes.loadBigEndian(UInt64.self, at: 24)
            let announced = flags & CommandFlags.payloadLen.rawValue != 0
            payloadLength = announced || type == Command.write.rawValue ? length : 0
        } else {
            guard magic == NBD_REQUEST_MAGIC else { return nil }
            length = UInt64(bytes.loadBigEndian(UInt32.self, at: 24))
            payloadLength = type == Command.write.rawValue ? length : 0
        }
    }
}

/// What a validated request may rely on: the range lies inside the export and the flags belong to the command.
package enum ValidatedRequest: Sendable {
    case read(df: Bool)
    case write(fua: Bool)
    case writeZeroes(fua: Bool, noHole: Bool, fast: Bool)
    case trim(fua: Bool)
    case cache
    case blockStatus(reqOne: Bool)
    case flush
    case disconnect

    /// It may change what the export holds.
    package var modifies: Bool {
        switch self {
        case .write, .writeZeroes, .trim: true
        case .read, .cache, .blockStatus, .flush, .disconnect: false
        }
    }
}

/// The facts of a session that validation needs.
package struct ExportLimits: Sendable, BitwiseCopyable {
    package var size: UInt64
    package var readOnly: Bool
    package var maximumPayload: UInt32
    package var style: ReplyStyle
    /// Whether the client selected metadata contexts.
    package var hasContexts: Bool

    package init(
        size: UInt64, readOnly: Bool, maximumPayload: UInt32, style: ReplyStyle = .simple, hasContexts: Bool = false
    ) {
        self.size = size
        self.readOnly = readOnly
        self.maximumPayload = maximumPayload
        self.style = style
        self.hasContexts = hasContexts
    }
}

extension RequestHeader {
    /// The only function that looks at offset, length, type and flags as the client sent them.
    package func validate(for export: ExportLimits) -> Result<ValidatedRequest, NBDError> {
        guard let command = Command(rawValue: type) else { return .failure(.invalid) }
        // DISC ends the session whatever else the header says; there is no reply to put an error in.
        if command == .disconnect { return .success(.disconnect) }

        // Permission before range and flags, as qemu reports it.
        let modifies = command == .write || command == .writeZeroes || command == .trim
        if modifies && export.readOnly { return .failure(.notPermitted) }

        let given = CommandFlags(rawValue: flags)
        guard given.isSubset(of: Self.flags(of: command, export.style)) else { return .failure(.invalid) }
        let fua = given.contains(.fua)
        if command == .flush { return .success(.flush) }

        // Range, in a form that cannot overflow: the client chooses both numbers.
        let inside = offset <= export.size && length <= export.size - offset
        guard inside else {
            return .failure(command == .write || command == .writeZeroes ? .noSpace : .invalid)
        }
        let tooLong = length > UInt64(export.maximumPayload)
        switch command {
        case .read:
            if tooLong { return .failure(export.style == .simple ? .invalid : .overflow) }
            return .success(.read(df: given.contains(.df)))
        case .write: return tooLong ? .failure(.invalid) : .success(.write(fua: fua))
        case .trim: return .success(.trim(fua: fua))
        case .cache: return .success(.cache)
        case .writeZeroes:
            return .success(
                .writeZeroes(fua: fua, noHole: given.contains(.noHole), fast: given.contains(.fastZero)))
        case .blockStatus:
            guard export.hasContexts, length > 0 else { return .failure(.invalid) }
            return .success(.blockStatus(reqOne: given.contains(.reqOne)))
        case .flush, .disconnect: return .failure(.invalid)
        }
    }

    /// FUA is allowed on every command since it is advertised; the others where the document defines them.
    private static func flags(of command: Command, _ style: ReplyStyle) -> CommandFlags {
        switch command {
        case .read: style == .simple ? [.fua] : [.fua, .df]
        case .write: style == .extended ? [.fua, .payloadLen] : [.fua]
        case .writeZeroes: [.fua, .noHole, .fastZero]
        case .blockStatus: [.fua, .reqOne]
        case .trim, .cache, .flush, .disconnect: [.fua]
        }
    }
}
