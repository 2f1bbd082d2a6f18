// OtherRemotes.swift: what the remotes of a group say to each other, when one of them fails over, or wants to know what the others have; and
// which failovers are under way (`FailoversUnderWay`).

import API
import Base
import Groups
import Ring
import SiteConfiguration

@SiteThread
final class OtherRemotes {
    private let home: Holdings
    private let steps: StepExecutor
    /// Of each group.
    private var failovers: [String: FailoversUnderWay] = [:]
    private static let seconds: Int64 = 5

    init(_ home: Holdings, _ steps: StepExecutor) { (self.home, self.steps) = (home, steps) }

    /// Asks each of these remotes, at once.
    ///
    /// - Parameter number: a point that is in doubt here; nil = none.
    func ask(_ remotes: [String], _ name: String, about number: UInt64?) async -> [String: Heard] {
        let call = TestimonyCall(
            site: home.configuration.site, number: number, underWay: failovers[name]?.own)
        let clients = home.clients(remotes)
        return await withTaskGroup(of: (String, Result<RemoteWord, any Error>).self) { tasks in
            for (remote, client) in clients {
                tasks.addTask {
                    do {
                        let word: RemoteWord = try await client.call(
                            Endpoints.testify, name, body: call, seconds: Self.seconds)
                        return (remote, .success(word))
                    } catch { return (remote, .failure(error)) }
                }
            }
            var words: [String: Result<RemoteWord, any Error>] = [:]
            for await (remote, word) in tasks { words[remote] = word }
            return Dictionary(uniqueKeysWithValues: remotes.map { ($0, heard(words[$0], of: $0, name)) })
        }
    }

    private func heard(_ word: Result<RemoteWord, any Error>?, of remote: String, _ name: String) -> Heard {
        var why: String?
        switch word {
        case .success(let word): return .says(word)
        case .failure(let refusal as Refusal): why = refusal.description
        case .failure(let error): why = "it cannot be reached: \(error)"
        case nil: break
        }
        return .silent(last: failovers[name]?.last(of: remote, now: monotonicNanoseconds()), why: why)
    }

    // MARK: Failovers

    /// Whoever asks, or is asked, from now on hears of it.
    func announce(_ flag: FailoverFlag, _ name: String) throws {
        try failovers[name, default: FailoversUnderWay()].begin(flag, name, at: home.configuration.site)
    }

    /// It has ended. Remotes that are not told forget it by themselves.
    func retract(_ name: String, _ remotes: [String]) async {
        guard let ended = failovers[name]?.end() else { return }
        let call = TestimonyCall(site: home.configuration.site, number: nil, underWay: ended, hasEnded: true)
        await withTaskGroup { tasks in
            for (_, client) in home.clients(remotes) {
                tasks.addTask {
                    _ = try? await client.call(Endpoints.testify, name, body: call, seconds: Self.seconds) as RemoteWord
                }
            }
        }
    }

    // MARK: Another remote

    /// Another remote asks. What it is in doubt about, and was not committed here, never will be.
    func testify(_ name: String, _ call: TestimonyCall) async throws -> RemoteWord {
        let site = home.configuration.site
        guard home.fellows(try home.pairs(name)).contains(call.site), call.number ?? 0 <= PointRecord.highestNumber
        else {
            throw Refusal("'\(call.site)' is no other remote of group '\(name)' at '\(site)'", .refused)
        }
        if let flag = call.underWay {
            failovers[name, default: FailoversUnderWay()].heard(
                flag, of: call.site, hasEnded: call.hasEnded == true, now: monotonicNanoseconds())
        }
        // Before the pairs are looked at: one that ends meanwhile is seen there.
        let underWay = failovers[name]?.own
        var pairs: [RemoteStand] = []
        for group in try home.pairs(name) {
            var testimony: Testimony?
            if let number = call.number, group.record.coordination != nil || group.record.role == .secondary {
                testimony = try await steps.runPart(.question(number), group).testimony
            }
            pairs.append(RemoteStand(group.pairName, group.record, testimony))
        }
        return RemoteWord(pairs: pairs, underWay: underWay)
    }
}

extension GroupState {
    /// Of one of several hosts, by which it is known at every site.
    var pairName: String { entry.several?.pair ?? entry.peer }
}
