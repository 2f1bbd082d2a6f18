// SeveralFailover.swift: a failover of all remotes in the scenario `SeveralHosts`: the actions of `GroupFailover` and `FollowedFailover`, as
// Sources/Site/FailoverOfSeveral.swift carries them out. Between any two the process may die.

import Groups

extension SeveralRemote {
    /// As it knows them.
    private var fellows: [String] {
        let known = (record.coordination?.places ?? []).map(\.remote)
        return world.remotes.filter { $0 !== self && (world.mix.knowsFellows || known.contains($0.name)) }.map(\.name)
    }

    private var pairName: String { world.hosts[index].name }

    /// - Parameters:
    ///   - point: nil = the newest that counts.
    ///   - alone: the others are not asked, and not led.
    ///   - done: why it has not; nil = it has.
    func failOver(point: UInt64?, alone: Bool, done: @escaping (String?) -> Void) {
        let order = GroupFailover.Order(
            group: "all", site: name, point: point, alone: alone, others: fellows, id: world.random.next())
        lastHeard = [:]
        carryOut(GroupFailover(order)) { (result: Result<GroupFailover.Outcome, any Error>) in
            if case .failure(let error) = result { done("\(error)") } else { done(nil) }
        }
    }

    private func follow(
        _ leader: SeveralRemote, _ target: FailoverTarget, committed: UInt64, _ answer: @escaping (String?) -> Void
    ) {
        let following = FollowedFailover(group: "all", site: name, leader: leader.name, target, committed: committed)
        carryOut(following) { (result: Result<Void, any Error>) in
            if case .failure(let error) = result { answer("\(error)") } else { answer("done") }
        }
    }

    // MARK: Carrying it out

    private func carryOut<Operation: FailoverSteps>(
        _ operation: Operation, after answer: FailoverAnswer = .begin,
        _ done: @escaping (Result<Operation.Outcome, any Error>) -> Void
    ) {
        var operation = operation
        switch operation.next(after: answer, [OwnPair(pairName, isEmpty: false, record)]) {
        case .done(let outcome): done(.success(outcome))
        case .failed(let error): done(.failure(error))
        case .perform(let action):
            if world.dies(self) { return }
            let (process, taken) = (life, operation)
            perform(action) { [unowned self] answer in
                if process == life { carryOut(taken, after: answer, done) }
            }
        }
    }

    private func perform(_ action: FailoverAction, _ done: @escaping (FailoverAnswer) -> Void) {
        switch action {
        case .announce(let flag):
            if fault == .announceLate { unannounced = flag } else { return done(announce(flag)) }
            done(.done)
        case .retract(let others):
            retract(others)
            done(.done)
        case .ask(let others, let number):
            if number != nil, fault == .failOverUnsettled {
                let nothing = Heard.says(RemoteWord(pairs: [], underWay: nil))
                return done(.heard(Dictionary(uniqueKeysWithValues: others.map { ($0, nothing) })))
            }
            ask(others, about: number) { [unowned self] heard in
                if number == nil { lastHeard = heard }
                if let flag = unannounced { _ = announce(flag) }
                unannounced = nil
                done(.heard(heard))
            }
        case .promise(_, let number):
            run(RemotePart(.question(number), keep: world.mix.keep)) { result in
                switch result {
                case .success(let reply): done(.testimony(reply.testimony))
                case .failure(let error): done(.failed(error))
                }
            }
        case .settle(let settlement): settle(settlement, done)
        case .takeOver(let takeover):
            checkEverybodyHas(takeover.point)
            takeOver(takeover, done)
        case .leave: done(.done)
        case .lead(let other, let target, let committed): lead(remote(other), target, committed, done)
        }
    }

    private func remote(_ name: String) -> SeveralRemote { world.remotes.first { $0.name == name }! }

    // MARK: What the others say

    private func announce(_ flag: FailoverFlag) -> FailoverAnswer {
        do throws(Refusal) {
            try failovers.begin(flag, "all", at: name)
            return .done
        } catch {
            return .failed(error)
        }
    }

