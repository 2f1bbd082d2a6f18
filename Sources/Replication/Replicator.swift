// Replicator.swift: the thread of one group at its primary. It drives `Cycle`: reads from the volumes' reactors, sends
// over libnbd, talks to the peer's control API through `PeerClient`.
//
// Must be prevented:
//   an answer that belongs to an earlier drain or link is taken for one of the present (epochs)
//   a buffer is reused while a reactor still reads into it (each drain has its own buffers until all answered)
//   a state is acted on before its record is saved where the order matters (actions are carried out in order)

import Base
import Glibc
import NBDServer
import Ring
import Synchronization
import Volumes

/// A volume of the group as the replicator sees it.
package struct ReplicatedVolume: Sendable {
    package var name: String
    package var reactor: ReactorHandle
    package var number: VolumeNumber
    package var geometry: Geometry
    /// Takes the old content of colliding writes.
    package var targetFile: StoreFile
    package var target: OpenFile
    /// Which grains of the point are in the target; behind the file's header.
    package var preserved: MappedFile

    package init(
        name: String, reactor: ReactorHandle, number: VolumeNumber, geometry: Geometry,
        targetFile: StoreFile, target: OpenFile, preserved: MappedFile
    ) {
        self.name = name
        self.reactor = reactor
        self.number = number
        self.geometry = geometry
        self.targetFile = targetFile
        self.target = target
        self.preserved = preserved
    }

    package var preservedBitmap: Bitmap {
        Bitmap(memory: preserved.memory + BitmapHeader.byteCount, count: geometry.grainCount)
    }
}

/// The peer's control API.
package protocol PeerClient: Sendable {
    func openSession(volumes: [(name: String, size: UInt64)], record: GroupRecord) async throws
        -> (state: PeerState, exports: [String])
    func commit(session: UInt64, number: UInt64, previous: UInt64?, formedAt: Double) async throws
        -> Double
}

/// A refusal by the peer that trying again soon does not mend.
package struct PeerRefusal: Error, CustomStringConvertible {
    package var description: String
    package init(_ description: String) { self.description = description }
}

/// What others see of a group's replication.
package struct ReplicationStatus: Sendable {
    package var state = "simplex"
    package var reason: String?
    package var record: GroupRecord
    package var bytesPerSecond: Double = 0
    /// Longest hold of acknowledgements of the points so far, and of the last, in nanoseconds.
    package var lastHold: UInt64 = 0
    package var holds: [UInt64] = []
}

package final class Replicator: Sendable {
    enum Message: Sendable {
        case event(Cycle.Event, epoch: UInt64)
        case opened(PeerState, exports: [String], epoch: UInt64)
        case drained(slot: Int, DrainRead.Answer, epoch: UInt64)
        /// No reactor holds the point before any more.
        case released(changed: Bool, epoch: UInt64)
        case amend(@Sendable (inout GroupRecord) -> Void, @Sendable () -> Void)
        case wait(@Sendable (Result<PointRecord, ReplicationRefusal>) -> Void)
        case stop(@Sendable () -> Void)
    }

    let mailbox: Mailbox<Message>
    let snapshot: Mutex<ReplicationStatus>

    package init(record: GroupRecord) throws(SystemError) {
        mailbox = try Mailbox()
        snapshot = Mutex(ReplicationStatus(record: record))
    }

    package var status: ReplicationStatus { snapshot.withLock { $0 } }

    package func suspend() { mailbox.send(.event(.suspend, epoch: 0)) }
    package func resume() { mailbox.send(.event(.resume, epoch: 0)) }

    /// Forms a point as soon as the one before is committed.
    package func request() { mailbox.send(.event(.request, epoch: 0)) }

    /// A volume could not hold its point.
    package func pointLost(_ reason: String) {
        mailbox.send(.event(.pointLost(reason), epoch: 0))
    }

    /// Changes the record, durably.
    package func amend(_ change: @escaping @Sendable (inout GroupRecord) -> Void) async {
        await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
            mailbox.send(.amend(change) { continuation.resume() })
        }
    }

    /// Forms a point after this call and returns it once the peer has committed it.
    package func cycle() async throws(ReplicationRefusal) -> PointRecord {
        let result: Result<PointRecord, ReplicationRefusal> = await withCheckedContinuation {
            continuation in
            mailbox.send(.wait { continuation.resume(returning: $0) })
        }
        return try result.get()
    }

    /// Ends the thread; a point that is held stays held and is taken up by the next start.
    package func stop() async {
        await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
            mailbox.send(.stop { continuation.resume() })
        }
    }

    package struct Configuration: Sendable {
        package var group: String
        package var settings: Cycle.Settings
        package var volumes: [ReplicatedVolume]
        package var address: NBDAddress
        package var tls: LinkTLS
        package var peer: any PeerClient
        package var connectionsPerVolume: Int
        /// Writes the record durably before it returns.
        package var save: @Sendable (GroupRecord) throws -> Void
        package var log: @Sendable (String) -> Void
        /// The peer refuses this site; perhaps it has taken over.
        package var refused: @Sendable () -> Void

        package init(
            group: String, settings: Cycle.Settings, volumes: [ReplicatedVolume],
            address: NBDAddress, tls: LinkTLS, peer: any PeerClient, connectionsPerVolume: Int,
            save: @escaping @Sendable (GroupRecord) throws -> Void,
            log: @escaping @Sendable (String) -> Void, refused: @escaping @Sendable () -> Void
        ) {
            self.group = group
            self.settings = settings
            self.volumes = volumes
            self.address = address
            self.tls = tls
            self.peer = peer
            self.connectionsPerVolume = connectionsPerVolume
            self.save = save
            self.log = log
            self.refused = refused
        }
    }

    func noteHold(_ nanoseconds: UInt64) {
        snapshot.withLock { status in
            status.lastHold = nanoseconds
            status.holds.append(nanoseconds)
            if status.holds.count > 1024 { status.holds.removeFirst(512) }
        }
    }

    package func start(_ configuration: Configuration) {
        let record = status.record
        startThread(name: "group-\(configuration.group)") { [self] in
            replicatorMain(self, configuration, record)
        }
    }
}

