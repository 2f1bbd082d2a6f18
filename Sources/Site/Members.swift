// Members.swift: how a group with several hosts stands at its other sites, for `farcopy status`: asked now and then, so that whoever asks here
// waits for nobody.
//
// A site may not know all the others by address; what it does not know, those that it knows tell.

import API
import Base
import Groups
import Ring

@SiteThread
final class Members {
    private let home: Holdings
    private var asking: Set<String> = []
    private var nextAt: UInt64 = 0
    private static let interval: UInt64 = 2_000_000_000
    private static let seconds: Int64 = 2
    /// What is older is not shown.
    private static let memory = 60.0

    init(_ home: Holdings) { self.home = home }

    /// Asks again when it is time.
    func look() {
        let now = monotonicNanoseconds()
        guard now >= nextAt else { return }
        nextAt = now + Self.interval
        let names = Set(home.groups.values.filter { $0.entry.several != nil }.map(\.entry.group))
        for name in names where !asking.contains(name) {
            asking.insert(name)
            Task {
                await ask(name)
                asking.remove(name)
            }
        }
    }

    private func ask(_ name: String) async {
        guard let pairs = try? home.pairs(name) else { return }
        let sites = known(pairs)
        let clients = home.clients(sites.sorted())
        let found = await withTaskGroup(of: [StatusReport.MemberReport].self) { tasks in
            for (site, client) in clients {
                tasks.addTask {
                    do {
                        let status: StatusReport = try await client.call(
                            Endpoints.status, "", [.group: name], seconds: Self.seconds)
                        guard let group = status.groups[name] else {
                            return [.init(site: site, problem: "it has no group '\(name)'", at: realSeconds())]
                        }
                        return [.init(site, group, at: realSeconds())] + (group.members ?? [])
                    } catch {
                        return [.init(site: site, problem: "cannot be reached (\(error))", at: realSeconds())]
                    }
                }
            }
            var all: [StatusReport.MemberReport] = []
            for await some in tasks { all += some }
            return all
        }
        let now = realSeconds()
        var members: [String: StatusReport.MemberReport] = [:]
        for member in found where member.site != home.configuration.site && now - member.at < Self.memory {
            if let known = members[member.site], known.at >= member.at { continue }
            members[member.site] = member
        }
        let sorted = members.values.sorted { $0.site < $1.site }
        for pair in pairs { pair.members = sorted }
    }

    private func known(_ pairs: [GroupState]) -> Set<String> {
        var sites = Set(pairs.flatMap(\.fellows))
        for pair in pairs {
            sites.formUnion((pair.record.coordination?.places ?? []).flatMap { [$0.host, $0.remote] })
            sites.formUnion(pair.entry.several?.remotes ?? [])
            sites.insert(pair.entry.peer)
        }
        return sites.subtracting([home.configuration.site, ""])
    }
}

extension StatusReport.MemberReport {
    fileprivate init(site: String, problem: String, at: Double) {
        self.init(site: site, at: at)
        self.problem = problem
    }

    fileprivate init(_ site: String, _ group: StatusReport.GroupReport, at: Double) {
        self.init(site: site, at: at)
        (role, state, reason, point) = (group.role, group.state, group.reason, group.point?.id)
        (lagSeconds, notice) = (group.lagSeconds, group.notice)
    }
}
