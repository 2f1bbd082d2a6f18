// ReplicatorThread.swift: the loop of one group's thread: link, session, and what the cycle asks for.

import Base
import Glibc
import Groups
import NBDServer
import Ring
import Synchronization
import Volumes

final class ReplicatorThread {
    private let replicator: Replicator
    private let configuration: Replicator.Configuration
    private var cycle: Cycle
    /// Changes with every link and every drain; answers of earlier ones are dropped.
    private var epoch: UInt64 = 1
    private var events: [Cycle.Event] = []
    private var performing = false
    private var link: NBDLink?
    private var linkDeadline: UInt64 = 0
    /// The session that the link is being made for; nil once it is ready.
    private var peerState: PeerState?
    private var session: UInt64?
    private let sender: Sender
    private struct Waiter {
        var number: UInt64
        /// Done in the instant of the point; then only that very point will do.
        var alongside: Replicator.Alongside?
        var answer: @Sendable (Result<PointRecord, ReplicationRefusal>) -> Void
    }
    private var waiters: [Waiter] = []
    private var stopped: [@Sendable () -> Void] = []
    private var flushesLeft = 0
    private var lastFigures: UInt64 = 0
    private var bytesAtFigures: UInt64 = 0
    private var lastState = ""
    private static let connectSeconds: UInt64 = 10
    /// When the peer was asked for the commit that it has not answered; 0 = for none.
    private var commitAskedAt: UInt64 = 0
    private static let silenceNanoseconds: UInt64 = 2_000_000_000

    private var window: Int { configuration.settings.window }

    init(
        _ replicator: Replicator, _ configuration: Replicator.Configuration, _ record: GroupRecord
    ) {
        self.replicator = replicator
        self.configuration = configuration
        cycle = Cycle(record: record, settings: configuration.settings)
        sender = Sender(configuration, replicator.mailbox)
    }

    func run() {
        performing = true
        perform(cycle.start(now: monotonicNanoseconds()))
        performing = false
        handle(.tick)
        while stopped.isEmpty {
            publish()
            wait()
            takeMessages()
            serviceLink()
            if let link, peerState == nil, !sender.pump(link) {
                handle(.linkLost("\(LinkConnection.failure("send"))"))
            }
            if let wakeAt = cycle.wakeAt, monotonicNanoseconds() >= wakeAt { handle(.tick) }
        }
        link = nil
        publish()  // whoever asked for the end takes the record over
        replicator.end()
        takeMessages()
        for waiter in waiters { waiter.answer(.failure(.ended)) }
        for answer in stopped { answer() }
    }

    // MARK: Waiting

    private func wait() {
        var entries = [
            pollfd(fd: replicator.mailbox.eventDescriptor, events: Int16(POLLIN), revents: 0)
        ]
        if let link { entries += link.pollEntries() }
        var milliseconds = 1000
        if let wakeAt = cycle.wakeAt {
            let now = monotonicNanoseconds()
            milliseconds = wakeAt <= now ? 0 : Int(min(1000, (wakeAt - now) / 1_000_000 + 1))
        }
        if link != nil, let wait = sender.wait {
            milliseconds = min(milliseconds, Int(min(1000, wait / 1_000_000 + 1)))
        }
        let count = poll(&entries, nfds_t(entries.count), Int32(milliseconds))
        if count > 0, let link { link.notify(entries[1...]) }
    }

