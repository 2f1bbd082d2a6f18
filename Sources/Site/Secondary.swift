// Secondary.swift: the remote half of a group: the intake's sessions, commit, recovery points, failover.
//
// Must be prevented:
//   a write of an earlier session reaches a secondary after a commit (every session ends the one before, and waits)
//   a point is committed out of order, or while writes to the intake are under way
//   a commit is half done after a crash: the group's record alone decides, files come before it and engines after
//   a stale primary goes on writing after a failover

import API
import Base
import FoundationEssentials
import Glibc
import Groups
import NBDServer
import Ring
import Volumes

extension Site {
    func group(_ name: String) throws -> GroupState {
        guard let group = groups[name] else {
            let known = groups.keys.sorted().joined(separator: ", ")
            throw Refusal(
                "there is no group '\(name)' at site '\(configuration.site)'; known: \(known.isEmpty ? "none" : known)",
                .unknown)
        }
        return group
    }

    /// For calls that only the site at the other end of the group may make.
    func group(_ name: String, askedBy siteID: String) throws -> GroupState {
        let group = try group(name)
        guard group.record.peerSite == siteID else {
            throw Refusal("group '\(name)' at '\(configuration.site)' has another peer", .refused)
        }
        return group
    }

    // MARK: Sessions

    func openSession(_ name: String, _ request: SessionRequest) async throws -> SessionAnswer {
        let group = try group(name)
        try checkPeer(group, request)  // not only after a wait, perhaps for the very site that asks
        await group.turnstile.enter()
        defer { group.turnstile.leave() }
        try await group.handle.settle()
        try checkPeer(group, request)
        if group.record.peerSite == nil || group.record.generations != request.generations {
            try await group.handle.change(.paired(site: request.siteID, generations: request.generations))
        }
        if group.record.yielded != nil { try await forgetFormerRole(group) }
        let session = UInt64.random(in: 1...UInt64.max)
        group.session = session
        for volume in members(group) {
            await endIntake(volume, next: session)
            await publish(volume, group)
        }
        note(name, "the replicator of '\(request.site)' has opened a session")
        let newest = group.record.points.last
        return SessionAnswer(
            state: PeerState(
                session: session, site: siteRecord.id, lineage: group.record.lineage ?? "",
                volumeLineages: group.record.volumeLineages, committed: newest),
            exports: members(group).map { intakeName($0.name, session) })
    }

    private func checkPeer(_ group: GroupState, _ request: SessionRequest) throws {
        let name = group.entry.name
        guard group.entry.peer == request.site else {
            throw Refusal(
                "group '\(name)' at '\(configuration.site)' has the peer '\(group.entry.peer)', not '\(request.site)'",
                .refused)
        }
        if let known = group.record.peerSite, known != request.siteID {
            throw Refusal(
                "group '\(name)' at '\(configuration.site)' belongs to another '\(request.site)' (its site identity "
                    + "differs: was its state directory exchanged?); to pair anew, stop '\(configuration.site)' and remove "
                    + state.group(name), .refused)
        }
        if let failover = group.record.failedOver {
            throw Refusal(
                "group '\(name)' has failed over to '\(configuration.site)' at point \(failover.point); "
                    + "'\(request.site)' is stale and must not be written to", .refused)
        }
        guard group.record.role == .secondary else {
            throw Refusal("group '\(name)' is primary at both sites; correct 'role' in one of them", .refused)
        }
        if let newest = group.record.generations.first, !request.generations.contains(newest) {
            throw Refusal(
                "group '\(name)': '\(request.site)' has an older generation than '\(configuration.site)' knows; it is stale",
                .refused)
        }
        try checkVolumes(group, request.site, request.volumes)
    }

    func checkVolumes(_ group: GroupState, _ site: String, _ theirs: [SessionRequest.Volume]) throws {
        let name = group.entry.name
        let ours = members(group).map { ($0.name, $0.geometry.size) }
        guard ours.map(\.0) == theirs.map(\.name) else {
            throw Refusal(
                "group '\(name)' has the volumes \(ours.map(\.0)) at '\(configuration.site)' and "
                    + "\(theirs.map(\.name)) at '\(site)'; make them alike, in the same order",
                .refused)
        }
        for (mine, theirs) in zip(ours, theirs) where mine.1 != theirs.size {
            throw Refusal(
                "volume '\(mine.0)' of group '\(name)' has \(mine.1) bytes at '\(configuration.site)' and \(theirs.size) at "
                    + "'\(site)'; make them the same size", .refused)
        }
    }

