// RoleCommands.swift: the commands that change which site is the primary of a group.

import API
import ArgumentParser
import Glibc
import Groups

struct Failover: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "At the secondary: make a recovery point the read-write volumes of the group.",
        discussion:
            "Ends with 3 when it is done here, and another remote of the group has not followed: stderr names it.")
    @OptionGroup var options: ControlOptions
    @Argument(help: "The group.") var group: String
    @Option(help: "The recovery point; default: the newest.") var point: UInt64?
    @Option(
        help:
            "Of several remotes: go to this point without asking or leading the others, whose data may not match then.")
    var alone: UInt64?

    func validate() throws {
        if point != nil, alone != nil { throw ValidationError("give either --point or --alone") }
    }

    func run() async throws {
        var words: [APICall.Query: String] = [:]
        if let point = alone ?? point { words[.point] = String(point) }
        if alone != nil { words[.alone] = "true" }
        let report = try await options.ask(Endpoints.failover, group, words)
        for remote in report.behind ?? [] { Output.write(Array("farcopy: \(remote)\n".utf8), to: 2) }
        if !options.json { show(report) }
        if report.behind?.isEmpty == false { throw ExitCode(Output.notEverywhere) }
    }

    private func show(_ report: FailoverReport) {
        Output.line("failed over to point \(report.id), formed \(report.formedAt)")
        var lost = "lost: what was written in the last \(StatusText.tenths(report.lostSeconds)) s"
        if let unsent = report.unsentBytes {
            lost += ", at most \(StatusText.bytes(unsent)) that the old primary still has"
        } else {
            lost += "; the old primary does not answer"
        }
        if report.discardedBytes > 0 {
            lost += "; \(StatusText.bytes(report.discardedBytes)) of later points had arrived and are not used"
        }
        Output.line(lost)
    }
}

struct Switchover: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "At the primary: shut hosts out, send the last point, exchange the roles. Nothing is lost.")
    @OptionGroup var options: ControlOptions
    @Argument(help: "The group.") var group: String
    @Flag(help: "Of several hosts: only this one, after a switchover that was left half done.") var alone = false

    func run() async throws {
        let point = try await options.ask(Endpoints.switchover, group, alone ? [.alone: "true"] : [:])
        if !options.json { Output.line("switched over at point \(point.id)") }
    }
}

struct Failback: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "At the site that was failed over to: bring the roles back, sending only what differs.")
    @OptionGroup var options: ControlOptions
    @Argument(help: "The group.") var group: String
    @Flag(help: "Only show the direction, the bytes, and what is discarded.") var preview = false
    @Flag(help: "Do not ask.") var yes = false

    func run() async throws {
        let report = try await (preview ? options : options.quiet).ask(Endpoints.previewFailback, group)
        if preview { return options.json ? () : Output.line(ResyncText.render(report)) }
        try ResyncText.confirm(report, yes)
        let point = try await options.ask(Endpoints.failback, group)
        if !options.json { Output.line("failed back at point \(point.id)") }
    }
}

struct Resync: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Mirror again after hosts wrote at both sites, or after a failover; one site's changes are discarded."
    )
    @OptionGroup var options: ControlOptions
    @Argument(help: "The group.") var group: String
    @Option(
        help:
            "The site whose changes are discarded, or, of several hosts or remotes, SITE,SITE,…; they are kept there as a FlashCopy."
    ) var discard: String
    @Flag(help: "Only show what would be sent and discarded.") var preview = false
    @Flag(help: "Do not ask.") var yes = false

    func run() async throws {
        let report = try await (preview ? options : options.quiet).ask(
            Endpoints.previewResync, group, [.discard: discard])
        if preview { return options.json ? () : Output.line(ResyncText.render(report)) }
        try ResyncText.confirm(report, yes)
        _ = try await options.ask(Endpoints.resync, group, [.discard: discard])
    }
}

struct Abort: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        abstract:
            "End something that is under way, as `status` names it: switchover:GROUP, failback:GROUP, cycle:GROUP, restore:VOLUME …"
    )
    @OptionGroup var options: ControlOptions
    @Argument(help: "The operation.") var operation: String

    func run() async throws {
        let answer = try await options.ask(Endpoints.abort, "", [.operation: operation])
        if !options.json { Output.line(answer.done) }
    }
}

enum ResyncText {
    static func render(_ report: ResyncReport) -> String {
        var lines = [
            "direction: \(report.from) -> \(report.to)",
            "sent: at most \(StatusText.bytes(report.sentBytes)) in which the sites differ",
        ]
        if report.discardedBytes > 0 {
            lines.append(
                "discarded at \(report.to): at most \(StatusText.bytes(report.discardedBytes)) in \(report.discardedGrains) grains, "
                    + "written since \(report.since ?? "its first point"); kept there as a FlashCopy until it is withdrawn"
            )
        } else {
            lines.append("discarded: nothing")
        }
        return lines.joined(separator: "\n")
    }

    /// Asks before anything is discarded.
    static func confirm(_ report: ResyncReport, _ yes: Bool) throws {
        guard report.discardedBytes > 0, !yes else { return }
        guard isatty(0) == 1 else {
            throw ValidationError("\(render(report))\nthere is nobody to ask; give --yes to discard it")
        }
        try Output.confirm(render(report), "discard it?")
    }
}
