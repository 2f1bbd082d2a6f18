// Replication.swift: a primary's sending: its replicator begins and ends, and what an operator asks of it.

import API
import Base
import Etcd
import Groups
import Link
import NBDServer
import Ring
import SiteConfiguration
import Volumes

/// A primary's sending begins and ends.
@SiteThread
package final class Replication {
    private let home: Holdings
    private let changeVolumes: ChangeVolumes
    /// The peer refuses this site; perhaps it has taken over.
    var whenRefused: @Sendable (String) async -> Void = { _ in }

    init(_ home: Holdings, _ changeVolumes: ChangeVolumes) {
        (self.home, self.changeVolumes) = (home, changeVolumes)
    }

    func startReplication(_ group: GroupState) async throws {
        guard let peer = home.configuration.peers[group.entry.peer] else { return }
        // Half of it would be a point. It begins when the restore is done.
        guard !home.isBeingRestored(group) else { return }
        try await alignPoint(group)
        let members = home.members(group)
        var volumes: [ReplicatedVolume] = []
        for volume in members { volumes.append(try await replicated(volume, group)) }
        let name = group.entry.name
        try startElection(group)
        let slotBytes = max(Limits.linkSlotBytes, members.map(\.geometry.grain).max() ?? 0)
        let link = group.entry.link
        await group.begin(
            Replicator.Configuration(
                settings: Cycle.Settings(
                    mode: group.entry.mode, interval: group.entry.interval, volumes: members.count,
                    window: Limits.linkWindowBytes / slotBytes, part: try part(group)),
                volumes: volumes,
                address: peer.nbd,
                tls: LinkTLS(
                    policy: peer.tls, files: home.configuration.nbd.files, user: peer.tlsUser),
                peer: replicationPeer(group, peer),
                connectionsPerVolume: link.connections ?? max(1, 4 / members.count), compare: link.compare,
                stallTimeout: link.stallTimeout, rate: group.entry.rate(group.record, at: realSeconds()),
                log: { [home] text in
                    home.note(name, text)
                    Task { await home.happened() }
                },
                refused: { [whenRefused] in Task { await whenRefused(name) } }, others: others(group),
                asksForPoint: asksForPoint(group)))
    }

    /// What this site, as primary, is to a group with several hosts.
    private func part(_ group: GroupState) throws -> Cycle.Part {
        guard let several = group.entry.several, !group.actsAlone else { return .alone }
        guard let pairs = group.pairNames, let index = pairs.firstIndex(of: several.pair) else {
            home.note(
                group.entry.name,
                "the group's other hosts are not known here, since no point of theirs has come; points are of this pair alone"
            )
            return .alone
        }
        return .several(
            try Coordinator.Settings(
                hosts: pairs.count, remotes: pairs.count, maxCoordination: several.maxCoordination,
                hostNames: pairs.map { "'\($0)'" }, remoteNames: pairs.map { "the remote of '\($0)'" }),
            index: index, isElected(several) ? .elected : coordinates(group, several) ? .here : .elsewhere)
    }

    /// The configured master does; where the remotes are primary, the first of them, by the first of its pairs.
    private func coordinates(_ group: GroupState, _ several: Configuration.SeveralEntry) -> Bool {
        guard several.hosts.isEmpty else { return several.master == home.configuration.site }
        let site = home.configuration.site
        let places = group.record.coordination?.places ?? []
        return group.fellows.first == site && places.first { $0.remote == site }?.host == several.pair
    }

    /// Where points are formed from another site, or another pair of this one: how that is asked for one.
    private func asksForPoint(_ group: GroupState) -> (@Sendable () async -> String?)? {
        guard let several = group.entry.several, !group.actsAlone, !coordinates(group, several) else { return nil }
        let (name, site) = (group.entry.group, home.configuration.site)
        let peers = home.configuration.peers
        if isElected(several) {
            return { [election = group.election] in
                guard let master = election?.master else { return "no site coordinates the group just now, by etcd" }
                return master == site ? nil : await Self.ask(master, peers[master], name)
            }
        }
        let master = several.hosts.isEmpty ? group.fellows.first ?? site : several.master ?? site
        if master == site {
            return { [home] in
                await home.requestPoint(name) ? nil : "the pair that coordinates the group does not mirror"
            }
        }
        return { await Self.ask(master, peers[master], name) }
    }

    /// - Returns: why the master could not be asked for a point.
    private nonisolated static func ask(
        _ master: String, _ peer: Configuration.PeerEntry?, _ name: String
    ) async -> String? {
        guard let address = peer?.control else { return "the group's master, '\(master)', is unknown here" }
        do {
            _ = try await ControlClient(address: address).call(Endpoints.cycle, name, [.wait: "false"], seconds: 10)
            return nil
        } catch {
            return "the group's master, '\(master)', cannot be asked for a point: \(error)"
        }
    }

    private func startElection(_ group: GroupState) throws {
        guard let several = group.entry.several, !group.actsAlone, isElected(several), group.pairNames != nil,
            let settings = home.configuration.coordination
        else { return }
        let client = try EtcdClient(settings.etcd)
        let name = group.entry.name
        let election = Election(
            client, Election.Keys(prefix: settings.prefix, group: group.entry.group), site: home.configuration.site,
            handle: group.handle, leaseSeconds: settings.leaseSeconds,
            note: { [home] text in home.note(name, text) },
            problem: { [board = group.board] problem in board.facts.withLock { $0.electionProblem = problem } })
        group.election = election
        election.start()
    }

    /// By etcd, where this site is a host; where the remotes are, the first of them coordinates.
    private func isElected(_ several: Configuration.SeveralEntry) -> Bool {
        several.master == Configuration.SeveralEntry.etcd
    }

    private func others(_ group: GroupState) -> (any CoordinationClient)? {
        guard let several = group.entry.several, !group.actsAlone, isElected(several) || coordinates(group, several),
            let pairs = group.pairNames
        else {
            return nil
        }
        let (handle, name) = (group.handle, group.entry.group)
        return CoordinationPeers(
            group.entry, pairs: pairs, isForward: !several.hosts.isEmpty, site: home.configuration.site,
            peers: home.configuration.peers,
            goesOnWithoutLost: several.goesOnWithoutLost,
            local: { [home] pair in await home.handle(name, pair) },
            learned: { places in
                guard handle.record.coordination?.places != places else { return }
                try? await handle.change(.places(places))
            }, recorded: { handle.record.coordination?.places ?? [] })
    }

    private func replicated(_ volume: VolumeState, _ group: GroupState) async throws -> ReplicatedVolume {
        let (place, target) =
            switch group.entry.mode.hold {
            case .target: try await holdInTarget(volume)
            case .intermediate: try await holdInIntermediate(volume, group)
            case .memory:
                (
                    HoldPlace.memory(
                        try imageMemory(group), group.entry.collisions.rules, marks: try volume.imageMarks().memory),
                    nil
                )
            }
        return ReplicatedVolume(
            name: volume.name, reactor: volume.reactor, number: volume.number, geometry: volume.geometry, hold: place,
            target: target, recording: volume.recording.mapping)
    }

    private func holdInTarget(_ volume: VolumeState) async throws -> (HoldPlace, HoldTarget?) {
        let hold = try volume.openPointHold()
        let file = await file(of: hold, volume)
        let target = HoldTarget(file: hold.target, preserved: hold.bitmap.mapping)
        return (.target(file, preserved: target.bitmap(volume.geometry)), target)
    }

    private func holdInIntermediate(_ volume: VolumeState, _ group: GroupState) async throws -> (HoldPlace, HoldTarget?)
    {
        let (hold, isNew) = try await volume.openChangeVolume(generation: group.record.generations.first ?? "")
        let (name, number, file) = (volume.name, volume.number, await file(of: hold, volume))
        let intermediate = hold.bitmap.intermediate(in: file)
        await volume.reactor.run { reactor in
            let engine = reactor.hosted(number).volume
            if engine.intermediate == nil { engine.useIntermediate(intermediate, trusted: true) }
            if isNew { engine.distrustIntermediate() }
        }
        let target = HoldTarget(
            file: hold.target, preserved: hold.bitmap.mapping, intermediate: intermediate,
            flush: { [disks = home.disks, changeVolumes] in
                do { try await disks.run { try hold.synchronize() } } catch {
                    await changeVolumes.flushFailed(name, error)
                    throw error
                }
            })
        return (.target(file, preserved: target.bitmap(volume.geometry)), target)
    }

    /// Its number in the block store, where it is from now on.
    private func file(of hold: PointHold, _ volume: VolumeState) async -> StoreFile {
        if volume.pointTargetFile < 0 {
            let number = volume.number
            volume.pointTargetFile = await volume.reactor.run { $0.hosted(number).addFile(hold.target) }
        }
        return volume.pointTargetFile
    }

    /// The memory for old images of the group.
    private func imageMemory(_ group: GroupState) throws -> ImageMemory {
        let bytes = group.entry.collisions.memory
        if let memory = group.imageMemory, memory.byteCount == bytes { return memory }
        let region = try PoolMemory(byteCount: bytes)
        let memory = ImageMemory(base: region.memory, byteCount: bytes, owner: region)
        group.imageMemory = memory
        return memory
    }

    /// The engines hold the point that the record says is held, or none does.
    private func alignPoint(_ group: GroupState) async throws {
        let held = group.record.held?.number
        var apart = false
        for volume in home.members(group) {
            let number = volume.number
            if await volume.reactor.run({ $0.hosted(number).volume.heldPoint }) != held { apart = true }
        }
        guard apart else { return }
        await home.onEngines(group) { $0.giveUpPoint() }
        if held != nil { try await group.handle.change(.pointGivenUp) }
    }

    private func replicationPeer(_ group: GroupState, _ peer: Configuration.PeerEntry) -> any PeerClient {
        home.peer(group)
            ?? PlainPeer(
                name: peer.name, address: "\(peer.nbd)", group: group.entry.name, volumes: group.entry.volumes,
                command: peer.commitCommand, timeout: group.entry.hooks.timeout)
    }

    func stopReplication(_ group: GroupState) async {
        await group.election?.stop()
        (group.election, group.electionProblem) = (nil, nil)
        if group.isReplicating { await group.endReplication() }
    }

    /// Unless it does already.
    func startMirroring(_ group: GroupState) async throws {
        if group.isReplicating { await group.handle.setQuiet(false) }
        if group.isMirroring, !group.isReplicating { try await startReplication(group) }
    }

    // MARK: By command

    private func replicator(_ name: String) throws -> GroupHandle {
        let pairs = try home.pairs(name)
        // Of several, whichever coordinates the others.
        let group = pairs.first { $0.replicator?.status.coordinates == true } ?? pairs[0]
        return try replicator(group)
    }

    private func replicator(_ group: GroupState) throws -> GroupHandle {
        guard let replicator = group.replicator else {
            throw Refusal(home.notMirroring(group))
        }
        return replicator
    }

    /// Of all pairs here.
    package func suspend(_ name: String) throws {
        for replicator in try home.pairs(name).map({ try replicator($0) }) { replicator.suspend() }
    }

    /// - Parameter fromImage: the secondary was seeded; until the first commit only what differs by checksum is sent.
    package func resume(_ name: String, fromImage: Bool = false) async throws {
        for group in try home.pairs(name) {
            let replicator = try replicator(group)
            if fromImage { try await group.handle.change(.seeded) }
            replicator.resume()
        }
    }

    package func cycle(_ name: String) async throws -> StatusReport.PointReport {
        let replicator = try replicator(name)
        do {
            return try await replicator.cycle().report
        } catch {
            throw Refusal("group '\(name)': \(error)")
        }
    }

    package func request(_ name: String) throws { try replicator(name).request() }

    /// Bounds the link from now on, through restarts; nil = as configured.
    package func setRate(_ name: String, _ rate: UInt64?) async throws {
        let group = try home.group(name)
        try await group.handle.change(.rate(rate))
        applyRate(group, at: realSeconds())
    }

    /// The rate for this time of day.
    func applyRate(_ group: GroupState, at now: Double) {
        guard let replicator = group.replicator else { return }
        let rate = group.entry.rate(group.record, at: now)
        if rate != group.appliedRate {
            group.appliedRate = rate
            replicator.setRate(rate)
        }
    }
}
