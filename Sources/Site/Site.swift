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
    private let chains: Chains
    private let kept: KeptPoints
    private let executor: CopyExecutor
    private let space: Space
    private let watch: Watch
    package nonisolated let flashCopies: FlashCopies
    package nonisolated let practice: Practice
    package nonisolated let checksums: Checksums
    private let changeVolumes: ChangeVolumes
    package nonisolated let replication: Replication
    package nonisolated let removal: PointRemoval
    package nonisolated let intake: Intake
    package nonisolated let coordination: Coordination
    package nonisolated let everySite: EverySite
    package nonisolated let failovers: FailoverOfSeveral
    package nonisolated let distrust: Distrust
    package nonisolated let standings: Standings
    package nonisolated let resyncs: ResyncsUnderWay
    package nonisolated let roles: Roles
    package nonisolated let localRestores: LocalRestores
    package nonisolated let verifications: Verifications
    /// Devices that are in use elsewhere are served all the same.
    private let force: Bool
    private let reactorSettings: ReactorSettings
    private var reactors: [ReactorHandle] = []
    private var greeter: ReactorHandle?
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

        // Each stands on those before it.
        let peers = Peers(home)
        let operations = Operations(home)
        chains = Chains(home)
        let restores = Restores(home)
        let storage = CopyStorage(home, chains)
        kept = KeptPoints(home, chains)
        changeVolumes = ChangeVolumes(home)
        replication = Replication(home, changeVolumes)
        executor = CopyExecutor(home, chains, storage, restores, VolumeStarts(home, chains, restores), kept)
        flashCopies = FlashCopies(home, chains, executor, Hooks(home))
        practice = Practice(home, flashCopies)
        checksums = Checksums(home, flashCopies)
        removal = PointRemoval(home, kept)
        distrust = Distrust(home, peers, executor)
        let comparisons = Comparisons(home, chains, executor, checksums)
        let steps = StepExecutor(
            home, peers, operations, chains, restores, kept, executor, flashCopies, comparisons, replication)
        intake = Intake(home, peers, steps, removal)
        coordination = Coordination(home, steps, peers)
        let otherRemotes = OtherRemotes(home, steps)
        everySite = EverySite(home, replication, practice, otherRemotes)
        failovers = FailoverOfSeveral(home, steps, intake, otherRemotes)
        standings = Standings(home, peers, distrust, replication)
        resyncs = ResyncsUnderWay(home)
        roles = Roles(home, peers, operations, steps, intake, resyncs)
        localRestores = LocalRestores(home, operations, peers, restores, flashCopies, replication)
        verifications = Verifications(home, operations, steps, flashCopies)
        space = Space(home)
        watch = Watch(home, distrust, space, kept, removal, replication, verifications)

        chains.whenGone = { [executor] in await executor.copyWithdrawn($0, $1) }
        chains.whenEntered = { [executor] in await executor.reviewCompletion($0, $1) }
        replication.whenRefused = { [standings] in await standings.reviewAfterRefusal($0) }
    }

    package nonisolated static var version: String { StatusBoard.version }

    /// Answered from the board: nobody's work is waited for.
    package nonisolated func status(group: String? = nil) async throws -> StatusReport {
        try await home.board.report(group: group)
    }
    package nonisolated func points(_ name: String) throws -> [StatusReport.PointReport] { try home.board.points(name) }
    package nonisolated var isStarted: Bool { home.isStarted }
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
        for entry in try home.applyClaims(home.configuration.groups) { try openGroup(entry) }
        for (index, entry) in home.configuration.volumes.enumerated() {
            let group = home.group(ofVolume: entry.name)
            let record = group?.record
            let volume = try VolumeState(
                entry, state: home.state, disks: home.disks, reactor: reactors[index % count], bootID: home.bootID,
                role: record?.role, servedAs: group?.servedAs, hasPoints: record?.points.isEmpty == false,
                hold: group?.entry.mode.hold, generation: record?.generations.first ?? "", force: force)
            home.volumes[entry.name] = volume
            home.board.volumes.withLock { $0.append(volume.board) }
            for finding in volume.findings {
                home.note(group?.entry.name, "volume \(entry.name): \(finding)")
            }
        }
        try localRestores.checkUnderWay()
        for group in home.groups.values {
            if home.isBeingRestored(group) { for volume in home.members(group) { volume.shutsHostsOut = true } }
            try await takeUpMembership(group)
            try await distrust.distrust(group)
            try await distrust.giveUpUncertainPoint(group)
        }
        home.reserve = SpaceReserve(
            directory: home.state.path,
            bitmapBytes: home.groups.values.flatMap { home.members($0) }.reduce(0) {
                $0 + UInt64($1.restoreHeader.fileBytes)
            }
        )
        space.keepReserve()
        try await completeCopies()
        for group in home.groups.values { try await standings.decideService(group) }
        for entry in home.configuration.volumes { try await executor.host(home.volumes[entry.name]!) }
        for group in home.groups.values { await kept.settlePoints(group) }
        for socket in try SocketActivation.take() { greeter.perform { $0.listen(on: socket) } }
        for address in home.configuration.nbd.listen {
            for socket in try ListeningSocket.open(address) {
                greeter.perform { $0.listen(on: socket) }
            }
            listening.append(address)
        }
        for group in home.groups.values { try await goOn(group) }
        home.board.isStarted.store(true, ordering: .releasing)
        await verifications.dropVerifyCopies(Array(home.volumes.values))
        Task { await watch.watch() }
    }

    /// What was under way in a group when the last process ended.
    private func goOn(_ group: GroupState) async throws {
        await removal.applyRetention(group)
        if group.isolation != nil { Task { await standings.awaitPeer(group) } }
        if group.isMirroring, group.isolation == nil { try await replication.startReplication(group) }
        if home.isBeingRestored(group) { Task { await localRestores.resume(group) } }
        if group.record.handingOver != nil { Task { await roles.finishHandover(group) } }
        if group.record.failedOver?.joins == true { Task { await roles.joinAfterPromotion(group) } }
        if group.record.isFailingBack { Task { await roles.resumeFailback(group) } }
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

    /// Copies that were taken together, and volumes that were restored together, are what one of them says.
    private func completeCopies() async throws {
        let volumes = Array(home.volumes.values)
        for (index, change) in CopyTable.completions(volumes.map(\.record.table), at: realSeconds()) {
            try await volumes[index].amend(change)
        }
    }

    // MARK: Events

    private func volumeEvent(_ name: String, _ event: VolumeEvent) async {
        guard let volume = home.volumes[name] else { return }
        let group = home.group(ofVolume: name)
        switch event {
        case .pointGivenUp(let number, let errno):
            let reason = "volume \(name) could not hold point \(number): \(holdProblem(errno, group))"
            group?.lastGivenUp = reason
            group?.replicator?.pointLost(reason, number: number)
        case .imagesWanted:
            if let group, let index = home.members(group).firstIndex(where: { $0 === volume }) {
                group.replicator?.imagesWanted(index)
            }
        case .copyFailed(let id, let errno): await executor.copyFailed(volume, id, errno)
        case .copyWithdrawn(let id): await executor.copyWithdrawn(volume, id)
        case .copyCompleted(let id): await executor.copyCompleted(volume, id)
        case .copyReady(let id): chains.copyReady(volume, id)
        case .failureUnwritten(let id, let errno): await distrust.failureUnwritten(volume, id, errno)
        case .activityLogFailed(let errno): await distrust.activityLogFailed(volume, errno)
        case .sourceLost(let errno):
            home.note(
                group?.entry.name,
                "volume \(name): \(volume.source.path) could not be flushed (\(String(cString: strerror(errno)))): what was written "
                    + "before may be lost, and every flush of its clients fails until the site is restarted")
        case .writeRefused(let copy, let errno):
            if let group { intake.writeRefused(volume, group, copy, errno) }
        case .intermediateFilled: await changeVolumes.filled(volume)
        case .intermediateFailed(let errno): changeVolumes.failed(volume, errno)
        case .restoreFinished:
            if let group, group.record.failedOver?.restoring.contains(name) == true {
                try? await group.handle.change(.restored(volume: name))
            }
            await executor.restoreFinished(volume)
        case .restoreFailed(let grain, let errno):
            home.note(
                group?.entry.name,
                "volume \(name): grain \(grain) could not be restored: \(String(cString: strerror(errno)))")
        }
    }

    private func holdProblem(_ errno: Int32, _ group: GroupState?) -> String {
        guard errno == ENOBUFS, let collisions = group?.entry.collisions else {
            return String(cString: strerror(errno))
        }
        return
            "the \(collisions.memory) bytes of 'collision_memory' are full, and what hosts overwrote could not be sent within "
            + "'max_collision_wait'"
    }

    // MARK: Stopping

    /// Who waits does not any more: a request could otherwise wait for the stop, which waits for the requests.
    package func endWaits() {
        home.isStopping = true
        home.happened()
    }

    /// Ends in order: nothing is lost, and the next start has nothing to repair.
    package func stop() async {
        endWaits()
        for group in home.groups.values {
            await replication.stopReplication(group)
        }
        await watch.settleRecords()
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
