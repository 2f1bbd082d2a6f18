// Inspection.swift: `farcopy inspect PATH`: what lies on disk, for people. It changes nothing.

import Base
import FoundationEssentials
import Glibc
import Groups
import Ring
import Volumes

package enum Inspection {
    /// Lines about a record, a bitmap file, an activity log, or every such file below a directory.
    ///
    /// - Throws: `Refusal` when there is nothing that can be read.
    package static func describe(_ path: String) throws -> [String] {
        var facts = stat()
        guard stat(path, &facts) == 0 else { throw Refusal("\(path): \(String(cString: strerror(errno)))") }
        guard facts.st_mode & S_IFMT == S_IFDIR else { return try describeFile(path) }
        var lines: [String] = []
        for name in try FileManager.default.contentsOfDirectory(atPath: path).sorted() {
            let inner = path.hasSuffix("/") ? path + name : "\(path)/\(name)"
            guard stat(inner, &facts) == 0 else { continue }
            let isDirectory = facts.st_mode & S_IFMT == S_IFDIR
            guard isDirectory || [".record", ".bitmap", ".log"].contains(where: { name.hasSuffix($0) }) else {
                continue
            }
            do { lines += try describe(inner) } catch { lines.append("\(error)") }
        }
        return lines
    }

    private static func describeFile(_ path: String) throws -> [String] {
        let file = try OpenFile(path: path, flags: O_RDONLY)
        let start = try file.read(at: 0, count: 8)
        if start == Array("FARCOPYB".utf8) { return try describeBitmaps(file) }
        let copies = try RecordCopy.all(in: file.readAll())
        guard copies.contains(where: { $0.payload != nil }) || path.hasSuffix(".record") else {
            throw Refusal("\(path) is neither a record nor a bitmap file of farcopy")
        }
        return describeRecord(path, copies)
    }

    // MARK: Records

    private static func describeRecord(_ path: String, _ copies: [RecordCopy]) -> [String] {
        let valid = copies.filter { $0.payload != nil }.max { $0.sequence < $1.sequence }
        var lines = ["\(path): record"]
        for copy in copies {
            let state = copy.payload == nil ? copy.isPresent ? "damaged" : "never written" : "valid"
            let current = copy.offset == valid?.offset ? ", the current one" : ""
            lines.append(
                "  copy at \(copy.offset): \(state)"
                    + (copy.payload == nil ? "" : ", sequence \(copy.sequence), \(copy.payload!.count) bytes\(current)")
            )
        }
        if let payload = valid?.payload { lines.append("  " + String(decoding: payload, as: UTF8.self)) }
        return lines
    }

    // MARK: Bitmaps

    private static func describeBitmaps(_ file: OpenFile) throws -> [String] {
        let header: BitmapHeader
        do { header = try BitmapFile.readHeader(file) } catch { return ["\(error)"] }
        var lines = [
            "\(file.path): \(header.kind), format \(BitmapHeader.currentFormat)",
            "  volume \(identityText(header.volume)), \(header.size) bytes in grains of \(header.grain)"
                + (header.copy == 0 ? "" : ", copy \(header.copy)"),
        ]
        let size = try file.size()
        if size != UInt64(header.fileBytes) {
            lines.append("  cut short: \(size) bytes instead of \(header.fileBytes)")
        }
        guard let geometry = Geometry(size: header.size, grain: Int(header.grain)) else {
            return lines + ["  no possible size or grain"]
        }
        if header.kind == .activityLog { return lines + (try describeLog(file, header)) }
        if header.kind == .recording {
            let word = try file.read(at: BitmapHeader.rolesOffset, count: 8)
            lines.append("  bitmap \(word.first ?? 0) records changes")
        }
        for index in 0..<Int(header.bitmaps) {
            let bits = try population(file, header.offset(ofBitmap: index), Bitmap.byteCount(bits: geometry.grainCount))
            lines.append(
                "  bitmap \(index) at \(header.offset(ofBitmap: index)): \(bits) of \(geometry.grainCount) bits set")
        }
        return lines
    }

    private static func population(_ file: OpenFile, _ offset: Int, _ count: Int) throws -> Int {
        var bits = 0
        var next = file.nextData(from: UInt64(offset))
        while let start = next, start < UInt64(offset + count) {
            let bytes = try file.read(at: Int(start), count: min(1 << 20, offset + count - Int(start)))
            for byte in bytes { bits += byte.nonzeroBitCount }
            if bytes.isEmpty { break }
            next = file.nextData(from: start + UInt64(bytes.count))
        }
        return bits
    }

    private static func describeLog(_ file: OpenFile, _ header: BitmapHeader) throws -> [String] {
        let bytes = try file.read(at: ActivityLog.fileOffset, count: Int(header.bitmapBytes))
        let regions = bytes.withUnsafeBytes { Regions(size: header.size, log: $0) }
        let regionBytes = UInt64(1) << ActivityLog.layout(size: header.size).shift
        var line =
            "  \(regions.bitmap.population()) of \(regions.bitmap.count) regions of \(regionBytes) bytes are active"
        if regions.damagedSectors > 0 {
            line += "; \(regions.damagedSectors) sectors are damaged and count as all active"
        }
        return [line]
    }
}
