// Steps.swift: an operation on a group as a value: what it does next, after what has become of the step before.
//
// A site carries the actions out; the simulator carries out the very same, and lets a process die, power or a save fail between any two.
//
// Must be prevented:
//   an operation does one thing at a site and another in the simulator, which would prove its own
//   what an operation that fails has begun is left standing: its value says how that is taken back

/// What a group's site is asked to do. Each is done for all volumes of the group, or for those that are named, and has ended before
/// the next begins.
package enum SiteAction: Sendable, Equatable {
    // The record.
    /// Nothing that was taken back stands in the record's file.
    case settle
    /// Durably, or not at all.
    case change(GroupChange)

    // A secondary's intake and points.
    /// Ends the intake's session; once nothing of it is under way, only this one is let in; 0 = none.
    case fence(next: UInt64)
    /// Answered by `Answer.survey`.
    case survey
    /// What was written to these volumes is on stable storage.
    case flushVolumes([String])
    /// Target and bitmap of a point, empty, on stable storage, for every volume that has files of it. What was made goes again when it
    /// fails.
    case makePointFiles(CommitPlan)
    /// What was made for a point that nobody commits goes.
    case dropPointFiles(UInt64)
    /// The point is the newest of those volumes' chains; what carries no point that is kept leaves.
    case takePoint(CommitPlan)
    /// What the bitmaps say of the time as primary is forgotten.
    case forgetChanges

    // A takeover.
    /// Which grains must come back from the point, in files of their own and in the bitmaps, on stable storage. Answered by
    /// `Answer.bytes`.
    case markDifferences(from: UInt64, [String])
    case dropDifferences([String])
    /// Data flows back from the point, and hosts may write.
    case open(at: UInt64, [String])

    // A primary's role.
    case stopMirroring
    /// If the record says that this site mirrors, and it does not.
    case startMirroring
    /// A point is formed from now on, and committed by the peer. Answered by `Answer.point`.
    case formPoint(seconds: Double)
    /// Of several pairs: until all of them are at this place. Fails when some do not come.
    case meet(Int)
    /// No point begins any more, and none is under way; until mirroring is started anew.
    case quiet
    /// Nothing begins on FlashCopies until the operation has ended. Fails while data flows back into a volume.
    case holdCopies
    /// In how much the peer may differ. Answered by `Answer.bytes`.
    case countChanges
    /// The peer becomes primary at its newest point, which must be this one. Fails with `PeerRefusal` if it surely has not.
    case askToPromote(UInt64)
    /// Nothing that was asked of the peer before is carried out any more.
    case endPeersSessions
    /// Ends the hosts' connections. What they asked for has been carried out.
    case shutHostsOut
    /// As soon as the record's file says that this site is primary.
    case admitHosts
    /// The volumes hold no point, and that is so on stable storage, as is what hosts wrote: CR alone says what the peer lacks.
    case settleChanges
    /// What hosts wrote here and the peer lacks becomes a FlashCopy.
    case keepUnsent
    /// That FlashCopy goes again.
    case dropUnsent
    /// The volumes' engines are a secondary's.
    case serveAsSecondary
    /// The peer becomes this site's secondary. Answered by `Answer.yielded`.
    case askToYield
    /// What the peer says it has changed is in the bitmaps, on stable storage.
    case takeChanges

    // A comparison.
    /// FlashCopies of all volumes in the instant of a point that the peer has committed. Answered by `Answer.point`.
    case copyAtPoint
    /// The peer keeps the point, whatever its retention.
    case pinPoint(UInt64)
    case comparePoint(UInt64)
    case dropCopies
    case unpinPoint(UInt64)
}

/// What has become of an action.
package enum Answer: Sendable {
    /// There was none yet.
    case begin
    case done
    case failed(any Error)
    case survey(IntakeSurvey)
    case bytes(UInt64)
    case point(PointRecord)
    case yielded(Joining)
}

/// What an operation does next: an action, after which it is told what has become of it, or its end.
package enum Step<Action: Sendable, Outcome: Sendable>: Sendable {
    case perform(Action)
    case done(Outcome)
    case failed(any Error)
}

package typealias Next<Outcome: Sendable> = Step<SiteAction, Outcome>

package protocol Steps {
    associatedtype Outcome: Sendable
    /// - Parameter record: as it is now.
    mutating func next(after answer: Answer, _ record: GroupRecord) -> Next<Outcome>
}

/// Steps that are a table: in this state, after this answer, that comes next.
protocol StepTable: Steps {
    associatedtype State
    var state: State { get set }
}

extension StepTable {
    mutating func go(_ next: State, _ action: SiteAction) -> Next<Outcome> {
        state = next
        return .perform(action)
    }
}

/// An answer that does not belong to what was asked: a mistake of whoever carries the actions out.
package struct UnexpectedAnswer: Error, CustomStringConvertible {
    package var description: String
    package init(_ answer: some Any, _ state: some Any) { description = "'\(answer)' is no answer to '\(state)'" }
}
