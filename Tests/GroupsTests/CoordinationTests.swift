import FoundationEssentials
import Glibc
import Groups
import Testing

@Test("what coordinator, hosts and remotes answer", arguments: ["coordination", "twophase"])
func coordinationTranscripts(name: String) throws {
    var machines = CoordinationTranscript()
    try checkTranscript(name) { try machines.answer($0) }
}

private let settings = try! Coordinator.Settings(hosts: 2, remotes: 2)

@Test("a group has 1 to 16 hosts and remotes, and hosts wait for at most a second")
func limits() {
    for (hosts, remotes, longest) in [(0, 1, 1), (1, 0, 1), (17, 1, 1), (1, 17, 1), (1, 1, 0), (1, 1, 1_000_000_001)] {
        #expect(throws: IllegalCoordination.self) {
            try Coordinator.Settings(hosts: hosts, remotes: remotes, maxCoordination: UInt64(longest))
        }
    }
    #expect(throws: Never.self) { try Coordinator.Settings(hosts: 16, remotes: 16, maxCoordination: 1_000_000_000) }
}

@Test("records that cannot follow each other")
func successors() {
    let decided = CoordinatorRecord(epoch: 2, lastNumber: 5, point: .commit, committed: 4)
    for (next, isLegal) in [
        (CoordinatorRecord(epoch: 2, lastNumber: 5, committed: 5), true),
        (CoordinatorRecord(epoch: 2, lastNumber: 5, point: .undecided, committed: 4), true),
        (CoordinatorRecord(epoch: 2, lastNumber: 6, point: .undecided, committed: 5), true),
        (CoordinatorRecord(epoch: 2, lastNumber: 5, committed: 4), false),
        (CoordinatorRecord(epoch: 2, lastNumber: 6, point: .undecided, committed: 4), false),
        (CoordinatorRecord(epoch: 1, lastNumber: 5, point: .commit, committed: 4), false),
        (CoordinatorRecord(epoch: 2, lastNumber: 4, point: .commit, committed: 4), false),
    ] {
        #expect(((try? next.check(after: decided)) != nil) == isLegal)
    }
    for (next, isLegal) in [
        (ParticipantRecord(epoch: 2, number: 5), true), (ParticipantRecord(epoch: 2, number: 5, point: .held), true),
        (ParticipantRecord(epoch: 2, number: 6, point: .forming), true),
        (ParticipantRecord(epoch: 2, number: 5, point: .forming), false),
        (ParticipantRecord(epoch: 2, number: 4, point: .held), false),
        (ParticipantRecord(epoch: 1, number: 5, point: .held), false),
    ] {
        let held = ParticipantRecord(epoch: 2, number: 5, point: .held)
        #expect(((try? next.check(after: held)) != nil) == isLegal)
    }
    #expect(throws: IllegalCoordination.self) {
        try ParticipantRecord(number: 5, point: .held).check(after: ParticipantRecord(number: 5))
    }
    let prepared = TwoPhaseRecord(epoch: 2, committed: 4, stand: .prepared(5))
    for (next, isLegal) in [
        (TwoPhaseRecord(epoch: 2, committed: 5), true),
        (TwoPhaseRecord(epoch: 2, committed: 4, refusedThrough: 5), true),
        (TwoPhaseRecord(epoch: 2, committed: 4, stand: .failedOver(at: 4, inDoubt: 5)), true),
        (TwoPhaseRecord(epoch: 2, committed: 4), false),
        (TwoPhaseRecord(epoch: 2, committed: 4, stand: .failedOver(at: 4, inDoubt: nil)), false),
        (TwoPhaseRecord(epoch: 2, committed: 5, stand: .prepared(5)), false),
    ] {
        #expect(((try? next.check(after: prepared)) != nil) == isLegal)
    }
    let failedOver = TwoPhaseRecord(committed: 4, stand: .failedOver(at: 4, inDoubt: nil))
    #expect(throws: IllegalCoordination.self) { try TwoPhaseRecord(committed: 5).check(after: failedOver) }
}

// MARK: Every pair

