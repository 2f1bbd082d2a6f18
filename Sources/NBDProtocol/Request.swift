// Request.swift: the request header, its complete validation, and the simple reply.

/// A request as it stands on the wire ("Request message"): 28 bytes.
package struct RequestHeader: Sendable, BitwiseCopyable {
    package static let byteCount = 28
    package var flags: UInt16
    package var type: UInt16
    package var cookie: UInt64
    package var offset: UInt64
    package var length: UInt32

    /// Nil when the magic is wrong: the stream is out of step and the connection must end.
    @inlinable
    package init?(_ bytes: UnsafeRawPointer) {
        guard bytes.loadBigEndian(UInt32.self, at: 0) == NBD_REQUEST_MAGIC else { return nil }
        flags = bytes.loadBigEndian(UInt16.self, at: 4)
        type = bytes.loadBigEndian(UInt16.self, at: 6)
        cookie = bytes.loadBigEndian(UInt64.self, at: 8)
        offset = bytes.loadBigEndian(UInt64.self, at: 16)
        length = bytes.loadBigEndian(UInt32.self, at: 24)
    }

    /// Bytes that follow the header on the wire, whether or not the request is valid.
    @inlinable package var payloadLength: Int {
        type == Command.write.rawValue ? Int(length) : 0
    }
}

/// What a validated request may rely on: the range lies inside the export and the flags belong to the command.
package enum ValidatedRequest: Sendable {
    case read
    case write(fua: Bool)
    case writeZeroes(fua: Bool, noHole: Bool)
    case trim(fua: Bool)
    case flush
    case disconnect
}

/// The facts of an export that validation needs.
package struct ExportLimits: Sendable, BitwiseCopyable {
    package var size: UInt64
    package var readOnly: Bool
    package var maximumPayload: UInt32

    package init(size: UInt64, readOnly: Bool, maximumPayload: UInt32) {
        self.size = size
        self.readOnly = readOnly
        self.maximumPayload = maximumPayload
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

        // Flags: FUA is allowed on every command since it is advertised; NO_HOLE belongs to WRITE_ZEROES alone.
        let given = CommandFlags(rawValue: flags)
        let allowed: CommandFlags = command == .writeZeroes ? [.fua, .noHole] : [.fua]
        guard given.isSubset(of: allowed) else { return .failure(.invalid) }
        let fua = given.contains(.fua)

        if command == .flush { return .success(.flush) }

        // Range, in a form that cannot overflow: the client chooses both numbers.
        let inside = offset <= export.size && UInt64(length) <= export.size - offset
        guard inside else {
            return .failure(command == .write || command == .writeZeroes ? .noSpace : .invalid)
        }
        switch command {
        case .read:
            return length > export.maximumPayload ? .failure(.invalid) : .success(.read)
        case .write:
            return length > export.maximumPayload ? .failure(.invalid) : .success(.write(fua: fua))
        case .trim:
            return .success(.trim(fua: fua))
        case .writeZeroes:
            return .success(.writeZeroes(fua: fua, noHole: given.contains(.noHole)))
        case .flush, .disconnect:
            return .failure(.invalid)
        }
    }
}

/// "Simple reply message": 16 bytes, followed by the data of a successful READ.
package enum SimpleReply {
    package static let byteCount = 16

    @inlinable
    package static func encode(
        error: UInt32, cookie: UInt64, into bytes: UnsafeMutableRawPointer
    ) {
        bytes.storeBigEndian(NBD_SIMPLE_REPLY_MAGIC, at: 0)
        bytes.storeBigEndian(error, at: 4)
        bytes.storeBigEndian(cookie, at: 8)
    }
}
