// VolumeRecord.swift: what is written down about a volume, apart from the recovery points, which are its group's.

import FlashCopies
import Groups
import Ring
import Volumes

/// A record that says which version of its layout it has.
package protocol VersionedRecord: Codable, Sendable {
    static var currentFormat: Int { get }
    /// The oldest that is read; it becomes the current one with the next save.
    static var oldestFormat: Int { get }
}

extension VersionedRecord {
    package static var oldestFormat: Int { currentFormat }
}

/// A restore of a group from its change volumes that is under way.
struct LocalRestoreRecord: Codable, Sendable, Equatable {
    var point: UInt64
    /// The group's volumes, all of which take part.
    var members: [String]
}

struct VolumeRecord: VersionedRecord {
    static let currentFormat = 2

    /// Left by a stop in order: what everything looked like then.
    struct CleanMark: Codable, Sendable {
        /// Seconds since 1970.
        var stoppedAt: Double
        /// Modification time of the volume's file, in nanoseconds since 1970; nil for block devices.
        var modifiedAt: Int64?
        /// Of each bitmap file, by its name in the volume's directory.
        var checksums: [String: UInt32]
    }

    var format = currentFormat
    var id: String
    var name: String
    var size: UInt64
    var grain: Int
    var copies: [CopyRecord] = []
    var nextCopy: Int64 = 1
    /// Role and group that it was served in last, "primary shop"; nil = in none. Bitmaps and recovery points of a group
    /// say nothing about a volume that was written to outside it.
    var servedAs: String?
    /// In place of it: the volume's file was exchanged, or written to while nobody looked.
    static let anotherFile = "another file"
    /// The kernel's boot id of the last run, written down once everything that the run before left was taken up.
    var bootID: String
    /// What held the state directory, the volume and the operator's targets then, by path (`StorageInstance`).
    var storage: [String: String]?
    var clean: CleanMark?
    /// The file that was served last.
    var file: OpenFile.Identity?
    /// See `CopyTable`, as are `copies` and `nextCopy`.
    var restoring: CopyTable.Restoring?
    var restoredAt: Double?
    /// Of a primary's volume, in mode `change-volume`.
    var changeVolume: ChangeVolumeRecord?
    /// The volume is being restored to this point from its change volume: neither hosts nor points may see it.
    var localRestore: LocalRestoreRecord?
    /// The activity log could not be written: after power loss it says nothing.
    var logIsBroken = false

    /// What is written down about the volume's FlashCopies.
    var table: CopyTable {
        get { CopyTable(copies: copies, nextCopy: nextCopy, restoring: restoring, restoredAt: restoredAt) }
        set {
            (copies, nextCopy) = (newValue.copies, newValue.nextCopy)
            (restoring, restoredAt) = (newValue.restoring, newValue.restoredAt)
        }
    }
}
