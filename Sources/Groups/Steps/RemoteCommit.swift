// RemoteCommit.swift: a secondary commits a point, as `TwoPhaseCommit` decides: with one remote, at once, and its record is the decision.
//
// Must be prevented:
//   a point is committed out of order, twice, or while writes to the intake are under way
//   a commit is half done after a crash: the record alone decides, files come before it and chains after
//   what a volume has changed since the point before is not in the point (`IntakeSurvey.changed`)
//   something is let in while the record's file may hold a point whose commit has failed

package struct RemoteCommit: StepTable {
    enum State {
        case begins, surveys, flushes(CommitPlan), makesFiles(CommitPlan), decides(CommitPlan), takes(CommitPlan)
        case isSentAnew(CommitPlan), closes(any Error)
    }
    var state = State.begins
    private var remote = TwoPhaseCommit(.single, index: 0, record: TwoPhaseRecord())
    /// What it wants done next.
    private var wanted: ArraySlice<TwoPhaseCommit.Action> = []
    private let number: UInt64
    private let previous: UInt64?
    private let formedAt: Double
    private let keep: Retention
    private let session: UInt64

    /// - Parameters:
    ///   - previous: the newest point that the primary knows to be committed.
    ///   - keep: which points stay.
    ///   - session: of the primary that asks.
    package init(
        number: UInt64, after previous: UInt64?, formedAt: Double, keep: Retention, session: UInt64
    ) {
        (self.number, self.previous, self.formedAt) = (number, previous, formedAt)
        (self.keep, self.session) = (keep, session)
    }

    package mutating func next(after answer: Answer, _ record: GroupRecord) -> Next<PointRecord> {
        switch (state, answer) {
        case (.begins, .begin):
            remote = TwoPhaseCommit(.single, index: 0, record: record.twoPhase)
            let request = RemoteRequest.commitAtOnce(number, after: previous ?? 0)
            return carryOut(remote.handle(.request(Stamped(epoch: 0, request)), now: 0), nil, record)
        case (.surveys, .survey(let survey)):
            do {
                let plan = try record.planCommit(number, formedAt: formedAt, keep: keep, survey)
                return go(.flushes(plan), .flushVolumes(survey.changed))
            } catch {
                return carryOut(remote.handle(.checkFailed(number, error.description), now: 0), nil, record)
            }
        case (.flushes(let plan), .done):
            return go(.makesFiles(plan), .makePointFiles(plan))
        case (.makesFiles(let plan), .done):
            return carryOut(remote.handle(.checked(number), now: 0), plan, record)
        case (.decides, .failed(let error)):
            // The file may hold the point all the same, and a start would take it then as the volumes are.
            return go(.closes(error), .fence(next: 0))
        case (.closes(let error), _): return .failed(error)
        case (.decides(let plan), .done), (.takes(let plan), .done): return goOn(plan, record)
        case (.isSentAnew(let plan), _): return .done(plan.point)
        case (_, .failed(let error)): return .failed(error)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }

    /// - Parameter plan: of a point that has been looked at.
    private mutating func carryOut(
        _ turn: Turn<TwoPhaseCommit.Action>, _ plan: CommitPlan?, _ record: GroupRecord
    ) -> Next<PointRecord> {
        wanted = (turn.before + turn.after)[...]
        guard turn.saves, let plan else { return goOn(plan, record) }
        return go(.decides(plan), .change(.committed(plan)))
    }

    private mutating func goOn(_ plan: CommitPlan?, _ record: GroupRecord) -> Next<PointRecord> {
        while let action = wanted.popFirst() {
            switch (action, plan) {
            case (.check, _): return go(.surveys, .survey)
            case (.take, let plan?): return go(.takes(plan), .takePoint(plan))
            case (.answer(let answer), _): return end(answer.body, plan, record)
            // Files that no record names go at the next start, and the next point's take their place.
            case (.dropFiles, _): break
            default: return .failed(UnexpectedAnswer(action, state))
            }
        }
        return .failed(UnexpectedAnswer("nothing", state))
    }

    private mutating func end(
        _ answer: RemoteAnswer, _ plan: CommitPlan?, _ record: GroupRecord
    ) -> Next<PointRecord> {
        switch answer {
        case .committed:
            // Asked again, since the answer was lost; but not about one of long ago.
            guard let point = plan?.point ?? record.hasCommitted(number) else {
                return .failed(
                    TakeoverRefusal(
                        "point \(number) is out of order: the newest at the remote is \(remote.record.committed)"))
            }
            guard let plan, record.untracked != nil else { return .done(point) }
            return go(.isSentAnew(plan), .change(.sentAnew(session: session)))
        case .refuses(_, let reason): return .failed(TakeoverRefusal(reason))
        case .outOfOrder(_, let newest):
            return .failed(TakeoverRefusal(disorder(number, newest: newest, expected: previous ?? 0)))
        case .failedOver: return .failed(TakeoverRefusal("the group has failed over"))
        case .checking, .prepared, .gone, .dropped, .superseded: return .failed(UnexpectedAnswer(answer, state))
        }
    }
}

extension GroupRecord {
    /// What the only remote of a group finds again.
    fileprivate var twoPhase: TwoPhaseRecord {
        TwoPhaseRecord(
            committed: points.last?.number ?? 0,
            stand: role == .secondary ? .open : .failedOver(at: failedOver?.point ?? 0, inDoubt: nil))
    }
}
