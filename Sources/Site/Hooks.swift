// Hooks.swift: the operator's commands around a FlashCopy, so that it is consistent for the application as well.

import Base
import Groups
import Ring
import SiteConfiguration

/// The operator's commands around a FlashCopy.
@SiteThread
final class Hooks {
    private let home: Holdings

    init(_ home: Holdings) {
        self.home = home
    }

    /// Runs `body` between the freezing and thawing commands of everything that the volumes belong to. What was frozen is
    /// thawed whatever happens; when something cannot be frozen, `body` does not run.
    func frozen(_ members: [VolumeState], _ name: String, _ body: () async throws -> Void) async throws {
        var hooks: [(section: String, commands: HookCommands)] = []
        for volume in members {
            if !volume.entry.hooks.isEmpty { hooks.append(("volume \(volume.name)", volume.entry.hooks)) }
            if let group = home.group(ofVolume: volume.name)?.entry, !group.hooks.isEmpty,
                !hooks.contains(where: { $0.section == "group \(group.name)" })
            {
                hooks.append(("group \(group.name)", group.hooks))
            }
        }
        let environment = ["FARCOPY_NAME=\(name)", "FARCOPY_VOLUMES=\(members.map(\.name).joined(separator: " "))"]
        var frozen: [(section: String, commands: HookCommands)] = []
        var problem: (any Error)?
        for hook in hooks {
            frozen.append(hook)  // thawed even if it failed half-way
            guard let command = hook.commands.onFreeze else { continue }
            if let failure = await OperatorCommand.run(
                command, environment + ["FARCOPY_EVENT=freeze"], hook.commands.timeout)
            {
                problem = Refusal("on_freeze of \(hook.section) \(failure); no FlashCopy was taken")
                break
            }
        }
        if problem == nil {
            do { try await body() } catch { problem = error }
        }
        for hook in frozen.reversed() {
            guard let command = hook.commands.onThaw else { continue }
            if let failure = await OperatorCommand.run(
                command, environment + ["FARCOPY_EVENT=thaw"], hook.commands.timeout)
            {
                home.note(nil, "on_thaw of \(hook.section) \(failure)")
            }
        }
        if let problem { throw problem }
    }
}
