// SeveralHost.swift: a host of the scenario `SeveralHosts`: `Group` with a cycle of several, driven as `GroupThread` and `Replicator` drive it: by
// messages to the volumes' reactors, answers that carry the epoch in which they were asked for, and questions of a coordinator that wait.
//
// Must be prevented:
//   the model does otherwise than production does; whoever changes Sources/Link changes this file

import Groups

final class SeveralHost: SeveralSite {
    static let volumes = 2
    let index: Int
    let volumes = (0..<SeveralHost.volumes).map { _ in SeveralVolume() }

    // As `Replicator` has them.
    var epoch: UInt64 = 0
    private var firstEpoch: UInt64 = 0
    var link: SeveralLink?
    /// What the move has read.
    var slots: [Int: (grain: Int, content: Int)] = [:]
    private var isHolding = false
    private(set) var conversations: SeveralConversations?

    // As `GroupThread` has them.
    private struct Question {
        var message: HostMessage
        var until: UInt64
        var answer: (Stamped<HostAnswer>?) -> Void
    }
    private var questions: [Question] = []
    private static let questionPatience: UInt64 = 1_000_000_000
    /// What comes next has been made up, and cannot be.
    var hearsNonsense = false

    init(_ world: SeveralHosts, _ index: Int) {
        self.index = index
        super.init(world, "host \(index)", .primary)
    }

    // MARK: Processes

    func start() {
        guard begin() else { return }
        let process = life
        if record.mustGiveUpPoint(heldBy: volumes.map(\.keptPoint), world.mix.mode), !take(.pointGivenUp) {
            if process == life { crash(powerLoss: false) }
            return
        }
        for volume in volumes { volume.start(record.held?.number) }
        world.note("\(name) starts: forming \(record.forming ?? 0), held \(record.held?.number ?? 0)")
        epoch += 1
        firstEpoch = epoch
        let coordinates = index == 0
        if coordinates { conversations = SeveralConversations(self, record.coordination?.places ?? []) }
        begin(
            Cycle.Settings(
                mode: world.mix.mode, interval: world.mix.interval, volumes: volumes.count, window: 4,
                checkpointBytes: 2,
                part: .several(world.settings, index: index, coordinates ? .here : .elsewhere)))
    }

    func crash(powerLoss: Bool) {
        world.note("\(name) dies\(powerLoss ? ", with its power" : "")")
        world.figures.crashes += 1
        conversations?.end()
        (conversations, link, slots, isHolding, questions) = (nil, nil, [:], false, [])
        epoch += 1
        end()
        let isOnDisk = world.mix.mode.hold != .memory
        for volume in volumes {
            world.clients.lost(volume, &world.random)
            volume.die(keepsPoint: isOnDisk && !powerLoss)
            // After power loss more counts as changed than has.
            if powerLoss { volume.mark(world.random.below(SeveralVolume.grainCount)) }
        }
    }

    // MARK: Reactors

    private func post(_ volume: Int, _ body: @escaping (SeveralVolume) -> Void) {
        volumes[volume].mailbox.append { [unowned self] in body(volumes[volume]) }
    }

    /// As `onEvery`: the last one's answer is the answer of all.
    private func onEvery(_ body: @escaping (Int, SeveralVolume) -> Bool, done: @escaping (Bool) -> Void) {
        var (left, all) = (volumes.count, true)
        for index in volumes.indices {
            post(index) { volume in
                all = body(index, volume) && all
                left -= 1
                if left == 0 { done(all) }
            }
        }
    }

    /// Acknowledgements go by themselves.
    func endHold(_ volume: Int) {
        world.clients.acknowledged(volumes[volume], volumes[volume].expire())
    }

    /// What the thread hears of something that it has asked for.
    private func tell(_ event: Cycle.Event, _ asker: UInt64) {
        inbox.append { [unowned self] in self.event(event, asker) }
    }

    func event(_ event: Cycle.Event, _ asker: UInt64) {
        let isOfLink =
            switch event {
            case .held, .letGo: false
            default: true
            }
        if asker == 0 || (isOfLink ? asker == epoch : asker >= firstEpoch) { handle(event) }
    }

    // MARK: Actions

    override func perform(_ action: Cycle.Action) {
        switch action {
        case .openSession: openSession()
        case .closeLink: closeLink()
        case .prepare: prepare()
        case .form, .commit: world.fail("one of several hosts is to do \(action)")
        case .rewind:
            epoch += 1
            for index in volumes.indices { post(index) { $0.rewind() } }
        case .move(let action): perform(action)
        case .endPoint(let number):
            for index in volumes.indices {
                post(index) { [unowned self] in if let problem = $0.end(number) { world.fail(problem) } }
            }
        case .giveUp: giveUp()
        case .markAllChanged: markAll()
        case .survey:
            let asker = epoch
            survey { [unowned self] survey in
                inbox.append { [unowned self] in if asker == epoch { conversations?.survey(own: survey) } }
            }
        case .askHost(let host, let message): conversations?.ask(host: host, message)
        case .askRemote(let remote, let message): conversations?.ask(remote: remote, message)
        case .answer(let answer):
            world.count("a host says \(answer.body)")
            answered(answer)
        case .holdAndForm(let number): holdAndForm(number)
        case .letGo: letGo()
        // What an operator has chosen alone counts at that remote, and comes as a surprise.
        case .contradicted(let words):
            if !hearsNonsense, !world.isApart { world.fail("\(name) meets the impossible: \(words)") }
        }
    }

    private func prepare() {
        let asker = epoch
        onEvery {
            $1.mayFormPoint
        } done: { [unowned self] isWhole in
            guard isWhole else { return tell(.notReady, asker) }
            onEvery {
                !$1.isChanged
            } done: { [unowned self] isUnchanged in
                inbox.append { [unowned self] in if asker == epoch { handle(.prepared(changed: !isUnchanged)) } }
            }
        }
    }