/// A machine in each of its states, with point 1 under way or just over.
private func coordinator(_ kind: Coordinator.State.Kind) -> Coordinator {
    var machine = Coordinator(settings, record: CoordinatorRecord())
    func tell(_ event: Coordinator.Event) {
        _ = machine.handle(event, now: 1)
        machine.wasSaved()
    }
    func hosts(_ answer: HostAnswer) { for host in 0..<2 { tell(.host(host, Stamped(epoch: 1, answer))) } }
    func remotes(_ answer: RemoteAnswer) { for remote in 0..<2 { tell(.remote(remote, Stamped(epoch: 1, answer))) } }
    _ = machine.start(now: 1)
    machine.wasSaved()
    tell(.request)
    let way: [(Coordinator.State.Kind, () -> Void)] = [
        (.makingReady, { hosts(.ready(1)) }), (.holding, { hosts(.formed(1)) }), (.running, { hosts(.ran(1)) }),
        (.draining, { hosts(.drained(1)) }), (.preparing, { remotes(.prepared(1)) }),
        (.committing, { if kind == .givingUp { remotes(.failedOver(at: 1)) } else { remotes(.committed(1)) } }),
        (.ending, { hosts(.ended(1)) }),
    ]
    for (at, goOn) in way where machine.state.kind == at && kind != at { goOn() }
    if kind == .stopped { tell(.superseded) }
    return machine
}

private func participant(_ kind: Participant.State.Kind) -> Participant {
    var machine = Participant(settings, record: ParticipantRecord())
    func tell(_ event: Participant.Event) {
        _ = machine.handle(event, now: 1)
        machine.wasSaved()
    }
    func ask(_ request: HostRequest) { tell(.request(Stamped(epoch: 1, request))) }
    ask(.makeReady(1))
    let way: [(Participant.State.Kind, () -> Void)] = [
        (.makingReady, { tell(.madeReady(1)) }), (.ready, { ask(.form(1)) }), (.forming, { tell(.formed(1)) }),
        (.formed, { ask(.run(1)) }), (.draining, { tell(.drained(1)) }),
        (.drained, { ask(kind == .givingUp ? .giveUp(1) : .end(1)) }),
    ]
    for (at, goOn) in way where machine.state.kind == at && kind != at { goOn() }
    return machine
}

/// Point 2, after point 1 was committed.
private func remote(_ kind: TwoPhaseCommit.State.Kind) -> TwoPhaseCommit {
    var machine = TwoPhaseCommit(settings, index: 0, record: TwoPhaseRecord(epoch: 1, committed: 1))
    func tell(_ event: TwoPhaseCommit.Event) {
        _ = machine.handle(event, now: 1)
        machine.wasSaved()
    }
    if kind == .open { return machine }
    if kind != .failedOver { tell(.request(Stamped(epoch: 1, .prepare(2, after: 1)))) }
    if kind == .prepared || kind == .asking { tell(.checked(2)) }
    if kind == .asking || kind == .failedOver { tell(.failOver) }
    return machine
}

private func text(_ places: [Place]) -> String {
    places.map { $0 == .handled ? "H" : $0 == .late ? "l" : "x" }.joined()
}

