import FoundationEssentials
import Groups
import Testing

private let point = PointRecord(number: 7, formedAt: 1, committedAt: 2)

/// A record of each phase.
private func record(_ kind: Phase.Kind) -> GroupRecord {
    var record = GroupRecord(role: kind == .secondary || kind == .failedOver ? .secondary : .primary, generation: "one")
    record.lastNumber = 7
    switch kind {
    case .secondary, .mirroring: return record
    case .handingOver: record.handOver(at: 7)
    case .failedOver:
        record.points = [point]
        return record.afterFailover(to: 7, volumes: ["a", "b"], generation: "two", now: 3, joins: true)
    }
    return record
}

private let kinds: [Phase.Kind] = [.secondary, .mirroring, .handingOver, .failedOver]

@Test("which phase may follow which is one table", arguments: kinds, kinds)
func transitions(from: Phase.Kind, to: Phase.Kind) {
    let (before, after) = (record(from), record(to))
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

@Test("the steps of roles stay within the table, and do nothing where they do not belong")
func steps() throws {
    var primary = record(.mirroring)
    primary.takeBackHandover()
    primary.endRestore(of: "a")
    primary.forgetYield()
    #expect(primary == record(.mirroring))
    primary.handOver(at: 7)
    #expect(primary.handingOver == 7 && primary.role == .primary && !primary.isMirroring)
    primary.handOver(at: 8)
    #expect(primary.handingOver == 7)
    primary.takeBackHandover()
    #expect(primary.isMirroring)

    var yielded = primary.afterYielding(at: point, to: "peer", generations: ["two"], lineage: "new", dropped: [])
    try yielded.check(after: primary)
    #expect(yielded.yielded == 7 && yielded.primary == nil)
    yielded.primary?.alone = true
    yielded.primary = Phase.Primary()
    #expect(yielded.role == .secondary && !yielded.isAlone, "what a primary has is of no effect at a secondary")
    yielded.forgetYield()
    #expect(yielded.yielded == nil)

    var taken = yielded.afterFailover(to: 7, volumes: ["a"], generation: "three", now: 4, joins: false)
    try taken.check(after: yielded)
    taken.endRestore(of: "a")
    taken.primary?.alone = true
    #expect(taken.failedOver?.restoring == [] && taken.isAlone && taken.failedOver?.point == 7)
    let joined = taken.afterJoining("peer", lineage: "newest", at: PointRecord(number: 9, formedAt: 5))
    try joined.check(after: taken)
    #expect(joined.isMirroring && !joined.isAlone && joined.lastCommitted?.number == 9)
}

@Test("neither is a number forgotten nor a point held that was not counted")
func numbers() {
    let before = record(.mirroring)
    var after = before
    after.lastNumber = 6
    #expect(throws: IllegalPhase.self) { try after.check(after: before) }
    after = before
    after.primary?.point = .held(PointRecord(number: 8, formedAt: 1))
    #expect(throws: IllegalPhase.self) { try after.check(after: before) }
    after.lastNumber = 8
    #expect(throws: Never.self) { try after.check(after: before) }
}

@Test("a record comes back as it was", arguments: kinds)
func stored(kind: Phase.Kind) throws {
    var record = record(kind)
    record.primary?.lastCommitted = point
    record.primary?.point = .forming(7)
    record.primary?.alone = true
    record.primary?.conflict = Phase.Conflict(kind: .splitBrain, at: 3)
    record.primary?.failingBack = true
    record.noteUntracked("a", lineage: "lost", session: 3)
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
