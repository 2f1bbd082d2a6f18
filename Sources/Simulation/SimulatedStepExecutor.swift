// SimulatedStepExecutor.swift: the actions of `Steps`, as a simulated site carries them out.
//
// Between any two of them, and while one waits, the process may be killed, power may be lost, and a save may fail.

import FlashCopies
import Groups
import Volumes

/// What carries a site's operations out, one at a time.
final class SimulatedStepExecutor: PartOfSite {
    unowned let site: SimulatedSite
    /// An operation is under way.
    private(set) var isBusy = false
    /// Its next step, and what waits beside it.
    var steps: [() -> Void] = []
    /// Who waits for an answer of this process, which has ended.
    var onCrash: [() -> Void] = []
    /// What the peer lacks is kept, of a try to give the role up; and its record may say that the role was.
    private var keepsUnsent = false
    private var mayHaveYielded = false

    private var name: String { site.name }
    private var points: [UInt64] { site.points }
    private var files: [SimulatedFile] { site.files }

    init(_ site: SimulatedSite) { self.site = site }

    /// The process has ended.
    func die() {
        (steps, isBusy) = ([], false)
        let waiting = onCrash
        onCrash = []
        for tell in waiting { tell() }
    }

    /// One action after the other; a kill ends it.
    func run<Operation: Steps>(
        _ steps: Operation, done: @escaping (Result<Operation.Outcome, any Error>) -> Void
    ) {
        if isBusy { world.fail("\(name) carries two operations out at a time") }
        isBusy = true
        goOn(steps, after: .begin, life, done)
    }

    func join(done: @escaping (Result<Void, any Error>) -> Void) {
        run(Join(record, peer.standing, identity: "\(world.random.next())"), done: done)
    }

    private func goOn<Operation: Steps>(
        _ operation: Operation, after answer: Answer, _ process: Int,
        _ done: @escaping (Result<Operation.Outcome, any Error>) -> Void
    ) {
        guard process == life else { return }
        var operation = operation
        switch operation.next(after: answer, record) {
        case .perform(let action):
            let taken = operation
            perform(action) { [unowned self] answer in
                steps.append { [unowned self] in goOn(taken, after: answer, process, done) }
            }
        case .done(let outcome): end(.success(outcome), done)
        case .failed(let error): end(.failure(error), done)
        }
    }

    private func end<Outcome>(
        _ result: Result<Outcome, any Error>, _ done: (Result<Outcome, any Error>) -> Void
    ) {
        isBusy = false
        done(result)
    }

    private func perform(_ action: SiteAction, _ done: @escaping (Answer) -> Void) {
        switch action {
        case .settle: done(answer(fault == .openUnsaved || site.save(site.group.settle())))
        case .change(let change):
            if case .yielded = change { mayHaveYielded = true }
            done(answer(decide(change)))
        case .fence(let next):
            site.session = next
            wait { [unowned self] in
                fault == .skipFencing || volumes.allSatisfy { $0.volume.modifyingInFlight == 0 }
            } then: {
                done(.done)
            }
        case .survey: done(.survey(survey))
        case .flushVolumes(let names):
            if fault != .skipFlushes { for name in names { files[Int(name)!].flush() } }
            done(.done)
        case .dropPointFiles, .meet, .quiet: done(.failed(UnexpectedAnswer(action, "one remote")))
        case .makePointFiles(let plan):
            site.order += CopyRecord.orderStep
            for index in 0..<World.volumes where plan.point.hasFiles(of: "\(index)") {
                site.copies[index][CopyID(plan.point.number)] = (
                    SimulatedFile(byteCount: World.size), SimulatedBitmap(bits: World.grains)
                )
            }
            done(.done)
        case .takePoint(let plan):
            for index in 0..<World.volumes where plan.point.hasFiles(of: "\(index)") {
                site.addPoint(plan.point.number, to: volumes[index], index, resume: false)
            }
            site.settleChains()
            done(.done)
        case .forgetChanges: onEngines(done) { $0.forgetChanges() }
        case .markDifferences(let point, _): done(.bytes(markDifferences(from: point)))
        case .dropDifferences: done(.done)
        case .open(let point, _):
            for index in 0..<World.volumes {
                site.startRestore(index, volumes[index], from: site.carrier(of: point, index))
                site.startLog(index, volumes[index])
            }
            site.servesHosts = true
            onEngines(done) { engine in
                engine.policy = .hostFirst
                engine.recording = true
            }
        case .stopMirroring:
            site.replicator.endMirroring()
            done(.done)
        case .startMirroring:
            if record.isMirroring, site.group.cycle == nil { site.replicator.beginMirroring() }
            done(.done)
        case .formPoint: formPoint(done)
        case .holdCopies:
            let isRestoring = record.failedOver?.restoring.isEmpty == false
            done(isRestoring ? .failed(Refusal("a volume is being restored", .passing)) : .done)
        case .countChanges: done(.bytes(site.changedBytes))
        case .askToPromote(let point): askToPromote(point, done)
        case .endPeersSessions: endPeersSessions(done)
        case .shutHostsOut:
            site.servesHosts = false
            if fault != .admitLate { site.isAdmitting = false }
            // What they had asked for is carried out.
            wait { [unowned self] in
                volumes.allSatisfy { $0.volume.modifyingInFlight == 0 }
            } then: {
                done(.done)
            }
        case .admitHosts:
            site.isAdmitting = true
            admitWhenSettled(life)
            done(.done)
        case .settleChanges: settleChanges(done)
        // FlashCopies are CopyWorld's.
        case .keepUnsent:
            (keepsUnsent, mayHaveYielded) = (true, false)
            done(world.random.chance(10) && !world.isQuiet ? .failed(Refusal("no space", .passing)) : .done)
        case .dropUnsent:
            keepsUnsent = false
            done(.done)
        case .serveAsSecondary:
            onEngines(done) { engine in
                engine.policy = .copiesFirst
                engine.recording = false
            }
        case .askToYield: askToYield(done)
        case .takeChanges: done(answer(takeChanges()))
        case .copyAtPoint: site.comparisons.copyAtPoint(done)
        case .pinPoint(let point): site.comparisons.pinPoint(point, done)
        case .comparePoint: site.comparisons.comparePoint(done)
        case .dropCopies: site.comparisons.dropCopies { done(.done) }
        case .unpinPoint: site.comparisons.unpinPoint(done)
        }
    }

