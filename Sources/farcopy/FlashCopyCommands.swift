// FlashCopyCommands.swift: `farcopy flashcopy …`.

import API
import ArgumentParser
import Glibc
import Groups
import Site
import SiteConfiguration

struct FlashCopyCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "flashcopy", abstract: "Instant point-in-time copies of volumes at this site.",
        subcommands: [
            Create.self, List.self, Show.self, Set.self, Refresh.self, Restore.self, Clone.self, Withdraw.self,
        ])

    /// How a new copy is made.
    struct CopyOptions: ParsableArguments {
        @Flag(
            name: [.customLong("copy")],
            help: "Copy everything in the background: the target becomes a complete, independent image.")
        var copy = false
        @Flag(name: [.customLong("nocopy")], help: "Copy only what is about to be overwritten (the default).")
        var noCopy = false
        @Option(help: "Bound of the background copy a second, such as 50MiB; 0 = none. Default: 100MiB.")
        var rate: String?
        @Option(
            parsing: .singleValue,
            help:
                "A file or block device that takes the data; give one for each volume. Default: a sparse file in the state directory."
        )
        var target: [String] = []
        @Flag(help: "Let clients write to the copy; neither the source nor other copies see that.")
        var writable = false
        @Flag(
            help:
                "Survive power loss: old content is flushed before it is overwritten, which costs the first writes time."
        )
        var durable = false

        func validate() throws {
            if copy && noCopy { throw ValidationError("--copy and --nocopy exclude each other") }
            if rate != nil && !copy { throw ValidationError("--rate needs --copy") }
        }

        func fill(_ request: inout FlashCopyRequest) throws {
            request.copy = copy
            request.rate = try rate.map(bytes(ofRate:))
            request.targets = target.isEmpty ? nil : target.map(absolute)
            request.writable = writable
            request.durable = durable
        }
    }

    struct Create: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Take a FlashCopy of one or more volumes at one instant; it is exported as VOLUME@NAME.")
        @OptionGroup var options: ControlOptions
        @OptionGroup var copying: CopyOptions
        @Argument(help: "VOLUME… NAME") var words: [String]
        func run() async throws {
            var request = try request(words)
            try copying.fill(&request)
            try await change(options, Endpoints.createFlashCopy, request)
        }
    }

    struct List: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "List the FlashCopies of this site.")
        @OptionGroup var options: ControlOptions
        func run() async throws {
            for report in try await options.ask(Endpoints.flashCopies) where !options.json { Output.line(line(report)) }
        }
    }

    struct Show: AsyncParsableCommand {
        static let configuration = CommandConfiguration(abstract: "Show a FlashCopy: state, target, progress, ETA.")
        @OptionGroup var options: ControlOptions
        @Argument(help: "VOLUME… NAME") var words: [String]
        func run() async throws {
            let request = try request(words)
            let volumes = request.volumes.joined(separator: ",")
            let reports = try await options.ask(Endpoints.flashCopy, request.name, [.volumes: volumes])
            for report in reports where !options.json { Output.line(details(report)) }
        }
    }

    struct Set: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Change the rate of a background copy, or whether clients may write.")
        @OptionGroup var options: ControlOptions
        @Option(help: "Bound of the background copy a second, such as 50MiB; 0 = none.") var rate: String?
        @Flag(help: "Let clients write to the copy.") var writable = false
        @Flag(help: "Let no client write any more; readers are disconnected once.") var readOnly = false
        @Argument(help: "VOLUME… NAME") var words: [String]
        func run() async throws {
            if writable && readOnly { throw ValidationError("--writable and --read-only exclude each other") }
            var request = try request(words)
            request.rate = try rate.map(bytes(ofRate:))
            request.writable = writable ? true : readOnly ? false : nil
            try await change(options, Endpoints.setFlashCopy, request)
        }
    }

    struct Refresh: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Take a FlashCopy anew, of this instant; with a background copy only what changed is copied.")
        @OptionGroup var options: ControlOptions
        @Argument(help: "VOLUME… NAME") var words: [String]
        func run() async throws { try await change(options, Endpoints.refreshFlashCopy, try request(words)) }
    }

    struct Restore: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract:
                "Make the volumes the FlashCopy's point in time again, at once; data flows back in the background.",
            discussion:
                "What the volumes hold is kept as FlashCopy before-restore-N until it is withdrawn. Hosts must not have the "
                + "volumes open for writing; with --yes they are disconnected.")
        @OptionGroup var options: ControlOptions
        @Flag(help: "Disconnect hosts that have the volumes open; do not ask.") var yes = false
        @Argument(help: "VOLUME… NAME") var words: [String]

        func run() async throws {
            let reports = try await options.disconnecting(yes) { disconnect in
                var request = try request(words)
                request.disconnect = disconnect
                return try await options.ask(Endpoints.restoreFlashCopy, body: request)
            }
            for report in reports where !options.json {
                Output.line(
                    "\(report.volume): restored from \(report.name); what it held before is kept as FlashCopy "
                        + "\(report.keptAs ?? "-") until it is withdrawn; \(report.disconnected ?? 0) connections ended"
                )
            }
        }
    }

    struct Clone: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "Take a FlashCopy of what another FlashCopy, or a recovery point, holds.")
        @OptionGroup var options: ControlOptions
        @OptionGroup var copying: CopyOptions
        @Argument(help: "VOLUME… FLASHCOPY NAME; FLASHCOPY may be the number of a recovery point.") var words: [String]
        func run() async throws {
            guard words.count >= 3 else {
                throw ValidationError("give one or more volumes, the copy to clone, and a name: VOLUME… FLASHCOPY NAME")
            }
            var request = FlashCopyRequest(name: words.last!, volumes: Array(words.dropLast(2)))
            request.of = words[words.count - 2]
            try copying.fill(&request)
            try await change(options, Endpoints.cloneFlashCopy, request)
        }
    }

    struct Withdraw: AsyncParsableCommand {
        static let configuration = CommandConfiguration(
            abstract: "End a FlashCopy of one or more volumes and free its space; readers are disconnected.")
        @OptionGroup var options: ControlOptions
        @Argument(help: "VOLUME… NAME") var words: [String]
        func run() async throws {
            _ = try await options.ask(Endpoints.withdrawFlashCopy, body: try request(words))
        }
    }

    // MARK: What they share

    private static func request(_ words: [String]) throws -> FlashCopyRequest {
        guard words.count >= 2 else { throw ValidationError("give one or more volumes and a name: VOLUME… NAME") }
        return FlashCopyRequest(name: words.last!, volumes: Array(words.dropLast()))
    }

    private static func change(
        _ options: ControlOptions, _ endpoint: Endpoint<FlashCopyRequest, [FlashCopyReport]>,
        _ request: FlashCopyRequest
    ) async throws {
        for report in try await options.ask(endpoint, body: request) where !options.json { Output.line(report.export) }
    }

    private static func bytes(ofRate text: String) throws -> UInt64 {
        guard let rate = parseSize(text) else {
            throw ValidationError("'\(text)' is no rate; write bytes a second such as 50MiB, or 0")
        }
        return rate
    }

    /// The site has another working directory.
    private static func absolute(_ path: String) -> String {
        guard !path.hasPrefix("/"), let here = getcwd(nil, 0) else { return path }
        defer { free(here) }
        return String(cString: here) + "/" + path
    }

    private static func progress(_ report: FlashCopyReport) -> String {
        guard let background = report.backgroundCopy else {
            return "\(StatusText.bytes(report.preservedBytes)) preserved"
        }
        if background.complete { return "complete" }
        let percent = report.size > 0 ? Double(report.preservedBytes) / Double(report.size) * 100 : 100
        let eta = background.etaSeconds.map { ", ETA \(StatusText.tenths($0)) s" } ?? ""
        return "\(StatusText.tenths(percent)) % copied\(eta)"
    }

    private static func line(_ report: FlashCopyReport) -> String {
        let reason = report.reason.map { " (\($0))" } ?? ""
        return "\(report.export)\t\(report.createdAt)\t\(report.state)\(reason)\t\(progress(report))"
    }

    private static func details(_ report: FlashCopyReport) -> String {
        var lines = [
            "\(report.export): \(report.state), taken \(report.createdAt)\(report.writable ? ", writable" : "")"
        ]
        if let reason = report.reason { lines.append("  reason: \(reason)") }
        lines.append("  target: \(report.target)")
        lines.append("  \(report.survivesPowerLoss ? "survives" : "does not survive") power loss")
        lines.append(
            "  \(progress(report)), \(StatusText.bytes(report.preservedBytes)) of \(StatusText.bytes(report.size)) in the target"
        )
        if let background = report.backgroundCopy, !background.complete {
            let bound = background.rateBytesPerSecond
            lines.append(
                "  background copy: \(StatusText.bytes(UInt64(max(0, background.measuredBytesPerSecond))))/s, bound "
                    + (bound == 0 ? "none" : "\(StatusText.bytes(bound))/s"))
        }
        return lines.joined(separator: "\n")
    }
}
