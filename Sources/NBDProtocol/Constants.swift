// Constants.swift: the numbers of the NBD document (NetworkBlockDevice/nbd, doc/proto.md), under the document's names.

package let NBDMAGIC: UInt64 = 0x4e42_444d_4147_4943
package let IHAVEOPT: UInt64 = 0x4948_4156_454f_5054
package let NBD_REP_MAGIC: UInt64 = 0x3_e889_0455_65a9
package let NBD_REQUEST_MAGIC: UInt32 = 0x2560_9513
package let NBD_EXTENDED_REQUEST_MAGIC: UInt32 = 0x21e4_1c71
package let NBD_SIMPLE_REPLY_MAGIC: UInt32 = 0x6744_6698
package let NBD_STRUCTURED_REPLY_MAGIC: UInt32 = 0x668e_33ef
package let NBD_EXTENDED_REPLY_MAGIC: UInt32 = 0x6e8a_278c

/// Handshake flags of the server ("Newstyle negotiation").
package let NBD_FLAG_FIXED_NEWSTYLE: UInt16 = 1 << 0
package let NBD_FLAG_NO_ZEROES: UInt16 = 1 << 1
/// Handshake flags of the client.
package let NBD_FLAG_C_FIXED_NEWSTYLE: UInt32 = 1 << 0
package let NBD_FLAG_C_NO_ZEROES: UInt32 = 1 << 1

/// "Option types".
package let NBD_OPT_EXPORT_NAME: UInt32 = 1
package let NBD_OPT_ABORT: UInt32 = 2
package let NBD_OPT_LIST: UInt32 = 3
package let NBD_OPT_STARTTLS: UInt32 = 5
package let NBD_OPT_INFO: UInt32 = 6
package let NBD_OPT_GO: UInt32 = 7
package let NBD_OPT_STRUCTURED_REPLY: UInt32 = 8
package let NBD_OPT_LIST_META_CONTEXT: UInt32 = 9
package let NBD_OPT_SET_META_CONTEXT: UInt32 = 10
package let NBD_OPT_EXTENDED_HEADERS: UInt32 = 11

/// "Option reply types".
package let NBD_REP_ACK: UInt32 = 1
package let NBD_REP_SERVER: UInt32 = 2
package let NBD_REP_INFO: UInt32 = 3
package let NBD_REP_META_CONTEXT: UInt32 = 4
package let NBD_REP_ERR_UNSUP: UInt32 = 0x8000_0001
package let NBD_REP_ERR_POLICY: UInt32 = 0x8000_0002
package let NBD_REP_ERR_INVALID: UInt32 = 0x8000_0003
package let NBD_REP_ERR_TLS_REQD: UInt32 = 0x8000_0005
package let NBD_REP_ERR_UNKNOWN: UInt32 = 0x8000_0006
package let NBD_REP_ERR_TOO_BIG: UInt32 = 0x8000_0009
package let NBD_REP_ERR_EXT_HEADER_REQD: UInt32 = 0x8000_000a

/// "NBD_INFO types".
package let NBD_INFO_EXPORT: UInt16 = 0
package let NBD_INFO_NAME: UInt16 = 1
package let NBD_INFO_DESCRIPTION: UInt16 = 2
package let NBD_INFO_BLOCK_SIZE: UInt16 = 3

/// "Structured reply flags" and "Structured reply types".
package let NBD_REPLY_FLAG_DONE: UInt16 = 1 << 0
package let NBD_REPLY_TYPE_NONE: UInt16 = 0
package let NBD_REPLY_TYPE_OFFSET_DATA: UInt16 = 1
package let NBD_REPLY_TYPE_OFFSET_HOLE: UInt16 = 2
package let NBD_REPLY_TYPE_BLOCK_STATUS: UInt16 = 5
package let NBD_REPLY_TYPE_BLOCK_STATUS_EXT: UInt16 = 6
package let NBD_REPLY_TYPE_ERROR: UInt16 = 0x8001

/// Flags of the context `base:allocation`, and of `qemu:dirty-bitmap:` (QEMU's docs/interop/nbd.txt).
package let NBD_STATE_HOLE: UInt32 = 1 << 0
package let NBD_STATE_ZERO: UInt32 = 1 << 1
package let NBD_STATE_DIRTY: UInt32 = 1 << 0

/// "Transmission flags".
package struct TransmissionFlags: OptionSet, Sendable {
    package let rawValue: UInt16
    package init(rawValue: UInt16) { self.rawValue = rawValue }
    package static let hasFlags = Self(rawValue: 1 << 0)
    package static let readOnly = Self(rawValue: 1 << 1)
    package static let sendFlush = Self(rawValue: 1 << 2)
    package static let sendFUA = Self(rawValue: 1 << 3)
    package static let sendTrim = Self(rawValue: 1 << 5)
    package static let sendWriteZeroes = Self(rawValue: 1 << 6)
    package static let sendDF = Self(rawValue: 1 << 7)
    package static let canMultiConn = Self(rawValue: 1 << 8)
    package static let sendCache = Self(rawValue: 1 << 10)
    package static let sendFastZero = Self(rawValue: 1 << 11)
}

/// "Request types".
package enum Command: UInt16, Sendable {
    case read = 0
    case write = 1
    case disconnect = 2
    case flush = 3
    case trim = 4
    case cache = 5
    case writeZeroes = 6
    case blockStatus = 7
}

/// "Command flags".
package struct CommandFlags: OptionSet, Sendable {
    package let rawValue: UInt16
    package init(rawValue: UInt16) { self.rawValue = rawValue }
    package static let fua = Self(rawValue: 1 << 0)
    package static let noHole = Self(rawValue: 1 << 1)
    package static let df = Self(rawValue: 1 << 2)
    package static let reqOne = Self(rawValue: 1 << 3)
    package static let fastZero = Self(rawValue: 1 << 4)
    package static let payloadLen = Self(rawValue: 1 << 5)
}

/// "Error values": the only ones that may stand on the wire.
package enum NBDError: UInt32, Error, Sendable {
    case notPermitted = 1
    case inputOutput = 5
    case outOfMemory = 12
    case invalid = 22
    case noSpace = 28
    case overflow = 75
    case notSupported = 95
    case shutdown = 108

    /// What stands beside the number in a structured error.
    package var message: StaticString {
        switch self {
        case .notPermitted: "the export is read-only"
        case .inputOutput: "the volume's storage reported an error"
        case .outOfMemory: "the server is out of memory"
        case .invalid: "the request is invalid for this export"
        case .noSpace: "no space: past the end of the export, or its storage is full"
        case .overflow: "longer than the advertised maximum"
        case .notSupported: "zeroing would be no faster than writing"
        case .shutdown: "the server is going down"
        }
    }

    /// The wire's error for a positive errno of the kernel; causes that the document does not name become EIO.
    package init(errno code: Int32) {
        switch code {
        case 1, 13, 30: self = .notPermitted  // EPERM, EACCES, EROFS
        case 12: self = .outOfMemory
        case 22: self = .invalid
        case 27, 28, 122: self = .noSpace  // EFBIG, ENOSPC, EDQUOT
        case 75: self = .overflow
        case 95: self = .notSupported
        case 108: self = .shutdown
        default: self = .inputOutput
        }
    }
}
