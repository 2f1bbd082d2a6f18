// StatusBoard.swift: what a site shows of itself, where anybody can read it at any time.
//
// The site's thread waits for disks, and a group's for its record: what they decide they write here, and `farcopy status`, points and
// metrics are answered from here, from the groups' threads' own snapshots and from the reactors, which wait for nothing.
//
// Must be prevented:
//   whoever asks how a site is waits for what is wrong with it

import API
import Base
import FlashCopies
import FoundationEssentials
import Glibc
import Groups
import Link
import NBDServer
import Ring
import SiteConfiguration
import Synchronization
import Volumes

enum AlertKind: String, Sendable {
    case lagExceeded = "lag"
    case slowDrain = "drain"
    case suspended
    case splitBrain = "split-brain"
    /// A secondary could not take what its primary sent.
    case refused
    /// Nobody takes the note that a volume's metadata is out of date.
    case distrust

    var command: GroupEvent? {
        switch self {
        case .lagExceeded: .lagExceeded
        case .suspended: .suspended
        case .splitBrain: .splitBrain
        case .slowDrain, .refused, .distrust: nil
        }
    }
}

/// Of a group, what the site has decided and is shown.
struct GroupFacts: Sendable {
    var isReplicating = false
    /// The session of the primary's replicator (secondary).
    var session: UInt64?
    /// Why a primary does not serve hosts yet.
    var isolation: String?
    var operation: Operation?
    /// Why no site is known to coordinate the group.
    var electionProblem: String?
    /// Other sites of the group.
    var members: [StatusReport.MemberReport] = []
    var lastVerify: VerifyReport?
    /// For old images, in mode `global-mirror`, since it was primary first.
    var imageMemory: ImageMemory?
    /// Why a point could not be held last.
    var lastGivenUp: String?
    /// Since the start.
    var verifiedBytes: UInt64 = 0
    var differencesFound: UInt64 = 0
    /// Alerts that are on, with what they say.
    var alerts: [AlertKind: String] = [:]
}

/// A long command that is under way.
final class Operation: Sendable {
    enum Kind: String, Sendable {
        case resync, switchover, failback, verify, restore

        /// What an operator should know who has ended one.
        var aftermath: String {
            self == .restore ? "; its volumes are in part of the point, and in part as they were" : ""
        }
    }
    let kind: Kind
    let startedAt = realSeconds()
    private let state = Mutex((step: "begins", isAborted: false))

    init(_ kind: Kind) { self.kind = kind }

    /// What it waits for, in words.
    var step: String {
        get { state.withLock { $0.step } }
        set { state.withLock { $0.step = newValue } }
    }
    var isAborted: Bool { state.withLock { $0.isAborted } }
    func abort() { state.withLock { $0.isAborted = true } }
}

final class GroupBoard: Sendable {
    private let ownEntry: Mutex<Configuration.GroupEntry>
    var entry: Configuration.GroupEntry { ownEntry.withLock { $0 } }
    /// Its thread has the record.
    let handle: GroupHandle
    let facts = Mutex(GroupFacts())

    init(_ entry: Configuration.GroupEntry, _ handle: GroupHandle) {
        ownEntry = Mutex(entry)
        self.handle = handle
    }

    /// A host has named its volumes.
    func setVolumes(_ names: [String]) { ownEntry.withLock { $0.volumes = names } }
}

final class VolumeBoard: Sendable {
    let name: String
    let geometry: Geometry
    let reactor: ReactorHandle
    /// -1 until it is hosted.
    let number = Atomic<VolumeNumber>(-1)
    let copies = Mutex<[CopyRecord]>([])

    init(_ name: String, _ geometry: Geometry, _ reactor: ReactorHandle) {
        (self.name, self.geometry, self.reactor) = (name, geometry, reactor)
    }
}

