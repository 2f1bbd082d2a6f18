// RemoteStand.swift: what a remote says of itself to another one of its group that fails over.

/// Of the volumes of one host.
package struct RemoteStand: Codable, Sendable, Equatable {
    package var pair: String
    /// About the point that it was asked about.
    package var testimony: Testimony?
    /// The newest point that it has committed; 0 = none.
    package var committed: UInt64
    /// Everything of this point is there, and whether it counts is not decided.
    package var prepared: UInt64?
    /// The point that it has failed over to.
    package var failedOver: UInt64?
    /// Pairs that have no part in its newest point.
    package var without: [String]?
    /// Points that it can fail over to.
    package var points: [UInt64]

    package init(_ pair: String, _ record: GroupRecord, _ testimony: Testimony?) {
        (self.pair, self.testimony) = (pair, testimony)
        committed = record.newestCommitted
        prepared = record.undecided
        failedOver = record.failedOver?.point
        without = record.newestReadable?.without
        points = record.readablePoints.map(\.number)
    }

    /// It is at the point, or can go there: prepared there, it counts once it does elsewhere.
    func has(_ point: UInt64) -> Bool { failedOver == point || prepared == point || points.contains(point) }
}

/// A remote's answer: of all that it has of the group.
package struct RemoteWord: Codable, Sendable, Equatable {
    package var pairs: [RemoteStand]
    /// A failover that was under way there before it has looked at the pairs.
    package var underWay: FailoverFlag?

    package init(pairs: [RemoteStand], underWay: FailoverFlag?) { (self.pairs, self.underWay) = (pairs, underWay) }
}

/// What has become of a question to another remote.
package enum Heard: Sendable, Equatable {
    case says(RemoteWord)
    /// It does not answer, cannot be asked, or says why it cannot tell. `last`: the failover that it has told of before.
    case silent(last: FailoverFlag?, why: String? = nil)

    package var word: RemoteWord? { if case .says(let word) = self { word } else { nil } }
    var underWay: FailoverFlag? {
        switch self {
        case .says(let word): word.underWay
        case .silent(let last, _): last
        }
    }
    /// Of one that is silent.
    package var problem: String {
        if case .silent(_, let why?) = self { return why }
        return "there is no [peers] entry for it"
    }
}
