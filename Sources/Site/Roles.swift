// Roles.swift: which of two sites is the primary of a group, and how that changes: what a returning site learns, giving
// up the role, taking up mirroring in the other direction, switchover.
//
// Must be prevented:
//   hosts write at a site that is stale, if it could have asked
//   a role is given up before the hosts' last acknowledged write is in what is kept
//   two sites are primary after a switchover that was interrupted anywhere
//   the peer's changed grains are counted as taken over before they are on stable storage here
//   both sites give up the role because each was asked to (opposite resyncs), or one does long after it was asked
//   data flows back into a volume while its role is given up

import API
import Base
import FoundationEssentials
import Glibc
import Groups
import NBDServer
import Ring
import Volumes

extension Site {
    // MARK: Standing

    func standing(_ group: GroupState) async -> Standing {
        var (grains, written) = (UInt64(0), UInt64(0))
        for volume in home.members(group) {
            let number = volume.number
            guard number >= 0 else {
                grains += volume.changesLeft
                continue
            }
            let figures = await volume.reactor.run { reactor in
                let hosted = reactor.hosted(number)
                return (hosted.volume.changedGrains + hosted.volume.outOfSyncGrains, hosted.bytesWritten)
            }
            grains += UInt64(figures.0) * UInt64(volume.geometry.grain)
            written += figures.1
        }
        let record = group.record
        let wrote = record.failedOver == nil || group.writtenAtFailover != written
        return Standing(
            site: home.configuration.site, siteID: home.siteRecord.id, record: record, wrote: wrote,
            changedBytes: grains,
            joining: group.isJoining)
    }

    func peerClient(_ group: GroupState) -> ControlClient? {
        home.configuration.peers[group.entry.peer]?.control.map { ControlClient(address: $0) }
    }

    /// Calls the peer about a group.
    ///
    /// - Throws: `Refusal` in its words when it refuses, or as one that passes when it cannot be reached.
    func callPeer<Body, Answer>(
        _ group: GroupState, _ endpoint: Endpoint<Body, Answer>, _ query: [APICall.Query: String] = [:],
        body: Body? = nil,
        seconds: Int64? = nil
    ) async throws -> Answer {
        guard let client = peerClient(group) else {
            throw Refusal("the peer '\(group.entry.peer)' is no Farcopy site")
        }
        do {
            return try await client.call(endpoint, group.entry.name, query, body: body, seconds: seconds)
        } catch let error as Refusal {
            throw error
        } catch {
            throw Refusal("'\(group.entry.peer)' cannot be reached at \(client.address): \(error)", .passing)
        }
    }

    /// Asks the peer how the group stands there.
    func peerStanding(_ group: GroupState, seconds: Int64 = 10) async throws -> Standing {
        try await callPeer(
            group, Endpoints.standing, body: await standing(group), seconds: seconds)
    }

    /// The peer asks how the group stands here, and says how it does there.
    package func answerStanding(_ name: String, _ theirs: Standing) async throws -> Standing {
        let group = try home.group(name)
        guard theirs.site == group.entry.peer else {
            throw Refusal(
                "group '\(name)' at '\(home.configuration.site)' has the peer '\(group.entry.peer)'", .refused)
        }
        let mine = await standing(group)
        if isStarted, judge(mine, theirs) == .splitBrain { try await declare(.splitBrain, group) }
        return mine
    }

    /// What a primary does with the peer's answer, while it starts.
    ///
    /// - Parameter seconds: how long a peer that does not answer is asked again.
    /// - Returns: nil when the peer could not be reached.
    func learnStanding(_ group: GroupState, seconds: Double) async throws -> Verdict? {
        let deadline = monotonicNanoseconds() + UInt64(seconds * 1e9)
        while true {
            do {
                let theirs = try await peerStanding(group, seconds: max(1, Int64(seconds)))
                if !isStarted, let untracked = theirs.untracked { try await distrust(group, untracked: untracked) }
                let verdict = judge(await standing(group), theirs)
                switch verdict {
                case .inOrder:
                    if group.record.conflict != nil { try await group.handle.change(.conflict(nil)) }
                case .stale: try await declare(.stale, group)
                case .splitBrain: try await declare(.splitBrain, group)
                case .unrelated: break  // the session's refusal says what to do
                }
                return verdict
            } catch {
                guard monotonicNanoseconds() < deadline else {
                    home.logger.info("group \(group.entry.name): the peer does not answer: \(error)")
                    return nil
                }
                try await Task.sleep(for: .milliseconds(100))
            }
        }
    }

