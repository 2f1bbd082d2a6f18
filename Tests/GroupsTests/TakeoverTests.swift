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

@Test("a commit is planned in order, once, from a session without writes under way")
func commitPlan() throws {
    let record = try GroupRecord("role=secondary points=2,3")
    #expect(record.hasCommitted(3) != nil && record.hasCommitted(2) == nil)
    for (number, previous, writes) in [(UInt64(3), UInt64(3), 0), (5, 2, 0), (4, 3, 1)] {
        #expect(throws: TakeoverRefusal.self) {
            try record.planCommit(
                number, after: previous, formedAt: 0, now: 1, order: 9, keep: Retention(last: 2), left: [],
                writesUnderWay: writes)
        }
    }
    let plan = try record.planCommit(
        4, after: 3, formedAt: 0, now: 1, order: 9, keep: Retention(last: 2), left: [1], writesUnderWay: 0)
    #expect(plan.point.order == 9 && plan.dropped.map(\.number) == [2] && plan.left == [1])
}

@Test("a point is given up at a start when one volume does not hold it any more")
func uncertainPoint() throws {
    let record = try GroupRecord("counted=4 held=4")
    #expect(!record.mustGiveUpPoint(heldBy: [4, 4]))
    for held: [UInt64?] in [[4, 0], [3, 4], [nil, 4]] { #expect(record.mustGiveUpPoint(heldBy: held)) }
    #expect(try !GroupRecord("counted=4").mustGiveUpPoint(heldBy: [4, nil]))
}
