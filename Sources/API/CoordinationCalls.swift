// CoordinationCalls.swift: what the sites of a group with several hosts or remotes ask of each other. A pair is named by its host.

import Groups

/// The coordinator asks a host.
package struct HostCall: Codable, Sendable {
    package var site: String
    package var pair: String
    package var message: HostMessage
    /// All of the group's pairs, as far as the coordinator knows them: it may be another host's turn next.
    package var places: [PairPlace]?
    /// The answer may come when the host has drained the point.
    package var waits: Bool

    package init(site: String, pair: String, message: HostMessage, places: [PairPlace]?, waits: Bool) {
        (self.site, self.pair, self.message) = (site, pair, message)
        (self.places, self.waits) = (places, waits)
    }
}

/// Absent: it has nothing to say yet.
package struct HostReply: Codable, Sendable {
    package var answer: Stamped<HostAnswer>?
    package init(answer: Stamped<HostAnswer>?) { self.answer = answer }
}

/// The coordinator asks how a host stands.
package struct SurveyCall: Codable, Sendable {
    package var site: String
    package var pair: String

    package init(site: String, pair: String) { (self.site, self.pair) = (site, pair) }
}

/// How a host stands before a point.
package struct HostStanding: Codable, Sendable {
    package var survey: Survey
    /// The site that it mirrors to.
    package var peer: String

    package init(survey: Survey, peer: String) { (self.survey, self.peer) = (survey, peer) }
}

/// The coordinator asks a remote.
package struct RemoteCall: Codable, Sendable {
    package var site: String
    /// For this site; another passes it on.
    package var to: String
    package var pair: String
    package var places: [PairPlace]
    package var message: RemoteMessage
    /// Pairs that have no part in the point.
    package var without: [String]?

    package init(
        site: String, to: String, pair: String, places: [PairPlace], message: RemoteMessage, without: [String]?
    ) {
        (self.site, self.to, self.pair, self.places, self.message) = (site, to, pair, places, message)
        self.without = without
    }
}

/// A remote that fails over asks another, which answers with `RemoteWord`.
package struct TestimonyCall: Codable, Sendable {
    package var site: String
    /// The point that it is in doubt about, of which whoever has not committed it promises never to; nil = it is not in doubt.
    package var number: UInt64?
    /// The failover that is under way at the site that asks.
    package var underWay: FailoverFlag?
    /// That one has ended.
    package var hasEnded: Bool?

    package init(site: String, number: UInt64?, underWay: FailoverFlag?, hasEnded: Bool? = nil) {
        (self.site, self.number, self.underWay, self.hasEnded) = (site, number, underWay, hasEnded)
    }
}

/// A pair that hands over waits for the others.
package struct MeetCall: Codable, Sendable {
    package var site: String
    package var pair: String
    /// How far the handover is (`HandOver`).
    package var place: Int

    package init(site: String, pair: String, place: Int) {
        (self.site, self.pair, self.place) = (site, pair, place)
    }
}

/// A resync of all pairs of a group begins, or has ended.
package struct ResyncCall: Codable, Sendable {
    package var site: String
    package var id: UInt64
    /// Sites whose changes are discarded.
    package var losers: [String]
    package var ends = false
    /// The peers of the site's own pairs are to be told as well.
    package var passesOn = true

    package init(site: String, id: UInt64, losers: [String]) { (self.site, self.id, self.losers) = (site, id, losers) }
}

/// A remote that has failed over leads the others to the same point.
package struct LeadCall: Codable, Sendable {
    package var site: String
    package var point: UInt64
    /// It has committed this point, or another has: whoever has prepared it takes it.
    package var committed: UInt64
    /// Pairs that have no part in the point, and go to their newest.
    package var without: [String]

    package init(site: String, point: UInt64, committed: UInt64, without: [String]) {
        (self.site, self.point, self.committed, self.without) = (site, point, committed, without)
    }
}
