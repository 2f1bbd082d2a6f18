// CyclePoints.swift: how the cycle takes a point from its forming to its commit: a coordinator with one host and one remote, and that host's
// participant. What these two say to each other crosses no process, and is answered on the spot; what they rely on is in the group's
// record, which is saved once for both.
//
// Must be prevented:
//   a point counts as committed before the remote says so, or is sent again after it was
//   a point stays half formed after a crash: the intent is recorded before the first volume forms
//   a commit that was asked for takes effect after its point was given up, unheard: the session that it was asked in is closed, which voids
//     it, and the next one says what was committed (`learn`)

import Base

extension Coordinator.Settings {
    /// One host and one remote. Who forms holds hosts no longer than its own deadline allows.
    static let single = try! Coordinator.Settings(hosts: 1, remotes: 1)
}

extension GroupRecord {
    /// What the coordinator of a site finds again.
    func coordination(of part: Cycle.Part) -> CoordinatorRecord {
        guard part.isOfSeveral else { return coordination(epoch: 0) }
        return takingUp(coordination?.coordinator)
    }

    /// What a coordinator here goes on from. A record that knows less than this site is of another direction of mirroring, or of a time
    /// before another coordinated: what it has not settled others have.
    func takingUp(_ found: CoordinatorRecord?) -> CoordinatorRecord {
        let epoch = max(found?.epoch ?? 0, coordination?.epoch ?? 0)
        guard var found, found.lastNumber >= highestPoint else {
            return CoordinatorRecord(
                epoch: epoch, lastNumber: highestPoint, committed: lastCommitted?.number ?? 0, isGuessed: true)
        }
        found.epoch = epoch
        return found
    }

    /// What the coordinator finds again: the group's only host says what has become of the point.
    func coordination(epoch: UInt64) -> CoordinatorRecord {
        let (newest, participation) = (lastCommitted?.number ?? 0, participation)
        // It is over if it is the newest that was committed, as a lost answer has said; or if a later number was counted, of another copy.
        guard participation.point != .none, participation.number > newest, participation.number >= lastNumber else {
            return CoordinatorRecord(epoch: epoch, lastNumber: max(lastNumber, newest), committed: newest)
        }
        return CoordinatorRecord(
            epoch: epoch, lastNumber: participation.number,
            point: participation.point == .held ? .formed : .undecided, committed: newest)
    }

    /// An only host follows nobody's epochs, also if there were other hosts once.
    func participation(of part: Cycle.Part) -> ParticipantRecord {
        var record = participation
        if !part.isOfSeveral { record.epoch = 0 }
        return record
    }

    var participation: ParticipantRecord {
        let epoch = coordination?.epoch ?? 0
        return switch primary?.point {
        case .forming(let number): ParticipantRecord(epoch: epoch, number: number, point: .forming)
        case .held(let point): ParticipantRecord(epoch: epoch, number: point.number, point: .held)
        case .some(.none), nil: ParticipantRecord(epoch: epoch, number: lastNumber)
        }
    }

    /// - Parameter formedAt: of a point that is held from now on.
    mutating func take(_ participation: ParticipantRecord, formedAt: Double) {
        switch (participation.point, held) {
        case (.none, _): primary?.point = .none
        case (.forming, _): primary?.point = .forming(participation.number)
        case (.held, nil): primary?.point = .held(PointRecord(number: participation.number, formedAt: formedAt))
        case (.held, _?): break
        }
    }
}

extension Cycle {
    var isGivingUp: Bool { participant.state.kind == .givingUp }
    /// There is one that could be lost.
    var hasPoint: Bool {
        switch participant.state.kind {
        case .forming, .formed, .draining, .drained: true
        case .idle, .makingReady, .ready, .givingUp: false
        }
    }

    // MARK: Taking it up, and giving it up

    /// Where the process before this one was.
    mutating func takeUp(_ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        if isOfSeveral { return takeUpOfSeveral(&record, now) }
        let isUnderWay = coordinator.record.point != .none
        let own = carryOut(participant.start(isHeld: isUnderWay), &record, now)
        return isUnderWay ? own + carryOut(coordinator.start(now: now), &record, now) : own
    }

