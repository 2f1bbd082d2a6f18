// Cycle.swift: the primary's half of a group: form a point → drain it → commit it, again and again.
//
// A state machine without I/O: events in, actions out. A thread with libnbd drives it, and so does the simulator.
//
// Must be prevented:
//   a point is formed while the one before is still held (staggering)
//   a point counts as committed before the remote says so, or is sent again after it was
//   a point stays half formed after a crash: the intent is recorded before the first volume forms
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

/// What the peer says when a session opens.
package struct PeerState: Sendable, Equatable, Codable {
    package var session: UInt64
    package var site: String
    /// Identity of the secondary copy; changes when the secondary starts from nothing.
    package var lineage: String
    /// The same of each volume, by name.
    package var volumeLineages: [String: String]?
    /// Its newest point.
    package var committed: PointRecord?
    package init(
        session: UInt64, site: String, lineage: String, volumeLineages: [String: String]? = nil, committed: PointRecord?
    ) {
        self.session = session
        self.site = site
        self.lineage = lineage
        self.volumeLineages = volumeLineages
        self.committed = committed
    }
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
        /// A volume could not hold the point, or its data could not be read.
        case pointLost(String)
        case gaveUp
        case suspend
        case resume
        /// A point is wanted now.
        case request
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
    }

    package enum State {
        /// By command; or because trying again cannot help.
        case stopped(String)
        case offline(String, retryAt: UInt64)
        case connecting
        /// Every grain is being marked for a secondary that the bitmaps say nothing about.
        case marking(PeerState)
        case idle
        case preparing(UInt64)
        case forming(UInt64)
        case moving(PointRecord, any Mover)
        case committing(PointRecord)
        case givingUp(Next)
    }

    /// What follows when a point has been given up.
    package enum Next {
        case stop(String)
        case retry(String)
        case connect
        case carryOn
        /// The peer had already committed the point.
        case tookOver
    }

    package struct Settings: Sendable {
        package var mode: Mode
        package var interval: Interval
        package var volumes: Int
        package var window: Int
        package var checkpointBytes: Int
        package init(
            mode: Mode = .flashcopy, interval: Interval, volumes: Int, window: Int = 16,
            checkpointBytes: Int = 64 << 20
        ) {
            self.mode = mode
            self.interval = interval
            self.volumes = volumes
            self.window = window
            self.checkpointBytes = checkpointBytes
        }
    }

    package let settings: Settings
    package private(set) var state: State
    /// There was a suspension after the last commit.
    private(set) var resyncing = false
    private var lastFailure: String?
    private var dueAt: UInt64 = 0
    private var requested = false
    /// While a volume is not ready no point is formed; asked again after `readyRetry`.
    private var notBefore: UInt64 = 0
    private static let readyRetry: UInt64 = 50_000_000
    private var attempt = 0
    /// The driver adapts it to the link.
    package var pace: MovePace
    /// A link lost for longer than this ends the point that is held, so that its target stops growing.
    package static let heldLimit: UInt64 = 30_000_000_000
    private var lostAt: UInt64?
    /// Continuous cycles form at most one point in this time, and while nothing changes one in the longer time.
    package static let shortestCycle: UInt64 = 50_000_000
    package static let longestIdle: UInt64 = 1_000_000_000
    private var formedAt: UInt64 = 0

    /// - Parameter state: what it begins with, for who has read `place` and wants to see it.
    package init(settings: Settings, state: State = .connecting) {
        self.settings = settings
        self.state = state
        pace = MovePace(limit: settings.window, checkpointBytes: settings.checkpointBytes)
    }

    /// First actions after a start of the process.
    mutating func start(_ record: inout GroupRecord) -> Turn<Action> {
        if record.suspendedByOperator { return giveUp(.stop("suspended by the operator")) }
        if record.forming != nil { return giveUp(.connect) }  // nobody knows which volumes have formed it
        state = .connecting
        return Turn([.openSession])
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
        switch state {
        case .offline(_, let retryAt): retryAt
        case .idle:
            if requested { notBefore } else if waitsForCommand(record) { nil } else { max(dueAt, notBefore) }
        default: nil
        }
    }

    /// What a state makes of an event. What answers something that was given up meanwhile, or asks for what is no more, is late.
    package static func place(of event: Event, in state: State) -> Place {
        let isHandled: Bool =
            switch (event, state) {
            case (.tick, _), (.suspend, _), (.resume, _), (.request, _): true
            case (.sessionOpened, .connecting), (.sessionFailed, .connecting): true
            case (.allMarked, .marking): true
            case (.prepared, .preparing), (.notReady, .preparing): true
            case (.formed, .forming): true
            case (.move, .moving): true
            case (.committed, .committing), (.commitRefused, .committing): true
            case (.gaveUp, .givingUp): true
            // Nothing is under way, or it is being given up.
            case (.linkLost, .stopped), (.linkLost, .offline), (.linkLost, .givingUp): false
            case (.linkLost, _): true
            // No point is held, or it is being given up.
            case (.pointLost, .givingUp), (.pointLost, .marking), (.pointLost, .idle), (.pointLost, .preparing): false
            case (.pointLost, _): true
            case (.sessionOpened, _), (.sessionFailed, _), (.allMarked, _), (.prepared, _), (.notReady, _),
                (.formed, _), (.move, _), (.committed, _), (.commitRefused, _), (.gaveUp, _):
                false
            }
        return isHandled ? .handled : .late
    }

    package mutating func handle(_ event: Event, _ record: inout GroupRecord, now: UInt64) -> Turn<Action> {
        guard Self.place(of: event, in: state) == .handled else { return Turn() }
        switch (event, state) {
        case (.tick, _): return tick(record, now)
        case (.suspend, _): return suspend(&record)
        case (.resume, _): return resume(&record)
        case (.request, _):
            requested = true
            return tick(record, now)
        case (.sessionOpened(let peer), _): return opened(peer, &record, now)
        case (.sessionFailed(let reason, let retry), _): return failed(reason, retry: retry, &record, now)
        case (.linkLost(let reason), _): return lost(reason, &record, now)
        case (.pointLost(let reason), _): return pointLost(reason, &record)
        case (.allMarked, .marking(let peer)): return marked(peer, &record, now)
        case (.prepared(let changed), .preparing(let number)): return prepared(number, changed, &record, now)
        case (.notReady, _):
            notBefore = now + Self.readyRetry
            state = .idle
            return Turn()
        case (.formed(let time, let intact, let changed), .forming(let number)):
            guard intact else {
                // Whoever asked for it still waits; but not at once, since hosts were held for nothing.
                requested = true
                notBefore = now + Self.readyRetry
                return giveUp(.carryOn)
            }
            let point = PointRecord(number: number, formedAt: time)
            record.primary?.point = .held(point)
            return .saved() + startMove(point, record, changed)
        case (.move(let event), .moving(let point, let mover)): return move(point, mover, event, record)
        case (.committed(let time), .committing(let point)): return committed(point, time, &record, now)
        case (.commitRefused(let reason), _):
            return Turn([.closeLink]) + giveUp(.retry("the peer refused the point: \(reason)"))
        case (.gaveUp, .givingUp(let next)): return gaveUp(next, &record, now)
        case (.allMarked, _), (.prepared, _), (.formed, _), (.move, _), (.committed, _), (.gaveUp, _):
            invariantFailed("only what a state has a place for is handled", #fileID, #line)
        }
    }

    /// - Parameter changed: some volume was written to since the last point.
    private mutating func prepared(
        _ number: UInt64, _ changed: Bool, _ record: inout GroupRecord, _ now: UInt64
    ) -> Turn<Action> {
        guard changed || isWanted(record, now) else {
            state = .idle
            return Turn()
        }
        requested = false
        formedAt = now
        record.primary?.point = .forming(number)
        record.lastNumber = number
        state = .forming(number)
        return .saved(then: [.form(number: number)])
    }

    // MARK: Link

    private mutating func opened(_ peer: PeerState, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        record.primary?.alone = false  // the peer is a secondary: nobody has taken over
        lostAt = nil
        lastFailure = nil
        if record.lineage != peer.lineage {
            state = .marking(peer)
            return Turn([.markAllChanged(nil)])
        }
        let renewed = (peer.volumeLineages ?? [:]).filter { record.volumeLineages?[$0.key] != $0.value }.keys.sorted()
        if !renewed.isEmpty {
            state = .marking(peer)
            return Turn([.markAllChanged(renewed)])
        }
        if let held = record.held, peer.committed?.number == held.number {
            record.primary?.lastCommitted = peer.committed
            return giveUp(.tookOver)
        }
        if let theirs = peer.committed, theirs.number > record.lastCommitted?.number ?? 0,
            theirs.number <= record.lastNumber
        {
            // A point of ours that was given up here while its commit's answer was on the way. Its bits were merged
            // back, so what differs from it is known.
            record.primary?.lastCommitted = theirs
        }
        if peer.committed?.number == record.lastCommitted?.number {
            guard let held = record.held else {
                // What has changed waits, as it did before the link was lost.
                if waitsForCommand(record) { resyncing = false }
                return .saved() + becomeIdle(record, now, due: now)
            }
            return .saved(then: [.rewind]) + startMove(held, record, Array(0..<settings.volumes))
        }
        let theirs = peer.committed.map { String($0.number) } ?? "none"
        let ours = record.lastCommitted.map { String($0.number) } ?? "none"
        return Turn([.closeLink])
            + giveUp(
                .stop(
                    "the peer's newest point is \(theirs) where \(ours) is expected; "
                        + "if its volumes were exchanged, remove the group's record there to copy anew"))
    }

    /// The lineage is recorded only when the bitmaps say that everything may differ.
    private mutating func marked(_ peer: PeerState, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        if record.lineage != peer.lineage { record.primary?.lastCommitted = nil }
        record.lineage = peer.lineage
        record.volumeLineages = peer.volumeLineages
        record.peerSite = peer.site
        record.lastNumber = max(record.lastNumber, peer.committed?.number ?? 0)
        if record.held != nil { return .saved() + giveUp(.carryOn) }
        // As if the session had just opened: the peer may have committed what was not known of here.
        return .saved() + (record.lastCommitted == nil ? becomeIdle(record, now, due: now) : opened(peer, &record, now))
    }

    private mutating func failed(_ reason: String, retry: Bool, _ record: inout GroupRecord, _ now: UInt64) -> Turn<
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
        return isNew ? .saved(then: [.closeLink]) : Turn([.closeLink])
    }

    private mutating func lost(_ reason: String, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        switch state {
        case .stopped, .offline, .givingUp: return Turn()
        case .preparing, .forming:
            // Nothing of the point was sent; forming goes on and the drain will find the link closed.
            return Turn([.closeLink]) + giveUp(.retry(reason))
        case .connecting, .marking, .idle, .moving, .committing:
            return failed(reason, retry: true, &record, now)
        }
    }

    /// Mirroring waits until the record can be written; hosts do not.
    mutating func couldNotSave(_ reason: String, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        let words = "the group's record cannot be written (\(reason)); mirroring goes on once it can"
        switch state {
        case .stopped, .offline: return Turn([.closeLink])
        // What was asked for before the link is closed is not answered any more, so it is asked for again.
        case .givingUp(.stop(let reason)): return Turn([.closeLink]) + giveUp(.stop(reason))
        case .preparing, .forming, .moving, .committing, .givingUp: return Turn([.closeLink]) + giveUp(.retry(words))
        case .connecting, .marking, .idle: return failed(words, retry: true, &record, now)
        }
    }

    private mutating func suspend(_ record: inout GroupRecord) -> Turn<Action> {
        record.primary?.suspendedByOperator = true
        resyncing = true
        return Turn([.closeLink]) + giveUp(.stop("suspended by the operator"))
    }

    private mutating func resume(_ record: inout GroupRecord) -> Turn<Action> {
        guard record.suspendedByOperator else {
            if case .offline = state {
                state = .connecting
                return Turn([.openSession])
            }
            if case .stopped = state {
                state = .connecting
                return Turn([.openSession])
            }
            return Turn()
        }
        record.primary?.suspendedByOperator = false
        if case .givingUp = state {
            state = .givingUp(.connect)
            return .saved()
        }
        state = .connecting
        return .saved(then: [.openSession])
    }

    // MARK: Points

    private mutating func tick(_ record: GroupRecord, _ now: UInt64) -> Turn<Action> {
        switch state {
        case .offline(_, let retryAt) where now >= retryAt:
            if let lostAt, now - lostAt > Self.heldLimit, record.held != nil {
                return giveUp(.retry("the link is lost; the point was given up to free its target"))
            }
            state = .connecting
            return Turn([.openSession])
        case .idle where now >= notBefore && (requested || (!waitsForCommand(record) && now >= dueAt)):
            switch settings.interval {
            case .continuous: dueAt = now + Self.shortestCycle
            case .every(let nanoseconds): dueAt = now + nanoseconds
            case .manual: dueAt = 0
            }
            let number = record.lastNumber + 1
            state = .preparing(number)
            return Turn([.prepare(number: number)])
        default: return Turn()
        }
    }

    /// The first copy is made unasked.
    private func waitsForCommand(_ record: GroupRecord) -> Bool { settings.interval == .manual && hasFirst(record) }

    /// The peer has a point of this direction of mirroring.
    private func hasFirst(_ record: GroupRecord) -> Bool {
        record.lastCommitted != nil && record.lastCommitted?.isBase != true
    }

    /// Whether a point is due although nothing has changed: only continuous cycles leave such points out, so that an idle
    /// group does not push its recovery points out of retention, and even these form one often enough to tell the lag.
    private func isWanted(_ record: GroupRecord, _ now: UInt64) -> Bool {
        requested || settings.interval != .continuous || !hasFirst(record)
            || now - formedAt >= Self.longestIdle
    }

    private mutating func becomeIdle(_ record: GroupRecord, _ now: UInt64, due: UInt64? = nil) -> Turn<Action> {
        state = .idle
        if let due { dueAt = due }
        return tick(record, now)
    }

    private mutating func startMove(_ point: PointRecord, _ record: GroupRecord, _ volumes: [Int]) -> Turn<Action> {
        let mover = settings.mode.mover(MoveShape(volumes: volumes, window: settings.window, pace: pace))
        return move(point, mover, .begin, record)
    }

    private mutating func move(
        _ point: PointRecord, _ mover: consuming any Mover, _ event: MoveEvent, _ record: GroupRecord
    ) -> Turn<Action> {
        state = .idle  // so that there is one mover, and its tables are not copied
        mover.pace = pace
        let actions = mover.handle(event).map { Action.move($0) }
        guard mover.isDone else {
            state = .moving(point, mover)
            return Turn(actions)
        }
        var sent = point
        sent.bytes = mover.bytesSent
        state = .committing(sent)
        let commit = Action.commit(
            number: point.number, previous: record.lastCommitted?.number, formedAt: point.formedAt)
        return Turn(actions + [commit])
    }

    private mutating func committed(
        _ point: PointRecord, _ time: Double, _ record: inout GroupRecord, _ now: UInt64
    ) -> Turn<Action> {
        var done = point
        done.committedAt = time
        record.primary?.lastCommitted = done
        record.primary?.point = .none
        record.primary?.fromImage = false
        resyncing = false
        attempt = 0
        return Turn([.endPoint(number: point.number)]) + .saved() + becomeIdle(record, now)
    }

    private mutating func pointLost(_ reason: String, _ record: inout GroupRecord) -> Turn<Action> {
        switch state {
        case .stopped, .offline:
            record.primary?.point = .none
            return Turn([.giveUp]) + .saved()
        case .givingUp, .marking, .idle, .preparing: return Turn()
        default: return Turn([.closeLink]) + giveUp(.retry(reason))
        }
    }

    private mutating func giveUp(_ next: Next) -> Turn<Action> {
        state = .givingUp(next)
        return Turn([.giveUp])
    }

    private mutating func gaveUp(_ next: Next, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        record.primary?.point = .none
        switch next {
        case .stop(let reason):
            state = .stopped(reason)
            return .saved()
        case .retry(let reason):
            return .saved() + failed(reason, retry: true, &record, now)
        case .connect:
            state = .connecting
            return .saved(then: [.openSession])
        case .carryOn, .tookOver:
            return .saved() + becomeIdle(record, now)
        }
    }
}
