// CoordinationTranscript.swift: a coordinator, its hosts and remotes, wired together, as text: an input a line, then all that is said and done.
//
// `group hosts=3 remotes=3` begins; `go` carries everything to its end, message by message. `lose`, `hold` and `repeat` say what becomes
// of messages of a kind (and, with `to=`, to one receiver) until `release`; `stuck host=2` never forms, `stuck remote=1` never
// has all of a point flushed; at `busy remote=0` writes are under way; `crash` and `start` take a process (`without` its point);
// `wait ms=50` lets time pass; `point` commits one, untold. A line that begins with `!` is one whose saves fail.

import Groups

struct CoordinationTranscript {
    private enum Party: Hashable {
        case coordinator, host(Int), remote(Int)

        var words: String {
            switch self {
            case .coordinator: "coordinator"
            case .host(let index): "host \(index)"
            case .remote(let index): "remote \(index)"
            }
        }
    }

    private enum Event {
        case coordinator(Coordinator.Event)
        case host(Int, Participant.Event)
        case remote(Int, TwoPhaseCommit.Event)
    }

    private struct Rule {
        var fate: String
        var kind: String
        var to: String?
    }

    private var settings = try! Coordinator.Settings(hosts: 1, remotes: 1)
    private var coordinator: Coordinator?
    private var hosts: [Participant?] = []
    private var remotes: [TwoPhaseCommit?] = []
    private var files: (CoordinatorRecord, [ParticipantRecord], [TwoPhaseRecord]) = (CoordinatorRecord(), [], [])
    private var now: UInt64 = 0
    private var queue: [(to: Party, event: Event)] = []
    private var held: [(to: Party, event: Event)] = []
    private var rules: [Rule] = []
    private var stuck: Set<Int> = []
    private var slow: Set<Int> = []
    private var busy: Int?
    private var savesFail = false
    private var said: [String] = []

    mutating func answer(_ line: Line) throws -> [String] {
        said = []
        savesFail = line.saveFails
        switch line.word {
        case "group": try begin(line)
        case "request": tell(.request)
        case "go": go()
        case "point":
            tell(.request)
            go()
            said =
                line.isSet("untilLost")
                ? said.filter { $0.hasSuffix("(lost)") || $0.hasSuffix("(held up)") }
                : said.filter { $0.hasSuffix("is committed") }
        case "wait":
            for _ in 0..<(line.number("times") ?? 1) {
                wait(ms: line.required("ms"))
                if line.isSet("going") { go() }
            }
        case "lose", "hold", "repeat":
            let kind = line.fields.keys.filter { $0 != "to" }.sorted().first ?? ""
            rules.append(Rule(fate: line.word, kind: kind, to: line.fields["to"]))
        case "release":
            rules = []
            queue += held
            held = []
        case "stuck":
            stuck = Set(line.number("host").map { [Int($0)] } ?? [])
            slow = Set(line.number("remote").map { [Int($0)] } ?? [])
        case "busy": busy = line.number("remote").map { Int($0) }
        case "crash": crash(try party(line))
        case "start": start(try party(line), line)
        case "give-up": tell(.giveUp(line.fields["reason"] ?? "mirroring stops"))
        case "found": tell(.found(committed: line.required("committed")))
        case "failover":
            let remote = Int(line.required("remote"))
            drive(remote: remote, line.number("alone").map { .failOverAlone($0) } ?? .failOver)
        case "state": said = state
        default: throw TranscriptError(description: "'\(line.word)' is nothing that happens")
        }
        return said
    }

    private func party(_ line: Line) throws -> Party {
        if line.isSet("coordinator") { return .coordinator }
        if let host = line.number("host") { return .host(Int(host)) }
        if let remote = line.number("remote") { return .remote(Int(remote)) }
        throw TranscriptError(description: "'\(line.word)' needs coordinator, host= or remote=")
    }

