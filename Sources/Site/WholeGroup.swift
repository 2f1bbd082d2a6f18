// WholeGroup.swift: what is done for all pairs of a group with several hosts. When they exchange roles, all wait for each other where it
// matters (`SiteAction.meet`).
//
// Must be prevented:
//   a pair's changes are discarded by a command that did not name the site, or before it is known that every name in it is one
//   some of the hosts are shut out at their last point, and others write on after theirs: the last point is formed once all are shut out

import API
import Base
import FoundationEssentials
import Groups

extension Holdings {
    /// Does the same for every pair here and, unless another site has asked and does so itself, at all sites that have what this one has.
    func everywhere<Outcome: Sendable>(
        _ name: String, isLed: Bool, _ own: @escaping @Sendable (String) async throws -> Outcome,
        other: @escaping @Sendable (ControlClient) async throws -> Outcome
    ) async throws -> [Outcome] {
        let pairs = try pairs(name).filter { !$0.entry.volumes.isEmpty }
        let clients = clients(isLed ? [] : fellows(pairs))
        let names = pairs.map(\.entry.name)
        let before = pairs.map(\.operation)
        return try await withThrowingTaskGroup(of: Outcome.self) { tasks in
            for name in names { tasks.addTask { try await own(name) } }
            for (fellow, client) in clients {
                tasks.addTask {
                    do { return try await other(client) } catch {
                        throw Refusal("'\(fellow)': \(error)", (error as? Refusal)?.kind ?? .passing)
                    }
                }
            }
            var outcomes: [Outcome] = []
            do {
                for try await outcome in tasks { outcomes.append(outcome) }
            } catch {
                // The others wait for who does not come; what was under way before is nobody's business here.
                for (pair, earlier) in zip(pairs, before) where pair.operation !== earlier { pair.operation?.abort() }
                happened()
                throw error
            }
            return outcomes
        }
    }
}

extension Roles {
    package func switchover(_ name: String, isLed: Bool) async throws -> StatusReport.PointReport {
        guard try home.isOfSeveral(name) else { return try await switchover(name) }
        let points = try await home.everywhere(name, isLed: isLed) { [self] in
            try await switchover($0)
        } other: { client in
            try await client.call(Endpoints.switchover, name, [.led: "true"])
        }
        return points.min { $0.id < $1.id }!
    }

    /// One pair of several exchanges its roles, at a point of its own: after a switchover that a host's death has left half done.
    package func switchoverAlone(_ name: String) async throws -> StatusReport.PointReport {
        let pairs = try home.pairs(name)
        let group = try pairs.count == 1 ? pairs[0] : home.group(name)
        guard group.entry.several != nil else {
            throw Refusal("group '\(name)' has one host: `farcopy switchover \(name)`", .misuse)
        }
        guard group.isMirroring, group.replicator != nil else { throw Refusal(home.notMirroring(group)) }
        // A point under way that is coordinated here is ended first; one of another's is, as soon as that says so.
        await group.handle.setQuiet(true, seconds: Meetings.laterWait)
        try await mirror(group, alone: true)
        await home.wait(seconds: Meetings.laterWait) { group.replicator.map { $0.status.reason == nil } ?? true }
        do {
            let point = try await switchover(group.entry.name)
            group.actsAlone = false
            return point
        } catch {
            try? await mirror(group, alone: false)
            throw error
        }
    }

    private func mirror(_ group: GroupState, alone: Bool) async throws {
        _ = try await steps.perform(.stopMirroring, group)
        group.actsAlone = alone
        _ = try await steps.perform(.startMirroring, group)
    }

    package func failback(_ name: String, isLed: Bool) async throws -> StatusReport.PointReport {
        guard try home.isOfSeveral(name) else { return try await failback(name) }
        let points = try await home.everywhere(name, isLed: isLed) { [self] in
            try await failback($0)
        } other: { client in
            try await client.call(Endpoints.failback, name, [.led: "true"])
        }
        return points.min { $0.id < $1.id }!
    }

    package func previewFailback(_ name: String, isLed: Bool) async throws -> ResyncReport {
        guard try home.isOfSeveral(name) else { return try await previewFailback(name) }
        let reports = try await home.everywhere(name, isLed: isLed) { [self] in
            try await previewFailback($0)
        } other: { client in
            try await client.call(Endpoints.previewFailback, name, [.led: "true"])
        }
        return ResyncReport(reports)
    }