    /// The primary has taken what this site had changed into its own bitmaps, or it would not open a session.
    private func forgetFormerRole(_ group: GroupState) async throws {
        for volume in members(group) {
            let number = volume.number
            await volume.reactor.run { $0.hosted(number).volume.forgetChanges() }
        }
        try await group.handle.change(.yieldIsKnown)
    }

    /// Ends the intake's connections, waits until nothing of them is under way, and lets only `next` in.
    private func endIntake(_ volume: VolumeState, next: UInt64) async {
        let number = volume.number
        let reactor = volume.reactor
        await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
            reactor.perform { reactor in
                reactor.hosted(number).intakeSession = next
                reactor.disconnect(number, .intake) { continuation.resume() }
            }
        }
    }

    // MARK: Commit

    func commit(_ name: String, _ request: CommitRequest) async throws -> CommitAnswer {
        let group = try group(name)
        await group.turnstile.enter()
        defer { group.turnstile.leave() }
        guard group.record.peerSite == request.siteID, group.session == request.session else {
            throw Refusal("point \(request.number) comes from a session that has ended", .refused)
        }
        if let done = group.record.hasCommitted(request.number) {
            return CommitAnswer(committedAt: done.committedAt ?? done.formedAt)  // asked again
        }
        guard request.number <= PointRecord.highestNumber, (0...PointRecord.latestTime).contains(request.formedAt)
        else {
            throw Refusal("point \(request.number) of \(request.formedAt) cannot be", .refused)
        }
        var writes = 0
        let members = members(group)
        for volume in members { writes += await writesUnderWay(volume) }
        try await VolumeState.flushSources(members)
        let plan: CommitPlan
        do {
            plan = try group.record.planCommit(
                request.number, after: request.previous, formedAt: request.formedAt, now: realSeconds(),
                order: members.map(\.nextOrder).max() ?? CopyRecord.orderStep, keep: group.entry.keep,
                left: retiredAndGone(group), writesUnderWay: writes)
        } catch {
            throw Refusal("group '\(name)': \(error)", .refused)
        }
        try await carryOut(plan, as: .committed(plan), group)
        if group.record.untracked != nil { try? await group.handle.change(.sentAnew(session: request.session)) }
        return CommitAnswer(committedAt: plan.point.committedAt ?? plan.point.formedAt)
    }

    private func retiredAndGone(_ group: GroupState) -> Set<UInt64> {
        let members = members(group)
        let numbers = (group.record.retired ?? []).map(\.number)
        return Set(numbers.filter { number in members.allSatisfy { $0.copies[CopyID(number)] == nil } })
    }

    private func writesUnderWay(_ volume: VolumeState) async -> Int {
        let number = volume.number
        return await volume.reactor.run { $0.hosted(number).volume.modifyingInFlight }
    }

    func carryOut(_ plan: CommitPlan, as decision: GroupChange, _ group: GroupState) async throws {
        let members = members(group)
        var files: [CopyFiles] = []
        for step in CommitStep.allCases {
            switch step {
            case .files: files = try await makePointFiles(members, CopyID(plan.point.number))
            case .record:
                for volume in members { volume.nextOrder = (plan.point.order ?? 0) + CopyRecord.orderStep }
                do {
                    try await group.handle.change(decision)
                } catch {
                    // The file may hold the point all the same, and a start would take it then as the volumes are: nothing more is
                    // let in until the record was saved again.
                    group.session = nil
                    for volume in members { await endIntake(volume, next: 0) }
                    throw error
                }
            case .chains:
                for (volume, made) in zip(members, files) { await takePoint(volume, plan, made, group) }
            }
        }
    }

    /// Targets and bitmaps of a point, on stable storage. What was made goes again when there is no room for all.
    private func makePointFiles(_ members: [VolumeState], _ id: CopyID) async throws -> [CopyFiles] {
        try descriptors.require(2 * members.count)
        for volume in members { try await makeRoom(volume) }
        do { return try await disks.each(members.map { $0.newPoint(id) }) { try $0.make() } } catch {
            for volume in members where volume.copies[id] == nil { volume.removeCopyFiles(id, targetOwner: id) }
            throw error
        }
    }

    private func takePoint(_ volume: VolumeState, _ plan: CommitPlan, _ files: CopyFiles, _ group: GroupState) async {
        await enterChain(volume, CopyRecord(plan.point), files) { $0.addCopy($1) }
        let (number, ids) = (volume.number, plan.dropped.map { CopyID($0.number) })
        volume.reactor.perform { reactor in
            for id in ids { reactor.hosted(number).volume.withdrawCopy(id) }
        }
        await publish(volume, group)
    }

    /// Points that readers keep open past their retention must not fill the chain.
    private func makeRoom(_ volume: VolumeState) async throws {
        let number = volume.number
        await volume.reactor.run { reactor in
            let engine = reactor.hosted(number).volume
            if engine.chainCount >= Limits.copiesPerVolume - 4, let oldest = engine.oldestCopy {
                reactor.disconnectReaders(number, of: oldest.id)
            }
        }
        guard volume.copies.count < Limits.copiesPerVolume - 2 else {
            throw Refusal("volume '\(volume.name)' has \(volume.copies.count) copies; withdraw some", .passing)
        }
    }

    // MARK: Failover

    /// Makes a recovery point the read-write volumes of the group. Data flows back in the background.
    package func failover(_ name: String, point wanted: UInt64?) async throws -> FailoverReport {
        let group = try group(name)
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
        let point: PointRecord
        do {
            point = try group.record.failoverPoint(wanted)
        } catch {
            throw Refusal("group '\(name)' at '\(configuration.site)': \(error)")
        }
        // The old primary may still say what it has not sent. It is not waited for.
        let unsent = try? await peerStanding(group, seconds: 1)
        let discarded = try await takeOver(group, point, joins: false)
        note(name, "failed over to point \(point.number)")
        return FailoverReport(point, discarded: discarded, unsent: unsent?.changedBytes, now: realSeconds())
    }

    /// - Returns: bytes that had arrived after the point and are not part of it.
    @discardableResult
    func takeOver(_ group: GroupState, _ point: PointRecord, joins: Bool) async throws -> UInt64 {
        let left = members(group).map(\.name).filter { !group.record.holds(point, $0) }
        if !left.isEmpty {
            note(
                group.entry.name,
                "point \(point.number) has no part of \(left.joined(separator: ", ")), which joined the group later and is left out; "
                    + "take it out of the group's configuration at both sites")
        }
        let members = members(group).filter { !left.contains($0.name) }
        guard !members.isEmpty else { throw Refusal("point \(point.number) has no part of any volume of the group") }
        let id = CopyID(point.number)
        var discarded: UInt64 = 0
        await runCommand(group, .beforeFailover, ["FARCOPY_POINT=\(point.number)"])
        for step in FailoverStep.allCases {
            switch step {
            case .fence:
                group.session = nil
                for volume in members { await endIntake(volume, next: 0) }
            case .differences:
                reserve.release()  // whatever is full
                do {
                    for volume in members { discarded += try await prepareRestore(volume, from: id) }
                } catch {
                    for volume in members { volume.restoreBitmap = nil }
                    throw error
                }
            case .record:
                let takeover = Takeover(
                    point: point.number, volumes: members.map(\.name), leftOut: left, generation: randomIdentity(),
                    at: realSeconds(), joins: joins)
                do {
                    try await group.handle.change(.failedOver(takeover))
                } catch {
                    // Nothing is restored. The files stay: should the record's file hold the failover, a start carries it out.
                    for volume in members { volume.restoreBitmap = nil }
                    throw error
                }
            case .open:
                group.servesHosts = true
                var written: UInt64 = 0
                for volume in members { written += try await open(volume, id, group) }
                group.writtenAtFailover = written
            }
        }
        await runCommand(group, .afterFailover, ["FARCOPY_POINT=\(point.number)"])
        return discarded
    }

    private func open(_ volume: VolumeState, _ id: CopyID, _ group: GroupState) async throws -> UInt64 {
        let number = volume.number
        await beginRestore(volume, from: id, fresh: false)
        try await startActivityLog(volume)
        let written = await volume.reactor.run { reactor in
            let hosted = reactor.hosted(number)
            hosted.volume.policy = .hostFirst
            hosted.volume.recording = true
            hosted.writable = true
            return hosted.bytesWritten
        }
        await publish(volume, group)
        return written
    }

    /// Writes down, durably, which grains must come back from the point: to restore them, and because the old primary's
    /// bitmaps take them for sent.
    ///
    /// - Returns: their bytes.
    private func prepareRestore(_ volume: VolumeState, from id: CopyID) async throws -> UInt64 {
        let file = try makeRestoreBitmap(volume)
        let number = volume.number
        let grains = await volume.reactor.run { reactor in
            let engine = reactor.hosted(number).volume
            engine.markDifferences(from: id, in: file.bitmap())
            engine.markChanged(file.bitmap())
            return file.bitmap().population()
        }
        try file.synchronize()
        try volume.recording.synchronize()
        return UInt64(grains) * UInt64(volume.geometry.grain)
    }
}