    private func holdAndForm(_ number: UInt64) {
        isHolding = true
        let asker = epoch
        var changed: [Int] = []
        onEvery { [unowned self] index, volume in
            if fault != .holdNothing { volume.holdAcknowledgements(until: world.now + world.settings.maxCoordination) }
            if let problem = volume.form(number) { world.fail(problem) }
            if let problem = world.points.form(number, self.index, index, volume.contents) { world.fail(problem) }
            if !volume.outOfSync.isEmpty { changed.append(index) }
            return true
        } done: { [unowned self] _ in
            tell(.held(at: Double(world.now) / 1e9, changed: changed.sorted()), asker)
        }
    }

    private func letGo() {
        guard isHolding else { return }
        isHolding = false
        let asker = epoch
        onEvery { [unowned self] _, volume in
            guard fault != .holdNothing else { return true }
            let (writes, isIntact) = volume.release()
            world.clients.acknowledged(volume, writes)
            return isIntact
        } done: { [unowned self] isIntact in
            tell(.letGo(intact: isIntact || fault == .countExpiredHold), asker)
        }
    }

    private func giveUp() {
        epoch += 1
        let (asker, process) = (epoch, life)
        onEvery { [unowned self] _, volume in
            if volume.giveUp() {
                world.later { [unowned self] in if process == life { volume.endMerge() } }
            }
            return true
        } done: { [unowned self] _ in
            tell(.gaveUp, asker)
        }
    }

    private func markAll() {
        let asker = epoch
        onEvery { _, volume in
            volume.markAll()
            return true
        } done: { [unowned self] _ in
            inbox.append { [unowned self] in if asker == epoch { handle(.allMarked) } }
        }
    }

    /// A volume cannot hold its point any more.
    func losePoint(_ volume: Int) {
        post(volume) { [unowned self] lost in
            guard lost.hold != nil else { return }
            let process = life
            if lost.giveUp() { world.later { [unowned self] in if process == life { lost.endMerge() } } }
            tell(.pointLost("its target is full"), 0)
        }
    }

    // MARK: Draining

    private func perform(_ action: MoveAction) {
        switch action {
        case .read(let slot, let volume):
            guard let point = record.held?.number else { return }
            read(slot, volume, point)
        case .send(let slot, let volume, _, _, _): send(slot, volume)
        case .hurry: break
        case .flush(let volumes): flush(volumes)
        case .clear(let runs):
            guard let point = record.held?.number else { return }
            for run in runs {
                post(run.volume) { volume in for grain in run.grains { volume.clear(grain, point: point) } }
            }
        }
    }

    private func read(_ slot: Int, _ index: Int, _ point: UInt64) {
        let asker = epoch
        post(index) { [unowned self] volume in
            guard volume.hold?.point == point else {
                return tell(.pointLost("a volume does not hold it any more"), asker)
            }
            let found = volume.next(of: point)
            inbox.append { [unowned self] in
                guard asker == epoch else { return }
                slots[slot] = found
                handle(.move(.read(slot: slot, grains: found.map { $0.grain..<$0.grain + 1 }, offset: 0, length: 1)))
            }
        }
    }

    // MARK: Another site asks

    /// Its own coordinator asks, or another's.
    func survey(_ answer: @escaping (Survey) -> Void) {
        let highest = record.highestPoint
        var isChanged = false
        onEvery { _, volume in
            isChanged = isChanged || volume.isChanged
            return volume.mayFormPoint
        } done: { mayForm in
            answer(Survey(changed: isChanged, problem: mayForm ? nil : Cycle.busyVolume, highest: highest))
        }
    }

    func surveyed(_ answer: @escaping (Survey) -> Void) {
        inbox.append { [unowned self] in
            guard let cycle = group.cycle else { return }
            if let problem = cycle.problem {
                return answer(Survey(changed: false, problem: problem, highest: record.highestPoint))
            }
            // Its volumes are free once the next point's first message has come.
            if cycle.isAtPoint { return answer(Survey(changed: true, problem: nil, highest: record.highestPoint)) }
            survey(answer)
        }
    }

    func asked(_ message: HostMessage, waits: Bool, _ answer: @escaping (Stamped<HostAnswer>?) -> Void) {
        inbox.append { [unowned self] in
            guard let cycle = group.cycle else { return answer(nil) }
            let isDraining = cycle.isDraining(message.request.body.number)
            questions.append(Question(message: message, until: world.now + Self.questionPatience, answer: answer))
            if !waits || !isDraining { handle(.asked(message)) }
        }
    }

    private func answered(_ answer: Stamped<HostAnswer>) {
        let number = answer.body.number
        func isMeant(_ request: Stamped<HostRequest>) -> Bool {
            (request.epoch == answer.epoch || fault == .answerOtherEpochs)
                && (number == nil || number == request.body.number)
        }
        let meant = questions.filter { isMeant($0.message.request) }
        questions.removeAll { isMeant($0.message.request) }
        for question in meant {
            // What answers another is said in that one's name.
            let epoch = fault == .answerOtherEpochs ? question.message.request.epoch : answer.epoch
            question.answer(Stamped(epoch: epoch, answer.body))
        }
    }

    var parkedUntil: UInt64? { questions.first?.until }

    /// Who asks hears after a while that there is nothing new.
    func endParkedQuestions() {
        while let question = questions.first, question.until <= world.now {
            questions.removeFirst()
            let (number, epoch) = (question.message.request.body.number, question.message.request.epoch)
            question.answer(group.cycle?.isDraining(number) == true ? Stamped(epoch: epoch, .ran(number)) : nil)
        }
    }
}
