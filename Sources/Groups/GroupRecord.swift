// GroupRecord.swift: the durable record of a group at one site. It alone decides what is committed and who is primary.
//
// At the secondary a commit is one write of this record: before it no volume has the point, after it every volume
// takes it (roll forward), because files and engines are made from the record.

package enum Role: String, Codable, Sendable { case primary, secondary }

/// A consistency point as a site remembers it. Times are seconds since 1970.
package struct PointRecord: Codable, Sendable, Equatable {
    package var number: UInt64
    package var formedAt: Double
    package var committedAt: Double?
    /// Bytes that were sent for it (primary).
    package var bytes: UInt64?
    /// Its place in the chains of the group's volumes (secondary); larger is newer.
    package var order: UInt64?
    /// The same, also of points from before they had one.
    package var chainOrder: UInt64 { order ?? number }
    /// What a site had when it gave up the role of primary: nothing that the present primary has sent.
    package var isBase: Bool?
    /// Old content of it was lost: it cannot be read, or failed over to. Its number counts.
    package var isFailed: Bool?
    /// Volumes that have files of it, since they had changed since the point before; nil = all that it holds (secondary).
    package var changed: [String]?
    /// Pairs of the group that have no part in it, since their hosts were lost: they are behind.
    package var without: [String]?

    /// The highest number of a point, and the latest time, that a peer is believed: what is counted on from there must not overflow.
    package static let highestNumber: UInt64 = 1 << 60
    package static let latestTime = 1e11

    /// Whether a peer may have said this.
    package var isPlausible: Bool {
        number <= Self.highestNumber && (0...Self.latestTime).contains(formedAt)
            && (0...Self.latestTime).contains(committedAt ?? 0)
    }

    package init(
        number: UInt64, formedAt: Double, committedAt: Double? = nil, bytes: UInt64? = nil,
        order: UInt64? = nil, isBase: Bool? = nil, changed: [String]? = nil
    ) {
        self.number = number
        self.formedAt = formedAt
        self.committedAt = committedAt
        self.bytes = bytes
        self.order = order
        self.isBase = isBase
        self.changed = changed
    }
}

/// What is of no phase in particular, and the phase. It is read and changed through `Phase.swift`.
package struct GroupRecord: Sendable, Equatable {
    package static let currentFormat = 3
    /// Without `PointRecord.changed`: every volume has files of every point.
    package static let oldestFormat = 2
    package internal(set) var format = currentFormat
    package internal(set) var phase: Phase
    /// Newest first; a new one is put in front at every failover.
    package internal(set) var generations: [String]
    /// Identity of the one peer that this group talks to; nil until the first contact.
    package internal(set) var peerSite: String?
    /// The highest number that was ever given to a point.
    package internal(set) var lastNumber: UInt64 = 0
    /// Identity of the secondary copy that the bitmaps describe the difference to.
    package internal(set) var lineage: String?
    /// Bytes a second over the link, by command; nil = as configured.
    package internal(set) var rate: UInt64?

    /// Identity of each volume's secondary, by name, as `lineage`: a volume that joins is copied without the others.
    package internal(set) var volumeLineages: [String: String]?

    /// Volumes that joined the group later, and the newest point then: up to it points do not have them.
    package internal(set) var joinedAfter: [String: UInt64]?
    /// Volumes that had no part in the point that was failed over to. They are nothing's copy, and not served.
    package internal(set) var leftOut: [String]?
    /// Recovery points, oldest first.
    package internal(set) var points: [PointRecord] = []

    /// Points past their retention of which some volume still has files: a carrier, or one that has to hand over first what an older
    /// FlashCopy, a clone, reads through it.
    package internal(set) var retired: [PointRecord]?
    /// Volumes of which the peer, as primary, could not write down any more what its hosts change, and the session in which it said so:
    /// until it has sent all of them, what it says it has changed may be too little.
    package internal(set) var untracked: [String: UInt64]?
    /// Of a group with several hosts or several remotes.
    package internal(set) var coordination: CoordinationRecord?

    /// The newest recovery point that can be read.
    package var newestReadable: PointRecord? { points.last { $0.isFailed != true } }
    package var readablePoints: [PointRecord] { points.filter { $0.isFailed != true } }

    /// Whether a recovery point holds a volume.
    package func holds(_ point: PointRecord, _ volume: String) -> Bool {
        point.number > joinedAfter?[volume] ?? 0 && leftOut?.contains(volume) != true
    }

    /// - Parameter identity: of the first generation at a primary, which a secondary learns from it; of its copy at a secondary.
    package static func first(_ role: Role, identity: String) -> GroupRecord {
        var record = GroupRecord(role: role, generation: identity)
        if role == .secondary { (record.generations, record.lineage) = ([], identity) }
        return record
    }

    private init(role: Role, generation: String) {
        phase = role == .primary ? .mirroring(Phase.Primary()) : .secondary(Phase.Secondary())
        generations = [generation]
    }

    /// At a start: whether the point that is held must be given up, since some volume does not hold it any more.
    ///
    /// - Parameters:
    ///   - held: for each volume the point that its bitmaps are of; nil = they cannot be relied on.
    ///   - mode: the group's from now on.
    package func mustGiveUpPoint(heldBy held: [UInt64?], _ mode: Mode) -> Bool {
        guard let point = self.held?.number else { return false }
        return mode.afterCrash == .givesUp || held.contains { $0 != point }
    }
}
