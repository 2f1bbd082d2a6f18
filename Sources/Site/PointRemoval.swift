// PointRemoval.swift: recovery points leave before newer ones push them out: `keep` became smaller, or an operator says so
// (`farcopy points GROUP --drop N… | --older-than …`).
//
// Must be prevented:
//   the newest point is dropped, which the primary's next one builds on, or the one that was failed over to
//   a point is dropped under its readers
//   on a full disk, dropping a point has its data moved to an older one, which has no room for it and is lost
//   a crash in between brings back a point of which some volumes have no part any more: the record retires it first

import API
import Base
import FoundationEssentials
import Glibc
import Groups
import NBDServer
import Ring
import SiteConfiguration
import Volumes

/// Recovery points leave.
@SiteThread
package final class PointRemoval {
    private let home: Holdings
    private let kept: KeptPoints

    init(_ home: Holdings, _ kept: KeptPoints) {
        (self.home, self.kept) = (home, kept)
    }

    // MARK: Retention

    /// Recovery points that `keep` does not cover leave; it may have become smaller since the last commit.
    func applyRetention(_ group: GroupState) async {
        guard group.record.role == .secondary else { return }
        let dropped = group.entry.keep.dropped(group.record.points)
        guard !dropped.isEmpty else { return }
        do {
            try await retire(dropped, group)
        } catch {
            return home.note(group.entry.name, "recovery points that 'keep' does not cover cannot be dropped: \(error)")
        }
        await kept.settlePoints(group)
        let numbers = dropped.map { String($0.number) }.joined(separator: ", ")
        home.note(group.entry.name, "recovery points \(numbers) leave, since 'keep' does not cover them any more")
    }

    // MARK: At a primary

    /// Recovery points from when this site was secondary leave once the peer has as many newer ones.
    func retirePoints(_ group: GroupState) async {
        defer { group.isRetiring = false }
        // If the role was given up since that was due, the newest is what it was then.
        let record = group.record
        guard record.role == .primary else { return }
        do {
            try await group.handle.change(.retired(record.points.map(\.number)))
        } catch {
            return home.note(group.entry.name, "\(error)")
        }
        await kept.settlePoints(group, endsReaders: true)
    }

    // MARK: By command

    package func dropPoints(_ name: String, _ request: PointDropRequest) async throws -> PointDropReport {
        let group = try home.group(name)
        var report = try await beginDrop(group, request)
        guard request.preview != true, !report.dropped.isEmpty else { return report }
        // Outside the turnstile: a failover does not wait for this.
        report.leaving = await waitUntilFilesAreGone(group, report.dropped.map(\.id))
        let numbers = report.dropped.map { String($0.id) }.joined(separator: ", ")
        home.note(name, "recovery points \(numbers) dropped by command")
        return report
    }

    private func beginDrop(_ group: GroupState, _ request: PointDropRequest) async throws -> PointDropReport {
        await group.turnstile.enter()
        defer { group.turnstile.leave() }
        let name = group.entry.name
        var (wanted, kept) = try await choosePoints(group, request)
        if request.olderThan == nil, !kept.isEmpty {
            throw Refusal("group '\(name)': " + kept.map { "point \($0.id): \($0.reason)" }.joined(separator: "; "))
        }
        var left = leaving(group, with: wanted)
        if let reason = await shortage(left) {
            guard request.olderThan != nil else { throw Refusal("group '\(name)': \(reason)") }
            kept += wanted.map { PointDropReport.Kept(id: $0.number, reason: reason) }
            (wanted, left) = ([], [])
        }
        let bytes = left.reduce(0) { sum, left in left.ids.reduce(sum) { $0 + allocatedBytes(left.volume, $1) } }
        let report = PointDropReport(dropped: wanted.map(\.report), kept: kept, freedBytes: bytes, leaving: [])
        guard request.preview != true, !wanted.isEmpty else { return report }
        try await retire(wanted, group)
        await self.kept.settlePoints(group, endsReaders: true)
        return report
    }

    /// The record decides: from here on a start takes them out of the chains.
    private func retire(_ points: [PointRecord], _ group: GroupState) async throws {
        home.reserve.releaseIfShort()
        try await group.handle.change(.retired(points.map(\.number)))
    }

    private typealias Leaving = [(volume: VolumeState, ids: [CopyID])]

    /// What of each volume's chain leaves when these points do, oldest first: what carries other points as well stays.
    private func leaving(_ group: GroupState, with points: [PointRecord]) -> Leaving {
        var without = group.record
        do { try without.apply(.retired(points.map(\.number))) } catch { return [] }
        let carriers = without.carriers(of: group.entry.volumes)
        return home.members(group).map { volume in
            (volume, volume.carriers.filter { carriers[volume.name]?.contains($0) != true }.map { CopyID($0) })
        }
    }

    /// Oldest first; and those that were meant and cannot be dropped.
    private func choosePoints(
        _ group: GroupState, _ request: PointDropRequest
    ) async throws -> (dropped: [PointRecord], kept: [PointDropReport.Kept]) {
        let points = group.record.points
        let meant: [PointRecord]
        switch (request.points, request.olderThan) {
        case (let numbers?, nil) where !numbers.isEmpty:
            let unknown = numbers.filter { number in !points.contains { $0.number == number } }
            guard unknown.isEmpty else {
                let known = points.map { String($0.number) }.joined(separator: ", ")
                throw Refusal(
                    "group '\(group.entry.name)' has no point \(unknown.map(String.init).joined(separator: ", ")) at "
                        + "'\(home.configuration.site)'; it has \(known.isEmpty ? "none" : known)", .unknown)
            }
            meant = points.filter { numbers.contains($0.number) }
        case (nil, let text?):
            guard let time = pointInTime(text, now: realSeconds()) else {
                throw Refusal(
                    "'\(text)' is neither a time such as 2026-11-21T17:00:00Z nor an age such as 90min, 36h or 7d",
                    .misuse)
            }
            meant = points.filter { $0.formedAt < time }
        default: throw Refusal("say which points: give 'points' or 'older_than'", .misuse)
        }
        var (dropped, kept): ([PointRecord], [PointDropReport.Kept]) = ([], [])
        let left = leaving(group, with: meant)
        for point in meant {
            if let reason = await reasonToKeep(point, group, left) {
                kept.append(PointDropReport.Kept(id: point.number, reason: reason))
            } else {
                dropped.append(point)
            }
        }
        return (dropped, kept)
    }

    /// - Parameter left: what leaves when all do that are meant.
    private func reasonToKeep(_ point: PointRecord, _ group: GroupState, _ left: Leaving) async -> String? {
        let record = group.record
        if point.number == record.points.last?.number { return "it is the newest, which the next one builds on" }
        if point.number == record.failedOver?.point { return "it is the one that was failed over to" }
        var readers: [String] = []
        for (volume, ids) in left {
            guard let id = record.carrier(of: point.number, volume.name).map({ CopyID($0) }), ids.contains(id) else {
                continue
            }
            let number = volume.number
            let count = await volume.reactor.run { $0.hosted(number).volume.copy(id)?.readers ?? 0 }
            if count > 0 { readers.append("\(count) of \(volume.name)@\(point.number)") }
        }
        return readers.isEmpty
            ? nil : "it has readers connected (\(readers.joined(separator: ", "))); disconnect them, or let it be"
    }

    /// Why dropping points would only move their data, and there is no room for that; nil when there is.
    private func shortage(_ left: Leaving) async -> String? {
        guard let space = FileSystem(holding: home.state.path) else { return nil }
        var bytes: UInt64 = 0
        for (volume, ids) in left {
            let number = volume.number
            let grains = await volume.reactor.run { $0.hosted(number).volume.handoverBound(of: ids) }
            bytes += UInt64(grains) * UInt64(volume.geometry.grain)
        }
        guard bytes > 0, bytes > space.availableBytes else { return nil }
        return
            "up to \(bytes) bytes of these points are read through them by older points or FlashCopies and would have to move "
            + "to those first, and \(home.state.path) has \(space.availableBytes) bytes free: drop older points first, or withdraw "
            + "FlashCopies and end practice"
    }

    private func allocatedBytes(_ volume: VolumeState, _ id: CopyID) -> UInt64 {
        [volume.targetPath(id), volume.bitmapPath(id)].reduce(0) { sum, path in
            var facts = stat()
            return stat(path, &facts) == 0 ? sum + UInt64(facts.st_blocks) * 512 : sum
        }
    }

    /// - Returns: the points whose files are still there after a while, since their data moves.
    private func waitUntilFilesAreGone(_ group: GroupState, _ points: [UInt64]) async -> [UInt64] {
        let members = home.members(group)
        func left() -> [UInt64] {
            points.filter { number in
                members.contains { $0.copies[CopyID(number)] != nil && !$0.carriers.contains(number) }
            }
        }
        await home.wait(seconds: Double(Limits.dropSeconds)) { left().isEmpty }
        return left()
    }
}

/// Seconds since 1970 of a time in RFC 3339, or of as long ago as an age says; nil when it is neither.
package func pointInTime(_ text: String, now: Double) -> Double? {
    if let age = parseDuration(text) { return now - age }
    let date =
        (try? Date(text, strategy: .iso8601))
        ?? (try? Date.ISO8601FormatStyle(includingFractionalSeconds: true).parse(text))
    return date?.timeIntervalSince1970
}
