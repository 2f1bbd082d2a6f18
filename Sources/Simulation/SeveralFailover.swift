// SeveralFailover.swift: a failover of all remotes in the scenario `SeveralHosts`, as Sources/Site/Coordination.swift does it: what the others say,
// the doubt, the same point everywhere. Whoever changes that changes this.
//
// Must be prevented:
//   the model waits where production does not, or the other way round: a question of another remote, or the coordinator's, comes in between

import Groups

/// What a remote says to another one that fails over.
struct SeveralTestimony {
    var testimony: Testimony?
    var failedOver: UInt64?
    var prepared: UInt64?
    var points: [UInt64]
}

extension SeveralRemote {
    /// As it knows them.
    private var fellows: [SeveralRemote] {
        let known = (record.coordination?.places ?? []).map(\.remote)
        return world.remotes.filter { $0 !== self && (world.mix.knowsFellows || known.contains($0.name)) }
    }

    var newestCommitted: UInt64 { record.points.last { $0.isBase != true }?.number ?? 0 }

    /// - Parameters:
    ///   - alone: the others are not asked, and not led, and this is the point.
    ///   - done: why it has not; nil = it has.
    func failOver(alone: UInt64?, attempt: Int = 1, done: @escaping (String?) -> Void) {
        let others = alone == nil ? fellows : []
        // What the others say is of after that.
        let newest = record.newestReadable?.number ?? 0
        ask(others, about: nil) { [unowned self] stands in
            // Where another has failed over, this one goes to the same point, and nobody is asked any more.
            let wanted = alone ?? stands.compactMap { $0?.failedOver }.first
            settleDoubt(others, chosen: wanted) { [unowned self] problem in
                if let problem { return done(problem) }
                guard newest == record.newestReadable?.number ?? 0 else {
                    guard attempt < 20 else { return done(Self.overtaken) }
                    return failOver(alone: alone, attempt: attempt + 1, done: done)
                }
                let point = wanted ?? record.failedOver?.point ?? newestEverywhere(newest, stands)
                guard point > 0 else { return done("there is no recovery point yet") }
                guard alone != nil || !lacks(point, stands) else { return done("another has no point \(point)") }
                takeOver(point, ifNewestIs: wanted == nil ? newest : nil) { [unowned self] problem in
                    if problem == Self.overtaken, attempt < 20 {
                        return failOver(alone: alone, attempt: attempt + 1, done: done)
                    }
                    if let problem { return done(problem) }
                    lead(others, to: point, committed: newestCommitted)
                    done(nil)
                }
            }
        }
    }

    private static let overtaken = "points are still being committed"

    /// A remote that answers does not have it.
    private func lacks(_ point: UInt64, _ stands: [SeveralTestimony?]) -> Bool {
        stands.compactMap { $0 }.contains {
            $0.failedOver != point && $0.prepared != point && !$0.points.contains(point)
        }
    }

    private func newestEverywhere(_ newest: UInt64, _ stands: [SeveralTestimony?]) -> UInt64 {
        guard lacks(newest, stands) else { return newest }
        return record.points.map(\.number).filter { !lacks($0, stands) }.max() ?? newest
    }

    /// - Parameter done: is given each one's answer; nil for one that does not.
    private func ask(
        _ others: [SeveralRemote], about number: UInt64?, done: @escaping ([SeveralTestimony?]) -> Void
    ) {
        guard !others.isEmpty else { return done([]) }
        var (left, found) = (others.count, Array(repeating: SeveralTestimony?.none, count: others.count))
        for (place, other) in others.enumerated() {
            world.call(self, other) {
                other.testify(number, $0)
            } done: { (answer: SeveralTestimony?) in
                found[place] = answer
                left -= 1
                if left == 0 { done(found) }
            }
        }
    }

    func testify(_ number: UInt64?, _ answer: @escaping (SeveralTestimony?) -> Void) {
        guard let number, record.coordination != nil || record.role == .secondary else { return answer(stand(nil)) }
        question(number) { [unowned self] reply in
            guard let reply else { return answer(nil) }
            if let testimony = reply.testimony { world.count("a remote testifies \(testimony)") }
            answer(stand(reply.testimony))
        }
    }

    private func stand(_ testimony: Testimony?) -> SeveralTestimony {
        SeveralTestimony(
            testimony: testimony, failedOver: record.failedOver?.point,
            prepared: record.coordination?.prepared?.number, points: record.points.map(\.number))
    }

