import Groups
import Testing

@Test("a failover goes to the newest point that can be read, or to the one that is named")
func failoverPoint() throws {
    let record = try GroupRecord("role=secondary points=1,2,3 failed=2")
    #expect(throws: TakeoverRefusal.self) { try record.failoverPoint(2) }
    #expect(try record.failoverPoint(1).number == 1)
    #expect(try record.failoverPoint(nil).number == 3)
    #expect(throws: TakeoverRefusal.self) { try GroupRecord("role=secondary points=1 failed=1").failoverPoint(nil) }
    #expect(throws: TakeoverRefusal.self) { try GroupRecord("points=1").failoverPoint(nil) }
}

@Test("a commit is planned while no writes are under way")
func commitPlan() throws {
    let record = try GroupRecord("role=secondary points=2,3")
    #expect(record.hasCommitted(3) != nil && record.hasCommitted(2) == nil)
    #expect(throws: TakeoverRefusal.self) {
        try record.planCommit(
            4, formedAt: 0, keep: Retention(last: 2),
            IntakeSurvey(writesUnderWay: 1, order: 9, changed: [], at: 1))
    }
    let plan = try record.planCommit(
        4, formedAt: 0, keep: Retention(last: 2),
        IntakeSurvey(writesUnderWay: 0, order: 9, changed: ["a"], retired: [1: ["b"]], at: 1))
    #expect(plan.point.order == 9 && plan.dropped.map(\.number) == [2])
    #expect(plan.point.changed == ["a"] && plan.retired == [1: ["b"]])
}

@Test("a volume that has not changed is read through an older point's files")
func carriers() throws {
    // b has changed in 3 and 6; c never since the first point that the record knows, which has been retired.
    let record = try GroupRecord("role=secondary retired=2,3:b points=4:a,5:a,6:a+b,7:")
    #expect(record.carriers(of: ["a", "b", "c"]) == ["a": [4, 5, 6], "b": [3, 6], "c": [2]])
    #expect(["a", "b", "c"].map { record.carrier(of: 7, $0) } == [6, 6, 2])
    #expect(["a", "b", "c"].map { record.carrier(of: 4, $0) } == [4, 3, 2])
    #expect(record.carrier(of: 3, "b") == nil)
    #expect(record.points(carriedBy: 3, "b").map(\.number) == [4, 5])
    #expect(record.points(carriedBy: 2, "c").map(\.number) == [4, 5, 6, 7])
    #expect(record.points(carriedBy: 2, "a").isEmpty)
}

@Test("a volume that joined the group has no part in points before")
func carriersOfWhoJoined() throws {
    var record = try GroupRecord("role=secondary points=4,5: lineages=a:L,b:L")
    try record.apply(
        .started(Membership(volumes: ["a", "b", "c"], foreign: ["c": "M"], exchanged: [], lineage: "N")))
    #expect(record.carriers(of: ["a", "b", "c"]) == ["a": [4], "b": [4]])
    #expect(record.carrier(of: 5, "c") == nil)
}

@Test("a point is given up at a start when one volume does not hold it any more")
func uncertainPoint() throws {
    let record = try GroupRecord("counted=4 held=4")
    #expect(!record.mustGiveUpPoint(heldBy: [4, 4], .flashcopy))
    for held: [UInt64?] in [[4, 0], [3, 4], [nil, 4]] { #expect(record.mustGiveUpPoint(heldBy: held, .flashcopy)) }
    #expect(try !GroupRecord("counted=4").mustGiveUpPoint(heldBy: [4, nil], .flashcopy))
    #expect(record.mustGiveUpPoint(heldBy: [4, 4], .globalMirror), "what memory held is gone, whatever a target has")
}