final class StatusBoard: Sendable {
    static let version = "0.1.0"
    let configuration: Configuration
    let exports: ExportDirectory
    let groups = Mutex<[GroupBoard]>([])
    let volumes = Mutex<[VolumeBoard]>([])
    /// How full the file systems are, and what is wrong with the site as a whole.
    let space = Mutex((fileSystems: [FileSystemReport](), alerts: [String]()))
    /// Everything is back where the last process left it.
    let isStarted = Atomic(false)

    init(_ configuration: Configuration, _ exports: ExportDirectory) {
        (self.configuration, self.exports) = (configuration, exports)
    }

    func group(_ name: String) throws -> GroupBoard {
        let groups = groups.withLock { $0 }
        guard
            let group = groups.first(where: { $0.entry.name == name })
                ?? groups.first(where: { $0.entry.group == name })
        else {
            let known = Set(groups.map(\.entry.group)).sorted().joined(separator: ", ")
            throw Refusal(
                "there is no group '\(name)' at site '\(configuration.site)'; known: \(known.isEmpty ? "none" : known)",
                .unknown)
        }
        return group
    }

    func report(group only: String?) async throws -> StatusReport {
        if let only { _ = try group(only) }
        var report = StatusReport(
            site: configuration.site, version: Self.version, nbd: configuration.nbd.listen.map(\.description))
        space.withLock { space in
            report.alerts = space.alerts.isEmpty ? nil : space.alerts
            report.fileSystems = space.fileSystems
        }
        var pending: [String: UInt64] = [:]
        var collided: [String: (grain: UInt64, figures: CollisionFigures)] = [:]
        for (volume, figures) in await figures() {
            let grain = UInt64(volume.geometry.grain)
            pending[volume.name] = UInt64(figures.pending) * grain
            collided[volume.name] = (grain, figures.collisions)
            var shown = StatusReport.VolumeReport(
                size: volume.geometry.size, grain: volume.geometry.grain, exports: exports.names(of: volume.name),
                restoringBytes: UInt64(figures.restoring) * grain, bytesRead: figures.read,
                bytesWritten: figures.written,
                flashcopies: volume.copies.withLock { $0 }.filter { $0.state != .creating }.map {
                    StatusReport.CopyReport(name: $0.name, state: $0.state.rawValue, reason: $0.reason)
                }, activeBytes: figures.active)
            shown.changeVolumeLacksBytes = figures.lacking.map { UInt64($0) * grain }
            report.volumes[volume.name] = shown
        }
        for (name, pairs) in pairs(only) {
            report.groups[name] = StatusReport.GroupReport(
                pairs.map { pair in
                    var report = groupReport(pair, pending)
                    report.collisions = collisionReport(pair, collided)
                    return report
                })
        }
        return report
    }

    /// Of each group its pairs; volumes that no host has named are one.
    private func pairs(_ only: String?) -> [String: [GroupBoard]] {
        let shown = groups.withLock { $0 }.filter { group in
            let entry = group.entry
            return (only == nil || only == entry.group || only == entry.name)
                && (!entry.isPool || !entry.volumes.isEmpty)
        }
        return Dictionary(grouping: shown) { only == $0.entry.name ? $0.entry.name : $0.entry.group }
            .mapValues { $0.sorted { $0.entry.name < $1.entry.name } }
    }

    private struct Figures: Sendable {
        var pending = 0
        var restoring = 0
        var active: UInt64?
        var lacking: Int?
        var read: UInt64 = 0
        var written: UInt64 = 0
        var collisions = CollisionFigures()
    }

    /// Of every volume, with one message to each reactor.
    private func figures() async -> [(VolumeBoard, Figures)] {
        let volumes = volumes.withLock { $0 }.filter { $0.number.load(ordering: .acquiring) >= 0 }
        var found: [(VolumeBoard, Figures)] = []
        for part in Dictionary(grouping: volumes, by: \.reactor.number).values {
            found += await part[0].reactor.run { reactor in
                part.map { board in
                    let hosted = reactor.hosted(board.number.load(ordering: .acquiring))
                    let volume = hosted.volume
                    return (
                        board,
                        Figures(
                            pending: volume.changedGrains + volume.outOfSyncGrains, restoring: volume.restoringGrains,
                            active: volume.activeBytes, lacking: volume.intermediate?.lackingCount,
                            read: hosted.bytesRead, written: hosted.bytesWritten,
                            collisions: volume.collisionFigures)
                    )
                }
            }
        }
        return found
    }

