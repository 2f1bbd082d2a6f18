// OtherRemotes.swift: what the remotes of a group say to each other, when one of them fails over, or wants to know what the others have.

import API
import Base
import Groups
import SiteConfiguration

@SiteThread
final class OtherRemotes {
    private let home: Holdings
    private let steps: StepExecutor
    private static let seconds: Int64 = 5

    init(_ home: Holdings, _ steps: StepExecutor) { (self.home, self.steps) = (home, steps) }

    /// Asks each of these remotes, at once.
    ///
    /// - Parameter number: a point that is in doubt here; nil = none.
    func ask(_ remotes: [String], _ name: String, about number: UInt64?) async -> [String: Heard] {
        let call = TestimonyCall(site: home.configuration.site, number: number)
        let clients = home.clients(remotes)
        return await withTaskGroup(of: (String, Heard).self) { tasks in
            for (remote, client) in clients {
                tasks.addTask {
                    let word: RemoteWord? = try? await client.call(
                        Endpoints.testify, name, body: call, seconds: Self.seconds)
                    return (remote, word.map { .says($0) } ?? .silent)
                }
            }
            var found: [String: Heard] = Dictionary(uniqueKeysWithValues: remotes.map { ($0, .silent) })
            for await (remote, heard) in tasks { found[remote] = heard }
            return found
        }
    }

    /// Another remote asks. What it is in doubt about, and was not committed here, never will be.
    func testify(_ name: String, _ call: TestimonyCall) async throws -> RemoteWord {
        let site = home.configuration.site
        guard home.fellows(try home.pairs(name)).contains(call.site), call.number ?? 0 <= PointRecord.highestNumber
        else {
            throw Refusal("'\(call.site)' is no other remote of group '\(name)' at '\(site)'", .refused)
        }
        var pairs: [RemoteStand] = []
        for group in try home.pairs(name) {
            var testimony: Testimony?
            if let number = call.number, group.record.coordination != nil || group.record.role == .secondary {
                testimony = try await steps.runPart(.question(number), group).testimony
            }
            pairs.append(RemoteStand(group.pairName, group.record, testimony))
        }
        return RemoteWord(pairs: pairs)
    }
}

extension GroupState {
    /// Of one of several hosts, by which it is known at every site.
    var pairName: String { entry.several?.pair ?? entry.peer }
}
