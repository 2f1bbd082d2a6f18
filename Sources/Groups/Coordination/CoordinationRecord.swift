// CoordinationRecord.swift: what a site must find again of a group that has several hosts or several remotes: in the group's record, so that it
// is saved with what it is about.
//
// Must be prevented:
//   a remote forgets that it has prepared a point, or what it has promised never to commit
//   who is in doubt about a point does not know whom to ask

/// One host of a group, and the remote that it mirrors to. By name of the host it is known at every site, whichever of the two is primary.
package struct PairPlace: Codable, Sendable, Hashable {
    package var host: String
    package var remote: String
    package init(host: String, remote: String) { (self.host, self.remote) = (host, remote) }
}

package struct CoordinationRecord: Codable, Sendable, Equatable {
    /// The highest of a coordinator's process that was heard of.
    package internal(set) var epoch: UInt64 = 0
    /// Of the site that coordinates, or did.
    package internal(set) var coordinator: CoordinatorRecord?
    /// All of the group's pairs, as the coordinator said last.
    package internal(set) var places: [PairPlace]?

    // A remote's.
    /// Everything of this point is there, flushed; whether it counts is not decided.
    package internal(set) var prepared: PointRecord?
    /// Points up to this one that are not committed here will not be, unless another remote has committed them.
    package internal(set) var refusedThrough: UInt64 = 0
    /// The point that was prepared when an operator failed over without waiting for the others' word.
    package internal(set) var inDoubt: UInt64?

    package init() {}

    func with(_ places: [PairPlace]) -> CoordinationRecord {
        var next = self
        next.places = places
        return next
    }

    /// - Throws: when this cannot come after `previous`.
    func check(after previous: CoordinationRecord) throws(IllegalCoordination) {
        guard epoch >= previous.epoch, refusedThrough >= previous.refusedThrough else {
            throw IllegalCoordination("epoch \(previous.epoch) was heard, and would be forgotten")
        }
        // The coordinator's is checked where it changes; with the roles it begins anew.
    }
}

/// What becomes of a remote's part in a point: its record, and what is committed with it.
package struct RemotePartChange: Sendable, Equatable {
    package var record: TwoPhaseRecord
    /// Of the point that is prepared, or committed, with this change.
    package var plan: CommitPlan?
    package var places: [PairPlace]?
    /// An operator decides about this point alone.
    package var inDoubt: UInt64?

    package init(
        record: TwoPhaseRecord, plan: CommitPlan?, places: [PairPlace]? = nil, inDoubt: UInt64? = nil
    ) {
        (self.record, self.plan, self.places, self.inDoubt) = (record, plan, places, inDoubt)
    }
}

extension GroupRecord {
    /// A point that an operator has chosen alone, before the failover to it: it is prepared, for all others.
    private var doubtful: UInt64? {
        guard role == .secondary, let number = coordination?.inDoubt else { return nil }
        return points.contains { $0.number == number } ? number : nil
    }

    /// Everything of this point is here, and nobody has said whether it counts.
    package var undecided: UInt64? { coordination?.prepared?.number ?? doubtful }

    /// The newest point that was committed here, in the present direction; 0 = none.
    package var newestCommitted: UInt64 {
        let doubtful = doubtful
        return points.last { $0.isBase != true && $0.number != doubtful }?.number ?? 0
    }

    /// As `TwoPhaseCommit` knows it.
    ///
    /// - Parameter previous: what every remote has committed, by the coordinator; what a remote without points of this direction goes by, since
    ///   it has joined later.
    package func twoPhase(after previous: UInt64? = nil) -> TwoPhaseRecord {
        // What an operator has chosen alone does not count as committed: the others must not rely on it.
        let newest = points.last { $0.number != coordination?.inDoubt }
        // What this site was when it gave up the role of primary is no point of the others: it goes on from what all others have.
        let committed = newest?.isBase == true ? previous ?? newest?.number : newest?.number
        let stand: TwoPhaseRecord.Stand =
            if role != .secondary {
                .failedOver(at: failedOver?.point ?? 0, inDoubt: coordination?.inDoubt)
            } else if let undecided {
                .prepared(undecided)
            } else {
                .open
            }
        return TwoPhaseRecord(
            epoch: coordination?.epoch ?? 0, committed: committed ?? previous ?? 0, stand: stand,
            refusedThrough: coordination?.refusedThrough ?? 0)
    }

    mutating func take(_ part: RemotePartChange) {
        var next = coordination ?? CoordinationRecord()
        next.epoch = part.record.epoch
        next.refusedThrough = part.record.refusedThrough
        if let places = part.places { next.places = places }
        let doubtful = part.inDoubt == nil && part.record.stand == .open ? doubtful : nil
        if let number = part.inDoubt { next.inDoubt = number }
        // Decided, it counts, or is no point of the group's.
        if doubtful != nil { next.inDoubt = nil }
        let hasCommitted = part.plan.map { $0.point.number == part.record.committed } ?? false
        switch part.record.stand {
        case .prepared(let number): if let plan = part.plan, plan.point.number == number { next.prepared = plan.point }
        case .open: next.prepared = nil
        case .failedOver(_, let inDoubt): (next.prepared, next.inDoubt) = (nil, inDoubt)
        }
        // The coordinator has decided what an operator was in doubt about.
        if hasCommitted, part.places != nil, next.inDoubt == part.record.committed { next.inDoubt = nil }
        coordination = next
        if let doubtful, part.record.committed < doubtful { retire([doubtful]) }
        if hasCommitted, let plan = part.plan { commit(plan) }
    }
}
