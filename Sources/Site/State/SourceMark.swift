// SourceMark.swift: what the next start must not rely on, as an attribute of the volume's own file (`Distrust.swift`).
//
// Must be prevented:
//   a mark that another version has left, and nobody understands, counts for nothing

import Base
import FoundationEssentials
import Glibc
import Ring
import Volumes

/// An attribute of a volume's file.
struct SourceMark: Codable, Equatable {
    private static let attribute = "user.farcopy.distrust"
    /// File systems have room for little; beyond this many it is all of them.
    private static let mostCopies = 100
    /// Identity of the volume whose metadata is meant: a file that was copied with its attributes is another's.
    var volume: String
    var logIsBroken: Bool
    /// Durable FlashCopies and recovery points that have failed; nil = all.
    var failed: [CopyID]?

    init(volume: String, logIsBroken: Bool, failed: Set<CopyID>) {
        self.volume = volume
        self.logIsBroken = logIsBroken
        self.failed = failed.count > Self.mostCopies ? nil : failed.sorted()
    }

    /// - Throws: when it cannot be told whether there is one.
    static func read(_ source: OpenFile, volume: String) throws -> SourceMark? {
        guard let bytes = try source.attribute(attribute) else { return nil }
        guard let mark = try? JSONDecoder().decode(SourceMark.self, from: Data(bytes)) else {
            // What nobody understands was left by a newer version: the worst is assumed.
            return Self(volume: volume, logIsBroken: true, failed: []).ofAllCopies
        }
        return mark.volume == volume ? mark : nil
    }

    func write(_ source: OpenFile) throws {
        do { try source.setAttribute(Self.attribute, [UInt8](try JSONEncoder().encode(self))) } catch let error
            as SystemError
        {
            guard [ENOSPC, E2BIG, ERANGE].contains(error.errno), failed?.isEmpty == false else { throw error }
            try ofAllCopies.write(source)
        }
    }

    private var ofAllCopies: Self {
        var all = self
        all.failed = nil
        return all
    }

    static func remove(_ source: OpenFile) throws { try source.removeAttribute(attribute) }
}

/// What is to be noted elsewhere as long as a volume's record cannot be saved.
struct DistrustDebt {
    var log = false
    /// Durable copies and recovery points that have failed.
    var failed: Set<CopyID> = []
    var peerKnows = false
    /// Monotonic time, in nanoseconds, at which it is tried again; nil = somebody has it.
    var dueAt: UInt64?
}
