// RemotePart.swift: what one of several remotes does about a point when the coordinator asks, or another remote that is in doubt
// (`TwoPhaseCommit`).
//
// Must be prevented:
//   `prepared` is said before all of the point is on stable storage, and that it is so is written down
//   a commit is half done after a crash: the record alone decides, files come before it and chains after
//   a promise is said before it is kept
//   a point is prepared in another copy than its host has sent it to

/// What a remote has to say.
package struct RemoteReply: Codable, Sendable, Equatable {
    package var answer: Stamped<RemoteAnswer>?
    package var testimony: Testimony?
    /// When it has committed the point, in seconds since 1970.
    package var at: Double?
}

package struct RemotePart: StepTable {
    package enum Input: Sendable, Equatable {
        /// `formedAt`: of the point, in seconds since 1970; `places`: all of the group's pairs; `without`: those that have no part in it; `copy`:
        /// where the host has sent it.
        case request(
            Stamped<RemoteRequest>, formedAt: Double, places: [PairPlace]?, without: [String]? = nil,
            copy: CopyIdentity? = nil)
        /// Another remote, or this one before it asks others, wants to know of a point.
        case question(UInt64)
        /// This remote fails over, and knows whether the point counts; what was decided meanwhile holds. `alone`: an operator has said so, and nobody
        /// relies on that.
        case decided(UInt64, forward: Bool, alone: Bool)
    }

    enum State {
        case begins, settles
        case looks(UInt64), flushes(CommitPlan), makesFiles(CommitPlan)
        /// The point is decided, and its files may be gone with a process.
        case surveys, makesFilesAgain(CommitPlan)
        case decides(CommitPlan?), takes(CommitPlan), drops(CommitPlan?)
        case isSentAnew(RemoteReply)
    }
    var state = State.begins
    private let input: Input
    private let keep: Retention
    private let session: UInt64?
    private var remote = TwoPhaseCommit(.several, index: 0, record: TwoPhaseRecord())
    /// What it wants done next.
    private var wanted: ArraySlice<TwoPhaseCommit.Action> = []

    /// - Parameter session: of the primary whose data this is; nil when none has been opened since the site started.
    package init(_ input: Input, keep: Retention, session: UInt64? = nil) {
        (self.input, self.keep, self.session) = (input, keep, session)
    }

    package mutating func next(after answer: Answer, _ record: GroupRecord) -> Next<RemoteReply> {
        switch (state, answer) {
        case (_, .failed(let error)): return .failed(error)
        case (.begins, .begin): return go(.settles, .settle)
        case (.settles, .done): return begin(record)
        case (.looks(let number), .survey(let survey)):
            do {
                var plan = try record.planCommit(number, formedAt: formedAt, keep: keep, survey)
                if case .request(_, _, _, let without, _) = input { plan.point.without = without }
                return go(.flushes(plan), .flushVolumes(survey.changed))
            } catch {
                return carryOut(remote.handle(.checkFailed(number, error.description), now: 0), nil, record)
            }
        case (.flushes(let plan), .done): return go(.makesFiles(plan), .makePointFiles(plan))
        case (.makesFiles(let plan), .done):
            return carryOut(remote.handle(.checked(plan.point.number), now: 0), plan, record)
        case (.surveys, .survey(let survey)): return planDecided(survey, record)
        case (.makesFilesAgain(let plan), .done): return decide(plan)
        case (.decides(let plan), .done): return goOn(plan, record)
        case (.takes(let plan), .done): return goOn(plan, record)
        case (.drops(let plan), .done): return goOn(plan, record)
        case (.isSentAnew(let reply), .done): return .done(reply)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }

    /// The host had sent all of the point before its remote lost that, perhaps.
    private func isWhatWasSentTo(_ record: GroupRecord) -> Bool {
        if case .request(_, _, _, _, let copy?) = input { record.isCopy(copy) } else { false }
    }

    private var formedAt: Double { if case .request(_, let time, _, _, _) = input { time } else { 0 } }

    private mutating func begin(_ record: GroupRecord) -> Next<RemoteReply> {
        switch input {
        case .request(let request, _, _, _, _):
            guard record.role == .secondary else {
                let point = record.failedOver?.point ?? 0
                return .done(RemoteReply(answer: Stamped(epoch: request.epoch, .failedOver(at: point))))
            }
            remote = TwoPhaseCommit(.several, index: 0, record: record.twoPhase(after: request.body.previous))
            return carryOut(remote.handle(.request(request), now: 0), nil, record)
        case .question(let number):
            remote = TwoPhaseCommit(.several, index: 0, record: record.twoPhase())
            guard record.role == .secondary else {
                return .done(RemoteReply(testimony: remote.record.testimony(of: number)))
            }
            return carryOut(remote.handle(.question(from: 1, number), now: 0), nil, record)
        case .decided(let number, let forward, _):
            guard record.role == .secondary, record.undecided == number else { return .done(RemoteReply()) }
            remote = TwoPhaseCommit(.several, index: 0, record: record.twoPhase())
            let request: RemoteRequest = forward ? .commit(number, others: true) : .drop(number)
            return carryOut(
                remote.handle(.request(Stamped(epoch: remote.record.epoch, request)), now: 0), nil, record)
        }
    }

    /// - Parameter plan: of a point that has been looked at.
    private mutating func carryOut(
        _ turn: Turn<TwoPhaseCommit.Action>, _ plan: CommitPlan?, _ record: GroupRecord
    ) -> Next<RemoteReply> {
        wanted = (turn.before + turn.after)[...]
        guard turn.saves else { return goOn(plan, record) }
        // What an operator has chosen before has its files, and its place in the chains.
        let isThere = record.hasCommitted(remote.record.committed) != nil
        let takes = !isThere && wanted.contains { if case .take = $0 { true } else { false } }
        return takes ? go(.surveys, .survey) : decide(plan)
    }

    private mutating func decide(_ plan: CommitPlan?) -> Next<RemoteReply> {
        var change = RemotePartChange(record: remote.record, plan: plan)
        if case .request(_, _, let all, _, _) = input { change.places = all }
        if case .decided(let number, _, alone: true) = input { change.inDoubt = number }
        return go(.decides(plan), .change(.remotePart(change)))
    }

    /// Nothing was let in since it was prepared, so it is what the volumes are; its place in the chains is the newest now.
    private mutating func planDecided(_ survey: IntakeSurvey, _ record: GroupRecord) -> Next<RemoteReply> {
        guard let prepared = record.coordination?.prepared, prepared.number == remote.record.committed else {
            return .failed(UnexpectedAnswer("a commit of what is not prepared", state))
        }
        do {
            var plan = try record.planCommit(prepared.number, formedAt: prepared.formedAt, keep: keep, survey)
            plan.point.without = prepared.without
            if let before = prepared.changed, let now = plan.point.changed {
                plan.point.changed = Set(before).union(now).sorted()
            }
            return go(.makesFilesAgain(plan), .makePointFiles(plan))
        } catch {
            return .failed(error)
        }
    }

    private mutating func goOn(_ plan: CommitPlan?, _ record: GroupRecord) -> Next<RemoteReply> {
        while let action = wanted.popFirst() {
            switch action {
            case .check(let number):
                guard isWhatWasSentTo(record) else {
                    let reason = "this is another copy than the one that the point was sent to"
                    return carryOut(remote.handle(.checkFailed(number, reason), now: 0), nil, record)
                }
                return go(.looks(number), .survey)
            case .take:
                guard let plan else {
                    if record.hasCommitted(remote.record.committed) != nil { continue }
                    return .failed(UnexpectedAnswer(action, state))
                }
                return go(.takes(plan), .takePoint(plan))
            case .dropFiles(let number): return go(.drops(plan), .dropPointFiles(number))
            case .answer(let answer):
                var reply = RemoteReply(answer: answer)
                if case .committed(let number) = answer.body {
                    reply.at = record.points.last { $0.number == number }?.committedAt ?? plan?.point.committedAt
                }
                guard reply.at != nil, plan != nil, record.untracked != nil, let session else { return .done(reply) }
                return go(.isSentAnew(reply), .change(.sentAnew(session: session)))
            case .testify(_, _, .refuses(prepared: false)) where record.points.isEmpty:
                // A copy without any point does not know what the one before it had prepared.
                return .done(RemoteReply(testimony: .refuses(prepared: true)))
            case .testify(_, _, let testimony): return .done(RemoteReply(testimony: testimony))
            case .contradiction(let words): return .failed(TakeoverRefusal(words))
            case .ask, .open, .failoverRefused: return .failed(UnexpectedAnswer(action, state))
            }
        }
        return .failed(TakeoverRefusal("it comes too late"))
    }
}

extension Coordinator.Settings {
    /// What a remote needs to know of them: that it is not the only one.
    fileprivate static let several = try! Coordinator.Settings(hosts: 2, remotes: 2)
}

extension RemoteRequest {
    fileprivate var previous: UInt64? {
        switch self {
        case .prepare(_, let previous), .commitAtOnce(_, let previous): previous
        case .commit, .drop: nil
        }
    }
}

extension TwoPhaseRecord {
    /// Of one that takes no points any more.
    func testimony(of number: UInt64) -> Testimony {
        // What an operator has chosen, the others must not rely on.
        if inDoubt == number { return .refuses(prepared: true) }
        return number <= committed ? .committed : .refuses(prepared: false)
    }
}
