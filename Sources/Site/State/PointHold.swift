// PointHold.swift: the files in which a primary's volume holds a point: a FlashCopy target, or the first intermediate of mode `change-volume`,
// and the bitmap that says which grains of the point are there.

import Glibc
import Ring
import Volumes

struct PointHold: Sendable {
    let target: OpenFile
    let bitmap: BitmapFile
    static let targetBitmapName = "point.bitmap"

    var isIntermediate: Bool { bitmap.header.kind == .change }
    /// In the volume's directory.
    var bitmapName: String { isIntermediate ? ChangeVolume.bitmapName : Self.targetBitmapName }

    /// The sparse target in the volume's directory, as large as the volume.
    static func openTarget(_ directory: String, _ size: UInt64) throws -> OpenFile {
        let target = try OpenFile(path: "\(directory)/point.target", flags: O_RDWR | O_CREAT)
        if try target.size() != size { try target.truncate(to: size) }
        return target
    }

    /// What was copied there, and then what the bitmaps say of it.
    func synchronize() throws {
        try target.synchronize()
        try bitmap.synchronize()
    }

    /// What was copied there may be gone: the point is given up at the next start, and an intermediate is filled anew.
    func distrust(heldBy recording: BitmapFile, _ geometry: Geometry) {
        (recording.mapping.memory + BitmapHeader.rolesOffset)
            .assumingMemoryBound(to: RecordingRoles.self).pointee.heldPoint = 0
        if isIntermediate { bitmap.distrust(grains: 0..<geometry.grainCount) }
        try? recording.synchronize()
        try? bitmap.synchronize()
    }
}
