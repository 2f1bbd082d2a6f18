import FoundationEssentials
import Glibc
import Groups
import Testing

private let folder = #filePath.split(separator: "/").dropLast().map { "/\($0)" }.joined() + "/Transcripts"

@Test("what the machines answer", arguments: ["cycle", "commits", "roles", "steps"])
func transcripts(name: String) throws {
    var machine = GroupTranscript()
    try checkTranscript(name) { try machine.answer($0) }
}

func checkTranscript(_ name: String, _ answer: (Line) throws -> [String]) throws {
    let path = "\(folder)/\(name).txt"
    let text = String(decoding: try Data(contentsOf: URL(filePath: path)), as: UTF8.self)
    var made: [String] = []
    for line in text.split(separator: "\n", omittingEmptySubsequences: false) where !line.hasPrefix("  ") {
        made.append(String(line))
        guard !line.isEmpty, !line.hasPrefix("#") else { continue }
        made += try answer(Line(line)).map { "  \($0)" }
    }
    if getenv("TRANSCRIPTS").map({ String(cString: $0) }) == "write" {
        try Data(made.joined(separator: "\n").utf8).write(to: URL(filePath: path))
        return
    }
    let expected = text.split(separator: "\n", omittingEmptySubsequences: false).map(String.init)
    for (index, (one, other)) in zip(expected, made).enumerated() where one != other {
        Issue.record("\(name).txt:\(index + 1): expected '\(one)', and it answers '\(other)'")
        return
    }
    #expect(expected.count == made.count)
}

/// Each change once, for each phase: its place, and that it keeps to it.
@Test(
    "every change has its place in every phase", arguments: ["secondary", "mirroring", "handing over", "failed over"])
func places(phase: String) throws {
    let record = try GroupRecord(
        [
            "secondary": "role=secondary yielded=5 points=5 counted=8", "mirroring": "counted=8 held=8 committed=7",
            "handing over": "handingOver=8 counted=8 held=8",
            "failed over": "failedOver=7 restoring=a,b points=7 counted=8 held=8",
        ][phase]!)
    #expect(record.phase.kind.rawValue == phase)
    for (name, change) in samples(Line("change points=7 point=9 foreign=b:new")) {
        var next = record
        switch change.place(in: record.phase.kind) {
        case .handled:
            try next.apply(change)
            // What the record says already, or is about what it has not.
            let saysSo = ["pointFailed", "retired", "sentAnew", "pointsVoided", "started", "conflict"].contains(name)
            #expect(next != record || saysSo, "\(name) does nothing")
            #expect(throws: Never.self) { try next.check(after: record) }
        case .late:
            try next.apply(change)
            #expect(next == record, "\(name) is late, and does something")
        case .impossible:
            #expect(throws: IllegalPhase.self) { try next.apply(change) }
            #expect(next == record, "\(name) is impossible, and does something")
        }
    }
    // Spelt out here as well: the table is not to change without somebody noticing.
    let places: [String: String] = [
        "secondary":
            "alone late, committed handled, conflict late, failedOver handled, failingBack late, generationBegun impossible, handingOver impossible, handoverTakenBack late, joined impossible, paired handled, pointFailed handled, pointGivenUp late, pointsVoided handled, rate handled, restored late, retired handled, seeded impossible, sentAnew handled, started handled, untracked handled, yieldIsKnown handled, yielded impossible",
        "mirroring":
            "alone handled, committed impossible, conflict handled, failedOver impossible, failingBack handled, generationBegun handled, handingOver handled, handoverTakenBack late, joined handled, paired impossible, pointFailed handled, pointGivenUp handled, pointsVoided handled, rate handled, restored late, retired handled, seeded handled, sentAnew late, started handled, untracked handled, yieldIsKnown late, yielded handled",
        "handing over":
            "alone handled, committed impossible, conflict handled, failedOver impossible, failingBack handled, generationBegun handled, handingOver impossible, handoverTakenBack handled, joined handled, paired impossible, pointFailed handled, pointGivenUp handled, pointsVoided handled, rate handled, restored late, retired handled, seeded handled, sentAnew late, started handled, untracked handled, yieldIsKnown late, yielded handled",
        "failed over":
            "alone handled, committed impossible, conflict handled, failedOver impossible, failingBack handled, generationBegun handled, handingOver impossible, handoverTakenBack late, joined handled, paired impossible, pointFailed handled, pointGivenUp handled, pointsVoided handled, rate handled, restored handled, retired handled, seeded handled, sentAnew late, started handled, untracked handled, yieldIsKnown late, yielded handled",
    ]
    let found = samples(Line("change")).map { "\($0.key) \($0.value.place(in: record.phase.kind))" }.sorted()
    #expect(found.joined(separator: ", ") == places[phase])
}

