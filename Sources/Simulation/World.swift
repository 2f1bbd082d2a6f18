// World.swift: two sites, hosts that write dependent data, a link, and faults, all in the order that a seed gives.
//
// The engine (`Volume`), the cycle and the drain are the production code. What stands in for the rest: reactors and
// their mailboxes (messages in order for each volume), the link (sends arrive and are acknowledged in any order), and what the
// actions of `Steps` do to files and volumes.

import Base
import Glibc
import Groups
import Volumes

/// What a step may do.
private enum Happening: CaseIterable {
    case host, primaryIO, secondaryIO, message, task, killPrimary, primaryPower, killSecondary, secondaryPower,
        linkLoss,
        partition, trouble, read, verify, sweep, writeBack

    /// Out of about ten thousand.
    var usualWeight: Int {
        switch self {
        case .host: 1500
        case .primaryIO: 3000
        case .secondaryIO: 2500
        case .message: 1200
        case .task: 1700
        case .killPrimary, .killSecondary: 5
        case .primaryPower: 3
        case .secondaryPower: 7
        case .linkLoss: 8
        case .partition: 2
        case .trouble: 4
        case .verify: 5
        case .sweep, .writeBack: 20
        case .read: 70
        }
    }

    var isFault: Bool {
        switch self {
        case .killPrimary, .primaryPower, .killSecondary, .secondaryPower, .linkLoss, .partition, .trouble: true
        default: false
        }
    }
}

extension Rarities {
    /// Of a weight that is not drawn.
    fileprivate func factor(of happening: Happening) -> Int? {
        switch happening {
        case .trouble where contains(.targetsFail): 5
        case .killSecondary where contains(.secondaryDies), .secondaryPower where contains(.secondaryDies): 10
        case .primaryIO where contains(.preservesAreSlow): 1
        case .secondaryIO where contains(.preservesAreSlow), .task where contains(.preservesAreSlow): 8
        default: contains(.rolesChange) && happening.isFault ? 0 : nil
        }
    }
}

