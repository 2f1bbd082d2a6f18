// GroupCommands.swift: status and the commands on groups.

import API
import ArgumentParser
import Glibc
import Groups
import Site
import SiteConfiguration

struct Status: AsyncParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Show roles, states, points, lag, rates.")
    @OptionGroup var options: ControlOptions
    @Argument(help: "Only this group.") var group: String?
    @Flag(help: "Show anew each second until interrupted.") var watch = false

    func run() async throws {
        repeat {
            let report = try await options.ask(Endpoints.status, "", group.map { [.group: $0] } ?? [:])
            if !options.json {
                if watch { Output.write(Array("\u{1B}[H\u{1B}[2J".utf8)) }
                Output.line(StatusText.render(report, groupOnly: group != nil))
            }
            if watch { try await Task.sleep(for: .seconds(1)) }
        } while watch
    }
}

struct CycleCommand: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "cycle", abstract: "Form a point now; with --wait, return once the peer has committed it.")
    @OptionGroup var options: ControlOptions
    @Argument(help: "The group.") var group: String
    @Flag(help: "Wait for the commit and print the point's number.") var wait = false

    func run() async throws {
        let answer = try await options.ask(Endpoints.cycle, group, wait ? [:] : [.wait: "false"])
        if !options.json, case .committed(let point) = answer { Output.line("\(point.id)") }
    }
}

struct Suspend: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Stop mirroring; what hosts change is remembered and sent after `resume`.")
    @OptionGroup var options: ControlOptions
    @Argument(help: "The group.") var group: String
    func run() async throws { Output.missed(try await options.ask(Endpoints.suspend, group)) }
}

struct Resume: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Go on mirroring after `suspend`, or try a lost link at once.")
    @OptionGroup var options: ControlOptions
    @Argument(help: "The group.") var group: String
    @Flag(help: "Serve hosts although the peer has not said that it has not taken over (on_isolated).")
    var isolated = false
    @Flag(help: "The secondary was seeded with a copy: until the first commit send only what differs by checksum.")
    var fromImage = false
    func run() async throws {
        let query: [APICall.Query: String] = isolated ? [.isolated: "true"] : fromImage ? [.fromImage: "true"] : [:]
        Output.missed(try await options.ask(Endpoints.resume, group, query))
    }
}

struct Points: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "List the recovery points (at the primary: the newest committed one), or drop some.",
        discussion:
            "Dropping frees their space at once. The newest point stays, and the one that was failed over to; so do points with "
            + "readers. Drop the oldest first: what older points read through a newer one moves to them.")
    @OptionGroup var options: ControlOptions
    @Argument(help: "The group.") var group: String
    @Option(parsing: .upToNextOption, help: "Drop these points.") var drop: [UInt64] = []
    @Option(
        help: "Drop points formed before a time (2026-11-21T17:00:00Z), or longer ago than an age (90min, 36h, 7d).")
    var olderThan: String?
    @Flag(help: "Do not ask.") var yes = false

    func validate() throws {
        if !drop.isEmpty, olderThan != nil { throw ValidationError("--drop and --older-than exclude each other") }
    }

    func run() async throws {
        if !drop.isEmpty || olderThan != nil { return try await remove() }
        for point in try await options.ask(Endpoints.points, group) where !options.json {
            Output.line("\(point.id)\tformed \(point.formedAt)\tcommitted \(point.committedAt ?? "-")")
        }
    }

    private func remove() async throws {
        var request = PointDropRequest(points: olderThan == nil ? drop : nil, olderThan: olderThan)
        request.preview = true
        let shown = try await options.quiet.ask(Endpoints.dropPoints, group, body: request)
        let words = render(shown, "would be dropped")
        if !yes, !shown.dropped.isEmpty {
            guard isatty(0) == 1 else {
                throw ValidationError("\(words)\nthere is nobody to ask; give --yes to drop them")
            }
            try Output.confirm(words, "drop them?")
        }
        request.preview = nil
        let report = try await options.ask(Endpoints.dropPoints, group, body: request)
        if !options.json { Output.line(render(report, "dropped")) }
    }

    private func render(_ report: PointDropReport, _ verb: String) -> String {
        var lines = report.dropped.map { "point \($0.id), formed \($0.formedAt): \(verb)" }
        lines += report.kept.map { "point \($0.id) stays: \($0.reason)" }
        if report.dropped.isEmpty { lines.append("nothing is dropped") }
        if report.freedBytes > 0 { lines.append("their files take \(StatusText.bytes(report.freedBytes))") }
        for point in report.leaving {
            lines.append("point \(point) leaves once what older ones read through it has moved to them")
        }
        return lines.joined(separator: "\n")
    }
}

