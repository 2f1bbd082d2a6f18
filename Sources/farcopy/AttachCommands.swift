// AttachCommands.swift: `farcopy attach` and `farcopy detach`: the kernel's /dev/nbdX.

import API
import ArgumentParser
import Glibc
import Groups
import KernelDevice
import NBDProtocol
import Ring
import Site

struct Attach: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Make an export the kernel's /dev/nbdX, alive across restarts of the server.",
        discussion:
            "A keeper stays in the background until the device is detached; with --foreground it is this process, "
            + "for a service manager to look after.")
    @OptionGroup var options: ControlOptions
    @Argument(help: "The name of an export of the site, or an NBD URI.") var export: String
    @Argument(help: "/dev/nbd0, /dev/nbd1, …") var device: String
    @Option(help: "Connections to the server.") var connections = 4
    @Option(help: "Seconds until an unanswered request is sent again on another connection.") var timeout: UInt64 = 30
    @Option(help: "Seconds that I/O waits for the server to come back before it fails.")
    var deadTimeout: UInt64 = 86400
    @Flag(help: "Keep the device in this process.") var foreground = false

    func validate() throws {
        guard (1...16).contains(connections) else { throw ValidationError("--connections must be from 1 to 16") }
        guard (1...3600).contains(timeout) else { throw ValidationError("--timeout must be from 1 to 3600 seconds") }
        guard deadTimeout >= 1, deadTimeout <= 30 * 86400 else {
            throw ValidationError("--dead-timeout must be from 1 second to 30 days")
        }
    }

    func run() async throws {
        let uri = try await uri()
        guard foreground else { return try Self.startKeeper(uri, self) }
        signal(SIGPIPE, SIG_IGN)  // whoever read the first words has gone since
        do {
            let keeper = try DeviceKeeper(
                device: device, uri: uri,
                options: DeviceKeeper.Options(
                    connections: connections, timeoutSeconds: timeout, deadConnectionSeconds: deadTimeout),
                log: { Output.line($0) })
            keeper.run()
        } catch {
            throw Refusal(error.description)
        }
    }

    /// The export's address; a name is looked up at the site, which knows where it listens.
    private func uri() async throws -> String {
        if export.contains("://") { return export }
        let report = try await options.quiet.ask(Endpoints.status)
        guard report.volumes.values.contains(where: { $0.exports.contains(export) }) else {
            let known = report.volumes.values.flatMap(\.exports).sorted().joined(separator: ", ")
            throw Refusal("site '\(report.site)' has no export '\(export)'; it has \(known)")
        }
        for text in report.nbd {
            switch Address(text) {
            case .unix(let path): return "nbd+unix:///\(percentEncoded(export))?socket=\(percentEncoded(path))"
            case .tcp(let host, let port):
                let reachable = host == "0.0.0.0" ? "127.0.0.1" : host == "::" ? "::1" : host
                return
                    "nbd://\(reachable.contains(":") ? "[\(reachable)]" : reachable):\(port)/\(percentEncoded(export))"
            case nil: continue
            }
        }
        throw Refusal("site '\(report.site)' does not say where it listens; give an NBD URI instead of '\(export)'")
    }

    /// Starts this program again as the keeper, in a session of its own, and waits for what it says first.
    private static func startKeeper(_ uri: String, _ command: Attach) throws {
        var pipeEnds: [Int32] = [0, 0]
        guard pipe(&pipeEnds) == 0 else { throw Refusal("attach: no pipe: \(String(cString: strerror(errno)))") }
        let words = [
            "farcopy", "attach", uri, command.device, "--foreground", "--connections", "\(command.connections)",
            "--timeout", "\(command.timeout)", "--dead-timeout", "\(command.deadTimeout)",
        ]
        var actions = posix_spawn_file_actions_t()
        posix_spawn_file_actions_init(&actions)
        posix_spawn_file_actions_adddup2(&actions, pipeEnds[1], 1)
        posix_spawn_file_actions_addclose(&actions, pipeEnds[0])
        posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0)
        var attributes = posix_spawnattr_t()
        posix_spawnattr_init(&attributes)
        posix_spawnattr_setflags(&attributes, 0x80)  // POSIX_SPAWN_SETSID, which glibc shows with _GNU_SOURCE
        var arguments = words.map { strdup($0) } + [nil]
        var child = pid_t()
        let result = posix_spawn(&child, "/proc/self/exe", &actions, &attributes, &arguments, environ)
        for argument in arguments { free(argument) }
        close(pipeEnds[1])
        guard result == 0 else { throw Refusal("attach: start the keeper: \(String(cString: strerror(result)))") }
        var bytes = [UInt8](repeating: 0, count: 4096)
        let count = read(pipeEnds[0], &bytes, bytes.count)
        if count > 0 { return Output.write(Array(bytes[..<count])) }
        // It ended without a word on its output; what went wrong stands on the error output, which it shares with us.
        var status: Int32 = 0
        waitpid(child, &status, 0)
        Glibc.exit(1)
    }
}

struct Detach: ParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Disconnect the kernel's /dev/nbdX.")
    @Argument(help: "/dev/nbd0, /dev/nbd1, …") var device: String
    @Flag(help: "Even if it is mounted: what is not written back is lost.") var force = false

    func run() throws {
        do {
            try DeviceKeeper.detach(device: device, force: force)
        } catch {
            throw Refusal(error.description)
        }
    }
}
