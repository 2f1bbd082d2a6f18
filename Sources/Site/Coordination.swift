// Coordination.swift: what a site does when the coordinator of a group with several hosts or remotes asks, and when pairs wait for each other.

import API
import Base
import Groups
import Ring
import SiteConfiguration

@SiteThread
package final class Coordination {
    private let home: Holdings
    private let steps: StepExecutor
    private let peers: Peers

    init(_ home: Holdings, _ steps: StepExecutor, _ peers: Peers) {
        (self.home, self.steps, self.peers) = (home, steps, peers)
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

    /// A pair at another site waits for the others here.
    package func meet(_ name: String, _ call: MeetCall) async throws {
        let pairs = try home.pairs(name)
        guard home.fellows(pairs).contains(call.site), let all = pairs[0].pairNames, (0...3).contains(call.place) else {
            throw Refusal(
                "'\(call.site)' is no other site of group '\(name)' at '\(home.configuration.site)'", .refused)
        }
        try await home.meetings.meet(name, call.pair, place: call.place, all: all)
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
            let reply = try await steps.runPart(input, group)
            home.endAlert(group, .refused)
            return reply
        } catch let refusal as TakeoverRefusal {
            throw Refusal("group '\(group.entry.name)': \(refusal)", .refused)
        } catch {
            // It is told here as well, where the reason lies.
            home.alert(group, .refused, "point \(number) could not be \(call.message.request.body.wanted): \(error)")
            throw error
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
}

extension StepExecutor {
    /// A remote's part in a point, in the group's turn.
    func runPart(_ input: RemotePart.Input, _ group: GroupState) async throws -> RemoteReply {
        await group.turnstile.enter()
        defer { group.turnstile.leave() }
        // What is prepared is what the volumes are when it is committed. A host that has given it up, of which a coordinator without a record
        // wants the next, must not write that over it; nor may the record's file, if it cannot be saved, say that it is prepared.
        if case .request(let request, _, _, _, _) = input, case .prepare = request.body {
            await setIntake(closed: true, group)
        }
        do {
            let reply = try await run(RemotePart(input, keep: group.entry.keep, session: group.session), group)
            await openIntake(group)
            return reply
        } catch {
            await openIntake(group)
            throw error
        }
    }

    private func openIntake(_ group: GroupState) async {
        guard group.intakeIsClosed, group.record.undecided == nil, !group.isUnsaved else { return }
        await setIntake(closed: false, group)
    }

    private func setIntake(closed: Bool, _ group: GroupState) async {
        group.intakeIsClosed = closed
        _ = await home.ask(home.members(group)) { hosted, _ in hosted.intakeIsClosed = closed }
    }
}
