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
//   something is done that relies on a record which could not be saved: the actions after a save that fails are dropped, and
//     `saveFailed` says so

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
        case formed(at: Double, intact: Bool)
        case read(slot: Int, grains: Range<Int>?, offset: UInt64, length: Int)
        /// `wire`: bytes that crossed the link for it.
        case sent(slot: Int, wire: Int)
        case flushed
        case committed(at: Double)
        case commitRefused(String)
        /// A volume could not hold the point, or its data could not be read.
        case pointLost(String)
        case gaveUp
        case suspend
        case resume
        /// A point is wanted now.
        case request
        /// A `save` has failed; the actions behind it were dropped. The file holds the record before or the new one.
        case saveFailed(String)
    }

    package enum Action: Equatable {
        case openSession
        case closeLink
        case save(GroupRecord)
        /// Make the targets and bitmaps of the next point ready.
        case prepare(number: UInt64)
        /// Hold acknowledgements and form on every volume; when all have, let go.
        case form(number: UInt64)
        case rewind
        case drain(Drain.Action)
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
        case draining(PointRecord, Drain)
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
        package var interval: Interval
        package var volumes: Int
        package var window: Int
        package var checkpointBytes: Int
        package init(
            interval: Interval, volumes: Int, window: Int = 16, checkpointBytes: Int = 64 << 20
        ) {
            self.interval = interval
            self.volumes = volumes
            self.window = window
            self.checkpointBytes = checkpointBytes
        }
    }

    package let settings: Settings
    package private(set) var record: GroupRecord
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
    /// How many slots of the window may be busy, and how often a flush is asked for; the driver adapts them to the link.
    package var windowLimit: Int
    package var checkpointBytes: Int
    /// A link lost for longer than this ends the point that is held, so that its target stops growing.
    package static let heldLimit: UInt64 = 30_000_000_000
    private var lostAt: UInt64?
    /// Continuous cycles form at most one point in this time, and while nothing changes one in the longer time.
    package static let shortestCycle: UInt64 = 50_000_000
    package static let longestIdle: UInt64 = 1_000_000_000
    private var formedAt: UInt64 = 0
    /// The file may hold another record than this; the record is saved again until it does not.
    package private(set) var isUnsaved = false
    private var saveAt: UInt64 = 0
    private static let saveRetry: UInt64 = 1_000_000_000

    package init(record: GroupRecord, settings: Settings) {
        self.record = record
        self.settings = settings
        windowLimit = settings.window
        checkpointBytes = settings.checkpointBytes
        state = .connecting
    }

    /// Takes over what else the site has to say in the record. It is on stable storage already.
    package mutating func adopt(_ saved: GroupRecord) {
        record = saved
        isUnsaved = false
    }

    /// The last `save` was carried out.
    package mutating func wasSaved() { isUnsaved = false }

    /// A save of the site's has failed: the file may hold what it wanted.
    package mutating func mayDiffer(now: UInt64) {
        isUnsaved = true
        saveAt = now + Self.saveRetry
    }

    /// First actions after a start of the process.
    package mutating func start(now: UInt64) -> [Action] {
        if record.suspendedByOperator {
            return giveUp(.stop("suspended by the operator"))
        }
        if record.forming != nil { return giveUp(.connect) }  // nobody knows which volumes have formed it
        state = .connecting
        return [.openSession]
    }

    /// The number that a point formed for a request made now will have at least.
    package var nextNumber: UInt64 {
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
    package var wakeAt: UInt64? {
        guard isUnsaved else { return nextStep }
        return min(saveAt, nextStep ?? saveAt)
    }

    private var nextStep: UInt64? {
        switch state {
        case .offline(_, let retryAt): retryAt
        case .idle:
            if requested { notBefore } else if waitsForCommand { nil } else { max(dueAt, notBefore) }
        default: nil
        }
    }

    package mutating func handle(_ event: Event, now: UInt64) -> [Action] {
        switch event {
        case .suspend: return suspend()
        case .resume: return resume()
        case .request:
            requested = true
            return tick(now)
        case .tick where isUnsaved && now >= saveAt:
            saveAt = now + Self.saveRetry
            return [.save(record)] + tick(now)
        case .tick: return tick(now)
        case .saveFailed(let reason): return couldNotSave(reason, now)
        case .linkLost(let reason): return lost(reason, now)
        case .pointLost(let reason): return pointLost(reason)
        default: break
        }
        switch (state, event) {
        case (.connecting, .sessionOpened(let peer)): return opened(peer, now)
        case (.connecting, .sessionFailed(let reason, let retry)):
            return failed(reason, retry: retry, now)
        case (.marking(let peer), .allMarked): return marked(peer, now)
        case (.preparing(let number), .prepared(let changed)):
            guard changed || isWanted(now) else {
                state = .idle
                return []
            }
            requested = false
            formedAt = now
            record.primary?.point = .forming(number)
            record.lastNumber = number
            state = .forming(number)
            return [.save(record), .form(number: number)]
        case (.preparing, .notReady):
            notBefore = now + Self.readyRetry
            state = .idle
            return []
        case (.forming(let number), .formed(let time, let intact)):
            guard intact else {
                // Whoever asked for it still waits; but not at once, since hosts were held for nothing.
                requested = true
                notBefore = now + Self.readyRetry
                return giveUp(.carryOn)
            }
            let point = PointRecord(number: number, formedAt: time)
            record.primary?.point = .held(point)
            return [.save(record)] + startDrain(point)
        case (.draining(let point, var drain), .read(let slot, let grains, let offset, let length)):
            return carry(
                point, &drain,
                drain.didRead(slot: slot, grains: grains, offset: offset, length: length))
        case (.draining(let point, var drain), .sent(let slot, let wire)):
            drain.limit = windowLimit
            drain.checkpointBytes = checkpointBytes
            return carry(point, &drain, drain.didSend(slot: slot, wire: wire))
        case (.draining(let point, var drain), .flushed):
            return carry(point, &drain, drain.didFlush())
        case (.committing(let point), .committed(let time)): return committed(point, time, now)
        case (.committing, .commitRefused(let reason)):
            return [.closeLink] + giveUp(.retry("the peer refused the point: \(reason)"))
        case (.givingUp(let next), .gaveUp): return gaveUp(next, now)
        default: return []  // an answer to something that was given up meanwhile
        }
    }

    // MARK: Link

    private mutating func opened(_ peer: PeerState, _ now: UInt64) -> [Action] {
        record.primary?.alone = false  // the peer is a secondary: nobody has taken over
        lostAt = nil
        lastFailure = nil
        if record.lineage != peer.lineage {
            state = .marking(peer)
            return [.markAllChanged(nil)]
        }
        let renewed = (peer.volumeLineages ?? [:]).filter { record.volumeLineages?[$0.key] != $0.value }.keys.sorted()
        if !renewed.isEmpty {
            state = .marking(peer)
            return [.markAllChanged(renewed)]
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
                if waitsForCommand { resyncing = false }  // what has changed waits, as it did before the link was lost
                return [.save(record)] + becomeIdle(now, due: now)
            }
            return [.save(record), .rewind] + startDrain(held)
        }
        let theirs = peer.committed.map { String($0.number) } ?? "none"
        let ours = record.lastCommitted.map { String($0.number) } ?? "none"
        return [.closeLink]
            + giveUp(
                .stop(
                    "the peer's newest point is \(theirs) where \(ours) is expected; "
                        + "if its volumes were exchanged, remove the group's record there to copy anew"))
    }

    /// The lineage is recorded only when the bitmaps say that everything may differ.
    private mutating func marked(_ peer: PeerState, _ now: UInt64) -> [Action] {
        if record.lineage != peer.lineage { record.primary?.lastCommitted = nil }
        record.lineage = peer.lineage
        record.volumeLineages = peer.volumeLineages
        record.peerSite = peer.site
        record.lastNumber = max(record.lastNumber, peer.committed?.number ?? 0)
        let save = Action.save(record)
        if record.held != nil { return [save] + giveUp(.carryOn) }
        // As if the session had just opened: the peer may have committed what was not known of here.
        return [save] + (record.lastCommitted == nil ? becomeIdle(now, due: now) : opened(peer, now))
    }

    private mutating func failed(_ reason: String, retry: Bool, _ now: UInt64) -> [Action] {
        var save: [Action] = []
        if !record.isAlone {
            record.primary?.alone = true
            save = [.save(record)]
        }
        resyncing = true
        lastFailure = reason
        if lostAt == nil { lostAt = now }
        attempt += 1
        // 0.25 s, 0.5 s … 8 s; a refusal that a retry does not mend is asked again every 30 s.
        let delay = retry ? UInt64(250_000_000) << UInt64(min(attempt - 1, 5)) : 30_000_000_000
        state = .offline(reason, retryAt: now + delay)
        return save + [.closeLink]
    }

    private mutating func lost(_ reason: String, _ now: UInt64) -> [Action] {
        switch state {
        case .stopped, .offline, .givingUp: return []
        case .preparing, .forming:
            // Nothing of the point was sent; forming goes on and the drain will find the link closed.
            return [.closeLink] + giveUp(.retry(reason))
        case .connecting, .marking, .idle, .draining, .committing:
            return failed(reason, retry: true, now)
        }
    }

    /// Mirroring waits until the record can be written; hosts do not.
    private mutating func couldNotSave(_ reason: String, _ now: UInt64) -> [Action] {
        mayDiffer(now: now)
        let words = "the group's record cannot be written (\(reason)); mirroring goes on once it can"
        switch state {
        case .stopped, .offline: return [.closeLink]
        // What was asked for before the link is closed is not answered any more, so it is asked for again.
        case .givingUp(.stop(let reason)): return [.closeLink] + giveUp(.stop(reason))
        case .preparing, .forming, .draining, .committing, .givingUp: return [.closeLink] + giveUp(.retry(words))
        case .connecting, .marking, .idle: return failed(words, retry: true, now)
        }
    }

    private mutating func suspend() -> [Action] {
        record.primary?.suspendedByOperator = true
        resyncing = true
        return [.closeLink] + giveUp(.stop("suspended by the operator"))
    }

    private mutating func resume() -> [Action] {
        guard record.suspendedByOperator else {
            if case .offline = state {
                state = .connecting
                return [.openSession]
            }
            if case .stopped = state {
                state = .connecting
                return [.openSession]
            }
            return []
        }
        record.primary?.suspendedByOperator = false
        if case .givingUp = state {
            state = .givingUp(.connect)
            return [.save(record)]
        }
        state = .connecting
        return [.save(record), .openSession]
    }

    // MARK: Points

    private mutating func tick(_ now: UInt64) -> [Action] {
        switch state {
        case .offline(_, let retryAt) where now >= retryAt:
            if let lostAt, now - lostAt > Self.heldLimit, record.held != nil {
                return giveUp(.retry("the link is lost; the point was given up to free its target"))
            }
            state = .connecting
            return [.openSession]
        case .idle where now >= notBefore && (requested || (!waitsForCommand && now >= dueAt)):
            switch settings.interval {
            case .continuous: dueAt = now + Self.shortestCycle
            case .every(let nanoseconds): dueAt = now + nanoseconds
            case .manual: dueAt = 0
            }
            let number = record.lastNumber + 1
            state = .preparing(number)
            return [.prepare(number: number)]
        default: return []
        }
    }

    /// The first copy is made unasked.
    private var waitsForCommand: Bool { settings.interval == .manual && hasFirst }

    /// The peer has a point of this direction of mirroring.
    private var hasFirst: Bool { record.lastCommitted != nil && record.lastCommitted?.isBase != true }

    /// Whether a point is due although nothing has changed: only continuous cycles leave such points out, so that an idle
    /// group does not push its recovery points out of retention, and even these form one often enough to tell the lag.
    private func isWanted(_ now: UInt64) -> Bool {
        requested || settings.interval != .continuous || !hasFirst
            || now - formedAt >= Self.longestIdle
    }

    private mutating func becomeIdle(_ now: UInt64, due: UInt64? = nil) -> [Action] {
        state = .idle
        if let due { dueAt = due }
        return tick(now)
    }

    private mutating func startDrain(_ point: PointRecord) -> [Action] {
        var drain = Drain(
            volumes: settings.volumes, window: settings.window,
            checkpointBytes: checkpointBytes)
        drain.limit = windowLimit
        return carry(point, &drain, drain.start())
    }

    private mutating func carry(
        _ point: PointRecord, _ drain: inout Drain, _ actions: [Drain.Action]
    ) -> [Action] {
        guard actions.contains(.finished) else {
            state = .draining(point, drain)
            return actions.map { .drain($0) }
        }
        var sent = point
        sent.bytes = drain.bytesSent
        state = .committing(sent)
        return actions.filter { $0 != .finished }.map { .drain($0) } + [
            .commit(
                number: point.number, previous: record.lastCommitted?.number,
                formedAt: point.formedAt)
        ]
    }

    private mutating func committed(_ point: PointRecord, _ time: Double, _ now: UInt64) -> [Action] {
        var done = point
        done.committedAt = time
        record.primary?.lastCommitted = done
        record.primary?.point = .none
        record.primary?.fromImage = false
        resyncing = false
        attempt = 0
        return [.endPoint(number: point.number), .save(record)] + becomeIdle(now)
    }

    private mutating func pointLost(_ reason: String) -> [Action] {
        switch state {
        case .stopped, .offline:
            record.primary?.point = .none
            return [.giveUp, .save(record)]
        case .givingUp, .marking, .idle, .preparing: return []
        default: return [.closeLink] + giveUp(.retry(reason))
        }
    }

    private mutating func giveUp(_ next: Next) -> [Action] {
        state = .givingUp(next)
        return [.giveUp]
    }

    private mutating func gaveUp(_ next: Next, _ now: UInt64) -> [Action] {
        record.primary?.point = .none
        switch next {
        case .stop(let reason):
            state = .stopped(reason)
            return [.save(record)]
        case .retry(let reason):
            let save = Action.save(record)
            return [save] + failed(reason, retry: true, now)
        case .connect:
            state = .connecting
            return [.save(record), .openSession]
        case .carryOn, .tookOver:
            let save = Action.save(record)
            return [save] + becomeIdle(now)
        }
    }
}
