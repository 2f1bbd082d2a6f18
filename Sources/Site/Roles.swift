// Roles.swift: how the roles of a group change: giving up the role of primary, and taking up mirroring in the other direction.
//
// Must be prevented:
//   a role is given up before the hosts' last acknowledged write is in what is kept
//   two sites are primary after a switchover that was interrupted anywhere
//   the peer's changed grains are counted as taken over before they are on stable storage here
//   both sites give up the role because each was asked to (opposite resyncs), or one does long after it was asked
//   data flows back into a volume while its role is given up
//   hosts that were to be let in after an earlier try are, while this one gives the role up

import API
import Base
import Groups
import NBDServer
import Ring
import Volumes

/// How the roles of a group change.
@SiteThread
package final class Roles {
    let home: Holdings
    let peers: Peers
    let operations: Operations
    let steps: StepExecutor
    let intake: Intake
    let resyncs: ResyncsUnderWay

    init(
        _ home: Holdings, _ peers: Peers, _ operations: Operations, _ steps: StepExecutor, _ intake: Intake,
        _ resyncs: ResyncsUnderWay
    ) {
        (self.home, self.peers, self.operations, self.steps, self.intake) = (home, peers, operations, steps, intake)
        self.resyncs = resyncs
    }

    // MARK: Giving up the role

    /// Makes this site the secondary of its peer: what hosts wrote here and the peer lacks is kept as a FlashCopy, and the
    /// state as a whole as the first recovery point.
    package func yield(_ name: String, _ request: YieldRequest) async throws -> YieldAnswer {
        let group = try home.pair(name, with: request.site)
        let askedAt = monotonicNanoseconds()
        try checkYield(group, request)
        try refuseIfOpposite(group, request)
        await group.turnstile.enter()
        defer { group.turnstile.leave() }
        guard monotonicNanoseconds() - askedAt < UInt64(Limits.yieldWaitSeconds) * 1_000_000_000 else {
            throw Refusal("group '\(name)' was busy at '\(home.configuration.site)'; try again", .passing)
        }
        try refuseIfOpposite(group, request)
        if group.record.role == .secondary {
            guard let number = group.record.yielded,
                let point = group.record.points.first(where: { $0.number == number })
            else { throw Refusal("group '\(name)' is secondary at '\(home.configuration.site)' already") }
            // Asked again.
            try await group.handle.change(.paired(site: request.siteID, generations: request.generations))
            return yieldAnswer(group, point)
        }
        try checkYield(group, request)
        try await checkStillAsked(group, request)
        let served = group.servesHosts || group.isAdmitting
        let point = try await steps.run(
            Yield(
                to: request.siteID, generations: request.generations, highestPoint: request.highestPoint,
                lineage: randomIdentity(), volumes: home.members(group).map(\.name), keep: group.entry.keep,
                servesHosts: served), group)
        (group.isolation, group.unsent) = (nil, nil)
        home.note(name, "'\(request.site)' is the primary; this site has given up that role")
        return yieldAnswer(group, point)
    }

    /// Of two sites that ask each other to give up the role, the one with the smaller identity goes on; of a group with several hosts the
    /// configured one, so that all pairs end in one direction.
    private func refuseIfOpposite(_ group: GroupState, _ request: YieldRequest) throws {
        guard group.isJoining else { return }
        let name = group.entry.name
        let goesOn =
            group.entry.several.map { $0.pair == home.configuration.site } ?? (home.siteRecord.id < request.siteID)
        if goesOn {
            throw Refusal(
                "'\(home.configuration.site)' is resyncing group '\(name)' the other way round just now, and goes on; nothing of this "
                    + "command was done")
        }
        throw Refusal("group '\(name)' at '\(home.configuration.site)' is changing roles; try again", .passing)
    }

    /// A request that was delayed must not take the role when nobody waits for that any more.
    private func checkStillAsked(_ group: GroupState, _ request: YieldRequest) async throws {
        let theirs = try await peers.peerStanding(group)
        guard theirs.siteID == request.siteID, theirs.role == .primary, theirs.generations == request.generations,
            theirs.joining != false
        else {
            throw Refusal(
                "'\(request.site)' does not ask any more for group '\(group.entry.name)' to give up its role at "
                    + "'\(home.configuration.site)'", .passing)
        }
    }

    private func checkYield(_ group: GroupState, _ request: YieldRequest) throws {
        let name = group.entry.name
        guard request.highestPoint <= PointRecord.highestNumber else {
            throw Refusal("point \(request.highestPoint) cannot be", .refused)
        }
        guard request.site == group.entry.peer else {
            throw Refusal(
                "group '\(name)' at '\(home.configuration.site)' has the peer '\(group.entry.peer)'", .refused)
        }
        if let known = group.record.peerSite, known != request.siteID {
            throw Refusal(
                "group '\(name)' at '\(home.configuration.site)' belongs to another '\(request.site)'", .refused)
        }
        try intake.checkVolumes(group, request.site, request.volumes)
        try home.refuseWhileRestoring(group)
    }

    private func yieldAnswer(_ group: GroupState, _ point: PointRecord) -> YieldAnswer {
        YieldAnswer(
            siteID: home.siteRecord.id, lineage: group.record.lineage ?? "",
            volumeLineages: group.record.volumeLineages,
            point: point)
    }

    /// For the peer that takes the role: what it must take into its bitmaps.
    package func changes(_ name: String, volume: String, from first: Int) async throws -> ChangesAnswer {
        let group = try home.pair(name, of: volume)
        guard let volume = home.members(group).first(where: { $0.name == volume }) else {
            throw Refusal("group '\(name)' has no volume '\(volume)'", .unknown)
        }
        let number = volume.number
        let words = await volume.reactor.run {
            $0.hosted(number).volume.changedWords(from: first, count: Limits.changedWordsPerAnswer)
        }
        // What the one that asks says itself may be too little.
        let isUntracked = group.record.untracked?[volume.name] != nil
        return ChangesAnswer(
            grain: volume.geometry.grain, size: volume.geometry.size,
            words: isUntracked ? words.indices.map { volume.geometry.wordOfAll(first + $0) } : words)
    }

    // MARK: Taking it up

    /// Takes up mirroring to a peer that gives up its role, sending only grains that one of the sites has changed.
    func join(_ group: GroupState) async throws {
        let name = group.entry.name
        guard group.record.role == .primary else {
            throw Refusal(
                "group '\(name)' at '\(home.configuration.site)' has given up its role to '\(group.entry.peer)' meanwhile; nothing of this "
                    + "command was done")
        }
        try home.refuseWhileRestoring(group)
        group.isJoining = true
        defer { group.isJoining = false }
        let theirs = try await peers.peerStanding(group)
        try await steps.run(Join(group.record, theirs, identity: randomIdentity()), group)
        group.isolation = nil
        home.note(name, "mirroring to '\(group.entry.peer)' begins; what either site has changed is sent")
    }
}
