// RoleMessages.swift: what is told about changes of roles.

import Groups

/// What a resync sends and discards.
package struct ResyncReport: Codable, Sendable {
    /// The site that stays primary, and the one that becomes its secondary.
    package var from: String
    package var to: String
    /// Bytes in which the sites may differ, and which are sent.
    package var sentBytes: UInt64
    /// Bytes that the second site has changed; they are kept there as a FlashCopy.
    package var discardedBytes: UInt64
    package var discardedGrains: UInt64
    /// Since when it has changed them.
    package var since: String?
    enum CodingKeys: String, CodingKey {
        case from, to, since
        case sentBytes = "sent_bytes"
        case discardedBytes = "discarded_bytes"
        case discardedGrains = "discarded_grains"
    }

    package init(
        from: String, to: String, sentBytes: UInt64, discardedBytes: UInt64, discardedGrains: UInt64,
        since: String? = nil
    ) {
        self.from = from
        self.to = to
        self.sentBytes = sentBytes
        self.discardedBytes = discardedBytes
        self.discardedGrains = discardedGrains
        self.since = since
    }
}

/// What a failover went to, and what it left behind.
package struct FailoverReport: Codable, Sendable {
    package var id: UInt64
    package var formedAt: String
    package var committedAt: String?
    /// The point's age: what was written in this time is not in it.
    package var lostSeconds: Double
    /// Bytes that had arrived for the next point and are not used.
    package var discardedBytes: UInt64
    /// Bytes that the old primary has not sent, if it still answers.
    package var unsentBytes: UInt64?
    /// Other remotes of the group that have not gone to the same point, and why.
    package var behind: [String]?
    enum CodingKeys: String, CodingKey {
        case id, behind
        case formedAt = "formed_at"
        case committedAt = "committed_at"
        case lostSeconds = "lost_seconds"
        case discardedBytes = "discarded_bytes"
        case unsentBytes = "unsent_bytes"
    }

    package init(_ point: PointRecord, discarded: UInt64, unsent: UInt64?, now: Double) {
        id = point.number
        formedAt = timestamp(point.formedAt)
        committedAt = point.committedAt.map(timestamp)
        lostSeconds = max(0, now - point.formedAt)
        discardedBytes = discarded
        unsentBytes = unsent
    }
}