    private func takeMessages() {
        for message in replicator.mailbox.drain() {
            switch message {
            // Nothing more is begun; the record is still changed for who asks.
            case .event where !stopped.isEmpty: break
            case .event(let event, let asker):
                if case .committed = event, asker == epoch { commitAskedAt = 0 }
                if asker == 0 || asker == epoch { handle(event) }
                if case .gaveUp = event { freeTargets() }
            case .opened(let state, let exports, let asker):
                if asker == epoch { connect(state, exports) }
            case .drained(let slot, let answer, let asker):
                sender.readEnded()
                if asker == epoch, let event = sender.drained(slot, answer) { handle(event) }
            case .compared(let slot, let digests, let asker):
                if asker == epoch, let event = sender.compared(slot, digests) { handle(event) }
            case .setRate(let rate): sender.bucket.rate = rate
            case .marked(let asker):
                if asker == epoch { makeMarksDurable() }
            case .released(let changed, let asker):
                if asker == epoch { clearPreserved(changed: changed) }
            case .amend(let change, let anyway, let done): amend(change, anyway, done)
            case .wait(_, let answer) where !stopped.isEmpty: answer(.failure(.ended))
            case .wait(let alongside, let answer):
                if let reason = cycle.suspension {
                    answer(.failure(ReplicationRefusal("the group is suspended: \(reason)")))
                } else {
                    waiters.append(Waiter(number: cycle.nextNumber, alongside: alongside, answer: answer))
                    handle(.request)
                }
            case .stop(let done): stopped.append(done)
            }
        }
    }

    /// Events that come up while actions are carried out wait until all of those are.
    private func handle(_ event: Cycle.Event) {
        events.append(event)
        guard !performing else { return }
        performing = true
        while !events.isEmpty {
            perform(cycle.handle(events.removeFirst(), now: monotonicNanoseconds()))
        }
        performing = false
    }

    // MARK: Link

    private func openSession() {
        epoch += 1
        let asker = epoch
        let volumes = configuration.volumes.map { (name: $0.name, size: $0.geometry.size) }
        let record = cycle.record
        let peer = configuration.peer
        let mailbox = replicator.mailbox
        let refused = configuration.refused
        Task {
            do {
                let opened = try await peer.openSession(volumes: volumes, record: record)
                mailbox.send(.opened(opened.state, exports: opened.exports, epoch: asker))
            } catch let refusal as PeerRefusal {
                mailbox.send(
                    .event(.sessionFailed(refusal.description, retry: false), epoch: asker))
                refused()
            } catch {
                mailbox.send(.event(.sessionFailed("\(error)", retry: true), epoch: asker))
            }
        }
    }

    private func connect(_ state: PeerState, _ exports: [String]) {
        do {
            link = try NBDLink(
                address: configuration.address, tls: configuration.tls, exports: exports,
                connectionsPerVolume: configuration.connectionsPerVolume, window: window)
            peerState = state
            session = state.session
            linkDeadline = monotonicNanoseconds() + Self.connectSeconds * 1_000_000_000
        } catch {
            handle(.sessionFailed("\(error)", retry: true))
        }
    }

    private func serviceLink() {
        guard let link else { return }
        if let state = peerState {
            if link.isReady {
                peerState = nil
                sender.begin()
                if let problem = tooSmall(link) {
                    handle(.sessionFailed(problem, retry: false))
                } else {
                    handle(.sessionOpened(state))
                }
            } else if link.hasFailed || monotonicNanoseconds() > linkDeadline {
                peerState = nil
                let reason = LinkConnection.failure("connect to the peer's NBD server")
                handle(.sessionFailed("\(reason)", retry: true))
            }
            return
        }
        reapCompletions(link)
        guard self.link === link else { return }
        if link.hasFailed {
            handle(.linkLost("the connection to the peer ended"))
        } else if sender.hasStalled(link) {
            handle(.linkLost("the peer acknowledged nothing for \(configuration.stallTimeout) s"))
        }
    }

    /// A remote that is no Farcopy site has not been asked for its sizes.
    private func tooSmall(_ link: NBDLink) -> String? {
        for (volume, connections) in zip(configuration.volumes, link.connections) {
            let size = connections[0].size
            if size < Int64(volume.geometry.size) {
                return "volume '\(volume.name)' has \(volume.geometry.size) bytes and \(size) at the peer"
            }
        }
        return nil
    }