    private func retract(_ others: [String]) {
        guard let ended = failovers.end() else { return }
        for other in others.map(remote) {
            world.call(self, other) { [unowned self] in
                other.testify(nil, name, ended, hasEnded: true, $0)
            } done: { (_: RemoteWord?) in
            }
        }
    }

    private func ask(_ others: [String], about number: UInt64?, done: @escaping ([String: Heard]) -> Void) {
        guard !others.isEmpty else { return done([:]) }
        var found: [String: Heard] = [:]
        for name in others {
            let (other, flag) = (remote(name), failovers.own)
            world.call(self, other) { [unowned self] in
                other.testify(number, self.name, flag, $0)
            } done: { [unowned self] (word: RemoteWord?) in
                found[name] = word.map { .says($0) } ?? .silent(last: failovers.last(of: name, now: world.now))
                if found.count == others.count { done(found) }
            }
        }
    }

    private func testify(
        _ number: UInt64?, _ asker: String, _ flag: FailoverFlag?, hasEnded: Bool = false,
        _ answer: @escaping (RemoteWord?) -> Void
    ) {
        if let flag { failovers.heard(flag, of: asker, hasEnded: hasEnded, now: world.now) }
        let underWay = failovers.own
        let say: (Testimony?) -> Void = { [unowned self] in
            answer(RemoteWord(pairs: [RemoteStand(pairName, record, $0)], underWay: underWay))
        }
        guard let number, record.coordination != nil || record.role == .secondary else { return say(nil) }
        run(RemotePart(.question(number), keep: world.mix.keep)) { [unowned self] result in
            guard let testimony = try? result.get().testimony else { return answer(nil) }
            world.count("a remote testifies \(testimony)")
            say(testimony)
        }
    }

    /// A failover of all goes to no point that somebody who answers has not.
    private func checkEverybodyHas(_ point: UInt64) {
        for (name, heard) in lastHeard {
            guard case .says(let word) = heard else { continue }
            for stand in word.pairs
            where stand.failedOver != point && stand.prepared != point && !stand.points.contains(point) {
                world.fail("\(self.name) leads all to point \(point), which \(name) has not")
            }
        }
    }

    // MARK: What they come to

    private func settle(_ settlement: Settlement, _ done: @escaping (FailoverAnswer) -> Void) {
        let (number, forward) = (settlement.point, settlement.forward)
        world.count("a doubt is settled, \(forward ? "forward" : "back")")
        world.note("\(name) settles point \(number): \(forward ? "it counts" : "it is dropped")")
        let input = RemotePart.Input.decided(number, forward: forward, alone: settlement.reason == .chosen)
        run(RemotePart(input, keep: world.mix.keep)) {
            if case .failure(let error) = $0 { done(.failed(error)) } else { done(.done) }
        }
    }

    private func takeOver(_ wanted: PairTakeover, _ done: @escaping (FailoverAnswer) -> Void) {
        enter { [unowned self] leave in
            let end: (FailoverAnswer) -> Void = {
                leave()
                done($0)
            }
            if let failover = record.failedOver {
                guard failover.point != wanted.point else { return end(.done) }
                return end(.failed(SimulationFailure("it has failed over to \(failover.point) already")))
            }
            if let newest = wanted.ifNewestIs, record.isOvertaken(since: newest), fault != .failOverOvertaken {
                return end(.overtaken)
            }
            do throws(TakeoverRefusal) {
                let point = try record.failoverPoint(wanted.point)
                let takeover = Takeover(
                    point: point.number, volumes: Self.names, generation: "\(name) \(world.steps)", at: 0, joins: false)
                carryOut(Failover(takeover)) { (result: Result<UInt64, any Error>) in
                    if case .failure(let error) = result { end(.failed(error)) } else { end(.done) }
                }
            } catch {
                end(.failed(error))
            }
        }
    }

    private func lead(
        _ other: SeveralRemote, _ target: FailoverTarget, _ committed: UInt64,
        _ done: @escaping (FailoverAnswer) -> Void
    ) {
        world.call(self, other) { [unowned self] in
            other.follow(self, target, committed: committed, $0)
        } done: { (answer: String?) in
            done(answer == "done" ? .done : .failed(SimulationFailure(answer ?? "no answer")))
        }
    }
}
