// Cycle.swift: the primary's half of a group: its session with the peer, and when a point is wanted. What becomes of a point a coordinator
// and a participant say (CyclePoints.swift).
//
// A state machine without I/O: events in, actions out. A thread with libnbd drives it, and so does the simulator.
//
// Must be prevented:
//   a point is formed while the one before is still held (staggering)
//   a point that was formed for one copy is sent to another, which lacks what this point does not have
//   the bitmaps are trusted against a secondary that they do not describe
//   an answer is waited for that belongs to a link which was closed since: closing one voids whatever is under way
//   something is done that relies on a record which could not be saved: it stands in `Turn.after`, which is dropped when the save fails,
//     and `saveFailed` says so
//
// The record is the group's (`Group`); what happens to it here is part of a step.

import Base

package enum Interval: Sendable, Equatable {
    case continuous
    /// Nanoseconds from one forming to the next.
    case every(UInt64)
    /// Only on command.
    case manual
}

package struct Cycle {
    package enum Event {
        case tick
        case sessionOpened(PeerState)
        /// `retry`: whether trying again may help.
        case sessionFailed(String, retry: Bool)
        case linkLost(String)
        case allMarked
        /// `changed`: some volume was written to since the last point.
        case prepared(changed: Bool)
        /// A volume cannot form a point just now: it is being restored from a FlashCopy, so that a point would be neither what
        /// was nor what hosts see; or the bits of the point before are not yet merged back.
        case notReady
        /// Every volume has formed, and acknowledgements go again; `intact`: none let go before all had formed.
        ///
        /// `changed`: volumes that have something to send.
        case formed(at: Double, intact: Bool, changed: [Int])
        case move(MoveEvent)
        case committed(at: Double)
        case commitRefused(String)
        /// A volume could not hold the point of that number, or its data could not be read; nil = whichever is at hand is given up by command.
        case pointLost(String, number: UInt64? = nil)
        case gaveUp
        case suspend
        case resume
        /// A point is wanted now.
        case request

        // Of a group with several hosts.
        /// The group's coordinator asks this host.
        case asked(HostMessage)
        /// Another host's answer to the coordinator here.
        case host(Int, Stamped<HostAnswer>)
        /// A remote's; `at`: when it committed, in seconds since 1970.
        case remote(Int, Stamped<RemoteAnswer>, at: Double?)
        /// How the hosts stand.
        case surveyed(Survey)
        /// Another host cannot be reached, and the group goes on without it.
        case hostLost(Int)
        /// Every volume has formed, and acknowledgements are held.
        case held(at: Double, changed: [Int])
        /// They go; `intact`: they were held until now on every volume.
        case letGo(intact: Bool)
    }

    package enum Action: Equatable, Sendable {
        case openSession
        case closeLink
        /// Make the targets and bitmaps of the next point ready.
        case prepare(number: UInt64)
        /// Hold acknowledgements and form on every volume; when all have, let go.
        case form(number: UInt64)
        case rewind
        case move(MoveAction)
        case commit(number: UInt64, previous: UInt64?, formedAt: Double)
        case endPoint(number: UInt64)
        /// Merge the bits of a held or half-formed point back.
        case giveUp
        /// Every grain of these volumes, or of all.
        case markAllChanged([String]?)

        // Of a group with several hosts.
        /// Whether anything has changed at any host, and whether all of them can form a point.
        case survey
        case askHost(Int, HostMessage)
        case askRemote(Int, RemoteMessage)
        /// To the group's coordinator.
        case answer(Stamped<HostAnswer>)
        /// Hold acknowledgements and form on every volume; they stay held.
        case holdAndForm(number: UInt64)
        case letGo
        /// Something came that cannot be.
        case contradicted(String)
    }

    package enum State {
        /// By command; or because trying again cannot help.
        case stopped(String)
        case offline(String, retryAt: UInt64)
        case connecting
        /// Every grain is being marked for a secondary that the bitmaps say nothing about.
        case marking(PeerState)
        case idle
        /// The hosts are asked how they stand.
        case surveying
        case preparing(UInt64)
        /// The coordinator has a point under way.
        case atPoint(Work)
        /// Something is given up first.
        case givingUp(Next)
    }

    /// What the link does for the point.
    package enum Work {
        /// Nothing yet: it forms.
        case none
        case moves(any Mover)
        /// The peer was asked for the commit.
        case commits
    }

    package enum Next {
        case stop(String)
        case retry(String)
        case connect
        case carryOn

        var reason: String {
            switch self {
            case .stop(let reason), .retry(let reason): reason
            case .connect, .carryOn: "it cannot be gone on with"
            }
        }
    }

    package struct Settings: Sendable {
        package var mode: Mode
        package var interval: Interval
        package var volumes: Int
        package var window: Int
        package var checkpointBytes: Int
        package var part: Part
        package init(
            mode: Mode = .flashcopy, interval: Interval, volumes: Int, window: Int = 16,
            checkpointBytes: Int = 64 << 20, part: Part = .alone
        ) {
            self.part = part
            self.mode = mode
            self.interval = interval
            self.volumes = volumes
            self.window = window
            self.checkpointBytes = checkpointBytes
        }
    }

    static let suspended = Next.stop("suspended by the operator")
    package let settings: Settings
    package internal(set) var state = State.connecting
    var coordinator: Coordinator
    var participant: Participant
    /// When the point that is at hand was formed, in seconds since 1970, and the volumes that have something to send of it.
    var formed: (at: Double, changed: [Int]) = (0, [])
    /// There was a suspension after the last commit.
    var resyncing = false
    private var lastFailure: String?
    var dueAt: UInt64 = 0
    var requested = false
    /// Several hosts: `run` was said, and acknowledgements are just let go.
    var runs: HostMessage?
    /// Several hosts, at the coordinator: why points are not formed; nil while they are.
    package internal(set) var holdUp: String? {
        didSet { if (holdUp == nil) != (oldValue == nil) { heldUpSince = nil } }
    }
    var heldUpSince: UInt64?
    var isQuiet = false
    /// Several hosts: points are formed from here.
    package internal(set) var coordinates = false
    /// When a remote has committed the last point, in seconds since 1970, and how many points were given up since.
    var committedAt: Double?
    /// When a coordinator here whose epoch is too old takes up anew.
    var takeUpAt: UInt64?
    var pauses = 0
    /// While a volume is not ready no point is formed; asked again after `readyRetry`.
    var notBefore: UInt64 = 0
    static let readyRetry: UInt64 = 50_000_000
    var attempt = 0
    /// The driver adapts it to the link.
    package var pace: MovePace
    /// A link lost for longer than this ends the point that is held, so that its target stops growing.
    package static let heldLimit: UInt64 = 30_000_000_000
    private var lostAt: UInt64?
    /// Several hosts: a point was committed since the peer was asked for a session, and its answer may not have it.
    var committedMeanwhile = false
    /// Continuous cycles form at most one point in this time, and while nothing changes one in the longer time.
    package static let shortestCycle: UInt64 = 50_000_000
    /// A thread wakes a little late every time; the next point does not wait for that as well.
    private static let longestCatchUp: UInt64 = 5_000_000
    package static let longestIdle: UInt64 = 1_000_000_000
    var preparedAt: UInt64 = 0

    package init(settings: Settings, _ record: GroupRecord) {
        self.settings = settings
        pace = MovePace(limit: settings.window, checkpointBytes: settings.checkpointBytes)
        coordinator = Coordinator(settings.part.coordination, record: record.coordination(of: settings.part))
        participant = Participant(settings.part.coordination, record: record.participation(of: settings.part))
        coordinates = settings.part.coordinatesFromTheStart
    }

    /// First actions after a start of the process. Every volume holds the point that the record says is held (`mustGiveUpPoint`).
    mutating func start(_ record: inout GroupRecord, now: UInt64) -> Turn<Action> {
        let taken = takeUp(&record, now)
        if record.suspendedByOperator {
            if isOfSeveral { return taken + suspend(&record, now) }
            guard participant.state == .idle else { return taken + giveUp(Self.suspended, &record, now) }
            state = .stopped(Self.suspended.reason)
            return taken
        }
        guard !isGivingUp else {
            state = .givingUp(.connect)
            return taken
        }
        return Turn([.openSession]) + taken
    }

    /// The number that a point formed for a request made now will have at least.
    func nextNumber(_ record: GroupRecord) -> UInt64 {
        switch state {
        case .preparing(let number): number
        default: record.lastNumber + 1
        }
    }

    /// Why mirroring does not go on; nil while it does.
    package var suspension: String? {
        switch state {
        case .stopped(let reason), .offline(let reason, _): reason
        case .givingUp(.stop(let reason)), .givingUp(.retry(let reason)): reason
        case .connecting: lastFailure
        default: nil
        }
    }

    /// When `tick` must come at the latest; nil = no need.
    func wakeAt(_ record: GroupRecord) -> UInt64? {
        if isOfSeveral { return wakeAtOfSeveral(record) }
        return ownWakeAt(record)
    }

    func ownWakeAt(_ record: GroupRecord) -> UInt64? {
        switch state {
        case .offline(_, let retryAt): isGivingUp ? nil : retryAt
        case .atPoint: coordinator.wakeAt
        case .idle:
            if requested { notBefore } else if waitsForCommand(record) { nil } else { max(dueAt, notBefore) }
        default: nil
        }
    }

    /// What it makes of an event. What answers something that was given up meanwhile, or asks for what is no more, is late.
    package func place(of event: Event) -> Place {
        let isHandled: Bool =
            switch (event, state) {
            case (.tick, _), (.suspend, _), (.resume, _), (.request, _): true
            case (.sessionOpened, .connecting), (.sessionFailed, .connecting): true
            case (.allMarked, .marking): true
            case (.prepared, .preparing), (.notReady, .preparing): true
            case (.asked, _), (.host, _), (.remote, _), (.hostLost, _): isOfSeveral
            case (.surveyed, .surveying): true
            case (.held, _): isOfSeveral && participant.state.kind == .forming
            case (.letGo, _): runs != nil
            case (.formed, .atPoint(.none)): participant.state.kind == .forming
            case (.move, .atPoint(.moves)): true
            case (.committed, .atPoint(.commits)), (.commitRefused, .atPoint(.commits)): true
            case (.gaveUp, _): isGivingUp
            // Nothing is under way, or it is being given up.
            case (.linkLost, .stopped), (.linkLost, .offline), (.linkLost, .givingUp): false
            case (.linkLost, _): true
            case (.pointLost(_, let number), _):
                hasPoint && number ?? participant.record.number == participant.record.number
            case (.sessionOpened, _), (.sessionFailed, _), (.allMarked, _), (.prepared, _), (.notReady, _),
                (.formed, _), (.move, _), (.committed, _), (.commitRefused, _), (.surveyed, _):
                false
            }
        return isHandled ? .handled : .late
    }

    package mutating func handle(_ event: Event, _ record: inout GroupRecord, now: UInt64) -> Turn<Action> {
        // Who gives a point up by command wants no other in its place, also between two attempts.
        if case .pointLost(_, nil) = event { requested = false }
        guard place(of: event) == .handled else { return Turn() }
        // Often, and before the state is looked at: whoever holds that makes the mover's tables be copied.
        if case .move(let event) = event { return move(event, &record, now) }
        switch (event, state) {
        case (.tick, _): return tick(&record, now)
        case (.suspend, _): return suspend(&record, now)
        case (.resume, _): return resume(&record)
        case (.request, _):
            requested = true
            return tick(&record, now)
        case (.sessionOpened(let peer), _): return opened(peer, &record, now)
        case (.sessionFailed(let reason, let retry), _): return failed(reason, retry: retry, &record, now)
        case (.linkLost(let reason), _): return lost(reason, &record, now)
        case (.asked(let message), _): return asked(message, &record, now)
        case (.host(let host, let answer), _): return tell(.host(host, answer), &record, now) + goOnIfIdle(&record, now)
        case (.remote(let remote, let answer, let time), _):
            return heard(answer, of: remote, at: time, &record, now)
        case (.surveyed(let survey), _): return surveyed(survey, &record, now)
        case (.hostLost(let host), _): return lostHost(host, &record, now)
        case (.held(let time, let changed), _): return didHold(at: time, changed, &record, now)
        case (.letGo(let isIntact), _): return didLetGo(isIntact, &record, now)
        case (.pointLost(let reason, _), _) where isOfSeveral: return lostPoint(reason, &record, now)
        case (.pointLost(let reason, _), .offline), (.pointLost(let reason, _), .stopped):
            return tell(.giveUp(reason), &record, now)
        case (.pointLost(let reason, let number), _):
            if number != nil { requested = true }  // whoever asked for it still waits
            return closeLink() + giveUp(.retry(reason), &record, now)
        case (.allMarked, .marking(let peer)): return marked(peer, &record, now)
        case (.prepared(let changed), _): return prepared(changed, &record, now)
        case (.notReady, _) where isOfSeveral:
            return tell(.notReady(participant.record.number, Self.busyVolume), &record, now)
        case (.notReady, _):
            notBefore = now + Self.readyRetry
            state = .idle
            return Turn()
        case (.formed(let time, let intact, let changed), _):
            return didForm(at: time, isIntact: intact, changed, &record, now)
        case (.committed(let time), _): return committed(at: time, &record, now)
        case (.commitRefused(let reason), _): return refused(reason, &record, now)
        case (.gaveUp, _): return gaveUp(&record, now)
        case (.allMarked, _), (.move, _):
            invariantFailed("only what a state has a place for is handled", #fileID, #line)
        }
    }

    /// - Parameter changed: some volume was written to since the last point.
    private mutating func prepared(_ changed: Bool, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        if isOfSeveral {
            state = .atPoint(.none)
            return tell(.madeReady(participant.record.number), &record, now)
        }
        guard changed || isWanted(record, now) else {
            state = .idle
            return Turn()
        }
        requested = false
        preparedAt = now
        return beginPoint(&record, now)
    }

    // MARK: Link

    private mutating func opened(_ peer: PeerState, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        record.primary?.alone = false  // the peer is a secondary: nobody has taken over
        lostAt = nil
        lastFailure = nil
        let renewed = (peer.volumeLineages ?? [:]).filter { record.volumeLineages?[$0.key] != $0.value }.keys.sorted()
        if record.lineage != peer.lineage || !renewed.isEmpty {
            // A point that is held lacks what this copy lacks: the record never names the two together.
            if isOfSeveral, participant.state.kind != .idle {
                return closeLink() + abandon("its remote's copy is another", .connect, &record, now)
            }
            if hasPoint { return closeLink() + giveUp(.connect, &record, now) }
            state = .marking(peer)
            return Turn([.markAllChanged(record.lineage != peer.lineage ? nil : renewed)])
        }
        let found = learn(peer.committed, &record, now)
        let mayBeOlder = committedMeanwhile
        committedMeanwhile = false
        guard peer.committed?.number == record.lastCommitted?.number else {
            if mayBeOlder {
                return found + failed("the peer's answer is older than its last point", retry: true, &record, now)
            }
            let theirs = peer.committed.map { String($0.number) } ?? "none"
            let ours = record.lastCommitted.map { String($0.number) } ?? "none"
            let next = Next.stop(
                "the peer's newest point is \(theirs) where \(ours) is expected; "
                    + "if its volumes were exchanged, remove the group's record there to copy anew")
            if isOfSeveral { return found + closeLink() + abandon(next.reason, next, &record, now) }
            return found + closeLink() + giveUp(next, &record, now)
        }
        return found + goOn(&record, now)
    }

    /// The lineage is recorded only when the bitmaps say that everything may differ.
    private mutating func marked(_ peer: PeerState, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        invariant(!hasPoint, "a point of another copy is given up before a new one is written down")
        if record.lineage != peer.lineage {
            // The next point is all of the volumes, and comes after what the peer has: of no use here, but its newest. For example what it was
            // when it gave up its role, if the answer was lost.
            record.primary?.lastCommitted = peer.committed
            record.primary?.lastCommitted?.isBase = true
        }
        record.lineage = peer.lineage
        record.volumeLineages = peer.volumeLineages
        record.peerSite = peer.site
        record.lastNumber = max(record.lastNumber, peer.committed?.number ?? 0)
        // As if the session had just opened: the peer may have committed what was not known of here.
        return .saved()
            + (record.lastCommitted == nil ? becomeIdle(&record, now, due: now) : opened(peer, &record, now))
    }

    mutating func failed(_ reason: String, retry: Bool, _ record: inout GroupRecord, _ now: UInt64) -> Turn<
        Action
    > {
        let isNew = !record.isAlone
        record.primary?.alone = true
        resyncing = true
        lastFailure = reason
        if lostAt == nil { lostAt = now }
        attempt += 1
        // 0.25 s, 0.5 s … 8 s; a refusal that a retry does not mend is asked again every 30 s.
        let delay = retry ? UInt64(250_000_000) << UInt64(min(attempt - 1, 5)) : 30_000_000_000
        state = .offline(reason, retryAt: now + delay)
        return (isNew ? .saved() : Turn()) + closeLink()
    }

    private mutating func lost(_ reason: String, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        if isOfSeveral { return lostLink(reason, &record, now) }
        // Nothing of a point that forms was sent; forming goes on, and finds the link closed.
        guard participant.state.kind == .forming else { return failed(reason, retry: true, &record, now) }
        return closeLink() + giveUp(.retry(reason), &record, now)
    }

    /// What was asked for before is not answered any more, so what is being given up is so anew.
    func closeLink() -> Turn<Action> { Turn(isGivingUp ? [.closeLink, .giveUp] : [.closeLink]) }

    /// Mirroring waits until the record can be written; hosts do not.
    mutating func couldNotSave(_ reason: String, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        let words = "the group's record cannot be written (\(reason)); mirroring goes on once it can"
        if isOfSeveral { return couldNotSaveOfSeveral(words, &record, now) }
        switch state {
        case .stopped, .offline, .givingUp(.stop): return closeLink()
        case .givingUp:
            state = .givingUp(.retry(words))
            return closeLink()
        case .atPoint: return closeLink() + giveUp(.retry(words), &record, now)
        case .connecting, .marking, .idle, .surveying, .preparing:
            return failed(words, retry: true, &record, now)
        }
    }

    private mutating func suspend(_ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        record.primary?.suspendedByOperator = true
        resyncing = true
        if isOfSeveral { return closeLink() + abandon(Self.suspended.reason, Self.suspended, &record, now) + .saved() }
        return closeLink() + giveUp(Self.suspended, &record, now) + .saved()
    }

    private mutating func resume(_ record: inout GroupRecord) -> Turn<Action> {
        let wasSuspended = record.suspendedByOperator
        record.primary?.suspendedByOperator = false
        let saved: Turn<Action> = wasSuspended ? .saved() : Turn()
        switch state {
        case .stopped where isGivingUp, .offline where isGivingUp, .givingUp where wasSuspended:
            state = .givingUp(.connect)
            return saved
        case .stopped, .offline:
            state = .connecting
            return saved + Turn([.openSession])
        case .connecting, .marking, .idle, .surveying, .preparing, .atPoint, .givingUp: return saved
        }
    }

    // MARK: Time

    mutating func tick(_ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        isOfSeveral ? tickOfSeveral(&record, now) + ownTick(&record, now) : ownTick(&record, now)
    }

    private mutating func ownTick(_ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        switch state {
        case .offline(_, let retryAt) where now >= retryAt && !isGivingUp:
            if let lostAt, now - lostAt > Self.heldLimit, hasPoint {
                let next = Next.retry("the link is lost; the point was given up to free its target")
                if isOfSeveral { return abandon(next.reason, next, &record, now) }
                return giveUp(next, &record, now)
            }
            state = .connecting
            return Turn([.openSession])
        case .idle where !mayBegin: return Turn()
        case .idle where now >= notBefore && (requested || (!waitsForCommand(record) && now >= dueAt)):
            switch settings.interval {
            case .continuous: dueAt = max(dueAt, now - min(now, Self.longestCatchUp)) + Self.shortestCycle
            case .every(let nanoseconds): dueAt = now + nanoseconds
            case .manual: dueAt = 0
            }
            if isOfSeveral {
                state = .surveying
                return Turn([.survey])
            }
            let number = record.lastNumber + 1
            state = .preparing(number)
            return Turn([.prepare(number: number)])
        case .atPoint where !isOfSeveral && now >= coordinator.wakeAt ?? .max:
            return tell(Coordinator.Event.tick, &record, now)
        default: return Turn()
        }
    }

    /// The first copy is made unasked.
    func waitsForCommand(_ record: GroupRecord) -> Bool { settings.interval == .manual && hasFirst(record) }

    /// The peer has a point of this direction of mirroring.
    private func hasFirst(_ record: GroupRecord) -> Bool {
        record.lastCommitted != nil && record.lastCommitted?.isBase != true
    }

    /// Whether a point is due although nothing has changed: only continuous cycles leave such points out, so that an idle
    /// group does not push its recovery points out of retention, and even these form one often enough to tell the lag.
    func isWanted(_ record: GroupRecord, _ now: UInt64) -> Bool {
        requested || settings.interval != .continuous || !hasFirst(record)
            || now - preparedAt >= Self.longestIdle
    }

    mutating func becomeIdle(_ record: inout GroupRecord, _ now: UInt64, due: UInt64? = nil) -> Turn<Action> {
        state = .idle
        if let due { dueAt = due }
        return tick(&record, now)
    }

    /// What was to follow when nothing is left to give up.
    mutating func carryOut(_ next: Next, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        switch next {
        case .stop(let reason):
            state = .stopped(reason)
            return .saved()
        case .retry(let reason): return .saved() + failed(reason, retry: true, &record, now)
        case .connect:
            state = .connecting
            return .saved(then: [.openSession])
        case .carryOn: return .saved() + becomeIdle(&record, now)
        }
    }
}
