import Groups
import Testing

private func standing(
    _ role: Role, _ generations: [String], alone: Bool = false, wrote: Bool = true, changed: UInt64 = 0
) throws -> Standing {
    let record = try GroupRecord(
        "role=\(role.rawValue) generations=\(generations.joined(separator: ",")) \(alone ? "alone" : "")")
    return Standing(site: "a", siteID: "1", record: record, wrote: wrote, changedBytes: changed)
}

@Test("a site's verdict follows from both standings")
func aSitesVerdictFollowsFromBothStandings() throws {
    let old = try standing(.primary, ["g1"], changed: 4096)
    let new = try standing(.primary, ["g2", "g1"])
    #expect(judge(old, new) == .stale)
    #expect(judge(new, old) == .inOrder)
    #expect(try judge(old, standing(.secondary, ["g1"])) == .inOrder)
    #expect(try judge(standing(.secondary, ["g1"]), old) == .inOrder)
    #expect(try judge(old, standing(.primary, ["other"])) == .unrelated)
}

@Test("split-brain needs writes at both sites")
func splitBrainNeedsWritesAtBoth() throws {
    let alone = try standing(.primary, ["g1"], alone: true, changed: 4096)
    let new = try standing(.primary, ["g2", "g1"])
    #expect(judge(alone, new) == .splitBrain)
    #expect(judge(new, alone) == .splitBrain, "both say the same")
    #expect(try judge(alone, standing(.primary, ["g2", "g1"], wrote: false)) == .stale)
    #expect(try judge(standing(.primary, ["g1"], alone: true), new) == .stale, "nothing was written alone")
    // Both have gone on from a common past.
    #expect(try judge(standing(.primary, ["g3", "g1"]), standing(.primary, ["g2", "g1"])) == .splitBrain)
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
