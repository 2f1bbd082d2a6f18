import FoundationEssentials
import Groups
import Testing

/// A record of each phase.
private func record(_ kind: Phase.Kind, _ more: String = "") throws -> GroupRecord {
    let fields =
        switch kind {
        case .secondary: "role=secondary"
        case .mirroring: ""
        case .handingOver: "handingOver=7"
        case .failedOver: "failedOver=7 restoring=a,b points=7"
        }
    return try GroupRecord("counted=7 \(fields) \(more)")
}

private let kinds: [Phase.Kind] = [.secondary, .mirroring, .handingOver, .failedOver]

@Test("which phase may follow which is one table", arguments: kinds, kinds)
func transitions(from: Phase.Kind, to: Phase.Kind) throws {
    let (before, after) = (try record(from), try record(to))
    #expect(before.phase.kind == from && after.phase.kind == to)
    let allowed: [Phase.Kind: [Phase.Kind]] = [
        .secondary: [.failedOver], .mirroring: [.handingOver, .secondary], .handingOver: [.mirroring, .secondary],
        .failedOver: [.mirroring, .secondary],
    ]
    if from == to || allowed[from]!.contains(to) {
        #expect(throws: Never.self) { try after.check(after: before) }
    } else {
        #expect(throws: IllegalPhase.self) { try after.check(after: before) }
    }
}

@Test("neither is a number forgotten nor a point held that was not counted")
func numbers() throws {
    let before = try GroupRecord("counted=7")
    #expect(throws: IllegalPhase.self) { try GroupRecord("counted=6").check(after: before) }
    #expect(throws: IllegalPhase.self) { try GroupRecord("counted=7 held=8").check(after: before) }
    #expect(throws: Never.self) { try GroupRecord("counted=8 held=8").check(after: before) }
}

@Test("a record comes back as it was", arguments: kinds)
func stored(kind: Phase.Kind) throws {
    var record = try record(
        kind, kind == .secondary ? "yielded=7" : "committed=7 forming=7 alone conflict=split-brain failingBack")
    try record.apply(.untracked(volume: "a", lineage: "lost", session: 3))
    let again = try JSONDecoder().decode(GroupRecord.self, from: JSONEncoder().encode(record))
    #expect(again == record)
}

/// As versions wrote it that knew no phases.
private func decode(_ fields: String) throws -> GroupRecord {
    let text =
        #"{"format": 2, "generations": ["one"], "lastNumber": 7, "points": [], "suspendedByOperator": false, \#(fields)}"#
    return try JSONDecoder().decode(GroupRecord.self, from: Data(text.utf8))
}

@Test("a record that contradicts itself is refused with the reason")
func contradictions() throws {
    let held = #""held": {"number": 7, "formedAt": 1}"#
    #expect(try decode(#""role": "primary", \#(held)"#).held?.number == 7)
    #expect(try decode(#""role": "primary", "handingOver": 7, "alone": true"#).handingOver == 7)
    #expect(try decode(#""role": "secondary", "yielded": 7"#).yielded == 7)
    let failedOver = #""failedOver": {"point": 7, "at": 1, "restoring": ["a"]}"#
    #expect(try decode(#""role": "primary", \#(failedOver)"#).failedOver?.restoring == ["a"])
    for (fields, word) in [
        (#""role": "secondary", \#(held)"#, "held"), (#""role": "secondary", \#(failedOver)"#, "failedOver"),
        (#""role": "primary", "yielded": 7"#, "yielded"),
        (#""role": "primary", "handingOver": 7, \#(failedOver)"#, "handingOver"),
    ] {
        let refused = #expect(throws: IllegalPhase.self) { try decode(fields) }
        #expect(refused?.description.contains("'\(word)'") == true)
    }
}

@Test("a point that is held stays with the copy that it was formed for")
func copies() throws {
    let held = try GroupRecord("counted=7 held=7 committed=6 lineage=L lineages=a:A,b:B")
    for (next, isLegal) in [
        ("counted=7 held=7 committed=6 lineage=L lineages=a:A", true),
        ("counted=7 held=7 committed=6 lineage=L lineages=a:A,b:B,c:C", true),
        ("counted=7 lineage=M lineages=a:C,b:D", true),
        ("counted=8 forming=8 lineage=M", true),
        ("counted=7 held=7 lineage=M lineages=a:A,b:B", false),
        ("counted=7 held=7 committed=6 lineage=L lineages=a:A,b:D", false),
    ] {
        #expect(((try? GroupRecord(next).check(after: held)) != nil) == isLegal, "\(next)")
    }
}