    mutating func giveUp(_ next: Next, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        state = .givingUp(next)
        let turn = tell(.giveUp(next.reason), &record, now)
        return isGivingUp ? turn : turn + carryOut(next, &record, now)
    }

    mutating func gaveUp(_ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        let turn = tell(.gaveUp(participant.record.number), &record, now)
        guard case .givingUp(let next) = state else { return turn + .saved() }
        return turn + carryOut(next, &record, now)
    }

    // MARK: Its way

    mutating func beginPoint(_ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        invariant(coordinator.state == .idle, "a point begins when nothing is left of the last")
        state = .atPoint(.none)
        // Idle, it has nothing of its own: numbers are counted on from what other roles and peers have used.
        coordinator.record = record.coordination(epoch: coordinator.record.epoch)
        return tell(.request, &record, now)
    }

    /// - Parameter changed: volumes that have something to send.
    mutating func didForm(
        at time: Double, isIntact: Bool, _ changed: [Int], _ record: inout GroupRecord, _ now: UInt64
    ) -> Turn<Action> {
        guard isIntact else {
            // Whoever asked for it still waits; but not at once, since hosts were held for nothing.
            requested = true
            notBefore = now + Self.readyRetry
            return giveUp(.carryOn, &record, now)
        }
        formed = (time, changed)
        return tell(.formed(participant.record.number), &record, now)
    }

    mutating func startMove(_ volumes: [Int], _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        state = .atPoint(.moves(settings.mode.mover(MoveShape(volumes: volumes, window: settings.window, pace: pace))))
        return move(.begin, &record, now)
    }