    /// - Parameter losers: sites whose changes are discarded: of every pair that one of them is of.
    package func resync(_ name: String, discard losers: [String], isLed: Bool) async throws -> ResyncReport {
        guard try isOfAll(name, losers, isLed: isLed) else { return try await resync(name, discard: losers[0]) }
        if let winner = try peerOfLoser(name, losers, isLed: isLed) {
            return try await peers.callPeer(winner, Endpoints.resync, [.discard: list(losers)], seconds: 600)
        }
        guard !isLed else { return try await resyncPairs(name, losers, isLed: true) }
        _ = try await previewResync(name, discard: losers, isLed: false)
        return try await resyncs.whileAnnounced(name, losers) { try await resyncPairs(name, losers, isLed: false) }
    }

    private func resyncPairs(_ name: String, _ losers: [String], isLed: Bool) async throws -> ResyncReport {
        let reports = try await home.everywhere(name, isLed: isLed) { [self] pair in
            guard let loser = try await loser(pair, losers) else { return try await report(pair, losers) }
            return try await resync(pair, discard: loser)
        } other: { [self] client in
            try await client.call(Endpoints.resync, name, [.discard: list(losers), .led: "true"])
        }
        return ResyncReport(reports)
    }

    /// What that would send and discard. Refused where a name is none of a site that stays, or becomes, a secondary.
    package func previewResync(_ name: String, discard losers: [String], isLed: Bool) async throws -> ResyncReport {
        guard try isOfAll(name, losers, isLed: isLed) else { return try await previewResync(name, discard: losers[0]) }
        if let winner = try peerOfLoser(name, losers, isLed: isLed) {
            return try await peers.callPeer(winner, Endpoints.previewResync, [.discard: list(losers)])
        }
        let reports = try await home.everywhere(name, isLed: isLed) { [self] pair in
            guard let loser = try await loser(pair, losers) else { return try await report(pair, losers) }
            return try await previewResync(pair, discard: loser)
        } other: { [self] client in
            try await client.call(Endpoints.previewResync, name, [.discard: list(losers), .led: "true"])
        }
        let all = ResyncReport(reports)
        let found = all.to.split(separator: ", ").map(String.init)
        if !isLed, let unknown = losers.first(where: { !found.contains($0) }) {
            throw Refusal(
                "group '\(name)' has no site '\(unknown)' on the other side of '\(home.configuration.site)'", .misuse)
        }
        return all
    }

    private func isOfAll(_ name: String, _ losers: [String], isLed: Bool) throws -> Bool {
        guard losers.count > 1 || isLed else { return false }
        guard try home.isOfSeveral(name) else {
            throw Refusal("group '\(name)' has two sites; name the one whose changes are discarded", .misuse)
        }
        return true
    }

    /// The sites that keep their changes do it: one of them is asked, once.
    private func peerOfLoser(_ name: String, _ losers: [String], isLed: Bool) throws -> GroupState? {
        guard losers.contains(home.configuration.site) else { return nil }
        guard !isLed else {
            throw Refusal(
                "of the sites that have the same of group '\(name)' all discard their changes, or none; '\(home.configuration.site)' is one of them",
                .misuse)
        }
        let pairs = try home.pairs(name)
        if let both = pairs.first(where: { losers.contains($0.entry.peer) }) {
            throw Refusal(
                "'\(both.entry.peer)' and '\(home.configuration.site)' mirror to each other in group '\(name)': one of them stays primary",
                .misuse)
        }
        return pairs[0]
    }

    /// Who discards its changes in a pair; nil = nobody, or it is the secondary already.
    private func loser(_ pair: String, _ losers: [String]) async throws -> String? {
        let group = try home.group(pair)
        guard losers.contains(group.entry.peer) else { return nil }
        if group.isMirroring, group.record.conflict == nil, try await peers.peerStanding(group).role == .secondary {
            return nil
        }
        return group.entry.peer
    }

    /// Of a pair in which nothing is to be done.
    private func report(_ pair: String, _ losers: [String]) throws -> ResyncReport {
        let peer = try home.group(pair).entry.peer
        let isNamed = losers.contains(peer)
        return ResyncReport(
            from: isNamed ? home.configuration.site : "", to: isNamed ? peer : "", sentBytes: 0, discardedBytes: 0,
            discardedGrains: 0)
    }

    nonisolated private func list(_ losers: [String]) -> String { losers.joined(separator: ",") }
}

extension ResyncReport {
    /// Of all pairs together.
    init(_ reports: [ResyncReport]) {
        func names(_ sites: [String]) -> String {
            Set(sites.flatMap { $0.split(separator: ", ").map(String.init) }).sorted().joined(separator: ", ")
        }
        self.init(
            from: names(reports.map(\.from)), to: names(reports.map(\.to)),
            sentBytes: reports.reduce(0) { $0 + $1.sentBytes },
            discardedBytes: reports.reduce(0) { $0 + $1.discardedBytes },
            discardedGrains: reports.reduce(0) { $0 + $1.discardedGrains }, since: reports.compactMap(\.since).min())
    }
}
