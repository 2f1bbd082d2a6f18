// Reactor.swift: a thread with its ring, the volumes that it hosts, and the connections to them.
//
// One turn: completions → receive and parse → volumes → replies → poll or wait. Nothing on this path allocates or
// counts references for a request; what it needs comes from slabs and pools made at the start.
//
// Must be prevented:
//   a connection's slot is reused while the ring or a volume still refers to it
//   a client that does not read, or stops in mid-payload, takes what others need
//   an intake connection of an earlier session writes after a later session began

import Base
import CLibURing
import Glibc
import NBDProtocol
import Ring
import TLS
import Volumes

enum CompletionKind {
    static let wake: UInt8 = 1
    static let accept: UInt8 = 2
    static let receive: UInt8 = 3
    static let send: UInt8 = 4
    static let store: UInt8 = 5
    static let ignored: UInt8 = 6
    static let opened: UInt8 = 7
}

/// What the reactors of a site have in common.
package struct ReactorSettings: Sendable {
    package var budget: ConnectionBudget
    /// Nil when TLS is off.
    package var credentials: TLSCredentials?
    /// Told who was refused, and why.
    package var onRefusal: (@Sendable (String) -> Void)?

    package init(
        limits: ServerLimits = ServerLimits(), credentials: TLSCredentials? = nil,
        onRefusal: (@Sendable (String) -> Void)? = nil
    ) {
        budget = ConnectionBudget(limits: limits)
        self.credentials = credentials
        self.onRefusal = onRefusal
    }
}

