// StateDirectory.swift: where everything lies that a site knows about its volumes.
//
//   lock                                 held by the one process that serves the site
//   site.record                          identity, boot id, whether the last stop was clean
//   volumes/NAME/volume.record           size, grain, FlashCopies
//   volumes/NAME/recording-0.bitmap -1   CR and OOS; roles says which is which
//   volumes/NAME/point.target .bitmap    old content for the point being drained
//   volumes/NAME/restore.bitmap          grains still to be restored after a failover
//   volumes/NAME/copies/ID.target .bitmap
//   groups/NAME/group.record

import Base
import FoundationEssentials
import Glibc
import Ring

/// Identity of a site and what its last process left behind.
struct SiteRecord: Codable, Sendable {
    var format = 1
    var id: String
    var bootID: String
    /// The process ended in order: everything is on stable storage.
    var clean: Bool
}

/// What is recorded about a volume, apart from the recovery points, which are its group's.
struct VolumeRecord: Codable, Sendable {
    struct Copy: Codable, Sendable {
        enum State: String, Codable { case active, failed, withdrawing }
        var id: Int64
        var name: String
        var createdAt: Double
        var order: UInt64
        var state: State
        var reason: String?
    }
    var format = 1
    var id: String
    var size: UInt64
    var grain: Int
    var copies: [Copy] = []
    var nextCopy: Int64 = 1
    /// Role and group that it was served in last, "primary shop"; nil = in none. Bitmaps and recovery points of a group
    /// say nothing about a volume that was written to outside it.
    var servedAs: String?
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
            throw SiteError(
                "state directory \(path) is in use by another farcopy process; stop it first, "
                    + "or give this site a directory of its own")
        }
        try Self.makeDirectory("\(path)/volumes")
        try Self.makeDirectory("\(path)/groups")
    }

    func volume(_ name: String) -> String { "\(path)/volumes/\(name)" }
    func group(_ name: String) -> String { "\(path)/groups/\(name)" }
    func copy(_ volume: String, _ id: Int64) -> String { "\(self.volume(volume))/copies/\(id)" }

    static func makeDirectory(_ path: String) throws {
        if mkdir(path, 0o700) != 0, errno != EEXIST { throw SystemError("create the directory \(path)") }
    }

    /// Removes files of copies that no record names: left by a crash between making files and recording them, or
    /// between the withdrawal's record and the removal.
    func removeOrphans(_ volume: String, keeping ids: Set<Int64>) {
        let directory = "\(self.volume(volume))/copies"
        for name in (try? FileManager.default.contentsOfDirectory(atPath: directory)) ?? [] {
            if let id = Int64(name.prefix { $0 != "." }), ids.contains(id) { continue }
            unlink("\(directory)/\(name)")
        }
    }

    static func bootID() throws -> String {
        guard let text = try? String(contentsOfFile: "/proc/sys/kernel/random/boot_id", encoding: .utf8)
        else { throw SiteError("cannot read /proc/sys/kernel/random/boot_id") }
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
    (0..<2).map { _ in
        let text = String(UInt64.random(in: 0...UInt64.max), radix: 16)
        return String(repeating: "0", count: 16 - text.count) + text
    }.joined()
}
