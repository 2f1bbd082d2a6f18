// Replicator.swift: the primary's half of a group on its thread: link and session, and what the cycle asks for: reads from the volumes'
// reactors, sends over libnbd, the peer's control API through `PeerClient`.
//
// Must be prevented:
//   an answer that belongs to an earlier drain or link is taken for one of the present (epochs)
//   a buffer is reused while a reactor still reads into it (each drain has its own buffers until all answered)

import Base
import Glibc
import Groups
import NBDProtocol
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
    package var hold: HoldPlace
    /// Nil when that is memory.
    package var target: HoldTarget?
    /// CR and OOS.
    package var recording: MappedFile

    package init(
        name: String, reactor: ReactorHandle, number: VolumeNumber, geometry: Geometry,
        hold: HoldPlace, target: HoldTarget?, recording: MappedFile
    ) {
        self.name = name
        self.reactor = reactor
        self.number = number
        self.geometry = geometry
        self.hold = hold
        self.target = target
        self.recording = recording
    }

    package var place: ServedVolume { ServedVolume(reactor, number) }
}

/// A FlashCopy target, or an intermediate, and which grains of the point are there: behind the file's header.
package struct HoldTarget: Sendable {
    package var file: OpenFile
    package var preserved: MappedFile
    package var intermediate: Intermediate?
    /// Puts what an intermediate has, and what its bitmaps say, on stable storage; nil for a target, from which nobody reads after power loss.
    package var flush: (@Sendable () async throws -> Void)?

    package init(
        file: OpenFile, preserved: MappedFile, intermediate: Intermediate? = nil,
        flush: (@Sendable () async throws -> Void)? = nil
    ) {
        (self.file, self.preserved) = (file, preserved)
        (self.intermediate, self.flush) = (intermediate, flush)
    }

    package func bitmap(_ geometry: Geometry) -> Bitmap {
        Bitmap(memory: preserved.memory + BitmapHeader.byteCount, count: geometry.grainCount)
    }
}

/// The peer's control API.
package protocol PeerClient: Sendable {
    func openSession(volumes: [(name: String, size: UInt64)], record: GroupRecord) async throws
        -> (state: PeerState, exports: [String])
    func commit(session: UInt64, number: UInt64, previous: UInt64?, formedAt: Double) async throws
        -> Double
    /// Checksums (`Digest`) of a range of the secondary, in blocks; nil when this peer has none to give.
    func checksums(session: UInt64, volume: String, offset: UInt64, length: Int, block: Int) async throws -> [UInt8]?
}