    private var state: [String] {
        [coordinator.map { "coordinator \($0.state.kind)" } ?? "coordinator down"]
            + hosts.enumerated().map { "host \($0) \($1.map { "\($0.state.kind)" } ?? "down")" }
            + remotes.enumerated().map {
                "remote \($0) \($1.map { "\($0.state.kind), committed \($0.record.committed)" } ?? "down")"
            }
    }

    private mutating func begin(_ line: Line) throws {
        settings = try Coordinator.Settings(
            hosts: Int(line.required("hosts")), remotes: Int(line.required("remotes")))
        files = (
            CoordinatorRecord(), Array(repeating: ParticipantRecord(), count: settings.hosts),
            Array(repeating: TwoPhaseRecord(), count: settings.remotes)
        )
        (hosts, remotes) = (
            Array(repeating: nil, count: settings.hosts), Array(repeating: nil, count: settings.remotes)
        )
        (queue, held, rules, stuck, slow, busy, now) = ([], [], [], [], [], nil, 1_000_000_000)
        start(.coordinator)
        for host in hosts.indices { start(.host(host)) }
        for remote in remotes.indices { start(.remote(remote)) }
    }

    private mutating func crash(_ party: Party) {
        queue.removeAll { $0.to == party }
        switch party {
        case .coordinator: coordinator = nil
        case .host(let host): hosts[host] = nil
        case .remote(let remote): remotes[remote] = nil
        }
    }

    private mutating func start(_ party: Party, _ line: Line = Line("start")) {
        switch party {
        case .coordinator:
            var machine = Coordinator(settings, record: files.0)
            let turn = machine.start(now: now)
            coordinator = machine
            carryOut(turn)
        case .host(let host):
            var machine = Participant(settings, record: files.1[host])
            let turn = machine.start(isHeld: !line.isSet("without"))
            hosts[host] = machine
            carryOut(turn, host: host)
        case .remote(let remote):
            let machine = TwoPhaseCommit(settings, index: remote, record: files.2[remote])
            remotes[remote] = machine
            carryOut(machine.start(), remote: remote)
        }
    }

    // MARK: Time and messages

    private mutating func go() {
        while !queue.isEmpty {
            let (_, event) = queue.removeFirst()
            switch event {
            case .coordinator(let event): tell(event)
            case .host(let host, let event): drive(host, event)
            case .remote(let remote, let event): drive(remote: remote, event)
            }
        }
    }

    /// Everybody's time passes, and who waits for it is told.
    private mutating func wait(ms: UInt64) {
        now += ms * 1_000_000
        for host in hosts.indices where hosts[host]?.wakeAt ?? .max <= now { drive(host, .tick) }
        if coordinator?.wakeAt ?? .max <= now { tell(.tick) }
        for remote in remotes.indices where remotes[remote]?.wakeAt ?? .max <= now { drive(remote: remote, .tick) }
    }

    private mutating func post(_ from: Party, _ to: Party, _ text: String, _ event: Event) {
        let kind = String(text.prefix { $0 != " " })
        let name = to.words.filter { $0 != " " }
        let rule = rules.last { $0.kind == kind && ($0.to ?? name) == name }
        said.append(
            "\(from.words) → \(to.words): \(text)\(rule.map { " (\($0.fate == "lose" ? "lost" : $0.fate == "hold" ? "held up" : "twice"))" } ?? "")"
        )
        switch rule?.fate {
        case "lose": break
        case "hold": held.append((to, event))
        case "repeat": queue += [(to, event), (to, event)]
        default: queue.append((to, event))
        }
    }

    // MARK: The machines

    private mutating func tell(_ event: Coordinator.Event) {
        guard let turn = coordinator?.handle(event, now: now) else { return }
        carryOut(turn)
    }

    private mutating func carryOut(_ turn: Turn<Coordinator.Action>) {
        for action in turn.before { perform(action) }
        guard turn.saves, let record = coordinator?.record else { return }
        let words =
            "epoch \(record.epoch)\(record.lastNumber > 0 ? ", point \(record.lastNumber) \(record.point)" : "")\(record.committed > 0 ? ", committed \(record.committed)" : "")"
        if savesFail {
            said.append("coordinator cannot save: \(words)")
            return
        }
        files.0 = record
        coordinator?.wasSaved()
        said.append("coordinator saves: \(words)")
        for action in turn.after { perform(action) }
    }

