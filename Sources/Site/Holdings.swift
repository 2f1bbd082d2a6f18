// Holdings.swift: what a site holds, its volumes and groups, and what whoever works on them shares.
//
// Everybody else in this room stands on it, and it on nobody.

import API
import Base
import Groups
import Logging
import NBDServer
import Ring
import SiteConfiguration
import Volumes

/// Somebody who waits.
struct Waiting {
    var condition: () -> Bool
    var goesOn: CheckedContinuation<Void, Never>
}

/// What a site holds, and what whoever works on it shares.
@SiteThread
final class Holdings {
    nonisolated let configuration: Configuration
    nonisolated let descriptors: DescriptorBudget
    nonisolated let logger: Logger
    nonisolated let events = EventLog()
    nonisolated let board: StatusBoard
    let exports: ExportDirectory
    let disks: DiskThreads
    let state: StateDirectory
    /// Of this boot of the kernel.
    let bootID: String
    private let siteRecordFile: DurableRecord<SiteRecord>
    let siteRecord: SiteRecord
    var volumes: [String: VolumeState] = [:]
    var groups: [String: GroupState] = [:]
    /// Operations on FlashCopies come one after the other.
    let copyTurnstile = Turnstile()
    let meetings = Meetings()
    /// Groups of which an operation lets none begin on FlashCopies, each for all of its pairs.
    private var copyHolds: [String: (pairs: Int, entered: Task<Void, Never>)] = [:]
    /// Given back when a failover finds no room.
    var reserve: SpaceReserve
    /// Who waits for something to come about (`Occasions.swift`).
    var waiting: [UInt64: Waiting] = [:]
    var lastWait: UInt64 = 0
    var isStopping = false

    init(_ configuration: Configuration, _ logger: Logger) throws {
        (self.configuration, self.logger) = (configuration, logger)
        bootID = try StateDirectory.bootID()
        descriptors = try DescriptorBudget(configuration)
        exports = ExportDirectory(tlsPolicy: configuration.nbd.tls)
        board = StatusBoard(configuration, exports)
        disks = try DiskThreads(count: Limits.diskThreads)
        state = try StateDirectory(path: configuration.state)
        var found: SiteRecord?
        siteRecordFile = try DurableRecord(path: "\(configuration.state)/site.record", value: &found)
        siteRecord = found ?? SiteRecord(id: randomIdentity())
        reserve = SpaceReserve(directory: configuration.state, bitmapBytes: 0)
        if found == nil { try siteRecordFile.save(siteRecord) }
    }

    /// Nothing begins on FlashCopies until all pairs that have called this have left.
    func enterCopies(for group: String) async {
        if copyHolds[group] == nil {
            copyHolds[group] = (0, Task { await copyTurnstile.enter() })
        }
        copyHolds[group]!.pairs += 1
        await copyHolds[group]!.entered.value
    }

    func leaveCopies(of group: String) {
        guard var hold = copyHolds[group] else { return }
        hold.pairs -= 1
        copyHolds[group] = hold.pairs > 0 ? hold : nil
        if hold.pairs == 0 { copyTurnstile.leave() }
    }

    func group(ofVolume name: String) -> GroupState? {
        groups.values.first { $0.entry.volumes.contains(name) }
    }

    func group(_ name: String) throws -> GroupState {
        guard let group = groups[name] else {
            let parts = groups.values.filter { $0.entry.group == name && !$0.entry.isPool }.map(\.entry.name)
            guard parts.isEmpty else {
                throw Refusal(
                    "group '\(name)' has several hosts at site '\(configuration.site)'; say which pair: "
                        + parts.sorted().joined(separator: ", "), .misuse)
            }
            let known = Set(groups.values.map(\.entry.group)).sorted().joined(separator: ", ")
            throw Refusal(
                "there is no group '\(name)' at site '\(configuration.site)'; known: \(known.isEmpty ? "none" : known)",
                .unknown)
        }
        return group
    }

    /// For calls that only the site at the other end of the group may make.
    func group(_ name: String, askedBy siteID: String) throws -> GroupState {
        let group = try pair(name, withID: siteID)
        guard group.record.peerSite == siteID else {
            throw Refusal("group '\(name)' at '\(configuration.site)' has another peer", .refused)
        }
        return group
    }

    func members(_ group: GroupState) -> [VolumeState] {
        let leftOut = group.record.leftOut ?? []
        return group.entry.volumes.compactMap { leftOut.contains($0) ? nil : volumes[$0] }
    }

    func members(_ names: [String]) throws -> [VolumeState] {
        guard !names.isEmpty, Set(names).count == names.count else {
            throw Refusal("name each volume once, and at least one", .misuse)
        }
        return try names.map { name in
            guard let volume = volumes[name] else {
                let known = volumes.keys.sorted().joined(separator: ", ")
                throw Refusal("there is no volume '\(name)'; known: \(known)", .unknown)
            }
            return volume
        }
    }

    /// The peer, if it is a Farcopy site.
    func peer(_ group: GroupState) -> ControlPeer? {
        configuration.peers[group.entry.peer]?.control.map {
            ControlPeer(address: $0, group: group.entry.group, site: configuration.site, siteID: siteRecord.id)
        }
    }