package struct ReplicationRefusal: Error, CustomStringConvertible {
    package var description: String
    init(_ description: String) { self.description = description }
}

private nonisolated func replicatorMain(
    _ replicator: Replicator, _ configuration: Replicator.Configuration, _ record: GroupRecord
) {
    let thread = ReplicatorThread(replicator, configuration, record)
    thread.run()
}

/// Buffers of one drain. Answers in flight keep them alive.
private final class DrainBuffers: @unchecked Sendable {
    // Safe because: a slot's buffer is used by the reactor between read and answer, by libnbd between send and
    // completion, and by the replicator otherwise; the drain's state machine keeps these apart.
    static let slotBytes = 1 << 20
    let memory: PoolMemory
    init(window: Int) throws(SystemError) {
        memory = try PoolMemory(byteCount: window * Self.slotBytes)
    }
    func slot(_ index: Int) -> UnsafeMutableRawPointer { memory.memory + index * Self.slotBytes }
}

private final class ReplicatorThread {
    private let replicator: Replicator
    private let configuration: Replicator.Configuration
    private var cycle: Cycle
    /// Changes with every link and every drain; answers of earlier ones are dropped.
    private var epoch: UInt64 = 1
    private var events: [Cycle.Event] = []
    private var performing = false
    private var link: Link?
    private var linkDeadline: UInt64 = 0
    /// The session that the link is being made for; nil once it is ready.
    private var peerState: PeerState?
    private var session: UInt64?
    private var buffers: DrainBuffers?
    private var readsInFlight = 0
    private var zeroSlots: [Bool]
    private var waiters: [(number: UInt64, answer: @Sendable (Result<PointRecord, ReplicationRefusal>) -> Void)] = []
    private var stopped: (@Sendable () -> Void)?
    private var flushesLeft = 0
    private var sendVolume: [Int]
    private var lastFigures: UInt64 = 0
    private var rateBytes: UInt64 = 0
    private var lastState = ""
    private static let connectSeconds: UInt64 = 10
    /// A peer that acknowledges nothing for this long has stalled.
    private static let stallSeconds: UInt64 = 30
    private var lastProgress: UInt64 = 0

    private var window: Int { configuration.settings.window }

    init(
        _ replicator: Replicator, _ configuration: Replicator.Configuration, _ record: GroupRecord
    ) {
        self.replicator = replicator
        self.configuration = configuration
        cycle = Cycle(record: record, settings: configuration.settings)
        zeroSlots = Array(repeating: false, count: configuration.settings.window)
        sendVolume = Array(repeating: 0, count: configuration.settings.window)
    }

    func run() {
        performing = true
        perform(cycle.start(now: monotonicNanoseconds()))
        performing = false
        handle(.tick)
        while stopped == nil {
            publish()
            wait()
            takeMessages()
            serviceLink()
            if let wakeAt = cycle.wakeAt, monotonicNanoseconds() >= wakeAt { handle(.tick) }
        }
        link = nil
        stopped?()
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
        let count = poll(&entries, nfds_t(entries.count), Int32(milliseconds))
        if count > 0, let link { link.notify(entries[1...]) }
    }

