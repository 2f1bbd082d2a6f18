// Alerts.swift: what an operator must hear of: a lag that is too long, a drain that takes too long, a suspension, a
// split-brain. Each is told once when it begins, runs its command, and is told again when it is over.

import FoundationEssentials
import Replication

/// Commands of a group that run when something happens (`on_lag_exceeded` …).
package enum GroupEvent: String, CaseIterable, Sendable {
    case lagExceeded = "on_lag_exceeded"
    case suspended = "on_suspended"
    case splitBrain = "on_split_brain"
    case beforeFailover = "before_failover"
    case afterFailover = "after_failover"
}

enum AlertKind: String, Sendable {
    case lagExceeded = "lag"
    case slowDrain = "drain"
    case suspended
    case splitBrain = "split-brain"

    var command: GroupEvent? {
        switch self {
        case .lagExceeded: .lagExceeded
        case .suspended: .suspended
        case .splitBrain: .splitBrain
        case .slowDrain: nil
        }
    }
}

extension Site {
    func alert(_ group: GroupState, _ kind: AlertKind, _ text: String) {
        let isNew = group.alerts.updateValue(text, forKey: kind) == nil
        guard isNew else { return }
        note(group.entry.name, "alert: \(kind.rawValue): \(text)")
        guard let command = kind.command else { return }
        Task { await runCommand(group, command, ["FARCOPY_REASON=\(text)"]) }
    }

    func endAlert(_ group: GroupState, _ kind: AlertKind) {
        guard group.alerts.removeValue(forKey: kind) != nil else { return }
        note(group.entry.name, "alert over: \(kind.rawValue)")
    }

    /// Runs a group's command for an event, if it has one. What goes wrong with it is told, and stops nothing.
    func runCommand(_ group: GroupState, _ event: GroupEvent, _ environment: [String]) async {
        guard let command = group.entry.commands[event] else { return }
        let variables =
            environment + [
                "FARCOPY_EVENT=\(event.rawValue)", "FARCOPY_GROUP=\(group.entry.name)",
                "FARCOPY_SITE=\(configuration.site)",
                "FARCOPY_VOLUMES=\(group.entry.volumes.joined(separator: " "))",
            ]
        if let failure = await Self.run(command, variables, group.entry.hooks.timeout) {
            note(group.entry.name, "\(event.rawValue) \(failure)")
        }
    }

    /// Looks after every group until the site stops.
    func watch() async {
        while !isStopping {
            for group in groups.values { review(group) }
            try? await Task.sleep(for: .milliseconds(200))
        }
    }

    private func review(_ group: GroupState) {
        let record = group.current
        let now = realSeconds()
        let lag = lagSeconds(group, now)
        if let limit = group.entry.lagLimit, let lag, lag > limit {
            alert(group, .lagExceeded, "the lag is more than \(limit) s")
        } else {
            endAlert(group, .lagExceeded)
        }
        if let limit = group.entry.drainLimit, let held = record.held, record.role == .primary,
            now - held.formedAt > limit
        {
            alert(group, .slowDrain, "point \(held.number) takes more than \(limit) s to send")
        } else {
            endAlert(group, .slowDrain)
        }
        if let reason = group.replicator?.status.reason {
            alert(group, .suspended, reason)
        } else if group.replicator?.status.record.lastCommitted != nil {
            endAlert(group, .suspended)
        }
        if record.conflict?.kind != .splitBrain { endAlert(group, .splitBrain) }
    }

    /// Age of the newest point that the remote has committed; nil before the first, and after a change of roles until the
    /// first in the new direction.
    func lagSeconds(_ group: GroupState, _ now: Double) -> Double? {
        let record = group.current
        guard record.failedOver == nil, record.conflict == nil,
            let point = record.role == .primary ? record.lastCommitted : record.points.last, point.isBase != true
        else { return nil }
        return max(0, now - point.formedAt)
    }
}
