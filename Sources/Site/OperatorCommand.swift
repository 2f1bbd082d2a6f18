// OperatorCommand.swift: runs a command of the operator's, with an end.
//
// Must be prevented:
//   a command that hangs, or leaves processes behind, holds a FlashCopy, a commit or a failover for ever

import Base
import Glibc
import Ring

enum OperatorCommand {
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
