// ResyncsUnderWay.swift: resyncs of groups with several hosts or remotes, of which every site is told before the first pair gives up its role.
//
// Must be prevented:
//   operators who want opposite directions at the same time get some pairs one way and the others the other way: each site lets one begin,
//     so of two neither does at all sites unless it was first at all of them

import API
import Base
import Groups
import Ring

/// Which sites discard their changes of a group, while a resync is under way.
@SiteThread
package final class ResyncsUnderWay {
    private struct Announced {
        var id: UInt64
        var losers: Set<String>
        var until: UInt64
    }
    private let home: Holdings
    private var announced: [String: Announced] = [:]
    /// Should whoever has announced it never say that it has ended.
    private static let longest: UInt64 = 600_000_000_000

    init(_ home: Holdings) {
        self.home = home
    }

    /// Another site announces a resync, or its end.
    package func hear(_ name: String, _ call: ResyncCall) async throws {
        let pairs = try home.pairs(name)
        guard home.fellows(pairs).contains(call.site) || pairs.contains(where: { $0.entry.peer == call.site }) else {
            throw Refusal(
                "'\(call.site)' is no other site of group '\(name)' at '\(home.configuration.site)'", .refused)
        }
        guard call.losers.count <= Coordinator.Settings.members.upperBound else {
            throw Refusal("so many sites discard nothing in group '\(name)'", .misuse)
        }
        try note(name, call)
        if call.passesOn { try await tellPeers(name, call) }
    }

    /// Does it while every site of the group knows of it.
    func whileAnnounced<Outcome: Sendable>(
        _ name: String, _ losers: [String], _ body: () async throws -> Outcome
    ) async throws -> Outcome {
        var call = ResyncCall(site: home.configuration.site, id: UInt64.random(in: 1...UInt64.max), losers: losers)
        let fellows = home.clients(home.fellows(try home.pairs(name)))
        let outcome: Result<Outcome, any Error>
        do {
            try note(name, call)
            try await tellPeers(name, call)
            for (site, client) in fellows { try await tell(site, client, name, call) }
            outcome = .success(try await body())
        } catch {
            outcome = .failure(error)
        }
        // Whoever cannot be told forgets it in time.
        call.ends = true
        try? note(name, call)
        try? await tellPeers(name, call)
        for (site, client) in fellows { try? await tell(site, client, name, call) }
        return try outcome.get()
    }

    private func note(_ group: String, _ call: ResyncCall) throws {
        guard !call.ends else {
            if announced[group]?.id == call.id { announced[group] = nil }
            return
        }
        let (now, losers) = (monotonicNanoseconds(), Set(call.losers))
        if let other = announced[group], other.until > now, other.id != call.id, other.losers != losers {
            throw Refusal(
                "group '\(group)' is being resynced at '\(home.configuration.site)' another way, with what "
                    + "\(other.losers.sorted().joined(separator: ", ")) changed discarded; nothing of this command was done",
                .passing)
        }
        announced[group] = Announced(id: call.id, losers: losers, until: now + Self.longest)
    }

    /// The peers of this site's own pairs, each once.
    private func tellPeers(_ name: String, _ call: ResyncCall) async throws {
        var next = call
        (next.site, next.passesOn) = (home.configuration.site, false)
        let pairs = try home.pairs(name).filter { !$0.entry.volumes.isEmpty }
        for (site, client) in home.clients(Set(pairs.map(\.entry.peer)).sorted()) {
            try await tell(site, client, name, next)
        }
    }

    private func tell(_ site: String, _ client: ControlClient, _ name: String, _ call: ResyncCall) async throws {
        do { _ = try await client.call(Endpoints.announceResync, name, body: call) } catch {
            throw Refusal("'\(site)': \(error)", (error as? Refusal)?.kind ?? .passing)
        }
    }
}
