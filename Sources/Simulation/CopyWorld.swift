// CopyWorld.swift: a site's volumes with their FlashCopies: hosts that write to volumes and to copies, an operator who takes, clones,
// refreshes, restores and withdraws copies of one volume or of several, full and failing targets, unreadable sectors, saves that fail,
// crashes and power loss.
//
// The engine is the production code, and so are the operations (`FlashCopies`): `CopyWorldSteps.swift` carries their actions out.
//
// Must hold: a host write to a volume succeeds; every copy that says that it is active reads as its moment, with what was written to it
// since; copies that were taken together are all there, or none is; volumes that are restored together are so all of them, or none; the
// target of a finished background copy is that image by itself; a grain in which the volume differs from a copy counts as changed; after
// power loss every grain that changed since the last flush of the bitmaps is in them or in the activity log.

import Base
import FlashCopies
import Volumes

package final class CopyWorld: Scenario {
    var random: SeededGenerator
    private let weights: [Int]
    let fault: DeliberateFault?
    package private(set) var trace: [String] = []
    package private(set) var steps = 0
    package private(set) var figures = SimulationFigures()
    private var failure: SimulationFailure?

    private(set) var volumes: [CopiedVolume] = []
    /// One save in so many fails; 0 = none.
    private let failingSaves: Int
    /// Of a hundred copies so many have a background copy, or can be written to.
    let (filled, writable): (Int, Int)
    /// The disk under everything but the volumes takes nothing any more.
    private(set) var stateFails = false

    // The process.
    /// The next step of each operation that is under way, and what waits beside it.
    var tasks: [() -> Void] = []
    /// Where hosts and readers are at work for a while; the rest is idle, and leaves the activity log.
    private(set) var busy = 0..<CopiedVolume.sectors
    /// An operator's command is under way: the next one waits.
    var operating = false
    /// Power is lost at this step, soon after a restart: what the last process left is hardly used yet.
    private var relapse: Int?

    // What must be there.
    private var nextValue: UInt32 = 1
    private(set) var troubled = false
    /// How often each operation of one volume or of several has ended, well or not: "TakeCopies 2 failed".
    package internal(set) var happened: [String: Int] = [:]
    /// Sets of which the operator has withdrawn one alone.
    var partedSets: Set<String> = []
    /// When something has just been settled that the next moments may show to be unsettled.
    func losePowerSoon() { if relapse == nil, random.chance(8) { relapse = steps + random.below(300) } }
    /// A sector to tell about in the trace (the simulate command's WATCH).
    // Safe because: set once, before the first run.
    package nonisolated(unsafe) static var watching: Int?

    private enum Happening: CaseIterable {
        case write, read, io, task, operate, kill, powerLoss, trouble, sweep, mirror, writeBack
        var weight: Int {
            switch self {
            case .write: 1500
            case .read: 700
            case .io: 6000
            case .task: 1500
            case .operate: 180
            case .kill: 12
            case .powerLoss: 8
            case .trouble: 10
            case .sweep, .writeBack: 40
            case .mirror: 15
            }
        }
        var varies: [Int] { [.kill, .powerLoss, .trouble].contains(self) ? [0, 1, 3] : [1, 2, 4] }
    }

    package init(seed: UInt64, fault: DeliberateFault? = nil) {
        var generator = SeededGenerator(seed: seed ^ 0xC0FFEE)
        weights = Happening.allCases.map { $0.weight * $0.varies[generator.below(3)] }
        failingSaves = [0, 20, 6, 3][generator.below(4)]
        (filled, writable) = ([15, 40, 90][generator.below(3)], [0, 30, 60][generator.below(3)])
        // Seldom enough memory for every job at once.
        let copyBytes = generator.chance(50) ? 1 << 20 : 1 << 16
        let count = generator.chance(40) ? 1 : 2
        random = generator
        self.fault = fault
        volumes = (0..<count).map { CopiedVolume(self, $0, copyBytes: copyBytes) }
        start()
    }

    deinit { for volume in volumes { volume.process.crash(&random) } }

    func note(_ text: @autoclosure () -> String) {
        trace.append("\(steps): \(text())")
        if trace.count > 400 { trace.removeFirst(200) }
    }

    func fail(_ text: String) { if failure == nil { failure = SimulationFailure(text) } }
    var hasFailed: Bool { failure != nil }
    func checked() { figures.checks += 1 }

    func takeValue() -> UInt32 {
        nextValue += 1
        return nextValue
    }

    enum SaveOutcome { case saved, failed, reachedAllTheSame }

    func outcomeOfSave() -> SaveOutcome {
        if stateFails { return .failed }
        guard failingSaves > 0, random.below(failingSaves) == 0 else { return .saved }
        return random.chance(50) ? .reachedAllTheSame : .failed
    }

    // MARK: Starting

    /// A start may end between any two of its steps, by a kill, a save that fails, or power loss; the next one finds what it has left.
    ///
    /// - Returns: whether power was lost.
    @discardableResult
    private func start() -> Bool {
        var powerLoss = false
        while !tryStart(endingAt: random.chance(20) ? random.below(12) : nil), !hasFailed {
            note("the start ends in the middle")
            for volume in volumes where volume.process != nil { volume.process.crash(&random) }
            if random.chance(40) {
                for volume in volumes { volume.losePower() }
                powerLoss = true
            }
        }
        return powerLoss
    }

    /// - Returns: whether it came to its end.
    private func tryStart(endingAt last: Int?) -> Bool {
        var step = 0
        func goesOn() -> Bool {
            step += 1
            return step != last
        }
        (tasks, operating) = ([], false)
        for volume in volumes { volume.makeProcess() }
        if fault != .halfSets {
            for (table, change) in CopyTable.completions(volumes.map(\.table), at: Double(steps)) {
                guard volumes[table].amend(change), goesOn() else { return false }
            }
        }
        for volume in volumes { guard volume.start(goesOn) else { return false } }
        return true
    }

    // MARK: Crashing

    private func crash(powerLoss: Bool) {
        note(powerLoss ? "power is lost" : "the process is killed")
        figures.crashes += 1
        for volume in volumes { volume.crash(powerLoss: powerLoss) }
        if powerLoss { setState(fails: false) }  // it comes back
        settleRestores()
        if !powerLoss { forEachImage { $0.processDied(at: steps) } }
        let lostPower = start() || powerLoss
        guard !hasFailed else { return }
        if lostPower { forEachImage { $0.powerLost(at: steps) } }
        for volume in volumes { volume.readEverything() }
        if lostPower {
            forEachImage { $0.settleDurable() }
            for volume in volumes { volume.checkRecording() }
        }
        checkSets()
        for volume in volumes where !hasFailed {
            do { try volume.compareChanges() } catch { fail("\(error)") }
        }
    }

    /// Once one of the volumes that were to be restored together says that it is decided, all are.
    private func settleRestores() {
        let decided = Set(volumes.compactMap(\.saved.restoring).filter(\.decided).compactMap(\.decision))
        var stands: Set<Bool> = []
        for volume in volumes {
            guard let before = volume.unrestored else { continue }
            volume.unrestored = nil
            let isDecided = volume.saved.restoring?.decision.map { decided.contains($0) } ?? false
            stands.insert(isDecided)
            if !isDecided { volume.contents = before }
        }
        if stands.count > 1 { fail("one volume is restored, and another is not") }
    }

    /// Copies that were taken together are all there, or none; what has been lost since is there as well, and says so.
    private func checkSets() {
        guard volumes.count > 1 else { return }
        for volume in volumes {
            for copy in volume.table.copies where copy.state == .active {
                guard let set = copy.set, !partedSets.contains(set), wasShared(set) else { continue }
                for other in volumes where other !== volume {
                    let theirs = other.table.copies.first { $0.set == set }
                    if theirs == nil || theirs?.state == .creating || theirs?.state == .withdrawing {
                        fail("volume \(volume.index) has its copy of a set, and volume \(other.index) has not")
                    }
                }
            }
        }
    }

    /// The set is of more than one volume.
    private func wasShared(_ set: String) -> Bool { set.hasSuffix("of \(volumes.count)") }

    private func forEachImage(_ change: (inout Contents) -> Void) {
        for volume in volumes { volume.forEachImage(change) }
    }

    private func setState(fails: Bool) {
        stateFails = fails
        for volume in volumes { volume.setState(fails: fails) }
    }

    // MARK: Running

    package func run(steps count: Int, skipping skipped: Set<Int>) throws(SimulationFailure) {
        let seed = random.next()
        for index in 0..<count where !skipped.contains(index) {
            random = SeededGenerator(seed: seed &+ UInt64(index) &* 0x9E37_79B9)
            try step(index)
        }
        random = SeededGenerator(seed: ~seed)
        try settle()
    }

    private func step(_ index: Int) throws(SimulationFailure) {
        steps = index + 1
        figures.steps += 1
        if let next = relapse, steps >= next {
            relapse = nil
            crash(powerLoss: true)
        }
        if random.below(400) == 0 {
            let start = random.below(CopiedVolume.sectors)
            busy = random.chance(40) ? 0..<CopiedVolume.sectors : start..<min(CopiedVolume.sectors, start + 20)
        }
        let happening = random.one(of: Happening.allCases, weights: weights)
        let volume = random.one(of: volumes)!
        switch happening {
        case .write:
            figures.operations += 1
            volume.write()
        case .read:
            figures.operations += 1
            volume.readSomething()
        case .io: volume.process.step(&random)
        case .task: runTask()
        case .operate: if !stateFails, !operating { operate() }
        case .kill, .powerLoss:
            crash(powerLoss: happening == .powerLoss || stateFails)
            if random.chance(25) { relapse = steps + random.below(random.chance(50) ? 20 : 400) }
        case .trouble: makeTrouble(volume)
        case .sweep:
            volume.volume.sweepActivity()
            volume.volume.advanceClock(to: UInt64(steps) * 1_000_000)
            volume.process.pump()
            _ = volume.settle()
        case .mirror: if !stateFails { volume.mirror() }
        case .writeBack: volume.writeBack()
        }
        takeEvents()
        if let failure { throw failure }
    }

    private func runTask() {
        guard !tasks.isEmpty else { return }
        tasks.remove(at: random.below(tasks.count))()
    }

    func takeEvents() {
        for volume in volumes {
            for event in volume.process.takeEvents() { take(event, volume) }
        }
    }

    private func take(_ event: VolumeEvent, _ volume: CopiedVolume) {
        switch event {
        case .copyFailed(let id, _):
            volume.note("copy \(id.label) fails")
            volume.acknowledge(.failed(id, reason: "old content could not be preserved"))
            if volume.table[id] == nil { leave(volume, id) }
            volume.readyTasks.removeValue(forKey: id)?()
        case .copyWithdrawn(let id): withdrawn(volume, id)
        case .copyReady(let id): volume.readyTasks.removeValue(forKey: id)?()
        case .copyCompleted(let id): complete(volume, id)
        case .restoreFinished:
            volume.note("the restore is finished")
            volume.acknowledge(.restoring(nil))
        case .restoreFailed: volume.hasStalled = true  // what cannot be restored stays as it is
        case .activityLogFailed:
            tasks.append { [unowned self] in
                if fault != .goOnUnwritten { volume.isDistrusted = true }
                volume.volume.distrustActivityLog()
                volume.process.pump()
            }
        case .failureUnwritten(let id, _):
            tasks.append { [unowned self] in
                if fault != .goOnUnwritten { volume.failedUnwritten.insert(id) }
                volume.volume.failureIsWritten()
                volume.process.pump()
            }
        default: break
        }
    }

    // MARK: Trouble

    private func makeTrouble(_ volume: CopiedVolume) {
        troubled = true
        let target = random.one(of: volume.targets.keys.sorted()).flatMap { volume.targets[$0] }
        switch random.below(5) {
        case 0: volume.source.latent.insert(random.below(CopiedVolume.sectors))
        case 1: target?.spaceLeft = random.below(30)
        case 2: target?.refusesWrites = random.chance(50)
        case 3:
            guard !operating, !volumes.contains(where: { $0.volume.isRestoring }) else { return }
            note("the state disk fails")
            setState(fails: true)
            relapse = steps + random.below([100, 600, 3000][random.below(3)])
        default: target?.latent.insert(random.below(CopiedVolume.sectors))
        }
    }

    // MARK: The end

    /// No more faults: everything under way ends, and every copy is compared with what it must hold.
    private func settle() throws(SimulationFailure) {
        setState(fails: false)
        for volume in volumes {
            for file in [volume.source] + volume.targets.values {
                file.latent = []
                file.spaceLeft = nil
                file.refusesWrites = false
            }
            for copy in volume.table.copies { volume.volume.setRate(copy.id, 0) }
        }
        var patience = 200_000
        while isBusy {
            runTask()
            for volume in volumes {
                volume.process.step(&random)
                _ = volume.settle()
            }
            takeEvents()
            patience -= 1
            if patience == 0 { throw SimulationFailure("something never ends: \(whatIsUnderWay)") }
            if let failure { throw failure }
        }
        if let waiting = volumes.first(where: { $0.volume.modifyingInFlight > 0 }) {
            throw SimulationFailure("a write waits for ever: \(waiting.volume.waiting)")
        }
        troubled = false
        steps += 1
        for volume in volumes { volume.readEverything() }
        if let failure { throw failure }
        for volume in volumes {
            try volume.compareTargets()
            try volume.compareChanges()
        }
        checkSets()
        if let failure { throw failure }
    }

    private var isBusy: Bool {
        !tasks.isEmpty || operating
            || volumes.contains { !$0.process.pending.isEmpty || $0.volume.backgroundDue || $0.isUnsaved }
    }

    private var whatIsUnderWay: String {
        "\(tasks.count) tasks, operating: \(operating)"
            + volumes.map {
                "; \($0.volume.waiting), \($0.process.pending.count) I/O, background due: \($0.volume.backgroundDue), unsaved: \($0.isUnsaved)"
            }.joined()
    }
}
