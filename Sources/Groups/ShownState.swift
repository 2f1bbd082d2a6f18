// ShownState.swift: a group's state as people are shown it. Nothing is decided by these words: what decides is the phase, and the cycle.

package enum ShownState: String, Sendable {
    /// There is no peer yet.
    case simplex
    /// The first copy is being made.
    case copying
    case mirroring
    /// What the sites differ in is being sent.
    case resyncing
    /// By the operator, by the link, or by an error.
    case suspended
    case failedOver = "failed-over"
    case splitBrain = "split-brain"
}

extension Group {
    /// While it mirrors.
    package var shownState: ShownState {
        guard let cycle, cycle.suspension == nil else { return .suspended }
        if record.lineage == nil { return .simplex }
        if record.lastCommitted == nil { return .copying }
        return cycle.resyncing || record.lastCommitted?.isBase == true ? .resyncing : .mirroring
    }
}

extension GroupRecord {
    /// Age of the newest point that the remote has committed, in seconds, at a time in seconds since 1970; nil before the first, and after a
    /// change of roles until the first in the new direction.
    package func lag(at now: Double) -> Double? {
        guard failedOver == nil, conflict == nil, let point = role == .primary ? lastCommitted : points.last,
            point.isBase != true
        else { return nil }
        return max(0, now - point.formedAt)
    }

    /// Of a group that has no replicator: its state, and why, in words.
    ///
    /// - Parameters:
    ///   - names: of the group, of this site, and of its peer.
    ///   - failedOverAt: when this site took over.
    ///   - isolation: why a primary waits for its peer.
    ///   - isConnected: the primary has opened a session.
    ///   - refused: what this secondary could not take.
    package func shownState(
        _ names: (group: String, site: String, peer: String), failedOverAt: String?, isolation: String?,
        isConnected: Bool,
        refused: String?
    ) -> (ShownState, String?) {
        let (name, peer) = (names.group, names.peer)
        switch conflict?.kind {
        case .splitBrain:
            return (
                .splitBrain,
                "hosts wrote here and at '\(peer)'; `farcopy resync \(name) --discard \(names.site)|\(peer)`"
            )
        case .stale:
            return (
                .suspended,
                "'\(peer)' has taken over and this site is stale; `farcopy failback \(name)` there brings the roles back"
            )
        case nil: break
        }
        switch phase {
        case .handingOver:
            return (.suspended, "a switchover waits for '\(peer)'; `farcopy abort switchover:\(name)` takes it back")
        case .failedOver(_, let failover):
            return (.failedOver, "failed over to point \(failover.point) at \(failedOverAt ?? "?")")
        case .mirroring: return (.suspended, isolation ?? "the group is changing roles")
        case .secondary: break
        }
        guard peerSite != nil else { return (.simplex, nil) }
        guard isConnected else { return (.suspended, "the primary has not connected since this site started") }
        if let refused { return (.suspended, refused) }
        guard let newest = points.last else { return (.copying, nil) }
        return (newest.isBase == true ? .resyncing : .mirroring, nil)
    }
}
