// ChangeVolume.swift: the first intermediate of a volume (mode `change-volume`): the file that takes each grain of a point before it is
// sent, the bitmaps that say what of it is what, and what is written down about both (Volumes/Intermediate.swift has the invariants).
//
// Must be prevented:
//   another file, or one that somebody has written to, is believed to hold what the bitmaps say
//   what was copied there counts as there although it was on no stable storage when power was lost
//   an intermediate counts that took no part in what its group did meanwhile: in another mode, as a secondary's, before a failover

import Base
import Glibc
import Groups
import Ring
import Volumes

/// What is written down about an intermediate that is in use.
struct ChangeVolumeRecord: Codable, Sendable, Equatable {
    var path: String
    /// Nil for a block device.
    var file: OpenFile.Identity?
    /// The group's newest when it began to be used.
    var generation: String
    /// It lacks nothing, on stable storage.
    var isFilled = false
    /// Of a file, in nanoseconds since 1970, when the site was stopped in order.
    var modifiedAt: Int64?
    /// The volume's own file was exchanged, and adopted: in this boot of the kernel what was trusted then is trusted still.
    var adoptedIn: String?

    /// Says that in any boot.
    static let anyBoot = "any"
}

extension BitmapFile {
    private static let advanced = 1
    private static let lacking = 2
    /// `preserved`, `advanced`, `lacking`.
    static let changeBitmaps = 3

    /// Of a change volume, for the engine.
    func intermediate(in file: StoreFile) -> Intermediate {
        let word = (mapping.memory + BitmapHeader.committedOffset).assumingMemoryBound(to: UInt64.self)
        return Intermediate(
            file: file, advanced: bitmap(Self.advanced), lacking: bitmap(Self.lacking), isVoid: word)
    }

    /// Of a change volume: nothing is known of these grains there.
    func distrust(grains: Range<Int>) {
        bitmap(Self.advanced).set(grains)
        bitmap(Self.lacking).set(grains)
        (mapping.memory + BitmapHeader.committedOffset).storeBytes(of: 0, as: UInt64.self)
    }

    /// Of a change volume: nothing is known of any grain there (`Volume.distrustIntermediate`).
    static func makeChangeBitmap(_ path: String, _ header: BitmapHeader) throws -> BitmapFile {
        let file = try BitmapFile(path: path, header: header, create: true, filled: [advanced, lacking])
        try synchronizeDirectory(parentDirectory(path))
        return file
    }
}

/// A volume's intermediate as a start, or a change of roles, finds it.
struct ChangeVolume {
    static let bitmapName = "change.bitmap"
    let path: String
    let directory: String
    let header: BitmapHeader

    init(_ configured: String?, directory: String, identity: (UInt64, UInt64), _ geometry: Geometry) {
        self.directory = directory
        path = configured ?? "\(directory)/change.volume"
        header = BitmapHeader(.change, volume: identity, geometry: geometry, bitmaps: BitmapFile.changeBitmaps)
    }

    /// A new one, in which nothing is known, on stable storage.
    func makeBitmap() throws -> BitmapFile {
        try BitmapFile.makeChangeBitmap("\(directory)/\(Self.bitmapName)", header)
    }

    /// The file or device, as large as the volume; a file that is not there is made, sparse.
    ///
    /// - Returns: also whether it was shorter: then it is not what was used before.
    func openFile() throws -> (file: OpenFile, wasShort: Bool) {
        let file: OpenFile
        do { file = try OpenFile.storage(path: path, waitMilliseconds: 2000) } catch {
            throw Refusal("change_volume: \(error)")
        }
        guard file.tryLock() else { throw Refusal("change_volume: \(path) is served by another farcopy process") }
        let size = try file.size()
        if size < header.size {
            guard try file.isRegularFile() else {
                throw Refusal(
                    "change_volume: the device \(path) has \(size) bytes, and its volume \(header.size); give one that is as large"
                )
            }
            try file.truncate(to: header.size)
        }
        return (file, size < header.size)
    }

    /// Whether what is written down is about this file as it is.
    func isSame(_ file: OpenFile, as record: ChangeVolumeRecord?, generation: String, stoppedInOrder: Bool) throws
        -> Bool
    {
        guard let record, record.path == path, record.generation == generation else { return false }
        guard try file.identity() == record.file else { return false }
        return try !stoppedInOrder || record.modifiedAt == nil || record.modifiedAt == file.modifiedAt()
    }

    func record(_ file: OpenFile, generation: String) throws -> ChangeVolumeRecord {
        ChangeVolumeRecord(path: path, file: try file.identity(), generation: generation)
    }
}
