// Secondary.swift: the remote half of a group: the intake's sessions, commit, recovery points, failover.
//
// Must be prevented:
//   a write of an earlier session reaches a secondary after a commit (every session ends the one before, and waits)
//   a point is committed out of order, or while writes to the intake are under way
//   a commit is half done after a crash: the group's record alone decides, files come before it and engines after
//   a stale primary goes on writing after a failover

import Base
import FoundationEssentials
import Glibc
import NBDServer
import Replication
import Ring
import Volumes

struct SessionRequest: Codable, Sendable {
    struct Volume: Codable, Sendable {
        var name: String
        var size: UInt64
    }
    var site: String
    var siteID: String
    var volumes: [Volume]
    var generations: [String]
    var lastCommitted: UInt64?
}

struct SessionAnswer: Codable, Sendable {
    var state: PeerState
    var exports: [String]
}

struct CommitRequest: Codable, Sendable {
    var siteID: String
    var session: UInt64
    var number: UInt64
    var previous: UInt64?
    var formedAt: Double
}

struct CommitAnswer: Codable, Sendable { var committedAt: Double }

extension Site {
    func group(_ name: String) throws -> GroupState {
        guard let group = groups[name] else {
            let known = groups.keys.sorted().joined(separator: ", ")
            throw SiteError(
                "there is no group '\(name)' at site '\(configuration.site)'; known: \(known.isEmpty ? "none" : known)",
                status: 404)
        }
        return group
    }

    private func members(_ group: GroupState) -> [VolumeState] {
        group.entry.volumes.compactMap { volumes[$0] }
    }

    // MARK: Sessions

