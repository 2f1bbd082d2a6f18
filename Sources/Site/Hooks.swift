// Hooks.swift: the operator's commands around a FlashCopy, so that it is consistent for the application as well.

import Base
import Glibc
import Groups
import Ring
import SiteConfiguration

extension Site {
    /// Runs `body` between the freezing and thawing commands of everything that the volumes belong to. What was frozen is
    /// thawed whatever happens; when something cannot be frozen, `body` does not run.
    func frozen(_ members: [VolumeState], _ name: String, _ body: () async throws -> Void) async throws {
        var hooks: [(section: String, commands: HookCommands)] = []
        for volume in members {
            if !volume.entry.hooks.isEmpty { hooks.append(("volume \(volume.name)", volume.entry.hooks)) }
            if let group = group(ofVolume: volume.name)?.entry, !group.hooks.isEmpty,
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
            if let failure = await Self.run(command, environment + ["FARCOPY_EVENT=freeze"], hook.commands.timeout) {
                problem = Refusal("on_freeze of \(hook.section) \(failure); no FlashCopy was taken")
                break
            }
        }
        if problem == nil {
            do { try await body() } catch { problem = error }
        }
        for hook in frozen.reversed() {
            guard let command = hook.commands.onThaw else { continue }
            if let failure = await Self.run(command, environment + ["FARCOPY_EVENT=thaw"], hook.commands.timeout) {
                note(nil, "on_thaw of \(hook.section) \(failure)")
            }
        }
        if let problem { throw problem }
    }

    /// Runs a command in a process group of its own; nil when it succeeded, else what it did in words.
    static func run(_ command: String, _ environment: [String], _ seconds: Double) async -> String? {
        await withCheckedContinuation { continuation in
            startThread(name: "hook") { continuation.resume(returning: runToEnd(command, environment, seconds)) }
        }
    }
}

private nonisolated func runToEnd(_ command: String, _ environment: [String], _ seconds: Double) -> String? {
    var attributes = posix_spawnattr_t()
    posix_spawnattr_init(&attributes)
    posix_spawnattr_setflags(&attributes, Int16(POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK))
    posix_spawnattr_setpgroup(&attributes, 0)
    var signals = sigset_t()
    sigfillset(&signals)
    posix_spawnattr_setsigdefault(&attributes, &signals)
    sigemptyset(&signals)
    posix_spawnattr_setsigmask(&attributes, &signals)
    defer { posix_spawnattr_destroy(&attributes) }
    let line: [String] = ["/bin/sh", "-c", command]
    var words: [UnsafeMutablePointer<CChar>?] = line.map { strdup($0) }
    words.append(nil)
    var inherited: [String] = []
    var entry = environ
    while let text = entry.pointee {
        inherited.append(String(cString: text))
        entry += 1
    }
    var variables: [UnsafeMutablePointer<CChar>?] = (inherited + environment).map { strdup($0) }
    variables.append(nil)
    defer { for text in words + variables { free(text) } }
    var child: pid_t = 0
    let failure = posix_spawn(&child, "/bin/sh", nil, &attributes, &words, &variables)
    guard failure == 0 else { return "could not be started: \(String(cString: strerror(failure)))" }
    let deadline = monotonicNanoseconds() + UInt64(seconds * 1e9)
    var status: Int32 = 0
    while waitpid(child, &status, WNOHANG) == 0 {
        if monotonicNanoseconds() > deadline {
            kill(-child, SIGKILL)
            waitpid(child, &status, 0)
            return "took longer than \(seconds) s and was killed"
        }
        usleep(5_000)
    }
    if status & 0x7F != 0 { return "was ended by signal \(status & 0x7F)" }
    return status >> 8 & 0xFF == 0 ? nil : "ended with \(status >> 8 & 0xFF)"
}