    private func reapCompletions(_ link: NBDLink) {
        while self.link === link, let index = link.completions.takeAnswered() {
            let error = link.completions.slots[index].error
            if error != 0 {
                handle(.linkLost("the peer answered \(String(cString: strerror(error)))"))
            } else if index < window * NBDLink.partsPerSlot {
                if let event = sender.acknowledged(index) {
                    cycle.windowLimit = sender.windowLimit
                    cycle.checkpointBytes = sender.checkpointBytes
                    handle(event)
                }
            } else {
                sender.noteProgress()
                flushesLeft -= 1
                if flushesLeft == 0 { handle(.flushed) }
            }
        }
    }

    // MARK: Actions

    /// Carries actions out in order; those behind a record that cannot be saved are dropped.
    private func perform(_ actions: [Cycle.Action]) {
        for action in actions {
            guard case .save(let record) = action else {
                perform(action)
                continue
            }
            do {
                try configuration.save(record)
                cycle.wasSaved()
            } catch {
                events.insert(.saveFailed("\(error)"), at: 0)
                return
            }
        }
    }

    private func amend(_ change: (inout GroupRecord) -> Void, _ anyway: Bool, _ done: ((any Error)?) -> Void) {
        var record = cycle.record
        change(&record)
        do {
            try configuration.save(record)
            cycle.adopt(record)
        } catch {
            if anyway { cycle.adopt(record) }
            cycle.mayDiffer(now: monotonicNanoseconds())
            guard anyway else { return done(error) }
        }
        publish()
        done(nil)
    }

    private func perform(_ action: Cycle.Action) {
        switch action {
        case .openSession: openSession()
        case .closeLink:
            epoch += 1
            link = nil
            peerState = nil
            session = nil
            commitAskedAt = 0
        case .save: break  // above
        case .prepare: prepare()
        case .form(let number): form(number)
        case .rewind: rewind()
        case .drain(let action): perform(action)
        case .commit(let number, let previous, let formedAt): commit(number, previous, formedAt)
        case .endPoint(let number): endPoint(number)
        case .giveUp: giveUp()
        case .markAllChanged(let names): markAllChanged(names)
        }
    }

    /// Every reactor must have let go of the point before, whose end may still be in its mailbox, before the bitmaps of
    /// preserved grains are cleared for the next.
    private func prepare() {
        let mailbox = replicator.mailbox
        let asker = epoch
        let volumes = configuration.volumes
        onEveryVolume { reactor, volume in
            reactor.hosted(volume.number).volume.mayFormPoint
        } done: { reactor, whole in
            guard whole else {
                mailbox.send(.event(.notReady, epoch: asker))
                return
            }
            onEvery(volumes, from: reactor) { reactor, volume in
                reactor.hosted(volume.number).volume.changedGrains == 0
            } done: { _, unchanged in
                mailbox.send(.released(changed: !unchanged, epoch: asker))
            }
        }
    }

    private func clearPreserved(changed: Bool) {
        for volume in configuration.volumes { volume.preservedBitmap.clearAll() }
        handle(.prepared(changed: changed))
    }

    private func onEveryVolume(
        _ body: @escaping @Sendable (Reactor, ReplicatedVolume) -> Bool,
        done: @escaping @Sendable (Reactor, Bool) -> Void
    ) {
        onEvery(configuration.volumes, body, done: done)
    }

    private func markAllChanged(_ names: [String]?) {
        let mailbox = replicator.mailbox
        let asker = epoch
        onEveryVolume { reactor, volume in
            if names?.contains(volume.name) != false { reactor.hosted(volume.number).volume.markAllChanged() }
            return true
        } done: { _, _ in
            mailbox.send(.marked(epoch: asker))
        }
    }

    /// The lineage is saved next, and says that the bitmaps describe the difference to the peer: they are on stable storage before.
    private func makeMarksDurable() {
        do {
            for volume in configuration.volumes { try volume.recording.synchronize() }
            handle(.allMarked)
        } catch {
            handle(.linkLost("\(error)"))
        }
    }