@Test("every answer has its place in every state of a coordinator")
func coordinatorPlaces() {
    let ofHosts: [(HostAnswer, String)] = [
        (.ready(1), "lHllllllll"), (.formed(1), "lxHlllllll"), (.ran(1), "lxxHHlllll"), (.drained(1), "lxxHHlllll"),
        (.failed(1, ""), "lHHHHlllll"), (.gaveUp(1), "lHHHHlllHl"), (.ended(1), "lxxxxxxHxl"),
        (.superseded(by: 2), "HHHHHHHHHH"),
    ]
    let ofRemotes: [(RemoteAnswer, String)] = [
        (.checking(1), "lxxxxHllll"), (.prepared(1), "lxxxxHllll"), (.committed(1), "lxxxxxHlHl"),
        (.refuses(1, ""), "lxxxxHHlll"), (.outOfOrder(1, newest: 0), "lxxxxHHlll"),
        (.gone(1), "lxxxxxHlll"),
        (.dropped(1), "lxxxxxxxHl"), (.failedOver(at: 1), "lllllHHlHl"), (.superseded(by: 2), "HHHHHHHHHH"),
    ]
    func walk(_ event: Coordinator.Event, _ expected: String, _ place: (Coordinator.State) -> Place) {
        var places: [Place] = []
        for kind in Coordinator.State.Kind.allCases {
            var machine = coordinator(kind)
            #expect(machine.state.kind == kind)
            let before = machine
            let turn = machine.handle(event, now: 1)
            places.append(place(before.state))
            let isSame = machine.state == before.state && machine.record == before.record
            let actions = turn.before + turn.after
            let contradicts = actions.contains { if case .contradiction = $0 { true } else { false } }
            switch places.last! {
            case .handled: #expect(!contradicts, "\(event) in \(kind)")
            case .late: #expect(isSame && turn.isEmpty, "\(event) in \(kind)")
            case .impossible: #expect(isSame && contradicts && actions.count == 1, "\(event) in \(kind)")
            }
        }
        #expect(text(places) == expected, "\(event)")
    }
    for (answer, expected) in ofHosts {
        walk(.host(1, Stamped(epoch: 1, answer)), expected) { Coordinator.place(of: answer, in: $0) }
    }
    for (answer, expected) in ofRemotes {
        walk(.remote(1, Stamped(epoch: 1, answer)), expected) { Coordinator.place(of: answer, in: $0) }
    }
    // About an older point, or to another process: late, whatever it is; about a newer one: impossible.
    // What an operator wants, as long as nothing is decided; what a remote has is only asked of a single one.
    for kind in Coordinator.State.Kind.allCases {
        var machine = coordinator(kind)
        let turn = machine.handle(.giveUp("why"), now: 1)
        let ends: [Coordinator.State.Kind] = [.makingReady, .holding, .running, .draining, .preparing]
        #expect(turn.before.first == (ends.contains(kind) ? .givesUp(1, "why") : nil))
        #expect((machine.state.kind == .givingUp) == (ends.contains(kind) || kind == .givingUp))
        let found = machine.handle(.found(committed: 1), now: 1)
        #expect(found.before.contains { if case .contradiction = $0 { true } else { false } })
    }
    for kind in Coordinator.State.Kind.allCases where kind != .stopped {
        for answer in [HostAnswer.ready(0), .ended(0), .gaveUp(0)] {
            var machine = coordinator(kind)
            let older = machine.handle(.host(0, Stamped(epoch: 1, answer)), now: 1)
            let toAnother = machine.handle(.host(0, Stamped(epoch: 0, .failed(1, ""))), now: 1)
            #expect(older.isEmpty && toAnother.isEmpty)
            #expect(machine.state == coordinator(kind).state)
        }
        var machine = coordinator(kind)
        let newer = machine.handle(.host(0, Stamped(epoch: 1, .ready(2))), now: 1)
        #expect(!newer.isEmpty)
        #expect(machine.state == coordinator(kind).state)
    }
}

