// SimulatedReplicator.swift: what the cycle asks for, as `Replicator` carries it out: messages to the volumes' reactors, which are taken in
// order for each volume, and a link on which everything arrives in any order.

import Groups
import Volumes

final class SimulatedReplicator: PartOfSite {
    unowned let site: SimulatedSite
    /// Of the volumes' reactors.
    private(set) var mailboxes: [[() -> Void]] = []
    /// Changes with every link, every drain and every process.
    private var epoch: UInt64 = 0
    private var events: [Cycle.Event] = []
    private var performing = false
    /// When the group must be told the time.
    private var wakeAt = UInt64.max
    /// Which slots' data is to be on stable storage when it is acknowledged.
    private var isFUA: [Int: Bool] = [:]
    /// The session that its connections belong to.
    private var linkSession: UInt64 = 0

    /// For old images, of the group's volumes; gone with the process.
    private var images: ImageMemory!
    private var imageMarks: [UnsafeMutableRawPointer] = []
    private var imageRegion: UnsafeMutableRawPointer? {
        willSet { imageRegion?.deallocate() }
    }

    private var preserved: [SimulatedBitmap] { site.preserved }
    private var targetFiles: [StoreFile] { site.targetFiles }

    init(_ site: SimulatedSite) { self.site = site }
    deinit {
        imageRegion?.deallocate()
        freeMarks()
    }

    private func freeMarks() { for marks in imageMarks { marks.deallocate() } }
    private static let markBytes = HoldPlace.markBytes(Geometry(size: UInt64(World.size), grain: World.grain)!)

    /// A process begins.
    func start() {
        mailboxes = Array(repeating: [], count: World.volumes)
        imageRegion = UnsafeMutableRawPointer.allocate(byteCount: world.imageCount * World.grain, alignment: 4096)
        freeMarks()
        imageMarks = (0..<World.volumes).map { _ in .allocate(byteCount: Self.markBytes, alignment: 8) }
        for marks in imageMarks { marks.initializeMemory(as: UInt8.self, repeating: 0, count: Self.markBytes) }
        images = ImageMemory(
            base: imageRegion!, byteCount: world.imageCount * World.grain, chunkBytes: 2 * World.grain)
    }

    /// It has ended.
    func die() { epoch += 1 }

    /// A reactor takes its next message.
    func takeMessage(_ index: Int) { if !mailboxes[index].isEmpty { mailboxes[index].removeFirst()() } }

    /// The group may have to be told the time earlier.
    func lookAtTheTime() { wakeAt = site.group.wakeAt ?? .max }

    func beginMirroring() {
        site.intermediates.use()
        events = []
        let turn = site.group.begin(
            Cycle.Settings(
                mode: world.mode, interval: .continuous, volumes: World.volumes, window: 4, checkpointBytes: 4),
            now: world.now)
        site.group.adapt(MovePace(limit: 1 + world.random.below(4), checkpointBytes: 4))
        performing = true
        site.save(turn, ofCycle: true)
        performing = false
        wakeAt = site.group.wakeAt ?? .max
    }

    func endMirroring() {
        epoch += 1
        site.group.end()
        // What follows is asked of the reactors as well, and comes behind what they have been asked.
        for index in mailboxes.indices { while !mailboxes[index].isEmpty { mailboxes[index].removeFirst()() } }
    }

    func event(_ event: Cycle.Event, _ sender: UInt64) {
        if sender == epoch || fault == .hearClosedLinks { handle(event) }
    }

    func handle(_ event: Cycle.Event) {
        events.append(event)
        guard !performing else { return }
        performing = true
        while !events.isEmpty { site.save(site.group.handle(events.removeFirst(), now: world.now), ofCycle: true) }
        performing = false
        wakeAt = site.group.wakeAt ?? .max
    }

    func tick() {
        if wakeAt <= world.now, site.group.cycle != nil || world.retriesSaves || world.isQuiet { handle(.tick) }
    }

    func loseLink() {
        let sender = epoch
        world.tasks.append { [unowned self] in event(.linkLost("the link broke"), sender) }
    }