    private func question(_ number: UInt64, _ done: @escaping (RemoteReply?) -> Void) {
        run(RemotePart(.question(number), keep: world.mix.keep)) { done(try? $0.get()) }
    }

    // MARK: Doubt

    private func settleDoubt(_ others: [SeveralRemote], chosen: UInt64?, done: @escaping (String?) -> Void) {
        guard let number = record.coordination?.prepared?.number else { return done(nil) }
        if let chosen {
            // Nobody relies on what an operator has chosen.
            guard take(.remotePart(RemotePartChange(record: record.twoPhase(), plan: nil, inDoubt: number))) else {
                return done("its record cannot be written")
            }
            return settle(number, forward: chosen == number, done)
        }
        // Its own promise comes first.
        question(number) { [unowned self] reply in
            guard reply != nil else { return done("its record cannot be written") }
            if fault == .failOverUnsettled { return settle(number, forward: false, done) }
            ask(others, about: number) { [unowned self] answers in
                let testimonies = answers.compactMap { $0?.testimony }
                if testimonies.contains(.committed) { return settle(number, forward: true, done) }
                if !testimonies.contains(.refuses(prepared: false)), answers.contains(where: { $0 == nil }) {
                    world.count("a doubt stays")
                    return done("point \(number) is in doubt")
                }
                settle(number, forward: false, done)
            }
        }
    }

    private func settle(_ number: UInt64, forward: Bool, _ done: @escaping (String?) -> Void) {
        world.count("a doubt is settled, \(forward ? "forward" : "back")")
        world.note("\(name) settles point \(number): \(forward ? "it counts" : "it is dropped")")
        let epoch = record.coordination?.epoch ?? 0
        let request: RemoteRequest = forward ? .commit(number, others: true) : .drop(number)
        run(RemotePart(.request(Stamped(epoch: epoch, request), formedAt: 0, places: nil), keep: world.mix.keep)) {
            if case .failure(let error) = $0 { done("\(error)") } else { done(nil) }
        }
    }

    // MARK: Taking over

    /// - Parameter newest: nothing newer is there, or prepared; nil = whatever is.
    private func takeOver(_ point: UInt64, ifNewestIs newest: UInt64? = nil, done: @escaping (String?) -> Void) {
        enter { [unowned self] leave in
            if let failover = record.failedOver {
                leave()
                return done(failover.point == point ? nil : "it has failed over to \(failover.point) already")
            }
            let isOvertaken = record.coordination?.prepared != nil || record.newestReadable?.number ?? 0 != newest
            if newest != nil, isOvertaken, fault != .failOverOvertaken {
                leave()
                return done(Self.overtaken)
            }
            do throws(TakeoverRefusal) {
                let point = try record.failoverPoint(point)
                let takeover = Takeover(
                    point: point.number, volumes: Self.names, generation: "\(name) \(world.steps)", at: 0, joins: false)
                carryOut(Failover(takeover)) { result in
                    leave()
                    if case .failure(let error) = result { done("\(error)") } else { done(nil) }
                }
            } catch {
                leave()
                done("\(error)")
            }
        }
    }

    private func lead(_ others: [SeveralRemote], to point: UInt64, committed: UInt64) {
        guard let next = others.first else { return }
        world.call(self, next) { [unowned self] in
            next.follow(self, to: point, committed: committed, $0)
        } done: { [unowned self] (_: String?) in
            lead(Array(others.dropFirst()), to: point, committed: committed)
        }
    }

    private func follow(
        _ leader: SeveralRemote, to point: UInt64, committed: UInt64, _ answer: @escaping (String?) -> Void
    ) {
        // A call that was held up must not lead anybody when nobody waits for that any more.
        ask([leader], about: nil) { [unowned self] stands in
            guard stands[0]?.failedOver == point else { return answer("it does not say so") }
            guard record.failedOver == nil else { return answer("it has already") }
            let goOn: (String?) -> Void = { [unowned self] problem in
                if problem != nil { return answer(problem) }
                takeOver(point) { answer($0 ?? "done") }
            }
            guard let number = record.coordination?.prepared?.number else { return goOn(nil) }
            settle(number, forward: number <= committed, goOn)
        }
    }
}
