// TwoPhaseCommit.swift: a remote's part in committing a point at several remotes, and what a failover makes of it.
//
//   open → (prepare: look, flush, make files, write it down) prepared → commit | drop → open
//
// With one remote the coordinator asks for the commit at once: one save, as ever.
//
// Must be prevented:
//   a remote commits a point that another cannot have, or fails over to a point that another does not go to
//   `prepared` is said while something is missing or under way, or before that it is so is on stable storage
//   data of the next point gets into a point that is prepared and not decided, or that a failed save has perhaps left in the file
//   a promise to refuse a commit is said before it is kept, or is forgotten
//   a point that was dropped or refused is prepared or committed when its message comes at last
//   a coordinator's process that has been followed by another is obeyed

package struct TwoPhaseCommit: Sendable {
    package enum Event: Equatable, Sendable {
        case tick
        case request(Stamped<RemoteRequest>)
        /// Everything of the point is there, flushed, and in its files.
        case checked(UInt64)
        /// For example: writes are under way.
        case checkFailed(UInt64, String)
        case question(from: Int, UInt64)
        case testimony(from: Int, UInt64, Testimony)
        case failOver
        /// The operator does not wait for the others, and says which point it is to be.
        case failOverAlone(UInt64)
    }

    package enum Action: Equatable, Sendable {
        case answer(Stamped<RemoteAnswer>)
        /// Look whether writes are under way, flush, make the files of the point. Answered by `checked` or `checkFailed`.
        case check(UInt64)
        /// The record says that it is committed: the volumes take it. It is repeated after a start.
        case take(UInt64)
        /// What was made for a point goes.
        case dropFiles(UInt64)
        case ask(Int, UInt64)
        case testify(Int, UInt64, Testimony)
        /// Hosts may write, from this point on.
        case open(at: UInt64)
        case failoverRefused(String)
        /// The coordinator said what cannot be: nothing has changed.
        case contradiction(String)
    }

    package enum Purpose: Equatable, Sendable { case prepare, commit }

    package enum State: Equatable, Sendable {
        case open
        case checking(UInt64, Purpose)
        case prepared(UInt64)
        /// An operator wants to fail over; the point is prepared.
        case asking(UInt64, Inquiry)
        case failedOver(at: UInt64)
    }

    package private(set) var record: TwoPhaseRecord
    package private(set) var state: State
    /// What counts if the save that was asked for fails.
    private var fallback: (record: TwoPhaseRecord, state: State)?
    /// The file may hold another record than this.
    package private(set) var isUnsaved = false
    private var saveAt: UInt64 = 0
    private static let saveRetry: UInt64 = 1_000_000_000
    private let others: [Int]
    private let isOnly: Bool

    /// - Parameters:
    ///   - index: which of the remotes this is.
    ///   - record: as the last process left it.
    package init(_ settings: Coordinator.Settings, index: Int, record: TwoPhaseRecord) {
        others = settings.allRemotes.filter { $0 != index }
        isOnly = settings.remotes == 1
        self.record = record
        state =
            switch record.stand {
            case .open: .open
            case .prepared(let number): .prepared(number)
            case .failedOver(let point, _): .failedOver(at: point)
            }
    }

    /// What was decided is carried out (again).
    package func start() -> Turn<Action> {
        let taken: [Action] = record.committed > 0 ? [.take(record.committed)] : []
        guard case .failedOver(let point) = state else { return Turn(taken) }
        return Turn(taken + (point > record.committed ? [.take(point)] : []) + [.open(at: point)])
    }

    package mutating func wasSaved() {
        isUnsaved = false
        fallback = nil
    }

    package mutating func saveFailed(now: UInt64) -> Turn<Action> {
        isUnsaved = true
        saveAt = now + Self.saveRetry
        let wasFailingOver =
            switch state {
            case .asking, .failedOver: true
            case .open, .checking, .prepared: false
            }
        if let fallback { (record, state) = fallback }
        fallback = nil
        // The operator asks again.
        if case .asking(let number, _) = state { state = .prepared(number) }
        return Turn(wasFailingOver && !hasFailedOver ? [.failoverRefused("the record cannot be saved")] : [])
    }

    /// Whether hosts' data is let in.
    package var takesData: Bool { state == .open && !isUnsaved }
    private var hasFailedOver: Bool { if case .failedOver = state { true } else { false } }

    /// When `tick` must come at the latest; nil = no need.
    package var wakeAt: UInt64? {
        var next = isUnsaved ? saveAt : nil
        if case .asking(_, let inquiry) = state, let due = inquiry.round.wakeAt { next = min(next ?? due, due) }
        return next
    }

    // MARK: Events

    package mutating func handle(_ event: Event, now: UInt64) -> Turn<Action> {
        switch event {
        case .tick: return tick(now)
        case .request(let request):
            guard request.epoch >= record.epoch else {
                return Turn([.answer(Stamped(epoch: request.epoch, .superseded(by: record.epoch)))])
            }
            // Before it answers: once forgotten, the one that was followed would be obeyed again.
            if request.epoch > record.epoch { (record.epoch, isUnsaved) = (request.epoch, true) }
            return carryOut(request.body)
        case .question(let remote, let number): return testify(remote, number)
        case .testimony(let remote, let number, let testimony): return hear(testimony, of: remote, number)
        case .checked(let number), .checkFailed(let number, _):
            guard case .checking(number, let purpose) = state else { return Turn() }  // dropped meanwhile
            return didCheck(number, purpose, event)
        case .failOver: return failOver(now)
        case .failOverAlone(let point): return failOverAlone(at: point)
        }
    }

    private mutating func tick(_ now: UInt64) -> Turn<Action> {
        var turn = Turn<Action>()
        if isUnsaved, now >= saveAt {
            saveAt = now + Self.saveRetry
            turn = .saved(then: [])
        }
        guard case .asking(let number, var inquiry) = state, inquiry.isDue(now) else { return turn }
        guard !inquiry.round.isHopeless else {
            state = .prepared(number)
            return turn + Turn([.failoverRefused(Self.doubt(number, inquiry.unheard))])
        }
        state = .asking(number, inquiry)
        return turn + say(inquiry.unheard.map { .ask($0, number) })
    }

    private static func doubt(_ number: UInt64, _ unheard: [Int]) -> String {
        let names = unheard.map(String.init).joined(separator: ", ")
        return "point \(number) is prepared, and remote \(names), which may have committed it, is out of reach; "
            + "with --alone POINT the others may go to another point"
    }

    // MARK: The coordinator's requests

    private mutating func carryOut(_ request: RemoteRequest) -> Turn<Action> {
        if case .failedOver(let point) = state { return answer(.failedOver(at: point)) }
        let number = request.number
        if number <= record.committed {
            // It is late, or the answer was lost.
            if case .prepare = request { return Turn() }
            return answer(.committed(number))
        }
        switch Self.place(of: request, in: state, about: number) {
        case .late: return Turn()
        case .impossible:
            // Refused for good, it may still be under way.
            if number <= record.refusedThrough { return answer(refusal(number)) }
            return contradiction(request)
        case .handled: break
        }
        switch (state, request) {
        case (.open, .prepare(_, let after)): return check(number, .prepare, after: after)
        case (.open, .commitAtOnce(_, let after)): return check(number, .commit, after: after)
        case (.open, .commit(_, let others)):
            guard !isOnly else { return contradiction(request) }
            guard number <= record.refusedThrough else { return refuse(number, .gone(number)) }
            // That it was prepared is durable; so it was in another copy if it counts.
            return answer(others ? .gone(number) : refusal(number))
        case (.checking, .prepare): return answer(.checking(number))
        case (.prepared, .prepare):
            return answer(number <= record.refusedThrough ? refusal(number) : .prepared(number))
        case (.asking, .prepare): return answer(refusal(number))
        case (.prepared, .commit(_, let others)):
            guard others || number > record.refusedThrough else { return answer(refusal(number)) }
            return commit(number)
        case (.asking, .commit(_, let others)):
            return others ? finish(number, .rollForward) : answer(refusal(number))
        case (.asking, .drop): return finish(number, .drop)
        case (_, .drop): return drop(number)
        default: return contradiction(request)
        }
    }

    private func refusal(_ number: UInt64) -> RemoteAnswer {
        .refuses(
            number, "points up to \(record.refusedThrough) were dropped here, or promised to a remote that fails over")
    }

    private mutating func check(_ number: UInt64, _ purpose: Purpose, after previous: UInt64) -> Turn<Action> {
        if number <= record.refusedThrough { return answer(refusal(number)) }
        guard isOnly == (purpose == .commit) else { return contradiction(purpose) }
        guard previous == record.committed else {
            return refuse(number, .outOfOrder(number, newest: record.committed))
        }
        state = .checking(number, purpose)
        return Turn([.check(number)])
    }

    private mutating func didCheck(_ number: UInt64, _ purpose: Purpose, _ event: Event) -> Turn<Action> {
        if case .checkFailed(_, let reason) = event { return refuse(number, .refuses(number, reason)) }
        state = .open  // if it cannot be saved, it is looked at anew
        switch purpose {
        case .prepare:
            return change(to: .prepared(number), then: [answerAction(.prepared(number))]) {
                $0.stand = .prepared(number)
            }
        case .commit: return commit(number)
        }
    }

    private mutating func commit(_ number: UInt64) -> Turn<Action> {
        change(to: .open, then: [.take(number), answerAction(.committed(number))]) {
            $0.committed = number
            $0.stand = .open
        }
    }

    private mutating func drop(_ number: UInt64) -> Turn<Action> {
        change(to: .open, then: [.dropFiles(number), answerAction(.dropped(number))]) {
            $0.refusedThrough = max($0.refusedThrough, number)
            $0.stand = .open
        }
    }

    /// For good: a refusal may arrive long after it was said. Of the only remote, nobody relies on it: asked again it may commit the point, and
    /// says so when that is dropped.
    private mutating func refuse(_ number: UInt64, _ answer: RemoteAnswer) -> Turn<Action> {
        state = .open
        guard !isOnly else { return say([.dropFiles(number), answerAction(answer)]) }
        return change(to: .open, then: [.dropFiles(number), answerAction(answer)]) {
            $0.refusedThrough = max($0.refusedThrough, number)
        }
    }

    // MARK: Other remotes

    private mutating func testify(_ remote: Int, _ number: UInt64) -> Turn<Action> {
        if number <= record.committed { return say([.testify(remote, number, .committed)]) }
        let testimony = Action.testify(remote, number, .refuses(prepared: record.inDoubt == number))
        if number <= record.refusedThrough { return say([testimony]) }
        if case .checking(number, _) = state {
            return change(to: .open, then: [.dropFiles(number), testimony]) { $0.refusedThrough = number }
        }
        return change(to: state, then: [testimony]) { $0.refusedThrough = number }
    }

    private mutating func hear(_ testimony: Testimony, of remote: Int, _ number: UInt64) -> Turn<Action> {
        guard case .asking(number, var inquiry) = state else { return Turn() }  // it is settled
        let outcome = inquiry.take(testimony, of: remote)
        guard let outcome else {
            state = .asking(number, inquiry)
            return Turn()
        }
        return finish(number, outcome)
    }

    // MARK: Failover

    private mutating func failOver(_ now: UInt64) -> Turn<Action> {
        switch state {
        case .asking: return Turn()
        case .failedOver(let point): return say([.open(at: point)])
        case .open, .checking:
            // What was not prepared here, nobody has committed.
            guard record.committed > 0 else { return Turn([.failoverRefused("there is no recovery point yet")]) }
            return goOver(to: record.committed, forward: false, dropping: checked)
        case .prepared(let number):
            let inquiry = Inquiry(others, now: now)
            // Its own promise comes first.
            return change(to: .asking(number, inquiry), then: others.map { .ask($0, number) }) {
                $0.refusedThrough = max($0.refusedThrough, number)
            }
        }
    }

    private var checked: UInt64? { if case .checking(let number, _) = state { number } else { nil } }

    private mutating func finish(_ number: UInt64, _ outcome: Inquiry.Outcome) -> Turn<Action> {
        switch outcome {
        case .rollForward: return goOver(to: number, forward: true, dropping: nil)
        case .drop:
            guard record.committed > 0 else {
                let refusal = Action.failoverRefused("there is no recovery point yet")
                return change(to: .open, then: [.dropFiles(number), refusal]) { $0.stand = .open }
            }
            return goOver(to: record.committed, forward: false, dropping: number)
        }
    }

    private mutating func goOver(to point: UInt64, forward: Bool, dropping dropped: UInt64?) -> Turn<Action> {
        let actions: [Action] =
            (forward ? [.take(point)] : []) + (dropped.map { [.dropFiles($0)] } ?? []) + [.open(at: point)]
        return change(to: .failedOver(at: point), then: actions) {
            if forward { $0.committed = point }
            $0.stand = .failedOver(at: point, inDoubt: nil)
        }
    }

    private mutating func failOverAlone(at point: UInt64) -> Turn<Action> {
        guard !hasFailedOver else { return failOver(0) }
        let inDoubt = record.inDoubt
        guard point > 0, point == record.committed || point == inDoubt else {
            let points = [record.committed, inDoubt ?? 0].filter { $0 > 0 }.map(String.init).joined(separator: " and ")
            return Turn([.failoverRefused("there is no point \(point); there is \(points)")])
        }
        let taken: [Action] = point == inDoubt ? [.take(point)] : []
        return change(to: .failedOver(at: point), then: taken + [.open(at: point)]) {
            // It does not count as committed: the others must not rely on what an operator chose.
            $0.stand = .failedOver(at: point, inDoubt: inDoubt)
        }
    }

    // MARK: The record, and what is said

    /// Durably, or not at all.
    private mutating func change(
        to next: State, then actions: [Action], _ change: (inout TwoPhaseRecord) -> Void
    ) -> Turn<Action> {
        fallback = (record, state)
        change(&record)
        state = next
        return .saved(then: actions)
    }

    private func answerAction(_ body: RemoteAnswer) -> Action { .answer(Stamped(epoch: record.epoch, body)) }
    private func answer(_ body: RemoteAnswer) -> Turn<Action> { say([answerAction(body)]) }

    /// What is said relies on the record.
    private func say(_ actions: [Action]) -> Turn<Action> { isUnsaved ? .saved(then: actions) : Turn(actions) }

    private func contradiction(_ event: some Any) -> Turn<Action> {
        Turn([.contradiction("'\(event)' cannot come while '\(state.kind)'")])
    }
}

// MARK: Places

extension TwoPhaseCommit.State {
    package enum Kind: Int, CaseIterable, Sendable { case open, checking, prepared, asking, failedOver }

    package var kind: Kind {
        switch self {
        case .open: .open
        case .checking: .checking
        case .prepared: .prepared
        case .asking: .asking
        case .failedOver: .failedOver
        }
    }

    /// The point that is not decided.
    package var number: UInt64? {
        switch self {
        case .open, .failedOver: nil
        case .checking(let number, _), .prepared(let number), .asking(let number, _): number
        }
    }
}

extension TwoPhaseCommit {
    /// Of a point that is not committed here. While one is prepared, an older one is late and a newer one impossible.
    package static func place(of request: RemoteRequest, in state: State, about number: UInt64) -> Place {
        if let current = state.number, number != current { return number < current ? .late : .impossible }
        let row: StaticString =
            switch request {
            //                  open checking prepared asking failedOver
            case .prepare: "      H    H        H        H      H"
            case .commit: "       H    x        H        H      H"
            case .commitAtOnce: " H    l        x        x      H"
            case .drop: "         H    H        H        H      H"
            }
        return Place(row, state.kind.rawValue)
    }
}
