// DurableRecord.swift: a small value on disk that is replaced as a whole or not at all.
//
// Two copies in one file, written in turn; each has a header of 32 bytes, all little-endian:
//   0  magic "FARCOPY1"      8  sequence number (64)     16  payload length (32)
//   20 CRC-32C of bytes 0–19, 24–31 and the payload (32)     24  reserved, zero (64)
// followed by the payload, JSON in UTF-8. The valid copy with the larger sequence number counts. A copy begins at
// 0 or at `copyBytes`.
//
// Must be prevented: a crash in mid-write loses both the old and the new value.

import Base
import FoundationEssentials
import Glibc
import Ring

package final class DurableRecord<Value: Codable & Sendable> {
    private static var copyBytes: Int { 256 << 10 }
    private static var headerBytes: Int { 32 }
    private static var magic: [UInt8] { Array("FARCOPY1".utf8) }

    private let file: OpenFile
    private var sequence: UInt64 = 0
    private let directory: String
    private var isNew: Bool

    /// Opens or creates the file.
    ///
    /// - Returns: in `value`, what it holds; nil when it is new.
    /// - Throws: when there are contents but no valid copy, naming the file.
    package init(path: String, value: inout Value?) throws {
        file = try OpenFile(path: path, flags: O_RDWR | O_CREAT)
        directory = path.split(separator: "/").dropLast().reduce("") { $0 + "/" + $1 }
        let bytes = try file.readAll()
        isNew = bytes.isEmpty
        guard !bytes.isEmpty else { return }
        var best: (UInt64, ArraySlice<UInt8>)?
        for start in [0, Self.copyBytes] {
            if let copy = Self.parse(bytes, start), copy.0 > best?.0 ?? 0 { best = copy }
        }
        guard let best else {
            throw SiteError(
                "\(path) holds no valid record; restore it from a backup, or remove it to begin anew "
                    + "(what it described must then be copied in full)")
        }
        sequence = best.0
        do {
            value = try JSONDecoder().decode(Value.self, from: Data(best.1))
        } catch {
            throw SiteError(
                "\(path) was written by another version of farcopy and cannot be read: \(error)")
        }
    }

    private static func parse(_ bytes: [UInt8], _ start: Int) -> (UInt64, ArraySlice<UInt8>)? {
        guard bytes.count >= start + headerBytes, Array(bytes[start..<start + 8]) == magic else {
            return nil
        }
        func integer(_ offset: Int, _ count: Int) -> UInt64 {
            (0..<count).reduce(0) { $0 | UInt64(bytes[start + offset + $1]) << UInt64(8 * $1) }
        }
        let length = Int(integer(16, 4))
        guard length <= copyBytes - headerBytes, bytes.count >= start + headerBytes + length else {
            return nil
        }
        let payload = bytes[start + headerBytes..<start + headerBytes + length]
        let covered = Array(bytes[start..<start + 20]) + bytes[start + 24..<start + 32] + payload
        guard CRC32C.checksum(covered) == UInt32(integer(20, 4)) else { return nil }
        return (integer(8, 8), payload)
    }

    /// Replaces the value; on return it is on stable storage.
    package func save(_ value: Value) throws {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys]
        let payload = [UInt8](try encoder.encode(value))
        guard payload.count <= Self.copyBytes - Self.headerBytes else {
            throw SiteError("\(file.path): a record of \(payload.count) bytes is too large")
        }
        sequence += 1
        var head = Self.magic
        for (number, count) in [(sequence, 8), (UInt64(payload.count), 4)] {
            for index in 0..<count { head.append(UInt8(truncatingIfNeeded: number >> UInt64(8 * index))) }
        }
        let reserved = [UInt8](repeating: 0, count: 8)
        let checksum = CRC32C.checksum(head + reserved + payload)
        var bytes = head
        for index in 0..<4 { bytes.append(UInt8(truncatingIfNeeded: checksum >> UInt32(8 * index))) }
        bytes += reserved + payload
        try file.write(bytes, at: sequence % 2 == 0 ? 0 : Self.copyBytes)
        try file.synchronize()
        if isNew {
            try synchronizeDirectory(directory)
            isNew = false
        }
    }
}

/// An error of a site's operation, in words for the operator.
package struct SiteError: Error, CustomStringConvertible {
    package var description: String
    /// HTTP status of the answer that carries it.
    package var status: Int
    package init(_ description: String, status: Int = 409) {
        self.description = description
        self.status = status
    }
}
