// Intake.swift: the remote half of a group: the intake's sessions, commit, recovery points, failover.
//
// Must be prevented:
//   a write of an earlier session reaches a secondary after a commit (every session ends the one before, and waits)
//   a point is committed out of order, or while writes to the intake are under way
//   a commit is half done after a crash: the group's record alone decides, files come before it and engines after
//   a stale primary goes on writing after a failover

import API
import Base
import Glibc
import Groups
import NBDServer
import Ring
import Volumes

/// The remote half of a group.
@SiteThread
package final class Intake {
    private let home: Holdings
    private let peers: Peers
    private let steps: StepExecutor
    private let removal: PointRemoval

    init(_ home: Holdings, _ peers: Peers, _ steps: StepExecutor, _ removal: PointRemoval) {
        (self.home, self.peers, self.steps, self.removal) = (home, peers, steps, removal)
    }

    /// A session of the peer; what `keep` does not cover makes room before anything is sent.
    package func acceptSession(_ name: String, _ request: SessionRequest) async throws -> SessionAnswer {
        let answer = try await openSession(name, request)
        let group = try home.pair(name, with: request.site)
        await group.turnstile.enter()
        defer { group.turnstile.leave() }
        await removal.applyRetention(group)
        return answer
    }

    /// Commits a point; a refusal is told here as well, where the reason lies, not only by the primary.
    package func takeCommit(_ name: String, _ request: CommitRequest) async throws -> CommitAnswer {
        do {
            let answer = try await commit(name, request)
            if let group = try? home.group(name, askedBy: request.siteID) { home.endAlert(group, .refused) }
            return answer
        } catch {
            // What an ended session asks for is nobody's concern.
            if let group = try? home.group(name, askedBy: request.siteID), group.session == request.session {
                home.alert(group, .refused, "point \(request.number) could not be committed: \(error)")
            }
            throw error
        }
    }

    /// A write or flush of the primary failed.
    ///
    /// - Parameter copy: the recovery point or FlashCopy that did not take old content; nil = the volume's own file.
    func writeRefused(_ volume: VolumeState, _ group: GroupState, _ copy: CopyID?, _ errno: Int32) {
        let path =
            copy.map { id in
                let record = volume.record.copies.first { $0.id == id }
                return record?.target ?? volume.targetPath(record?.targetOwner ?? id)
            } ?? volume.source.path
        home.alert(
            group, .refused,
            "volume \(volume.name): what '\(group.entry.peer)' sends cannot be written: \(path): \(String(cString: strerror(errno)))"
        )
    }

    // MARK: Sessions

    private func openSession(_ name: String, _ request: SessionRequest) async throws -> SessionAnswer {
        let group = try home.pair(name, with: request.site)
        try checkPeer(group, request)  // not only after a wait, perhaps for the very site that asks
        await group.turnstile.enter()
        defer { group.turnstile.leave() }
        try checkPeer(group, request)
        try await takeClaims(group, request)
        try checkVolumes(group, request.site, request.volumes)
        try refuseWhilePrepared(group)
        let session = try await steps.run(
            IntakeSession(
                site: request.siteID, generations: request.generations, session: UInt64.random(in: 1...UInt64.max)),
            group)
        home.note(name, "the replicator of '\(request.site)' has opened a session")
        let newest = group.record.points.last
        return SessionAnswer(
            state: PeerState(
                session: session, site: home.siteRecord.id, lineage: group.record.lineage ?? "",
                volumeLineages: group.record.volumeLineages, committed: newest),
            exports: home.members(group).map { home.intakeName($0.name, session) })
    }

    /// Data of the next point would be in it.
    private func refuseWhilePrepared(_ group: GroupState) throws {
        guard let point = group.record.undecided else { return }
        throw Refusal(
            "group '\(group.entry.name)' at '\(home.configuration.site)' has prepared point \(point), and it is not decided yet; should "
                + "its coordinator have lost its record, `farcopy abort cycle:\(group.entry.group)` at '\(home.configuration.site)' decides it",
            .passing)
    }

    private func checkPeer(_ group: GroupState, _ request: SessionRequest) throws {
        let name = group.entry.name
        guard group.entry.peer == request.site else {
            throw Refusal(
                "group '\(name)' at '\(home.configuration.site)' has the peer '\(group.entry.peer)', not '\(request.site)'",
                .refused)
        }
        if let known = group.record.peerSite, known != request.siteID {
            throw Refusal(
                "group '\(name)' at '\(home.configuration.site)' belongs to another '\(request.site)' (its site identity "
                    + "differs: was its state directory exchanged?); to pair anew, stop '\(home.configuration.site)' and remove "
                    + home.state.group(name), .refused)
        }
        if let failover = group.record.failedOver {
            throw Refusal(
                "group '\(name)' has failed over to '\(home.configuration.site)' at point \(failover.point); "
                    + "'\(request.site)' is stale and must not be written to", .refused)
        }
        guard group.record.role == .secondary else {
            throw Refusal("group '\(name)' is primary at both sites; correct 'role' in one of them", .refused)
        }
        if let newest = group.record.generations.first, !request.generations.contains(newest) {
            throw Refusal(
                "group '\(name)': '\(request.site)' has an older generation than '\(home.configuration.site)' knows; it is stale",
                .refused)
        }
    }

    /// The host says which volumes of the group are its own.
    private func takeClaims(_ group: GroupState, _ request: SessionRequest) async throws {
        for volume in request.volumes {
            guard let other = home.group(ofVolume: volume.name), other !== group, !other.entry.isPool,
                other.entry.group == group.entry.group
            else { continue }
            throw Refusal(
                "volume '\(volume.name)' of group '\(group.entry.group)' at '\(home.configuration.site)' is mirrored by "
                    + "'\(other.entry.peer)', and '\(request.site)' has it too; a volume is one host's", .refused)
        }
        let sizes = Dictionary(request.volumes.map { ($0.name, $0.size) }, uniquingKeysWith: { first, _ in first })
        // What does not fit is told by `checkVolumes`, and stays anybody's.
        let fitting = request.volumes.map(\.name).filter { home.volumes[$0]?.geometry.size == sizes[$0] }
        let new = try home.claim(fitting, for: group)
        guard !new.isEmpty else { return }
        try await group.handle.change(
            .started(
                Membership(
                    volumes: group.entry.volumes,
                    foreign: Dictionary(uniqueKeysWithValues: new.map { ($0, randomIdentity()) }), exchanged: [],
                    lineage: randomIdentity())))
    }

    func checkVolumes(_ group: GroupState, _ site: String, _ theirs: [SessionRequest.Volume]) throws {
        let name = group.entry.name
        let ours = home.members(group).map { ($0.name, $0.geometry.size) }
        guard ours.map(\.0) == theirs.map(\.name) else {
            throw Refusal(
                "group '\(name)' has the volumes \(ours.map(\.0)) at '\(home.configuration.site)' and "
                    + "\(theirs.map(\.name)) at '\(site)'; make them alike, in the same order",
                .refused)
        }
        for (mine, theirs) in zip(ours, theirs) where mine.1 != theirs.size {
            throw Refusal(
                "volume '\(mine.0)' of group '\(name)' has \(mine.1) bytes at '\(home.configuration.site)' and \(theirs.size) at "
                    + "'\(site)'; make them the same size", .refused)
        }
    }

    // MARK: Commit

    private func commit(_ name: String, _ request: CommitRequest) async throws -> CommitAnswer {
        let group = try home.pair(name, withID: request.siteID)
        await group.turnstile.enter()
        defer { group.turnstile.leave() }
        guard group.record.peerSite == request.siteID, group.session == request.session else {
            throw Refusal("point \(request.number) comes from a session that has ended", .refused)
        }
        guard request.number <= PointRecord.highestNumber, (0...PointRecord.latestTime).contains(request.formedAt)
        else {
            throw Refusal("point \(request.number) of \(request.formedAt) cannot be", .refused)
        }
        do {
            let point = try await steps.run(
                RemoteCommit(
                    number: request.number, after: request.previous, formedAt: request.formedAt,
                    keep: group.entry.keep, session: request.session), group)
            return CommitAnswer(committedAt: point.committedAt ?? point.formedAt)
        } catch let refusal as TakeoverRefusal {
            throw Refusal("group '\(name)': \(refusal)", .refused)
        }
    }

    // MARK: Failover

    /// Makes a recovery point the read-write volumes of the group. Data flows back in the background.
    package func failover(_ name: String, point wanted: UInt64?) async throws -> FailoverReport {
        try await failover(try home.group(name), point: wanted)
    }

    func failover(
        _ group: GroupState, point wanted: UInt64?, ifNewestIs newest: UInt64? = nil
    ) async throws -> FailoverReport {
        let name = group.entry.name
        await group.turnstile.enter()
        defer { group.turnstile.leave() }
        if let done = group.record.failedOver {
            if wanted == nil || wanted == done.point,
                let point = group.record.points.first(where: { $0.number == done.point })
            {
                return FailoverReport(point, discarded: 0, unsent: nil, now: realSeconds())
            }
            throw Refusal("group '\(name)' has failed over to point \(done.point) already")
        }
        if let newest, group.record.isOvertaken(since: newest) { throw OvertakenFailover() }
        let point: PointRecord
        do {
            point = try group.record.failoverPoint(wanted)
        } catch {
            throw Refusal("group '\(group.entry.group)' at '\(home.configuration.site)': \(error)")
        }
        // The old primary may still say what it has not sent. It is not waited for.
        let unsent = try? await peers.peerStanding(group, seconds: 1)
        let discarded = try await takeOver(group, point, joins: false)
        home.note(name, "failed over to point \(point.number)")
        return FailoverReport(point, discarded: discarded, unsent: unsent?.changedBytes, now: realSeconds())
    }

    /// - Returns: bytes that had arrived after the point and are not part of it.
    @discardableResult
    func takeOver(_ group: GroupState, _ point: PointRecord, joins: Bool) async throws -> UInt64 {
        let names = home.members(group).map(\.name)
        let (held, left) = (
            names.filter { group.record.holds(point, $0) }, names.filter { !group.record.holds(point, $0) }
        )
        if !left.isEmpty {
            home.note(
                group.entry.name,
                "point \(point.number) has no part of \(left.joined(separator: ", ")), which joined the group later and is left out; "
                    + "take it out of the group's configuration at both sites")
        }
        guard !held.isEmpty else { throw Refusal("point \(point.number) has no part of any volume of the group") }
        await home.runCommand(group, .beforeFailover, ["FARCOPY_POINT=\(point.number)"])
        let discarded = try await steps.run(
            Failover(
                Takeover(
                    point: point.number, volumes: held, leftOut: left, generation: randomIdentity(), at: realSeconds(),
                    joins: joins)), group)
        await home.runCommand(group, .afterFailover, ["FARCOPY_POINT=\(point.number)"])
        return discarded
    }
}
