// FailoversUnderWay.swift: which failovers of a group a site knows to be under way: its own, and those of other remotes.
//
// A failover is announced here before the others are asked, and until they have been led; each question and each answer tells of it. So of two
// at the same time one hears of the other before it has changed anything, and perhaps both do. A failover to a point that an operator names goes on only if all others
// have answered: each of them remembers it, should its own question not be answered then. All of this is memory: a remote that dies at that
// moment, and comes back while the other one is out of reach, knows nothing of it.
//
// Must be prevented:
//   remotes fail over to different points since operators have said different things at the same time
//   a failover that has ended stands in the way of others

/// A failover that is under way.
package struct FailoverFlag: Codable, Sendable, Equatable {
    /// Another one has another.
    package var id: UInt64
    /// The point that its operator names; nil = the newest that counts.
    package var point: UInt64?

    package init(id: UInt64, point: UInt64?) { (self.id, self.point) = (id, point) }

    /// What it is to go to.
    var words: String { point.map { "point \($0)" } ?? "the newest point" }
}

package struct FailoversUnderWay: Sendable {
    package private(set) var own: FailoverFlag?
    /// Commands that want the same, and go on beside each other.
    private var commands = 0
    private var others: [String: (flag: FailoverFlag, until: UInt64)] = [:]
    /// For how long it is remembered of a remote that is not heard of any more, in nanoseconds: a command is not waited for any longer.
    private static let longest: UInt64 = 600_000_000_000

    package init() {}

    /// - Throws: `Refusal` when one is under way here that is to go somewhere else.
    package mutating func begin(_ flag: FailoverFlag, _ group: String, at site: String) throws(Refusal) {
        if let own, own.point != flag.point { throw own.refusal(group, site, flag) }
        own = own ?? flag
        commands += 1
    }

    /// - Returns: what other remotes may forget now; nil while there is nothing.
    package mutating func end() -> FailoverFlag? {
        guard let ended = own else { return nil }
        commands -= 1
        guard commands == 0 else { return nil }
        own = nil
        return ended.point == nil ? nil : ended
    }

    /// Another remote asks, and one is under way there, or has ended.
    ///
    /// - Parameter now: in nanoseconds, of any clock that goes on.
    package mutating func heard(_ flag: FailoverFlag, of site: String, hasEnded: Bool, now: UInt64) {
        guard !hasEnded else {
            // A message that comes late is of an earlier one.
            if others[site]?.flag == flag { others[site] = nil }
            return
        }
        // One that goes to the newest does not wait for all others: nobody has to remember it.
        others[site] = flag.point == nil ? nil : (flag, now + Self.longest)
    }

    /// What was heard last of a remote that does not answer.
    package func last(of site: String, now: UInt64) -> FailoverFlag? {
        others[site].flatMap { now < $0.until ? $0.flag : nil }
    }
}

extension FailoverFlag {
    /// Of one that wants something else.
    func refusal(_ group: String, _ site: String, _ other: FailoverFlag, isSilent: Bool = false) -> Refusal {
        let remedy =
            isSilent
            ? "that does not answer any more; bring it back, or choose with `farcopy failover \(group) --alone POINT`"
            : "wait until that has ended, then `farcopy failover \(group)` goes to the same point"
        return Refusal(
            "group '\(group)': a failover to \(words) is under way at '\(site)', and this one is to go to \(other.words); nothing "
                + "has changed here: \(remedy)", .passing)
    }
}
