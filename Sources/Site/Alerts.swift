// Alerts.swift: what an operator must hear of. Each alert is told once when it begins, runs its command, and is told again when it is over.

import Groups
import Ring
import SiteConfiguration

extension Holdings {
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
        if let failure = await OperatorCommand.run(command, variables, group.entry.hooks.timeout) {
            note(group.entry.name, "\(event.rawValue) \(failure)")
        }
    }
}
