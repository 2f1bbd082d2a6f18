// Farcopy.swift: the command line. Exit codes: 0 done, 1 failed, 2 misuse; errors on stderr.

import ArgumentParser
import Control
import Glibc
import NBDProtocol

@main
struct Farcopy: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "farcopy",
        abstract: "Point-in-time and remote copies of files and block devices, served over NBD.",
        version: Site.version,
        subcommands: [
            Serve.self, Status.self, CycleCommand.self, Suspend.self, Resume.self, Points.self,
            Failover.self, Switchover.self, Failback.self, Resync.self, Abort.self,
            Practice.self, Verify.self, Rate.self, Events.self, FlashCopyCommand.self,
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

    /// Calls the site; what is no refusal in its words becomes one in ours.
    func call(_ method: String, _ path: String, body: [UInt8]? = nil, seconds: Int64 = 30) async throws -> [UInt8] {
        let client = try client()
        do {
            return try await client.call(method, path, body: body, seconds: seconds)
        } catch let error as Refusal {
            throw error
        } catch {
            let address = control ?? String(cString: getenv("FARCOPY_CONTROL"))
            throw Refusal("no answer from \(address) (\(error)); is `farcopy serve` running there?")
        }
    }
}

/// A name in a URL's path or query.
func encoded(_ name: String) -> String {
    name.utf8.map { byte in
        let plain =
            (0x30...0x39).contains(byte) || (0x41...0x5A).contains(byte)
            || (0x61...0x7A).contains(byte) || byte == 0x2D || byte == 0x2E || byte == 0x5F
        return plain ? String(UnicodeScalar(byte)) : "%" + (byte < 16 ? "0" : "") + String(byte, radix: 16)
    }.joined()
}