package final class Reactor {
    package let number: Int
    let mailbox: Mailbox<ReactorMessage>
    let exports: ExportDirectory
    let settings: ReactorSettings
    var refusalLog = RefusalLog()
    var ring: Ring
    private let completions: UnsafeMutablePointer<Completion>
    private static let completionBatch = 128

    let connections: UnsafeMutablePointer<Connection>
    var freeConnections: FixedQueue<Int32>
    var openConnections = 0
    /// Connections that are tried directly instead of through the ring.
    var polledConnections: UnsafeMutablePointer<Int32>
    var polledCount = 0
    /// Connections with something to send.
    var dirtyConnections: FixedQueue<Int32>
    /// Connections that wait for request slots or memory.
    var stalledConnections: FixedQueue<Int32>
    var resourcesFreed = false
    var wideConnections = 0

    private let payloadMemory: PoolMemory
    var payloads: BufferPool
    private let copyMemory: PoolMemory
    let copyBuffers: CopyBuffers

    package private(set) var volumes: [HostedVolume?] = []
    var stores: StoreTable
    /// Files that are being opened, with the I/O that waits for it.
    var openings: [Opening?] = []
    /// I/O on direct files that waits for other I/O, or for memory; and whether it is worth another try.
    var deferredStores: [DeferredStore] = []
    var deferredStoresReady = false
    /// Unaligned writes to direct files under way.
    var unalignedWrites = 0
    var drains: [DrainRead?] = []
    var waitingDrains: [DrainRead] = []
    /// Some of them can start in the next turn.
    var drainsDue = false
    var ranges: [RangeRequest?] = []
    var deferredRanges: [RangeRequest] = []
    private var quiesces: [Quiesce] = []
    private var listeners: [OpenFile] = []
    /// Listeners that rest because a client could not be accepted, and until when.
    private var restingListeners: [Int] = []
    private var acceptAgainAt: UInt64 = 0
    private var nextTick: UInt64 = 0
    private var nextSweep: UInt64 = 0
    /// Some volume has background work for the next turn.
    private var backgroundDue = false
    /// Volumes that may have something to do, and those of them that have been driven and may go on.
    private var awake: [VolumeNumber] = []
    private var resting: [VolumeNumber] = []
    /// Volumes that hold acknowledgements.
    private var held: [VolumeNumber] = []
    /// Turns since the kernel was last asked for completions.
    private var turnsUnseen = 0
    private static let turnsBetweenLooks = 8
    private var stopping: (@Sendable () -> Void)?
    /// Called with what a volume tells outside the data path.
    package var onEvent: (@Sendable (String, VolumeEvent) -> Void)?

    /// Connections of a volume.
    package enum Clients: Sendable {
        /// Of the replicator.
        case intake
        /// Of the volume itself, not of its copies.
        case hosts

        func include(_ connection: Connection) -> Bool {
            switch self {
            case .intake: connection.intakeSession != 0
            case .hosts: connection.intakeSession == 0 && connection.view == .volume
            }
        }
    }

    private struct Quiesce {
        /// Slots and generations of the connections that were there when it was asked for; who comes later is not waited for.
        var connections: [(slot: Int32, generation: UInt32)]
        var done: @Sendable () -> Void
    }

    private init(
        number: Int, mailbox: Mailbox<ReactorMessage>, exports: ExportDirectory, settings: ReactorSettings
    ) throws(SystemError) {
        self.number = number
        self.mailbox = mailbox
        self.exports = exports
        self.settings = settings
        ring = try Ring()
        payloadMemory = try PoolMemory(byteCount: Limits.payloadPool)
        payloads = BufferPool(base: payloadMemory.memory, size: Limits.payloadPool)
        copyMemory = try PoolMemory(byteCount: Limits.copyPool)
        copyBuffers = CopyBuffers(pool: BufferPool(base: copyMemory.memory, size: Limits.copyPool))
        completions = .allocate(capacity: Self.completionBatch)
        let count = Limits.connectionsPerReactor
        connections = .allocate(capacity: count)
        connections.initialize(repeating: Connection(), count: count)
        freeConnections = FixedQueue(capacity: count)
        for slot in 0..<count { freeConnections.append(Int32(slot)) }
        polledConnections = .allocate(capacity: count)
        dirtyConnections = FixedQueue(capacity: count)
        stalledConnections = FixedQueue(capacity: count)
        stores = StoreTable()
    }

    deinit {
        completions.deallocate()
        connections.deinitialize(count: Limits.connectionsPerReactor)
        connections.deallocate()
        polledConnections.deallocate()
    }

    /// Starts a reactor on a thread of its own.
    package static func start(
        number: Int, exports: ExportDirectory, settings: ReactorSettings = ReactorSettings(),
        mailboxCapacity: Int = Limits.mailboxCapacity
    ) throws(SystemError) -> ReactorHandle {
        let mailbox = try Mailbox<ReactorMessage>(capacity: mailboxCapacity)
        startThread(name: "reactor-\(number)") {
            reactorMain(number: number, mailbox: mailbox, exports: exports, settings: settings)
        }
        return ReactorHandle(mailbox: mailbox, number: number)
    }

    fileprivate static func main(
        number: Int, mailbox: Mailbox<ReactorMessage>, exports: ExportDirectory, settings: ReactorSettings
    ) {
        do {
            let reactor = try Reactor(number: number, mailbox: mailbox, exports: exports, settings: settings)
            reactor.run()
        } catch {
            fatalError("farcopy: \(error)")
        }
    }

    private func run() {
        ring.pollReadable(
            mailbox.eventDescriptor,
            UserData(kind: CompletionKind.wake, generation: 0, slot: 0))
        // Messages may have been left before the poll was armed.
        takeMessages()
        while !finished { turn() }
        stopping?()
    }

    private var finished: Bool {
        stopping != nil && openConnections == 0 && stores.inUse == 0 && openings.allSatisfy { $0 == nil }
    }

    private func turn() {
        reapCompletions()
        pollConnections()
        if resourcesFreed { retryStalled() }
        if !waitingDrains.isEmpty { startDrains() }
        if !deferredRanges.isEmpty { retryDeferredRanges() }
        if deferredStoresReady {
            deferredStoresReady = false
            retryDeferredStores()
        }
        pumpVolumes()
        sendReplies()
        if !quiesces.isEmpty { checkQuiesces() }
        tick()
        if polledCount > 0 || resourcesFreed || !dirtyConnections.isEmpty || backgroundDue || drainsDue {
            // While nothing but sockets and messages can complete, a look at the ring every few turns will do.
            turnsUnseen += 1
            if ring.hasQueued || stores.inUse > 0 || turnsUnseen >= Self.turnsBetweenLooks {
                turnsUnseen = 0
                ring.submitAndWait(milliseconds: 0)
            }
        } else if !finished {
            let longest = restingListeners.isEmpty ? 1000 : Limits.acceptPauseMilliseconds
            ring.submitAndWait(milliseconds: !held.isEmpty ? 5 : anyClock ? 20 : longest)
        }
    }

    // MARK: Completions

    private func reapCompletions() {
        var count: Int
        repeat {
            count = ring.reap(into: completions, capacity: Self.completionBatch)
            for index in 0..<count { handle(completions[index]) }
        } while count == Self.completionBatch
    }

    private func handle(_ completion: Completion) {
        let data = completion.userData
        switch data.kind {
        case CompletionKind.wake:
            takeMessages()
            if !completion.more {
                ring.pollReadable(mailbox.eventDescriptor, data)
            }
        case CompletionKind.accept: accepted(completion)
        case CompletionKind.receive: received(Int32(data.slot), completion.result)
        case CompletionKind.send: sent(Int32(data.slot), completion.result)
        case CompletionKind.opened: fileOpened(Int(data.slot), completion.result)
        case CompletionKind.store: storeCompleted(Int32(data.slot), completion.result)
        default: break
        }
    }

    private func takeMessages() {
        for message in mailbox.drain() {
            switch message {
            case .perform(let body): body(self)
            case .adopt(let handoff): adopt(handoff)
            case .drain(let drain): waitingDrains.append(drain)
            case .range(let range): startRange(range)
            case .stop(let done):
                stopping = done
                for listener in listeners.indices {
                    ring.cancel(
                        UserData(kind: CompletionKind.accept, generation: 0, slot: UInt32(listener)),
                        UserData(kind: CompletionKind.ignored, generation: 0, slot: 0))
                }
                closeConnections { _ in true }
            }
        }
    }

    // MARK: Listening

    /// Accepts clients of a listening socket; they stay here until their handshake names a volume.
    package func listen(on socket: OpenFile) {
        listeners.append(socket)
        armListener(listeners.count - 1)
    }

    private func armListener(_ index: Int) {
        ring.accept(
            listeners[index].descriptor,
            UserData(kind: CompletionKind.accept, generation: 0, slot: UInt32(index)))
    }

    private func accepted(_ completion: Completion) {
        if completion.result >= 0 {
            if stopping != nil { close(completion.result) } else { open(completion.result) }
        }
        guard !completion.more, stopping == nil else { return }
        let listener = Int(completion.userData.slot)
        guard [EMFILE, ENFILE, ENOBUFS, ENOMEM].contains(-completion.result) else { return armListener(listener) }
        // The client is still there: accepting at once would only fail again.
        refuse("a client waits at \(listeners[listener].path): \(String(cString: strerror(-completion.result)))")
        restingListeners.append(listener)
        acceptAgainAt = monotonicNanoseconds() + UInt64(Limits.acceptPauseMilliseconds) * 1_000_000
    }

    // MARK: Volumes

    /// Makes the engine of a volume; its chain and point are added before it is exported.
    package func host(_ setup: VolumeSetup) -> VolumeNumber {
        let count = setup.geometry.grainCount
        let header = BitmapHeader(.recording, volume: (0, 0), geometry: setup.geometry, bitmaps: 2)
        let memory = setup.recording.memory
        let volume = Volume(
            geometry: setup.geometry,
            bitmaps: (
                Bitmap(memory: memory + header.offset(ofBitmap: 0), count: count),
                Bitmap(memory: memory + header.offset(ofBitmap: 1), count: count)
            ),
            roles: (memory + BitmapHeader.rolesOffset).bindMemory(to: RecordingRoles.self, capacity: 1),
            copyBuffers: copyBuffers)
        volumes.append(HostedVolume(setup, volume: volume))
        awake.reserveCapacity(volumes.count)
        resting.reserveCapacity(volumes.count)
        held.reserveCapacity(volumes.count)
        return volumes.count - 1
    }

    /// Whoever asks for it may give it something to do: it is driven in this turn.
    package func hosted(_ number: VolumeNumber) -> HostedVolume {
        guard let hosted = volumes[number] else {
            invariantFailed("a volume's number names a hosted volume", #fileID, #line)
        }
        if !hosted.isAwake {
            hosted.isAwake = true
            awake.append(number)
        }
        return hosted
    }

    /// Some volume's background work goes on by the time.
    private var anyClock: Bool { awake.contains { volumes[$0]?.volume.followsClock == true } }

    /// Drives the volumes that may have something to do until none has anything to do at once.
    func pumpVolumes() {
        backgroundDue = false
        var index = 0
        // The list may grow: what one ends may be what another waited for.
        while index < awake.count {
            let number = awake[index]
            index += 1
            guard let hosted = volumes[number] else { continue }
            pump(number, hosted)
            hosted.isAwake = hosted.volume.mayGoOn
            if hosted.isAwake { resting.append(number) }
        }
        awake.removeAll(keepingCapacity: true)
        swap(&awake, &resting)
    }

    private func pump(_ number: VolumeNumber, _ hosted: HostedVolume) {
        if hosted.volume.followsClock { hosted.volume.advanceClock(to: monotonicNanoseconds()) }
        if hosted.volume.backgroundDue || hosted.volume.isStarved { hosted.volume.runBackground() }
        var busy = true
        while busy {
            busy = false
            while stores.hasRoom, let io = hosted.volume.popIO() {
                startStore(io, number, hosted)
                busy = true
            }
            while let slot = hosted.volume.popFinished() {
                finishedRequest(slot, number, hosted)
                busy = true
            }
        }
        while let event = hosted.volume.popEvent() { onEvent?(hosted.name, event) }
        if hosted.volume.backgroundDue, stores.hasRoom { backgroundDue = true }
    }

    private func finishedRequest(_ slot: Int32, _ number: VolumeNumber, _ hosted: HostedVolume) {
        let owner = RequestOwner(rawValue: hosted.volume.request(slot).pointee.owner)
        if owner.isRange {
            finishRange(Int(owner.slot), slot, hosted)
        } else if owner.isDrain {
            finishDrain(Int(owner.slot), slot, hosted)
        } else {
            replyReady(slot, hosted, owner)
        }
    }

    // MARK: Quiescing

    /// Ends connections of a volume and calls `done` when none of their requests is in flight any more.
    package func disconnect(_ number: VolumeNumber, _ clients: Clients, done: @escaping @Sendable () -> Void) {
        var present: [(slot: Int32, generation: UInt32)] = []
        for slot in 0..<Limits.connectionsPerReactor {
            if case .free = connections[slot].phase { continue }
            guard connections[slot].volume == number, clients.include(connections[slot]) else { continue }
            present.append((Int32(slot), connections[slot].generation))
        }
        closeConnections { $0.volume == number && clients.include($0) }
        quiesces.append(Quiesce(connections: present, done: done))
    }

    /// A client that has the volume itself open.
    package struct Host: Sendable {
        package var from: String
        package var mayWrite: Bool
    }

    package func hosts(of number: VolumeNumber) -> [Host] {
        guard openConnections > 0 else { return [] }
        var hosts: [Host] = []
        for slot in 0..<Limits.connectionsPerReactor {
            let connection = connections[slot]
            guard case .transmission(let limits) = connection.phase, connection.volume == number,
                Clients.hosts.include(connection)
            else { continue }
            hosts.append(Host(from: connection.client.text, mayWrite: !limits.readOnly))
        }
        return hosts
    }

    /// Ends the connections that have a copy open.
    package func disconnectReaders(_ number: VolumeNumber, of copy: CopyID) {
        closeConnections { $0.volume == number && $0.view == .copy(copy) }
    }

    private func closeConnections(where matching: (Connection) -> Bool) {
        guard openConnections > 0 else { return }
        for slot in 0..<Limits.connectionsPerReactor {
            if case .free = connections[slot].phase { continue }
            if matching(connections[slot]) { beginClosing(Int32(slot)) }
        }
    }

    private func checkQuiesces() {
        quiesces.removeAll { quiesce in
            for (slot, generation) in quiesce.connections {
                if case .free = connections[Int(slot)].phase { continue }
                if connections[Int(slot)].generation == generation { return false }
            }
            quiesce.done()
            return true
        }
    }

    // MARK: Time

    /// Once a second: handshakes that take too long, payloads that stop while others wait for memory.
    /// Whenever a hold is on: its deadline.
    private func tick() {
        let now = monotonicNanoseconds()
        if !held.isEmpty { endHolds(now) }
        if !restingListeners.isEmpty, now >= acceptAgainAt, stopping == nil {
            for listener in restingListeners { armListener(listener) }
            restingListeners = []
        }
        if !openings.isEmpty { retryOpenings(now) }
        guard now >= nextTick else { return }
        nextTick = now + 1_000_000_000
        if now >= nextSweep {
            nextSweep = now + UInt64(Limits.activitySweepSeconds) * 1_000_000_000
            for number in volumes.indices { hosted(number).volume.sweepActivity() }
        }
        guard openConnections > 0 else { return }
        let second: UInt64 = 1_000_000_000
        for slot in 0..<Limits.connectionsPerReactor {
            switch connections[slot].phase {
            case .handshake, .securing, .departing, .farewell:
                let limit = settings.budget.limits.handshakeSeconds
                if now - connections[slot].openedAt > UInt64(limit) * second {
                    refuse("refused \(connections[slot].client.text): no export chosen within \(limit) s")
                    beginClosing(Int32(slot))
                }
            case .transmission:
                let waits = connections[slot].payloadRequest >= 0 || connections[slot].sendArmed
                if waits, !stalledConnections.isEmpty,
                    now - connections[slot].lastProgress > UInt64(Limits.stalledClientSeconds) * second
                {
                    beginClosing(Int32(slot))
                }
            case .free, .closing: break
            }
        }
    }

    // MARK: Points

    /// Forms the volume's part of a point, while its acknowledgements are held (see `Volume.formPoint`).
    package func formPoint(_ number: VolumeNumber, point: UInt64, in place: HoldPlace) {
        let hosted = hosted(number)
        guard hosted.volume.mayFormPoint else {
            // A restore began meanwhile: hosts see the restored data before it is there, and a drain would send what was.
            hosted.holdExpired = true
            return
        }
        hosted.volume.formPoint(number: point, in: place)
    }

    /// Holds acknowledgements while something is done on several volumes (`holdTogether`).
    package func hold(
        _ number: VolumeNumber, nanoseconds: UInt64 = UInt64(Limits.holdMilliseconds) * 1_000_000
    ) {
        let (hosted, now) = (hosted(number), monotonicNanoseconds())
        if !held.contains(number) { held.append(number) }
        if hosted.holders == 0 {
            hosted.holdExpired = false
            hosted.heldSince = now
        }
        // Of several who hold, whoever waits the shortest decides.
        hosted.holdDeadline = min(hosted.holders > 0 ? hosted.holdDeadline : .max, now + nanoseconds)
        hosted.holders += 1
        hosted.volume.holdAcknowledgements()
    }

    /// At the deadline acknowledgements go by themselves.
    private func endHolds(_ now: UInt64) {
        for number in held where volumes[number]!.volume.holding && now > volumes[number]!.holdDeadline {
            let hosted = hosted(number)
            hosted.holdExpired = true
            hosted.volume.releaseHold()
        }
        held.removeAll { volumes[$0]?.volume.holding != true }
    }

    /// How long acknowledgements of a volume have been held, in nanoseconds.
    package func heldFor(_ number: VolumeNumber) -> UInt64 { monotonicNanoseconds() - hosted(number).heldSince }

    /// Ends one hold; acknowledgements go once no other holds them. False when the deadline had let go already, and the
    /// cut is not closed.
    package func releaseHold(_ number: VolumeNumber) -> Bool {
        let hosted = hosted(number)
        invariant(hosted.holders > 0, "a hold is released once")
        hosted.holders -= 1
        if hosted.holders == 0 { hosted.volume.releaseHold() }
        return !hosted.holdExpired
    }

    /// Asks the reactor to finish: connections end, I/O in flight completes, then `done` is called and the thread ends.
    package static func stop(_ handle: ReactorHandle, done: @escaping @Sendable () -> Void) {
        handle.leave(.stop(done))
    }
}

/// A free function: a thread's entry must not inherit an actor's isolation.
private nonisolated func reactorMain(
    number: Int, mailbox: Mailbox<ReactorMessage>, exports: ExportDirectory, settings: ReactorSettings
) {
    Reactor.main(number: number, mailbox: mailbox, exports: exports, settings: settings)
}

/// Whose request it is, packed into `Request.owner`.
struct RequestOwner {
    var rawValue: UInt64
    init(rawValue: UInt64) { self.rawValue = rawValue }
    init(connection slot: Int32, generation: UInt32) {
        rawValue = UInt64(generation & 0x3FFF_FFFF) << 32 | UInt64(UInt32(bitPattern: slot))
    }
    init(drain slot: Int) { rawValue = 1 << 63 | UInt64(slot) }
    init(range slot: Int) { rawValue = 3 << 62 | UInt64(slot) }
    var isDrain: Bool { rawValue >> 62 == 2 }
    var isRange: Bool { rawValue >> 62 == 3 }
    var slot: Int32 { Int32(truncatingIfNeeded: rawValue & 0x7FFF_FFFF) }
}