package final class Replicator {
    package struct Configuration: Sendable {
        package var settings: Cycle.Settings
        package var volumes: [ReplicatedVolume]
        package var address: Address
        package var tls: LinkTLS
        package var peer: any PeerClient
        /// Hosts may wait for what is sent.
        var sendsFirst: Bool { volumes.contains { $0.target == nil } }
        package var connectionsPerVolume: Int
        package var compare: ComparePolicy
        /// Seconds after which a peer that acknowledges nothing has stalled.
        package var stallTimeout: Double
        /// Bytes a second; 0 = unbounded.
        package var rate: UInt64
        package var log: @Sendable (String) -> Void
        /// The peer refuses this site; perhaps it has taken over.
        package var refused: @Sendable () -> Void
        /// Several hosts, where points are formed from here.
        package var others: (any CoordinationClient)?
        /// Several hosts, where points are formed from elsewhere: asks for one, and says why that was not possible.
        package var asksForPoint: (@Sendable () async -> String?)?

        package init(
            settings: Cycle.Settings, volumes: [ReplicatedVolume],
            address: Address, tls: LinkTLS, peer: any PeerClient, connectionsPerVolume: Int,
            compare: ComparePolicy, stallTimeout: Double, rate: UInt64,
            log: @escaping @Sendable (String) -> Void, refused: @escaping @Sendable () -> Void,
            others: (any CoordinationClient)? = nil, asksForPoint: (@Sendable () async -> String?)? = nil
        ) {
            (self.others, self.asksForPoint) = (others, asksForPoint)
            self.settings = settings
            self.volumes = volumes
            self.address = address
            self.tls = tls
            self.peer = peer
            self.connectionsPerVolume = connectionsPerVolume
            self.compare = compare
            self.stallTimeout = stallTimeout
            self.rate = rate
            self.log = log
            self.refused = refused
        }
    }

    /// Whose thread this is on, and who lets it go before it ends.
    private unowned let group: GroupThread
    private let configuration: Configuration
    /// Changes with every link and every drain; answers of earlier ones are dropped.
    private(set) var epoch: UInt64
    private let firstEpoch: UInt64
    private var link: NBDLink?
    private var linkDeadline: UInt64 = 0
    /// The session that the link is being made for; nil once it is ready.
    private var peerState: PeerState?
    private var session: UInt64?
    private let sender: Sender
    private let conversations: Conversations?
    /// Acknowledgements are held for a point of several hosts.
    private var isHolding = false
    private var flushesLeft = 0
    private var lastFigures: UInt64 = 0
    private var bytesAtFigures: UInt64 = 0
    private var lastState = ""
    private var lastHoldUp: String?
    private static let connectSeconds: UInt64 = 10
    /// When the peer was asked for the commit that it has not answered; 0 = for none.
    private var commitAskedAt: UInt64 = 0
    private static let silenceNanoseconds: UInt64 = 2_000_000_000

    private var window: Int { configuration.settings.window }

    /// - Parameter epoch: higher than any before on this thread.
    init(_ group: GroupThread, _ configuration: Configuration, epoch: UInt64) {
        self.group = group
        self.configuration = configuration
        self.epoch = epoch
        firstEpoch = epoch
        sender = Sender(configuration, group.mailbox)
        conversations = configuration.others.map { Conversations($0, group.mailbox) }
    }

    // MARK: Waiting

    func pollEntries() -> [pollfd] { link?.pollEntries() ?? [] }
    func notify(_ entries: ArraySlice<pollfd>) { link?.notify(entries) }

    /// Nanoseconds until something must be put on the wire; nil = nothing waits.
    var wait: UInt64? { link == nil ? nil : sender.wait }

    /// What the link has to say, and what may go over it now.
    func service() {
        serviceLink()
        if let link, peerState == nil, !sender.pump(link) {
            group.handle(.linkLost("\(LinkConnection.failure("send"))"))
        }
    }

    // MARK: Answers

    func opened(_ state: PeerState, _ exports: [String], _ asker: UInt64) {
        if asker == epoch { connect(state, exports) }
    }

    func drained(_ slot: Int, _ answer: DrainRead.Answer, _ asker: UInt64) {
        guard asker >= firstEpoch else { return }  // another's read, from when this one had not begun
        sender.readEnded()
        if asker == epoch, let event = sender.drained(slot, answer) { group.handle(event) }
    }

    func compared(_ slot: Int, _ digests: [UInt8], _ asker: UInt64) {
        if asker == epoch, let event = sender.compared(slot, digests) { group.handle(event) }
    }

    func marked(_ asker: UInt64) { if asker == epoch { makeMarksDurable() } }
    func released(_ changed: Bool, _ used: [Int], _ asker: UInt64) {
        if asker == epoch { clearPreserved(used, changed: changed) }
    }
    func setRate(_ rate: UInt64) { sender.bucket.rate = rate }

    func event(_ event: Cycle.Event, _ asker: UInt64) {
        if case .committed = event, asker == epoch { commitAskedAt = 0 }
        let isOfLink =
            switch event {
            // Whatever has become of the link: acknowledgements are held, or go.
            case .held, .letGo: false
            default: true
            }
        if asker == 0 || (isOfLink ? asker == epoch : asker >= firstEpoch) { group.handle(event) }
        if case .gaveUp = event { freeTargets() }
    }

    // MARK: Link

    /// Nothing more comes from it.
    func closeLink() {
        epoch += 1
        if link != nil, configuration.sendsFirst { onEveryVolume { $0.hosted($1.number).volume.cannotSendFirst() } }
        link = nil
        peerState = nil
        session = nil
        commitAskedAt = 0
    }

    private func openSession() {
        epoch += 1
        let asker = epoch
        let volumes = configuration.volumes.map { (name: $0.name, size: $0.geometry.size) }
        let record = group.record
        let peer = configuration.peer
        let mailbox = group.mailbox
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
        guard exports.count == configuration.volumes.count else {
            let words = "the peer names \(exports.count) exports for \(configuration.volumes.count) volumes"
            return group.handle(.sessionFailed(words, retry: false))
        }
        do {
            link = try NBDLink(
                address: configuration.address, tls: configuration.tls, exports: exports,
                connectionsPerVolume: configuration.connectionsPerVolume, window: window)
            peerState = state
            session = state.session
            linkDeadline = monotonicNanoseconds() + Self.connectSeconds * 1_000_000_000
        } catch {
            group.handle(.sessionFailed("\(error)", retry: true))
        }
    }

    private func serviceLink() {
        guard let link else { return }
        if let state = peerState {
            if link.isReady {
                peerState = nil
                sender.begin()
                if let problem = tooSmall(link) {
                    group.handle(.sessionFailed(problem, retry: false))
                } else {
                    group.handle(.sessionOpened(state))
                }
            } else if link.hasFailed || monotonicNanoseconds() > linkDeadline {
                peerState = nil
                let reason = LinkConnection.failure("connect to the peer's NBD server")
                group.handle(.sessionFailed("\(reason)", retry: true))
            }
            return
        }
        reapCompletions(link)
        guard self.link === link else { return }
        if link.hasFailed {
            group.handle(.linkLost("the connection to the peer ended"))
        } else if sender.hasStalled(link) {
            group.handle(.linkLost("the peer acknowledged nothing for \(configuration.stallTimeout) s"))
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
                group.handle(.linkLost("the peer answered \(String(cString: strerror(error)))"))
            } else if index < window * NBDLink.partsPerSlot {
                if let event = sender.acknowledged(index) {
                    group.adapt(sender.pace)
                    group.handle(event)
                }
            } else {
                sender.noteProgress()
                flushEnded()
            }
        }
    }

    // MARK: Actions

    func perform(_ action: Cycle.Action) {
        switch action {
        case .openSession: openSession()
        case .closeLink: closeLink()
        case .prepare: prepare()
        case .form(let number): form(number)
        case .rewind: rewind()
        case .move(let action): perform(action)
        case .commit(let number, let previous, let formedAt): commit(number, previous, formedAt)
        case .endPoint(let number): endPoint(number)
        case .giveUp: giveUp()
        case .markAllChanged(let names): markAllChanged(names)
        case .survey: surveyOwn()
        case .askHost(let host, let message): conversations?.ask(host: host, message)
        case .askRemote(let remote, let message): conversations?.ask(remote: remote, message)
        case .answer(let answer): group.answered(answer)
        case .holdAndForm(let number): holdAndForm(number)
        case .letGo: letGo()
        case .contradicted(let words): configuration.log("a message that cannot be: \(words)")
        }
    }

    // MARK: Several hosts

    /// Nothing more is asked, and nobody is held.
    func endCoordination() {
        conversations?.end()
        letGo()
    }

    /// This site forms no points any more.
    func endConversations() { conversations?.end() }

    /// Somebody here waits for a point, which is formed from elsewhere.
    func askForPoint() {
        guard let asks = configuration.asksForPoint else { return }
        let mailbox = group.mailbox
        Task { if let problem = await asks() { mailbox.send(.noPoint(problem)) } }
    }

    func callAnswered(host: Int) { conversations?.answered(host: host) }

    func callEnded(host: Int?, remote: Int?, isReached: Bool, problem: String?) {
        conversations?.ended(host: host, remote: remote, isReached: isReached, problem: problem)
    }

    /// Why remotes that the coordinator here asks do not answer.
    var remotesProblem: String? { conversations?.problem }

    private func surveyOwn() {
        let (mailbox, asker) = (group.mailbox, epoch)
        survey { mailbox.send(.ownSurvey($0, epoch: asker)) }
    }

    /// The coordinator's own host has said how it stands; the others are asked.
    func surveyed(_ survey: Survey, _ asker: UInt64) {
        guard asker == epoch else { return }
        conversations?.survey(own: survey)
    }

    /// Whether the volumes can form a point, and have anything for it.
    func survey(_ answer: @escaping @Sendable (Survey) -> Void) {
        let volumes = configuration.volumes
        let highest = group.record.highestPoint
        let changed = NotedVolumes()
        onEvery(volumes.map(\.place)) { reactor, index in
            let volume = reactor.hosted(volumes[index].number).volume
            if volume.changedGrains > 0 { changed.note(index) }
            return volume.mayFormPoint
        } done: { _, mayForm in
            answer(
                Survey(
                    changed: !changed.all.isEmpty, problem: mayForm ? nil : Cycle.busyVolume, highest: highest))
        }
    }

    private func holdAndForm(_ number: UInt64) {
        let mailbox = group.mailbox
        let changed = NotedVolumes()
        isHolding = true
        let asker = epoch
        holdOn(
            configuration.volumes.map(\.place), nanoseconds: configuration.settings.part.maxHold,
            take: formPart(number, changed)
        ) { at in
            mailbox.send(.event(.held(at: at, changed: changed.all), epoch: asker))
        }
    }

    /// What each volume does, and whether it has something to send, in one turn: it may lose the point before acknowledgements go, and has
    /// nothing to send any more then.
    private func formPart(_ number: UInt64, _ changed: NotedVolumes) -> @Sendable (Reactor, Int) -> Void {
        let volumes = configuration.volumes
        let alongside = group.alongside(number)
        return { reactor, index in
            let volume = volumes[index]
            reactor.formPoint(volume.number, point: number, in: volume.hold)
            if reactor.hosted(volume.number).volume.outOfSyncGrains > 0 { changed.note(index) }
            alongside?(reactor, index)
        }
    }

    private func letGo() {
        guard isHolding else { return }
        isHolding = false
        let mailbox = group.mailbox
        let handle = group.handle
        let asker = epoch
        releaseTogether(configuration.volumes.map(\.place)) { outcome in
            handle.noteHold(outcome.nanoseconds)
            mailbox.send(.event(.letGo(intact: outcome.isIntact), epoch: asker))
        }
    }

    /// Every reactor must have let go of the point before, whose end may still be in its mailbox, before the bitmaps of
    /// preserved grains are cleared for the next.
    private func prepare() {
        let mailbox = group.mailbox
        let asker = epoch
        let volumes = configuration.volumes
        onEvery(volumes.map(\.place)) { reactor, index in
            reactor.hosted(volumes[index].number).volume.mayFormPoint
        } done: { reactor, whole in
            guard whole else {
                mailbox.send(.event(.notReady, epoch: asker))
                return
            }
            let used = NotedVolumes()
            onEvery(volumes.map(\.place), from: reactor) { reactor, index in
                let volume = reactor.hosted(volumes[index].number).volume
                volume.prepareHold(volumes[index].hold)
                if volume.pointBitmapIsDirty, volumes[index].target != nil { used.note(index) }
                return volume.changedGrains == 0
            } done: { _, unchanged in
                mailbox.send(.released(changed: !unchanged, used: used.all, epoch: asker))
            }
        }
    }

    private func clearPreserved(_ used: [Int], changed: Bool) {
        for index in used {
            let volume = configuration.volumes[index]
            volume.target?.bitmap(volume.geometry).clearAll()
            volume.target?.intermediate?.forgetCommitted()
        }
        group.handle(.prepared(changed: changed))
    }

    /// Where nothing is asked of them.
    private func onEveryVolume(
        _ body: @escaping @Sendable (Reactor, ReplicatedVolume) -> Void, done: @escaping @Sendable () -> Void = {}
    ) {
        let volumes = configuration.volumes
        onEvery(volumes.map(\.place)) { reactor, index in
            body(reactor, volumes[index])
            return true
        } done: { _, _ in
            done()
        }
    }

    private func markAllChanged(_ names: [String]?) {
        let mailbox = group.mailbox
        let asker = epoch
        onEveryVolume { reactor, volume in
            if names?.contains(volume.name) != false { reactor.hosted(volume.number).volume.markAllChanged() }
        } done: {
            mailbox.send(.marked(epoch: asker))
        }
    }

    /// The lineage is saved next, and says that the bitmaps describe the difference to the peer: they are on stable storage before.
    private func makeMarksDurable() {
        do {
            for volume in configuration.volumes { try volume.recording.synchronize() }
            group.handle(.allMarked)
        } catch {
            group.handle(.linkLost("\(error)"))
        }
    }

    private func form(_ number: UInt64) {
        let mailbox = group.mailbox
        let asker = epoch
        let handle = group.handle
        let changed = NotedVolumes()
        holdTogether(configuration.volumes.map(\.place), take: formPart(number, changed)) { outcome in
            handle.noteHold(outcome.nanoseconds)
            mailbox.send(
                .event(.formed(at: outcome.at, intact: outcome.isIntact, changed: changed.all), epoch: asker))
        }
    }

    private func rewind() {
        epoch += 1
        onEveryVolume { $0.rewindDrain($1.number) }
    }

    private func giveUp() {
        let mailbox = group.mailbox
        epoch += 1
        let asker = epoch
        onEveryVolume { reactor, volume in
            reactor.hosted(volume.number).volume.giveUpPoint()
        } done: {
            mailbox.send(.event(.gaveUp, epoch: asker))
        }
    }

    /// After the record says that no point is held: nobody reads the targets any more.
    private func freeTargets() {
        guard group.record.held == nil, group.record.forming == nil else { return }
        for volume in configuration.volumes where volume.target?.intermediate == nil {
            // A failure costs space, not data; the next point writes over what is there.
            try? volume.target?.file.truncate(to: 0)
            try? volume.target?.file.truncate(to: volume.geometry.size)
        }
    }

    private func endPoint(_ number: UInt64) {
        onEveryVolume { $0.hosted($1.number).volume.endPoint(number: number) }
    }

    private func commit(_ number: UInt64, _ previous: UInt64?, _ formedAt: Double) {
        let mailbox = group.mailbox
        let asker = epoch
        let peer = configuration.peer
        guard let session else { return group.handle(.linkLost("the session is closed")) }
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

    private func perform(_ action: MoveAction) {
        switch action {
        case .read(let slot, let volume):
            guard let point = group.record.held?.number else { return }
            if let event = sender.read(slot, volume, point: point, epoch: epoch) { group.handle(event) }
        case .send(let slot, _, let offset, let length, let urgent):
            guard let session else { return group.handle(.linkLost("the link is closed")) }
            sender.send(
                slot, offset, length, urgent: urgent, session: session, epoch: epoch,
                isSeeded: group.record.primary?.fromImage == true)
        case .hurry(let volume): sender.hurry(volume)
        case .flush(let volumes): flush(volumes)
        case .clear(let runs): clear(runs)
        }
    }

    /// On every connection of these volumes: each covers what was acknowledged on it. Their intermediates are flushed as well.
    private func flush(_ volumes: [Int]) {
        guard let link else { return group.handle(.linkLost("the link is closed")) }
        flushesLeft = volumes.reduce(0) { $0 + link.connections[$1].count }
        for volume in volumes { flushIntermediate(of: volume) }
        for volume in volumes {
            guard link.flush(volume, firstCompletion: window * NBDLink.partsPerSlot) else {
                return group.handle(.linkLost("\(LinkConnection.failure("flush"))"))
            }
        }
    }

    private func flushIntermediate(of index: Int) {
        let volume = configuration.volumes[index]
        guard let flush = volume.target?.flush, let point = group.record.held?.number else { return }
        flushesLeft += 1
        let (mailbox, asker) = (group.mailbox, epoch)
        Task {
            do {
                try await flush()
                mailbox.send(.intermediateFlushed(epoch: asker))
            } catch {
                let words = "volume \(volume.name): its change volume could not be flushed: \(error)"
                mailbox.send(.event(.pointLost(words, number: point), epoch: asker))
            }
        }
    }

    func intermediateFlushed(_ asker: UInt64) { if asker == epoch { flushEnded() } }

    private func flushEnded() {
        flushesLeft -= 1
        if flushesLeft == 0 { group.handle(.move(.flushed)) }
    }

    private func clear(_ runs: [VolumeRun]) {
        guard let point = group.record.held?.number else { return }
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

    /// The figures of the link; says in the log when the state is another.
    func tell(_ state: ShownState, _ reason: String?, in status: inout GroupStatus) {
        if "\(state.rawValue) \(reason ?? "")" != lastState {
            lastState = "\(state.rawValue) \(reason ?? "")"
            configuration.log(reason.map { "\(state.rawValue): \($0)" } ?? state.rawValue)
        }
        if status.holdUp != lastHoldUp {
            lastHoldUp = status.holdUp
            configuration.log(lastHoldUp ?? "points are formed, of all hosts")
        }
        let now = monotonicNanoseconds()
        if now - lastFigures > 1_000_000_000 {
            status.bytesPerSecond = Double(sender.bytesSent - bytesAtFigures) / (Double(now - lastFigures) / 1e9)
            bytesAtFigures = sender.bytesSent
            lastFigures = now
        }
        let silence = max(
            link.map { peerState == nil ? sender.silence($0) : 0 } ?? 0, commitAskedAt > 0 ? now - commitAskedAt : 0)
        let isSilent = silence > Self.silenceNanoseconds
        if isSilent { status.bytesPerSecond = 0 }
        status.silentSeconds = isSilent ? Double(silence) / 1e9 : nil
        status.windowBytes = sender.flow.bytes
        status.bytesSpared = sender.bytesSpared
    }
}

/// Volumes of which reactors say something, by their indices.
private final class NotedVolumes: Sendable {
    private let indices = Mutex<[Int]>([])
    var all: [Int] { indices.withLock { $0.sorted() } }
    func note(_ index: Int) { indices.withLock { $0.append(index) } }
}