@Test("every request and event has its place in every state of a host")
func participantPlaces() {
    let requests: [(HostRequest, String)] = [
        (.makeReady(1), "HlHlllll"), (.form(1), "HxHlHlll"), (.formAtOnce(1), "HxHlxHHl"), (.run(1), "HxxxHHHl"),
        (.giveUp(1), "HHHHHHHl"), (.end(1), "HxxxxlHl"),
    ]
    let newer: [(HostRequest, String)] = [
        (.makeReady(2), "HHHHHHHl"), (.form(2), "xxxxxxxl"), (.formAtOnce(2), "xxxxxxxl"), (.run(2), "xxxxxxxl"),
        (.giveUp(2), "HHHHHHHl"),
        (.end(2), "xxxxxxxl"),
    ]
    let own: [(Participant.Event, String)] = [
        (.madeReady(1), "xHxxxxxl"), (.notReady(1, ""), "xHxxxxxl"), (.formed(1), "xxxHxxxl"),
        (.drained(1), "xxxxxHxl"), (.lost(1, ""), "lllHHHll"), (.gaveUp(1), "xxxxxxxH"),
    ]
    func walk(_ event: Participant.Event, _ expected: String, _ place: (Participant.State) -> Place) {
        var places: [Place] = []
        for kind in Participant.State.Kind.allCases {
            var machine = participant(kind)
            #expect(machine.state.kind == kind)
            let before = machine
            let turn = machine.handle(event, now: 1)
            places.append(place(before.state))
            let isSame = machine.state == before.state && machine.record == before.record
            let actions = turn.before + turn.after
            let contradicts = actions.contains { if case .contradiction = $0 { true } else { false } }
            switch places.last! {
            case .handled: #expect(!contradicts && !actions.isEmpty, "\(event) in \(kind)")
            case .late: #expect(isSame && turn.isEmpty, "\(event) in \(kind)")
            case .impossible: #expect(isSame && contradicts && actions.count == 1, "\(event) in \(kind)")
            }
        }
        #expect(text(places) == expected, "\(event)")
    }
    for (request, expected) in requests {
        walk(.request(Stamped(epoch: 1, request)), expected) { Participant.place(of: request, in: $0) }
    }
    for (request, expected) in newer {
        walk(.request(Stamped(epoch: 1, request)), expected) { Participant.place(ofNewer: request, in: $0) }
    }
    for (event, expected) in own { walk(event, expected) { Participant.place(of: event, in: $0) } }
    for kind in Participant.State.Kind.allCases {
        var machine = participant(kind)
        // An older point, of which nothing is left, and an older process.
        let older = machine.handle(.request(Stamped(epoch: 1, .run(0))), now: 1)
        #expect(older.before + older.after == [.answer(Stamped(epoch: 1, .gaveUp(0)))])
        let ended = machine.handle(.request(Stamped(epoch: 1, .end(0))), now: 1)
        #expect(ended.before + ended.after == [.answer(Stamped(epoch: 1, .ended(0)))])
        let refusal = machine.handle(.request(Stamped(epoch: 0, .giveUp(1))), now: 1)
        #expect(refusal.before == [.answer(Stamped(epoch: 0, .superseded(by: 1)))])
        #expect(machine.state == participant(kind).state)
        // Whatever comes at the deadline, hosts are let go first.
        let isHeld = kind == .forming || kind == .formed
        #expect(machine.wakeAt == (isHeld ? 1 + Coordinator.Settings.coordination : nil))
        let late = machine.handle(.request(Stamped(epoch: 1, .run(1))), now: 1 + Coordinator.Settings.coordination)
        #expect((late.before.first == .letGo(1)) == isHeld)
        if isHeld { #expect(machine.state.kind == .givingUp && !late.before.contains(.drain(1))) }
    }
}

@Test("every request has its place in every state of a remote")
func remotePlaces() {
    let requests: [(RemoteRequest, String)] = [
        (.prepare(2, after: 1), "HHHHH"), (.commit(2, others: true), "HxHHH"), (.commit(2, others: false), "HxHHH"),
        (.drop(2), "HHHHH"),
    ]
    for (request, expected) in requests {
        var places: [Place] = []
        for kind in TwoPhaseCommit.State.Kind.allCases {
            var machine = remote(kind)
            #expect(machine.state.kind == kind)
            let before = machine
            let turn = machine.handle(.request(Stamped(epoch: 1, request)), now: 1)
            places.append(TwoPhaseCommit.place(of: request, in: before.state, about: 2))
            let isSame = machine.state == before.state && machine.record == before.record
            let actions = turn.before + turn.after
            let contradicts = actions.contains { if case .contradiction = $0 { true } else { false } }
            switch places.last! {
            case .handled: #expect(!contradicts && !actions.isEmpty, "\(request) in \(kind)")
            case .late: #expect(isSame && turn.isEmpty, "\(request) in \(kind)")
            case .impossible: #expect(isSame && contradicts && actions.count == 1, "\(request) in \(kind)")
            }
        }
        #expect(text(places) == expected, "\(request)")
    }
    for kind in TwoPhaseCommit.State.Kind.allCases where kind != .failedOver {
        var machine = remote(kind)
        // An older process; what is committed; what is only for a single remote.
        let refusal = machine.handle(.request(Stamped(epoch: 0, .drop(2))), now: 1)
        #expect(refusal.before == [.answer(Stamped(epoch: 0, .superseded(by: 1)))])
        let again = machine.handle(.request(Stamped(epoch: 1, .commit(1, others: false))), now: 1)
        #expect(again.before == [.answer(Stamped(epoch: 1, .committed(1)))])
        let older = machine.handle(.request(Stamped(epoch: 1, .prepare(1, after: 0))), now: 1)
        #expect(older.isEmpty)
        // Who asks hears a promise, and its like only when it is saved.
        let turn = machine.handle(.question(from: 1, 2), now: 1)
        let isPrepared = kind == .prepared || kind == .asking
        #expect((turn.before + turn.after).contains(.testify(1, 2, .refuses(prepared: isPrepared))))
        #expect(turn.saves == (kind != .asking) && machine.record.refusedThrough == 2)
        #expect(machine.takesData == (kind == .open || kind == .checking))
    }
}

/// Forgotten, an older process would be obeyed again: it would have a prepared point dropped that the newer one has decided to commit.
@Test("that a newer coordinator was heard is saved before it is answered")
func epochs() {
    var remote = TwoPhaseCommit(settings, index: 0, record: TwoPhaseRecord(epoch: 1, committed: 1, stand: .prepared(2)))
    let prepared = remote.handle(.request(Stamped(epoch: 2, .prepare(2, after: 1))), now: 1)
    #expect(prepared.saves && prepared.before.isEmpty && prepared.after == [.answer(Stamped(epoch: 2, .prepared(2)))])
    #expect(remote.record.epoch == 2 && !remote.takesData)
    remote.wasSaved()
    let again = remote.handle(.request(Stamped(epoch: 2, .prepare(2, after: 1))), now: 1)
    #expect(again == Turn([.answer(Stamped(epoch: 2, .prepared(2)))]))
    let older = remote.handle(.request(Stamped(epoch: 1, .drop(2))), now: 1)
    #expect(older == Turn([.answer(Stamped(epoch: 1, .superseded(by: 2)))]))

    var host = Participant(settings, record: ParticipantRecord(epoch: 1, number: 2, point: .held))
    _ = host.start(isHeld: true)
    let ran = host.handle(.request(Stamped(epoch: 2, .run(2))), now: 1)
    #expect(ran.saves && ran.before.isEmpty && ran.after == [.answer(Stamped(epoch: 2, .ran(2)))])
}

/// Takes a coordinator through its next point until remotes are asked to prepare it.
///
/// - Returns: after which point each of them, by its index.
private func prepares(_ machine: inout Coordinator) -> [Int: UInt64] {
    let epoch = machine.record.epoch
    func tell(_ event: Coordinator.Event) -> Turn<Coordinator.Action> {
        let turn = machine.handle(event, now: 1)
        machine.wasSaved()
        return turn
    }
    _ = tell(.request)
    let number = machine.record.lastNumber
    var found: [Int: UInt64] = [:]
    for answer in [HostAnswer.ready(number), .formed(number), .ran(number), .drained(number)] {
        for host in 0..<2 {
            let turn = tell(.host(host, Stamped(epoch: epoch, answer)))
            for case .askRemote(let remote, let request) in turn.before + turn.after {
                if case .prepare(_, let previous) = request.body { found[remote] = previous }
            }
        }
    }
    return found
}

/// A remote refuses the point at hand for what it has; all give the point up.
private func refuse(_ machine: inout Coordinator, _ remote: Int, newest: UInt64) {
    let (number, epoch) = (machine.record.lastNumber, machine.record.epoch)
    _ = machine.handle(.remote(remote, Stamped(epoch: epoch, .outOfOrder(number, newest: newest))), now: 1)
    machine.wasSaved()
    for other in 0..<2 {
        _ = machine.handle(.host(other, Stamped(epoch: epoch, .gaveUp(number))), now: 1)
        _ = machine.handle(.remote(other, Stamped(epoch: epoch, .dropped(number))), now: 1)
        machine.wasSaved()
    }
    #expect(machine.state == .idle)
}

@Test(
    "a coordinator that does not know of the newest points of its remotes goes by what they say, an older one if it knows nothing for sure"
)
func newestPointsLearnt() throws {
    for isGuessed in [false, true] {
        let known = CoordinatorRecord(epoch: 1, lastNumber: 5, committed: 3, isGuessed: isGuessed)
        var machine = Coordinator(settings, record: known)
        _ = machine.start(now: 1)
        machine.wasSaved()
        #expect(prepares(&machine) == [0: 3, 1: 3])
        refuse(&machine, 0, newest: 5)
        #expect(prepares(&machine) == [0: 5, 1: 3])
        refuse(&machine, 1, newest: 2)
        #expect(prepares(&machine) == [0: 5, 1: isGuessed ? 2 : 3], "one that has lost points is not believed")
        refuse(&machine, 1, newest: 100)
        // The next process knows it as well; and nothing is guessed any more once all have committed a point.
        machine = Coordinator(settings, record: machine.record)
        _ = machine.start(now: 1)
        machine.wasSaved()
        #expect(prepares(&machine) == [0: 5, 1: isGuessed ? 2 : 3], "a point that was never counted cannot be")
        let epoch = machine.record.epoch
        let last = machine.record.lastNumber
        for answer in [RemoteAnswer.prepared(last), .committed(last)] {
            for remote in 0..<2 {
                _ = machine.handle(.remote(remote, Stamped(epoch: epoch, answer)), now: 1)
                machine.wasSaved()
            }
        }
        for host in 0..<2 { _ = machine.handle(.host(host, Stamped(epoch: epoch, .ended(last))), now: 1) }
        machine.wasSaved()
        #expect(machine.record.isGuessed == nil && machine.record.left == nil && machine.record.committed == last)
        #expect(prepares(&machine) == [0: last, 1: last])
    }
}

@Test("a decided point counts for those who have it, when the copy of one that had prepared it is lost")
func preparedCopyLost() throws {
    for refuses in [false, true] {
        var machine = coordinator(.committing)
        func tell(_ remote: Int, _ answer: RemoteAnswer) -> [Coordinator.Action] {
            let turn = machine.handle(.remote(remote, Stamped(epoch: 1, answer)), now: 1)
            machine.wasSaved()
            return turn.before + turn.after
        }
        // It is not prepared there, and never will be.
        var empty = TwoPhaseCommit(settings, index: 1, record: TwoPhaseRecord(epoch: 1))
        let said = empty.handle(.request(Stamped(epoch: 1, .commit(1, others: false))), now: 1)
        #expect(said.after.contains(.answer(Stamped(epoch: 1, .gone(1)))) && empty.record.refusedThrough == 1)
        empty.wasSaved()
        // The answer was lost. As long as nobody has the point, it need not count.
        let again = empty.handle(.request(Stamped(epoch: 1, .commit(1, others: false))), now: 1).before
        let later = empty.handle(.request(Stamped(epoch: 1, .commit(1, others: true))), now: 1).before
        #expect(
            again.contains {
                if case .answer(let answer) = $0 { answer.body.number == 1 && answer.body != .gone(1) } else { false }
            })
        #expect(later.contains(.answer(Stamped(epoch: 1, .gone(1)))))
        if refuses {
            _ = tell(0, .refuses(1, "promised"))
            _ = tell(1, .gone(1))
            #expect(machine.state.kind == .givingUp && machine.record.point == .undecided, "nobody has it")
            continue
        }
        _ = tell(1, .gone(1))
        #expect(machine.state.kind == .committing)
        #expect(tell(0, .committed(1)).first == .committed(1))
        _ = machine.handle(.host(0, Stamped(epoch: 1, .ended(1))), now: 1)
        #expect(machine.state == .idle && machine.record.committed == 1 && machine.record.left == [1: 0])
        machine.wasSaved()
        _ = machine.handle(.request, now: 1)
        #expect(machine.record.absent == nil, "it takes part in the next")
    }
}

