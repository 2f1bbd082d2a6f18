// DurableRecord.swift: a small value on disk that is replaced as a whole or not at all.
//
// Two copies in one file, written in turn; each has a header of 32 bytes, all little-endian:
//   0  magic "FARCOPY1"      8  sequence number (64)     16  payload length (32)
//   20 CRC-32C of bytes 0–19, 24–31 and the payload (32)     24  reserved, zero (64)
// followed by the payload, JSON in UTF-8. The valid copy with the larger sequence number counts. A copy begins at
// 0 or at `copyBytes`.
//
// Must be prevented:
//   a crash, or an error, in mid-write loses both the old and the new value: what could not be written counts for nothing, and the
//     next save goes over it, never over the copy that is good
//   a full disk keeps a record from being replaced: both copies have space of their own from the beginning

import Base
import FoundationEssentials
import Glibc
import Groups
import Ring
import Synchronization

package final class DurableRecord<Value: VersionedRecord>: @unchecked Sendable {
    // Safe because: what changes, changes in `save`, under the lock.
    private let lock = Mutex(())
    private var file: OpenFile
    private var sequence: UInt64 = 0
    private let directory: String
    private var isNew: Bool
    /// A flush has failed: where it wrote, a later one may succeed without having written (`OpenFile.flushProofError` for ext4; the kernel
    /// calls the pages clean). A whole new file takes the place of this one.
    private var mustReplace = false

    /// Opens or creates the file.
    ///
    /// - Returns: in `value`, what it holds; nil when it is new.
    /// - Throws: when there are contents but no valid copy, naming the file.
    package init(path: String, value: inout Value?) throws {
        file = try OpenFile(path: path, flags: O_RDWR | O_CREAT)
        directory = parentDirectory(path)
        let bytes = try file.readAll()
        isNew = bytes.isEmpty
        RecordCopy.reserveSpace(in: file)
        guard !bytes.isEmpty else { return }
        let valid = RecordCopy.all(in: bytes).filter { $0.payload != nil }
        guard let best = valid.max(by: { $0.sequence < $1.sequence }), let payload = best.payload else {
            throw Refusal(
                "\(path) holds no valid record; restore it from a backup, or remove it to begin anew "
                    + "(what it described must then be copied in full)")
        }
        // What a killed process had written and not flushed counts from here on, and must not go back by power loss.
        try synchronizeDirectory(directory)
        try file.synchronize()
        sequence = best.sequence
        try checkFormat(Data(payload))
        do {
            value = try JSONDecoder().decode(Value.self, from: Data(payload))
        } catch {
            throw Refusal(
                "\(path) was written by another version of farcopy and cannot be read: \(error)")
        }
    }

    private struct Format: Decodable { var format: Int }

    private func checkFormat(_ payload: Data) throws {
        guard let found = (try? JSONDecoder().decode(Format.self, from: payload))?.format,
            !(Value.oldestFormat...Value.currentFormat).contains(found)
        else { return }
        throw Refusal(
            found > Value.currentFormat
                ? "\(file.path) was written by a newer farcopy (format \(found); this one reads \(Value.currentFormat)); run that version"
                : "\(file.path) was written by an older farcopy (format \(found)), which was never released; remove the state directory"
        )
    }

    /// Replaces the value; on return it is on stable storage.
    package func save(_ value: Value) throws { try lock.withLock { _ in try replace(value) } }

    private func replace(_ value: Value) throws {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys]
        let payload = [UInt8](try encoder.encode(value))
        guard payload.count <= RecordCopy.spaceBytes - RecordCopy.headerBytes else {
            throw Refusal("\(file.path): a record of \(payload.count) bytes is too large")
        }
        let next = sequence + 1
        var head = RecordCopy.magic
        for (number, count) in [(next, 8), (UInt64(payload.count), 4)] {
            for index in 0..<count { head.append(UInt8(truncatingIfNeeded: number >> UInt64(8 * index))) }
        }
        let reserved = [UInt8](repeating: 0, count: 8)
        let checksum = CRC32C.checksum(head + reserved + payload)
        var bytes = head
        for index in 0..<4 { bytes.append(UInt8(truncatingIfNeeded: checksum >> UInt32(8 * index))) }
        bytes += reserved + payload
        let start = next % 2 == 0 ? 0 : RecordCopy.spaceBytes
        if mustReplace {
            try replaceFile(bytes, at: start)
        } else {
            if isNew { try synchronizeDirectory(directory) }  // while it is empty, which a start takes for new
            try file.write(bytes, at: start)
            do {
                try file.synchronize()
            } catch {
                mustReplace = true
                throw error
            }
        }
        isNew = false
        sequence = next
    }

    private func replaceFile(_ bytes: [UInt8], at start: Int) throws {
        let path = file.path
        let new = "\(path).new"
        unlink(new)
        let made = try OpenFile(path: new, flags: O_RDWR | O_CREAT)
        RecordCopy.reserveSpace(in: made)
        try made.write(bytes, at: start)
        try made.synchronize()
        let descriptor = fcntl(made.descriptor, F_DUPFD_CLOEXEC, 0)
        guard descriptor >= 0 else { throw SystemError("open \(new)") }
        let renamed = OpenFile(descriptor: descriptor, path: path)
        guard rename(new, path) == 0 else { throw SystemError("rename \(new)") }
        file = renamed
        try synchronizeDirectory(directory)
        try file.synchronize()
        mustReplace = false
    }
}

/// One of the two copies in a record's file.
struct RecordCopy {
    static let spaceBytes = 256 << 10
    static let headerBytes = 32
    /// Storage that each copy has from the beginning.
    static let reservedBytes = 16 << 10
    static let magic = Array("FARCOPY1".utf8)

    var offset: Int
    /// Something was written here.
    var isPresent: Bool
    var sequence: UInt64 = 0
    /// Nil unless the copy is whole.
    var payload: ArraySlice<UInt8>?

    /// Gives both copies their storage, if there is any left.
    static func reserveSpace(in file: OpenFile) {
        for start in [0, spaceBytes] { try? file.reserve(start..<start + reservedBytes) }
    }

    static func all(in bytes: [UInt8]) -> [RecordCopy] { [0, spaceBytes].map { parse(bytes, $0) } }

    private static func parse(_ bytes: [UInt8], _ start: Int) -> RecordCopy {
        guard bytes.count >= start + headerBytes else { return RecordCopy(offset: start, isPresent: false) }
        let header = bytes[start..<start + headerBytes]
        guard Array(header.prefix(8)) == magic else {
            return RecordCopy(offset: start, isPresent: header.contains { $0 != 0 })
        }
        func integer(_ offset: Int, _ count: Int) -> UInt64 {
            (0..<count).reduce(0) { $0 | UInt64(bytes[start + offset + $1]) << UInt64(8 * $1) }
        }
        var copy = RecordCopy(offset: start, isPresent: true, sequence: integer(8, 8))
        let length = Int(integer(16, 4))
        guard length <= spaceBytes - headerBytes, bytes.count >= start + headerBytes + length else { return copy }
        let payload = bytes[start + headerBytes..<start + headerBytes + length]
        let covered = Array(bytes[start..<start + 20]) + bytes[start + 24..<start + 32] + payload
        if CRC32C.checksum(covered) == UInt32(integer(20, 4)) { copy.payload = payload }
        return copy
    }
}