    func perform(_ action: Cycle.Action) {
        switch action {
        case .openSession:
            epoch += 1
            openSession(epoch)
        case .closeLink:
            epoch += 1
            for index in 0..<World.volumes { post(index) { $0.volume.cannotSendFirst() } }
        case .prepare: prepare()
        case .form(let number): form(number)
        case .rewind:
            epoch += 1
            for index in 0..<World.volumes { post(index) { $0.volume.rewindDrain() } }
        case .move(let action): perform(action)
        case .commit(let number, let previous, _): commit(number, previous)
        case .endPoint(let number):
            for index in 0..<World.volumes { post(index) { $0.volume.endPoint(number: number) } }
        case .giveUp:
            epoch += 1
            let sender = epoch
            world.note("the point is given up")
            everyVolume({ $1.volume.giveUpPoint() }, then: { [unowned self] in event(.gaveUp, sender) })
        case .markAllChanged(let names): markAllChanged(names)
        case .survey, .askHost, .askRemote, .answer, .holdAndForm, .letGo, .contradicted:
            world.fail("the only host is asked as one of several")
        }
    }

    // MARK: The volumes

    /// Leaves a message for the volume's reactor.
    func post(_ index: Int, _ body: @escaping (SimulatedVolume) -> Void) {
        guard volumes.indices.contains(index) else { return }
        let process = volumes[index]
        mailboxes[index].append {
            body(process)
            process.pump()
        }
    }

    func everyVolume(_ body: @escaping (Int, SimulatedVolume) -> Void, then done: @escaping () -> Void) {
        var left = World.volumes
        for index in 0..<World.volumes {
            post(index) { volume in
                body(index, volume)
                left -= 1
                if left == 0 { done() }
            }
        }
    }

    private func markAllChanged(_ names: [String]?) {
        let sender = epoch
        let forgets = fault == .forgetFirstCopy
        everyVolume(
            { index, simulated in
                if !forgets, names?.contains("\(index)") != false { simulated.volume.markAllChanged() }
            },
            then: { [unowned self] in
                // The record relies on the marks, and outlives power loss.
                let failed = fault != .relyOnUnflushedMarks && recording.map({ $0.flush() }).contains { $0 != 0 }
                event(failed ? .linkLost("the marks cannot be flushed") : .allMarked, sender)
            })
    }

    private func prepare() {
        let sender = epoch
        if fault == .prepareWithoutBarrier { clearPreserved(Array(volumes.indices)) }
        var whole = true
        everyVolume({ [unowned self] _, simulated in
            if fault != .formOverLast, !simulated.volume.mayFormPoint { whole = false }
        }) { [unowned self] in
            if whole { return takePreserved(sender) }
            world.tasks.append { [unowned self] in event(.notReady, sender) }
        }
    }

    private func takePreserved(_ sender: UInt64) {
        var used: [Int] = []
        var changed = false
        everyVolume({ index, simulated in
            if simulated.volume.pointBitmapIsDirty { used.append(index) }
            if simulated.volume.changedGrains > 0 { changed = true }
        }) { [unowned self] in
            world.tasks.append { [unowned self] in
                guard sender == epoch else { return }
                if fault != .prepareWithoutBarrier { clearPreserved(used) }
                handle(.prepared(changed: changed))
            }
        }
    }

    private func clearPreserved(_ used: [Int]) {
        for index in used {
            preserved[index].bitmap(World.grains).clearAll()
            site.intermediates.forgetCommitted(index)
        }
    }

    private func form(_ number: UInt64) {
        let sender = epoch
        world.note("point \(number) forms")
        let early = fault == .releaseEarly
        site.comparisons.note(number)
        var changed: [Int] = []
        everyVolume(
            { [unowned self] index, simulated in
                simulated.volume.formPoint(number: number, in: place(index))
                if fault != .countLate, simulated.volume.outOfSyncGrains > 0 { changed.append(index) }
                if fault != .compareLater { site.comparisons.copy(index, simulated, at: number) }
                if early { simulated.volume.releaseHold() }
            },
            then: { [unowned self] in
                everyVolume(
                    { [unowned self] index, simulated in
                        if fault == .countLate, simulated.volume.outOfSyncGrains > 0 { changed.append(index) }
                        simulated.volume.releaseHold()
                        if fault == .compareLater { site.comparisons.copy(index, simulated, at: number) }
                    },
                    then: { [unowned self] in
                        world.tasks.append { [unowned self] in
                            event(.formed(at: Double(world.now), intact: true, changed: changed.sorted()), sender)
                        }
                    })
            })
    }

