// HandOver.swift: a switchover as the primary does it: hosts are shut out, the last point is sent, the peer takes over.
//
// Must be prevented:
//   a switchover that the peer may have carried out is taken back
//   hosts stay shut out because a step failed before the peer was asked
//   hosts write while the record's file may say that the role is being handed over: a start would go on with that

package struct HandOver: StepTable {
    enum State {
        case begins, catchesUp, holdsCopies, shutsOut, sendsLast
        /// Several pairs wait for each other: before hosts are shut out, when all are, when the last point is everywhere, and when nothing is
        /// under way.
        case meetsReady, meetsShutOut, meetsSent(PointRecord), quiets(PointRecord), meetsQuiet(PointRecord)
        case counts(PointRecord), stops(PointRecord), decides(PointRecord), promotes(Promotion, PointRecord)
        case admits(any Error), goesOn(any Error)
    }
    var state = State.begins
    private let seconds: Double
    private let isOfSeveral: Bool

    /// - Parameters:
    ///   - seconds: for which hosts may be shut out while the last point is sent.
    ///   - isOfSeveral: of several pairs, which hand over together.
    package init(seconds: Double, isOfSeveral: Bool = false) {
        (self.seconds, self.isOfSeveral) = (seconds, isOfSeveral)
    }

    /// - Returns: the point at which the peer has taken over.
    /// - Throws: `HandOverFailure` once the peer was asked.
    package mutating func next(after answer: Answer, _ record: GroupRecord) -> Next<PointRecord> {
        switch (state, answer) {
        case (.admits(let error), _): return go(.goesOn(error), .startMirroring)
        case (.goesOn(let error), _): return .failed(error)
        case (.promotes(let promotion, let point), _): return promote(promotion, point, answer, record)
        case (.catchesUp, .failed(let error)), (.meetsReady, .failed(let error)), (.holdsCopies, .failed(let error)):
            return .failed(error)
        case (_, .failed(let error)): return go(.admits(error), .admitHosts)
        case (.begins, .begin): return go(.catchesUp, .formPoint(seconds: 7 * 86400))
        case (.catchesUp, .point) where isOfSeveral: return go(.meetsReady, .meet(0))
        case (.catchesUp, .point), (.meetsReady, .done): return go(.holdsCopies, .holdCopies)
        case (.holdsCopies, .done): return go(.shutsOut, .shutHostsOut)
        case (.shutsOut, .done) where isOfSeveral: return go(.meetsShutOut, .meet(1))
        case (.shutsOut, .done), (.meetsShutOut, .done): return go(.sendsLast, .formPoint(seconds: seconds))
        case (.sendsLast, .point(let point)): return go(.counts(point), .countChanges)
        case (.counts(let point), .bytes(0)) where isOfSeveral: return go(.meetsSent(point), .meet(2))
        case (.meetsSent(let point), .done): return go(.quiets(point), .quiet)
        case (.quiets(let point), .done): return go(.meetsQuiet(point), .meet(3))
        // Others have waited for their last point meanwhile, which is a newer one of the same data.
        case (.meetsQuiet(let point), .done): return go(.stops(record.lastCommitted ?? point), .stopMirroring)
        case (.counts(let point), .bytes(0)): return go(.stops(point), .stopMirroring)
        case (.counts, .bytes):
            return go(.admits(Refusal("something was still written; nothing has changed, try again")), .admitHosts)
        case (.stops(let point), .done): return go(.decides(point), .change(.handingOver(point: point.number)))
        case (.decides(let point), .done): return promote(Promotion(at: point.number), point, .begin, record)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }

    private mutating func promote(
        _ promotion: Promotion, _ point: PointRecord, _ answer: Answer, _ record: GroupRecord
    ) -> Next<PointRecord> {
        var promotion = promotion
        switch promotion.next(after: answer, record) {
        case .perform(let action): return go(.promotes(promotion, point), action)
        case .done: return .done(point)
        case .failed(let error): return .failed(error)
        }
    }
}

/// A site that hands over asks its peer to take over, for the first time or after an interruption.
package struct Promotion: StepTable {
    enum State {
        case begins, asks, takesBack(TakeBack, PeerRefusal)
    }
    var state = State.begins
    private let point: UInt64

    package init(at point: UInt64) { self.point = point }

    /// - Throws: `HandOverFailure`.
    package mutating func next(after answer: Answer, _ record: GroupRecord) -> Next<Void> {
        switch (state, answer) {
        case (.begins, .begin): return go(.asks, .askToPromote(point))
        case (.asks, .done): return .done(())
        case (.asks, .failed(let refusal as PeerRefusal)): return takeBack(TakeBack(), refusal, .begin, record)
        case (.asks, .failed(let error)): return .failed(HandOverFailure.unknown(error))
        case (.takesBack(let steps, let refusal), _): return takeBack(steps, refusal, answer, record)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }

    private mutating func takeBack(
        _ steps: TakeBack, _ refusal: PeerRefusal, _ answer: Answer, _ record: GroupRecord
    ) -> Next<Void> {
        var steps = steps
        switch steps.next(after: answer, record) {
        case .perform(let action): return go(.takesBack(steps, refusal), action)
        case .done: return .failed(HandOverFailure.refused(refusal, notTakenBack: nil))
        case .failed(let error): return .failed(HandOverFailure.refused(refusal, notTakenBack: error))
        }
    }
}

/// What has become of a switchover once the peer was asked.
package enum HandOverFailure: Error {
    /// The peer does not take over; with an error, that could not be taken back here.
    case refused(PeerRefusal, notTakenBack: (any Error)?)
    /// The peer may or may not have taken over. Hosts stay shut out until it says.
    case unknown(any Error)
}

/// The site that was handing over is primary again. The peer has said that it is secondary.
package struct TakeBack: StepTable {
    enum State {
        case begins, ends, decides, admits, starts
    }
    var state = State.begins

    package init() {}

    package mutating func next(after answer: Answer, _ record: GroupRecord) -> Next<Void> {
        switch (state, answer) {
        case (_, .failed(let error)): return .failed(error)
        // No late request to take over can be used from now on.
        case (.begins, .begin): return go(.ends, .endPeersSessions)
        case (.ends, .done): return go(.decides, .change(.handoverTakenBack))
        case (.decides, .done): return go(.admits, .admitHosts)
        case (.admits, .done): return go(.starts, .startMirroring)
        case (.starts, .done): return .done(())
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }
}