    // MARK: A group

    private func groupReport(_ group: GroupBoard, _ pending: [String: UInt64]) -> StatusReport.GroupReport {
        let (entry, record, facts) = (group.entry, group.handle.record, group.facts.withLock { $0 })
        var report = StatusReport.GroupReport(
            role: record.role.rawValue, state: ShownState.simplex.rawValue, mode: entry.mode.rawValue, peer: entry.peer,
            volumes: entry.volumes)
        report.lagSeconds = record.lag(at: realSeconds())
        report.alerts = facts.alerts.isEmpty ? nil : facts.alerts.map { "\($0.key.rawValue): \($0.value)" }.sorted()
        report.operation = facts.operation.map {
            StatusReport.OperationReport(
                name: "\($0.kind.rawValue):\(entry.name)", startedAt: timestamp($0.startedAt), step: $0.step)
        }
        if record.role == .primary {
            report.pendingBytes = entry.volumes.reduce(0) { $0 + (pending[$1] ?? 0) }
            report.point = record.divergedFrom?.report
        } else {
            report.point = record.points.last?.report
            report.consistentAsOf = record.points.last.map { timestamp($0.formedAt) }
        }
        report.lastVerify = facts.lastVerify
        report.members = entry.several == nil ? nil : facts.members
        report.verifiedBytes = facts.verifiedBytes
        report.differencesFound = facts.differencesFound
        if let peer = configuration.peers[entry.peer], peer.control == nil, peer.commitCommand == nil {
            report.notice = "the remote is not consistent between points: peers.\(peer.name) has no commit_command"
        }
        if let holdUp = group.handle.status.holdUp ?? facts.electionProblem { report.notice = holdUp }
        if facts.isReplicating {
            describe(group, record, &report)
        } else {
            let (state, reason) = shownState(group)
            (report.state, report.reason) = (state.rawValue, reason)
        }
        return report
    }

    /// Of a group that has no replicator.
    func shownState(_ group: GroupBoard) -> (ShownState, String?) {
        let (record, facts) = (group.handle.record, group.facts.withLock { $0 })
        return record.shownState(
            (group.entry.name, configuration.site, group.entry.peer),
            failedOverAt: record.failedOver.map { timestamp($0.at) }, isolation: facts.isolation,
            isConnected: facts.session != nil, refused: facts.alerts[.refused])
    }

    private func describe(_ group: GroupBoard, _ record: GroupRecord, _ report: inout StatusReport.GroupReport) {
        let replication = group.handle.status
        describe(replication, &report)
        let rate = group.entry.rate(record, at: realSeconds())
        report.rateLimit = rate == 0 ? nil : rate
        let leftOut = record.leftOut ?? []
        let members = volumes.withLock { $0 }.filter {
            group.entry.volumes.contains($0.name) && !leftOut.contains($0.name)
        }
        let total = members.reduce(0) { $0 + $1.geometry.size }
        if record.lastCommitted == nil || record.lastCommitted?.isBase == true, let left = report.pendingBytes {
            report.progress = 1 - Double(min(left, total)) / Double(total)
        }
        let kinds: [ShownState: String] = [.copying: "copy", .resyncing: "resync"]
        if report.operation == nil, let kind = kinds[replication.state] {
            report.operation = StatusReport.OperationReport(
                name: "\(kind):\(group.entry.name)", startedAt: nil, step: "sends what the peer lacks")
        }
    }

