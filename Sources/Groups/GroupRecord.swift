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
    /// What a site had when it gave up the role of primary: nothing that the present primary has sent.
    package var isBase: Bool?
    /// Old content of it was lost: it cannot be read, or failed over to. Its number counts.
    package var isFailed: Bool?

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
        order: UInt64? = nil, isBase: Bool? = nil
    ) {
        self.number = number
        self.formedAt = formedAt
        self.committedAt = committedAt
        self.bytes = bytes
        self.order = order
        self.isBase = isBase
    }
}

/// What is of no phase in particular, and the phase. It is read and changed through `Phase.swift`.
package struct GroupRecord: Sendable, Equatable {
    package static let currentFormat = 2
    package var format = currentFormat
    package var phase: Phase
    /// Newest first; a new one is put in front at every failover.
    package var generations: [String]
    /// Identity of the one peer that this group talks to; nil until the first contact.
    package var peerSite: String?
    /// The highest number that was ever given to a point.
    package var lastNumber: UInt64 = 0
    /// Identity of the secondary copy that the bitmaps describe the difference to.
    package var lineage: String?
    /// Bytes a second over the link, by command; nil = as configured.
    package var rate: UInt64?

    /// Identity of each volume's secondary, by name, as `lineage`: a volume that joins is copied without the others.
    package var volumeLineages: [String: String]?

    /// Volumes that joined the group later, and the newest point then: up to it points do not have them.
    package var joinedAfter: [String: UInt64]?
    /// Volumes that had no part in the point that was failed over to. They are nothing's copy, and not served.
    package var leftOut: [String]?
    /// Recovery points, oldest first.
    package var points: [PointRecord] = []

    /// Points past their retention that may still have to hand over what an older FlashCopy, a clone, reads through them.
    package var retired: [PointRecord]?
    /// Volumes of which the peer, as primary, could not write down any more what its hosts change, and the session in which it said so:
    /// until it has sent all of them, what it says it has changed may be too little.
    package var untracked: [String: UInt64]?

    /// - Parameter lineage: a new identity: the primary, when it opens a session, marks all of the volume.
    package mutating func noteUntracked(_ volume: String, lineage: String, session: UInt64) {
        untracked = (untracked ?? [:]).merging([volume: session]) { _, new in new }
        if role == .secondary { volumeLineages = (volumeLineages ?? [:]).merging([volume: lineage]) { _, new in new } }
    }

    /// A point was committed in a session that has begun with all of what was noted in earlier ones.
    package mutating func forgetUntracked(before session: UInt64) {
        let left = untracked?.filter { $0.value == session }
        untracked = left?.isEmpty == false ? left : nil
    }

    /// The newest recovery point that can be read.
    package var newestReadable: PointRecord? { points.last { $0.isFailed != true } }

    /// A recovery point has lost old content. It goes, unless the primary goes on from it, or a failover went to it: then it stays, as
    /// one that cannot be read.
    package mutating func failPoint(_ number: UInt64) {
        guard let index = points.firstIndex(where: { $0.number == number }) else { return }
        points[index].isFailed = true
        if number != points.last?.number, number != failedOver?.point { retire([points[index]]) }
    }

    /// Whether a recovery point holds a volume.
    package func holds(_ point: PointRecord, _ volume: String) -> Bool {
        point.number > joinedAfter?[volume] ?? 0 && leftOut?.contains(volume) != true
    }

    package init(role: Role, generation: String) {
        phase = role == .primary ? .mirroring(Phase.Primary()) : .secondary(Phase.Secondary())
        generations = [generation]
    }

    /// At a start: gives up a point that some volume does not hold any more.
    ///
    /// - Parameter held: for each volume the point that its bitmaps are of; nil = they cannot be relied on.
    /// - Returns: whether the record has changed.
    package mutating func giveUpPoint(unlessHeldBy held: [UInt64?]) -> Bool {
        guard let point = self.held?.number, held.contains(where: { $0 != point }) else { return false }
        primary?.point = .none
        return true
    }
}
