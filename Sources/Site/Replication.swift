// Replication.swift: a primary's sending: its replicator begins and ends, and what an operator asks of it.

import API
import Base
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
    /// The peer refuses this site; perhaps it has taken over.
    var whenRefused: @Sendable (String) async -> Void = { _ in }

    init(_ home: Holdings) {
        self.home = home
    }

    func startReplication(_ group: GroupState) async throws {
        guard let peer = home.configuration.peers[group.entry.peer] else { return }
        try await alignPoint(group)
        let members = home.members(group)
        var volumes: [ReplicatedVolume] = []
        for volume in members { volumes.append(try await replicated(volume, group)) }
        let name = group.entry.name
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
                refused: { [whenRefused] in Task { await whenRefused(name) } }, others: others(group)))
    }

    /// What this site is to a group with several hosts.
    private func part(_ group: GroupState) throws -> Cycle.Part {
        guard let several = group.entry.several, let index = several.hosts.firstIndex(of: several.pair) else {
            return .alone
        }
        return .several(
            try Coordinator.Settings(
                hosts: several.hosts.count, remotes: several.hosts.count, maxCoordination: several.maxCoordination,
                hostNames: several.hosts.map { "'\($0)'" },
                remoteNames: several.hosts.map { "the remote of '\($0)'" }),
            index: index, coordinates: several.master == home.configuration.site)
    }

    private func others(_ group: GroupState) -> (any CoordinationClient)? {
        guard let several = group.entry.several, several.master == home.configuration.site else { return nil }
        let handle = group.handle
        return CoordinationPeers(
            group.entry, several, site: home.configuration.site, peers: home.configuration.peers,
            places: group.record.coordination?.places ?? []
        ) { places in
            guard handle.record.coordination?.places != places else { return }
            try? await handle.change(.places(places))
        }
    }

    private func replicated(_ volume: VolumeState, _ group: GroupState) async throws -> ReplicatedVolume {
        let (place, target) =
            switch group.entry.mode.hold {
            case .target: try await holdInTarget(volume)
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
        let number = volume.number
        if volume.pointTargetFile < 0 {
            volume.pointTargetFile = await volume.reactor.run { $0.hosted(number).addFile(hold.target) }
        }
        let target = HoldTarget(file: hold.target, preserved: hold.bitmap.mapping)
        return (.target(volume.pointTargetFile, preserved: target.bitmap(volume.geometry)), target)
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
        if group.isReplicating { await group.endReplication() }
    }

    /// Unless it does already.
    func startMirroring(_ group: GroupState) async throws {
        if group.isMirroring, !group.isReplicating { try await startReplication(group) }
    }

    // MARK: By command

    private func replicator(_ name: String) throws -> GroupHandle {
        let group = try home.group(name)
        guard let replicator = group.replicator else {
            throw Refusal(home.notMirroring(group))
        }
        return replicator
    }

    package func suspend(_ name: String) throws { try replicator(name).suspend() }

    /// - Parameter fromImage: the secondary was seeded; until the first commit only what differs by checksum is sent.
    package func resume(_ name: String, fromImage: Bool = false) async throws {
        let replicator = try replicator(name)
        if fromImage { try await home.group(name).handle.change(.seeded) }
        replicator.resume()
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
