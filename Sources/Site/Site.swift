// Site.swift: one `farcopy serve` process: its volumes, groups and exports, and what operators ask of them.
//
// It never touches an engine; it asks the reactor.
//
// Must be prevented:
//   something is created or changed before the whole configuration was found good
//   an export shows a volume whose chain or point is not yet in place

import API
import Base
import FlashCopies
import FoundationEssentials
import Glibc
import Groups
import Link
import Logging
import NBDProtocol
import NBDServer
import Ring
import SiteConfiguration
import TLS
import Volumes

@SiteThread
package final class Site {
    nonisolated let home: Holdings
    /// Devices that are in use elsewhere are served all the same.
    private let force: Bool
    private let reactorSettings: ReactorSettings
    private var reactors: [ReactorHandle] = []
    private var greeter: ReactorHandle?
    let checksumTurnstile = Turnstile(places: Limits.checksumsAtOnce)
    /// How full the file systems are.
    var space = SpaceWatch()
    var nextSpaceLook: UInt64 = 0
    var reserveProblem: String?
    /// Refreshes that wait until a copy is out of use.
    var readyWaiters: [ChainedCopy: CheckedContinuation<Void, Never>] = [:]
    /// When the progress of a background copy was looked at first, and how many grains it had.
    var fillStarts: [ChainedCopy: (at: UInt64, grains: Int)] = [:]
    private var listening: [Address] = []

    /// Reads, checks and opens everything; hosts and resumes every volume. Listens on nothing yet.
    ///
    /// - Parameter force: block devices that are mounted, or claimed by another program, are served all the same.
    package init(configuration: Configuration, logger: Logger, force: Bool = false) throws {
        Limits.validate()
        try Self.checkEverything(configuration)
        self.force = force
        home = try Holdings(configuration, logger)
        for notice in home.descriptors.notices { logger.warning("\(notice)") }
        var limits = configuration.nbd.limits
        limits.connections = home.descriptors.clients
        reactorSettings = ReactorSettings(
            limits: limits,
            credentials: configuration.nbd.tls == .off ? nil : try TLSCredentials(configuration.nbd.files),
            onRefusal: { logger.warning("\($0)") })
    }

    package nonisolated var configuration: Configuration { home.configuration }
    package nonisolated var descriptors: DescriptorBudget { home.descriptors }
    package nonisolated var events: EventLog { home.events }

    private static func checkEverything(_ configuration: Configuration) throws {
        for address in configuration.control + configuration.nbd.listen { try ListeningSocket.check(address) }
        for volume in configuration.volumes { try VolumeState.check(volume, state: configuration.state) }
    }

    // MARK: Starting

    /// Brings everything back to where the last process left it, then exports it.
    package func start() async throws {
        let count = max(1, min(sysconf(Int32(_SC_NPROCESSORS_ONLN)), 64))
        for number in 0..<count { reactors.append(try startReactor(number)) }
        let greeter = try startReactor(count)
        self.greeter = greeter
        listenForEvents()
        for entry in home.configuration.groups { try openGroup(entry) }
        for (index, entry) in home.configuration.volumes.enumerated() {
            let group = home.group(ofVolume: entry.name)
            let record = group?.record
            let volume = try VolumeState(
                entry, state: home.state, disks: home.disks, reactor: reactors[index % count], bootID: home.bootID,
                role: record?.role,
                servedAs: group?.servedAs, hasPoints: record?.points.isEmpty == false, force: force)
            home.volumes[entry.name] = volume
            home.board.volumes.withLock { $0.append(volume.board) }
            for finding in volume.findings {
                home.note(home.group(ofVolume: entry.name)?.entry.name, "volume \(entry.name): \(finding)")
            }
        }
        for group in home.groups.values {
            try await takeUpMembership(group)
            try await distrust(group)
            try await giveUpUncertainPoint(group)
        }
        home.reserve = SpaceReserve(
            directory: home.state.path,
            bitmapBytes: home.groups.values.flatMap { home.members($0) }.reduce(0) {
                $0 + UInt64($1.restoreHeader.fileBytes)
            }
        )
        keepReserve()
        try await completeCopies()
        for group in home.groups.values { try await decideService(group) }
        for entry in home.configuration.volumes { try await host(home.volumes[entry.name]!) }
        for group in home.groups.values { await settlePoints(group) }
        for socket in try SocketActivation.take() { greeter.perform { $0.listen(on: socket) } }
        for address in home.configuration.nbd.listen {
            for socket in try ListeningSocket.open(address) {
                greeter.perform { $0.listen(on: socket) }
            }
            listening.append(address)
        }
        for group in home.groups.values { try await goOn(group) }
        home.board.isStarted.store(true, ordering: .releasing)
        await dropVerifyCopies(Array(home.volumes.values))
        Task { await watch() }
    }

    /// What was under way in a group when the last process ended.
    private func goOn(_ group: GroupState) async throws {
        await applyRetention(group)
        if group.isolation != nil { Task { await awaitPeer(group) } }
        if group.isMirroring, group.isolation == nil { try await startReplication(group) }
        if group.record.handingOver != nil { Task { await finishHandover(group) } }
        if group.record.failedOver?.joins == true { Task { await joinAfterPromotion(group) } }
        if group.record.isFailingBack { Task { await resumeFailback(group) } }
    }

    private func startReactor(_ number: Int) throws -> ReactorHandle {
        try Reactor.start(
            number: number, exports: home.exports, settings: reactorSettings,
            mailboxCapacity: Limits.mailboxCapacity + Limits.messagesPerGroup * home.configuration.groups.count
                + Limits.messagesPerVolume * home.configuration.volumes.count)
    }

    private func listenForEvents() {
        let deliver: @Sendable (String, VolumeEvent) -> Void = { [weak self] volume, event in
            Task { [weak self] in await self?.volumeEvent(volume, event) }
        }
        for reactor in reactors { reactor.perform { $0.onEvent = deliver } }
    }

    private func openGroup(_ entry: Configuration.GroupEntry) throws {
        try StateDirectory.makeDirectory(home.state.group(entry.name))
        try synchronizeDirectory("\(home.state.path)/groups")
        var found: GroupRecord?
        let file = try DurableRecord<GroupRecord>(
            path: "\(home.state.group(entry.name))/group.record", value: &found)
        let record = found ?? GroupRecord.first(entry.role, identity: randomIdentity())
        if found == nil { try file.save(record) }
        let group = try GroupState(entry: entry, record: record, file: file)
        home.groups[entry.name] = group
        home.board.groups.withLock { $0.append(group.board) }
    }

    /// The record learns which volumes the group has now, and which of them were served elsewhere meanwhile.
    private func takeUpMembership(_ group: GroupState) async throws {
        let (name, names, before) = (group.entry.name, group.entry.volumes, group.record)
        let foreign = names.filter { home.volumes[$0]?.record.servedAs != group.servedAs }
        try await group.handle.change(
            .started(
                Membership(
                    volumes: names, foreign: Dictionary(uniqueKeysWithValues: foreign.map { ($0, randomIdentity()) }),
                    exchanged: Set(foreign.filter { home.volumes[$0]?.record.servedAs == VolumeRecord.anotherFile }),
                    lineage: randomIdentity())))
        if before.role == .secondary, !before.points.isEmpty, group.record.points.isEmpty {
            home.note(
                name,
                "a volume was served outside the group; its recovery points are void, and everything is copied anew")
        }
        for volume in foreign {
            guard let number = group.record.joinedAfter?[volume], before.joinedAfter?[volume] != number else {
                continue
            }
            home.note(name, "volume \(volume) joins after point \(number)")
        }
    }

    /// A point that was held is given up when one volume does not say any more what of it is still to be sent.
    func giveUpUncertainPoint(_ group: GroupState) async throws {
        guard group.record.mustGiveUpPoint(heldBy: home.members(group).map(\.heldPoint)) else { return }
        try await group.handle.change(.pointGivenUp)
    }

    /// Copies that were taken together, and volumes that were restored together, are what one of them says.
    private func completeCopies() async throws {
        let volumes = Array(home.volumes.values)
        for (index, change) in CopyTable.completions(volumes.map(\.record.table), at: realSeconds()) {
            try await volumes[index].amend(change)
        }
    }

    // MARK: Exports

    // MARK: Replication

    func startReplication(_ group: GroupState) async throws {
        guard let peer = home.configuration.peers[group.entry.peer] else { return }
        try await alignPoint(group)
        let members = home.members(group)
        let holds = try members.map { try $0.openPointHold() }
        for (volume, hold) in zip(members, holds) where volume.pointTargetFile < 0 {
            let number = volume.number
            volume.pointTargetFile = await volume.reactor.run { $0.hosted(number).addFile(hold.target) }
        }
        let name = group.entry.name
        let slotBytes = max(Limits.linkSlotBytes, members.map(\.geometry.grain).max() ?? 0)
        let link = group.entry.link
        await group.begin(
            Replicator.Configuration(
                settings: Cycle.Settings(
                    mode: group.entry.mode, interval: group.entry.interval, volumes: members.count,
                    window: Limits.linkWindowBytes / slotBytes),
                volumes: zip(members, holds).map { volume, hold in
                    ReplicatedVolume(
                        name: volume.name, reactor: volume.reactor, number: volume.number,
                        geometry: volume.geometry, targetFile: volume.pointTargetFile,
                        target: hold.target, preserved: hold.bitmap.mapping,
                        recording: volume.recording.mapping)
                },
                address: peer.nbd,
                tls: LinkTLS(
                    policy: peer.tls, files: home.configuration.nbd.files, user: peer.tlsUser),
                peer: replicationPeer(group, peer),
                connectionsPerVolume: link.connections ?? max(1, 4 / members.count), compare: link.compare,
                stallTimeout: link.stallTimeout, rate: group.entry.rate(group.record, at: realSeconds()),
                log: { [home] text in
                    home.logger.info("group \(name): \(text)")
                    home.events.add(group: name, text)
                    Task { await home.happened() }
                },
                refused: { [weak self] in Task { [weak self] in await self?.reviewAfterRefusal(name) } }))
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

    // MARK: Events

    private func volumeEvent(_ name: String, _ event: VolumeEvent) async {
        guard let volume = home.volumes[name] else { return }
        let group = home.group(ofVolume: name)
        switch event {
        case .pointGivenUp(let number, let errno):
            let reason = "volume \(name) could not hold point \(number): \(String(cString: strerror(errno)))"
            group?.replicator?.pointLost(reason)
        case .copyFailed(let id, let errno): await copyFailed(volume, id, errno)
        case .copyWithdrawn(let id): await copyWithdrawn(volume, id)
        case .copyCompleted(let id): await copyCompleted(volume, id)
        case .copyReady(let id): copyReady(volume, id)
        case .failureUnwritten(let id, let errno): await failureUnwritten(volume, id, errno)
        case .activityLogFailed(let errno): await activityLogFailed(volume, errno)
        case .sourceLost(let errno):
            home.note(
                group?.entry.name,
                "volume \(name): \(volume.source.path) could not be flushed (\(String(cString: strerror(errno)))): what was written "
                    + "before may be lost, and every flush of its clients fails until the site is restarted")
        case .writeRefused(let copy, let errno):
            if let group { writeRefused(volume, group, copy, errno) }
        case .restoreFinished:
            if let group, group.record.failedOver?.restoring.contains(name) == true {
                try? await group.handle.change(.restored(volume: name))
            }
            await restoreFinished(volume)
        case .restoreFailed(let grain, let errno):
            home.note(
                group?.entry.name,
                "volume \(name): grain \(grain) could not be restored: \(String(cString: strerror(errno)))")
        }
    }

    /// Writes records again whose last save has failed, until their files say what memory does.
    func settleRecords() async {
        if home.volumes.values.contains(where: \.isUnsaved) || home.groups.values.contains(where: \.isUnsaved) {
            home.reserve.releaseIfShort()
        }
        for volume in home.volumes.values where volume.isUnsettled { try? await volume.settle() }
        for group in home.groups.values {
            if group.isUnsaved { try? await group.handle.settle() }
            await withdrawCarriers(group)
        }
        home.happened()
    }

    // MARK: Stopping

    /// Ends in order: nothing is lost, and the next start has nothing to repair.
    package func stop() async {
        home.isStopping = true
        home.happened()
        for group in home.groups.values {
            await stopReplication(group)
        }
        await settleRecords()
        for group in home.groups.values { await group.handle.stop() }
        for reactor in reactors + (greeter.map { [$0] } ?? []) {
            await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
                Reactor.stop(reactor) { continuation.resume() }
            }
        }
        do {
            for volume in home.volumes.values where volume.isConfirmed { try await volume.finish() }
        } catch {
            home.logger.error("the stop is not clean: \(error)")
        }
        for address in listening { ListeningSocket.remove(address) }
    }
}