package final class World: Scenario, ServesHosts {
    static let grain = SitesLayout.grain
    static let grains = SitesLayout.grains
    static let size = SitesLayout.size
    static let volumes = SitesLayout.volumes
    static let names = (0..<volumes).map { "\($0)" }
    static let regionBytes: UInt64 = 8192

    var random: SeededGenerator
    /// Each seed has its own mix: some disks are slow, some links bad, some hosts busy.
    private let weights: [Int]
    private let quietWeights: [Int]
    /// One of so many saves of a record fails; 0 = none.
    private let failingSaves: Int
    /// In some seeds of nothing: the newest point is kept all the same.
    let keep: Retention
    /// In some seeds a record that could not be saved is not tried again in time.
    let retriesSaves: Bool
    let mode: Mode
    /// Mode `global-mirror`: writes to what must still be sent, and how many grains' old images there is memory for.
    let collisions: CollisionRules
    let imageCount: Int
    /// Faults are over.
    private(set) var isQuiet = false
    let fault: DeliberateFault?
    var now: UInt64 = 0
    package private(set) var trace: [String] = []
    package private(set) var steps = 0
    package internal(set) var figures = SimulationFigures()

    private(set) var primary: SimulatedSite!
    private(set) var secondary: SimulatedSite!

    /// The link and everything else that takes time: run in any order.
    var tasks: [() -> Void] = []
    /// Nothing reaches the other site before this step.
    private var partitionedUntil = 0
    var isPartitioned: Bool { steps < partitionedUntil }
    /// In some seeds a commit may arrive when its link has long been closed.
    private let linkIsSlow: Bool
    private var late: [(step: Int, message: () -> Void)] = []
    /// Sites that lose power, or are killed, at a step: what the last process left is hardly used yet, or could not be saved.
    private var relapses: [(step: Int, site: SimulatedSite, powerLoss: Bool)] = []

    /// At the primary, but for the time of a change of roles.
    var hosts: Hosts
    var servedVolumes: [SimulatedVolume] { primary.volumes }
    private(set) var hostsAreServed = true
    /// Hosts may have written since the primary was last in a session.
    private(set) var wroteAlone = false
    /// The end of each volume, which hosts leave as the first primary had it.
    private var still: [ArraySlice<UInt8>] = []
    var remembered: [UInt64: [[UInt8]]] = [:]
    private var failure: SimulationFailure?

    package init(seed: UInt64, fault: DeliberateFault? = nil) {
        var generator = SeededGenerator(seed: seed)
        let often = fault?.showsWhere ?? []
        weights = Happening.allCases.map { happening in
            let factors = happening.isFault ? [0, 1, 2, 5] : [1, 2, 4, 8]
            let drawn = factors[generator.below(4)]
            return happening.usualWeight * (often.factor(of: happening) ?? drawn)
        }
        quietWeights = Happening.allCases.map { $0.isFault ? 0 : $0.usualWeight }
        let failingSaves = [0, 40, 12, 5][generator.below(4)]
        self.failingSaves = often.contains(.savesFail) ? 5 : failingSaves
        retriesSaves = generator.chance(50) && !often.contains(.savesFail)
        // This, and the third mode, are not drawn, so that the other seeds stay what they were.
        linkIsSlow = seed % 4 == 3 || often.contains(.linkIsSlow)
        keep = Retention(last: [0, 1, 2, 4, 4, 4][generator.below(6)])
        let drawn: Mode = [.flashcopy, .globalMirror][generator.below(2)]
        let mode = seed % 3 == 2 && fault?.isOfOtherModes != true ? .changeVolume : drawn
        self.mode = often.isDisjoint(with: [.targetsFail, .preservesAreSlow]) ? mode : .flashcopy
        collisions = CollisionRules(
            sendsFirst: generator.chance(50),
            longestWait: [10_000_000_000, 50_000_000_000, 200_000_000_000][generator.below(3)])
        imageCount = [2, 8, 32][generator.below(3)]
        random = generator
        self.fault = fault
        hosts = Hosts(chains: SitesLayout.chains)
        primary = SimulatedSite(self, "east", .primary)
        secondary = SimulatedSite(self, "west", .secondary)
        still = primary.files.map { $0.cached.suffix(Hosts.stillGrains * Self.grain) }
        secondary.start()
        primary.start()
    }

    deinit {
        for site in [primary!, secondary!] {
            for volume in site.volumes { volume.crash(&random) }
            site.volumes = []
        }
    }

    func note(_ text: @autoclosure () -> String) {
        trace.append("\(steps): \(text())")
        if trace.count > 400 { trace.removeFirst(200) }
    }

    func saveFails() -> Bool { failingSaves > 0 && !isQuiet && random.below(failingSaves) == 0 }
    /// How many steps a disk that takes no record goes on with that. Somebody may restart the site because of it.
    func recordWasNotSaved(_ site: SimulatedSite) -> Int {
        guard failingSaves > 0 else { return 0 }
        if random.chance(mustChangeRoles ? 80 : 30), site === primary {
            relapses.append((steps + random.below(600), site, random.chance(50)))
        }
        if random.chance(30), site === secondary, hostsAreServed {
            // The primary forgets which point it was, and sends another.
            relapses.append((steps + random.below(300), primary, true))
            relapses.append((steps + 300 + random.below(1500), secondary, random.chance(50)))
        }
        return random.chance(40) ? random.below(3000) : 0
    }

    func fail(_ text: String) { failure = SimulationFailure(text) }

    // MARK: Crashes and roles

    private func crash(_ site: SimulatedSite, powerLoss: Bool) {
        let isReceiving =
            site === secondary && hostsAreServed && site.record.role == .secondary && site.record.yielded == nil
        if isReceiving, random.chance(4) {
            site.exchangeVolumes()
            remembered = [:]
        } else if isReceiving, random.chance(4) {
            site.loseFilesOfPoint()
        } else {
            site.restart(powerLoss: powerLoss)
        }
        if random.chance(40) { relapses.append((steps + random.below([20, 300, 1500][random.below(3)]), site, true)) }
    }

    /// Hosts find out what is there.
    func siteWasLost(_ site: SimulatedSite, powerLoss: Bool) {
        if site === primary {
            if hostsAreServed { hosts.lostServer(site.files.map(\.cached), powerLoss: powerLoss) }
        } else {
            primary.replicator.loseLink()
        }
    }

    /// The primary is gone for good, or comes back later: what its hosts had under way is nobody's.
    func shutHostsOut() { (hosts.stopped, hostsAreServed) = (true, false) }

    /// What hosts write from now on is no secret to the other site.
    func sitesHaveMet() { wroteAlone = false }

    /// The site that was failed over to is the primary, and the other its secondary, or about to be.
    func exchangeSites() { swap(&primary, &secondary) }

    /// Hosts begin anew at the primary.
    func admitHosts() {
        remembered = [:]
        hosts = Hosts(chains: SitesLayout.chains, era: hosts.era + 1)
        hostsAreServed = true
    }

    // MARK: Running

    /// A step whose course follows from its number, and what is there, alone.
    func step(_ index: Int, of seed: UInt64) throws(SimulationFailure) {
        steps = index
        random = SeededGenerator(seed: seed &+ UInt64(index) &* 0x9E37_79B9)
        try step(faults: true)
    }

    func step(faults: Bool) throws(SimulationFailure) {
        steps += 1
        figures.steps += 1
        isQuiet = !faults
        now += UInt64(random.below(20_000_000))
        primary.replicator.tick()
        secondary.replicator.tick()
        if let index = late.firstIndex(where: { steps >= $0.step }) { late.remove(at: index).message() }
        if faults, let index = relapses.firstIndex(where: { steps >= $0.step }) {
            let next = relapses.remove(at: index)
            next.site.restart(powerLoss: next.powerLoss)
        }
        switch random.one(of: Happening.allCases, weights: faults ? weights : quietWeights) {
        case .host:
            figures.operations += 1
            guard hostsAreServed, primary.servesHosts else { break }
            if case .offline = primary.group.cycle?.state, !primary.group.isUnsaved { wroteAlone = true }
            hosts.act(self)
        case .primaryIO: primary.volumes[random.below(Self.volumes)].step(&random)
        case .secondaryIO: secondary.volumes[random.below(Self.volumes)].step(&random)
        case .message: takeMessage()
        case .task: takeTask()
        case .killPrimary: crash(primary, powerLoss: false)
        case .primaryPower: crash(primary, powerLoss: true)
        case .killSecondary: crash(secondary, powerLoss: false)
        case .secondaryPower: crash(secondary, powerLoss: true)
        case .linkLoss: primary.replicator.loseLink()
        case .partition:
            partitionedUntil = steps + random.below(800)
            primary.replicator.loseLink()
        case .trouble: makeTrouble()
        case .read:
            readPoint()
            primary.intermediates.check()
        case .verify:
            primary.comparisons.verify()
            primary.intermediates.check()
        case .sweep:
            for volume in primary.volumes {
                volume.volume.sweepActivity()
                volume.pump()
            }
        case .writeBack:
            primary.writeBack()
            secondary.writeBack()
        }
        primary.collectEvents()
        secondary.collectEvents()
        checkServices()
        if let failure { throw failure }
    }

    /// Whatever has failed, what the record says goes on.
    private func checkServices() {
        for site in [primary!, secondary!] where site.isUp && !site.executor.isBusy && !site.isAdmitting {
            if site.servesHosts != site.mayServeHosts {
                fail(
                    "\(site.name) is \(site.record.phase.kind), and \(site.servesHosts ? "serves" : "shuts out") hosts")
            }
            if site.record.isMirroring, site.group.cycle == nil { fail("\(site.name) does not mirror any more") }
        }
    }

    private func takeMessage() {
        let site = random.chance(90) ? primary! : secondary!
        let index = random.below(Self.volumes)
        site.replicator.takeMessage(index)
    }

    private func takeTask() {
        let site = random.chance(50) ? primary! : secondary!
        if !site.executor.steps.isEmpty, random.chance(50) { return site.executor.steps.removeFirst()() }
        if !tasks.isEmpty { arrive() }
    }

    /// One of the things that are on their way.
    func arrive() { tasks.remove(at: random.below(tasks.count))() }

    /// Leaves a message on the link.
    ///
    /// - Returns: whether it stays there for so long that others may have been closed and opened.
    func send(_ message: @escaping () -> Void) -> Bool {
        guard linkIsSlow, !isQuiet, random.chance(30) else {
            tasks.append(message)
            return false
        }
        late.append((steps + random.below(random.chance(50) ? 300 : 3000), message))
        return true
    }

    /// A target that is full or fails, a sector that cannot be read: for a while.
    private func makeTrouble() {
        switch random.below(5) {
        case 0: primary.targets[random.below(Self.volumes)].spaceLeft = random.below(40)
        case 1:
            primary.files[random.below(Self.volumes)].latent.insert(
                random.below(Self.size / SimulatedFile.sector))
        case 2:
            let copies = secondary.copies[random.below(Self.volumes)]
            if let id = copies.keys.sorted().last { copies[id]!.0.spaceLeft = random.below(20) }
        // Points of its own would fail with it.
        case 3 where hostsAreServed && primary.copies.allSatisfy(\.isEmpty):
            primary.failState()
            relapses.append((steps + random.below([100, 600, 3000][random.below(3)]), primary, true))
        default: endTrouble()
        }
    }

    func endTrouble() {
        partitionedUntil = isQuiet ? 0 : partitionedUntil
        primary.endTrouble()
        secondary.endTrouble()
    }

    /// Reads one recovery point of both volumes in full, while everything goes on.
    private func readPoint() {
        guard let point = secondary.points.randomElement(using: &random) else { return }
        let process = secondary.volumes
        var images: [[UInt8]?] = [nil, nil]
        for index in 0..<Self.volumes {
            let id = CopyID(secondary.carrier(of: point, index))
            guard process[index].volume.retainCopy(id) else { return }
            _ = process[index].submit(.read, view: .copy(id), offset: 0, length: Self.size) {
                [unowned self] request in
                process[index].volume.releaseCopy(id)
                guard request.error == 0 else { return }
                images[index] = Array(UnsafeRawBufferPointer(start: request.buffer, count: Self.size))
                if let first = images[0], let second = images[1] { check(point, [first, second]) }
            }
        }
    }

    private func check(_ point: UInt64, _ images: [[UInt8]]) {
        figures.checks += 1
        if let before = remembered[point], !zip(before, images).allSatisfy({ isSame($0, $1) }) {
            failure = SimulationFailure("point \(point) has changed since it was read before")
            return
        }
        if secondary.points.contains(point) { remembered[point] = images }
        for index in 0..<Self.volumes where images[index].suffix(still[index].count) != still[index] {
            failure = SimulationFailure("point \(point) lacks what was there at first in volume \(index)")
            return
        }
        // What a primary had when it was lost, or gave up its role, is no cut of what its hosts had written: perhaps after power loss.
        let isBase = secondary.record.points.contains { $0.number == point && $0.isBase == true }
        if hostsAreServed, !isBase, let problem = hosts.brokenCut(images) {
            failure = SimulationFailure("point \(point) is no closed cut: \(problem)")
        }
    }

    /// No more faults: hosts stop, everything under way ends, a last point holds all that was acknowledged.
    func settle() throws(SimulationFailure) {
        hosts.stopped = true
        (isQuiet, partitionedUntil) = (true, 0)
        endTrouble()
        let deadline = steps + 200_000
        while hostsAreServed, !hosts.isIdle(self) {
            try step(faults: false)
            guard steps < deadline else { throw SimulationFailure("hosts wait for ever") }
        }
        let wanted = primary.group.nextNumber + 1
        while secondary.points.last ?? 0 < wanted {
            try step(faults: false)
            guard steps < deadline else {
                throw SimulationFailure(
                    "no point is committed any more: \(primary.group.shownState) \(primary.group.cycle?.suspension ?? "")\(stuckState)"
                )
            }
        }
        let last = secondary.points.last!
        while !secondary.chainsAreWhole { try step(faults: false) }
        try compareSites(last)
        primary.intermediates.check()
        if let failure { throw failure }
    }

    private var stuckState: String {
        let volumes = primary.volumes.map {
            "point \($0.volume.heldPoint ?? 0) oos \($0.volume.outOfSyncGrains) ready \($0.volume.mayFormPoint) requests \($0.volume.requestsInUse) io \($0.pending.count)"
        }
        let state = primary.group.cycle.map { "\($0.state)" } ?? "no cycle"
        return
            " \(state), primary \(volumes), secondary \(secondary.volumes.map(\.volume.modifyingInFlight)), tasks \(tasks.count)"
    }

    private func compareSites(_ point: UInt64) throws(SimulationFailure) {
        var images: [[UInt8]?] = Array(repeating: nil, count: Self.volumes)
        for index in 0..<Self.volumes {
            var submitted = false
            while images[index] == nil {
                if !submitted {
                    submitted = secondary.volumes[index].submit(
                        .read, view: .copy(CopyID(secondary.carrier(of: point, index))), offset: 0, length: Self.size
                    ) {
                        request in
                        images[index] = Array(UnsafeRawBufferPointer(start: request.buffer, count: Self.size))
                    }
                }
                secondary.volumes[index].step(&random)
            }
            guard images[index]! == primary.files[index].cached else {
                let grain = (0..<Self.grains).first {
                    images[index]![$0 * Self.grain..<($0 + 1) * Self.grain]
                        != primary.files[index].cached[$0 * Self.grain..<($0 + 1) * Self.grain]
                }!
                throw SimulationFailure("grain \(grain) of volume \(index) differs at the end: a change was forgotten")
            }
        }
    }
}

/// As `==`, a word at a time.
func isSame(_ one: [UInt8], _ other: [UInt8]) -> Bool {
    one.count == other.count
        && one.withUnsafeBytes { a in other.withUnsafeBytes { memcmp(a.baseAddress!, $0.baseAddress!, a.count) == 0 } }
}
