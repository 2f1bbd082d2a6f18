// FailoverTests.swift: two failovers of one group, at different remotes, at the same time.

import Groups
import Testing

private func order(_ point: UInt64?, alone: Bool = false) -> GroupFailover.Order {
    GroupFailover.Order(group: "shop", site: "west1", point: point, alone: alone, others: ["west2"], id: 1)
}

/// What a failover does after the other remote was heard.
private func refusal(_ point: UInt64?, _ heard: Heard) -> String? {
    var failover = GroupFailover(order(point))
    let pair = OwnPair("east1", isEmpty: false, .first(.secondary, identity: "w"))
    for answer in [FailoverAnswer.begin, .done, .heard(["west2": heard]), .done] {
        if case .failed(let error) = failover.next(after: answer, [pair]) { return "\(error)" }
    }
    return nil
}

private func says(_ flag: FailoverFlag?) -> Heard { .says(RemoteWord(pairs: [], underWay: flag)) }

@Test("one that wants something else refuses, names the other remote, and says what to do")
func contradictingFailovers() throws {
    let named = FailoverFlag(id: 2, point: 3)
    for wanted in [nil, 4] as [UInt64?] {
        let words = try #require(refusal(wanted, says(named)))
        for part in ["point 3 is under way at 'west2'", "nothing has changed", "then `farcopy failover shop` goes"] {
            #expect(words.contains(part), "\(words)")
        }
    }
    #expect(
        try #require(refusal(3, says(FailoverFlag(id: 2, point: nil)))).contains("to the newest point is under way"))
    for (wanted, flag) in [(3, named), (nil, FailoverFlag(id: 2, point: nil)), (nil, nil)] as [(UInt64?, FailoverFlag?)]
    {
        #expect(refusal(wanted, says(flag))?.contains("under way") != true, "who wants the same goes on")
    }
    #expect(try #require(refusal(nil, .silent(last: named))).contains("does not answer any more"))

    var here = FailoversUnderWay()
    try here.begin(named, "shop", at: "west1")
    try here.begin(FailoverFlag(id: 3, point: 3), "shop", at: "west1")
    #expect(throws: Refusal.self) { try here.begin(FailoverFlag(id: 4, point: nil), "shop", at: "west1") }
    #expect(here.end() == nil && here.own == named, "another command goes on")
    #expect(here.end() == named && here.own == nil)
    #expect(here.end() == nil)
}

@Test("what a remote has told of is remembered until it has ended, and not for ever")
func rememberedFailovers() {
    var here = FailoversUnderWay()
    let (first, second) = (FailoverFlag(id: 1, point: 3), FailoverFlag(id: 2, point: 4))
    here.heard(first, of: "west2", hasEnded: false, now: 0)
    #expect(here.last(of: "west2", now: 599_000_000_000) == first)
    #expect(here.last(of: "west2", now: 601_000_000_000) == nil)
    #expect(here.last(of: "west3", now: 0) == nil)
    here.heard(second, of: "west2", hasEnded: false, now: 1)
    here.heard(first, of: "west2", hasEnded: true, now: 2)
    #expect(here.last(of: "west2", now: 3) == second, "the message of an earlier one comes late")
    here.heard(second, of: "west2", hasEnded: true, now: 4)
    #expect(here.last(of: "west2", now: 5) == nil)
    here.heard(FailoverFlag(id: 3, point: nil), of: "west2", hasEnded: false, now: 6)
    #expect(here.last(of: "west2", now: 7) == nil, "one to the newest point waits for nobody")
}

/// What a remote answers, and what becomes of its record.
private func run(_ input: RemotePart.Input, _ record: inout GroupRecord) throws -> RemoteReply {
    var (part, answer) = (RemotePart(input, keep: Retention(last: 4)), Answer.begin)
    while true {
        switch part.next(after: answer, record) {
        case .done(let reply): return reply
        case .failed(let error): throw error
        case .perform(.change(let change)):
            try record.apply(change)
            answer = .done
        case .perform(.survey): answer = .survey(IntakeSurvey(writesUnderWay: 0, order: 4, changed: [], at: 0))
        case .perform: answer = .done
        }
    }
}

/// A remote's record with these points.
private func remote(_ points: [UInt64]) throws -> GroupRecord {
    var record = GroupRecord.first(.secondary, identity: "w")
    for point in points {
        let plan = CommitPlan(
            point: PointRecord(number: point, formedAt: 0, committedAt: 0, order: point), dropped: [])
        let prepared = TwoPhaseRecord(epoch: 7, stand: .prepared(point))
        try record.apply(.remotePart(RemotePartChange(record: prepared, plan: plan)))
        let request = Stamped(epoch: 7, RemoteRequest.commit(point, others: false))
        _ = try run(.request(request, formedAt: 0, places: []), &record)
    }
    return record
}