    /// The reactor that forms last lets all of them go: acknowledgements wait for reactors only, not for this thread.
    private func form(_ number: UInt64) {
        let mailbox = replicator.mailbox
        let asker = epoch
        let volumes = configuration.volumes
        let replicator = replicator
        let alongside = waiters.first { $0.number == number && $0.alongside != nil }?.alongside
        let names = volumes.map(\.name)
        let longest = LongestHold()
        onEveryVolume { reactor, volume in
            reactor.formPoint(
                volume.number, point: number, targetFile: volume.targetFile,
                preserved: volume.preservedBitmap)
            if let alongside, let index = names.firstIndex(of: volume.name) { alongside(reactor, index) }
            return true
        } done: { reactor, _ in
            let formedAt = realSeconds()
            onEvery(volumes, from: reactor) { reactor, volume in
                longest.note(reactor.heldFor(volume.number))
                return reactor.releaseHold(volume.number)
            } done: { _, intact in
                replicator.noteHold(longest.nanoseconds)
                mailbox.send(.event(.formed(at: formedAt, intact: intact), epoch: asker))
            }
        }
    }

    private func rewind() {
        epoch += 1
        for volume in configuration.volumes {
            let number = volume.number
            volume.reactor.perform { $0.rewindDrain(number) }
        }
    }

    private func giveUp() {
        let mailbox = replicator.mailbox
        epoch += 1
        let asker = epoch
        onEveryVolume { reactor, volume in
            reactor.hosted(volume.number).volume.giveUpPoint()
            return true
        } done: { _, _ in
            mailbox.send(.event(.gaveUp, epoch: asker))
        }
    }

    /// After the record says that no point is held: nobody reads the targets any more.
    private func freeTargets() {
        guard cycle.record.held == nil, cycle.record.forming == nil else { return }
        for volume in configuration.volumes {
            // A failure costs space, not data; the next point writes over what is there.
            try? volume.target.truncate(to: 0)
            try? volume.target.truncate(to: volume.geometry.size)
        }
    }

    private func endPoint(_ number: UInt64) {
        for volume in configuration.volumes {
            let index = volume.number
            volume.reactor.perform { $0.hosted(index).volume.endPoint(number: number) }
        }
    }

    private func commit(_ number: UInt64, _ previous: UInt64?, _ formedAt: Double) {
        let mailbox = replicator.mailbox
        let asker = epoch
        let peer = configuration.peer
        guard let session = session else { return handle(.linkLost("the session is closed")) }
        commitAskedAt = monotonicNanoseconds()
        Task {
            do {
                let time = try await peer.commit(
                    session: session, number: number, previous: previous, formedAt: formedAt)
                mailbox.send(.event(.committed(at: time), epoch: asker))
            } catch let refusal as PeerRefusal {
                mailbox.send(.event(.commitRefused(refusal.description), epoch: asker))
            } catch {
                mailbox.send(.event(.linkLost("commit: \(error)"), epoch: asker))
            }
        }
    }

    // MARK: Draining

    private func perform(_ action: Drain.Action) {
        switch action {
        case .read(let slot, let volume):
            guard let point = cycle.record.held?.number else { return }
            if let event = sender.read(slot, volume, point: point, epoch: epoch) { handle(event) }
        case .send(let slot, _, let offset, let length):
            guard let session else { return handle(.linkLost("the link is closed")) }
            sender.send(
                slot, offset, length, session: session, epoch: epoch, isSeeded: cycle.record.primary?.fromImage == true)
        case .flush: flush()
        case .clear(let runs): clear(runs)
        case .finished: break
        }
    }

    /// On every connection: each covers what was acknowledged on it.
    private func flush() {
        guard let link else { return handle(.linkLost("the link is closed")) }
        let connections = link.connections.joined()
        flushesLeft = connections.count
        for (index, connection) in connections.enumerated() {
            guard connection.flush(link.completions.slots + (window * NBDLink.partsPerSlot + index)) else {
                return handle(.linkLost("\(LinkConnection.failure("flush"))"))
            }
        }
    }

    private func clear(_ runs: [VolumeRun]) {
        guard let point = cycle.record.held?.number else { return }
        for (index, volume) in configuration.volumes.enumerated() {
            let ofVolume = runs.filter { $0.volume == index }.map(\.grains)
            guard !ofVolume.isEmpty else { continue }
            let number = volume.number
            volume.reactor.perform { reactor in
                for grains in ofVolume {
                    reactor.hosted(number).volume.clearOutOfSync(grains, point: point)
                }
            }
        }
    }