    private func answer(_ ok: Bool) -> Answer { ok ? .done : .failed(SimulationFailure("it cannot be saved")) }

    private func onEngines(_ done: (Answer) -> Void, _ body: (Volume) -> Void) {
        for simulated in volumes {
            body(simulated.volume)
            simulated.pump()
        }
        done(.done)
    }

    /// Looks now and then until something is so.
    func wait(_ condition: @escaping () -> Bool, then done: @escaping () -> Void) {
        if condition() { return done() }
        let process = life
        steps.append { [unowned self] in if process == life { wait(condition, then: done) } }
    }

    private func decide(_ change: GroupChange) -> Bool {
        guard site.take(change) else {
            world.note("\(name) cannot record \(change.name)")
            return false
        }
        world.note("\(name) records \(change.name)")
        if case .committed(let plan) = change {
            world.figures.commits += 1
            world.figures.unchanged += World.volumes - (plan.point.changed?.count ?? World.volumes)
            for point in plan.dropped { world.remembered[point.number] = nil }
        }
        return true
    }

    // MARK: A secondary's

    private var survey: IntakeSurvey {
        let writes = volumes.reduce(0) { $0 + $1.volume.modifyingInFlight }
        let retired = (record.retired ?? []).map { point in
            (point.number, World.names.filter { site.copies[Int($0)!][CopyID(point.number)] != nil })
        }
        return IntakeSurvey(
            writesUnderWay: fault == .commitEarly ? 0 : writes, order: site.order,
            changed: World.names.filter { hasChanged(Int($0)!) },
            retired: Dictionary(uniqueKeysWithValues: retired), at: 0)
    }

    /// Since the newest point.
    private func hasChanged(_ index: Int) -> Bool {
        guard let carrier = points.last.flatMap({ record.carrier(of: $0, "\(index)") }) else { return true }
        return fault != .takeForUnchanged && !volumes[index].volume.isUnchanged(since: CopyID(carrier))
    }

    private func markDifferences(from point: UInt64) -> UInt64 {
        var bytes = 0
        for index in 0..<World.volumes {
            // A file of its own, made anew.
            site.restores[index] = SimulatedBitmap(bits: World.grains)
            let differences = site.restores[index].bitmap(World.grains)
            volumes[index].volume.markDifferences(from: CopyID(site.carrier(of: point, index)), in: differences)
            volumes[index].volume.markChanged(differences)
            if fault != .failOverUnmarked { site.restores[index].flush() }
            recording[index].flush()
            bytes += differences.population() * World.grain
        }
        return UInt64(bytes)
    }

    // MARK: A primary's

    /// As `StepExecutor.admitWhenSettled`, which does not wait either.
    private func admitWhenSettled(_ process: Int) {
        guard process == life, site.isAdmitting else { return }
        if !site.mayServeHosts { world.fail("\(name) is to serve hosts as \(record.phase.kind)") }
        guard site.save(site.group.settle()) || fault == .admitUnsettled else {
            return world.tasks.append { [unowned self] in admitWhenSettled(process) }
        }
        (site.servesHosts, site.isAdmitting) = (true, false)
    }

    private func settleChanges(_ done: @escaping (Answer) -> Void) {
        for simulated in volumes {
            simulated.volume.giveUpPoint()
            simulated.pump()
        }
        wait { [unowned self] in
            volumes.allSatisfy { $0.volume.mayFormPoint }
        } then: { [unowned self] in
            let errno = (recording.map { $0.flush() } + files.map { $0.flush() }).max() ?? 0
            done(answer(errno == 0))
        }
    }

