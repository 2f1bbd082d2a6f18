// Watch.swift: looks after every group until the site stops: lag, drain, suspension, retention, schedules, records that could not be saved.

import API
import Groups
import Ring
import SiteConfiguration
import Volumes

/// Looks after every group until the site stops.
@SiteThread
final class Watch {
    private let home: Holdings
    private let distrust: Distrust
    private let space: Space
    private let kept: KeptPoints
    private let removal: PointRemoval
    private let replication: Replication
    private let verifications: Verifications
    private let members: Members

    init(
        _ home: Holdings, _ distrust: Distrust, _ space: Space, _ kept: KeptPoints, _ removal: PointRemoval,
        _ replication: Replication, _ verifications: Verifications
    ) {
        members = Members(home)
        (self.home, self.distrust, self.space, self.kept, self.removal, self.replication, self.verifications) = (
            home, distrust, space, kept, removal, replication, verifications
        )
    }

    /// Looks after every group until the site stops.
    func watch() async {
        while !home.isStopping {
            await settleRecords()
            distrust.retryDistrust()
            for group in home.groups.values {
                review(group)
                keepTime(group)
            }
            members.look()
            await space.watchSpace()
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
            Task { await removal.retirePoints(group) }
        }
    }

    /// The rate for this time of day, and what is due by the schedules.
    private func keepTime(_ group: GroupState) {
        let now = realSeconds()
        replication.applyRate(group, at: now)
        if isDue(group.entry.schedule, &group.nextCycle, now) { group.replicator?.request() }
        if isDue(group.entry.scrub, &group.nextScrub, now), group.replicator != nil {
            let name = group.entry.name
            Task {
                do {
                    _ = try await verifications.verify(name, repair: false, rate: Self.scrubRate)
                } catch {
                    home.note(name, "scrub: \(error)")
                }
            }
        }
    }

    /// Bytes a second of a scheduled comparison.
    private static let scrubRate: UInt64 = 64 << 20

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

    /// Writes records again whose last save has failed, until their files say what memory does.
    func settleRecords() async {
        if home.volumes.values.contains(where: \.isUnsaved) || home.groups.values.contains(where: \.isUnsaved) {
            home.reserve.releaseIfShort()
        }
        for volume in home.volumes.values where volume.isUnsettled { try? await volume.settle() }
        for group in home.groups.values {
            if group.isUnsaved { try? await group.handle.settle() }
            await kept.withdrawCarriers(group)
        }
        home.happened()
    }
}