@Test("when every copy that had prepared a decided point is lost it is given up, by all, and another is formed")
func allPreparedCopiesLost() {
    var machine = coordinator(.committing)
    for remote in [0, 1, 1] {
        _ = machine.handle(.remote(remote, Stamped(epoch: 1, .gone(1))), now: 1)
        machine.wasSaved()
    }
    #expect(machine.state.kind == .givingUp && machine.record.point == .undecided)
    machine = Coordinator(settings, record: machine.record)
    _ = machine.start(now: 1)
    machine.wasSaved()
    for pair in 0..<2 {
        _ = machine.handle(.host(pair, Stamped(epoch: 2, .gaveUp(1))), now: 1)
        _ = machine.handle(.remote(pair, Stamped(epoch: 2, .dropped(1))), now: 1)
    }
    #expect(machine.state == .idle)
}

@Test("what the other copy of a remote had promised does not take back what somebody may have committed")
func promiseOfALostCopy() {
    var machine = coordinator(.committing)
    _ = machine.handle(.remote(1, Stamped(epoch: 1, .refuses(1, "promised"))), now: 1)
    _ = machine.handle(.remote(1, Stamped(epoch: 1, .gone(1))), now: 1)
    machine.wasSaved()
    #expect(machine.state.kind == .committing && machine.record.point == .commit, "remote 0 has not answered")
    _ = machine.handle(.remote(0, Stamped(epoch: 1, .committed(1))), now: 1)
    #expect(machine.state.kind == .ending)
}