    /// As `GroupHandle.cycle`, which fails at once when mirroring does not go on.
    private func formPoint(_ done: @escaping (Answer) -> Void) {
        let number = site.group.nextNumber
        guard site.group.cycle != nil else { return done(.failed(Refusal("it does not mirror"))) }
        site.replicator.handle(.request)
        wait { [unowned self] in
            site.group.cycle?.suspension != nil || record.lastCommitted?.number ?? 0 >= number
        } then: { [unowned self] in
            guard let point = record.lastCommitted, point.number >= number else {
                return done(.failed(Refusal("it is suspended", .passing)))
            }
            done(.point(point))
        }
    }

    /// Asks the peer something.
    ///
    /// - Parameter done: is given its answer, or that it did not come, once.
    func ask(
        _ done: @escaping (Answer) -> Void, _ body: @escaping (SimulatedSite, @escaping (Answer) -> Void) -> Void
    ) {
        let (process, peer) = (life, peer)
        var isAnswered = false
        let answered: (Answer) -> Void = { [unowned self] answer in
            guard !isAnswered else { return }
            isAnswered = true
            world.tasks.append { [unowned self] in if process == life { done(answer) } }
        }
        let lost = Answer.failed(
            fault == .takeBackUnheard ? PeerRefusal("no answer") : SimulationFailure("no answer"))
        world.tasks.append { [unowned self] in
            guard !world.isPartitioned, !peer.executor.isBusy, peer.isUp else { return answered(lost) }
            peer.executor.onCrash.append { answered(lost) }
            body(peer) { [unowned self] answer in answered(world.random.chance(10) ? lost : answer) }
        }
    }

    /// In a session that ends every earlier request of this kind.
    private func askToPromote(_ point: UInt64, _ done: @escaping (Answer) -> Void) {
        ask(done) { [unowned self] peer, answered in
            guard peer.record.role == .secondary else {
                return answered(peer.record.failedOver?.point == point ? .done : .failed(PeerRefusal("it is primary")))
            }
            peer.executor.run(
                IntakeSession(site: name, generations: record.generations, session: world.random.next() | 1)
            ) {
                [unowned self] session in
                guard case .success = session else { return answered(.failed(Refusal("no session", .passing))) }
                guard peer.points.last == point else { return answered(.failed(PeerRefusal("it is not the newest"))) }
                let takeover = Takeover(
                    point: point, volumes: (0..<World.volumes).map { "\($0)" }, generation: "\(world.random.next())",
                    at: 0, joins: true)
                peer.executor.run(Failover(takeover)) { outcome in
                    if case .success = outcome { return answered(.done) }
                    answered(.failed(Refusal("it could not", .passing)))
                }
            }
        }
    }

    private func endPeersSessions(_ done: @escaping (Answer) -> Void) {
        if fault == .takeBackUnheard { return done(.done) }
        ask(done) { [unowned self] peer, answered in
            guard peer.record.role == .secondary else { return answered(.failed(PeerRefusal("it is primary"))) }
            peer.executor.run(
                IntakeSession(site: name, generations: record.generations, session: world.random.next() | 1)
            ) {
                if case .success = $0 { answered(.done) } else { answered(.failed(Refusal("no session", .passing))) }
            }
        }
    }

    private func askToYield(_ done: @escaping (Answer) -> Void) {
        ask(done) { [unowned self] peer, answered in
            let lost = Answer.failed(SimulationFailure("refused"))
            if peer.record.role == .secondary {
                // Asked again: the answer was lost.
                guard let point = peer.record.points.first(where: { $0.number == peer.record.yielded }) else {
                    return answered(lost)
                }
                guard peer.take(.paired(site: name, generations: record.generations)) else { return answered(lost) }
                return answered(.yielded(peer.executor.joining(at: point)))
            }
            let asked = Yield(
                to: name, generations: record.generations, highestPoint: record.highestPoint,
                lineage: "after \(world.random.next())", volumes: (0..<World.volumes).map { "\($0)" },
                keep: world.keep, servesHosts: peer.servesHosts || peer.isAdmitting)
            peer.executor.run(asked) { [unowned self] outcome in
                guard case .success(let point) = outcome else {
                    if peer.executor.keepsUnsent, !peer.executor.mayHaveYielded {
                        world.fail("a try to give the role up leaves a FlashCopy")
                    }
                    return answered(lost)
                }
                answered(.yielded(peer.executor.joining(at: point)))
            }
        }
    }

    private func joining(at point: PointRecord) -> Joining {
        Joining(peer: name, lineage: record.lineage ?? "", volumeLineages: record.volumeLineages, point: point)
    }

    private func takeChanges() -> Bool {
        guard peer.volumes.count == World.volumes, !world.isPartitioned else { return false }
        for index in 0..<World.volumes where fault != .forgetPeersChanges {
            let words = peer.volumes[index].volume.changedWords(from: 0, count: 8)
            for grain in 0..<World.grains where words[grain >> 6] & (1 << UInt64(grain & 63)) != 0 {
                let start = UInt64(grain * World.grain)
                volumes[index].volume.markChanged([start..<start + UInt64(World.grain)])
            }
        }
        return (recording.map { $0.flush() }.max() ?? 0) == 0
    }
}
