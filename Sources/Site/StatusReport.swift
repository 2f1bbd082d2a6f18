// StatusReport.swift: what `farcopy status` shows, as values.

import API
import Base
import FoundationEssentials
import Glibc
import Groups
import Link
import NBDServer
import Ring
import Volumes

extension PointRecord {
    var report: StatusReport.PointReport {
        StatusReport.PointReport(
            id: number, formedAt: timestamp(formedAt), committedAt: committedAt.map(timestamp), bytes: bytes,
            seconds: committedAt.map { max(0, $0 - formedAt) })
    }
}

extension Site {
    package static let version = "0.1.0"

    package func status(group only: String? = nil) async throws -> StatusReport {
        if let only { _ = try group(only) }
        var report = StatusReport(
            site: configuration.site, version: Self.version, nbd: configuration.nbd.listen.map(\.description))
        let alerts = space.alerts + (reserveProblem.map { ["reserve: \($0)"] } ?? [])
        report.alerts = alerts.isEmpty ? nil : alerts
        report.fileSystems = space.fileSystems
        var pending: [String: UInt64] = [:]
        for volume in volumes.values {
            let number = volume.number
            let figures = await volume.reactor.run { reactor in
                let hosted = reactor.hosted(number)
                return (
                    pending: hosted.volume.changedGrains + hosted.volume.outOfSyncGrains,
                    restoring: hosted.volume.restoringGrains, active: hosted.volume.activeBytes,
                    read: hosted.bytesRead, written: hosted.bytesWritten
                )
            }
            let grain = UInt64(volume.geometry.grain)
            pending[volume.name] = UInt64(figures.pending) * grain
            report.volumes[volume.name] = StatusReport.VolumeReport(
                size: volume.geometry.size, grain: volume.geometry.grain,
                exports: exports.names(of: volume.name),
                restoringBytes: UInt64(figures.restoring) * grain,
                bytesRead: figures.read, bytesWritten: figures.written,
                flashcopies: volume.record.copies.filter { $0.state != .creating }.map {
                    StatusReport.CopyReport(name: $0.name, state: $0.state.rawValue, reason: $0.reason)
                }, activeBytes: figures.active)
        }
        for group in groups.values where only == nil || only == group.entry.name {
            report.groups[group.entry.name] = groupReport(group, pending)
        }
        return report
    }

    private func groupReport(_ group: GroupState, _ pending: [String: UInt64]) -> StatusReport.GroupReport {
        let replication = group.replicator?.status
        let record = group.record
        let now = realSeconds()
        let name = group.entry.name
        var report = StatusReport.GroupReport(
            role: record.role.rawValue, state: ShownState.simplex.rawValue, mode: group.entry.mode.rawValue,
            peer: group.entry.peer, volumes: group.entry.volumes)
        report.lagSeconds = lagSeconds(group, now)
        report.alerts = group.alerts.isEmpty ? nil : group.alerts.map { "\($0.key.rawValue): \($0.value)" }.sorted()
        report.operation = group.operation.map {
            StatusReport.OperationReport(
                name: "\($0.kind.rawValue):\(name)", startedAt: timestamp($0.startedAt), step: $0.step)
        }
        if record.role == .primary {
            report.pendingBytes = group.entry.volumes.reduce(0) { $0 + (pending[$1] ?? 0) }
            report.point = record.divergedFrom?.report
        } else {
            report.point = record.points.last?.report
            report.consistentAsOf = record.points.last.map { timestamp($0.formedAt) }
        }
        report.lastVerify = group.lastVerify
        report.verifiedBytes = group.verifiedBytes
        report.differencesFound = group.differencesFound
        if let peer = configuration.peers[group.entry.peer], peer.control == nil, peer.commitCommand == nil {
            report.notice = "the remote is not consistent between points: peers.\(peer.name) has no commit_command"
        }
        if let replication {
            describe(replication, &report)
            let rate = currentRate(group)
            report.rateLimit = rate == 0 ? nil : rate
            let total = members(group).reduce(0) { $0 + $1.geometry.size }
            if record.lastCommitted == nil || record.lastCommitted?.isBase == true, let left = report.pendingBytes {
                report.progress = 1 - Double(min(left, total)) / Double(total)
            }
            let kinds: [ShownState: String] = [.copying: "copy", .resyncing: "resync"]
            if report.operation == nil, let kind = kinds[replication.state] {
                report.operation = StatusReport.OperationReport(
                    name: "\(kind):\(name)", startedAt: nil, step: "sends what the peer lacks")
            }
        } else {
            let (state, reason) = stateWithoutReplicator(group)
            (report.state, report.reason) = (state.rawValue, reason)
        }
        return report
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

    func stateWithoutReplicator(_ group: GroupState) -> (ShownState, String?) {
        group.record.shownState(
            (group.entry.name, configuration.site, group.entry.peer),
            failedOverAt: group.record.failedOver.map { timestamp($0.at) }, isolation: group.isolation,
            isConnected: group.session != nil, refused: group.alerts[.refused])
    }

    package func points(_ name: String) throws -> [StatusReport.PointReport] {
        let group = try group(name)
        let record = group.record
        let readable = record.points.filter { $0.isFailed != true }
        return (readable + (record.role == .primary ? record.lastCommitted.map { [$0] } ?? [] : [])).map(\.report)
    }

    // MARK: Commands on a primary

    private func replicator(_ name: String) throws -> GroupHandle {
        let group = try group(name)
        guard let replicator = group.replicator else {
            throw Refusal(notMirroring(group))
        }
        return replicator
    }

    package func suspend(_ name: String) throws { try replicator(name).suspend() }

    /// - Parameter fromImage: the secondary was seeded; until the first commit only what differs by checksum is sent.
    package func resume(_ name: String, fromImage: Bool = false) async throws {
        let replicator = try replicator(name)
        if fromImage { try await group(name).handle.change(.seeded) }
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
}