    private func takeMessages() {
        for message in replicator.mailbox.drain() {
            switch message {
            case .event(let event, let sender):
                if sender == 0 || sender == epoch { handle(event) }
                if case .gaveUp = event { freeTargets() }
            case .opened(let state, let exports, let sender):
                if sender == epoch { connect(state, exports) }
            case .drained(let slot, let answer, let sender):
                readsInFlight -= 1
                if sender == epoch { drained(slot, answer) }
            case .released(let changed, let sender):
                if sender == epoch { clearPreserved(changed: changed) }
            case .amend(let change, let done):
                perform(cycle.amend(change))
                publish()
                done()
            case .wait(let answer):
                if let reason = cycle.suspension {
                    answer(.failure(ReplicationRefusal("the group is suspended: \(reason)")))
                } else {
                    waiters.append((cycle.nextNumber, answer))
                    handle(.request)
                }
            case .stop(let done): stopped = done
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
        let sender = epoch
        let volumes = configuration.volumes.map { (name: $0.name, size: $0.geometry.size) }
        let record = cycle.record
        let peer = configuration.peer
        let mailbox = replicator.mailbox
        let refused = configuration.refused
        Task {
            do {
                let opened = try await peer.openSession(volumes: volumes, record: record)
                mailbox.send(.opened(opened.state, exports: opened.exports, epoch: sender))
            } catch let refusal as PeerRefusal {
                mailbox.send(
                    .event(.sessionFailed(refusal.description, retry: false), epoch: sender))
                refused()
            } catch {
                mailbox.send(.event(.sessionFailed("\(error)", retry: true), epoch: sender))
            }
        }
    }

    private func connect(_ state: PeerState, _ exports: [String]) {
        do {
            link = try Link(
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
                lastProgress = monotonicNanoseconds()
                handle(.sessionOpened(state))
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
        } else if isSending(link),
            monotonicNanoseconds() - lastProgress > Self.stallSeconds * 1_000_000_000
        {
            handle(.linkLost("the peer acknowledged nothing for \(Self.stallSeconds) s"))
        }
    }

    private func isSending(_ link: Link) -> Bool {
        for index in 0..<link.completions.count where link.completions.slots[index].pending {
            return true
        }
        lastProgress = monotonicNanoseconds()
        return false
    }

    private func reapCompletions(_ link: Link) {
        for index in 0..<link.completions.count {
            guard self.link === link, link.completions.slots[index].done else { continue }
            let error = link.completions.slots[index].error
            link.completions.slots[index] = LinkCompletion()
            lastProgress = monotonicNanoseconds()
            if error != 0 {
                handle(.linkLost("the peer answered \(String(cString: strerror(error)))"))
            } else if index < window {
                handle(.sent(slot: index))
            } else {
                flushesLeft -= 1
                if flushesLeft == 0 { handle(.flushed) }
            }
        }
    }

    // MARK: Actions

    private func perform(_ actions: [Cycle.Action]) {
        for action in actions { perform(action) }
    }

    private func perform(_ action: Cycle.Action) {
        switch action {
        case .openSession: openSession()
        case .closeLink:
            epoch += 1
            link = nil
            peerState = nil
            session = nil
        case .save(let record): save(record)
        case .prepare: prepare()
        case .form(let number): form(number)
        case .rewind: rewind()
        case .drain(let action): perform(action)
        case .commit(let number, let previous, let formedAt): commit(number, previous, formedAt)
        case .endPoint(let number): endPoint(number)
        case .giveUp: giveUp()
        case .markAllChanged: markAllChanged()
        }
    }

    private func save(_ record: GroupRecord) {
        do {
            try configuration.save(record)
        } catch {
            // The state directory is gone or full: what is durable no longer follows what is done.
            fatalError("farcopy: group \(configuration.group): \(error)")
        }
    }

    /// Every reactor must have let go of the point before, whose end may still be in its mailbox, before the bitmaps of
    /// preserved grains are cleared for the next.
    private func prepare() {
        let mailbox = replicator.mailbox
        let sender = epoch
        let volumes = configuration.volumes
        onEveryVolume { reactor, volume in
            reactor.hosted(volume.number).volume.mayFormPoint
        } done: { whole in
            guard whole else {
                mailbox.send(.event(.notReady, epoch: sender))
                return
            }
            onEvery(volumes) { reactor, volume in
                reactor.hosted(volume.number).volume.changedGrains == 0
            } done: { unchanged in
                mailbox.send(.released(changed: !unchanged, epoch: sender))
            }
        }
    }

    private func clearPreserved(changed: Bool) {
        for volume in configuration.volumes { volume.preservedBitmap.clearAll() }
        handle(.prepared(changed: changed))
    }

    private func onEveryVolume(
        _ body: @escaping @Sendable (Reactor, ReplicatedVolume) -> Bool,
        done: @escaping @Sendable (Bool) -> Void
    ) {
        onEvery(configuration.volumes, body, done: done)
    }

    private func markAllChanged() {
        let mailbox = replicator.mailbox
        let sender = epoch
        onEveryVolume { reactor, volume in
            reactor.hosted(volume.number).volume.markAllChanged()
            return true
        } done: { _ in
            mailbox.send(.event(.allMarked, epoch: sender))
        }
    }

    /// The reactor that forms last lets all of them go: acknowledgements wait for reactors only, not for this thread.
    private func form(_ number: UInt64) {
        let mailbox = replicator.mailbox
        let sender = epoch
        let volumes = configuration.volumes
        let replicator = replicator
        let holdStart = monotonicNanoseconds()
        onEveryVolume { reactor, volume in
            reactor.formPoint(
                volume.number, point: number, targetFile: volume.targetFile,
                preserved: volume.preservedBitmap)
            return true
        } done: { _ in
            let formedAt = realSeconds()
            onEvery(volumes) { reactor, volume in
                reactor.releaseHold(volume.number)
            } done: { intact in
                replicator.noteHold(monotonicNanoseconds() - holdStart)
                mailbox.send(.event(.formed(at: formedAt, intact: intact), epoch: sender))
            }
        }
    }

    private func rewind() {
        epoch += 1
        for volume in configuration.volumes {
            let number = volume.number
            volume.reactor.perform { $0.hosted(number).volume.rewindDrain() }
        }
    }

    private func giveUp() {
        let mailbox = replicator.mailbox
        epoch += 1
        let sender = epoch
        onEveryVolume { reactor, volume in
            reactor.hosted(volume.number).volume.giveUpPoint()
            return true
        } done: { _ in
            mailbox.send(.event(.gaveUp, epoch: sender))
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
        let sender = epoch
        let peer = configuration.peer
        guard let session = session else { return handle(.linkLost("the session is closed")) }
        Task {
            do {
                let time = try await peer.commit(
                    session: session, number: number, previous: previous, formedAt: formedAt)
                mailbox.send(.event(.committed(at: time), epoch: sender))
            } catch let refusal as PeerRefusal {
                mailbox.send(.event(.commitRefused(refusal.description), epoch: sender))
            } catch {
                mailbox.send(.event(.linkLost("commit: \(error)"), epoch: sender))
            }
        }
    }

    // MARK: Draining

    private func perform(_ action: Drain.Action) {
        switch action {
        case .read(let slot, let volume): read(slot, volume)
        case .send(let slot, let volume, let offset, let length):
            send(slot, volume, offset, length)
        case .flush: flush()
        case .clear(let runs): clear(runs)
        case .finished: break
        }
    }

    private func read(_ slot: Int, _ index: Int) {
        guard let point = cycle.record.held?.number, let buffers = currentBuffers() else { return }
        let volume = configuration.volumes[index]
        let mailbox = replicator.mailbox
        let sender = epoch
        readsInFlight += 1
        sendVolume[slot] = index
        volume.reactor.read(
            DrainRead(
                volume: volume.number, point: point, capacity: DrainBuffers.slotBytes,
                buffer: buffers.slot(slot)
            ) { answer in
                withExtendedLifetime(buffers) {
                    _ = mailbox.send(.drained(slot: slot, answer, epoch: sender))
                }
            })
    }

    /// The buffers of the present drain; new ones when answers to an earlier one may still be written.
    private func currentBuffers() -> DrainBuffers? {
        if let buffers, buffersEpoch == epoch || readsInFlight == 0 {
            buffersEpoch = epoch
            return buffers
        }
        buffers = try? DrainBuffers(window: window)
        buffersEpoch = epoch
        if buffers == nil { handle(.pointLost("no memory for the drain's buffers")) }
        return buffers
    }
    private var buffersEpoch: UInt64 = 0

    private func drained(_ slot: Int, _ answer: DrainRead.Answer) {
        switch answer {
        case .data(let grains, let offset, let length):
            zeroSlots[slot] = isZero(buffers!.slot(slot), length)
            handle(.read(slot: slot, grains: grains, offset: offset, length: length))
        case .zeroes(let grains, let offset, let length):
            zeroSlots[slot] = true
            handle(.read(slot: slot, grains: grains, offset: offset, length: length))
        case .nothing: handle(.read(slot: slot, grains: nil, offset: 0, length: 0))
        case .gone: break  // whoever ended the point has told
        case .failed(let errno):
            let volume = configuration.volumes[sendVolume[slot]].name
            handle(.pointLost("read \(volume): \(String(cString: strerror(errno)))"))
        }
    }

    private func send(_ slot: Int, _ volume: Int, _ offset: UInt64, _ length: Int) {
        guard let link, let buffers else { return handle(.linkLost("the link is closed")) }
        let connection = link.connection(forVolume: volume)
        let completion = link.completions.slots + slot
        let accepted =
            zeroSlots[slot]
            ? connection.zero(length, at: offset, completion)
            : connection.write(buffers.slot(slot), length, at: offset, completion)
        rateBytes += UInt64(length)
        if !accepted { handle(.linkLost("\(LinkConnection.failure("send"))")) }
    }

    /// On every connection: each covers what was acknowledged on it.
    private func flush() {
        guard let link else { return handle(.linkLost("the link is closed")) }
        let connections = link.connections.joined()
        flushesLeft = connections.count
        for (index, connection) in connections.enumerated() {
            guard connection.flush(link.completions.slots + window + index) else {
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
        let state = cycle.stateName
        let reason = cycle.suspension
        if let committed = record.lastCommitted {
            for waiter in waiters where waiter.number <= committed.number {
                waiter.answer(.success(committed))
            }
            waiters.removeAll { $0.number <= committed.number }
        }
        if let reason {
            for waiter in waiters {
                waiter.answer(.failure(ReplicationRefusal("the group is suspended: \(reason)")))
            }
            waiters = []
        }
        if "\(state) \(reason ?? "")" != lastState {
            lastState = "\(state) \(reason ?? "")"
            configuration.log(reason.map { "\(state): \($0)" } ?? state)
        }
        let now = monotonicNanoseconds()
        var rate: Double?
        if now - lastFigures > 1_000_000_000 {
            rate = Double(rateBytes) / (Double(now - lastFigures) / 1e9)
            rateBytes = 0
            lastFigures = now
        }
        replicator.snapshot.withLock { status in
            status.state = state
            status.reason = reason
            status.record = record
            if let rate { status.bytesPerSecond = rate }
        }
    }
}

/// Performs `body` on the reactor of each volume; the last one calls `done`, on its thread.
private func onEvery(
    _ volumes: [ReplicatedVolume],
    _ body: @escaping @Sendable (Reactor, ReplicatedVolume) -> Bool,
    done: @escaping @Sendable (Bool) -> Void
) {
    let gathered = Gathered(count: volumes.count, done: done)
    for volume in volumes {
        volume.reactor.perform { reactor in gathered.answer(body(reactor, volume)) }
    }
}

/// Counts answers of several reactors; the last one calls `done`.
private final class Gathered: Sendable {
    private let state: Mutex<(left: Int, all: Bool)>
    private let done: @Sendable (Bool) -> Void

    init(count: Int, done: @escaping @Sendable (Bool) -> Void) {
        state = Mutex((count, true))
        self.done = done
    }

    func answer(_ ok: Bool) {
        let outcome: Bool? = state.withLock { state in
            state.left -= 1
            state.all = state.all && ok
            return state.left == 0 ? state.all : nil
        }
        if let outcome { done(outcome) }
    }
}

/// Seconds since 1970.
package func realSeconds() -> Double {
    var time = timespec()
    clock_gettime(CLOCK_REALTIME, &time)
    return Double(time.tv_sec) + Double(time.tv_nsec) / 1e9
}

/// Whether `count` bytes are all zero: the first sixteen, then the buffer against itself shifted by sixteen.
func isZero(_ buffer: UnsafeRawPointer, _ count: Int) -> Bool {
    guard count >= 16 else { return !UnsafeRawBufferPointer(start: buffer, count: count).contains { $0 != 0 } }
    guard buffer.loadUnaligned(as: UInt64.self) == 0, buffer.loadUnaligned(fromByteOffset: 8, as: UInt64.self) == 0
    else { return false }
    return memcmp(buffer, buffer + 16, count - 16) == 0
}
