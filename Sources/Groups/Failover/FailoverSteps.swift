// FailoverSteps.swift: what the remotes of a group do when one of them fails over, and leads the others: the actions, and how a site and the
// simulator carry out a value that says which comes next.

/// The volumes of one host, at this site.
package struct OwnPair: Sendable {
    package var name: String
    /// Its host has not said yet which volumes are its own.
    package var isEmpty: Bool
    package var record: GroupRecord

    package init(_ name: String, isEmpty: Bool, _ record: GroupRecord) {
        (self.name, self.isEmpty, self.record) = (name, isEmpty, record)
    }
}

/// A pair is named by its place among those of this site.
package enum FailoverAction: Sendable, Equatable {
    /// Whoever asks, or is asked, from now on hears of it. Fails when one is under way here that wants something else.
    case announce(FailoverFlag)
    /// It has ended; these are told, where they remember it.
    case retract([String])
    /// Each of these remotes, at once, about a point that is in doubt here, or about none. Answered by `heard`.
    case ask([String], about: UInt64?)
    /// The pair's own testimony of a point, before others are asked: it promises to refuse what it has not committed. Answered by `testimony`.
    case promise(pair: Int, UInt64)
    case settle(Settlement)
    /// Answered by `overtaken` when that is so.
    case takeOver(PairTakeover)
    /// It has no recovery point, and no part in the one that others go to: it stays as it is.
    case leave(pair: Int)
    /// That remote goes to the same point. `committed`: who has prepared this point, or an older one, takes it.
    case lead(String, FailoverTarget, committed: UInt64)
}

/// A point that is prepared here, and not decided, counts or is dropped.
package struct Settlement: Sendable, Equatable {
    package enum Reason: Sendable, Equatable {
        /// Another remote has committed it.
        case committed
        /// Nobody has committed it, or can.
        case uncommitted
        /// An operator has said which point it is to be: nobody relies on that.
        case chosen
        /// The remote that leads this one says so.
        case led(by: String)
    }
    package var pair: Int
    package var point: UInt64
    package var forward: Bool
    package var reason: Reason
}

package struct PairTakeover: Sendable, Equatable {
    package var pair: Int
    package var point: UInt64
    /// Nothing newer than this is there, or prepared, and from then on never is, so that no other remote can commit it; nil = whatever is there.
    package var ifNewestIs: UInt64?
    /// The point that the others go to, in which this pair has no part.
    package var behind: UInt64?
}

/// What has become of an action.
package enum FailoverAnswer: Sendable {
    /// There was none yet.
    case begin
    case done
    case heard([String: Heard])
    case testimony(Testimony?)
    /// A point was prepared, or committed, since.
    case overtaken
    case failed(any Error)
}

/// Where a group goes.
package struct FailoverTarget: Sendable, Equatable {
    package var point: UInt64
    /// Pairs that have no part in it, and go to their newest.
    package var without: [String]

    package init(point: UInt64, without: [String]) { (self.point, self.without) = (point, without) }
}

package protocol FailoverSteps: Sendable {
    associatedtype Outcome: Sendable
    /// - Parameter pairs: as they are now.
    mutating func next(after answer: FailoverAnswer, _ pairs: [OwnPair]) -> Step<FailoverAction, Outcome>
}

/// A point that is newer than the one that was chosen has come meanwhile.
package struct OvertakenFailover: Error, CustomStringConvertible {
    package init() {}
    package var description: String { "points are still being committed; try again" }
}

extension GroupRecord {
    /// A point is prepared, or was committed, since this was the newest.
    package func isOvertaken(since newest: UInt64) -> Bool {
        undecided != nil || newestReadable?.number ?? 0 != newest
    }
}
