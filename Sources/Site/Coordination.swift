// Coordination.swift: what a site does when another of a group with several hosts or remotes asks, and a failover of all remotes.
//
// Must be prevented:
//   remotes fail over to different points, unless an operator says so
//   a remote decides alone about a point that it has prepared
//   two failovers, at two remotes, wait for each other

import API
import Base
import Groups
import Ring
import SiteConfiguration

@SiteThread
package final class Coordination {
    private let home: Holdings
    private let steps: StepExecutor
    private let intake: Intake
    private let peers: Peers
    private let replication: Replication
    private let practices: Practice

    init(
        _ home: Holdings, _ steps: StepExecutor, _ intake: Intake, _ peers: Peers, _ replication: Replication,
        _ practices: Practice
    ) {
        self.practices = practices
        (self.home, self.steps, self.intake, self.peers, self.replication) = (home, steps, intake, peers, replication)
    }

    // MARK: A host

    /// The pair that a coordinator at another site asks.
    private func host(_ name: String, _ pair: String, askedBy site: String) throws -> GroupState {
        let group = try self.pair(name, pair)
        let several = group.entry.several
        let isNamed = several?.hosts.isEmpty == false && several?.master != Configuration.SeveralEntry.etcd
        guard isNamed ? several?.master == site : group.fellows.contains(site) else {
            throw Refusal(
                "'\(site)' does not coordinate group '\(name)', as '\(home.configuration.site)' knows it", .refused)
        }
        return group
    }

    package func survey(_ name: String, _ call: SurveyCall) async throws -> HostStanding {
        let group = try host(name, call.pair, askedBy: call.site)
        return HostStanding(survey: await group.handle.survey(), peer: group.entry.peer)
    }

    package func askHost(_ name: String, _ call: HostCall) async throws -> HostReply {
        let group = try host(name, call.pair, askedBy: call.site)
        if let places = call.places, places != group.record.coordination?.places,
            places.count <= Coordinator.Settings.members.upperBound
        {
            try await group.handle.change(.places(places))
        }
        return HostReply(answer: await group.handle.asked(call.message, waits: call.waits))
    }

    // MARK: The whole group

    /// A pair at another site waits for the others here.
    package func meet(_ name: String, _ call: MeetCall) async throws {
        let pairs = try home.pairs(name)
        guard home.fellows(pairs).contains(call.site), let all = pairs[0].pairNames, (0...3).contains(call.place) else {
            throw Refusal(
                "'\(call.site)' is no other site of group '\(name)' at '\(home.configuration.site)'", .refused)
        }
        try await home.meetings.meet(name, call.pair, place: call.place, all: all)
    }

    /// Suspends mirroring at all sites that mirror the group, or takes it up again.
    ///
    /// - Parameter isLed: another site has asked, and asks the others itself.
    /// - Returns: sites that could not be told.
    package func setSuspended(
        _ name: String, _ isSuspended: Bool, fromImage: Bool = false, isLed: Bool
    ) async throws -> [String] {
        if isSuspended {
            try replication.suspend(name)
        } else {
            try await replication.resume(name, fromImage: fromImage)
        }
        guard !isLed else { return [] }
        var missed: [String] = []
        for (fellow, client) in home.clients(home.fellows(try home.pairs(name))) {
            do {
                if isSuspended {
                    _ = try await client.call(Endpoints.suspend, name, [.led: "true"])
                } else {
                    _ = try await client.call(
                        Endpoints.resume, name, [.led: "true", .fromImage: fromImage ? "true" : "false"])
                }
            } catch {
                missed.append("'\(fellow)' (\(error))")
            }
        }
        return missed
    }

    /// A writable copy of one point, at all remotes.
    package func practice(_ name: String, point wanted: String?, isLed: Bool) async throws -> [FlashCopyReport] {
        let pairs = try home.pairs(name).filter { !$0.entry.volumes.isEmpty }
        guard try home.isOfSeveral(name) else {
            return try await practices.practice(name, point: wanted)
        }
        let others = isLed ? [] : home.fellows(pairs)
        let point = try await practicePoint(name, pairs, wanted, others)
        var reports: [FlashCopyReport] = []
        do {
            for pair in pairs { reports += try await practices.practice(pair.entry.name, point: point) }
            for (other, client) in home.clients(others) {
                do {
                    reports += try await client.call(Endpoints.practice, name, [.point: point, .led: "true"])
                } catch {
                    throw Refusal("'\(other)': \(error)", (error as? Refusal)?.kind ?? .passing)
                }
            }
        } catch {
            // One moment everywhere, or none.
            try? await endPractice(name, isLed: isLed)
            throw error
        }
        return reports
    }

    /// The newest that all remotes have.
    private func practicePoint(
        _ name: String, _ pairs: [GroupState], _ wanted: String?, _ others: [String]
    ) async throws -> String {
        if let wanted { return wanted }
        let stands = await ask(others, name, about: nil)
        if let silent = stands.filter({ $0.value == nil }).keys.min() {
            throw Refusal(
                "group '\(name)': '\(silent)' cannot be reached, so that no point is known to be there as well",
                .passing)
        }
        let here = pairs.map { $0.record.newestReadable?.number ?? 0 }
        let there = stands.values.flatMap { $0?.pairs ?? [] }.map(\.committed)
        guard let point = (here + there).min(), point > 0 else {
            throw Refusal("group '\(name)' has no recovery point yet that all remotes have")
        }
        return String(point)
    }

    package func endPractice(_ name: String, isLed: Bool) async throws {
        let pairs = try home.pairs(name).filter { !$0.entry.volumes.isEmpty }
        guard try home.isOfSeveral(name) else { return try await practices.endPractice(name) }
        var refusal: Refusal?
        for pair in pairs {
            do { try await practices.endPractice(pair.entry.name) } catch let error as Refusal { refusal = error }
        }
        for (other, client) in home.clients(isLed ? [] : home.fellows(pairs)) {
            do {
                _ = try await client.call(Endpoints.endPractice, name, [.led: "true"]) as Done
            } catch {
                refusal = Refusal("'\(other)': \(error)", (error as? Refusal)?.kind ?? .passing)
            }
        }
        if let refusal { throw refusal }
    }

    // MARK: A remote

    package func askRemote(_ name: String, _ call: RemoteCall) async throws -> RemoteReply {
        guard call.to == home.configuration.site else { return try await passOn(name, call) }
        let group = try pair(name, call.pair)
        let number = call.message.request.body.number
        guard call.places.contains(where: { $0.host == call.pair && [$0.host, $0.remote].contains(call.to) }),
            call.places.contains(where: { [$0.host, $0.remote].contains(call.site) })
        else {
            throw Refusal("'\(call.site)' does not coordinate a group with '\(call.pair)' at '\(call.to)'", .refused)
        }
        guard number <= PointRecord.highestNumber, call.message.request.epoch <= PointRecord.highestNumber,
            (0...PointRecord.latestTime).contains(call.message.formedAt ?? 0),
            call.places.count <= Coordinator.Settings.members.upperBound
        else { throw Refusal("point \(number) cannot be", .refused) }
        let input = RemotePart.Input.request(
            call.message.request, formedAt: call.message.formedAt ?? realSeconds(), places: call.places,
            without: call.without, copy: call.message.copy)
        do {
            return try await run(input, group)
        } catch let refusal as TakeoverRefusal {
            throw Refusal("group '\(group.entry.name)': \(refusal)", .refused)
        }
    }

    /// The coordinator's site does not know the remote; this one, which mirrors to it, does.
    private func passOn(_ name: String, _ call: RemoteCall) async throws -> RemoteReply {
        let group = try host(name, call.pair, askedBy: call.site)
        guard group.entry.peer == call.to else {
            throw Refusal("'\(call.to)' is not the peer of '\(home.configuration.site)' in group '\(name)'", .refused)
        }
        return try await peers.callPeer(group, Endpoints.askRemote, body: call)
    }

    private func pair(_ name: String, _ pair: String) throws -> GroupState {
        guard let group = try home.pairs(name).first(where: { $0.entry.several?.pair == pair }) else {
            throw Refusal(
                "group '\(name)' at '\(home.configuration.site)' has no volumes of '\(pair)', or no other hosts or remotes",
                .refused)
        }
        return group
    }

    private func run(_ input: RemotePart.Input, _ group: GroupState) async throws -> RemoteReply {
        await group.turnstile.enter()
        defer { group.turnstile.leave() }
        return try await steps.run(RemotePart(input, keep: group.entry.keep, session: group.session), group)
    }

    /// Decides about a point that is prepared here when whoever coordinates is gone for good: as a failover would, and goes on as a remote.
    ///
    /// - Returns: nil where none is.
    package func decidePrepared(_ name: String) async throws -> String? {
        let pairs = try home.pairs(name)
        let numbers = pairs.filter { $0.record.role == .secondary }.compactMap {
            $0.record.coordination?.prepared?.number
        }
        guard let number = numbers.max() else { return nil }
        try await settleDoubt(name, pairs, home.fellows(pairs), chosen: nil)
        return "point \(number) is decided; `farcopy events \(name)` says how"
    }

    // MARK: Another remote asks

    package func testify(_ name: String, _ call: TestimonyCall) async throws -> TestimonyReply {
        let site = home.configuration.site
        guard home.fellows(try home.pairs(name)).contains(call.site), call.number ?? 0 <= PointRecord.highestNumber
        else {
            throw Refusal("'\(call.site)' is no other remote of group '\(name)' at '\(site)'", .refused)
        }
        var pairs: [TestimonyReply.Pair] = []
        for group in try home.pairs(name) {
            var testimony: Testimony?
            if let number = call.number, group.record.coordination != nil || group.record.role == .secondary {
                testimony = try await run(.question(number), group).testimony
            }
            pairs.append(stand(group, testimony))
        }
        return TestimonyReply(pairs: pairs)
    }

    private func stand(_ group: GroupState, _ testimony: Testimony?) -> TestimonyReply.Pair {
        TestimonyReply.Pair(
            pair: group.entry.several?.pair ?? group.entry.peer, testimony: testimony,
            committed: group.record.points.last { $0.isBase != true }?.number ?? 0,
            prepared: group.record.coordination?.prepared?.number, failedOver: group.record.failedOver?.point,
            without: group.record.newestReadable?.without,
            points: group.record.readablePoints.map(\.number))
    }

    // MARK: Failover

    /// Leads all remotes of the group to one point.
    ///
    /// - Parameters:
    ///   - wanted: nil = the newest that counts.
    ///   - alone: the others are not asked, and not led.
    package func failover(_ name: String, point wanted: UInt64?, alone: Bool) async throws -> FailoverReport {
        let pairs = try home.pairs(name)
        guard try home.isOfSeveral(name) else {
            guard !alone else {
                throw Refusal("group '\(name)' has one remote: `farcopy failover \(name) --point N`", .misuse)
            }
            return try await intake.failover(name, point: wanted)
        }
        if alone { try checkAlone(name, pairs, wanted) }
        let asked = wanted
        let others = alone ? [] : home.fellows(pairs)
        var (report, target) = (FailoverReport?.none, Target(point: 0, without: []))
        for attempt in 1... {
            // What the others say is of after that: whoever has a newer point then, or takes part in it, says so.
            let seen = pairs.map { $0.record.newestReadable?.number ?? 0 }
            let stands = await ask(others, name, about: nil)
            let agreed = try agree(name, wanted, stands)
            // An operator has chosen, here or at a remote that has failed over: what it is about is not asked any more.
            let chosen = alone || agreed != wanted ? agreed : nil
            try await settleDoubt(name, pairs, others, chosen: chosen)
            let wanted = agreed
            guard seen == pairs.map({ $0.record.newestReadable?.number ?? 0 }) else {
                guard attempt < Self.failoverAttempts else { throw OvertakenFailover() }
                continue
            }
            target = try self.target(name, pairs, wanted, stands)
            if !alone { try checkOlder(name, target, asked: asked, stands) }
            try checkAll(pairs, target)
            do {
                for (group, newest) in zip(pairs, seen) {
                    report = try await failOver(group, target, ifNewestIs: wanted == nil ? newest : nil) ?? report
                }
                break
            } catch is OvertakenFailover where attempt < Self.failoverAttempts {
                // A point was prepared, or committed, since: whether it counts is looked at anew.
            }
        }
        guard var report else { throw Refusal("group '\(name)' has no volumes at '\(home.configuration.site)' yet") }
        report.behind = await lead(others, name, target, committed: newestCommitted(pairs))
        return report
    }

    /// Before anything is decided: a slip must not drop a point that is in doubt.
    private func checkAlone(_ name: String, _ pairs: [GroupState], _ wanted: UInt64?) throws {
        guard let wanted else { throw Refusal("say which point: --alone POINT", .misuse) }
        for group in pairs where !group.entry.volumes.isEmpty && group.record.failedOver == nil {
            let prepared = group.record.coordination?.prepared?.number
            guard wanted != prepared else { continue }
            do { _ = try group.record.failoverPoint(wanted) } catch {
                let words = prepared.map { "; and point \($0), which is in doubt" } ?? ""
                throw Refusal("group '\(name)' at '\(home.configuration.site)': \(error)\(words)")
            }
        }
    }

    private func newestCommitted(_ pairs: [GroupState]) -> UInt64 {
        pairs.compactMap { $0.record.points.last { $0.isBase != true }?.number }.max() ?? 0
    }

    /// - Returns: what each remote that answers says; nil for one that does not.
    private func ask(_ remotes: [String], _ name: String, about number: UInt64?) async -> [String: TestimonyReply?] {
        let call = TestimonyCall(site: home.configuration.site, number: number)
        let clients = home.clients(remotes)
        return await withTaskGroup(of: (String, TestimonyReply?).self) { tasks in
            for (remote, client) in clients {
                tasks.addTask {
                    let reply: TestimonyReply? = try? await client.call(
                        Endpoints.testify, name, body: call, seconds: Self.testimonySeconds)
                    return (remote, reply)
                }
            }
            var found: [String: TestimonyReply?] = Dictionary(uniqueKeysWithValues: remotes.map { ($0, nil) })
            for await (remote, reply) in tasks { found[remote] = reply }
            return found
        }
    }

    private static let testimonySeconds: Int64 = 5
    private static let failoverAttempts = 20

    /// Where another remote has failed over already, this one goes to the same point.
    private func agree(
        _ name: String, _ wanted: UInt64?, _ stands: [String: TestimonyReply?]
    ) throws -> UInt64? {
        for (remote, reply) in stands {
            // A pair that was left out has gone to an older one.
            let over = (reply?.pairs ?? []).filter { pair in
                guard let point = pair.failedOver else { return false }
                return !isLeftOut(pair.pair, of: points(after: point, name))
            }
            guard let point = over.compactMap(\.failedOver).max() else { continue }
            guard wanted == nil || wanted == point else {
                throw Refusal(
                    "group '\(name)': '\(remote)' has failed over to point \(point); point \(wanted!) here would not match it. "
                        + "`farcopy failover \(name) --alone \(wanted!)` does it all the same")
            }
            return point
        }
        return wanted
    }

    private func points(after number: UInt64, _ name: String) -> [PointRecord] {
        ((try? home.pairs(name)) ?? []).flatMap { $0.record.points }.filter { $0.number > number }
    }

    private func isLeftOut(_ pair: String, of points: [PointRecord]) -> Bool {
        points.contains { $0.without?.contains(pair) == true }
    }

    /// Of every pair that has prepared a point, whether that counts.
    private func settleDoubt(_ name: String, _ pairs: [GroupState], _ others: [String], chosen: UInt64?) async throws {
        for group in pairs {
            guard let number = group.record.coordination?.prepared?.number else { continue }
            if let chosen {
                try await noteDoubt(group, number)
                try await settle(group, number, forward: chosen == number, "as was chosen")
                continue
            }
            // Its own promise comes first.
            _ = try await run(.question(number), group)
            let isForward = try await isCommitted(number, name, pairs.filter { $0 !== group }, others)
            try await settle(
                group, number, forward: isForward,
                isForward ? "another remote has committed it" : "nobody has committed it")
        }
    }

    /// Nobody relies on what an operator has chosen.
    private func noteDoubt(_ group: GroupState, _ number: UInt64) async throws {
        try await group.handle.change(
            .remotePart(RemotePartChange(record: group.record.twoPhase(), plan: nil, inDoubt: number)))
    }

    private func isCommitted(
        _ number: UInt64, _ name: String, _ local: [GroupState], _ others: [String]
    ) async throws -> Bool {
        var testimonies: [Testimony] = []
        for group in local { testimonies += [try await run(.question(number), group).testimony].compactMap { $0 } }
        let replies = await ask(others, name, about: number)
        for reply in replies.values { testimonies += reply?.pairs.compactMap(\.testimony) ?? [] }
        if testimonies.contains(.committed) { return true }
        if testimonies.contains(.refuses(prepared: false)) { return false }
        let silent = replies.filter { $0.value == nil }.keys.sorted()
        guard silent.isEmpty else {
            let names = silent.map { "'\($0)'" }.joined(separator: ", ")
            let committed = newestCommitted(try home.pairs(name))
            throw Refusal(
                "group '\(name)': point \(number) is in doubt: it is prepared here, and \(names), which may have committed it, cannot "
                    + "be reached. Bring \(names) back and try again; or choose: `farcopy failover \(name) --alone \(number)` takes "
                    + "it, `--alone \(committed)` drops it. If \(names) went the other way, what is there does not match what is here"
            )
        }
        return false
    }

    private func settle(_ group: GroupState, _ number: UInt64, forward: Bool, _ reason: String) async throws {
        let epoch = group.record.coordination?.epoch ?? 0
        let request: RemoteRequest = forward ? .commit(number, others: true) : .drop(number)
        _ = try await run(.request(Stamped(epoch: epoch, request), formedAt: 0, places: nil), group)
        home.note(group.entry.name, "point \(number) \(forward ? "counts" : "is dropped"): \(reason)")
    }

    /// The point that a group fails over to, and the pairs that have no part in it.
    private struct Target {
        var point: UInt64
        var without: [String]
    }

    /// The newest point that all pairs here have but those that were left out.
    private func target(
        _ name: String, _ pairs: [GroupState], _ wanted: UInt64?, _ stands: [String: TestimonyReply?]
    ) throws -> Target {
        let pairs = pairs.filter { !$0.entry.volumes.isEmpty }
        func newest(_ group: GroupState) -> UInt64 {
            group.record.failedOver?.point ?? group.record.newestReadable?.number ?? 0
        }
        let others = stands.values.flatMap { $0?.pairs ?? [] }.map { ($0.committed, $0.without ?? []) }
        let points = pairs.flatMap { $0.record.points.map { ($0.number, $0.without ?? []) } } + others
        let last = points.max { $0.0 < $1.0 } ?? (0, [])
        let without = points.first { $0.0 == wanted }?.1 ?? last.1
        let taking = pairs.filter { !without.contains($0.entry.several?.pair ?? "") }
        let newestHere = taking.isEmpty ? last.0 : taking.map(newest).min() ?? 0
        let point = try wanted ?? newestEverywhere(newestHere, taking, without, stands)
        if let lack = lack(of: point, without, stands) {
            throw Refusal(
                "group '\(name)': \(lack), so that not all remotes can go to point \(point); nothing has changed. "
                    + "`farcopy failover \(name) --alone \(point)` goes there all the same")
        }
        guard point > 0 else {
            throw Refusal(
                "group '\(name)' at '\(home.configuration.site)' has no recovery point yet: its first copy is not complete"
            )
        }
        return Target(point: point, without: without)
    }

    /// A remote that answers, takes part in the point, and does not have it.
    private func lack(of point: UInt64, _ without: [String], _ stands: [String: TestimonyReply?]) -> String? {
        for (remote, reply) in stands.sorted(by: { $0.key < $1.key }) {
            for pair in reply?.pairs ?? [] where !without.contains(pair.pair) {
                // Prepared there, it counts once it does here; failed over, it is there already.
                guard pair.failedOver != point, pair.prepared != point, !pair.points.contains(point) else { continue }
                let known = pair.points.isEmpty ? "none" : pair.points.map(String.init).joined(separator: ", ")
                return "'\(remote)' has no point \(point) of '\(pair.pair)'; it has \(known)"
            }
        }
        return nil
    }

    private func newestEverywhere(
        _ newest: UInt64, _ taking: [GroupState], _ without: [String], _ stands: [String: TestimonyReply?]
    ) throws -> UInt64 {
        guard let first = taking.first, first.record.failedOver == nil, lack(of: newest, without, stands) != nil else {
            return newest
        }
        let readable = taking.map { Set($0.record.readablePoints.map(\.number)) }
        let common = readable.dropFirst().reduce(readable[0]) { $0.intersection($1) }
        return common.filter { lack(of: $0, without, stands) == nil }.max() ?? newest
    }

    /// One that the operator names may be older than what a remote that does not answer would go to by itself.
    private func checkOlder(
        _ name: String, _ target: Target, asked: UInt64?, _ stands: [String: TestimonyReply?]
    ) throws {
        guard let asked, let silent = stands.filter({ $0.value == nil }).keys.min() else { return }
        throw Refusal(
            "group '\(name)': '\(silent)' cannot be reached, and would go to its newest point by itself, not to point \(asked); bring it "
                + "back, or `farcopy failover \(name) --alone \(asked)`", .passing)
    }

    /// Before the first of them fails over.
    private func checkAll(_ pairs: [GroupState], _ target: Target) throws {
        for group in pairs
        where !group.entry.volumes.isEmpty && group.record.failedOver == nil && !isEmpty(group, target) {
            do { _ = try group.record.failoverPoint(point(of: group, target)) } catch {
                throw Refusal(
                    "group '\(group.entry.group)' at '\(home.configuration.site)', volumes of '\(group.entry.peer)': \(error)"
                )
            }
        }
    }

    /// Left out before its first copy was complete: there is nothing to fail over to.
    private func isEmpty(_ group: GroupState, _ target: Target) -> Bool {
        group.record.newestReadable == nil && target.without.contains(group.entry.several?.pair ?? "")
    }

    /// - Parameter newest: nothing newer is there, or prepared, and from then on never is: so no other remote can commit it.
    private func failOver(
        _ group: GroupState, _ target: Target, ifNewestIs newest: UInt64?
    ) async throws -> FailoverReport? {
        guard !group.entry.volumes.isEmpty else { return nil }
        guard group.record.failedOver != nil || !isEmpty(group, target) else {
            home.note(group.entry.name, "has no recovery point, and stays as it is")
            return nil
        }
        return try await intake.failover(group, point: point(of: group, target), ifNewestIs: newest)
    }

    /// One that was left out goes to its newest point.
    private func point(of group: GroupState, _ target: Target) -> UInt64 {
        let pair = group.entry.several?.pair ?? ""
        let own = group.record.readablePoints.last { $0.number <= target.point }?.number
        guard target.without.contains(pair), group.record.failedOver == nil, let own, own < target.point else {
            return group.record.failedOver.flatMap { target.without.contains(pair) ? $0.point : nil } ?? target.point
        }
        home.note(
            group.entry.name,
            "its volumes are behind: '\(pair)' was lost when point \(target.point) was formed; they go to point \(own)")
        return own
    }

    /// - Returns: remotes that have not followed, and why.
    private func lead(_ others: [String], _ name: String, _ target: Target, committed: UInt64) async -> [String] {
        var behind: [String] = []
        for remote in others {
            guard let address = home.configuration.peers[remote]?.control else {
                behind.append(
                    "'\(remote)' was not led: there is no [peers.\(remote)]; `farcopy failover \(name)` there goes to point \(target.point) as well"
                )
                continue
            }
            do {
                let call = LeadCall(
                    site: home.configuration.site, point: target.point, committed: committed, without: target.without)
                _ = try await ControlClient(address: address).call(Endpoints.lead, name, body: call) as Done
            } catch {
                behind.append(
                    "'\(remote)' has not followed (\(error)); `farcopy failover \(name)` there goes to point \(target.point) as well"
                )
            }
        }
        return behind
    }

    /// Another remote has failed over, and leads this one to the same point.
    package func follow(_ name: String, _ call: LeadCall) async throws {
        let pairs = try home.pairs(name)
        guard home.fellows(pairs).contains(call.site) else {
            throw Refusal(
                "'\(call.site)' is no other remote of group '\(name)' at '\(home.configuration.site)'", .refused)
        }
        // A call that was held up must not lead anybody when nobody waits for that any more.
        let leader = await ask([call.site], name, about: nil)[call.site] ?? nil
        guard leader?.pairs.contains(where: { $0.failedOver == call.point || call.without.contains($0.pair) }) == true
        else {
            throw Refusal("'\(call.site)' does not say that it has failed over to point \(call.point)", .refused)
        }
        let target = Target(point: call.point, without: call.without)
        for group in pairs where !group.entry.volumes.isEmpty {
            if let done = group.record.failedOver?.point {
                guard done == point(of: group, target) else {
                    throw Refusal(
                        "group '\(name)' at '\(home.configuration.site)' has failed over to point \(done) already",
                        .refused)
                }
                continue
            }
            if let number = group.record.coordination?.prepared?.number {
                try await settle(group, number, forward: number <= call.committed, "as '\(call.site)' says")
            }
            _ = try await intake.failover(group, point: point(of: group, target))
            home.note(group.entry.name, "'\(call.site)' leads the group to point \(call.point)")
        }
    }
}
