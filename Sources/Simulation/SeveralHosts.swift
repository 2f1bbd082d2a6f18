// SeveralHosts.swift: a group of three hosts, each with a remote of its own, as the production puts it together: `Group` with a cycle of several
// (`CycleOfSeveral`) at the hosts, one of which coordinates, `RemotePart` at the remotes, and failovers as Sources/Site does them; among calls
// that are lost, late, repeated or not waited for, crashes and power loss of any process between any two actions, saves that fail, links
// that break, suspensions, volumes that are busy or lose their point, and operators who fail over at any moment.
//
// Must hold: a committed point reads everywhere as its hosts formed it, and is a dependency-closed cut over all of them; when it is committed
// first every remote has it, durably; remotes that fail over go to the same point, unless an operator has said `--alone`; no acknowledgement is held past the
// deadline; what differs between a host and its remote is marked; no machine meets what it calls impossible, or wants to be woken at full
// speed; what somebody makes up changes nothing; while a host is suspended points are not tried again and again; once faults end
// points are committed again, or all remotes fail over.

import Groups

package final class SeveralHosts: Scenario {
    static let members = 0..<3
    var random: SeededGenerator
    let fault: DeliberateFault?
    package internal(set) var trace: [String] = []
    package private(set) var steps = 0
    package internal(set) var figures = SimulationFigures()
    private var failure: SimulationFailure?
    /// How often something happened that a rule is about, so that a test sees that none is left out.
    package internal(set) var happened: [String: Int] = [:]

    let settings: Coordinator.Settings
    let mix: SeveralHostsMix
    var now: UInt64 = 1_000_000_000
    private(set) var hosts: [SeveralHost] = []
    private(set) var remotes: [SeveralRemote] = []
    /// What is under way, and arrives in any order.
    private var tasks: [(isSlow: Bool, body: () -> Void)] = []
    /// Sites that cannot reach each other, until then.
    private var cuts: [Set<String>: UInt64] = [:]
    /// No faults any more.
    private(set) var isQuiet = false

    // What must be there.
    var clients = SeveralClients()
    var points = SeveralPoints()
    /// An operator did not wait for the others: what remotes have counts for them alone.
    private(set) var isApart = false
    private(set) var isForgotten = false

    package init(seed: UInt64, fault: DeliberateFault? = nil) {
        var generator = SeededGenerator(seed: seed ^ 0x5E7E)
        settings = try! Coordinator.Settings(
            hosts: Self.members.count, remotes: Self.members.count,
            maxCoordination: [5_000_000, Coordinator.Settings.coordination, 200_000_000][generator.below(3)])
        mix = SeveralHostsMix(&generator)
        random = generator
        self.fault = fault
        hosts = Self.members.map { SeveralHost(self, $0) }
        remotes = Self.members.map { SeveralRemote(self, $0) }
        sites = hosts + remotes
        for site in sites { start(site) }
    }

    private var sites: [SeveralSite] = []

    func note(_ text: @autoclosure () -> String) {
        trace.append("\(steps), \(now / 1000) us: \(text())")
        if trace.count > 400 { trace.removeFirst(200) }
    }

    func fail(_ text: String) {
        note(text)
        if failure == nil { failure = SimulationFailure(text) }
    }

    /// Something that a rule is about, without the numbers.
    func count(_ text: String) { happened[text.filter { !$0.isNumber }, default: 0] += 1 }

    // MARK: Running

    package func run(steps count: Int, skipping skipped: Set<Int>) throws(SimulationFailure) {
        let seed = random.next()
        for index in 0..<count where !skipped.contains(index) {
            random = SeededGenerator(seed: seed &+ UInt64(index) &* 0x9E37_79B9)
            if remotes.allSatisfy({ $0.saved.failedOver != nil }) { break }
            try step(index)
        }
        random = SeededGenerator(seed: ~seed)
        if random.chance(20) { try outlastSilence() }
        try settle()
    }

    private func step(_ index: Int) throws(SimulationFailure) {
        steps = index + 1
        figures.steps += 1
        happen(random.one(of: SeveralHappening.allCases, weights: mix.weights))
        passTime(by: UInt64(random.below(1000) < mix.pausing ? random.below(1_000_000_000) : random.below(5_000)))
        if random.chance(50) { waitForNext() }
        figures.operations = clients.count
        check()
        if let failure { throw failure }
    }

    private func happen(_ happening: SeveralHappening) {
        let index = random.below(Self.members.count)
        switch happening {
        case .write: clients.write(hosts, &random)
        case .apply: clients.apply(hosts, &random)
        case .acknowledge: clients.acknowledge(hosts, &random)
        case .reactor: if let volume = random.one(of: busyReactors) { volume.mailbox.removeFirst()() }
        case .thread: if let site = random.one(of: sites.filter { !$0.inbox.isEmpty }) { site.inbox.removeFirst()() }
        case .arrive: arrive()
        case .tick: for site in sites { tick(site) }
        case .request: request(hosts[index])
        case .crash: crash(sites[random.below(sites.count)])
        case .restart: start(sites[random.below(sites.count)])
        case .cut:
            let pair = Set([sites[random.below(sites.count)].name, sites[random.below(sites.count)].name])
            cuts[pair] = now + UInt64(random.below(2_000_000_000))
        case .loseLink: hosts[index].inbox.append { [unowned self] in hosts[index].loseLink("the link broke") }
        case .losePoint: if hosts[index].isUp { hosts[index].losePoint(random.below(SeveralHost.volumes)) }
        case .busy:
            let volume = hosts[index].volumes[random.below(SeveralHost.volumes)]
            volume.isBusy = hosts[index].isUp
            tasks.append((true, { volume.isBusy = false }))
        case .suspend: tell(hosts[index], .suspend)
        case .resume: tell(hosts[index], .resume)
        case .nonsense: talkNonsense(to: hosts[index])
        case .failOver:
            // Where it matters most, more often.
            let undecided = random.one(of: remotes.filter { $0.isUp && $0.record.coordination?.prepared != nil })
            if undecided != nil || random.chance(6) { askToFailOver(undecided ?? remotes[index]) }
        case .loseDisk:
            guard remotes.allSatisfy({ $0.saved.failedOver == nil }) else { break }
            crash(remotes[index])
            count("a remote loses its disk")
            remotes[index].loseDisk()
        }
        clients.goOn(hosts)
    }

    private var busyReactors: [SeveralVolume] { hosts.flatMap(\.volumes).filter { !$0.mailbox.isEmpty } }

    /// Reactors keep to a hold's deadline; whoever else waits may be late.
    private func passTime(by amount: UInt64) {
        let end = now + amount
        while true {
            var due: (at: UInt64, host: Int, volume: Int)?
            for host in hosts {
                for (volume, held) in host.volumes.enumerated() {
                    if let at = held.deadline, at < due?.at ?? end { due = (at, host.index, volume) }
                }
            }
            guard let (at, host, volume) = due else { break }
            now = max(now, at)
            count("a hold expires")
            hosts[host].endHold(volume)
        }
        now = end
    }

    /// When nothing is under way, somebody waits for a time.
    private func waitForNext() {
        guard tasks.isEmpty, busyReactors.isEmpty, sites.allSatisfy(\.inbox.isEmpty) else { return }
        let times = sites.filter(\.isUp).compactMap(\.group.wakeAt) + hosts.compactMap(\.parkedUntil)
        guard let next = times.min(), next > now else { return }
        passTime(by: min(next - now, 40_000_000_000))
    }

    private func tick(_ site: SeveralSite) {
        guard site.isUp else { return }
        site.tick()
        (site as? SeveralHost)?.endParkedQuestions()
    }

    // MARK: Calls

    func later(_ body: @escaping () -> Void) {
        tasks.append((!isQuiet && random.chance(mix.slow), body))
    }

    /// Something that is under way.
    private func arrive() {
        guard !tasks.isEmpty else { return }
        let index = random.below(tasks.count)
        if tasks[index].isSlow, !isQuiet, !random.chance(3) { return }
        tasks.remove(at: index).body()
    }

    func reaches(_ one: SeveralSite, _ other: SeveralSite) -> Bool {
        isQuiet || cuts[[one.name, other.name]].map { $0 <= now } ?? true
    }

    private func isLost() -> Bool { !isQuiet && random.chance(mix.losing) }

    /// A call from one process to another.
    ///
    /// - Parameters:
    ///   - serve: at the other, if it arrives; perhaps once more.
    ///   - done: is given the answer, or that none has come, once, as long as the process that calls lives.
    func call<Answer>(
        _ caller: SeveralSite, _ other: SeveralSite, _ serve: @escaping (@escaping (Answer?) -> Void) -> Void,
        done: @escaping (Answer?) -> Void
    ) {
        let process = caller.life
        var isOver = false
        let finish: (Answer?) -> Void = { answer in
            guard !isOver, caller.life == process, caller.isUp else { return }
            isOver = true
            done(answer)
        }
        let lost: () -> Void = { [unowned self] in later { finish(nil) } }
        guard !isLost() else { return lost() }
        if !isQuiet, random.chance(mix.impatient) { lost() }
        for _ in 0...(!isQuiet && random.chance(mix.repeating) ? 1 : 0) {
            later { [unowned self] in
                guard other.isUp, reaches(caller, other) else { return lost() }
                let number = other.isAsked(lost)
                serve { [unowned self] answer in
                    guard other.answers(number) else { return }
                    guard reaches(caller, other), !isLost() else { return lost() }
                    later { finish(answer) }
                }
            }
        }
    }

    // MARK: What happens

    private func tell(_ host: SeveralHost, _ event: Cycle.Event) {
        if host.isUp { host.inbox.append { host.handle(event) } }
    }

    private func request(_ host: SeveralHost) {
        guard host.isUp else { return }
        tell(host, .request)
        guard host.index != 0 else { return }
        call(host, hosts[0]) { [unowned self] answer in
            tell(hosts[0], .request)
            answer(true)
        } done: { (_: Bool?) in
        }
    }

    func dies(_ site: SeveralSite) -> Bool {
        guard !isQuiet, mix.dying > 0, random.below(mix.dying) == 0 else { return false }
        crash(site)
        return true
    }

    /// A remote dies that knows of a failover to a point that somebody has named: it is known nowhere else, should that remote be out of reach.
    func forgetsFailover() { isForgotten = true }

    func saveFails() -> Bool { !isQuiet && mix.failingSaves > 0 && random.below(mix.failingSaves) == 0 }

    private func crash(_ site: SeveralSite) {
        guard site.isUp else { return }
        let powerLoss = random.chance(40)
        if let host = site as? SeveralHost { host.crash(powerLoss: powerLoss) }
        if let remote = site as? SeveralRemote { remote.crash(powerLoss: powerLoss) }
    }

    private func start(_ site: SeveralSite) {
        (site as? SeveralHost)?.start()
        (site as? SeveralRemote)?.start()
    }

    /// What no site of the group says.
    private func talkNonsense(to host: SeveralHost) {
        guard host.isUp else { return }
        host.inbox.append { [unowned self] in
            let (before, process) = (host.record, host.life)
            host.hearsNonsense = true
            host.handle(nonsense(host.record, coordinates: host.index == 0))
            guard process == host.life else { return }
            host.hearsNonsense = false
            if host.record != before { fail("\(host.name) believes what cannot be") }
        }
    }

    private func nonsense(_ record: GroupRecord, coordinates: Bool) -> Cycle.Event {
        let (epoch, next) = (record.coordination?.epoch ?? 0, record.lastNumber + 7)
        let asked: HostRequest =
            switch random.below(5) {
            case 0: .formAtOnce(record.lastNumber)
            case 1: .makeReady(PointRecord.highestNumber + next)
            case 2: .run(next)
            case 3: .form(next)
            default: .end(next)
            }
        guard coordinates, random.chance(50), let own = record.coordination?.coordinator else {
            return .asked(HostMessage(Stamped(epoch: epoch, asked)))
        }
        return random.chance(50)
            ? .host(1, Stamped(epoch: own.epoch, .ended(next)))
            : .remote(1, Stamped(epoch: own.epoch, .prepared(next)), at: nil)
    }

    private func askToFailOver(_ remote: SeveralRemote) {
        guard remote.isUp, !remote.isLeading else { return }
        if random.chance(mix.alone) {
            let choices = [remote.record.points.last?.number, remote.record.coordination?.prepared?.number]
            if let point = random.one(of: choices.compactMap { $0 }) {
                return failOver(remote, to: point, alone: true)
            }
        }
        // Operators who do not know of each other may want different points at once.
        for other in remotes where other === remote || random.chance(mix.naming) {
            later { [unowned self] in
                guard other.isUp, !other.isLeading else { return }
                let isNamed = random.chance(mix.naming)
                failOver(other, to: isNamed ? random.one(of: other.record.points.map(\.number)) : nil)
            }
        }
    }

    private func failOver(_ remote: SeveralRemote, to point: UInt64? = nil, alone: Bool = false) {
        note("\(remote.name) is to fail over\(alone ? " alone" : "")\(point.map { ", to \($0)" } ?? "")")
        if alone { isApart = true }
        remote.isLeading = true
        let process = remote.life
        remote.failOver(point: point, alone: alone) { [unowned self] problem in
            guard process == remote.life else { return }
            remote.isLeading = false
            count("a failover \(problem == nil ? "succeeds" : "is refused")")
            if let problem { note("\(remote.name) does not fail over: \(problem)") }
        }
    }

    // MARK: Checking

    /// A remote's record says that a point counts.
    func hasCommitted(_ number: UInt64, _ remote: SeveralRemote) {
        note("\(remote.name) commits point \(number)")
        figures.commits += 1
        guard !isApart else { return }
        if remote.read(number) != points.image(number, remote.index) { fail("\(remote.name) commits a half point") }
        if !remote.isFlushed { fail("a point is committed that is not flushed") }
        if let problem = points.brokenCut(number, hosts) { fail(problem) }
        for other in remotes where !other.has(number) {
            fail("\(remote.name) commits point \(number), which \(other.name) does not have")
        }
    }

    private func check() {
        let host = hosts[steps % hosts.count]
        checkDifferences(host, remotes[host.index])
        for host in hosts {
            for volume in host.volumes where volume.deadline.map({ $0 < now }) == true {
                fail("an acknowledgement is held past the deadline")
            }
            if let point = host.saved.lastCommitted?.number, !isApart {
                for remote in remotes where !remote.has(point) {
                    fail("\(host.name) calls point \(point) committed, which \(remote.name) does not have")
                }
            }
        }
        let remote = remotes[steps % remotes.count]
        if remote.isUp, steps % 8 == 0 { checkPoints(remote) }
        let points = remotes.compactMap(\.saved.failedOver?.point)
        if !isApart, points.contains(where: { $0 != points[0] }) {
            if isForgotten { isApart = true } else { fail("remotes fail over to different points") }
        }
    }

    private func checkDifferences(_ host: SeveralHost, _ remote: SeveralRemote) {
        guard let lineage = host.saved.lineage, lineage == remote.saved.lineage, remote.saved.failedOver == nil else {
            return
        }
        for (index, volume) in host.volumes.enumerated() {
            for grain in 0..<SeveralVolume.grainCount where !volume.isMarked(grain) {
                let content = volume.grains[grain].content
                if content != remote.contents[index][grain] || content != remote.flushed[index][grain] {
                    fail("a host and its remote differ, and nothing says so")
                }
            }
        }
    }

    private func checkPoints(_ remote: SeveralRemote) {
        guard !isApart else { return }
        for point in remote.record.points {
            figures.checks += 1
            if remote.read(point.number) != points.image(point.number, remote.index) {
                fail("\(remote.name) reads point \(point.number) otherwise than its host formed it")
            }
        }
    }

    // MARK: The end

    private func endFaults() {
        (isQuiet, cuts) = (true, [:])
        for host in hosts { for volume in host.volumes { volume.isBusy = false } }
    }

    /// One of the things that happen without faults.
    private func goOn(by amount: UInt64) throws(SimulationFailure) {
        let useful: [SeveralHappening] = [
            .apply, .acknowledge, .reactor, .reactor, .thread, .thread, .thread, .arrive, .arrive, .arrive, .tick,
        ]
        happen(useful[random.below(useful.count)])
        passTime(by: amount)
        check()
        if let failure { throw failure }
    }

    /// Somebody is silent, or suspended, for minutes, while all others are well: an undecided point is not held for that, nor are points tried
    /// again and again.
    private func outlastSilence() throws(SimulationFailure) {
        endFaults()
        defer { isQuiet = false }
        for site in sites { start(site) }
        for host in hosts { tell(host, .resume) }
        guard !isApart, remotes.allSatisfy({ $0.saved.failedOver == nil }) else { return }
        for _ in 0..<random.below(3000) { try goOn(by: 20_000) }
        let silent = sites[1 + random.below(sites.count - 1)]
        let isSuspended = silent is SeveralHost && random.chance(50)
        if let host = silent as? SeveralHost, isSuspended { tell(host, .suspend) } else { crash(silent) }
        try outlast(90_000_000_000)
        let tried = hosts[0].record.lastNumber
        try outlast(30_000_000_000)
        if silent is SeveralHost, hosts[0].record.lastNumber > tried + 1 {
            fail("points are tried again and again, although \(silent.name) is away")
        }
        let isDecided = hosts[0].record.coordination?.coordinator?.point == .commit
        // A host that died before its end was written down holds it until the next one.
        func isCommitted(_ number: UInt64) -> Bool {
            remotes.contains { $0.saved.points.contains { $0.number == number } }
        }
        for host in hosts
        where host !== silent && host.record.held.map({ !isCommitted($0.number) }) == true && !isDecided {
            fail("\(host.name) holds an undecided point for \(silent.name), which is away")
        }
        if let failure { throw failure }
    }

    private func outlast(_ time: UInt64) throws(SimulationFailure) {
        let end = now + time
        while now < end { try goOn(by: 20_000_000) }
    }

    private var newest: [UInt64] { remotes.map { $0.saved.points.last?.number ?? 0 } }

    /// No faults any more: points are committed everywhere, or all remotes fail over.
    private func settle() throws(SimulationFailure) {
        endFaults()
        // Whether the others find together again is the operator's affair; while none has failed over points go on.
        guard !isApart || remotes.allSatisfy({ $0.saved.failedOver == nil && !$0.isLeading }) else { return }
        for site in sites { start(site) }
        for host in hosts { tell(host, .resume) }
        let before = newest.max()!
        for turn in 0..<80_000 {
            let isFailover = remotes.contains { $0.saved.failedOver != nil }
            if isFailover ? remotes.allSatisfy(hasFailedOver) : newest.min()! > before { return }
            if isFailover, someCannotFollow { return }
            if turn % 200 == 0 {
                if isFailover {
                    for remote in remotes where remote.saved.failedOver == nil && !remote.isLeading { failOver(remote) }
                } else {
                    request(hosts[0])
                }
            }
            try goOn(by: 1_000)
            waitForNext()
        }
        let hosts = hosts.map { host in
            "\(host.name): \(host.group.cycle.map { "\($0.state)" } ?? "none"), \(host.group.cycle?.holdUp ?? "no hold-up")"
        }
        let isFailover = remotes.contains { $0.saved.failedOver != nil }
        note(hosts.joined(separator: "; "))
        note(remotes.map { "\($0.name): \($0.standing)" }.joined(separator: "; "))
        fail("without faults \(isFailover ? "not every remote fails over" : "no point is committed")")
        throw failure!
    }

    private func hasFailedOver(_ remote: SeveralRemote) -> Bool { remote.saved.failedOver != nil }

    /// What some have failed over to is lost with a disk: the others go there if the operator says so.
    private var someCannotFollow: Bool {
        let point = remotes.compactMap(\.saved.failedOver?.point).first ?? 0
        return remotes.contains { $0.saved.failedOver == nil && point <= $0.lostThrough }
    }
}