/// A cycle in each of its states, with point 9 under way in some, and its record.
private func cycle(_ state: String) throws -> (Cycle, GroupRecord) {
    let peer = PeerState(session: 1, site: "west", lineage: state == "marking" ? "other" : "L", committed: point(7))
    let half =
        state == "giving up" ? "forming=9" : ["connecting, held", "offline, held"].contains(state) ? "held=9" : ""
    var group = Group(record: try GroupRecord("counted=\(half.isEmpty ? 8 : 9) committed=7 lineage=L \(half)"))
    func saved(_ turn: Turn<Cycle.Action>) { if turn.saves { group.wasSaved() } }
    saved(group.begin(Cycle.Settings(interval: .continuous, volumes: 1, window: 1), now: 1))
    let opened = Cycle.Event.sessionOpened(peer)
    let formed: [Cycle.Event] = [opened, .prepared(changed: true), .formed(at: 1, intact: true, changed: [0])]
    let way: [String: [Cycle.Event]] = [
        "stopped": [.sessionOpened(PeerState(session: 1, site: "west", lineage: "L", committed: point(99)))],
        "offline": [.sessionFailed("why", retry: true)], "offline, held": [.sessionFailed("why", retry: true)],
        "marking": [opened], "preparing": [opened],
        "idle": [opened, .prepared(changed: false)], "forming": Array(formed.prefix(2)), "moving": formed,
        "committing": formed + [.move(.read(slot: 0, grains: nil, offset: 0, length: 0))],
    ]
    for event in way[state] ?? [] { saved(group.handle(event, now: 1)) }
    return (group.cycle!, group.record)
}

/// Each event of the cycle once, in each of its states: its place, and that it keeps to it.
@Test("every event has its place in every state of the cycle")
func cyclePlaces() throws {
    let always = "suspend resume request"
    let expected = [
        "stopped": "tick \(always)", "offline": "tick \(always)", "offline, held": "tick pointlost \(always)",
        "connecting": "tick opened refused lost \(always)",
        "connecting, held": "tick opened refused lost pointlost \(always)", "marking": "tick lost marked \(always)",
        "idle": "tick lost \(always)", "preparing": "tick lost prepared unready \(always)",
        "forming": "tick lost formed pointlost \(always)", "moving": "tick lost move pointlost \(always)",
        "committing": "tick lost committed declined pointlost \(always)", "giving up": "tick gaveup \(always)",
    ]
    let peer = PeerState(session: 1, site: "west", lineage: "L", committed: point(7))
    let events: [(String, Cycle.Event)] = [
        ("tick", .tick), ("opened", .sessionOpened(peer)), ("refused", .sessionFailed("why", retry: true)),
        ("lost", .linkLost("why")), ("marked", .allMarked), ("prepared", .prepared(changed: true)),
        ("unready", .notReady), ("formed", .formed(at: 1, intact: true, changed: [0])), ("move", .move(.flushed)),
        ("committed", .committed(at: 1)), ("declined", .commitRefused("why")), ("pointlost", .pointLost("why")),
        ("gaveup", .gaveUp), ("suspend", .suspend), ("resume", .resume), ("request", .request),
    ]
    for (state, places) in expected {
        var handled: [String] = []
        for (name, event) in events {
            var (cycle, record) = try cycle(state)
            #expect("\(cycle.state)".hasPrefix(named[state] ?? state), "\(state)")
            let before = record
            let place = cycle.place(of: event)
            let turn = cycle.handle(event, &record, now: 1)
            if place == .handled {
                handled.append(name)
            } else {
                #expect(turn == Turn() && record == before, "\(name) is late while \(state), and does something")
            }
        }
        #expect(handled.joined(separator: " ") == places, "\(state)")
    }
}

private let named = [
    "offline, held": "offline", "connecting, held": "connecting", "forming": "atPoint(Groups.Cycle.Work.none)",
    "moving": "atPoint(Groups.Cycle.Work.moves", "committing": "atPoint(Groups.Cycle.Work.commits)",
    "giving up": "givingUp",
]
