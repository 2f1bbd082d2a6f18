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
