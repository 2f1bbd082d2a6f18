// WholeGroup.swift: changes of roles of a group with several hosts: each pair changes its own, and all wait for each other where it matters
// (`SiteAction.meet`).
//
// Must be prevented:
//   some of the hosts are shut out at their last point, and others write on after theirs: the last point is formed once all are shut out

import API
import Base
import FoundationEssentials
import Groups

extension Roles {
    /// Does the same for every pair here and, unless another site has asked and does so itself, at all sites that have what this one has.
    private func everywhere<Outcome: Sendable>(
        _ name: String, isLed: Bool, _ own: @escaping @Sendable (String) async throws -> Outcome,
        other: @escaping @Sendable (ControlClient) async throws -> Outcome
    ) async throws -> [Outcome] {
        let pairs = try home.pairs(name).filter { !$0.entry.volumes.isEmpty }
        let clients = home.clients(isLed ? [] : home.fellows(pairs))
        let names = pairs.map(\.entry.name)
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
                // The others wait for who does not come.
                for name in names { (try? home.group(name))?.operation?.abort() }
                home.happened()
                throw error
            }
            return outcomes
        }
    }

    package func switchover(_ name: String, isLed: Bool) async throws -> StatusReport.PointReport {
        guard try home.isOfSeveral(name) else { return try await switchover(name) }
        let points = try await everywhere(name, isLed: isLed) { [self] in
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
        let points = try await everywhere(name, isLed: isLed) { [self] in
            try await failback($0)
        } other: { client in
            try await client.call(Endpoints.failback, name, [.led: "true"])
        }
        return points.min { $0.id < $1.id }!
    }

    package func previewFailback(_ name: String, isLed: Bool) async throws -> ResyncReport {
        guard try home.isOfSeveral(name) else { return try await previewFailback(name) }
        let reports = try await everywhere(name, isLed: isLed) { [self] in
            try await previewFailback($0)
        } other: { client in
            try await client.call(Endpoints.previewFailback, name, [.led: "true"])
        }
        return ResyncReport(reports)
    }
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
