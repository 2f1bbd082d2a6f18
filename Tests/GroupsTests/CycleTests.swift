import Groups
import Testing

private func primary(_ change: (inout GroupRecord) -> Void = { _ in }) -> Cycle {
    var record = GroupRecord(role: .primary, generation: "one")
    record.lineage = "L"
    change(&record)
    return Cycle(record: record, settings: Cycle.Settings(interval: .continuous, volumes: 1, window: 2))
}

private func peer(_ number: UInt64?, lineage: String = "L") -> Cycle.Event {
    .sessionOpened(
        PeerState(
            session: 1, site: "west", lineage: lineage, committed: number.map { PointRecord(number: $0, formedAt: 1) }))
}

@Test("the intent is recorded before the first volume forms, the point before it is drained")
func orderOfRecords() {
    var cycle = primary()
    #expect(cycle.start(now: 0) == [.openSession])
    var actions = cycle.handle(peer(nil), now: 1)
    #expect(actions.last == .prepare(number: 1))
    actions = cycle.handle(.prepared(changed: true), now: 2)
    guard case .save(let intent) = actions.first else { return #expect(Bool(false), "the intent is saved first") }
    #expect(intent.forming == 1 && intent.held == nil && actions.dropFirst().first == .form(number: 1))
    actions = cycle.handle(.formed(at: 5, intact: true), now: 3)
    guard case .save(let held) = actions.first else { return #expect(Bool(false), "the point is saved first") }
    #expect(held.forming == nil && held.held?.number == 1)
    #expect(actions.dropFirst() == [.drain(.read(slot: 0, volume: 0)), .drain(.read(slot: 1, volume: 0))])
}

@Test("a point that was half formed at a crash is given up, a held one is drained again")
func restart() {
    var forming = primary { $0.primary?.point = .forming(4) }
    #expect(forming.start(now: 0) == [.giveUp])
    #expect(forming.suspension == nil, "whoever asks for a point now waits for it")
    let after = forming.handle(.gaveUp, now: 1)
    #expect(after.count == 2 && after.last == .openSession && forming.record.forming == nil)
    var held = primary {
        $0.primary?.point = .held(PointRecord(number: 4, formedAt: 1))
        $0.lastNumber = 4
        $0.primary?.lastCommitted = PointRecord(number: 3, formedAt: 0)
    }
    _ = held.start(now: 0)
    let actions = held.handle(peer(3), now: 1)
    #expect(actions.contains(.rewind) && actions.contains(.drain(.read(slot: 0, volume: 0))))
}

@Test("a commit whose answer was lost is found out, not repeated")
func lostAnswer() {
    var cycle = primary {
        $0.primary?.point = .held(PointRecord(number: 4, formedAt: 1))
        $0.lastNumber = 4
        $0.primary?.lastCommitted = PointRecord(number: 3, formedAt: 0)
    }
    _ = cycle.start(now: 0)
    #expect(cycle.handle(peer(4), now: 1) == [.giveUp])
    _ = cycle.handle(.gaveUp, now: 2)
    #expect(cycle.record.lastCommitted?.number == 4 && cycle.record.held == nil)
}

@Test("a secondary that the bitmaps say nothing about is copied in full, and recorded only once all is marked")
func otherLineage() {
    var cycle = primary { $0.primary?.lastCommitted = PointRecord(number: 3, formedAt: 0) }
    _ = cycle.start(now: 0)
    #expect(cycle.handle(peer(nil, lineage: "new"), now: 1) == [.markAllChanged(nil)])
    #expect(cycle.record.lineage == "L")
    _ = cycle.handle(.allMarked, now: 2)
    #expect(cycle.record.lineage == "new" && cycle.record.lastCommitted == nil)
}

@Test("a volume of the secondary that the bitmaps say nothing about is copied in full, the others are not")
func otherVolume() {
    var cycle = primary {
        $0.primary?.lastCommitted = PointRecord(number: 3, formedAt: 0)
        $0.lastNumber = 3
        $0.volumeLineages = ["a": "A", "b": "B"]
    }
    _ = cycle.start(now: 0)
    let peer = PeerState(
        session: 1, site: "west", lineage: "L", volumeLineages: ["a": "A", "b": "new"],
        committed: PointRecord(number: 3, formedAt: 1))
    #expect(cycle.handle(.sessionOpened(peer), now: 1) == [.markAllChanged(["b"])])
    #expect(cycle.record.volumeLineages?["b"] == "B")
    _ = cycle.handle(.allMarked, now: 2)
    #expect(cycle.record.volumeLineages?["b"] == "new" && cycle.record.lastCommitted?.number == 3)
}

@Test("a failover goes to a point that is whole, and begins a generation that the old primary does not have")
func failover() throws {
    var record = GroupRecord(role: .secondary, generation: "one")
    for number in UInt64(1)...3 { record.points.append(PointRecord(number: number, formedAt: 0)) }
    record.points[1].isFailed = true
    #expect(throws: TakeoverRefusal.self) { try record.failoverPoint(2) }
    #expect(try record.failoverPoint(1).number == 1)
    let after = record.afterFailover(to: 3, volumes: ["a"], generation: "two", now: 5, joins: false)
    #expect(after.role == .primary && after.generations == ["two", "one"] && after.failedOver?.point == 3)
}

@Test("a point that the hold's deadline spoilt is formed again for whoever asked for it")
func formedAgain() {
    var record = GroupRecord(role: .primary, generation: "one")
    record.lineage = "L"
    record.primary?.lastCommitted = PointRecord(number: 3, formedAt: 0)
    record.lastNumber = 3
    var cycle = Cycle(record: record, settings: Cycle.Settings(interval: .manual, volumes: 1, window: 2))
    _ = cycle.start(now: 0)
    _ = cycle.handle(peer(3), now: 1)
    #expect(cycle.handle(.request, now: 2) == [.prepare(number: 4)])
    _ = cycle.handle(.prepared(changed: false), now: 3)
    #expect(cycle.handle(.formed(at: 5, intact: false), now: 4) == [.giveUp])
    #expect(!cycle.handle(.gaveUp, now: 5).contains(.prepare(number: 5)), "hosts were held for nothing; not at once")
    guard let wake = cycle.wakeAt else { return #expect(Bool(false), "it is formed again") }
    #expect(cycle.handle(.tick, now: wake) == [.prepare(number: 5)])
}

@Test("that the secondary was seeded counts until a commit, also across a copy in full")
func seededUntilCommit() {
    var cycle = primary {
        $0.primary?.lastCommitted = PointRecord(number: 3, formedAt: 0)
        $0.lastNumber = 3
    }
    _ = cycle.start(now: 0)
    var seeded = cycle.record
    seeded.primary?.fromImage = true
    cycle.adopt(seeded)
    _ = cycle.handle(peer(nil, lineage: "new"), now: 1)
    _ = cycle.handle(.allMarked, now: 2)
    #expect(cycle.record.primary?.fromImage == true)
    _ = cycle.handle(.prepared(changed: true), now: 3)
    _ = cycle.handle(.formed(at: 5, intact: true), now: 4)
    for slot in 0..<2 { _ = cycle.handle(.read(slot: slot, grains: nil, offset: 0, length: 0), now: 5) }
    #expect(cycle.record.primary?.fromImage == true)
    _ = cycle.handle(.committed(at: 6), now: 6)
    #expect(cycle.record.lastCommitted?.number == 4 && cycle.record.primary?.fromImage == false)
}

@Test("a peer whose points are not ours stops the group with a reason", arguments: [UInt64(2), 4, 9])
func foreignPoints(theirs: UInt64) {
    var cycle = primary {
        $0.primary?.lastCommitted = PointRecord(number: 3, formedAt: 0)
        $0.lastNumber = 3
    }
    _ = cycle.start(now: 0)
    #expect(cycle.handle(peer(theirs), now: 1).contains(.giveUp))
    _ = cycle.handle(.gaveUp, now: 2)
    #expect(cycle.shownState == .suspended && cycle.record.lastCommitted?.number == 3)
    #expect(cycle.suspension?.contains("newest point is \(theirs) where 3 is expected") == true)
}

@Test("a point of ours that was given up here, and that the peer has committed all the same, is gone on from")
func committedMeanwhile() {
    var cycle = primary {
        $0.primary?.lastCommitted = PointRecord(number: 3, formedAt: 0)
        $0.lastNumber = 5
    }
    _ = cycle.start(now: 0)
    #expect(cycle.handle(peer(5), now: 1).last == .prepare(number: 6))
    #expect(cycle.record.lastCommitted?.number == 5)
}

@Test("bits are cleared only for data acknowledged before the flush began")
func drainClearsBehindTheFlush() {
    var drain = Drain(volumes: 1, window: 2, checkpointBytes: 100)
    #expect(drain.start().count == 2)
    _ = drain.didRead(slot: 0, grains: 0..<1, offset: 0, length: 100)
    _ = drain.didRead(slot: 1, grains: 1..<2, offset: 100, length: 100)
    #expect(drain.didSend(slot: 0, wire: 100).contains(.flush))
    let late = drain.didSend(slot: 1, wire: 100)
    #expect(!late.contains(.flush), "one flush at a time")
    let flushed = drain.didFlush()
    #expect(flushed.first == .clear([VolumeRun(volume: 0, grains: 0..<1)]))
    #expect(flushed.contains(.flush), "the second run has a flush of its own")
    _ = drain.didRead(slot: 0, grains: nil, offset: 0, length: 0)
    _ = drain.didRead(slot: 1, grains: nil, offset: 0, length: 0)
    #expect(drain.didFlush() == [.clear([VolumeRun(volume: 0, grains: 1..<2)]), .finished])
}

@Test("a drain ends when a flush has ended that began after everything was acknowledged, however little that is")
func lastFlushOfADrain() {
    var drain = Drain(volumes: 1, window: 1, checkpointBytes: 1 << 20)
    _ = drain.start()
    _ = drain.didRead(slot: 0, grains: 0..<1, offset: 0, length: 100)
    #expect(drain.didSend(slot: 0, wire: 100) == [.read(slot: 0, volume: 0)])
    #expect(drain.didRead(slot: 0, grains: nil, offset: 0, length: 0) == [.flush])
    #expect(drain.didFlush() == [.clear([VolumeRun(volume: 0, grains: 0..<1)]), .finished])
}

@Test("a point is given up at a start when one volume does not hold it any more")
func uncertainPoint() {
    var record = GroupRecord(role: .primary, generation: "one")
    record.primary?.point = .held(PointRecord(number: 4, formedAt: 1))
    var unchanged = record
    #expect(!unchanged.giveUpPoint(unlessHeldBy: [4, 4]) && unchanged.held?.number == 4)
    for held: [UInt64?] in [[4, 0], [3, 4], [nil, 4]] {
        var changed = record
        #expect(changed.giveUpPoint(unlessHeldBy: held) && changed.held == nil)
    }
}

@Test("no point is formed while a volume is not ready, and one is soon after")
func notReady() {
    var cycle = primary()
    _ = cycle.start(now: 0)
    _ = cycle.handle(peer(nil), now: 1)
    #expect(cycle.handle(.notReady, now: 2) == [])
    #expect(cycle.handle(.tick, now: 3) == [])
    let wake = cycle.wakeAt ?? 0
    #expect(wake > 3 && wake < 1_000_000_000)
    #expect(cycle.handle(.tick, now: wake) == [.prepare(number: 1)])
}

@Test("a commit is planned in order, once, and keeps what clones may still need")
func commitPlan() throws {
    var record = GroupRecord(role: .secondary, generation: "one")
    for number in UInt64(1)...3 {
        let plan = try record.planCommit(
            number, after: record.points.last?.number, formedAt: 0, now: 1, order: number, keep: Retention(last: 2),
            left: [],
            writesUnderWay: 0)
        plan.apply(&record)
    }
    #expect(record.points.map(\.number) == [2, 3] && record.retired?.map(\.number) == [1])
    #expect(record.hasCommitted(3) != nil && record.hasCommitted(2) == nil)
    for (number, previous, writes) in [(UInt64(3), UInt64(3), 0), (5, 2, 0), (4, 3, 1)] {
        #expect(throws: TakeoverRefusal.self) {
            try record.planCommit(
                number, after: previous, formedAt: 0, now: 1, order: 9, keep: Retention(last: 2), left: [],
                writesUnderWay: writes)
        }
    }
    let next = try record.planCommit(
        4, after: 3, formedAt: 0, now: 1, order: 9, keep: Retention(last: 2), left: [1], writesUnderWay: 0)
    // While its files are made others change the record.
    record.failPoint(2)
    record.noteUntracked("disk", lineage: "lost", session: 5)
    next.apply(&record)
    #expect(record.retired?.map(\.number) == [2] && next.dropped.map(\.number) == [2])
    #expect(record.untracked == ["disk": 5] && record.volumeLineages == ["disk": "lost"])
    #expect(throws: TakeoverRefusal.self) { try record.failoverPoint(2) }
    #expect(try record.failoverPoint(nil).number == 4)
    record.forgetUntracked(before: 5)
    #expect(record.untracked == ["disk": 5], "in the session of the note nothing was sent anew")
    record.forgetUntracked(before: 6)
    #expect(record.untracked == nil)
}

@Test("what relies on a record that could not be saved is not done, and mirroring waits until it can be")
func recordThatIsNotSaved() {
    var cycle = primary {
        $0.primary?.lastCommitted = PointRecord(number: 3, formedAt: 0)
        $0.lastNumber = 3
    }
    _ = cycle.start(now: 0)
    _ = cycle.handle(peer(3), now: 1)
    _ = cycle.handle(.prepared(changed: true), now: 2)
    #expect(cycle.handle(.saveFailed("disk full"), now: 3) == [.closeLink, .giveUp], "nothing was formed")
    #expect(cycle.suspension?.contains("disk full") == true)
    let actions = cycle.handle(.gaveUp, now: 4)
    #expect(actions.contains { if case .save = $0 { true } else { false } })
    #expect(cycle.handle(.saveFailed("disk full"), now: 5) == [.closeLink])
    #expect(cycle.isUnsaved)
    guard let wake = cycle.wakeAt else { return #expect(Bool(false), "it is tried again") }
    let again = cycle.handle(.tick, now: max(wake, 2_000_000_000))
    guard case .save(let record) = again.first else { return #expect(Bool(false), "the record comes first") }
    #expect(record.forming == nil && record.held == nil && record.lastNumber == 4)
    cycle.wasSaved()
    #expect(!cycle.isUnsaved)
}

@Test(
    "a change of the site's that failed may stand in the file: the record is saved again, also while nothing else is to be done"
)
func changeThatMayStand() {
    var cycle = Cycle(
        record: primary {
            $0.primary?.lastCommitted = PointRecord(number: 3, formedAt: 0)
            $0.lastNumber = 3
        }.record, settings: Cycle.Settings(interval: .manual, volumes: 1, window: 2))
    _ = cycle.start(now: 0)
    _ = cycle.handle(peer(3), now: 1)
    #expect(cycle.wakeAt == nil)
    cycle.mayDiffer(now: 2)
    guard let wake = cycle.wakeAt else { return #expect(Bool(false), "it is saved again") }
    #expect(cycle.handle(.tick, now: wake) == [.save(cycle.record)])
}

@Test(
    "a save that fails while a point is given up closes the link, and the point is given up again, since the first answer is void"
)
func saveFailsWhileGivingUp() {
    for stops in [true, false] {
        var cycle = primary { $0.primary?.point = .forming(4) }
        _ = stops ? cycle.handle(.suspend, now: 0) : cycle.start(now: 0)
        #expect(cycle.handle(.saveFailed("no space"), now: 1) == [.closeLink, .giveUp])
        _ = cycle.handle(.gaveUp, now: 2)
        switch cycle.state {
        case .stopped: #expect(stops)
        case .offline: #expect(!stops)
        default: Issue.record("it waits for ever")
        }
    }
}

@Test("a group that waits for commands is not resyncing once the link is back: what has changed waits, as before")
func linkLossInManualMode() {
    var record = GroupRecord(role: .primary, generation: "one")
    record.lineage = "L"
    record.lastNumber = 3
    record.primary?.lastCommitted = PointRecord(number: 3, formedAt: 0)
    var cycle = Cycle(record: record, settings: Cycle.Settings(interval: .manual, volumes: 1, window: 2))
    _ = cycle.start(now: 0)
    _ = cycle.handle(peer(3), now: 1)
    #expect(cycle.shownState == .mirroring)
    _ = cycle.handle(.linkLost("cut"), now: 2)
    #expect(cycle.shownState == .suspended)
    _ = cycle.handle(.tick, now: 10_000_000_000)
    _ = cycle.handle(peer(3), now: 10_000_000_001)
    #expect(cycle.shownState == .mirroring)
}