    private func place(_ index: Int) -> HoldPlace {
        switch world.mode.hold {
        case .target, .intermediate: .target(targetFiles[index], preserved: preserved[index].bitmap(World.grains))
        case .memory: .memory(images, world.collisions, marks: imageMarks[index])
        }
    }

    // MARK: Draining

    private func perform(_ action: MoveAction) {
        let sender = epoch
        switch action {
        case .read(let slot, let index):
            guard let point = record.held?.number else { return }
            post(index) { [unowned self] volume in drainRead(slot, index, volume, point, sender) }
        // The data follows at once; see drainRead.
        case .send(let slot, _, _, _, let urgent): isFUA[slot] = urgent && world.random.chance(70)
        case .hurry: break  // whatever waits arrives in any order
        case .flush(let volumes): flush(volumes, sender)
        case .clear(let runs):
            guard let point = record.held?.number else { return }
            for run in runs { post(run.volume) { $0.volume.clearOutOfSync(run.grains, point: point) } }
        }
    }

    private func drainRead(
        _ slot: Int, _ index: Int, _ volume: SimulatedVolume, _ point: UInt64, _ sender: UInt64
    ) {
        guard volume.volume.heldPoint == point, sender == epoch else { return }
        let limit = 1 + world.random.below(4)
        let urgent = volume.volume.nextUrgent(limit: limit)
        guard let grains = urgent ?? volume.volume.nextOutOfSync(limit: limit) else {
            world.tasks.append { [unowned self] in
                event(.move(.read(slot: slot, grains: nil, offset: 0, length: 0)), sender)
            }
            return
        }
        let range = volume.volume.geometry.byteRange(grains)
        let (offset, length) = (Int(range.lowerBound), Int(range.upperBound - range.lowerBound))
        let submitted = volume.submit(.read, view: .point, offset: offset, length: length, ofClient: false) {
            [unowned self] request in
            guard volume.volume.heldPoint == point else { return }
            guard request.error == 0 else {
                return world.tasks.append { [unowned self] in event(.pointLost("it cannot be read"), sender) }
            }
            let data = Array(UnsafeRawBufferPointer(start: request.buffer, count: length))
            world.tasks.append { [unowned self] in
                guard sender == epoch else { return }
                isFUA[slot] = false
                handle(
                    .move(
                        .read(slot: slot, grains: grains, offset: UInt64(offset), length: length, urgent: urgent != nil)
                    ))
                if fault == .clearEarly { post(index) { $0.volume.clearOutOfSync(grains, point: point) } }
                send(slot, index, offset, data, sender)
            }
        }
        if !submitted { world.fail("hosts have the slots of the drain") }
    }

    private func send(_ slot: Int, _ index: Int, _ offset: Int, _ data: [UInt8], _ sender: UInt64) {
        let (opened, peer, fua) = (linkSession, peer, isFUA[slot] == true)
        world.tasks.append { [unowned self] in
            // The session's end closes its connections: what has not arrived never does.
            guard peer.session == opened else { return event(.linkLost("the connection is closed"), sender) }
            let zero = !data.contains { $0 != 0 }
            let accepted = peer.volumes[index].submit(
                zero ? .writeZeroes : .write, offset: offset, length: data.count, data: zero ? nil : data, fua: fua
            ) { [unowned self] request in
                let failed = request.error != 0
                world.tasks.append { [unowned self] in
                    event(
                        failed
                            ? .linkLost("the peer failed")
                            : .move(.sent(slot: slot, wire: 1, durable: fua || fault == .countUnflushed)), sender)
                }
            }
            if !accepted { send(slot, index, offset, data, sender) }
        }
        if fault == .commitEarly { event(.move(.sent(slot: slot, wire: 1)), sender) }
    }