struct Events: AsyncParsableCommand {
    static let configuration = CommandConfiguration(abstract: "Show what has happened since the site started.")
    @OptionGroup var options: ControlOptions
    @Argument(help: "Only this group.") var group: String?

    func run() async throws {
        let entries = try await options.ask(Endpoints.events, "", group.map { [.group: $0] } ?? [:])
        for entry in entries where !options.json {
            Output.line("\(entry.at)\t\(entry.group ?? "-")\t\(entry.text)")
        }
    }
}

struct Rate: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Bound the link of a group from now on, through restarts: 50MiB (a second), unlimited, or default.")
    @OptionGroup var options: ControlOptions
    @Argument(help: "The group.") var group: String
    @Argument(help: "Bytes a second, 'unlimited', or 'default' for what the configuration says.") var rate: String

    func run() async throws {
        guard rate == "default" || rate == "unlimited" || parseSize(rate) ?? 0 >= 16 << 10 else {
            throw ValidationError("'\(rate)' is no rate: write 50MiB (at least 16KiB a second), unlimited, or default")
        }
        let bytes = rate == "default" ? rate : rate == "unlimited" ? "0" : String(parseSize(rate)!)
        _ = try await options.ask(Endpoints.rate, group, [.bytes: bytes])
    }
}

struct Practice: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "At the secondary: a writable copy of a point, VOLUME@practice, while mirroring goes on.")
    @OptionGroup var options: ControlOptions
    @Argument(help: "The group.") var group: String
    @Option(help: "The recovery point; default: the newest.") var point: UInt64?
    @Flag(help: "Remove the copy.") var end = false

    func run() async throws {
        if end {
            _ = try await options.ask(Endpoints.endPractice, group)
            return
        }
        let reports = try await options.ask(Endpoints.practice, group, point.map { [.point: String($0)] } ?? [:])
        for report in reports where !options.json { Output.line(report.export) }
    }
}

struct Verify: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "At the primary: compare a point at both sites by checksum, while mirroring goes on.",
        discussion: "Ends with 1 when the sites differ.")
    @OptionGroup var options: ControlOptions
    @Argument(help: "The group.") var group: String
    @Flag(help: "Send what differs again.") var repair = false
    @Option(help: "Most bytes that are compared in a second, such as 50MiB.") var rate: String?

    func run() async throws {
        var query: [APICall.Query: String] = [.repair: "\(repair)"]
        if let rate {
            guard let bytes = parseSize(rate), bytes > 0 else { throw ValidationError("'\(rate)' is no rate") }
            query[.rate] = String(bytes)
        }
        let report = try await options.ask(Endpoints.verify, group, query)
        if !options.json {
            Output.line(
                "point \(report.point): compared \(StatusText.bytes(report.comparedBytes)), "
                    + "\(StatusText.bytes(report.differingBytes)) differ")
            for part in report.differences {
                let site = part.site.map { "\($0): " } ?? ""
                Output.line("\(site)\(part.volume)\t\(part.offset)\t\(part.length)")
            }
        }
        if report.repairing {
            return options.json ? () : Output.line("what differs is sent again with the next point")
        }
        if report.differingBytes > 0 {
            Output.fail("the sites differ; `farcopy verify \(group) --repair` sends it again")
        }
    }
}

struct RestoreGroup: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "restore",
        abstract:
            "At the primary: make all volumes of a group the point again that was committed last, from their change volumes.",
        discussion:
            "For groups in mode change-volume, whose peer may be needed. What the volumes hold is kept as FlashCopy before-restore-N until it "
            + "is withdrawn. Hosts must not have the volumes open for writing; with --yes they are disconnected.")
    @OptionGroup var options: ControlOptions
    @Argument(help: "The group.") var group: String
    @Option(help: "What to restore from: change-volume.") var from: String
    @Flag(help: "Disconnect hosts that have the volumes open; do not ask.") var yes = false
    @Flag(help: "Do not keep what the volumes hold.") var discard = false

    func run() async throws {
        let report = try await options.disconnecting(yes) { disconnect in
            var request = LocalRestoreRequest(from: from)
            (request.disconnect, request.discard) = (disconnect, discard)
            return try await options.ask(Endpoints.restore, group, body: request)
        }
        guard !options.json else { return }
        Output.line(
            "restored to point \(report.point): \(StatusText.bytes(report.bytes)) written, \(StatusText.bytes(report.fetchedBytes)) of "
                + "them from the peer; \(report.disconnected) connections ended"
                + (report.keptAs.map {
                    "; what the volumes held before is kept as FlashCopy \($0) until it is withdrawn"
                } ?? ""))
    }
}