    private func describe(_ replication: GroupStatus, _ report: inout StatusReport.GroupReport) {
        report.state = replication.state.rawValue
        report.reason = replication.reason
        report.rateBytesPerSecond = replication.bytesPerSecond
        if let seconds = replication.silentSeconds {
            report.notice =
                "the link is silent for \(Int(seconds)) s: '\(report.peer)' has answered nothing of what it was sent"
        }
        if replication.bytesPerSecond > 0, let bytes = report.pendingBytes {
            report.etaSeconds = Double(bytes) / replication.bytesPerSecond
        }
        report.windowBytes = UInt64(replication.windowBytes)
        report.sparedBytes = replication.bytesSpared
        if !replication.holds.isEmpty {
            report.holdSeconds = Double(replication.lastHold) / 1e9
            let sorted = replication.holds.sorted()
            report.holdHistogram = replication.holdHistogram
            report.holdSecondsP99 = Double(sorted[min(sorted.count - 1, sorted.count * 99 / 100)]) / 1e9
        }
    }

    private func collisionReport(
        _ group: GroupBoard, _ volumes: [String: (grain: UInt64, figures: CollisionFigures)]
    ) -> CollisionReport? {
        let facts = group.facts.withLock { $0 }
        guard let memory = facts.imageMemory, group.handle.record.role == .primary else { return nil }
        var report = CollisionReport(
            policy: group.entry.collisions.policy, memory: (memory.bytesInUse, memory.peakBytes, memory.byteCount),
            waitBounds: CollisionFigures.bounds)
        for (grain, figures) in group.entry.volumes.compactMap({ volumes[$0] }) {
            report.heldBytes += figures.heldGrains * grain
            report.waits += figures.waits
            report.waitSeconds += figures.waitedSeconds
            for (index, count) in figures.counts.enumerated() { report.waitCounts[index] += count }
            report.pointsGivenUp += figures.pointsGivenUp
        }
        report.lastGivenUp = facts.lastGivenUp
        return report
    }

    // MARK: Points

    /// Seconds after which a point that is prepared and not decided is in doubt.
    private static let longestDecision = 10.0

    func points(_ name: String) throws -> [StatusReport.PointReport] {
        _ = try group(name)
        let parts = (pairs(name).values.first ?? []).map { points($0.handle.record) }
        // A point of the group is one that every pair has; of one that is not decided, what the most careful says.
        guard let first = parts.first else { return [] }
        return first.compactMap { point in
            let same = parts.compactMap { $0.first { $0.id == point.id } }
            guard same.count == parts.count else { return nil }
            return same.first { $0.state != nil && $0.state != .committed } ?? point
        }
    }

    private func points(_ record: GroupRecord) -> [StatusReport.PointReport] {
        var all = (record.readablePoints + (record.role == .primary ? record.lastCommitted.map { [$0] } ?? [] : []))
            .map(\.report)
        guard let coordination = record.coordination else { return all }
        for index in all.indices { all[index].state = .committed }
        if let point = coordination.prepared {
            var prepared = point.report
            prepared.committedAt = nil
            prepared.seconds = nil
            // Whoever decides is not heard of.
            prepared.state = realSeconds() - (point.committedAt ?? 0) > Self.longestDecision ? .inDoubt : .prepared
            all.append(prepared)
        }
        if let number = coordination.inDoubt, let index = all.firstIndex(where: { $0.id == number }) {
            all[index].state = .inDoubt
        }
        return all
    }
}

extension Configuration.GroupEntry {
    /// Bytes a second over the link at a time, in seconds since 1970; 0 = unbounded.
    func rate(_ record: GroupRecord, at seconds: Double) -> UInt64 {
        if let rate = record.rate { return rate }
        var (time, parts) = (time_t(seconds), tm())
        localtime_r(&time, &parts)
        let minute = Int(parts.tm_hour) * 60 + Int(parts.tm_min)
        let window = link.rateWindows.first {
            $0.from < $0.to ? ($0.from..<$0.to).contains(minute) : minute >= $0.from || minute < $0.to
        }
        return window?.rate ?? link.rate
    }
}

extension PointRecord {
    var report: StatusReport.PointReport {
        StatusReport.PointReport(
            id: number, formedAt: timestamp(formedAt), committedAt: committedAt.map(timestamp), bytes: bytes,
            seconds: committedAt.map { max(0, $0 - formedAt) })
    }
}
