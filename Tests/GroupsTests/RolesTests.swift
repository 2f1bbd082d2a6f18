import Groups
import Testing

private func standing(
    _ role: Role, _ generations: [String], alone: Bool = false, wrote: Bool = true, changed: UInt64 = 0
) -> Standing {
    var record = GroupRecord(role: role, generation: "")
    record.generations = generations
    record.primary?.alone = alone
    return Standing(site: "a", siteID: "1", record: record, wrote: wrote, changedBytes: changed)
}

@Test("a site's verdict follows from both standings")
func aSitesVerdictFollowsFromBothStandings() {
    let old = standing(.primary, ["g1"], changed: 4096)
    let new = standing(.primary, ["g2", "g1"])
    #expect(judge(old, new) == .stale)
    #expect(judge(new, old) == .inOrder)
    #expect(judge(old, standing(.secondary, ["g1"])) == .inOrder)
    #expect(judge(standing(.secondary, ["g1"]), old) == .inOrder)
    #expect(judge(old, standing(.primary, ["other"])) == .unrelated)
}

@Test("split-brain needs writes at both sites")
func splitBrainNeedsWritesAtBoth() {
    let alone = standing(.primary, ["g1"], alone: true, changed: 4096)
    let new = standing(.primary, ["g2", "g1"])
    #expect(judge(alone, new) == .splitBrain)
    #expect(judge(new, alone) == .splitBrain, "both say the same")
    #expect(judge(alone, standing(.primary, ["g2", "g1"], wrote: false)) == .stale)
    #expect(judge(standing(.primary, ["g1"], alone: true), new) == .stale, "nothing was written alone")
    // Both have gone on from a common past.
    #expect(judge(standing(.primary, ["g3", "g1"]), standing(.primary, ["g2", "g1"])) == .splitBrain)
}

@Test("a site that gives up its role keeps its points and nothing of a primary's")
func aYieldedRecordKeepsPointsAndNoPrimarysState() {
    var record = GroupRecord(role: .primary, generation: "g1")
    record.primary?.point = .held(PointRecord(number: 7, formedAt: 1))
    record.lastNumber = 7
    record.primary?.alone = true
    record.primary?.conflict = Phase.Conflict(kind: .stale, at: 1)
    record.points = [PointRecord(number: 3, formedAt: 1)]
    let base = PointRecord(number: 9, formedAt: 5, order: 4, isBase: true)
    let yielded = record.afterYielding(
        at: base, to: "peer", generations: ["g2", "g1"], lineage: "new", dropped: [record.points[0]])
    #expect(yielded.role == .secondary && yielded.points == [base] && yielded.retired?.map(\.number) == [3])
    #expect(yielded.held == nil && yielded.conflict == nil && !yielded.isAlone && yielded.yielded == 9)
    let joined = GroupRecord(role: .primary, generation: "g2").afterJoining("me", lineage: "new", at: base)
    #expect(joined.lastCommitted == base && joined.lastNumber == 9 && joined.lineage == yielded.lineage)
}

@Test("retention keeps the newest of each period")
func retentionKeepsTheNewestOfEachPeriod() {
    // One point every ten minutes for three days.
    let points = (0..<432).map { PointRecord(number: UInt64($0), formedAt: 86400 * 10 + Double($0) * 600) }
    let kept = { (retention: Retention) in
        let dropped = Set(retention.dropped(points).map(\.number))
        return points.map(\.number).filter { !dropped.contains($0) }
    }
    #expect(kept(Retention(last: 3)) == [429, 430, 431])
    #expect(kept(Retention(last: 1, hourly: 3)) == [419, 425, 431])
    #expect(kept(Retention(last: 2, hourly: 2, daily: 2)) == [287, 425, 430, 431])
    #expect(kept(Retention(last: 0)) == [431], "the newest always stays")
    #expect(Retention(last: 500).dropped(points).isEmpty)
}
