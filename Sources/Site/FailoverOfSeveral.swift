// FailoverOfSeveral.swift: a failover of a group with several remotes (`GroupFailover`), as a site carries it out, and what a remote does that
// another one leads.

import API
import Base
import Groups

@SiteThread
package final class FailoverOfSeveral {
    private let home: Holdings
    private let steps: StepExecutor
    private let intake: Intake
    private let others: OtherRemotes

    init(_ home: Holdings, _ steps: StepExecutor, _ intake: Intake, _ others: OtherRemotes) {
        (self.home, self.steps, self.intake, self.others) = (home, steps, intake, others)
    }

    // MARK: What is asked for

    /// Leads all remotes of the group to one point. A group with one remote goes there by itself.
    ///
    /// - Parameters:
    ///   - wanted: nil = the newest that counts.
    ///   - alone: the others are not asked, and not led.
    /// - Returns: what has become of this site's volumes, and which other remotes have not followed.
    /// - Throws: `Refusal` when the point cannot be, or is in doubt, or others are somewhere else, or about to go there;
    ///   `OvertakenFailover`.
    package func failover(_ name: String, point wanted: UInt64?, alone: Bool) async throws -> FailoverReport {
        guard try home.isOfSeveral(name) else {
            guard !alone else {
                throw Refusal("group '\(name)' has one remote: `farcopy failover \(name) --point N`", .misuse)
            }
            return try await intake.failover(name, point: wanted)
        }
        let order = GroupFailover.Order(
            group: name, site: home.configuration.site, point: wanted, alone: alone,
            others: home.fellows(try home.pairs(name)), id: UInt64.random(in: 1...UInt64.max))
        let done = try await run(GroupFailover(order), name)
        guard var report = done.report else {
            throw Refusal("group '\(name)' has no volumes at '\(home.configuration.site)' yet")
        }
        report.behind = done.outcome.behind.map { behind(name, $0.remote, $0.error, done.outcome.target.point) }
        return report
    }

    private func behind(_ name: String, _ remote: String, _ error: any Error, _ point: UInt64) -> String {
        let what = error is UnknownRemote ? "was not led: \(error)" : "has not followed (\(error))"
        return "'\(remote)' \(what); `farcopy failover \(name)` there goes to point \(point) as well"
    }

    /// Another remote has failed over, and leads this one to the same point.
    ///
    /// - Throws: `Refusal` when that one does not say so, or this one has failed over to another point.
    package func follow(_ name: String, _ call: LeadCall) async throws {
        let site = home.configuration.site
        guard home.fellows(try home.pairs(name)).contains(call.site) else {
            throw Refusal("'\(call.site)' is no other remote of group '\(name)' at '\(site)'", .refused)
        }
        let target = FailoverTarget(point: call.point, without: call.without)
        _ = try await run(
            FollowedFailover(group: name, site: site, leader: call.site, target, committed: call.committed), name,
            ledBy: call.site)
    }

    /// Decides about a point that is prepared here when whoever coordinates is gone for good: as a failover would, and goes on as a remote.
    ///
    /// - Returns: nil where none is.
    package func decidePrepared(_ name: String) async throws -> String? {
        let pairs = try home.pairs(name)
        let numbers = pairs.filter { $0.record.role == .secondary }.compactMap(\.record.undecided)
        guard let number = numbers.max() else { return nil }
        _ = try await run(DoubtSettlement(name, others: home.fellows(pairs)), name)
        return "point \(number) is decided; `farcopy events \(name)` says how"
    }

    /// Another remote of the group asks.
    package func testify(_ name: String, _ call: TestimonyCall) async throws -> RemoteWord {
        try await others.testify(name, call)
    }

    // MARK: Carrying it out

    /// - Returns: also what the takeovers have come to: of the pair that has gone to the newest point.
    private func run<Operation: FailoverSteps>(
        _ operation: Operation, _ name: String, ledBy leader: String? = nil
    ) async throws -> (outcome: Operation.Outcome, report: FailoverReport?) {
        var (operation, answer, report) = (operation, FailoverAnswer.begin, FailoverReport?.none)
        let pairs = try home.pairs(name)
        while true {
            let known = pairs.map { OwnPair($0.pairName, isEmpty: $0.entry.volumes.isEmpty, $0.record) }
            switch operation.next(after: answer, known) {
            case .done(let outcome): return (outcome, report)
            case .failed(let error): throw error
            case .perform(.takeOver(let takeover)):
                do {
                    let taken = try await takeOver(takeover, pairs[takeover.pair], ledBy: leader)
                    if taken.id >= report?.id ?? 0 { report = taken }
                    answer = .done
                } catch is OvertakenFailover {
                    answer = .overtaken
                } catch {
                    answer = .failed(error)
                }
            case .perform(let action):
                do { answer = try await perform(action, name, pairs) } catch { answer = .failed(error) }
            }
        }
    }

    private func perform(
        _ action: FailoverAction, _ name: String, _ pairs: [GroupState]
    ) async throws -> FailoverAnswer {
        switch action {
        case .announce(let flag): try others.announce(flag, name)
        case .retract(let remotes): await others.retract(name, remotes)
        case .ask(let remotes, let number): return .heard(await others.ask(remotes, name, about: number))
        case .promise(let pair, let number):
            return .testimony(try await steps.runPart(.question(number), pairs[pair]).testimony)
        case .settle(let settlement): try await settle(settlement, pairs[settlement.pair])
        case .takeOver: invariant(false, "a takeover is carried out where its report is kept")
        case .leave(let pair): home.note(pairs[pair].entry.name, "has no recovery point, and stays as it is")
        case .lead(let remote, let target, let committed): try await lead(remote, name, target, committed)
        }
        return .done
    }

    private func settle(_ settlement: Settlement, _ group: GroupState) async throws {
        let number = settlement.point
        _ = try await steps.runPart(
            .decided(number, forward: settlement.forward, alone: settlement.reason == .chosen), group)
        home.note(
            group.entry.name,
            "point \(number) \(settlement.forward ? "counts" : "is dropped"): \(settlement.reason.words)")
    }

    private func takeOver(
        _ takeover: PairTakeover, _ group: GroupState, ledBy leader: String?
    ) async throws -> FailoverReport {
        let prepared = group.record.coordination?.prepared?.number
        let report = try await intake.failover(group, point: takeover.point, ifNewestIs: takeover.ifNewestIs)
        if let prepared, group.record.coordination?.inDoubt == prepared, prepared != takeover.point {
            home.note(group.entry.name, "point \(prepared) is dropped: as was chosen")
        }
        if let point = takeover.behind {
            home.note(
                group.entry.name,
                "its volumes are behind: '\(group.pairName)' was lost when point \(point) was formed; they go to point \(takeover.point)"
            )
        }
        if let leader {
            home.note(
                group.entry.name, "'\(leader)' leads the group to point \(takeover.behind ?? takeover.point)")
        }
        return report
    }

    private func lead(
        _ remote: String, _ name: String, _ target: FailoverTarget, _ committed: UInt64
    ) async throws {
        guard let address = home.configuration.peers[remote]?.control else { throw UnknownRemote(name: remote) }
        let call = LeadCall(
            site: home.configuration.site, point: target.point, committed: committed, without: target.without)
        _ = try await ControlClient(address: address).call(Endpoints.lead, name, body: call) as Done
    }
}

/// This site does not know how to reach it.
private struct UnknownRemote: Error, CustomStringConvertible {
    var name: String
    var description: String { "there is no [peers.\(name)]" }
}

extension Settlement.Reason {
    fileprivate var words: String {
        switch self {
        case .committed: "another remote has committed it"
        case .uncommitted: "nobody has committed it"
        case .chosen: "as was chosen"
        case .led(let leader): "as '\(leader)' says"
        }
    }
}
