// Site.swift: one `farcopy serve` process: its volumes, groups and exports, and what operators ask of them.
//
// An actor on a thread of its own, since it waits for the disk. It never touches an engine; it asks the reactor.
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

package actor Site {
    package nonisolated let configuration: Configuration
    package nonisolated let descriptors: DescriptorBudget
    let logger: Logger
    private let executor: ThreadExecutor
    let disks: DiskThreads
    package nonisolated var unownedExecutor: UnownedSerialExecutor { executor.asUnownedSerialExecutor() }

    let state: StateDirectory
    /// Of this boot of the kernel.
    let bootID: String
    /// Devices that are in use elsewhere are served all the same.
    private let force: Bool
    private let siteRecordFile: DurableRecord<SiteRecord>
    let siteRecord: SiteRecord
    let exports: ExportDirectory
    nonisolated let board: StatusBoard
    private let reactorSettings: ReactorSettings
    private var reactors: [ReactorHandle] = []
    private var greeter: ReactorHandle?
    private(set) var volumes: [String: VolumeState] = [:]
    private(set) var groups: [String: GroupState] = [:]
    package nonisolated let events = EventLog()
    let copyTurnstile = Turnstile()
    let checksumTurnstile = Turnstile(places: Limits.checksumsAtOnce)
    /// How full the file systems are.
    var space = SpaceWatch()
    var nextSpaceLook: UInt64 = 0
    /// Given back when a failover finds no room.
    private(set) var reserve: SpaceReserve
    var reserveProblem: String?
    /// Refreshes that wait until a copy is out of use.
    var readyWaiters: [ChainedCopy: CheckedContinuation<Void, Never>] = [:]
    /// Who waits for something to come about (`Occasions.swift`).
    var waiting: [UInt64: Waiting] = [:]
    var lastWait: UInt64 = 0
    /// When the progress of a background copy was looked at first, and how many grains it had.
    var fillStarts: [ChainedCopy: (at: UInt64, grains: Int)] = [:]
    private(set) var isStopping = false
    private var listening: [Address] = []

    /// Reads, checks and opens everything; hosts and resumes every volume. Listens on nothing yet.
    ///
    /// - Parameter force: block devices that are mounted, or claimed by another program, are served all the same.
    package init(configuration: Configuration, logger: Logger, force: Bool = false) throws {
        Limits.validate()
        try Self.checkEverything(configuration)
        self.configuration = configuration
        self.logger = logger
        self.force = force
        bootID = try StateDirectory.bootID()
        descriptors = try DescriptorBudget(configuration)
        for notice in descriptors.notices { logger.warning("\(notice)") }
        var limits = configuration.nbd.limits
        limits.connections = descriptors.clients
        exports = ExportDirectory(tlsPolicy: configuration.nbd.tls)
        board = StatusBoard(configuration, exports)
        reactorSettings = ReactorSettings(
            limits: limits,
            credentials: configuration.nbd.tls == .off ? nil : try TLSCredentials(configuration.nbd.files),
            onRefusal: { logger.warning("\($0)") })
        executor = try ThreadExecutor(name: "site")
        disks = try DiskThreads(count: Limits.diskThreads)
        state = try StateDirectory(path: configuration.state)
        var found: SiteRecord?
        siteRecordFile = try DurableRecord(path: "\(configuration.state)/site.record", value: &found)
        siteRecord = found ?? SiteRecord(id: randomIdentity())
        reserve = SpaceReserve(directory: configuration.state, bitmapBytes: 0)
        if found == nil { try siteRecordFile.save(siteRecord) }
    }

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
        for entry in configuration.groups { try openGroup(entry) }
        for (index, entry) in configuration.volumes.enumerated() {
            let home = group(ofVolume: entry.name)
            let record = home?.record
            let volume = try VolumeState(
                entry, state: state, disks: disks, reactor: reactors[index % count], bootID: bootID, role: record?.role,
                servedAs: home?.servedAs, hasPoints: record?.points.isEmpty == false, force: force)
            volumes[entry.name] = volume
            board.volumes.withLock { $0.append(volume.board) }
            for finding in volume.findings {
                note(group(ofVolume: entry.name)?.entry.name, "volume \(entry.name): \(finding)")
            }
        }
        for group in groups.values {
            try await takeUpMembership(group)
            try await distrust(group)
            try await giveUpUncertainPoint(group)
        }
        reserve = SpaceReserve(
            directory: state.path,
            bitmapBytes: groups.values.flatMap { members($0) }.reduce(0) { $0 + UInt64($1.restoreHeader.fileBytes) }
        )
        keepReserve()
        try await completeCopies()
        for group in groups.values { try await decideService(group) }
        for entry in configuration.volumes { try await host(volumes[entry.name]!) }
        for group in groups.values { await settlePoints(group) }
        for socket in try SocketActivation.take() { greeter.perform { $0.listen(on: socket) } }
        for address in configuration.nbd.listen {
            for socket in try ListeningSocket.open(address) {
                greeter.perform { $0.listen(on: socket) }
            }
            listening.append(address)
        }
        for group in groups.values { try await goOn(group) }
        board.isStarted.store(true, ordering: .releasing)
        await dropVerifyCopies(Array(volumes.values))
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
            number: number, exports: exports, settings: reactorSettings,
            mailboxCapacity: Limits.mailboxCapacity + Limits.messagesPerGroup * configuration.groups.count
                + Limits.messagesPerVolume * configuration.volumes.count)
    }

    private func listenForEvents() {
        let deliver: @Sendable (String, VolumeEvent) -> Void = { [weak self] volume, event in
            Task { [weak self] in await self?.volumeEvent(volume, event) }
        }
        for reactor in reactors { reactor.perform { $0.onEvent = deliver } }
    }

    private func openGroup(_ entry: Configuration.GroupEntry) throws {
        try StateDirectory.makeDirectory(state.group(entry.name))
        try synchronizeDirectory("\(state.path)/groups")
        var found: GroupRecord?
        let file = try DurableRecord<GroupRecord>(
            path: "\(state.group(entry.name))/group.record", value: &found)
        let record = found ?? GroupRecord.first(entry.role, identity: randomIdentity())
        if found == nil { try file.save(record) }
        let group = try GroupState(entry: entry, record: record, file: file)
        groups[entry.name] = group
        board.groups.withLock { $0.append(group.board) }
    }

    /// The record learns which volumes the group has now, and which of them were served elsewhere meanwhile.
    private func takeUpMembership(_ group: GroupState) async throws {
        let (name, names, before) = (group.entry.name, group.entry.volumes, group.record)
        let foreign = names.filter { volumes[$0]?.record.servedAs != group.servedAs }
        try await group.handle.change(
            .started(
                Membership(
                    volumes: names, foreign: Dictionary(uniqueKeysWithValues: foreign.map { ($0, randomIdentity()) }),
                    exchanged: Set(foreign.filter { volumes[$0]?.record.servedAs == VolumeRecord.anotherFile }),
                    lineage: randomIdentity())))
        if before.role == .secondary, !before.points.isEmpty, group.record.points.isEmpty {
            note(
                name,
                "a volume was served outside the group; its recovery points are void, and everything is copied anew")
        }
        for volume in foreign {
            guard let number = group.record.joinedAfter?[volume], before.joinedAfter?[volume] != number else {
                continue
            }
            note(name, "volume \(volume) joins after point \(number)")
        }
    }

    /// A point that was held is given up when one volume does not say any more what of it is still to be sent.
    func giveUpUncertainPoint(_ group: GroupState) async throws {
        guard group.record.mustGiveUpPoint(heldBy: members(group).map(\.heldPoint)) else { return }
        try await group.handle.change(.pointGivenUp)
    }

    /// Copies that were taken together, and volumes that were restored together, are what one of them says.
    private func completeCopies() async throws {
        let volumes = Array(volumes.values)
        for (index, change) in CopyTable.completions(volumes.map(\.record.table), at: realSeconds()) {
            try await volumes[index].amend(change)
        }
    }

    func group(ofVolume name: String) -> GroupState? {
        groups.values.first { $0.entry.volumes.contains(name) }
    }

    // MARK: Exports

    /// Brings the directory of exports in line with what a volume has. Of recovery points `settlePoints` tells.
    func publish(_ volume: VolumeState, _ group: GroupState?) {
        let name = volume.name
        if group?.record.leftOut?.contains(name) == true { return exports.set(name, nil) }
        var own = ExportEntry(
            size: volume.geometry.size, kind: .volume,
            readOnly: volume.entry.readOnly || group?.servesHosts == false || volume.shutsHostsOut,
            reactor: volume.reactor, volume: volume.number)
        own.text =
            "volume \(name) of site \(configuration.site)"
            + (volume.record.restoredAt.map { ", restored \(timestamp($0))" } ?? "")
        own.minimumBlockSize = max(1, volume.source.directAlignment)
        own.access = volume.entry.access.orElse(group?.entry.access)
        var offered = VolumeExports(own: own)
        offered.copies = volume.record.copies.filter { $0.state == .active && !$0.name.contains(":") }.map {
            VolumeExports.Copy(
                id: $0.id, name: $0.name, order: $0.order, text: "FlashCopy of \(timestamp($0.createdAt))",
                readOnly: !$0.isWritable || volume.record.restoring?.copy == $0.id)
        }
        offered.points = group?.points
        offered.joinedAfter = group?.record.joinedAfter?[name] ?? 0
        offered.carriers = volume.carriers
        if let group, group.record.role == .secondary {
            offered.showsNewestPoint = true
            if let session = group.session {
                offered.intake = (
                    intakeSuffix(session), session, configuration.peers[group.entry.peer]?.access ?? AccessList()
                )
            }
        }
        exports.set(name, offered)
    }

    /// The intake's name holds the session's secret, so that nobody else can open it.
    func intakeName(_ volume: String, _ session: UInt64) -> String { "\(volume)@\(intakeSuffix(session))" }
    private func intakeSuffix(_ session: UInt64) -> String { "secondary:\(String(session, radix: 16))" }

    // MARK: Replication

    func startReplication(_ group: GroupState) async throws {
        guard let peer = configuration.peers[group.entry.peer] else { return }
        try await alignPoint(group)
        let members = members(group)
        let holds = try members.map { try $0.openPointHold() }
        for (volume, hold) in zip(members, holds) where volume.pointTargetFile < 0 {
            let number = volume.number
            volume.pointTargetFile = await volume.reactor.run { $0.hosted(number).addFile(hold.target) }
        }
        let name = group.entry.name
        let logger = logger
        let events = events
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
                    policy: peer.tls, files: configuration.nbd.files, user: peer.tlsUser),
                peer: replicationPeer(group, peer),
                connectionsPerVolume: link.connections ?? max(1, 4 / members.count), compare: link.compare,
                stallTimeout: link.stallTimeout, rate: group.entry.rate(group.record, at: realSeconds()),
                log: { [weak self] text in
                    logger.info("group \(name): \(text)")
                    events.add(group: name, text)
                    Task { [weak self] in await self?.happened() }
                },
                refused: { [weak self] in Task { [weak self] in await self?.reviewAfterRefusal(name) } }))
    }

    /// The engines hold the point that the record says is held, or none does.
    private func alignPoint(_ group: GroupState) async throws {
        let held = group.record.held?.number
        var apart = false
        for volume in members(group) {
            let number = volume.number
            if await volume.reactor.run({ $0.hosted(number).volume.heldPoint }) != held { apart = true }
        }
        guard apart else { return }
        await onEngines(group) { $0.giveUpPoint() }
        if held != nil { try await group.handle.change(.pointGivenUp) }
    }

    /// The peer, if it is a Farcopy site.
    func peer(_ group: GroupState) -> HTTPPeer? {
        configuration.peers[group.entry.peer]?.control.map {
            HTTPPeer(address: $0, group: group.entry.name, site: configuration.site, siteID: siteRecord.id)
        }
    }

    private func replicationPeer(_ group: GroupState, _ peer: Configuration.PeerEntry) -> any PeerClient {
        self.peer(group)
            ?? PlainPeer(
                name: peer.name, address: "\(peer.nbd)", group: group.entry.name, volumes: group.entry.volumes,
                command: peer.commitCommand, timeout: group.entry.hooks.timeout)
    }

    // MARK: Events

    private func volumeEvent(_ name: String, _ event: VolumeEvent) async {
        guard let volume = volumes[name] else { return }
        let group = group(ofVolume: name)
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
            note(
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
            note(
                group?.entry.name,
                "volume \(name): grain \(grain) could not be restored: \(String(cString: strerror(errno)))")
        }
    }

    func note(_ group: String?, _ text: String) {
        logger.info("\(group.map { "group \($0): " } ?? "")\(text)")
        events.add(group: group, text)
    }

    /// Writes records again whose last save has failed, until their files say what memory does.
    func settleRecords() async {
        if volumes.values.contains(where: \.isUnsaved) || groups.values.contains(where: \.isUnsaved) {
            reserve.releaseIfShort()
        }
        for volume in volumes.values where volume.isUnsettled { try? await volume.settle() }
        for group in groups.values {
            if group.isUnsaved { try? await group.handle.settle() }
            await withdrawCarriers(group)
        }
        happened()
    }

    // MARK: Stopping

    /// Ends in order: nothing is lost, and the next start has nothing to repair.
    package func stop() async {
        isStopping = true
        happened()
        for group in groups.values {
            await stopReplication(group)
        }
        await settleRecords()
        for group in groups.values { await group.handle.stop() }
        for reactor in reactors + (greeter.map { [$0] } ?? []) {
            await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
                Reactor.stop(reactor) { continuation.resume() }
            }
        }
        do {
            for volume in volumes.values where volume.isConfirmed { try await volume.finish() }
        } catch {
            logger.error("the stop is not clean: \(error)")
        }
        for address in listening { ListeningSocket.remove(address) }
    }
}
