// Growth.swift: a volume that is larger than when it was served last: its bitmaps become larger with it.
//
// Files are exchanged one by one, each by a rename, and the record says the new size last: after a crash in between the next
// start does the rest.
//
// Must be prevented:
//   a bit of the volume as it was gets lost
//   a new grain counts as alike at both sites before it was sent

import Base
import FoundationEssentials
import Glibc
import Ring
import Volumes

enum Growth {
    /// Grows the metadata of a volume.
    ///
    /// - Parameter trusted: the mapped files are as the last process left them.
    static func carryOut(_ directory: String, _ record: inout VolumeRecord, to geometry: Geometry, trusted: Bool) throws
    {
        let identity = identityWords(record.id)
        var paths = ["recording.bitmap", "point.bitmap", "restore.bitmap", ChangeVolume.bitmapName]
        let copies = try FileManager.default.contentsOfDirectory(atPath: "\(directory)/copies")
        paths += copies.filter { $0.hasSuffix(".bitmap") }.map { "copies/\($0)" }
        for name in paths where try exists("\(directory)/\(name)") {
            try growBitmaps("\(directory)/\(name)", identity, record, name, to: geometry)
        }
        for name in copies where name.hasSuffix(".target") {
            try growTarget("\(directory)/copies/\(name)", from: record.size, to: geometry.size)
        }
        let log = BitmapHeader(.activityLog, volume: identity, geometry: geometry)
        if trusted {
            _ = try BitmapFile(path: "\(directory)/activity.log", header: log, create: true)
        } else {
            unlink("\(directory)/activity.log")  // what it said was of other regions: the worst is assumed
        }
        try synchronizeDirectory("\(directory)/copies")
        try synchronizeDirectory(directory)
        for index in record.copies.indices {
            // Before the record is looked at after power loss, what was complete is so up to here.
            if record.copies[index].isComplete { record.copies[index].completeBytes = record.size }
            record.copies[index].isComplete = false
            if let path = record.copies[index].target { try growTarget(path, from: record.size, to: geometry.size) }
        }
        record.changeVolume?.isFilled = false
        record.clean?.checksums = [:]
        record.size = geometry.size
    }

    /// A sparse file under a FlashCopy; a device of the operator's must have grown already.
    private static func growTarget(_ path: String, from old: UInt64, to size: UInt64) throws {
        guard try exists(path) else { return }
        let target = try OpenFile(path: path, flags: O_RDWR)
        if try target.isRegularFile(), try target.size() == old { try target.truncate(to: size) }
    }

    /// What is damaged is removed, so that the worst is assumed of it.
    private static func growBitmaps(
        _ path: String, _ identity: (UInt64, UInt64), _ record: VolumeRecord, _ name: String, to geometry: Geometry
    ) throws {
        var header: BitmapHeader
        do {
            header = try BitmapFile.readHeader(try OpenFile(path: path, flags: O_RDONLY))
        } catch is DamagedMetadata {
            unlink(path)
            return
        }
        // Otherwise it has grown already, or is refused when it is opened.
        guard header.volume == identity, header.size == record.size else { return }
        let old = try BitmapFile(path: path, header: header)
        if let expected = record.clean?.checksums[name], try old.checksum() != expected {
            unlink(path)
            return
        }
        header = BitmapHeader(
            header.kind, volume: identity, geometry: geometry, copy: header.copy, bitmaps: Int(header.bitmaps))
        let grown = try BitmapFile(path: "\(path).grown", header: header, create: true)
        let state = BitmapHeader.rolesOffset
        (grown.mapping.memory + state).copyMemory(
            from: old.mapping.memory + state, byteCount: BitmapHeader.byteCount - state)
        for index in 0..<Int(header.bitmaps) {
            (grown.mapping.memory + header.offset(ofBitmap: index)).copyMemory(
                from: old.mapping.memory + old.header.offset(ofBitmap: index), byteCount: Int(old.header.bitmapBytes))
        }
        if header.kind == .recording { markNewGrains(grown, from: record.size, geometry) }
        if header.kind == .change {
            grown.distrust(grains: Int(record.size >> geometry.grainShift)..<geometry.grainCount)
        }
        try grown.synchronize()
        guard rename("\(path).grown", path) == 0 else { throw SystemError("rename \(path).grown") }
    }

    private static func markNewGrains(_ file: BitmapFile, from size: UInt64, _ geometry: Geometry) {
        let roles = (file.mapping.memory + BitmapHeader.rolesOffset).load(as: RecordingRoles.self)
        file.bitmap(Int(roles.changeRecordingIndex & 1)).set(Int(size >> geometry.grainShift)..<geometry.grainCount)
    }
}
