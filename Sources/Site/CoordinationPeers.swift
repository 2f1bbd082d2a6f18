// CoordinationPeers.swift: how the coordinator of a group with several hosts asks the other hosts, and the remotes, over their control APIs.
//
// A host of the group is a site that is primary of a pair just now: after a failover the remotes are.

import API
import Base
import Groups
import Link
import Ring
import SiteConfiguration
import Synchronization

final class CoordinationPeers: CoordinationClient {
    private let group: String
    private let site: String
    /// By name, in the coordinator's order.
    private let pairs: [String]
    private let ownPair: String
    /// Pairs are named by the sites that are primary.
    private let isForward: Bool
    private let peers: [String: Configuration.PeerEntry]
    /// Which remote each pair has, as the hosts have said.
    private let remotes: Mutex<[String: String]>
    private let local: @Sendable (String) async -> GroupHandle?
    let goesOnWithoutLost: Bool
    /// Since when each pair's host could not form a point.
    private let lost = Mutex<[String: UInt64]>([:])
    private static let longestSilence: UInt64 = 2_000_000_000
    private let learned: @Sendable ([PairPlace]) async -> Void
    private let recorded: @Sendable () -> [PairPlace]
    private static let surveySeconds: Int64 = 2
    private static let hostSeconds: Int64 = 5

    /// - Parameters:
    ///   - pairs: all of the group's, by name.
    ///   - local: another pair of this site.
    ///   - learned: is told where the pairs are, once all have said so.
    ///   - recorded: where they are by the record, which another coordinator may have told since.
    init(
        _ entry: Configuration.GroupEntry, pairs: [String], isForward: Bool, site: String,
        peers: [String: Configuration.PeerEntry], goesOnWithoutLost: Bool,
        local: @escaping @Sendable (String) async -> GroupHandle?,
        learned: @escaping @Sendable ([PairPlace]) async -> Void, recorded: @escaping @Sendable () -> [PairPlace]
    ) {
        self.recorded = recorded
        (group, self.pairs, self.isForward) = (entry.group, pairs, isForward)
        self.goesOnWithoutLost = goesOnWithoutLost
        (self.site, self.peers, self.local, self.learned) = (site, peers, local, learned)
        ownPair = entry.several?.pair ?? ""
        remotes = Mutex([ownPair: isForward ? entry.peer : site])
        takeRecorded()
    }

    private func client(_ name: String) throws -> ControlClient {
        guard let address = peers[name]?.control else { throw Refusal("there is no [peers.\(name)] with 'control'") }
        return ControlClient(address: address)
    }

    private func primary(_ pair: String) throws -> String { isForward ? pair : try remote(of: pair) }
    private func secondary(_ pair: String) throws -> String { isForward ? try remote(of: pair) : pair }
    private func remote(of pair: String) throws -> String {
        guard let remote = remotes.withLock({ $0[pair] }) else {
            throw Refusal("'\(pair)' has not said yet which remote it mirrors to", .passing)
        }
        return remote
    }

    // MARK: Hosts

    func survey() async -> Survey {
        await withTaskGroup(of: (String, HostStanding?, String?).self) { tasks in
            for pair in pairs where pair != ownPair {
                tasks.addTask { await self.standing(of: pair) }
            }
            var all = Survey(changed: false, problem: nil, highest: 0)
            var problems: [String] = []
            for await (pair, standing, problem) in tasks {
                if let standing, isForward { remotes.withLock { $0[pair] = standing.peer } }
                if let problem = problem ?? standing?.survey.problem {
                    // Which has heard from its remote, perhaps, that this has failed over: it is not lost, and others must not go on.
                    if standing?.survey.isStale == true {
                        _ = lost.withLock { $0.removeValue(forKey: pair) }
                        problems.append("'\(pair)': \(problem)")
                    } else if isLost(pair) {
                        all.absent = (all.absent ?? []) + [pairs.firstIndex(of: pair)!]
                    } else {
                        problems.append("'\(pair)': \(problem)")
                    }
                    continue
                }
                _ = lost.withLock { $0.removeValue(forKey: pair) }
                guard let standing else { continue }
                all.changed = all.changed || standing.survey.changed
                all.highest = max(all.highest, min(standing.survey.highest, PointRecord.highestNumber))
            }
            if problems.isEmpty, let places { await learned(places) }
            all.problem = problems.isEmpty ? nil : problems.sorted().joined(separator: "; ")
            return all
        }
    }

    /// It cannot form a point; whether it has been so for long, and the others go on.
    private func isLost(_ pair: String) -> Bool {
        guard goesOnWithoutLost else { return false }
        let now = monotonicNanoseconds()
        return lost.withLock { lost in
            let since = lost[pair] ?? now
            lost[pair] = since
            return now - since > Self.longestSilence
        }
    }

    private func standing(of pair: String) async -> (String, HostStanding?, String?) {
        do {
            let primary = try primary(pair)
            if primary == site {
                guard let handle = await local(pair) else { return (pair, nil, "this site has no such pair") }
                return (pair, HostStanding(survey: await handle.survey(), peer: pair), nil)
            }
            let client = try client(primary)
            let call = SurveyCall(site: site, pair: pair)
            return (pair, try await client.call(Endpoints.survey, group, body: call, seconds: Self.surveySeconds), nil)
        } catch let refusal as Refusal {
            return (pair, nil, refusal.description)
        } catch {
            return (pair, nil, "it cannot be reached (\(error))")
        }
    }

    private func takeRecorded() {
        let recorded = recorded()
        remotes.withLock { known in
            for place in recorded where known[place.host] == nil { known[place.host] = place.remote }
        }
    }

    private var places: [PairPlace]? {
        let known = remotes.withLock { $0 }
        let places = pairs.compactMap { pair in known[pair].map { PairPlace(host: pair, remote: $0) } }
        return places.count == pairs.count ? places : nil
    }

    func ask(host: Int, _ message: HostMessage, waits: Bool) async throws -> Stamped<HostAnswer>? {
        let pair = pairs[host]
        let primary = try primary(pair)
        if primary == site { return await local(pair)?.asked(message, waits: waits) }
        let call = HostCall(site: site, pair: pair, message: message, places: places, waits: waits)
        let reply: HostReply = try await client(primary).call(
            Endpoints.askHost, group, body: call, seconds: Self.hostSeconds)
        return reply.answer
    }

    // MARK: Remotes

    func ask(remote: Int, _ message: RemoteMessage) async throws -> (answer: Stamped<RemoteAnswer>, at: Double?) {
        // Who takes up may have to ask remotes before it has asked any host.
        if places == nil { takeRecorded() }
        if places == nil { _ = await survey() }
        guard let places else { throw Refusal("not every host has said yet which remote it mirrors to", .passing) }
        let pair = pairs[remote]
        let secondary = try secondary(pair)
        // A remote that this site does not know is asked through its host.
        let through = peers[secondary] != nil ? secondary : try primary(pair)
        let call = RemoteCall(
            site: site, to: secondary, pair: pair, places: places, message: message,
            without: message.absent.map { $0.filter(pairs.indices.contains).map { pairs[$0] } })
        let reply: RemoteReply = try await client(through).call(Endpoints.askRemote, group, body: call)
        guard let answer = reply.answer else { throw Refusal("the remote's answer makes no sense") }
        return (answer, reply.at.flatMap { (0...PointRecord.latestTime).contains($0) ? $0 : nil })
    }
}
