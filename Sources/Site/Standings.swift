// Standings.swift: which of two sites is the primary of a group, and what a site that returns, or is refused, learns of that.
//
// Must be prevented:
//   hosts write at a site that is stale, if it could have asked
//   hosts that wait for the peer's word are let in although the role was given up to it meanwhile

import API
import Groups
import Ring
import Volumes

/// Which of two sites is primary.
@SiteThread
package final class Standings {
    private let home: Holdings
    private let peers: Peers
    private let distrust: Distrust
    private let replication: Replication

    init(_ home: Holdings, _ peers: Peers, _ distrust: Distrust, _ replication: Replication) {
        (self.home, self.peers, self.distrust, self.replication) = (home, peers, distrust, replication)
    }

    /// The peer asks how the group stands here, and says how it does there.
    package func answerStanding(_ name: String, _ theirs: Standing) async throws -> Standing {
        let group = try home.pair(name, with: theirs.site)
        guard theirs.site == group.entry.peer else {
            throw Refusal(
                "group '\(name)' at '\(home.configuration.site)' has the peer '\(group.entry.peer)'", .refused)
        }
        let mine = await peers.standing(group)
        if home.isStarted, judge(mine, theirs) == .splitBrain { try await declare(.splitBrain, group) }
        return mine
    }

    /// What a primary does with the peer's answer, while it starts.
    ///
    /// - Parameter seconds: how long a peer that does not answer is asked again.
    /// - Returns: nil when the peer could not be reached.
    private func learnStanding(_ group: GroupState, seconds: Double) async throws -> Verdict? {
        let deadline = monotonicNanoseconds() + UInt64(seconds * 1e9)
        while true {
            do {
                let theirs = try await peers.peerStanding(group, seconds: max(1, Int64(seconds)))
                if !home.isStarted, let untracked = theirs.untracked {
                    try await distrust.distrust(group, untracked: untracked)
                }
                let verdict = judge(await peers.standing(group), theirs)
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

    /// Whether hosts may write to a primary that starts: not if its peer has taken over.
    func decideService(_ group: GroupState) async throws {
        group.servesHosts = false
        guard group.record.role == .primary, group.record.handingOver == nil else { return }
        guard group.record.peerSite != nil, peers.peerClient(group) != nil else {
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
            do { try await askPeer(group) } catch { home.note(group.entry.name, "\(error)") }
        }
    }

    private func askPeer(_ group: GroupState) async throws {
        await group.turnstile.enter()
        defer { group.turnstile.leave() }
        // The peer may have taken the role meanwhile.
        guard group.isolation != nil, let verdict = try? await learnStanding(group, seconds: 0) else { return }
        group.isolation = nil
        if verdict == .stale || verdict == .splitBrain { return }
        try await beginService(group)
    }

    private func beginService(_ group: GroupState) async throws {
        await home.admitHosts(group)
        try await replication.startMirroring(group)
    }

    /// The operator has made sure that the peer has not taken over.
    package func resumeIsolated(_ name: String) async throws {
        let group = try home.group(name)
        await group.turnstile.enter()
        defer { group.turnstile.leave() }
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
        guard group.isMirroring, let theirs = try? await peers.peerStanding(group) else { return }
        do {
            switch judge(await peers.standing(group), theirs) {
            case .inOrder, .unrelated: return
            case .stale where await shutOutUnlessChanged(group): try await declare(.stale, group)
            case .stale, .splitBrain: try await declare(.splitBrain, group)
            }
            await replication.stopReplication(group)
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
        guard await peers.standing(group).changedBytes == 0 else { return false }
        await home.shutOutHosts(group)
        // What they had asked for was carried out; nothing more comes.
        guard await peers.standing(group).changedBytes > 0 else { return true }
        await home.admitHosts(group)
        return false
    }
}