    func openSession(_ name: String, _ request: SessionRequest) async throws -> SessionAnswer {
        let group = try group(name)
        await group.turnstile.enter()
        defer { group.turnstile.leave() }
        try checkPeer(group, request)
        if group.record.peerSite == nil || group.record.generations != request.generations {
            group.record.peerSite = request.siteID
            group.record.generations = request.generations
            try group.save()
        }
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
                session: session, site: siteRecord.id, lineage: group.record.lineage ?? "", committed: newest),
            exports: group.entry.volumes.map { intakeName($0, session) })
    }

    private func checkPeer(_ group: GroupState, _ request: SessionRequest) throws {
        let name = group.entry.name
        guard group.entry.peer == request.site else {
            throw SiteError(
                "group '\(name)' at '\(configuration.site)' has the peer '\(group.entry.peer)', not '\(request.site)'",
                status: 403)
        }
        if let known = group.record.peerSite, known != request.siteID {
            throw SiteError(
                "group '\(name)' at '\(configuration.site)' belongs to another '\(request.site)' (its site identity "
                    + "differs: was its state directory exchanged?); to pair anew, stop '\(configuration.site)' and remove "
                    + state.group(name), status: 403)
        }
        if let failover = group.record.failedOver {
            throw SiteError(
                "group '\(name)' has failed over to '\(configuration.site)' at point \(failover.point); "
                    + "'\(request.site)' is stale and must not be written to", status: 403)
        }
        guard group.record.role == .secondary else {
            throw SiteError("group '\(name)' is primary at both sites; correct 'role' in one of them", status: 403)
        }
        if let newest = group.record.generations.first, !request.generations.contains(newest) {
            throw SiteError(
                "group '\(name)': '\(request.site)' has an older generation than '\(configuration.site)' knows; it is stale",
                status: 403)
        }
        let ours = members(group).map { ($0.name, $0.geometry.size) }
        guard ours.map(\.0) == request.volumes.map(\.name) else {
            throw SiteError(
                "group '\(name)' has the volumes \(ours.map(\.0)) at '\(configuration.site)' and "
                    + "\(request.volumes.map(\.name)) at '\(request.site)'; make them alike, in the same order",
                status: 403)
        }
        for (mine, theirs) in zip(ours, request.volumes) where mine.1 != theirs.size {
            throw SiteError(
                "volume '\(mine.0)' of group '\(name)' has \(mine.1) bytes at '\(configuration.site)' and \(theirs.size) at "
                    + "'\(request.site)'; make them the same size", status: 403)
        }
    }

    /// Ends the intake's connections, waits until nothing of them is under way, and lets only `next` in.
    private func endIntake(_ volume: VolumeState, next: UInt64) async {
        let number = volume.number
        let reactor = volume.reactor
        await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
            reactor.perform { reactor in
                reactor.hosted(number).intakeSession = next
                reactor.disconnect(number, intakeOnly: true) { continuation.resume() }
            }
        }
    }

    // MARK: Commit

    func commit(_ name: String, _ request: CommitRequest) async throws -> CommitAnswer {
        let group = try group(name)
        await group.turnstile.enter()
        defer { group.turnstile.leave() }
        guard group.record.failedOver == nil, group.record.role == .secondary else {
            throw SiteError("group '\(name)' has failed over to '\(configuration.site)'", status: 403)
        }
        guard group.record.peerSite == request.siteID, group.session == request.session else {
            throw SiteError("point \(request.number) comes from a session that has ended", status: 403)
        }
        let newest = group.record.points.last
        if let newest, newest.number == request.number {
            return CommitAnswer(committedAt: newest.committedAt ?? newest.formedAt)  // asked again
        }
        guard newest?.number == request.previous, request.number > newest?.number ?? 0 else {
            throw SiteError(
                "point \(request.number) is out of order: the newest here is \(newest.map { String($0.number) } ?? "none"), "
                    + "the primary expects \(request.previous.map(String.init) ?? "none")", status: 403)
        }
        try await requireQuiet(group)
        return try await take(request, group)
    }

    /// The primary commits only what was acknowledged and flushed, so nothing of it can be under way.
    private func requireQuiet(_ group: GroupState) async throws {
        for volume in members(group) {
            let writes = await writesUnderWay(volume)
            if writes > 0 { throw Self.notQuiet(volume.name, writes) }
            try volume.source.synchronize()
        }
    }

    private func writesUnderWay(_ volume: VolumeState) async -> Int {
        let number = volume.number
        return await volume.reactor.run { $0.hosted(number).volume.modifyingInFlight }
    }

    private static func notQuiet(_ volume: String, _ writes: Int) -> SiteError {
        SiteError("volume '\(volume)' has \(writes) writes to its intake under way", status: 403)
    }

    private func take(_ request: CommitRequest, _ group: GroupState) async throws -> CommitAnswer {
        let id = CopyID(request.number)
        let members = members(group)
        var files: [CopyFiles] = []
        for volume in members {
            try await makeRoom(volume)
            let pair = try volume.openPoint(id, create: true)
            try pair.target.synchronize()
            try pair.bitmap.file.synchronize()
            try synchronizeDirectory("\(volume.directory)/copies")
            files.append(pair)
        }
        let order = members.map(\.nextOrder).max() ?? 1
        for volume in members { volume.nextOrder = order + CopyRecord.orderStep }
        let now = realSeconds()
        var points = group.record.points
        points.append(
            PointRecord(number: request.number, formedAt: request.formedAt, committedAt: now, order: order))
        let dropped = points.prefix(max(0, points.count - group.entry.keep))
        points.removeFirst(dropped.count)
        group.record.points = points
        try group.save()  // the decision: from here on the point is committed
        for (volume, pair) in zip(members, files) {
            var record = CopyRecord(id: id, name: "", createdAt: now, order: order, state: .active)
            record.isDurable = true
            await enterChain(volume, record, pair) { $0.addCopy($1) }
            let (number, ids) = (volume.number, dropped.map { CopyID($0.number) })
            volume.reactor.perform { reactor in
                for id in ids { reactor.hosted(number).volume.withdrawCopy(id) }
            }
            await publish(volume, group)
        }
        return CommitAnswer(committedAt: now)
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
            throw SiteError("volume '\(volume.name)' has \(volume.copies.count) copies; withdraw some", status: 503)
        }
    }

    // MARK: Failover

    /// Makes a recovery point the read-write volumes of the group. Data flows back in the background.
    func failover(_ name: String, point wanted: UInt64?) async throws -> PointRecord {
        let group = try group(name)
        await group.turnstile.enter()
        defer { group.turnstile.leave() }
        if let done = group.record.failedOver {
            if wanted == nil || wanted == done.point,
                let point = group.record.points.first(where: { $0.number == done.point })
            {
                return point
            }
            throw SiteError("group '\(name)' has failed over to point \(done.point) already")
        }
        guard group.record.role == .secondary else {
            throw SiteError("group '\(name)' is primary at '\(configuration.site)' already; fail over at its peer")
        }
        guard let newest = group.record.points.last else {
            throw SiteError("group '\(name)' has no recovery point yet: its first copy is not complete")
        }
        let number = wanted ?? newest.number
        guard let point = group.record.points.first(where: { $0.number == number }) else {
            let known = group.record.points.map { String($0.number) }.joined(separator: ", ")
            throw SiteError("group '\(name)' has no point \(number); it has \(known)", status: 404)
        }
        group.session = nil
        for volume in members(group) { await endIntake(volume, next: 0) }
        try await takeOver(group, point)
        note(name, "failed over to point \(number)")
        return point
    }

    private func takeOver(_ group: GroupState, _ point: PointRecord) async throws {
        let members = members(group)
        let id = CopyID(point.number)
        for volume in members { try await prepareRestore(volume, from: id) }
        group.record.role = .primary
        group.record.failedOver = GroupRecord.Failover(
            point: point.number, at: realSeconds(), restoring: members.map(\.name))
        group.record.generations.insert(randomIdentity(), at: 0)
        try group.save()  // the decision
        for volume in members {
            let number = volume.number
            await beginRestore(volume, from: id, fresh: false)
            try await startActivityLog(volume)
            await volume.reactor.run { reactor in
                let hosted = reactor.hosted(number)
                hosted.volume.policy = .hostFirst
                hosted.volume.recording = true
                hosted.writable = true
            }
            volume.record.servedAs = group.servedAs
            try volume.recordFile.save(volume.record)
            await publish(volume, group)
        }
    }

    /// Writes down, durably, which grains must come back from the point.
    private func prepareRestore(_ volume: VolumeState, from id: CopyID) async throws {
        let file = try BitmapFile(
            path: "\(volume.directory)/restore.bitmap",
            header: BitmapHeader(.restore, volume: volume.identity, geometry: volume.geometry), create: true)
        volume.restoreBitmap = file
        let number = volume.number
        await volume.reactor.run { reactor in
            reactor.hosted(number).volume.markDifferences(from: id, in: file.bitmap())
        }
        try file.synchronize()
        try synchronizeDirectory(volume.directory)
    }
}