    // MARK: Starting

    /// Whether hosts may write to a primary that starts: not if its peer has taken over.
    func decideService(_ group: GroupState) async throws {
        group.servesHosts = false
        guard group.record.role == .primary, group.record.handingOver == nil else { return }
        guard group.record.peerSite != nil, peerClient(group) != nil else {
            group.servesHosts = true
            return
        }
        switch try await learnStanding(group, seconds: group.entry.isolationTimeout) {
        case .inOrder, .unrelated: group.servesHosts = true
        case .stale, .splitBrain: break
        case nil: try await decideAlone(group)
        }
    }

    /// The peer does not answer: what the operator has decided for this case.
    private func decideAlone(_ group: GroupState) async throws {
        guard group.record.conflict == nil else { return }  // it was told before
        let peer = group.entry.peer
        switch group.entry.onIsolated {
        case .serve: break
        case .refuse:
            group.isolation =
                "'\(peer)' does not answer, and on_isolated is \"refuse\"; `farcopy resume \(group.entry.name) --isolated` serves "
                + "hosts all the same"
            return
        case .command(let command):
            let variables = [
                "FARCOPY_EVENT=on_isolated", "FARCOPY_GROUP=\(group.entry.name)",
                "FARCOPY_SITE=\(home.configuration.site)",
            ]
            if let failure = await OperatorCommand.run(command, variables, group.entry.hooks.timeout) {
                group.isolation = "'\(peer)' does not answer, and on_isolated \(failure)"
                return
            }
        }
        try await group.handle.change(.alone)
        group.servesHosts = true
    }

    /// Serves hosts as soon as the peer says that it has not taken over.
    func awaitPeer(_ group: GroupState) async {
        while !home.isStopping, group.isolation != nil {
            try? await Task.sleep(for: .seconds(1))
            guard group.isolation != nil, let verdict = try? await learnStanding(group, seconds: 0) else { continue }
            group.isolation = nil
            if verdict == .stale || verdict == .splitBrain { return }
            do { try await beginService(group) } catch { home.note(group.entry.name, "\(error)") }
        }
    }

    private func beginService(_ group: GroupState) async throws {
        await home.admitHosts(group)
        try await startMirroring(group)
    }

    /// The operator has made sure that the peer has not taken over.
    package func resumeIsolated(_ name: String) async throws {
        let group = try home.group(name)
        guard group.isolation != nil else {
            throw Refusal("group '\(name)' does not wait for its peer")
        }
        try await group.handle.change(.alone)
        group.isolation = nil
        try await beginService(group)
        home.note(name, "serves hosts without having heard from '\(group.entry.peer)', by command")
    }

    /// The replicator was refused: perhaps the peer has taken over while hosts went on here.
    func reviewAfterRefusal(_ name: String) async {
        guard let group = home.groups[name], group.record.conflict == nil, group.isMirroring else { return }
        await group.turnstile.enter()
        defer { group.turnstile.leave() }
        guard group.isMirroring, let theirs = try? await peerStanding(group) else { return }
        do {
            switch judge(await standing(group), theirs) {
            case .inOrder, .unrelated: return
            case .stale where await shutOutUnlessChanged(group): try await declare(.stale, group)
            case .stale, .splitBrain: try await declare(.splitBrain, group)
            }
            await stopReplication(group)
        } catch {
            home.note(name, "\(error)")
        }
    }

