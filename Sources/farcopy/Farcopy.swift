// Farcopy.swift: the command line. Exit codes: 0 done, 1 failed, 2 misuse, 3 done here and not everywhere; errors on stderr.

import API
import ArgumentParser
import FoundationEssentials
import Glibc
import Groups
import NBDProtocol
import Site
import SiteConfiguration

@main
struct Farcopy: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "farcopy",
        abstract: "Point-in-time and remote copies of files and block devices, served over NBD.",
        version: Site.version,
        subcommands: [
            Serve.self, Status.self, CycleCommand.self, Suspend.self, Resume.self, Points.self,
            Failover.self, Switchover.self, Failback.self, Resync.self, Abort.self,
            Practice.self, Verify.self, RestoreGroup.self, Rate.self, Events.self, FlashCopyCommand.self,
            Attach.self, Detach.self,
            Inspect.self, Adopt.self,
        ])

    static func main() async {
        do {
            var command = try parseAsRoot()
            if var command = command as? any AsyncParsableCommand {
                try await command.run()
            } else {
                try command.run()
            }
        } catch let error as Refusal {
            Output.fail(error.description)
        } catch let error as ConfigurationError {
            Output.fail(error.description)
        } catch let code as ExitCode {
            // All has been said.
            Glibc.exit(code.rawValue)
        } catch {
            // Help and version are no misuse; whatever else the parser says is.
            if exitCode(for: error) == .success {
                Output.line(fullMessage(for: error))
                Glibc.exit(0)
            }
            Output.complain(fullMessage(for: error))
            Glibc.exit(exitCode(for: error) == .validationFailure ? 2 : 1)
        }
    }
}

/// Options of every command that talks to a running site.
struct ControlOptions: ParsableArguments {
    @Option(help: "The site's control address, unix:/path or host:port; default: the environment's FARCOPY_CONTROL.")
    var control: String?

    @Flag(help: "Print JSON.")
    var json = false

    func client() throws -> ControlClient {
        let text = control ?? getenv("FARCOPY_CONTROL").map { String(cString: $0) }
        guard let text else {
            throw ValidationError("no control address: give --control URI, or set FARCOPY_CONTROL")
        }
        guard let address = Address(text) else {
            throw ValidationError("'\(text)' is no control address: write unix:/path or host:port")
        }
        return ControlClient(address: address)
    }

    /// The same without showing what comes in between.
    var quiet: ControlOptions {
        var options = self
        options.json = false
        return options
    }

    /// Makes a call that hosts may have to be disconnected for; asks, if that was not said before and there is somebody to ask.
    func disconnecting<Answer>(_ yes: Bool, _ call: (Bool) async throws -> Answer) async throws -> Answer {
        do { return try await call(yes) } catch let refusal as Refusal
            where refusal.kind == .unconfirmed && isatty(0) == 1
        {
            try Output.confirm(refusal.description, "disconnect them?")
            return try await call(true)
        }
    }

    /// Calls the site, and shows the answer if JSON is wanted; what is no refusal in its words becomes one in ours.
    ///
    /// - Parameter name: what stands for the part in braces of the path.
    func ask<Body, Answer>(
        _ endpoint: Endpoint<Body, Answer>, _ name: String = "", _ query: [APICall.Query: String] = [:],
        body: Body? = nil
    ) async throws -> Answer {
        let client = try client()
        do {
            let bytes = try await client.send(endpoint, name, query, body: body)
            if json { Output.write(bytes) }
            return try JSONDecoder().decode(Answer.self, from: Data(bytes))
        } catch let error as Refusal {
            throw error
        } catch {
            let address = control ?? String(cString: getenv("FARCOPY_CONTROL"))
            throw Refusal("no answer from \(address) (\(error)); is `farcopy serve` running there?")
        }
    }
}
