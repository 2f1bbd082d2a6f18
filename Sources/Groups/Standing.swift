// Standing.swift: who is the current primary of a group, and how a site that is not becomes its secondary.
//
// Only decisions, without I/O, so that a site and the simulator do the same.
//
// Must be prevented:
//   a stale primary is taken for the current one, or the other way round
//   what one site has written is overwritten without a command that names it
//   a grain in which the sites differ is in neither site's bitmaps when the direction of mirroring changes
//
// Why the bitmaps of both sites together are enough: S is what lay on the secondary when the group failed over. The old
// primary's CR and OOS hold every grain in which it may differ from S (rule 2). The new primary's CR holds every grain
// that came back from the recovery point, and every one that hosts wrote since; in all others it is S. A grain in
// neither is alike at both.

/// How a group stands at one site; sites tell each other.
package struct Standing: Codable, Sendable, Equatable {
    package var site: String
    package var siteID: String
    package var role: Role
    package var generations: [String]
    /// Hosts may have written here while the peer was out of reach.
    package var alone: Bool
    /// Hosts may have written here since this site became primary.
    package var wrote: Bool
    /// Bytes that may differ from the newest point that both sites had.
    package var changedBytes: UInt64
    /// When that point was formed, in seconds since 1970.
    package var since: Double?
    /// The highest number that is known to belong to a point.
    package var highestPoint: UInt64
    /// This site is asking its peer to give up the role just now.
    package var joining: Bool?
    /// Volumes of which this site has noted that the other does not track them any more (`GroupRecord.untracked`).
    package var untracked: [String]?

    package init(
        site: String, siteID: String, record: GroupRecord, wrote: Bool, changedBytes: UInt64, joining: Bool = false
    ) {
        self.site = site
        self.siteID = siteID
        role = record.role
        generations = record.generations
        alone = record.isAlone
        self.wrote = wrote
        self.changedBytes = changedBytes
        self.joining = joining
        since = record.divergedFrom?.formedAt
        highestPoint = record.highestPoint
        untracked = record.untracked?.keys.sorted()
    }
}

/// What two sites' standings say about the one that asks.
package enum Verdict: Equatable, Sendable {
    /// Secondary, or the current primary.
    case inOrder
    /// The peer took over while hosts may have written here only before, or only here.
    case stale
    /// Hosts may have written at both.
    case splitBrain
    /// Both were set up as primary, and have nothing in common.
    case unrelated
}

package func judge(_ mine: Standing, _ theirs: Standing) -> Verdict {
    guard mine.role == .primary, theirs.role == .primary else { return .inOrder }
    guard let head = mine.generations.first, let other = theirs.generations.first else { return .unrelated }
    if head != other, theirs.generations.contains(head) {
        return haveDiverged(behind: mine, ahead: theirs) ? .splitBrain : .stale
    }
    if head != other, mine.generations.contains(other) {
        return haveDiverged(behind: theirs, ahead: mine) ? .splitBrain : .inOrder
    }
    return Set(mine.generations).isDisjoint(with: theirs.generations) ? .unrelated : .splitBrain
}

private func haveDiverged(behind: Standing, ahead: Standing) -> Bool {
    behind.alone && behind.changedBytes > 0 && ahead.wrote
}

extension GroupRecord {
    /// What both sites last had in common.
    package var divergedFrom: PointRecord? {
        guard role == .primary else { return points.last }
        if let failedOver { return points.first { $0.number == failedOver.point } ?? points.last }
        return lastCommitted
    }

    package var highestPoint: UInt64 { max(lastNumber, points.last?.number ?? 0, lastCommitted?.number ?? 0) }
}