    private func declare(_ kind: Phase.Conflict.Kind, _ group: GroupState) async throws {
        guard group.record.conflict?.kind != kind else { return }
        let conflict = Phase.Conflict(kind: kind, at: realSeconds())
        try await group.handle.change(.conflict(conflict))
        switch kind {
        case .stale:
            home.note(group.entry.name, "'\(group.entry.peer)' has taken over; this site is stale and shuts hosts out")
        case .splitBrain:
            home.note(
                group.entry.name,
                "split-brain: hosts wrote here and at '\(group.entry.peer)'; `farcopy resync \(group.entry.name) --discard "
                    + "SITE` decides which stays")
            home.alert(group, .splitBrain, "hosts wrote at both sites")
        }
    }

    /// Shuts hosts out if none of them has written anything that the peer lacks: a site that served on is not stopped under
    /// its hosts.
    private func shutOutUnlessChanged(_ group: GroupState) async -> Bool {
        guard await standing(group).changedBytes == 0 else { return false }
        await home.shutOutHosts(group)
        // What they had asked for was carried out; nothing more comes.
        guard await standing(group).changedBytes > 0 else { return true }
        await home.admitHosts(group)
        return false
    }

    // MARK: Hosts

    func stopReplication(_ group: GroupState) async {
        if group.isReplicating { await group.endReplication() }
    }

    // MARK: Giving up the role

    /// Makes this site the secondary of its peer: what hosts wrote here and the peer lacks is kept as a FlashCopy, and the
    /// state as a whole as the first recovery point.
    package func yield(_ name: String, _ request: YieldRequest) async throws -> YieldAnswer {
        let group = try home.group(name)
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
        let served = group.servesHosts
        let point = try await run(
            Yield(
                to: request.siteID, generations: request.generations, highestPoint: request.highestPoint,
                lineage: randomIdentity(), volumes: home.members(group).map(\.name), keep: group.entry.keep,
                servesHosts: served), group)
        home.note(name, "'\(request.site)' is the primary; this site has given up that role")
        return yieldAnswer(group, point)
    }

    /// Of two sites that ask each other to give up the role, the one with the smaller identity goes on.
    private func refuseIfOpposite(_ group: GroupState, _ request: YieldRequest) throws {
        guard group.isJoining else { return }
        let name = group.entry.name
        if home.siteRecord.id < request.siteID {
            throw Refusal(
                "'\(home.configuration.site)' is resyncing group '\(name)' the other way round just now, and goes on; nothing of this "
                    + "command was done")
        }
        throw Refusal("group '\(name)' at '\(home.configuration.site)' is changing roles; try again", .passing)
    }

    /// A request that was delayed must not take the role when nobody waits for that any more.
    private func checkStillAsked(_ group: GroupState, _ request: YieldRequest) async throws {
        let theirs = try await peerStanding(group)
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
        try checkVolumes(group, request.site, request.volumes)
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
        let group = try home.group(name)
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
        let theirs = try await peerStanding(group)
        try await run(Join(group.record, theirs, identity: randomIdentity()), group)
        home.note(name, "mirroring to '\(group.entry.peer)' begins; what either site has changed is sent")
    }

    func sessionVolumes(_ group: GroupState) -> [SessionRequest.Volume] {
        home.members(group).map { SessionRequest.Volume(name: $0.name, size: $0.geometry.size) }
    }

    /// Asks for all that the peer has changed, a part at a time; `each` gets words of a bitmap, the index of the first, and the
    /// geometry that the peer counts in.
    func eachPeerChange(
        _ group: GroupState, _ volume: VolumeState, each: ([UInt64], Int, Geometry) async -> Void
    ) async throws {
        var first = 0
        while true {
            let answer = try await callPeer(
                group, Endpoints.changes, [.volume: volume.name, .from: String(first)])
            guard !answer.words.isEmpty else { return }
            guard let geometry = Geometry(size: answer.size, grain: answer.grain), answer.size == volume.geometry.size,
                answer.words.count <= Limits.changedWordsPerAnswer,
                first + answer.words.count <= Bitmap.byteCount(bits: geometry.grainCount) / 8
            else { throw Refusal("the peer's answer about volume '\(volume.name)' makes no sense") }
            var words = answer.words
            if group.record.untracked?[volume.name] != nil {
                for index in words.indices { words[index] = geometry.wordOfAll(first + index) }
            }
            await each(words, first, geometry)
            first += answer.words.count
        }
    }
}
