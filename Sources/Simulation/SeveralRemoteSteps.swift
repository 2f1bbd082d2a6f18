// SeveralRemoteSteps.swift: the actions of `Steps` at a remote of the scenario `SeveralHosts`: `RemotePart`, `IntakeSession` and `Failover`, as the
// production has them. Between any two the process may die, and a save may fail.

import Groups

extension SeveralRemote {
    /// One action after the other; a kill ends it. For `run`, and whoever has entered.
    func carryOut<Operation: Steps>(
        _ operation: Operation, done: @escaping (Result<Operation.Outcome, any Error>) -> Void
    ) {
        goOn(operation, after: .begin, done)
    }

    private func goOn<Operation: Steps>(
        _ operation: Operation, after answer: Answer, _ done: @escaping (Result<Operation.Outcome, any Error>) -> Void
    ) {
        var operation = operation
        let process = life
        switch operation.next(after: answer, record) {
        case .done(let outcome): done(.success(outcome))
        case .failed(let error): done(.failure(error))
        case .perform(let action):
            if world.dies(self) { return }
            let taken = operation
            perform(action) { [unowned self] answer in
                guard process == life else { return }
                world.later { [unowned self] in if process == life { goOn(taken, after: answer, done) } }
            }
        }
    }

    private func perform(_ action: SiteAction, _ done: @escaping (Answer) -> Void) {
        switch action {
        case .settle: done(answer(settle()))
        case .change(let change): done(answer(decide(change)))
        case .fence(let next): fence(next: next) { done(.done) }
        case .survey: done(.survey(survey))
        case .flushVolumes(let names):
            for name in names { flush(Int(name)!) }
            done(.done)
        case .makePointFiles(let plan):
            guard world.isQuiet || !world.random.chance(2) else { return done(.failed(Refusal("no space", .passing))) }
            makePointFiles(plan)
            done(.done)
        case .dropPointFiles(let number):
            dropPointFiles(number)
            done(.done)
        case .takePoint(let plan):
            takePoint(plan)
            done(.done)
        case .forgetChanges, .dropDifferences: done(.done)
        case .markDifferences: done(.bytes(0))
        case .open(let point, _):
            world.note("\(name) has failed over at point \(point)")
            done(.done)
        default: done(.failed(UnexpectedAnswer(action, "a remote")))
        }
    }

    private func answer(_ isDone: Bool) -> Answer { isDone ? .done : .failed(SimulationFailure("it cannot be saved")) }

    private func decide(_ change: GroupChange) -> Bool {
        guard case .remotePart(let part) = change else { return take(change) }
        var kept = part
        if fault == .forgetPlaces { kept.places = nil }
        let before = (record.points.last?.number, record.coordination?.refusedThrough ?? 0)
        let isPrepared = if case .prepared = part.record.stand { part.plan != nil } else { false }
        let promises = part.record.refusedThrough > before.1
        if (fault == .forgetPrepared && isPrepared) || (fault == .promiseUnwritten && promises) {
            takeUnsaved(.remotePart(kept))
            return true
        }
        guard take(.remotePart(kept)) else { return false }
        if let number = record.points.last?.number, number != before.0 { world.hasCommitted(number, self) }
        return true
    }

    // MARK: The coordinator asks

    func asked(_ message: RemoteMessage, _ places: [PairPlace], _ answer: @escaping (RemoteReply?) -> Void) {
        var request = message.request
        if fault == .commitRefused, case .commit(let number, _) = request.body {
            request.body = .commit(number, others: true)
        }
        let input = RemotePart.Input.request(
            request, formedAt: message.formedAt ?? 0, places: places, copy: message.copy)
        run(RemotePart(input, keep: world.mix.keep)) { [unowned self] result in
            switch result {
            case .success(let reply):
                if let said = reply.answer?.body { world.count("a remote says \(said)") }
                answer(reply)
            case .failure(let refusal as TakeoverRefusal):
                if refusal.description.contains("cannot come") { world.fail("\(name): \(refusal)") }
                world.note("\(name): \(refusal)")
                answer(nil)
            case .failure: answer(nil)
            }
        }
    }
}
