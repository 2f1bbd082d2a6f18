// CoordinationPeers.swift: how the coordinator of a group with several hosts asks the other hosts, and the remotes, over their control APIs.

import API
import Base
import Groups
import Link
import SiteConfiguration
import Synchronization

final class CoordinationPeers: CoordinationClient {
    private let group: String
    private let site: String
    private let several: Configuration.SeveralEntry
    private let peers: [String: Configuration.PeerEntry]
    /// Which remote each host mirrors to, as they have said.
    private let remotes: Mutex<[String: String]>
    private let learned: @Sendable ([PairPlace]) async -> Void
    private static let surveySeconds: Int64 = 2
    private static let hostSeconds: Int64 = 5

    /// - Parameters:
    ///   - places: as they were said last.
    ///   - learned: is told when all are known, and some are others than before.
    init(
        _ entry: Configuration.GroupEntry, _ several: Configuration.SeveralEntry, site: String,
        peers: [String: Configuration.PeerEntry], places: [PairPlace],
        learned: @escaping @Sendable ([PairPlace]) async -> Void
    ) {
        (group, self.several, self.site, self.peers, self.learned) = (entry.group, several, site, peers, learned)
        var known = Dictionary(places.map { ($0.host, $0.remote) }, uniquingKeysWith: { first, _ in first })
        known[site] = entry.peer
        remotes = Mutex(known)
    }

    private func client(_ name: String) throws -> ControlClient {
        guard let address = peers[name]?.control else { throw Refusal("there is no [peers.\(name)] with 'control'") }
        return ControlClient(address: address)
    }

    // MARK: Hosts

    func survey() async -> Survey {
        await withTaskGroup(of: (String, HostStanding?, String?).self) { tasks in
            for host in several.hosts where host != site {
                tasks.addTask { await self.standing(of: host) }
            }
            var all = Survey(changed: false, problem: nil, highest: 0)
            var problems: [String] = []
            for await (host, standing, problem) in tasks {
                if let problem { problems.append("'\(host)': \(problem)") }
                guard let standing else { continue }
                learn(host, standing.remote)
                if let problem = standing.survey.problem { problems.append("'\(host)': \(problem)") }
                all.changed = all.changed || standing.survey.changed
                all.highest = max(all.highest, min(standing.survey.highest, PointRecord.highestNumber))
            }
            if problems.isEmpty { await tell() }
            all.problem = problems.isEmpty ? nil : problems.sorted().joined(separator: "; ")
            return all
        }
    }

    private func standing(of host: String) async -> (String, HostStanding?, String?) {
        do {
            let client = try client(host)
            return (host, try await client.call(Endpoints.hostSurvey, group, seconds: Self.surveySeconds), nil)
        } catch let refusal as Refusal {
            return (host, nil, refusal.description)
        } catch {
            return (host, nil, "it cannot be reached (\(error))")
        }
    }

    private func learn(_ host: String, _ remote: String) { remotes.withLock { $0[host] = remote } }

    private var places: [PairPlace]? {
        let known = remotes.withLock { $0 }
        let places = several.hosts.compactMap { host in known[host].map { PairPlace(host: host, remote: $0) } }
        return places.count == several.hosts.count ? places : nil
    }

    private func tell() async { if let places { await learned(places) } }

    func ask(host: Int, _ message: HostMessage, waits: Bool) async throws -> Stamped<HostAnswer>? {
        let reply: HostReply = try await client(several.hosts[host]).call(
            Endpoints.askHost, group, body: HostCall(site: site, message: message, waits: waits),
            seconds: Self.hostSeconds)
        return reply.answer
    }

    // MARK: Remotes

    func ask(remote: Int, _ message: RemoteMessage) async throws -> (answer: Stamped<RemoteAnswer>, at: Double?) {
        guard let places else { throw Refusal("not every host has said yet which remote it mirrors to", .passing) }
        let reply: RemoteReply = try await client(places[remote].remote).call(
            Endpoints.askRemote, group,
            body: RemoteCall(site: site, pair: places[remote].host, places: places, message: message))
        guard let answer = reply.answer else { throw Refusal("the remote's answer makes no sense") }
        return (answer, reply.at.flatMap { (0...PointRecord.latestTime).contains($0) ? $0 : nil })
    }
}
