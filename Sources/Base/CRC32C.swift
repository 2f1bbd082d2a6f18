// CRC32C.swift: the Castagnoli checksum of RFC 3720, appendix B.4, for what lies on disk.

/// CRC-32C (polynomial 0x1EDC6F41, reflected, initial and final value inverted).
package enum CRC32C {
    /// Eight tables of 256 entries, so that eight bytes go in one step. Lives as long as the process.
    // Safe because: written once before anybody reads it.
    private nonisolated(unsafe) static let tables: UnsafePointer<UInt32> = {
        let tables = UnsafeMutablePointer<UInt32>.allocate(capacity: 8 * 256)
        for index in 0..<256 {
            var value = UInt32(index)
            for _ in 0..<8 { value = value & 1 == 1 ? (value >> 1) ^ 0x82F6_3B78 : value >> 1 }
            tables[index] = value
        }
        for index in 256..<8 * 256 {
            let value = tables[index - 256]
            tables[index] = (value >> 8) ^ tables[Int(value & 0xFF)]
        }
        return UnsafePointer(tables)
    }()

    package static func checksum(_ bytes: [UInt8]) -> UInt32 { bytes.withUnsafeBytes { checksum($0) } }

    /// - Parameter earlier: the checksum of what comes before `bytes`.
    package static func checksum(_ bytes: UnsafeRawBufferPointer, after earlier: UInt32 = 0) -> UInt32 {
        let tables = tables
        var value = ~earlier
        var index = 0
        while index + 8 <= bytes.count {
            let word = UInt64(littleEndian: bytes.loadUnaligned(fromByteOffset: index, as: UInt64.self)) ^ UInt64(value)
            var next: UInt32 = 0
            for byte in 0..<8 { next ^= tables[(7 - byte) << 8 | Int(word >> UInt64(8 * byte) & 0xFF)] }
            value = next
            index += 8
        }
        while index < bytes.count {
            value = (value >> 8) ^ tables[Int((value ^ UInt32(bytes[index])) & 0xFF)]
            index += 1
        }
        return ~value
    }
}
