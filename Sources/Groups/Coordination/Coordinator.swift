// Coordinator.swift: forms points over several hosts under one pause, and commits them at several remotes in two phases.
//
//   make ready → hold and form → run → drain → prepare → (decided) → commit → end
//
// One host and one remote are the smallest case: one host forms and lets go in one step; with one remote there is no `prepare`, and its
// record is the decision.
//
// Must be prevented:
//   a point counts although a host let go before all had formed: `run` is said when all have, and each says that it let go because of it
//   hosts wait: they let go by themselves at the deadline, whatever happens here; saves and preparations come before the pause
//   a commit is asked for before the decision is on stable storage, or before every remote has prepared
//   a decision is not carried out: a new process takes it up
//   a point that may be half formed goes on after a restart: it is given up everywhere
//   a new point begins while a host or a remote has not yet heard what became of the last one, unless the others go on without that host
//   a process that has been followed by another goes on, or an answer to it counts
//   somebody is asked for ever at full speed, or an undecided point is held for somebody who does not answer

import Base

package struct Coordinator: Sendable {
    package enum Event: Equatable, Sendable {
        case tick
        /// A point is wanted now; while another is under way nothing comes of it.
        case request
        /// The point that is under way, unless it is decided, is not to count: mirroring stops, or the remote's copy is another.
        case giveUp(String)
        /// What the only remote has committed, by its record, unasked: an answer was lost.
        case found(committed: UInt64)
        /// The record belongs to a newer process.
        case superseded
        /// A host is out of reach, and the others go on without it.
        case hostLost(Int)
        case host(Int, Stamped<HostAnswer>)
        case remote(Int, Stamped<RemoteAnswer>)
    }

    package enum Action: Equatable, Sendable {
        case askHost(Int, Stamped<HostRequest>)
        case askRemote(Int, Stamped<RemoteRequest>)
        /// Every remote has committed it.
        case committed(UInt64)
        case givesUp(UInt64, String)
        case stopped(String)
        /// Somebody said what cannot be: nothing has changed.
        case contradiction(String)
    }

    package enum State: Equatable, Sendable {
        case idle
        case makingReady(UInt64, Round)
        case holding(UInt64, Round, until: UInt64)
        /// `drained`: hosts whose data is at its remote already.
        case running(UInt64, Round, drained: [Int])
        case draining(UInt64, Round)
        case preparing(UInt64, Round)
        case committing(UInt64, Round, Votes)
        case ending(UInt64, Round)
        case givingUp(UInt64, hosts: Round, remotes: Round, stops: String?)
        case stopped(String)
    }

    /// What remotes say to a commit.
    package struct Votes: Equatable, Sendable {
        var committed: [Int] = []
        /// They have promised so to a remote that asked.
        var refusing: [Int] = []
    }

    package struct Settings: Equatable, Sendable {
        package static let members = 1...16
        package static let longestCoordination: UInt64 = 1_000_000_000
        package static let coordination: UInt64 = 50_000_000
        package let hosts: Int
        package let remotes: Int
        /// Nanoseconds until all hosts must have formed.
        package let maxCoordination: UInt64
        /// What hosts and remotes are called, where a reason is told.
        package let hostNames: [String]
        package let remoteNames: [String]

        package init(
            hosts: Int, remotes: Int, maxCoordination: UInt64 = coordination, hostNames: [String] = [],
            remoteNames: [String] = []
        ) throws(IllegalCoordination) {
            guard Self.members.contains(hosts), Self.members.contains(remotes) else {
                throw IllegalCoordination("a group has 1 to 16 hosts and 1 to 16 remotes")
            }
            guard 1...Self.longestCoordination ~= maxCoordination else {
                throw IllegalCoordination("max_coordination is more than 0, and at most 1s: hosts wait for so long")
            }
            (self.hosts, self.remotes, self.maxCoordination) = (hosts, remotes, maxCoordination)
            self.hostNames = hostNames.count == hosts ? hostNames : (0..<hosts).map { "host \($0)" }
            self.remoteNames = remoteNames.count == remotes ? remoteNames : (0..<remotes).map { "remote \($0)" }
        }
        var allHosts: [Int] { Array(0..<hosts) }
        var allRemotes: [Int] { Array(0..<remotes) }
    }

    package let settings: Settings
    package internal(set) var record: CoordinatorRecord
    package private(set) var state = State.idle
    /// A process before this one may have asked remotes about the point.
    private var isTakenUp = false
    private var leavingOut: [Int] = []
    /// Where the hosts have sent the point at hand, by pair.
    private(set) var copies: [Int: CopyIdentity] = [:]
    /// The epoch of a process that somebody has heard of since.
    package private(set) var supersededBy: UInt64?
    /// The file may hold another record than this: whatever is said next waits for the save.
    package private(set) var isUnsaved = false

    /// - Parameter record: as the last process left it.
    package init(_ settings: Settings, record: CoordinatorRecord) {
        self.settings = settings
        self.record = record.counted(by: settings.hostNames)
    }

    /// A new process takes up.
    package mutating func start(now: UInt64) -> Turn<Action> {
        var next = record
        next.epoch += 1
        become(next)
        switch record.point {
        case .none: return .saved(then: [])
        case .undecided: return giveUp(record.lastNumber, "its coordinator has ended", atRemotes: true, now)
        case .formed:
            isTakenUp = true
            return enter(.draining(record.lastNumber, Round(hosts, now: now)))
        case .commit: return enter(.committing(record.lastNumber, Round(remotes, now: now), Votes()))
        }
    }

    package mutating func wasSaved() { isUnsaved = false }

    /// Pairs that take part in the point at hand.
    private var hosts: [Int] { settings.allHosts.filter { record.absent?.contains($0) != true } }
    private var remotes: [Int] { settings.allRemotes.filter { record.absent?.contains($0) != true } }

    /// The next point is formed without these pairs.
    mutating func leaveOut(_ pairs: [Int]) { leavingOut = pairs }

    /// Idle, it counts on from what others know of.
    mutating func countOn(from number: UInt64) {
        guard case .idle = state else { return }
        record.lastNumber = max(record.lastNumber, number)
    }

    /// When `tick` must come at the latest; nil = no need.
    package var wakeAt: UInt64? {
        switch state {
        case .idle, .stopped: nil
        case .holding(_, let round, let until): min(round.wakeAt ?? until, until)
        case .makingReady(_, let round), .running(_, let round, _), .draining(_, let round), .preparing(_, let round),
            .committing(_, let round, _), .ending(_, let round):
            round.wakeAt
        case .givingUp(_, let hosts, let remotes, _): [hosts.wakeAt, remotes.wakeAt].compactMap { $0 }.min()
        }
    }

    /// Whom it waits for, and for what, in words; nil while it does for nobody.
    package var waitsFor: String? {
        func hosts(_ round: Round) -> String { round.waiting.map { settings.hostNames[$0] }.joined(separator: ", ") }
        func remotes(_ round: Round) -> String {
            round.waiting.map { settings.remoteNames[$0] }.joined(separator: ", ")
        }
        return switch state {
        case .idle, .stopped: nil
        case .makingReady(let number, let round): "point \(number) waits until \(hosts(round)) can form it"
        case .holding(let number, let round, _): "point \(number) waits until \(hosts(round)) has formed it"
        case .running(let number, let round, _): "point \(number) waits until \(hosts(round)) has let go"
        case .draining(let number, let round): "point \(number) waits until \(hosts(round)) has sent it"
        case .preparing(let number, let round): "point \(number) waits until \(remotes(round)) has prepared it"
        case .committing(let number, let round, _): "point \(number) waits until \(remotes(round)) has committed it"
        case .ending(let number, let round): "point \(number) waits until \(hosts(round)) knows that it is committed"
        case .givingUp(let number, let atHosts, let atRemotes, _):
            "point \(number) waits until "
                + [hosts(atHosts), remotes(atRemotes)].filter { !$0.isEmpty }.joined(separator: ", ")
                + " has given it up"
        }
    }

    // MARK: Events

    package mutating func handle(_ event: Event, now: UInt64) -> Turn<Action> {
        switch event {
        case .tick: return tick(now)
        case .superseded: return stop("another process coordinates the group")
        case .request:
            guard case .idle = state else { return Turn() }
            return begin(now)
        case .giveUp(let reason): return end(reason, now)
        case .found(let number): return found(number, now)
        case .hostLost(let host): return lost(host, now)
        case .host(let host, let answer):
            guard answer.epoch == record.epoch else { return Turn() }
            if case .superseded(let epoch) = answer.body {
                supersededBy = max(supersededBy ?? 0, epoch)
                return stop("\(settings.hostNames[host]) follows a coordinator of epoch \(epoch)")
            }
            return place(answer.body.number, Self.place(of: answer.body, in: state), event) {
                $0.carryOut(host, answer.body, now)
            }
        case .remote(let remote, let answer):
            guard answer.epoch == record.epoch else { return Turn() }
            if case .superseded(let epoch) = answer.body {
                supersededBy = max(supersededBy ?? 0, epoch)
                return stop("\(settings.remoteNames[remote]) follows a coordinator of epoch \(epoch)")
            }
            return place(answer.body.number, Self.place(of: answer.body, in: state), event) {
                $0.carryOut(remote, answer.body, now)
            }
        }
    }

    /// What is about a point of before is late, whatever it is.
    private mutating func place(
        _ number: UInt64?, _ place: Place, _ event: Event, _ handle: (inout Coordinator) -> Turn<Action>
    ) -> Turn<Action> {
        if let number, number < record.lastNumber { return Turn() }
        if let number, number > record.lastNumber { return contradiction(event) }
        switch place {
        case .late: return Turn()
        case .impossible: return contradiction(event)
        case .handled: return handle(&self)
        }
    }

    private func contradiction(_ event: some Any) -> Turn<Action> {
        Turn([.contradiction("'\(event)' cannot come while '\(state.kind)'")])
    }

    private mutating func carryOut(_ host: Int, _ answer: HostAnswer, _ now: UInt64) -> Turn<Action> {
        switch (state, answer) {
        case (.makingReady(let number, var round), .ready):
            round.answered(host)
            guard round.isComplete else { return wait(.makingReady(number, round)) }
            guard settings.hosts > 1 else { return enter(.running(number, Round([0], now: now), drained: [])) }
            return enter(
                .holding(number, Round(hosts, now: now), until: now + settings.maxCoordination))
        case (.holding(let number, var round, let until), .formed):
            // Hosts may have let go by themselves.
            guard now < until else { return tooLate(number, round, now) }
            round.answered(host)
            guard round.isComplete else { return wait(.holding(number, round, until: until)) }
            return enter(.running(number, Round(hosts, now: now), drained: []))
        case (.running(let number, var round, var drained), .ran),
            (.running(let number, var round, var drained), .drained):
            round.answered(host)
            if case .drained(_, let copy) = answer {
                copies[host] = copy
                if !drained.contains(host) { drained.append(host) }
            }
            guard round.isComplete else { return wait(.running(number, round, drained: drained)) }
            return haveRun(number, drained, now)
        case (.draining(let number, var round), .ran):
            round.isAtIt(host)
            return wait(.draining(number, round))
        case (.draining(let number, var round), .drained(_, let copy)):
            copies[host] = copy
            round.answered(host)
            guard round.isComplete else { return wait(.draining(number, round)) }
            return haveDrained(number, now)
        case (.ending(let number, var round), .ended):
            round.answered(host)
            guard round.isComplete else { return wait(.ending(number, round)) }
            return settle(committed: number)
        case (.givingUp(let number, var hosts, let remotes, let stops), .gaveUp):
            hosts.answered(host)
            return gaveUp(number, hosts, remotes, stops)
        case (_, .failed(let number, let reason)):
            return giveUp(number, "\(settings.hostNames[host]): \(reason)", atRemotes: false, now)
        case (_, .gaveUp(let number)):
            return giveUp(number, "\(settings.hostNames[host]) has nothing of it any more", atRemotes: false, now)
        default: return contradiction(answer)
        }
    }

    private mutating func carryOut(_ remote: Int, _ answer: RemoteAnswer, _ now: UInt64) -> Turn<Action> {
        switch (state, answer) {
        case (.preparing(let number, var round), .checking):
            round.isAtIt(remote)
            return wait(.preparing(number, round))
        case (.preparing(let number, var round), .prepared):
            round.answered(remote)
            guard round.isComplete else { return wait(.preparing(number, round)) }
            return decide(number, now)
        case (.preparing(let number, _), .refuses(_, let reason)):
            return giveUp(number, "\(settings.remoteNames[remote]): \(reason)", atRemotes: true, now)
        case (.preparing(let number, _), .outOfOrder(_, let newest)):
            let expected = record.left?[remote] ?? record.committed
            learn(newest, of: remote, expected: expected)
            let reason = disorder(number, newest: newest, expected: expected)
            return giveUp(number, "\(settings.remoteNames[remote]): \(reason)", atRemotes: true, now)
        case (.preparing(let number, _), .failedOver(let point)):
            return giveUp(number, failed(remote, point), atRemotes: true, stops: true, now)
        case (.committing(let number, var round, var votes), .committed):
            round.answered(remote)
            if !votes.committed.contains(remote) { votes.committed.append(remote) }
            guard !round.isComplete else { return haveCommittedAll(number, now) }
            state = .committing(number, round, votes)
            // The first one makes the promises of others void.
            return votes.committed.count == 1 && !votes.refusing.isEmpty ? send() : Turn()
        case (.committing(let number, var round, var votes), .gone):
            guard remotes.contains(remote) else { return Turn() }
            // What it said before, its other copy did.
            votes.refusing.removeAll { $0 == remote }
            guard !votes.committed.isEmpty || votes.refusing.count < remotes.count - 1 else {
                return giveUp(
                    number, "\(settings.remoteNames[remote]) has lost it, and nobody has it", atRemotes: true, now)
            }
            // It counts for those who have it; this pair begins anew.
            round.answered(remote)
            leaveBehind(remote)
            guard round.isComplete else { return enter(.committing(number, round, votes)) }
            return haveCommittedAll(number, now)
        case (.committing(let number, _, _), .outOfOrder(_, let newest)):
            let reason = disorder(number, newest: newest, expected: record.committed)
            return giveUp(number, "\(settings.remoteNames[remote]): \(reason)", atRemotes: true, now)
        case (.committing(let number, let round, var votes), .refuses(_, let reason)):
            if !votes.refusing.contains(remote) { votes.refusing.append(remote) }
            guard votes.refusing.count == remotes.count else { return wait(.committing(number, round, votes)) }
            return giveUp(number, "\(settings.remoteNames[remote]): \(reason)", atRemotes: true, now)
        case (.committing(let number, _, _), .failedOver(let point)):
            // What was decided is left to those who have prepared it.
            return giveUp(number, failed(remote, point), atRemotes: record.point != .commit, stops: true, now)
        case (.givingUp(let number, let hosts, var remotes, let stops), .dropped):
            remotes.answered(remote)
            return gaveUp(number, hosts, remotes, stops)
        case (.givingUp(let number, let hosts, var remotes, let stops), .committed):
            guard settings.remotes == 1 else {
                // Decided, and left to the remotes since one has failed over; what is undecided nobody has committed.
                return record.point == .commit ? Turn() : contradiction(answer)
            }
            // The answer to its commit was lost. Hosts that gave the point up send more than is needed, not less.
            remotes.answered(remote)
            haveCommitted(number)
            return gaveUp(number, hosts, remotes, stops)
        case (.givingUp(let number, let hosts, var remotes, _), .failedOver(let point)):
            remotes.answered(remote)
            return gaveUp(number, hosts, remotes, failed(remote, point))
        default: return contradiction(answer)
        }
    }

    /// A remote has another newest point than its coordinator knows of. Its host sends what has changed since a point that the host knows is
    /// there, which may be the same or an older one: so the next point comes after what the remote says it has. An older one than is known is
    /// believed only while nothing is known for sure.
    private mutating func learn(_ newest: UInt64, of remote: Int, expected: UInt64) {
        guard newest < record.lastNumber, newest > expected || record.isGuessed == true else { return }
        record.left = (record.left ?? [:]).merging([remote: newest]) { $1 }
    }

    private mutating func haveCommittedAll(_ number: UInt64, _ now: UInt64) -> Turn<Action> {
        Turn([.committed(number)]) + enter(.ending(number, Round(hosts, now: now)))
    }

    /// A pair has no part in the point at hand any more. Saved with what follows: until then a new process asks, and hears, the same.
    private mutating func leaveBehind(_ pair: Int) {
        record.left = (record.left ?? [:]).merging([pair: record.committed]) { old, _ in old }
        record.absent = ((record.absent ?? []) + [pair]).sorted()
    }

    private func failed(_ remote: Int, _ point: UInt64) -> String {
        "\(settings.remoteNames[remote]) has failed over at point \(point)"
    }

    // MARK: Steps

    private mutating func begin(_ now: UInt64) -> Turn<Action> {
        var next = record
        next.lastNumber += 1
        next.point = .undecided
        next.absent = leavingOut.isEmpty ? nil : leavingOut
        copies = [:]
        become(next)
        isTakenUp = false
        return enter(.makingReady(next.lastNumber, Round(hosts, now: now)))
    }

    /// - Parameter drained: hosts whose data is at its remote already.
    private mutating func haveRun(_ number: UInt64, _ drained: [Int], _ now: UInt64) -> Turn<Action> {
        var next = record
        next.point = .formed
        become(next)
        let others = hosts.filter { !drained.contains($0) }
        state = .draining(number, Round(others, now: now))
        return .saved() + (others.isEmpty ? haveDrained(number, now) : Turn())
    }

    private mutating func haveDrained(_ number: UInt64, _ now: UInt64) -> Turn<Action> {
        let round = Round(remotes, now: now)
        return enter(settings.remotes == 1 ? .committing(number, round, Votes()) : .preparing(number, round))
    }

    private mutating func decide(_ number: UInt64, _ now: UInt64) -> Turn<Action> {
        var next = record
        next.point = .commit
        become(next)
        return enter(.committing(number, Round(remotes, now: now), Votes()))
    }

    /// Saved with the next point: until then a new process asks, and hears, the same once more.
    private mutating func settle(committed: UInt64) -> Turn<Action> {
        var next = record
        if committed > record.committed {
            next.left = left(behind: record.committed)
            if record.absent == nil { next.isGuessed = nil }
        }
        (next.point, next.committed, next.absent) = (.none, committed, nil)
        become(next)
        state = .idle
        return Turn()
    }

    /// Of each pair that has not every point, the newest that it has.
    private func left(behind committed: UInt64) -> [Int: UInt64]? {
        var left = record.left ?? [:]
        for pair in settings.allHosts {
            left[pair] = record.absent?.contains(pair) == true ? left[pair] ?? committed : nil
        }
        return left.isEmpty ? nil : left
    }

    /// What it has not heard it hears when it is back, from a newer point.
    private mutating func lost(_ host: Int, _ now: UInt64) -> Turn<Action> {
        guard hosts.contains(host) else { return Turn() }
        var turn = Turn<Action>()
        switch state {
        case .makingReady(let number, _), .holding(let number, _, _), .running(let number, _, _),
            .draining(let number, _):
            turn = giveUp(number, "\(settings.hostNames[host]) is out of reach", atRemotes: false, now)
        case .idle, .preparing, .committing, .ending, .givingUp, .stopped: break
        }
        switch state {
        case .ending(let number, var round):
            round.answered(host)
            guard round.isComplete else { return turn + wait(.ending(number, round)) }
            return turn + settle(committed: number)
        case .givingUp(let number, var hosts, let remotes, let stops):
            hosts.answered(host)
            return turn + gaveUp(number, hosts, remotes, stops)
        default: return turn
        }
    }

    private mutating func haveCommitted(_ number: UInt64) {
        record.committed = max(record.committed, number)
        isUnsaved = true
    }

    private mutating func found(_ number: UInt64, _ now: UInt64) -> Turn<Action> {
        let event = Event.found(committed: number)
        guard settings.remotes == 1, number <= record.lastNumber else { return contradiction(event) }
        guard number == record.lastNumber else {
            // One that was given up, while its answer was lost.
            haveCommitted(number)
            return Turn()
        }
        switch state {
        case .makingReady, .holding, .running, .preparing: return contradiction(event)
        case .idle, .ending, .stopped:
            haveCommitted(number)
            return Turn()
        case .committing, .givingUp: return carryOut(0, .committed(number), now)
        case .draining:
            // A process before this one has asked for it. What its host still has to send is sent with the next.
            haveCommitted(number)
            return Turn([.committed(number)]) + giveUp(number, "its remote has it already", atRemotes: false, now)
        }
    }

    private mutating func end(_ reason: String, _ now: UInt64) -> Turn<Action> {
        switch state {
        case .idle, .ending, .givingUp, .stopped: return Turn()
        case .makingReady(let number, _), .holding(let number, _, _), .running(let number, _, _),
            .draining(let number, _):
            return giveUp(number, reason, atRemotes: false, now)
        case .preparing(let number, _): return giveUp(number, reason, atRemotes: true, now)
        case .committing(let number, _, _):
            return record.point == .commit ? Turn() : giveUp(number, reason, atRemotes: true, now)
        }
    }

    /// - Parameter atRemotes: they may have been asked to prepare it.
    private mutating func giveUp(
        _ number: UInt64, _ reason: String, atRemotes: Bool, stops: Bool = false, _ now: UInt64
    ) -> Turn<Action> {
        let atRemotes = atRemotes || (isTakenUp && record.point != .commit)
        if atRemotes, record.point == .commit {
            // Every remote has promised never to commit it.
            record.point = .undecided
            isUnsaved = true
        }
        state = .givingUp(
            number, hosts: Round(self.hosts, now: now),
            remotes: Round(atRemotes ? self.remotes : [], now: now),
            stops: stops ? reason : nil)
        return Turn([.givesUp(number, reason)]) + send()
    }

    private mutating func gaveUp(_ number: UInt64, _ hosts: Round, _ remotes: Round, _ stops: String?) -> Turn<Action> {
        guard hosts.isComplete, remotes.isComplete else {
            return wait(.givingUp(number, hosts: hosts, remotes: remotes, stops: stops))
        }
        if let stops { return stop(stops) }
        return settle(committed: record.committed)
    }

    private mutating func stop(_ reason: String) -> Turn<Action> {
        if case .stopped = state { return Turn() }
        state = .stopped(reason)
        return Turn([.stopped(reason)])
    }

    private mutating func tooLate(_ number: UInt64, _ round: Round, _ now: UInt64) -> Turn<Action> {
        let hosts = round.waiting.map { settings.hostNames[$0] }.joined(separator: ", ")
        return giveUp(number, "\(hosts) had not formed in time", atRemotes: false, now)
    }

    private mutating func tick(_ now: UInt64) -> Turn<Action> {
        switch state {
        case .idle, .stopped: return Turn()
        case .makingReady(let number, var round): return again(&round, number, now) { .makingReady(number, $0) }
        case .holding(let number, var round, let until):
            guard now < until else { return tooLate(number, round, now) }
            return again(&round, number, now) { .holding(number, $0, until: until) }
        case .running(let number, var round, let drained):
            return again(&round, number, now) { .running(number, $0, drained: drained) }
        case .draining(let number, var round): return again(&round, number, now) { .draining(number, $0) }
        case .preparing(let number, var round):
            return again(&round, number, now, atRemotes: true) { .preparing(number, $0) }
        case .committing(let number, var round, let votes):
            guard round.isDue(now) else { return Turn() }
            return enter(.committing(number, round, votes))
        case .ending(let number, var round):
            guard round.isDue(now) else { return Turn() }
            return enter(.ending(number, round))
        case .givingUp(let number, var hosts, var remotes, let stops):
            let isDue = (hosts.isDue(now), remotes.isDue(now))
            state = .givingUp(number, hosts: hosts, remotes: remotes, stops: stops)
            return isDue.0 || isDue.1 ? send() : Turn()
        }
    }

    /// Of an undecided point: after half a minute of silence it is given up.
    private mutating func again(
        _ round: inout Round, _ number: UInt64, _ now: UInt64, atRemotes: Bool = false, _ next: (Round) -> State
    ) -> Turn<Action> {
        guard round.isDue(now) else { return Turn() }
        guard !round.isHopeless else {
            let names = atRemotes ? settings.remoteNames : settings.hostNames
            let silent = round.waiting.map { names[$0] }.joined(separator: ", ")
            return giveUp(
                number, "\(silent) does not answer", atRemotes: atRemotes, now)
        }
        return enter(next(round))
    }

    // MARK: The record, and what is said

    private mutating func become(_ next: CoordinatorRecord) {
        do { try next.check(after: record) } catch { invariant(false, "a coordinator's record has a legal successor") }
        record = next
        if settings.hosts > 1 { record.names = settings.hostNames }
        isUnsaved = true
    }

    private mutating func wait(_ next: State) -> Turn<Action> {
        state = next
        return Turn()
    }

    private mutating func enter(_ next: State) -> Turn<Action> {
        state = next
        return send()
    }

    /// Asks all who are waited for. What they are told relies on the record.
    private func send() -> Turn<Action> { isUnsaved ? .saved(then: outstanding) : Turn(outstanding) }

    /// What those who are waited for have been asked.
    var outstanding: [Action] {
        switch state {
        case .idle, .stopped: []
        case .makingReady(let number, let round): ask(round, .makeReady(number))
        case .holding(let number, let round, _): ask(round, .form(number))
        case .running(let number, let round, _): ask(round, settings.hosts == 1 ? .formAtOnce(number) : .run(number))
        case .draining(let number, let round): ask(round, .run(number))
        case .preparing(let number, let round):
            round.waiting.map { remote in
                let previous = record.left?[remote] ?? record.committed
                return .askRemote(remote, Stamped(epoch: record.epoch, .prepare(number, after: previous)))
            }
        case .committing(let number, let round, let votes):
            ask(
                round,
                settings.remotes == 1
                    ? .commitAtOnce(number, after: record.committed)
                    : .commit(number, others: !votes.committed.isEmpty))
        case .ending(let number, let round): ask(round, .end(number))
        case .givingUp(let number, let hosts, let remotes, _):
            ask(hosts, .giveUp(number)) + ask(remotes, .drop(number))
        }
    }

    private func ask(_ round: Round, _ request: HostRequest) -> [Action] {
        round.waiting.map { .askHost($0, Stamped(epoch: record.epoch, request)) }
    }

    private func ask(_ round: Round, _ request: RemoteRequest) -> [Action] {
        round.waiting.map { .askRemote($0, Stamped(epoch: record.epoch, request)) }
    }
}