    private mutating func perform(_ action: Coordinator.Action) {
        switch action {
        case .askHost(let host, let request):
            post(.coordinator, .host(host), request.body.words, .host(host, .request(request)))
        case .askRemote(let remote, let request):
            post(.coordinator, .remote(remote), request.body.words, .remote(remote, .request(request)))
        case .committed(let number): said.append("coordinator: point \(number) is committed")
        case .givesUp(let number, let reason): said.append("coordinator gives up point \(number): \(reason)")
        case .stopped(let reason): said.append("coordinator stops: \(reason)")
        case .contradiction(let text): said.append("coordinator: impossible: \(text)")
        }
    }

    private mutating func drive(_ host: Int, _ event: Participant.Event) {
        guard let turn = hosts[host]?.handle(event, now: now) else { return }
        carryOut(turn, host: host)
    }

    private mutating func carryOut(_ turn: Turn<Participant.Action>, host: Int) {
        for action in turn.before { perform(action, host) }
        guard turn.saves, let record = hosts[host]?.record else { return }
        let words =
            "epoch \(record.epoch), point \(record.number)\(record.point == .none ? "" : record.point == .held ? " is held" : " may be half formed")"
        if savesFail {
            said.append("host \(host) cannot save: \(words)")
            if let next = hosts[host]?.saveFailed() { carryOut(next, host: host) }
            return
        }
        files.1[host] = record
        hosts[host]?.wasSaved()
        said.append("host \(host) saves: \(words)")
        for action in turn.after { perform(action, host) }
    }

    private mutating func perform(_ action: Participant.Action, _ host: Int) {
        func soon(_ event: Participant.Event) { queue.append((.host(host), .host(host, event))) }
        switch action {
        case .answer(let answer):
            post(.host(host), .coordinator, answer.body.words, .coordinator(.host(host, answer)))
            return
        case .makeReady(let number): soon(.madeReady(number))
        case .holdAndForm(let number): if !stuck.contains(host) { soon(.formed(number)) }
        case .formAtOnce(let number):
            soon(stuck.contains(host) ? .lost(number, "it let go by itself") : .formed(number))
        case .drain(let number): soon(.drained(number))
        case .giveUp(let number): soon(.gaveUp(number))
        case .letGo, .end, .contradiction: break
        }
        said.append("host \(host): \(action.words)")
    }

    private mutating func drive(remote: Int, _ event: TwoPhaseCommit.Event) {
        guard let turn = remotes[remote]?.handle(event, now: now) else { return }
        carryOut(turn, remote: remote)
    }

    private mutating func carryOut(_ turn: Turn<TwoPhaseCommit.Action>, remote: Int) {
        for action in turn.before { perform(action, remote: remote) }
        guard turn.saves, let record = remotes[remote]?.record else { return }
        if savesFail {
            said.append("remote \(remote) cannot save: \(record.words)")
            if let next = remotes[remote]?.saveFailed(now: now) { carryOut(next, remote: remote) }
            return
        }
        files.2[remote] = record
        remotes[remote]?.wasSaved()
        said.append("remote \(remote) saves: \(record.words)")
        for action in turn.after { perform(action, remote: remote) }
    }

    private mutating func perform(_ action: TwoPhaseCommit.Action, remote: Int) {
        switch action {
        case .answer(let answer):
            return post(.remote(remote), .coordinator, answer.body.words, .coordinator(.remote(remote, answer)))
        case .ask(let other, let number):
            return post(
                .remote(remote), .remote(other), "asks about \(number)", .remote(other, .question(from: remote, number))
            )
        case .testify(let other, let number, let testimony):
            let words =
                switch testimony {
                case .committed: "has committed \(number)"
                case .refuses(let prepared): "refuses \(number) from now on; it was \(prepared ? "" : "not ")prepared"
                }
            return post(
                .remote(remote), .remote(other), words, .remote(other, .testimony(from: remote, number, testimony)))
        case .check(let number):
            if busy == remote {
                queue.append((.remote(remote), .remote(remote, .checkFailed(number, "writes are under way"))))
            } else if !slow.contains(remote) {
                queue.append((.remote(remote), .remote(remote, .checked(number))))
            }
        case .take, .dropFiles, .open, .failoverRefused, .contradiction: break
        }
        said.append("remote \(remote): \(action.words)")
    }
}