@Test("a group goes to a point that every remote has, and not to one that some lacks")
func pointThatSomeLack() throws {
    let pair = OwnPair("east1", isEmpty: false, try remote([3, 4]))
    #expect(pair.record.points.map(\.number) == [3, 4])
    // It has lost the files of point 4.
    var stand = RemoteStand("east2", try remote([3]), nil)
    stand.committed = 4
    let heard = Heard.says(RemoteWord(pairs: [stand], underWay: nil))
    func outcome(_ wanted: UInt64?) -> (FailoverAction?, String?) {
        var failover = GroupFailover(order(wanted))
        var step = failover.next(after: .begin, [pair])
        for _ in 0..<8 {
            switch step {
            case .perform(.ask): step = failover.next(after: .heard(["west2": heard]), [pair])
            case .perform(.takeOver(let takeover)): return (.takeOver(takeover), nil)
            case .perform: step = failover.next(after: .done, [pair])
            case .failed(let error): return (nil, "\(error)")
            case .done: return (nil, nil)
            }
        }
        return (nil, nil)
    }
    for wanted in [nil, 3] as [UInt64?] {
        guard case .takeOver(let takeover) = outcome(wanted).0 else {
            Issue.record("it does not go to point 3: \(outcome(wanted))")
            continue
        }
        #expect(takeover.point == 3)
    }
    let words = try #require(outcome(4).1)
    #expect(words.contains("'west2' has no point 4 of 'east2'; it has 3"), "\(words)")
}

@Test("a pair that has no part in a point does not say that nobody has committed it")
func testimonyOfWhoIsLeftOut() throws {
    var prepared = try remote([3])
    var plan = CommitPlan(point: PointRecord(number: 4, formedAt: 0, committedAt: 0, order: 4), dropped: [])
    plan.point.without = ["east2"]
    let stand = TwoPhaseRecord(epoch: 7, stand: .prepared(4))
    try prepared.apply(.remotePart(RemotePartChange(record: stand, plan: plan)))
    let pairs = [
        OwnPair("east1", isEmpty: false, prepared), OwnPair("east2", isEmpty: false, try remote([3])),
        OwnPair("east3", isEmpty: false, try remote([3])),
    ]
    /// What is decided when these have said that they never had the point, and the other remote is silent.
    func outcome(_ testimonies: [Int: Testimony]) -> Step<FailoverAction, Void> {
        var settlement = DoubtSettlement("shop", others: ["west2"])
        var step = settlement.next(after: .begin, pairs)
        for _ in 0..<8 {
            switch step {
            case .perform(.promise(let pair, _)):
                step = settlement.next(after: .testimony(testimonies[pair] ?? .refuses(prepared: true)), pairs)
            case .perform(.ask): step = settlement.next(after: .heard(["west2": .silent(last: nil)]), pairs)
            default: return step
            }
        }
        return step
    }
    let never = Testimony.refuses(prepared: false)
    guard case .failed(let error) = outcome([1: never]) else {
        Issue.record("it decides by the word of who was left out")
        return
    }
    #expect("\(error)".contains("in doubt") && "\(error)".contains("'west2'"), "\(error)")
    guard case .perform(.settle(let settlement)) = outcome([1: never, 2: never]) else {
        Issue.record("who takes part, and never had it, knows that nobody has committed it")
        return
    }
    #expect(settlement.point == 4 && !settlement.forward)
}

@Test("a point that an operator has chosen alone is decided after all before the failover to it")
func chosenAndThenDecided() throws {
    var chosen = GroupRecord.first(.secondary, identity: "w")
    let plan = CommitPlan(point: PointRecord(number: 4, formedAt: 0, committedAt: 0, order: 4), dropped: [])
    let prepared = TwoPhaseRecord(epoch: 7, stand: .prepared(4))
    try chosen.apply(.remotePart(RemotePartChange(record: prepared, plan: plan)))
    _ = try run(.decided(4, forward: true, alone: true), &chosen)
    #expect(chosen.points.map(\.number) == [4] && chosen.coordination?.inDoubt == 4 && chosen.newestCommitted == 0)

    func asked(_ request: RemoteRequest) throws -> (RemoteAnswer?, GroupRecord) {
        var record = chosen
        let reply = try run(.request(Stamped(epoch: 7, request), formedAt: 0, places: []), &record)
        return (reply.answer?.body, record)
    }
    let (repeated, same) = try asked(.prepare(4, after: 0))
    #expect(repeated == .prepared(4) && same == chosen)
    let (committed, counts) = try asked(.commit(4, others: false))
    #expect(committed == .committed(4) && counts.coordination?.inDoubt == nil && counts.points.map(\.number) == [4])
    let (dropped, gone) = try asked(.drop(4))
    #expect(dropped == .dropped(4) && gone.coordination?.inDoubt == nil && gone.points.isEmpty)
}