/// `status` for people.
enum StatusText {
    static func bytes(_ count: UInt64) -> String {
        let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
        var value = Double(count)
        var unit = 0
        while value >= 1024, unit < units.count - 1 {
            value /= 1024
            unit += 1
        }
        return unit == 0 ? "\(count) B" : "\(tenths(value)) \(units[unit])"
    }

    static func tenths(_ value: Double) -> String {
        let scaled = Int((value * 10).rounded())
        return "\(scaled / 10).\(scaled % 10)"
    }

    static func render(_ report: StatusReport, groupOnly: Bool) -> String {
        var lines = ["site \(report.site)"]
        if let alerts = report.alerts, !groupOnly { lines += alerts.map { "  alert: \($0)" } }
        for (name, group) in report.groups.sorted(by: { $0.key < $1.key }) { lines += text(name, group) }
        guard !groupOnly else { return lines.joined(separator: "\n") }
        for (name, volume) in report.volumes.sorted(by: { $0.key < $1.key }) {
            var line = "volume \(name): \(bytes(volume.size)), grain \(bytes(UInt64(volume.grain)))"
            if volume.restoringBytes > 0 { line += ", restoring \(bytes(volume.restoringBytes))" }
            if let lacks = volume.changeVolumeLacksBytes, lacks > 0 {
                line += ", its change volume lacks \(bytes(lacks))"
            }
            lines.append(line)
            for copy in volume.flashcopies where copy.reason != nil {
                lines.append("  FlashCopy \(copy.name): \(copy.state): \(copy.reason!)")
            }
            lines.append("  exports: \(volume.exports.isEmpty ? "none yet" : volume.exports.joined(separator: " "))")
        }
        return lines.joined(separator: "\n")
    }

    private static func text(_ name: String, _ group: StatusReport.GroupReport) -> [String] {
        var lines = ["group \(name): \(group.role) of \(group.peer), \(group.state), mode \(group.mode)"]
        if let reason = group.reason { lines.append("  reason: \(reason)") }
        for member in group.members ?? [] { lines.append("  " + text(member)) }
        if let notice = group.notice { lines.append("  notice: \(notice)") }
        if let alerts = group.alerts { lines += alerts.map { "  alert: \($0)" } }
        if let operation = group.operation {
            lines.append("  \(operation.name)\(operation.startedAt.map { " since \($0)" } ?? ""): \(operation.step)")
        }
        if let point = group.point { lines.append("  point \(point.id), formed \(point.formedAt)") }
        if let time = group.consistentAsOf { lines.append("  consistent as of \(time)") }
        var figures: [String] = []
        if let lag = group.lagSeconds { figures.append("lag \(tenths(lag)) s") }
        if let pending = group.pendingBytes { figures.append("pending \(bytes(pending))") }
        if let rate = group.rateBytesPerSecond, rate > 0 { figures.append("sending \(bytes(UInt64(rate)))/s") }
        if let progress = group.progress { figures.append("\(tenths(progress * 100)) % copied") }
        if let eta = group.etaSeconds { figures.append("ETA \(tenths(eta)) s") }
        if !figures.isEmpty { lines.append("  " + figures.joined(separator: ", ")) }
        if let collisions = group.collisions { lines.append("  collisions: " + text(collisions)) }
        return lines
    }

    private static func text(_ member: StatusReport.MemberReport) -> String {
        if let problem = member.problem { return "\(member.site): \(problem)" }
        var parts = ["\(member.role ?? "?"), \(member.state ?? "?")"]
        if let reason = member.reason { parts[0] += " (\(reason))" }
        if let point = member.point { parts.append("point \(point)") }
        if let lag = member.lagSeconds { parts.append("lag \(tenths(lag)) s") }
        if let notice = member.notice { parts.append(notice) }
        return "\(member.site): \(parts.joined(separator: ", "))"
    }

    private static func text(_ collisions: CollisionReport) -> String {
        var parts = [
            "\(collisions.policy), \(bytes(UInt64(collisions.memoryInUse))) of \(bytes(UInt64(collisions.memoryLimit))) in memory "
                + "(at most \(bytes(UInt64(collisions.memoryPeak))) so far)"
        ]
        if collisions.waits > 0 {
            let mean = collisions.waitSeconds / Double(collisions.waits) * 1000
            parts.append("\(collisions.waits) writes waited, \(tenths(mean)) ms on average")
        }
        if let reason = collisions.lastGivenUp {
            parts.append("\(collisions.pointsGivenUp) points given up, last: \(reason)")
        }
        return parts.joined(separator: "; ")
    }
}
