// Coordination.swift: points over several hosts under one pause, committed at several remotes in two phases: the production machines
// (`Groups/Coordination`) among lost, late and repeated messages, crashes and power loss of any process, saves that fail, a coordinator
// that is taken for dead and goes on, and operators who fail over at any moment.
//
// One to three hosts and one to three remotes by seed; each host has two volumes, and its data goes to one remote, which may be another's
// too. Hosts' writes depend on each other across all of them. Processes die between any two of a machine's actions.
//
// Must hold: a committed point is the same at every remote, whole, and a dependency-closed cut over all hosts; no acknowledgement is held
// past the deadline; what differs between a host and its remote is marked; remotes that fail over without `--alone` go to the same point;
// an older epoch has no effect; nobody is asked at full speed; once faults end a point is committed, or all remotes fail over.

import Groups

package final class Coordination: Scenario {
    var random: SeededGenerator
    let fault: DeliberateFault?
    package internal(set) var trace: [String] = []
    package private(set) var steps = 0
    package internal(set) var figures = SimulationFigures()
    private var failure: SimulationFailure?

    let settings: Coordinator.Settings
    var now: UInt64 = 1_000_000_000
    private var hosts: [CoordinationHost]
    private var remotes: [CoordinationRemote]
    private var coordinator: Coordinator?
    private var stale: Coordinator?
    private var file = RecordFile(CoordinatorRecord())
    /// How often the file was written, and what of that each process knows: whoever keeps it refuses a save that is not based on it.
    private var writes = 0
    private var knownWrites: [CoordinationProcess: Int] = [:]
    private var network: CoordinationNetwork
    /// Remotes that die at a step: what they have promised is hardly used yet.
    private var doomed: [(step: Int, remote: Int)] = []
    /// No faults any more.
    private var isQuiet = false { didSet { network.isQuiet = isQuiet } }

    private let mix: CoordinationMix

    // What must be there.
    private var clients = CoordinationClients()
    private var points = CoordinationPoints()
    /// The newest point that the coordinator says to be committed.
    private var announced: UInt64 = 0

    /// How often something happened that a rule is about, so that a test sees that none is left out.
    package private(set) var happened: [String: Int] = [:]

    package init(seed: UInt64, fault: DeliberateFault? = nil) {
        var generator = SeededGenerator(seed: seed ^ 0xC00D)
        let layout = CoordinationMix.layouts[generator.below(CoordinationMix.layouts.count)]
        settings = try! Coordinator.Settings(
            hosts: layout.ofHosts.count, remotes: layout.remotes,
            maxCoordination: [5_000_000, Coordinator.Settings.coordination, 200_000_000][generator.below(3)])
        hosts = layout.ofHosts.map { CoordinationHost(remote: $0) }
        remotes = (0..<layout.remotes).map { remote in
            CoordinationRemote(hosts: layout.ofHosts.indices.filter { layout.ofHosts[$0] == remote })
        }
        mix = CoordinationMix(&generator)
        network = CoordinationNetwork(mix, fault)
        random = generator
        self.fault = fault
        for process in processes { restart(process) }
    }

    var processes: [CoordinationProcess] {
        [.coordinator] + hosts.indices.map { .host($0) } + remotes.indices.map { .remote($0) }
    }

    func note(_ text: @autoclosure () -> String) {
        trace.append("\(steps), \(now / 1000) us: \(text())")
        if trace.count > 400 { trace.removeFirst(200) }
    }

    private func fail(_ text: String) {
        note(text)
        if failure == nil { failure = SimulationFailure(text) }
    }

    // MARK: Running

    package func run(steps count: Int, skipping skipped: Set<Int>) throws(SimulationFailure) {
        let seed = random.next()
        for index in 0..<count where !skipped.contains(index) {
            random = SeededGenerator(seed: seed &+ UInt64(index) &* 0x9E37_79B9)
            if remotes.allSatisfy({ $0.failedOver != nil }) { break }
            try step(index)
        }
        random = SeededGenerator(seed: ~seed)
        if random.chance(30) { try outlastSilence() }
        try settle()
    }

    private func step(_ index: Int) throws(SimulationFailure) {
        steps = index + 1
        figures.steps += 1
        if let index = doomed.firstIndex(where: { steps >= $0.step }) {
            let process = CoordinationProcess.remote(doomed.remove(at: index).remote)
            crash(process, "dies with its promise")
            restart(process)
        }
        happen(random.one(of: CoordinationHappening.allCases, weights: mix.weights))
        passTime(by: UInt64(random.below(1000) < mix.pausing ? random.below(60_000_000) : random.below(200_000)))
        figures.operations = clients.count
        check()
        if let failure { throw failure }
    }

    private func happen(_ happening: CoordinationHappening) {
        switch happening {
        case .write: clients.write(&hosts, &random)
        case .apply: clients.apply(&hosts, &random)
        case .acknowledge: clients.acknowledge(&hosts, &random)
        case .form: if let host = random.one(of: hosts.indices.filter { hosts[$0].forming != nil }) { formNext(host) }
        case .task: runTask()
        case .deliver: deliver()
        case .data:
            if network.hasData, random.chance(50) { return network.arrive(&hosts, &remotes, now, &random) }
            if let host = random.one(of: hosts.indices.filter { hosts[$0].sending != nil }) {
                network.send(host, &hosts, &remotes, now, &random)
            }
        case .tick: tick()
        case .request: if coordinator != nil { tell(.coordinator, .request) }
        case .tell: tellUnasked()
        case .crash: crash(processes[random.below(processes.count)], "dies")
        case .restart:
            restart(processes[random.below(processes.count)])
            if stale != nil, random.chance(10) { stale = nil }
        case .cut:
            let pair = Set([processes[random.below(processes.count)], processes[random.below(processes.count)]])
            if pair.count == 2 { network.cut(pair, until: now + UInt64(random.below(2_000_000_000))) }
        case .failOver: askToFailOver()
        }
    }

    /// Hosts' deadlines are kept to the nanosecond; whoever else waits may be late.
    private func passTime(by amount: UInt64) {
        let end = now + amount
        while failure == nil {
            let due = hosts.indices.compactMap { host in
                hosts[host].deadline(settings.maxCoordination).map { ($0, host) }
            }
            guard let (at, host) = due.min(by: { $0 < $1 }), at <= end, fault != .holdOn else { break }
            now = max(now, at)
            if hosts[host].isAtOnce {
                letGoAtOnce(host)
                continue
            }
            if fault == .countDeadlineAsRun, case .formed? = hosts[host].machine?.state {
                // The executor has lost the difference between the two ways of letting go.
                let run = Stamped(
                    epoch: hosts[host].machine!.record.epoch, HostRequest.run(hosts[host].file.content.number))
                drive(host) { $0.handle(.request(run), now: at - 1) }
            }
            drive(host) { [now] in $0.handle(.tick, now: now) }
            if let next = hosts[host].machine?.wakeAt, next <= now {
                fail("an acknowledgement is held past the deadline")
            }
        }
        now = end
    }

    private func tick() {
        for process in [CoordinationProcess.coordinator, .stale] {
            func wakeAt() -> UInt64? { (process == .stale ? stale : coordinator)?.wakeAt }
            guard let wake = wakeAt(), wake <= now else { continue }
            tell(process, .tick)
            if let next = wakeAt(), next <= now { fail("a coordinator asks at full speed") }
        }
        for remote in remotes.indices {
            guard let wake = remotes[remote].machine?.wakeAt, wake <= now else { continue }
            drive(remote: remote, .tick)
            if let next = remotes[remote].machine?.wakeAt, next <= now { fail("a remote asks at full speed") }
        }
    }

    // MARK: Hosts' writes

    /// What has not formed by the deadline does not.
    private func letGoAtOnce(_ host: Int) {
        if let number = hosts[host].forming { hosts[host].tasks.append(.lost(number, "it let go by itself")) }
        hosts[host].forming = nil
        letGo(host)
    }

    private func letGo(_ host: Int) {
        (hosts[host].heldSince, hosts[host].isAtOnce) = (nil, false)
        for grain in hosts[host].held { clients.acknowledged(host, grain, &hosts) }
        hosts[host].held = []
    }

    /// One volume after the other.
    private func formNext(_ host: Int) {
        guard let number = hosts[host].forming else { return }
        let first = hosts[host].image.count
        let grains = first..<first + CoordinationHost.grainsPerVolume
        if !hosts[host].outOfSync.isDisjoint(with: grains) {
            fail("a point is formed over what is left of the last one")
        }
        hosts[host].form(grains)
        guard hosts[host].image.count == CoordinationHost.grainCount else { return }
        if !points.form(number, host, hosts[host].image) { fail("a host forms a point anew") }
        (hosts[host].forming, hosts[host].heldPoint) = (nil, number)
        if hosts[host].isAtOnce { letGo(host) }
        hosts[host].tasks.append(.formed(number))
    }

    // MARK: Data

    /// An operator's wish, or what a new session with the only remote brings to light.
    private func tellUnasked() {
        guard coordinator != nil else { return }
        if random.chance(50) { return tell(.coordinator, .giveUp("mirroring stops")) }
        guard remotes.count == 1, let remote = remotes[0].machine, network.reaches(.coordinator, .remote(0), now) else {
            return
        }
        tell(.coordinator, .found(committed: remote.record.committed))
    }

    // MARK: Messages

    private func deliver() {
        guard let message = network.next(&random) else { return }
        switch (message.to, message.body) {
        case (.coordinator, .ofHost(let host, let answer)):
            for process in [CoordinationProcess.coordinator, .stale] { tell(process, .host(host, answer)) }
        case (.coordinator, .ofRemote(let remote, let answer)):
            for process in [CoordinationProcess.coordinator, .stale] { tell(process, .remote(remote, answer)) }
        case (.host(let host), .toHost(let request)): deliver(request, host: host)
        case (.remote(let remote), .toRemote(let request)): deliver(request, remote: remote)
        case (.remote(let remote), .question(let other, let number)):
            drive(remote: remote, .question(from: other, number))
        case (.remote(let remote), .testimony(let other, let number, let testimony)):
            drive(remote: remote, .testimony(from: other, number, testimony))
        default: fail("a message has gone astray")
        }
    }

    private func deliver(_ request: Stamped<HostRequest>, host: Int) {
        guard let before = hosts[host].machine else { return }
        var given = request
        if fault == .obeyOlderEpoch { given.epoch = max(given.epoch, before.record.epoch) }
        if request.epoch < before.record.epoch {
            var copy = before
            let refusal = Stamped(epoch: request.epoch, HostAnswer.superseded(by: before.record.epoch))
            if copy.handle(.request(given), now: now).before.last != .answer(refusal) {
                fail("a host obeys an older coordinator")
            }
        }
        drive(host) { [now] in $0.handle(.request(given), now: now) }
    }

    private func deliver(_ request: Stamped<RemoteRequest>, remote: Int) {
        guard let before = remotes[remote].machine else { return }
        var given = request
        if fault == .obeyOlderEpoch { given.epoch = max(given.epoch, before.record.epoch) }
        if request.epoch < before.record.epoch {
            var copy = before
            let refusal = Stamped(epoch: request.epoch, RemoteAnswer.superseded(by: before.record.epoch))
            if copy.handle(.request(given), now: now).before != [.answer(refusal)] {
                fail("a remote obeys an older coordinator")
            }
        }
        drive(remote: remote, .request(given))
    }

    // MARK: Carrying out

    /// What a machine wants, with death between any two of its actions.
    private func carryOut<Action>(
        _ turn: Turn<Action>, _ process: CoordinationProcess, early: (Action) -> Bool = { _ in false },
        save: () -> Bool?, perform: (Action) -> Void, saved: () -> Void, saveFailed: () -> Void
    ) {
        if turn.before.count + turn.after.count > 3 * Coordinator.Settings.members.upperBound {
            fail("a machine wants too much at once")
        }
        for action in turn.before {
            if dies(process) { return }
            perform(action)
        }
        guard turn.saves else { return }
        for action in turn.after where early(action) { perform(action) }
        if dies(process) { return }
        switch save() {
        case nil: return
        case true?: saved()
        case false?: return saveFailed()
        }
        for action in turn.after where !early(action) {
            if dies(process) { return }
            perform(action)
        }
    }

    private func dies(_ process: CoordinationProcess) -> Bool {
        guard !isQuiet, mix.dying > 0, random.below(mix.dying) == 0 else { return false }
        crash(process, "dies in the middle")
        return true
    }

    @discardableResult
    private func count<Kind: Equatable>(_ machine: String, _ before: Kind, _ after: Kind) -> Bool {
        guard before != after else { return false }
        happened["\(machine): \(before) → \(after)", default: 0] += 1
        return true
    }

    /// - Returns: whether the record counts as saved; and the file holds it or, if it does not, perhaps.
    private func save<Record>(
        _ next: Record, _ file: inout RecordFile<Record>, _ check: (Record) throws -> Void
    ) -> Bool {
        do { try check(file.sure) } catch {
            fail("a record is saved that cannot come next: \(error)")
            return false
        }
        guard !isQuiet, mix.failingSaves > 0, random.below(mix.failingSaves) == 0 else {
            file.content = next
            return true
        }
        if random.chance(50) { file.perhaps(next) }
        note("the save fails")
        return false
    }

    private func tell(_ process: CoordinationProcess, _ event: Coordinator.Event) {
        drive(process) { [now] in $0.handle(event, now: now) }
    }

    private func drive(_ process: CoordinationProcess, _ handle: (inout Coordinator) -> Turn<Coordinator.Action>) {
        guard var machine = process == .stale ? stale : coordinator else { return }
        let before = machine.state.kind
        let turn = handle(&machine)
        count("coordinator", before, machine.state.kind)
        set(process, machine)
        carryOut(
            turn, process,
            early: { [fault] action in
                if case .askRemote(_, let request) = action, case .commit = request.body {
                    fault == .decideUnsaved
                } else {
                    false
                }
            },
            save: { saveCoordinator(process) },
            perform: { perform($0, of: process) },
            saved: { change(process) { $0.wasSaved() } }, saveFailed: {})
    }

    private func set(_ process: CoordinationProcess, _ machine: Coordinator?) {
        if process == .stale { stale = machine } else { coordinator = machine }
    }

    private func change(_ process: CoordinationProcess, _ body: (inout Coordinator) -> Void) {
        guard var machine = process == .stale ? stale : coordinator else { return }
        body(&machine)
        set(process, machine)
    }

    /// - Returns: nil when the record belongs to a newer process.
    private func saveCoordinator(_ process: CoordinationProcess) -> Bool? {
        guard let machine = process == .stale ? stale : coordinator else { return nil }
        if knownWrites[process] != writes, fault != .saveOverNewer {
            tell(process, .superseded)
            return nil
        }
        writes += 1
        knownWrites[process] = writes
        return save(machine.record, &file) { try machine.record.check(after: $0) }
    }

    private func perform(_ action: Coordinator.Action, of process: CoordinationProcess) {
        switch action {
        case .askHost(let host, let request): network.post(process, .host(host), .toHost(request), now, &random)
        case .askRemote(let remote, let request):
            if case .commit(_, others: true) = request.body { happened["a promise made void", default: 0] += 1 }
            network.post(process, .remote(remote), .toRemote(request), now, &random)
        case .committed(let number):
            note("point \(number) is committed everywhere")
            announced = max(announced, number)
            figures.commits += 1
            for remote in remotes.indices where !hasPoint(remote, number) {
                fail("the coordinator says that a point is committed, and a remote does not have it")
            }
        case .givesUp(let number, let reason): note("point \(number) is given up: \(reason)")
        case .stopped(let reason): note("\(process) stops: \(reason)")
        case .contradiction(let text): fail("the coordinator meets the impossible: \(text)")
        }
    }

    private func hasPoint(_ remote: Int, _ number: UInt64) -> Bool {
        remotes[remote].point?.number ?? 0 >= number || remotes[remote].file.sure.committed >= number
    }

    private func drive(_ host: Int, _ handle: (inout Participant) -> Turn<Participant.Action>) {
        guard var machine = hosts[host].machine else { return }
        let before = machine.state.kind
        let turn = handle(&machine)
        if count("host", before, machine.state.kind) {
            note("host \(host): \(before) → \(machine.state.kind) \(machine.record.number)")
        }
        hosts[host].machine = machine
        carryOut(
            turn, .host(host),
            save: {
                guard let machine = hosts[host].machine else { return nil }
                return save(machine.record, &hosts[host].file) { try machine.record.check(after: $0) }
            },
            perform: { perform($0, host: host) },
            saved: { hosts[host].machine?.wasSaved() }, saveFailed: { drive(host) { $0.saveFailed() } })
    }

    private func perform(_ action: Participant.Action, host: Int) {
        switch action {
        case .answer(let answer): network.post(.host(host), .coordinator, .ofHost(host, answer), now, &random)
        case .makeReady(let number):
            let isReady = isQuiet || !random.chance(4)
            hosts[host].tasks.append(isReady ? .madeReady(number) : .notReady(number, "a volume is being restored"))
        case .holdAndForm(let number), .formAtOnce(let number):
            if fault != .holdNothing { hosts[host].heldSince = now }
            if case .formAtOnce = action { hosts[host].isAtOnce = fault != .holdNothing }
            (hosts[host].forming, hosts[host].image) = (number, [])
        case .letGo: letGo(host)
        case .drain(let number):
            if hosts[host].image.count != CoordinationHost.grainCount { return fail("a half-formed point is drained") }
            hosts[host].sending = CoordinationHost.Sending(number: number, session: nil, unsent: [])
        case .giveUp(let number):
            (hosts[host].forming, hosts[host].sending) = (nil, nil)
            if hosts[host].isAtOnce { letGo(host) }
            hosts[host].tasks.removeAll()  // what was begun before has ended
            hosts[host].tasks.append(.gaveUp(number))
        case .end: (hosts[host].image, hosts[host].heldPoint) = ([], nil)
        case .contradiction(let text): fail("a host meets the impossible: \(text)")
        }
    }

    private func drive(remote: Int, _ event: TwoPhaseCommit.Event) {
        drive(remote: remote) { [now] in $0.handle(event, now: now) }
    }

    private func drive(remote: Int, _ handle: (inout TwoPhaseCommit) -> Turn<TwoPhaseCommit.Action>) {
        guard var machine = remotes[remote].machine else { return }
        let before = machine.state.kind
        let turn = handle(&machine)
        if count("remote", before, machine.state.kind) {
            note(
                "remote \(remote): \(before) → \(machine.state.kind) \(machine.state.number ?? machine.record.committed)"
            )
        }
        remotes[remote].machine = machine
        carryOut(
            turn, .remote(remote),
            early: { [fault] action in
                switch action {
                case .answer(let answer):
                    if case .prepared = answer.body { fault == .prepareUnsaved } else { false }
                case .testify: fault == .promiseUnsaved
                default: false
                }
            },
            save: {
                guard let machine = remotes[remote].machine else { return nil }
                return save(machine.record, &remotes[remote].file) { try machine.record.check(after: $0) }
            },
            perform: { perform($0, remote: remote) },
            saved: { remotes[remote].machine?.wasSaved() },
            saveFailed: { drive(remote: remote) { [now] in $0.saveFailed(now: now) } })
    }

    private func perform(_ action: TwoPhaseCommit.Action, remote: Int) {
        switch action {
        case .answer(let answer): network.post(.remote(remote), .coordinator, .ofRemote(remote, answer), now, &random)
        case .check(let number):
            guard isQuiet || !random.chance(3) else {
                return remotes[remote].tasks.append(.checkFailed(number, "writes are under way"))
            }
            remotes[remote].flushed = remotes[remote].secondary
            remotes[remote].tasks.append(.checked(number))
        case .take(let number): take(number, remote)
        case .dropFiles(let number):
            remotes[remote].tasks.removeAll { if case .checked(number) = $0 { true } else { false } }
        case .ask(let other, let number): ask(other, number, remote)
        case .testify(let other, let number, let testimony):
            happened["\(testimony)", default: 0] += 1
            if !isQuiet, random.chance(20) { doomed.append((steps + random.below(100), remote)) }
            network.post(.remote(remote), .remote(other), .testimony(of: remote, number, testimony), now, &random)
        case .open(let point): opened(at: point, remote)
        case .failoverRefused(let reason): note("remote \(remote) does not fail over: \(reason)")
        case .contradiction(let text): fail("a remote meets the impossible: \(text)")
        }
    }

    private func ask(_ other: Int, _ number: UInt64, _ remote: Int) {
        switch fault {
        case .failOverUnasked:
            remotes[remote].tasks.append(.testimony(from: other, number, .committed))
        case .countSilenceAsPromise
        where remotes[other].machine == nil || !network.reaches(.remote(remote), .remote(other), now):
            remotes[remote].tasks.append(.testimony(from: other, number, .refuses(prepared: true)))
        default: network.post(.remote(remote), .remote(other), .question(of: remote, number), now, &random)
        }
    }

    private func runTask() {
        let remote = random.one(of: remotes.indices.filter { !remotes[$0].tasks.isEmpty })
        if let remote, random.chance(50) { return drive(remote: remote, remotes[remote].tasks.removeFirst()) }
        guard let host = random.one(of: hosts.indices.filter { !hosts[$0].tasks.isEmpty }) else { return }
        let event = hosts[host].tasks.removeFirst()
        if case .gaveUp = event { hosts[host].giveUpPoint() }
        drive(host) { [now] in $0.handle(event, now: now) }
    }

    // MARK: Dying and starting

    private func crash(_ process: CoordinationProcess, _ words: String) {
        figures.crashes += 1
        let powerLoss = random.chance(40)
        note("\(process) \(words)\(powerLoss ? ", with its power" : "")")
        switch process {
        case .stale: stale = nil
        case .coordinator:
            // Or it is only taken for dead.
            if random.chance(30), let coordinator, coordinator.record.epoch <= file.content.epoch {
                stale = coordinator
                knownWrites[.stale] = knownWrites[.coordinator]
            }
            coordinator = nil
        case .host(let host):
            hosts[host].die(powerLoss: powerLoss)
            for grain in hosts[host].loseWrites(&random) { clients.forget(host, grain) }
            // After power loss more counts as changed than has.
            if powerLoss { hosts[host].recording.insert(random.below(CoordinationHost.grainCount)) }
        case .remote(let remote): remotes[remote].die(powerLoss: powerLoss, &random)
        }
    }

    private func restart(_ process: CoordinationProcess) {
        switch process {
        case .stale: break
        case .coordinator:
            if case .stopped? = coordinator?.state { coordinator = nil }
            guard coordinator == nil else { return }
            file.isRead()
            knownWrites[.coordinator] = writes
            var record = file.content
            if fault == .forgetDecision, record.point == .commit { record = record.changed(point: .undecided) }
            if fault == .forgetNumber {
                record = record.changed(lastNumber: record.committed, point: CoordinatorRecord.Point.none)
            }
            if fault == .forgetNumber || fault == .forgetDecision { file.content = record }
            happened["takes up: \(record.point)", default: 0] += 1
            note("a coordinator takes up: point \(record.lastNumber), \(record.point)")
            coordinator = Coordinator(settings, record: record)
            drive(.coordinator) { [now] in $0.start(now: now) }
        case .host(let host):
            guard hosts[host].machine == nil else { return }
            var record = hosts[host].file.content
            if fault == .forgetHalfFormed { record = ParticipantRecord(epoch: record.epoch, number: record.number) }
            if fault == .forgetFormed {
                record = ParticipantRecord(epoch: record.epoch, number: 0, point: record.point)
            }
            hosts[host].file.content = record
            hosts[host].machine = Participant(settings, record: record)
            let isHeld = hosts[host].heldPoint == record.number || fault == .trustHeldPoint
            happened["starts: \(record.point), \(isHeld ? "" : "not ")held", default: 0] += 1
            drive(host) { $0.start(isHeld: isHeld) }
        case .remote(let remote):
            guard remotes[remote].machine == nil else { return }
            remotes[remote].file.isRead()
            let record = remotes[remote].file.content
            if fault == .forgetPromise {
                remotes[remote].file.content = TwoPhaseRecord(
                    epoch: record.epoch, committed: record.committed, stand: record.stand)
            }
            remotes[remote].machine = TwoPhaseCommit(settings, index: remote, record: remotes[remote].file.content)
            drive(remote: remote) { $0.start() }
        }
    }

    // MARK: Points and mix.failovers

    private func take(_ number: UInt64, _ remote: Int) {
        guard remotes[remote].point?.number ?? 0 < number else { return }
        let contents = remotes[remote].secondary
        remotes[remote].point = (number, contents)
        note("remote \(remote) takes point \(number)")
        figures.checks += 1
        for (host, content) in contents.sorted(by: { $0.key < $1.key }) where points.formed[number]?[host] != content {
            fail("remote \(remote) commits a half point")
        }
        if remotes[remote].secondary != remotes[remote].flushed { fail("a point is committed that is not flushed") }
        if let problem = points.brokenCut(number, hosts) { fail(problem) }
    }

    private func askToFailOver() {
        guard mix.failovers > 0, random.below(4) < mix.failovers else { return }
        // Where it matters most, more often.
        let undecided = random.one(of: remotes.indices.filter { remotes[$0].machine?.state.number != nil })
        if undecided == nil, !random.chance(6) { return }
        let remote = random.chance(80) ? undecided ?? random.below(remotes.count) : random.below(remotes.count)
        guard let machine = remotes[remote].machine else { return }
        if random.chance(8) {
            let points = [machine.record.committed, machine.record.inDoubt ?? 0].filter { $0 > 0 }
            guard !points.isEmpty, remotes[remote].failedOver == nil else { return }
            remotes[remote].isAlone = true
            happened["alone", default: 0] += 1
            note("remote \(remote) is to fail over alone")
            return drive(remote: remote, .failOverAlone(points[random.below(points.count)]))
        }
        note("remote \(remote) is to fail over")
        drive(remote: remote, .failOver)
    }

    private func opened(at point: UInt64, _ remote: Int) {
        note("remote \(remote) has failed over at point \(point)")
        remotes[remote].failedOver = point
        if remotes[remote].point?.number != point { fail("a remote fails over to a point that it does not have") }
        let points = Set(remotes.filter { !$0.isAlone }.compactMap(\.failedOver))
        if points.count > 1 { fail("remotes fail over to different points") }
    }

    // MARK: Checking

    private func check() {
        for host in hosts.indices {
            if let since = hosts[host].heldSince, now > since + settings.maxCoordination {
                fail("an acknowledgement is held past the deadline")
            }
            let remote = remotes[hosts[host].remote]
            for grain in hosts[host].grains.indices {
                let content = hosts[host].grains[grain].content
                guard content != remote.secondary[host]![grain] || content != remote.flushed[host]![grain] else {
                    continue
                }
                if !hosts[host].recording.contains(grain), !hosts[host].outOfSync.contains(grain) {
                    fail("a host and its remote differ, and nothing says so")
                }
            }
        }
    }

    /// Somebody is silent for minutes, while all others are well: an undecided point is not held for that.
    private func outlastSilence() throws(SimulationFailure) {
        isQuiet = true
        defer { isQuiet = false }
        network.mend()
        stale = nil
        for process in processes { restart(process) }
        guard remotes.allSatisfy({ $0.failedOver == nil }) else { return }
        tell(.coordinator, .request)
        for _ in 0..<random.below(400) { try goOn(by: 1_000) }
        let silent = random.one(of: processes.filter { $0 != .coordinator })!
        crash(silent, "is silent")
        let end = now + 120_000_000_000
        while now < end { try goOn(by: 20_000_000) }
        if coordinator?.state.holdsUndecided(for: silent) == true {
            fail("an undecided point is held for \(silent), which does not answer")
        }
        if let failure { throw failure }
    }

    /// One of the things that happen without faults.
    private func goOn(by amount: UInt64) throws(SimulationFailure) {
        let useful: [CoordinationHappening] = [.apply, .acknowledge, .form, .task, .deliver, .data, .tick, .deliver]
        happen(useful[random.below(useful.count)])
        passTime(by: amount)
        check()
        if let failure { throw failure }
    }

    /// No faults any more: a point is committed, or all remotes fail over.
    private func settle() throws(SimulationFailure) {
        isQuiet = true
        network.mend()
        stale = nil
        for process in processes { restart(process) }
        let before = announced
        var isFailover = false
        for turn in 0..<40_000 {
            isFailover = remotes.contains { $0.failedOver != nil }
            if isFailover ? remotes.indices.allSatisfy(hasFailedOver) : announced > before { return try settled() }
            if turn % 200 == 0 {
                if isFailover {
                    for remote in remotes.indices where remotes[remote].failedOver == nil {
                        drive(remote: remote, .failOver)
                    }
                } else {
                    tell(.coordinator, .request)
                }
                // Whoever waits to ask again.
                passTime(by: 500_000_000)
            }
            try goOn(by: 1_000)
        }
        fail("without faults \(isFailover ? "not every remote fails over" : "no point is committed")")
        throw failure!
    }

    /// Or there is nothing that it could fail over to, since all who have did so alone.
    private func hasFailedOver(_ remote: Int) -> Bool {
        if remotes[remote].failedOver != nil { return true }
        return remotes.allSatisfy { $0.failedOver == nil || $0.isAlone }
            && remotes[remote].machine?.record.committed == 0
            && remotes[remote].machine?.state == .open
    }

    private func settled() throws(SimulationFailure) {
        check()
        if let failure { throw failure }
    }
}