extension HostRequest {
    fileprivate var words: String {
        switch self {
        case .makeReady(let number): "ready \(number)?"
        case .form(let number): "form \(number)"
        case .formAtOnce(let number): "form \(number) at once"
        case .run(let number): "run \(number)"
        case .giveUp(let number): "give-up \(number)"
        case .end(let number): "end \(number)"
        }
    }
}

extension HostAnswer {
    fileprivate var words: String {
        switch self {
        case .ready(let number): "ready \(number)"
        case .formed(let number): "formed \(number)"
        case .ran(let number): "ran \(number)"
        case .drained(let number, _): "drained \(number)"
        case .failed(let number, let reason): "failed \(number): \(reason)"
        case .gaveUp(let number): "gave-up \(number)"
        case .ended(let number): "ended \(number)"
        case .superseded(let epoch): "follows epoch \(epoch)"
        }
    }
}

extension RemoteRequest {
    fileprivate var words: String {
        switch self {
        case .prepare(let number, let previous): "prepare \(number) after \(previous)"
        case .commit(let number, let others): "commit \(number)\(others ? ", as another has" : "")"
        case .commitAtOnce(let number, let previous): "commit \(number) at once, after \(previous)"
        case .drop(let number): "drop \(number)"
        }
    }
}

extension RemoteAnswer {
    fileprivate var words: String {
        switch self {
        case .checking(let number): "checking \(number)"
        case .prepared(let number): "prepared \(number)"
        case .committed(let number): "committed \(number)"
        case .refuses(let number, let reason): "refuses \(number): \(reason)"
        case .outOfOrder(let number, let newest): "refuses \(number), as its newest is \(newest)"
        case .gone(let number): "has lost \(number)"
        case .dropped(let number): "dropped \(number)"
        case .failedOver(let point): "failed-over at \(point)"
        case .superseded(let epoch): "follows epoch \(epoch)"
        }
    }
}

extension Participant.Action {
    fileprivate var words: String {
        switch self {
        case .answer: "answers"
        case .makeReady(let number): "makes point \(number) ready"
        case .holdAndForm(let number): "holds, and forms point \(number)"
        case .formAtOnce(let number): "holds, forms point \(number), and lets go"
        case .letGo: "lets go"
        case .drain(let number): "drains point \(number)"
        case .giveUp(let number): "merges the bits of point \(number) back"
        case .end(let number): "ends point \(number)"
        case .contradiction(let text): "impossible: \(text)"
        }
    }
}

extension TwoPhaseCommit.Action {
    fileprivate var words: String {
        switch self {
        case .answer, .ask, .testify: "says"
        case .check(let number): "looks whether all of point \(number) is there, and makes its files"
        case .take(let number): "takes point \(number)"
        case .dropFiles(let number): "drops the files of point \(number)"
        case .open(let point): "opens at point \(point)"
        case .failoverRefused(let reason): "does not fail over: \(reason)"
        case .contradiction(let text): "impossible: \(text)"
        }
    }
}

extension TwoPhaseRecord {
    fileprivate var words: String {
        var parts = ["committed \(committed)"]
        switch stand {
        case .open: break
        case .prepared(let number): parts.append("prepared \(number)")
        case .failedOver(let point, let inDoubt):
            parts.append("failed over at \(point)\(inDoubt.map { ", in doubt about \($0)" } ?? "")")
        }
        if refusedThrough > 0 { parts.append("refuses up to \(refusedThrough)") }
        return parts.joined(separator: ", ")
    }
}