    // MARK: Telling

    private func publish() {
        let record = cycle.record
        let unsaved = cycle.isUnsaved
        let state = cycle.shownState
        let reason = cycle.suspension
        if let committed = record.lastCommitted {
            for waiter in waiters where waiter.number <= committed.number {
                waiter.answer(
                    waiter.alongside == nil || waiter.number == committed.number
                        ? .success(committed) : .failure(ReplicationRefusal("the point was given up; try again")))
            }
            waiters.removeAll { $0.number <= committed.number }
        }
        if let reason {
            for waiter in waiters {
                waiter.answer(.failure(ReplicationRefusal("the group is suspended: \(reason)")))
            }
            waiters = []
        }
        if "\(state.rawValue) \(reason ?? "")" != lastState {
            lastState = "\(state.rawValue) \(reason ?? "")"
            configuration.log(reason.map { "\(state.rawValue): \($0)" } ?? state.rawValue)
        }
        let now = monotonicNanoseconds()
        var rate: Double?
        if now - lastFigures > 1_000_000_000 {
            rate = Double(sender.bytesSent - bytesAtFigures) / (Double(now - lastFigures) / 1e9)
            bytesAtFigures = sender.bytesSent
            lastFigures = now
        }
        let silence = max(
            link.map { peerState == nil ? sender.silence($0) : 0 } ?? 0, commitAskedAt > 0 ? now - commitAskedAt : 0)
        let isSilent = silence > Self.silenceNanoseconds
        if isSilent { rate = 0 }
        replicator.snapshot.withLock { status in
            status.silentSeconds = isSilent ? Double(silence) / 1e9 : nil
            status.state = state
            status.reason = reason
            status.record = record
            status.isUnsaved = unsaved
            if let rate { status.bytesPerSecond = rate }
            status.windowBytes = sender.flow.bytes
            status.bytesSpared = sender.bytesSpared
        }
    }
}

/// Performs `body` for each volume on its reactor, with one message to each reactor; the last one calls `done`, on its thread.
///
/// - Parameter own: the reactor that this runs on: the others are told first, then it takes its part at once.
private func onEvery(
    _ volumes: [ReplicatedVolume], from own: Reactor? = nil,
    _ body: @escaping @Sendable (Reactor, ReplicatedVolume) -> Bool,
    done: @escaping @Sendable (Reactor, Bool) -> Void
) {
    let parts = Dictionary(grouping: volumes, by: \.reactor.number)
    let gathered = Gathered(count: parts.count, done: done)
    @Sendable func perform(_ part: [ReplicatedVolume], _ reactor: Reactor) {
        gathered.answer(reactor, part.reduce(true) { body(reactor, $1) && $0 })
    }
    for (number, part) in parts where number != own?.number {
        part[0].reactor.perform { perform(part, $0) }
    }
    if let own, let part = parts[own.number] { perform(part, own) }
}

/// The longest of the holds of a point's volumes.
private final class LongestHold: Sendable {
    private let value = Atomic<UInt64>(0)
    var nanoseconds: UInt64 { value.load(ordering: .relaxed) }
    func note(_ nanoseconds: UInt64) { value.max(nanoseconds, ordering: .relaxed) }
}

/// Counts answers of several reactors; the last one calls `done`.
private final class Gathered: Sendable {
    private let state: Mutex<(left: Int, all: Bool)>
    private let done: @Sendable (Reactor, Bool) -> Void

    init(count: Int, done: @escaping @Sendable (Reactor, Bool) -> Void) {
        state = Mutex((count, true))
        self.done = done
    }

    func answer(_ reactor: Reactor, _ ok: Bool) {
        let outcome: Bool? = state.withLock { state in
            state.left -= 1
            state.all = state.all && ok
            return state.left == 0 ? state.all : nil
        }
        if let outcome { done(reactor, outcome) }
    }
}