    mutating func move(_ event: MoveEvent, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        guard case .atPoint(.moves(var mover)) = state else {
            invariantFailed("only what a state has a place for is handled", #fileID, #line)
        }
        state = .atPoint(.none)  // so that there is one mover, and its tables are not copied
        mover.pace = pace
        let actions = Turn(mover.handle(event).map { Action.move($0) })
        guard mover.isDone else {
            state = .atPoint(.moves(mover))
            return actions
        }
        let bytes = mover.bytesSent
        change(&record) { $0.bytes = bytes }
        return actions + tell(.drained(participant.record.number), &record, now)
    }

    /// What is known of the point that is held.
    private func change(_ record: inout GroupRecord, _ body: (inout PointRecord) -> Void) {
        guard var point = record.held else { return }
        body(&point)
        record.primary?.point = .held(point)
    }

    mutating func committed(at time: Double, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        change(&record) { $0.committedAt = time }
        return hear(.committed(coordinator.record.lastNumber), &record, now) + .saved() + becomeIdle(&record, now)
    }

    mutating func refused(_ reason: String, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        let words = "the peer refused the point: \(reason)"
        state = .givingUp(.retry(words))
        return closeLink() + hear(.refuses(coordinator.record.lastNumber, words), &record, now)
    }

    // MARK: A new session

    /// What the peer has committed, when a session opens. A point of ours may have been given up here while its commit's answer was on the
    /// way: its bits were merged back, so what differs from it is known.
    mutating func learn(_ newest: PointRecord?, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        guard let newest, newest.number > record.lastCommitted?.number ?? 0, newest.number <= record.lastNumber else {
            return Turn()
        }
        record.primary?.lastCommitted = newest
        guard !isOfSeveral, coordinator.state.kind != .idle else { return Turn() }
        return tell(.found(committed: newest.number), &record, now)
    }

    /// The session is open.
    mutating func goOn(_ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        if isOfSeveral { return goOnOfSeveral(&record, now) }
        switch coordinator.state.kind {
        case .idle:
            // What has changed waits, as it did before the link was lost.
            if waitsForCommand(record) { resyncing = false }
            return .saved() + becomeIdle(&record, now, due: now)
        case .draining:
            state = .atPoint(.none)
            return .saved(then: [.rewind]) + startMove(Array(0..<settings.volumes), &record, now)
        case .committing:
            state = .atPoint(.none)
            return .saved() + carryOut(Turn(coordinator.outstanding), &record, now)
        case .givingUp:
            state = .givingUp(.carryOn)
            return .saved()
        case .makingReady, .holding, .running, .preparing, .ending, .stopped:
            invariantFailed("a session opens while a point is formed or none is", #fileID, #line)
        }
    }

    // MARK: What the two say

    /// The record of both is on stable storage.
    mutating func wasSaved() {
        coordinator.wasSaved()
        participant.wasSaved()
    }

    mutating func tell(_ event: Coordinator.Event, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        let turn = coordinator.handle(event, now: now)
        if isOfSeveral, !settings.part.isElected { record.keep(coordinator.record) }
        record.lastNumber = max(record.lastNumber, coordinator.record.lastNumber)
        return carryOut(turn, &record, now)
    }

    mutating func tell(_ event: Participant.Event, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        let turn = participant.handle(event, now: now)
        if isOfSeveral { record.keep(participant.record) }
        record.take(participant.record, formedAt: formed.at)
        return carryOut(turn, &record, now)
    }

    mutating func hear(_ answer: RemoteAnswer, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        tell(.remote(0, Stamped(epoch: coordinator.record.epoch, answer)), &record, now)
    }

    mutating func carryOut(
        _ turn: Turn<Coordinator.Action>, _ record: inout GroupRecord, _ now: UInt64
    ) -> Turn<Action> {
        turn.flatMap { perform($0, &record, now) }
    }

    mutating func carryOut(
        _ turn: Turn<Participant.Action>, _ record: inout GroupRecord, _ now: UInt64
    ) -> Turn<Action> {
        turn.flatMap { perform($0, &record, now) }
    }

    private mutating func perform(
        _ action: Coordinator.Action, _ record: inout GroupRecord, _ now: UInt64
    ) -> Turn<Action> {
        if isOfSeveral { return performOfSeveral(action, &record, now) }
        switch action {
        case .askHost(_, let request): return tell(.request(request), &record, now)
        case .askRemote(_, let request): return ask(request.body, &record, now)
        case .committed(let number):
            if record.lastCommitted?.number != number, let point = record.held { record.primary?.lastCommitted = point }
            record.primary?.fromImage = false
            (resyncing, attempt) = (false, 0)
            return Turn()
        case .givesUp:
            if case .atPoint = state {
                requested = true  // whoever asked for it still waits
                state = .givingUp(.carryOn)
            }
            return Turn()
        case .stopped, .contradiction:
            invariantFailed("a coordinator of one process is followed by none, and not contradicted", #fileID, #line)
        }
    }

    private mutating func ask(_ request: RemoteRequest, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        switch request {
        case .commitAtOnce(let number, _):
            // Without a session it waits for the next; asked already, the answer will come, or the link is lost.
            guard case .atPoint(.none) = state, let point = record.held else { return Turn() }
            state = .atPoint(.commits)
            return Turn([
                .commit(number: number, previous: record.lastCommitted?.number, formedAt: point.formedAt)
            ])
        case .drop(let number): return hear(.dropped(number), &record, now)  // with the session, which is closed
        case .prepare, .commit: invariantFailed("one remote commits at once", #fileID, #line)
        }
    }

    private mutating func perform(
        _ action: Participant.Action, _ record: inout GroupRecord, _ now: UInt64
    ) -> Turn<Action> {
        if isOfSeveral { return performOfSeveral(action, &record, now) }
        switch action {
        case .answer(let answer): return tell(.host(0, answer), &record, now)
        // That was done when it was asked whether anything has changed (`prepare`).
        case .makeReady(let number): return tell(.madeReady(number), &record, now)
        case .formAtOnce(let number): return Turn([.form(number: number)])
        case .drain:
            // Without a session it waits for the next.
            guard case .atPoint = state else { return Turn() }
            return startMove(formed.changed, &record, now)
        case .giveUp: return Turn([.giveUp])
        case .end(let number): return Turn([.endPoint(number: number)])
        case .holdAndForm, .letGo: invariantFailed("one host forms at once", #fileID, #line)
        case .contradiction: invariantFailed("a host is asked what its state has a place for", #fileID, #line)
        }
    }
}