    private func flush(_ flushed: [Int], _ sender: UInt64) {
        let opened = linkSession
        if fault == .acknowledgeFlushEarly {
            world.tasks.append { [unowned self] in event(.move(.flushed), sender) }
            return
        }
        let flushesBoth = world.mode.hold == .intermediate && fault != .clearUnmirrored
        var left = flushed.count * (flushesBoth ? 2 : 1)
        let ended = { [unowned self] in
            left -= 1
            if left == 0 { world.tasks.append { [unowned self] in event(.move(.flushed), sender) } }
        }
        for index in flushed where flushesBoth { flushIntermediate(index, sender, done: ended) }
        for index in flushed {
            world.tasks.append { [unowned self] in flushOne(index, peer, opened, done: ended) }
        }
    }

    private func flushIntermediate(_ index: Int, _ sender: UInt64, done: @escaping () -> Void) {
        let process = life
        world.tasks.append { [unowned self] in
            guard process == life, site.isUp else { return }
            if site.intermediates.flush(index) { return done() }
            event(.pointLost("its change volume cannot be flushed"), sender)
        }
    }

    private func flushOne(_ index: Int, _ peer: SimulatedSite, _ opened: UInt64, done: @escaping () -> Void) {
        guard peer.session == opened else { return }
        if !peer.volumes[index].submit(.flush, offset: 0, length: 0, done: { _ in done() }) {
            world.tasks.append { [unowned self] in flushOne(index, peer, opened, done: done) }
        }
    }

    // MARK: The peer's control API

    private func openSession(_ sender: UInt64) {
        world.tasks.append { [unowned self] in
            guard sender == epoch else { return }
            let peer = peer
            guard !world.isPartitioned else { return loseSession(sender) }
            // The peer looks, or its record does.
            guard peer.record.role == .secondary || world.random.chance(50) else {
                return event(.sessionFailed("the peer is primary", retry: false), sender)
            }
            // Sessions, commits and failovers come one after the other.
            guard !peer.executor.isBusy else { return openSession(sender) }
            let asked = IntakeSession(
                site: site.name, generations: record.generations, session: world.random.next() | 1)
            peer.executor.onCrash.append { [unowned self] in loseSession(sender) }
            peer.executor.run(asked) { [unowned self] answer in
                guard case .success(let opened) = answer else { return loseSession(sender) }
                let state = PeerState(
                    session: opened, site: peer.name, lineage: peer.record.lineage ?? "",
                    volumeLineages: peer.record.volumeLineages, committed: peer.record.points.last)
                world.tasks.append { [unowned self] in
                    if sender == epoch {
                        linkSession = opened
                        world.sitesHaveMet()
                    }
                    event(.sessionOpened(state), sender)
                }
            }
        }
    }

    private func loseSession(_ sender: UInt64) {
        world.tasks.append { [unowned self] in event(.sessionFailed("the peer is gone", retry: true), sender) }
    }

    private func commit(_ number: UInt64, _ previous: UInt64?) {
        let (sender, opened, peer) = (epoch, linkSession, peer)
        let isLate = world.send { [unowned self] in
            let isIn = peer.session == opened || fault == .takeLateCommits
            guard isIn, !world.isPartitioned, !peer.executor.isBusy else { return loseLink() }
            if fault == .countUnheard { event(.committed(at: Double(world.now)), sender) }
            let asked = RemoteCommit(
                number: number, after: previous, formedAt: 0, keep: world.keep, session: opened)
            peer.executor.onCrash.append { [unowned self] in loseLink() }
            peer.executor.run(asked) { [unowned self] answer in
                switch answer {
                // The answer may be lost.
                case .success where world.random.chance(5): loseLink()
                case .success:
                    world.tasks.append { [unowned self] in event(.committed(at: Double(world.now)), sender) }
                case .failure(let refusal as TakeoverRefusal): world.fail("a commit is refused: \(refusal)")
                case .failure:
                    world.tasks.append { [unowned self] in event(.linkLost("the commit failed"), sender) }
                }
            }
        }
        // Nobody waits for an answer for so long.
        if isLate { loseLink() }
    }
}
