// StateDirectory.swift: where everything lies that a site knows about its volumes.
//
//   lock                                 held by the one process that serves the site
//   site.record                          identity
//   volumes/NAME/volume.record           size, grain, FlashCopies, how the last run ended
//   volumes/NAME/recording.bitmap        CR and OOS, and which is which
//   volumes/NAME/activity.log            regions that may have changed since the bitmaps were flushed
//   volumes/NAME/point.target .bitmap    old content for the point being drained
//   volumes/NAME/change.volume .bitmap   the first intermediate of mode change-volume
//   volumes/NAME/restore.bitmap          grains still to be restored from a FlashCopy or recovery point
//   volumes/NAME/copies/ID.target .bitmap
//   groups/NAME/group.record
//   reserve                              only takes space, given back when a failover finds none

import Base
import FoundationEssentials
import Glibc
import Groups
import Ring

/// Identity of a site.
struct SiteRecord: VersionedRecord {
    static let currentFormat = 2
    var format = currentFormat
    var id: String
}

struct StateDirectory: Sendable {
    let path: String
    private let lock: OpenFile

    /// Creates the directory if need be and takes its lock.
    init(path: String) throws {
        self.path = path
        try Self.makeDirectory(path)
        lock = try OpenFile(path: "\(path)/lock", flags: O_RDWR | O_CREAT)
        guard lock.tryLock() else {
            throw Refusal(
                "state directory \(path) is in use by another farcopy process; stop it first, "
                    + "or give this site a directory of its own")
        }
        try Self.makeDirectory("\(path)/volumes")
        try Self.makeDirectory("\(path)/groups")
        try synchronizeDirectory(path)
        try synchronizeDirectory(parentDirectory(path))
    }

    func volume(_ name: String) -> String { "\(path)/volumes/\(name)" }
    func group(_ name: String) -> String { "\(path)/groups/\(name)" }

    static func makeDirectory(_ path: String) throws {
        if mkdir(path, 0o700) != 0, errno != EEXIST { throw SystemError("create the directory \(path)") }
    }

    /// Removes files of copies that no record names: left by a crash between making files and recording them, or
    /// between the withdrawal's record and the removal.
    func removeOrphans(_ volume: String, bitmaps: Set<Int64>, targets: Set<Int64>) {
        let directory = "\(self.volume(volume))/copies"
        for name in (try? FileManager.default.contentsOfDirectory(atPath: directory)) ?? [] {
            let kept = name.hasSuffix(".target") ? targets : bitmaps
            if let id = Int64(name.prefix { $0 != "." }), kept.contains(id) { continue }
            unlink("\(directory)/\(name)")
        }
    }

    static func bootID() throws -> String {
        guard let text = try? String(contentsOfFile: "/proc/sys/kernel/random/boot_id", encoding: .utf8)
        else { throw Refusal("cannot read /proc/sys/kernel/random/boot_id") }
        return text.trimmingWhitespace()
    }
}

extension String {
    fileprivate func trimmingWhitespace() -> String {
        String(drop { $0.isWhitespace }.reversed().drop { $0.isWhitespace }.reversed())
    }
}

/// 128 random bits in hexadecimal.
func randomIdentity() -> String {
    identityText((UInt64.random(in: 0...UInt64.max), UInt64.random(in: 0...UInt64.max)))
}
