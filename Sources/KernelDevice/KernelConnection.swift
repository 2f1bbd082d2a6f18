// KernelConnection.swift: connections that libnbd negotiates and the kernel then uses.

import CLibNBD
import Glibc
import Ring

/// A socket in the transmission phase, with simple replies, which is all that the kernel's client speaks.
struct KernelConnection: ~Copyable {
    let socket: Int32
    let size: UInt64
    let flags: UInt64
    let minimumBlockSize: UInt64
    /// When the volume was last restored from a FlashCopy, in the server's words; nil = never, or it is none of Farcopy's.
    let restoredAt: String?

    private static let patienceSeconds: Double = 10

    /// - Throws: when the server cannot be reached within ten seconds, or refuses.
    init(uri: String) throws(SystemError) {
        guard let handle = nbd_create() else { throw Self.failure("make a connection to \(uri)") }
        defer { nbd_close(handle) }
        nbd_set_request_structured_replies(handle, false)
        nbd_set_full_info(handle, true)
        guard nbd_aio_connect_uri(handle, uri) == 0 else { throw Self.failure("connect to \(uri)") }
        let deadline = monotonicSeconds() + Self.patienceSeconds
        while nbd_aio_is_ready(handle) != 1 {
            guard nbd_aio_is_dead(handle) != 1, nbd_aio_is_closed(handle) != 1 else {
                throw Self.failure("connect to \(uri)")
            }
            guard monotonicSeconds() < deadline else { throw SystemError("connect to \(uri)", errno: ETIMEDOUT) }
            guard nbd_poll(handle, 500) >= 0 else { throw Self.failure("connect to \(uri)") }
        }
        guard nbd_get_tls_negotiated(handle) != 1 else {
            throw SystemError(
                "use \(uri) with the kernel, whose client has no TLS; open the export to it without", errno: EPROTO)
        }
        // libnbd closes its descriptor without a farewell; this one lives on.
        let socket = fcntl(nbd_aio_get_fd(handle), F_DUPFD_CLOEXEC, 3)
        guard socket >= 0 else { throw SystemError("keep the connection to \(uri)") }
        // The kernel's client reads and writes as if the socket blocked.
        _ = fcntl(socket, F_SETFL, 0)
        self.socket = socket
        size = UInt64(max(0, nbd_get_size(handle)))
        flags = Self.flags(handle)
        minimumBlockSize = UInt64(max(0, nbd_get_block_size(handle, Int32(LIBNBD_SIZE_MINIMUM))))
        restoredAt = Self.restoredAt(handle)
    }

    deinit { close(socket) }

    private static func restoredAt(_ handle: OpaquePointer) -> String? {
        guard let text = nbd_get_export_description(handle) else { return nil }
        defer { free(text) }
        let words = String(cString: text).split(separator: " ")
        return words.firstIndex(of: "restored").flatMap { $0 + 1 < words.endIndex ? String(words[$0 + 1]) : nil }
    }

    private static func failure(_ attempt: String) -> SystemError {
        let text = nbd_get_error().map { String(cString: $0) } ?? "unknown error"
        let code = nbd_get_errno()
        return SystemError("\(attempt): \(text)", errno: code == 0 ? EIO : code)
    }

    /// The transmission flags, as libnbd understood them ("Transmission flags" of the NBD document).
    private static func flags(_ handle: OpaquePointer) -> UInt64 {
        var flags: UInt64 = 1
        let asked: [(Int32, Int)] = [
            (nbd_is_read_only(handle), 1), (nbd_can_flush(handle), 2), (nbd_can_fua(handle), 3),
            (nbd_is_rotational(handle), 4), (nbd_can_trim(handle), 5), (nbd_can_zero(handle), 6),
            (nbd_can_multi_conn(handle), 8),
        ]
        for (answer, bit) in asked where answer == 1 { flags |= 1 << UInt64(bit) }
        return flags
    }
}

func monotonicSeconds() -> Double { Double(monotonicNanoseconds()) / 1e9 }