    func notMirroring(_ group: GroupState) -> String {
        group.record.role == .secondary
            ? "group '\(group.entry.name)' is secondary at '\(configuration.site)'; give this command to its primary, '\(group.entry.peer)'"
            : "group '\(group.entry.name)' is not mirrored from '\(configuration.site)': \(board.shownState(group.board).1 ?? "")"
    }

    /// From its change volumes.
    func isBeingRestored(_ group: GroupState) -> Bool {
        members(group).contains { $0.record.localRestore != nil }
    }

    /// No role changes while data flows back into a volume.
    func refuseWhileRestoring(_ group: GroupState) throws {
        for volume in members(group) where volume.restoreBitmap != nil || volume.record.localRestore != nil {
            throw Refusal(
                "volume '\(volume.name)' at '\(configuration.site)' is still being restored; wait until it holds all of its data",
                .passing)
        }
    }

    nonisolated func note(_ group: String?, _ text: String) {
        logger.info("\(group.map { "group \($0): " } ?? "")\(text)")
        events.add(group: group, text)
    }

    func checkNotRestoring(_ volume: VolumeState) throws {
        let failingBack = group(ofVolume: volume.name)?.record.failedOver?.restoring.contains(volume.name) ?? false
        if let group = group(ofVolume: volume.name), group.record.handingOver != nil || group.isJoining {
            throw Refusal("group '\(group.entry.name)' is changing roles; try again when it has")
        }
        guard volume.record.restoring == nil, !volume.shutsHostsOut, !failingBack else {
            throw Refusal(
                "volume '\(volume.name)' is being restored; wait until `farcopy status` shows no more bytes to restore")
        }
    }

    nonisolated var isStarted: Bool { board.isStarted.load(ordering: .acquiring) }

    // MARK: Engines and disks

    func onEngines(_ group: GroupState, _ body: @escaping @Sendable (Volume) -> Void) async {
        for volume in members(group) { await onEngine(volume, body) }
    }

    func onEngine(_ volume: VolumeState, _ body: @escaping @Sendable (Volume) -> Void) async {
        let number = volume.number
        await volume.reactor.run { body($0.hosted(number).volume) }
    }

    /// Looks at the engines of volumes, with one message to each reactor.
    func ask<Found: Sendable>(
        _ volumes: [VolumeState], _ look: @escaping @Sendable (HostedVolume, Int) -> Found
    ) async -> [Found] {
        var answers: [(Int, Found)] = []
        for part in Dictionary(grouping: volumes.indices, by: { volumes[$0].reactor.number }).values {
            let numbers = part.map { ($0, volumes[$0].number) }
            answers += await volumes[part[0]].reactor.run { reactor in
                numbers.map { ($0, look(reactor.hosted($1), $0)) }
            }
        }
        return answers.sorted { $0.0 < $1.0 }.map(\.1)
    }

    func flush(_ bitmaps: [BitmapFile]) async throws {
        _ = try await disks.each(bitmaps) { try $0.synchronize() }
    }

    // MARK: Exports and hosts

    /// Brings the directory of exports in line with what a volume has. Of recovery points `settlePoints` tells.
    func publish(_ volume: VolumeState, _ group: GroupState?) {
        let name = volume.name
        let isLeftOut = group?.record.leftOut?.contains(name) == true
        // Nobody sees one volume of a group as it was, and another as it is to be.
        if isLeftOut || group.map(isBeingRestored) == true { return exports.set(name, nil) }
        var own = ExportEntry(
            size: volume.geometry.size, kind: .volume,
            readOnly: volume.entry.readOnly || !hostsMayWrite(to: volume, group),
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

    /// As far as roles and restores go.
    func hostsMayWrite(to volume: VolumeState, _ group: GroupState?) -> Bool {
        !volume.shutsHostsOut && group?.servesHosts != false && group?.record.leftOut?.contains(volume.name) != true
    }

    func admitHosts(_ group: GroupState) async {
        guard group.record.role == .primary else { return }  // given up meanwhile
        (group.servesHosts, group.isAdmitting) = (true, false)
        for volume in members(group) { await admitHosts(to: volume, group) }
    }

    func shutOutHosts(_ group: GroupState) async {
        (group.servesHosts, group.isAdmitting) = (false, false)
        for volume in members(group) { await shutOutHosts(of: volume, group) }
    }

    /// Lets hosts write, unless something else shuts them out.
    func admitHosts(to volume: VolumeState, _ group: GroupState?) async {
        let (number, writable) = (volume.number, hostsMayWrite(to: volume, group))
        await volume.reactor.run { $0.hosted(number).writable = writable }
        publish(volume, group)
    }

    /// Ends the hosts' connections, readers' as well; what they asked for is carried out first. New ones can only read.
    func shutOutHosts(of volume: VolumeState, _ group: GroupState?) async {
        let (number, reactor) = (volume.number, volume.reactor)
        await reactor.run { $0.hosted(number).writable = false }
        publish(volume, group)
        await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
            reactor.perform { $0.disconnect(number, .hosts) { continuation.resume() } }
        }
    }
}
