// BitmapFile.swift: a file of bitmaps, or the activity log, whose first page says whose it is.

import Base
import Glibc
import Groups
import Ring
import Volumes

/// Metadata that cannot be relied on. What it described is unknown, and can be mended by assuming the worst.
struct DamagedMetadata: Error, CustomStringConvertible {
    var description: String
}

final class BitmapFile: Sendable {
    let mapping: MappedFile
    let header: BitmapHeader
    var path: String { mapping.file.path }

    /// Opens a file that must be the one that `header` describes, or makes it. A new one takes its place when all of it is on stable
    /// storage, so that it never says less than the one before it did; and it has all the storage that it will need: a mapping that
    /// finds no room ends the process (SIGBUS).
    ///
    /// - Parameter filled: which bitmaps of a new one have every bit set.
    /// - Throws: `DamagedMetadata` when it is missing, cut short or has no valid header; `Refusal` when it belongs to
    ///   something else or is of a newer version, since then nothing may be touched.
    init(path: String, header: BitmapHeader, create: Bool = false, filled: [Int] = []) throws {
        self.header = header
        if create {
            try Self.make(path, header, filled)
        } else {
            try Self.check(path, header)
        }
        mapping = try MappedFile(
            path: path, byteCount: header.fileBytes, create: false, markOffset: BitmapHeader.flushFailedOffset)
    }

    private static func make(_ path: String, _ header: BitmapHeader, _ filled: [Int]) throws {
        let new = "\(path).new"
        unlink(new)
        do {
            let mapping = try MappedFile(path: new, byteCount: header.fileBytes, create: true)
            let bytes = header.encoded
            mapping.memory.copyMemory(from: bytes, byteCount: bytes.count)
            for index in filled {
                Bitmap(memory: mapping.memory + header.offset(ofBitmap: index), count: grainCount(header)).setAll()
            }
            try mapping.synchronize()
            guard rename(new, path) == 0 else { throw SystemError("rename \(new)") }
        } catch {
            unlink(new)
            throw error
        }
    }

    private static func check(_ path: String, _ expected: BitmapHeader) throws {
        guard try exists(path) else { throw DamagedMetadata(description: "\(path) is missing") }
        let file = try OpenFile(path: path, flags: O_RDONLY)
        let found = try readHeader(file)
        guard found == expected else {
            throw Refusal(
                "\(path) belongs to something else: \(difference(found, expected)); bring this volume's own file back, or "
                    + "move the file away to have it made anew")
        }
        let size = try file.size()
        guard size == UInt64(expected.fileBytes) else {
            throw DamagedMetadata(
                description: "\(path) has \(size) bytes instead of \(expected.fileBytes): it was cut short")
        }
        // Now, while an error has words: a mapping that cannot be read ends the process.
        do { try file.readThrough() } catch { throw DamagedMetadata(description: "\(error)") }
    }

    /// Whether the copy has failed (`FlashCopy.failureMark`).
    var hasFailed: Bool { (mapping.memory + BitmapHeader.failedOffset).load(as: UInt64.self) != 0 }
    /// Whether a flush of the volume's own file has failed in the last run (`RecordingRoles.sourceLost`).
    var hasLostSource: Bool { (mapping.memory + BitmapHeader.sourceLostOffset).load(as: UInt64.self) != 0 }

    /// Of a copy, for the engine.
    func failureMark() -> UnsafeMutablePointer<UInt64> {
        (mapping.memory + BitmapHeader.failedOffset).assumingMemoryBound(to: UInt64.self)
    }

    static func readHeader(_ file: OpenFile) throws -> BitmapHeader {
        let bytes = try file.read(at: 0, count: BitmapHeader.byteCount)
        do {
            return try bytes.withUnsafeBytes { bytes throws(BitmapHeader.Fault) in try BitmapHeader(bytes) }
        } catch BitmapHeader.Fault.newer(let format) {
            throw Refusal(
                "\(file.path) was written by a newer farcopy (format \(format); this one reads \(BitmapHeader.currentFormat)); "
                    + "run that version")
        } catch {
            throw DamagedMetadata(description: "\(file.path) has no valid header: it is torn or damaged")
        }
    }

    private static func difference(_ found: BitmapHeader, _ expected: BitmapHeader) -> String {
        if found.volume != expected.volume {
            return "it has the bitmaps of volume \(identityText(found.volume)), not of \(identityText(expected.volume))"
        }
        if found.kind != expected.kind { return "it is a \(found.kind) file" }
        if found.copy != expected.copy { return "it is of copy \(found.copy), not of \(expected.copy)" }
        return "it is for \(found.size) bytes in grains of \(found.grain), not \(expected.size) in \(expected.grain)"
    }

    func bitmap(_ index: Int = 0) -> Bitmap {
        Bitmap(memory: mapping.memory + header.offset(ofBitmap: index), count: grainCount)
    }

    /// What lies behind the header.
    var contents: UnsafeRawBufferPointer {
        UnsafeRawBufferPointer(
            start: mapping.memory + BitmapHeader.byteCount, count: mapping.byteCount - BitmapHeader.byteCount)
    }

    private var grainCount: Int { Self.grainCount(header) }

    /// A header that was read has passed `Geometry`, or is not equal to the one expected.
    private static func grainCount(_ header: BitmapHeader) -> Int {
        Geometry(size: header.size, grain: Int(header.grain))!.grainCount
    }

    func synchronize() throws { try mapping.synchronize() }

    /// A checksum of everything behind the identity: of each page that is not all zero, with its number. It is kept while
    /// the site is stopped, so that bits that flip meanwhile are seen. The mark of a flush that has failed, which a start may leave that ends
    /// because of it, is not looked at.
    func checksum() throws -> UInt32 {
        let file = try mapping.file.open()
        let page = BitmapHeader.byteCount
        let header = UnsafeMutableRawBufferPointer.allocate(byteCount: page, alignment: 8)
        defer { header.deallocate() }
        var checksum: UInt32 = 0
        var offset: UInt64? = 0
        while let start = offset.flatMap({ file.nextData(from: $0) }), start < UInt64(mapping.byteCount) {
            let first = Int(start) / page * page
            var bytes = UnsafeRawBufferPointer(
                start: mapping.memory + first, count: min(page, mapping.byteCount - first))
            if first == 0 {
                header.copyMemory(from: bytes)
                header.storeBytes(of: 0, toByteOffset: BitmapHeader.flushFailedOffset, as: UInt64.self)
                bytes = UnsafeRawBufferPointer(header)
            }
            if bytes.contains(where: { $0 != 0 }) {
                let number = withUnsafeBytes(of: UInt64(first / page).littleEndian) {
                    CRC32C.checksum($0, after: checksum)
                }
                checksum = CRC32C.checksum(bytes, after: number)
            }
            offset = UInt64(first + page)
        }
        return checksum
    }
}

/// 128 bits as 32 hexadecimal digits, and back.
func identityText(_ identity: (UInt64, UInt64)) -> String {
    [identity.0, identity.1].map { word in
        let text = String(word, radix: 16)
        return String(repeating: "0", count: 16 - text.count) + text
    }.joined()
}

func identityWords(_ text: String) -> (UInt64, UInt64) {
    (UInt64(text.prefix(16), radix: 16) ?? 0, UInt64(text.dropFirst(16), radix: 16) ?? 0)
}
