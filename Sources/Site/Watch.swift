// Alerts.swift: what an operator must hear of: a lag that is too long, a drain that takes too long, a suspension, a
// split-brain, what a secondary refused. Each is told once when it begins, runs its command, and is told again when it is over.

import API
import FoundationEssentials
import Glibc
import Groups
import Ring
import SiteConfiguration
import Volumes

extension Site {
    /// Looks after every group until the site stops.
    func watch() async {
        while !home.isStopping {
            await settleRecords()
            retryDistrust()
            for group in home.groups.values {
                review(group)
                keepTime(group)
            }
            await watchSpace()
            try? await Task.sleep(for: .milliseconds(200))
        }
    }

    private func review(_ group: GroupState) {
        let record = group.record
        let now = realSeconds()
        let lag = record.lag(at: now)
        if let limit = group.entry.lagLimit, let lag, lag > limit {
            home.alert(group, .lagExceeded, "the lag is more than \(limit) s")
        } else {
            home.endAlert(group, .lagExceeded)
        }
        if let limit = group.entry.drainLimit, let held = record.held, record.role == .primary,
            now - held.formedAt > limit
        {
            home.alert(group, .slowDrain, "point \(held.number) takes more than \(limit) s to send")
        } else {
            home.endAlert(group, .slowDrain)
        }
        if let reason = group.replicator?.status.reason {
            home.alert(group, .suspended, reason)
        } else if record.role == .secondary || group.replicator?.status.record.lastCommitted != nil {
            home.endAlert(group, .suspended)
        }
        if record.conflict?.kind != .splitBrain { home.endAlert(group, .splitBrain) }
        if record.role != .secondary { home.endAlert(group, .refused) }
        if record.role == .primary, record.failedOver == nil, let newest = record.points.last,
            let done = record.lastCommitted,
            done.isBase != true, done.number >= newest.number + UInt64(group.entry.keep.most), !group.isRetiring
        {
            group.isRetiring = true
            Task { await retirePoints(group) }
        }
    }

    // MARK: At the secondary

    /// Commits a point; a refusal is told here as well, where the reason lies, not only by the primary.
    package func takeCommit(_ name: String, _ request: CommitRequest) async throws -> CommitAnswer {
        do {
            let answer = try await commit(name, request)
            if let group = home.groups[name] { home.endAlert(group, .refused) }
            return answer
        } catch {
            // What an ended session asks for is nobody's concern.
            if let group = home.groups[name], group.session == request.session {
                home.alert(group, .refused, "point \(request.number) could not be committed: \(error)")
            }
            throw error
        }
    }

    /// A write or flush of the primary failed.
    ///
    /// - Parameter copy: the recovery point or FlashCopy that did not take old content; nil = the volume's own file.
    func writeRefused(_ volume: VolumeState, _ group: GroupState, _ copy: CopyID?, _ errno: Int32) {
        let path =
            copy.map { id in
                let record = volume.record.copies.first { $0.id == id }
                return record?.target ?? volume.targetPath(record?.targetOwner ?? id)
            } ?? volume.source.path
        home.alert(
            group, .refused,
            "volume \(volume.name): what '\(group.entry.peer)' sends cannot be written: \(path): \(String(cString: strerror(errno)))"
        )
    }

    /// Recovery points from when this site was secondary leave once the peer has as many newer ones.
    private func retirePoints(_ group: GroupState) async {
        defer { group.isRetiring = false }
        do {
            try await group.handle.change(.retired(group.record.points.map(\.number)))
        } catch {
            return home.note(group.entry.name, "\(error)")
        }
        await settlePoints(group, endsReaders: true)
    }

    /// The rate for this time of day, and what is due by the schedules.
    private func keepTime(_ group: GroupState) {
        let now = realSeconds()
        if let replicator = group.replicator {
            let rate = group.entry.rate(group.record, at: now)
            if rate != group.appliedRate {
                group.appliedRate = rate
                replicator.setRate(rate)
            }
        }
        if isDue(group.entry.schedule, &group.nextCycle, now) { group.replicator?.request() }
        if isDue(group.entry.scrub, &group.nextScrub, now), group.replicator != nil {
            let name = group.entry.name
            Task {
                do {
                    _ = try await verify(name, repair: false, rate: Self.scrubRate)
                } catch {
                    home.note(name, "scrub: \(error)")
                }
            }
        }
    }

    /// Bytes a second of a scheduled comparison.
    static let scrubRate: UInt64 = 64 << 20

    private func isDue(_ schedule: CronSchedule?, _ next: inout Double?, _ now: Double) -> Bool {
        guard let schedule else { return false }
        guard let time = next else {
            next = schedule.next(after: now) ?? .infinity
            return false
        }
        guard now >= time else { return false }
        next = schedule.next(after: now) ?? .infinity
        return true
    }

    /// Bounds the link from now on, through restarts; nil = as configured.
    package func setRate(_ name: String, _ rate: UInt64?) async throws {
        let group = try home.group(name)
        try await group.handle.change(.rate(rate))
        keepTime(group)
    }
}
