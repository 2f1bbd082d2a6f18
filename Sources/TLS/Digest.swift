// Digest.swift: checksums of blocks, by which two sites find out what they have alike.
//
// SHA-256 cut to 128 bits: a block that is taken for equal is not sent, so the checksum must not collide by any chance that
// matters, nor by somebody's will. GnuTLS, which is there for TLS, uses the processor's instructions for it.

import CGnuTLS

package enum Digest {
    package static let byteCount = 16

    /// The checksums of blocks of `block` bytes, one after the other; the last block may be shorter.
    package static func blocks(_ bytes: UnsafeRawBufferPointer, block: Int) -> [UInt8] {
        let count = (bytes.count + block - 1) / block
        var whole = [UInt8](repeating: 0, count: 32)
        var digests: [UInt8] = []
        digests.reserveCapacity(count * byteCount)
        for index in 0..<count {
            let part = UnsafeRawBufferPointer(
                rebasing: bytes[index * block..<min(bytes.count, (index + 1) * block)])
            let result = gnutls_hash_fast(GNUTLS_DIG_SHA256, part.baseAddress!, part.count, &whole)
            precondition(result == 0, "GnuTLS has SHA-256")
            digests += whole[..<byteCount]
        }
        return digests
    }
}
