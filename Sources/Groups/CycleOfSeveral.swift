// CycleOfSeveral.swift: the cycle of a group with several hosts: this host's participant does what a coordinator asks, here or at another site,
// and one of the hosts has the coordinator. The link is this host's own affair: a point is formed only while it is up, and is drained when it
// is up again.
//
// Must be prevented:
//   it is said that acknowledgements went because of `run` while some went by themselves: they are let go first, and that it was in time is
//     what `run` is answered with
//   an old write of a point that was given up arrives after one of the next: the link is closed first, if anything was under way
//   a coordinator asks for points again and again that some host cannot form: it asks first how the hosts stand
//   what comes from another site ends this one: what cannot be is told, and changes nothing

import Base

/// What a coordinator asks of a host, with what it knows of the point.
package struct HostMessage: Codable, Equatable, Sendable {
    package var request: Stamped<HostRequest>
    /// Of the point, in seconds since 1970: when it was formed, and when the last remote committed it.
    package var formedAt: Double?
    package var committedAt: Double?

    /// Whether another site may have said this.
    var isPlausible: Bool {
        [formedAt, committedAt].compactMap { $0 }.allSatisfy { (0...PointRecord.latestTime).contains($0) }
    }

    package init(_ request: Stamped<HostRequest>, formedAt: Double? = nil, committedAt: Double? = nil) {
        (self.request, self.formedAt, self.committedAt) = (request, formedAt, committedAt)
    }
}

/// The same of a remote.
package struct RemoteMessage: Codable, Equatable, Sendable {
    package var request: Stamped<RemoteRequest>
    package var formedAt: Double?
    /// Pairs that have no part in the point, by their indices.
    package var absent: [Int]?
    /// Where the host has sent it.
    package var copy: CopyIdentity?

    package init(_ request: Stamped<RemoteRequest>, formedAt: Double?, absent: [Int]? = nil, copy: CopyIdentity? = nil)
    {
        (self.request, self.formedAt, self.absent, self.copy) = (request, formedAt, absent, copy)
    }
}

extension CoordinatorRecord {
    /// Whether a coordinator may have written this: it is kept where others may write as well.
    package var isPlausible: Bool {
        let (highest, pairs) = (PointRecord.highestNumber, 0..<Coordinator.Settings.members.upperBound)
        return epoch <= highest && lastNumber <= highest && committed <= lastNumber
            && (left ?? [:]).allSatisfy { pairs.contains($0.key) && $0.value <= lastNumber }
            && (absent ?? []).allSatisfy(pairs.contains) && (names?.count ?? 0) <= pairs.upperBound
    }
}

/// How the hosts of a group stand, before a point.
package struct Survey: Codable, Equatable, Sendable {
    /// Some volume was written to since the last point.
    package var changed: Bool
    /// Why some host cannot form one now; nil = all can.
    package var problem: String?
    /// The highest number that any of them knows of a point.
    package var highest: UInt64
    /// Pairs whose hosts are lost, and without which points are formed, by their indices.
    package var absent: [Int]?
    /// Its remote has failed over: the others must not go on without it, since they are to fail over to the same point.
    package var isStale: Bool?

    package init(changed: Bool, problem: String?, highest: UInt64, absent: [Int]? = nil, isStale: Bool = false) {
        (self.changed, self.problem, self.highest, self.absent) = (changed, problem, highest, absent)
        self.isStale = isStale ? true : nil
    }
}

extension Cycle {
    /// What this site is to the group.
    package enum Part: Sendable, Equatable {
        /// The group's only host.
        case alone
        /// One of several: which one of them, and who forms points.
        case several(Coordinator.Settings, index: Int, Master)

        package enum Master: Sendable, Equatable {
            case here, elsewhere
            /// By election: whoever is elected brings the coordinator's record, which is kept elsewhere.
            case elected
        }

        var isOfSeveral: Bool { self != .alone }
        var coordinatesFromTheStart: Bool { if case .several(_, _, .here) = self { true } else { false } }
        /// The coordinator's record is kept elsewhere.
        var isElected: Bool { if case .several(_, _, .elected) = self { true } else { false } }
        /// Nanoseconds after which acknowledgements go by themselves.
        package var maxHold: UInt64 { coordination.maxCoordination }
        var coordination: Coordinator.Settings {
            switch self {
            case .alone: .single
            case .several(let settings, _, _): settings
            }
        }
    }

    var isOfSeveral: Bool { settings.part.isOfSeveral }
    private var ownIndex: Int { if case .several(_, let index, _) = settings.part { index } else { 0 } }
    /// The coordinator here may begin a point.
    var mayBegin: Bool { !isOfSeveral || (coordinates && coordinator.state == .idle && !isQuiet) }
    /// No point begins, and none is under way that this site knows of.
    package var isAtRest: Bool {
        guard isOfSeveral, isQuiet else { return true }
        return participant.state == .idle && (!coordinates || coordinator.state == .idle)
    }
    package static let busyVolume = "a volume is being restored, or has not given up the last point yet"
    private static let longestPause: UInt64 = 1_000_000_000

    // MARK: Election

    /// This site forms points from now on.
    ///
    /// - Parameters:
    ///   - epoch: higher than any before.
    ///   - found: what the coordinator before has left; nil = there was none.
    mutating func coordinate(
        epoch: UInt64, _ found: CoordinatorRecord?, _ record: inout GroupRecord, _ now: UInt64
    ) -> Turn<Action> {
        guard settings.part.isElected, epoch > 0 else { return Turn() }
        var own = record.takingUp(found)
        // Etcd may be another than the one before, and count anew.
        own.epoch = max(epoch - 1, record.coordination?.epoch ?? 0, found?.epoch ?? 0)
        coordinator = Coordinator(settings.part.coordination, record: own)
        (coordinates, holdUp, pauses) = (true, nil, 0)
        let turn = coordinator.start(now: now)
        return carryOut(turn, &record, now) + giveUpUnnamed(&record, now) + goOnIfIdle(&record, now)
    }

    /// This host drains, or has drained, a point that the record which it has found does not name: nobody would ever end it.
    private mutating func giveUpUnnamed(_ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        let isNamed = coordinator.state != .idle && coordinator.record.lastNumber == participant.record.number
        switch participant.state.kind {
        case .draining where !isNamed, .drained where !isNamed:
            return abandon("the coordinator's record does not name it", .carryOn, &record, now)
        default: return Turn()
        }
    }

    /// Another does, or nobody. Hosts let go by themselves.
    mutating func stopCoordinating(_ reason: String, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        guard coordinates else { return Turn() }
        coordinates = false
        holdUp = nil
        coordinator = Coordinator(settings.part.coordination, record: CoordinatorRecord())
        if case .surveying = state { state = .idle }
        switch participant.state.kind {
        // Whoever follows may know nothing of it.
        case .makingReady, .ready, .forming, .formed: return abandon(reason, .carryOn, &record, now)
        case .idle, .draining, .drained, .givingUp: return Turn()
        }
    }

    // MARK: How it stands

    /// What this host says when it is asked whether it can form a point; nil = it can.
    package var problem: String? {
        switch state {
        case .idle, .surveying: nil
        case .connecting: "it connects to its remote"
        case .marking: "its remote's copy is new, and it marks everything"
        // The coordinator that asks is at none: the next one's first message ends it.
        case .preparing, .atPoint, .givingUp(.carryOn): nil
        case .givingUp(let next): next.reason
        case .stopped(let reason), .offline(let reason, _): reason
        }
    }

    /// Its remote refuses it, perhaps since that has failed over.
    package var isRefused: Bool {
        if case .stopped(let reason) = state { reason != Self.suspended.reason } else { false }
    }

    /// At one that whoever asks how this host stands knows nothing of.
    package var isAtPoint: Bool { participant.state != .idle }

    mutating func surveyed(_ survey: Survey, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        state = .idle
        guard !isQuiet else { return Turn() }
        if let problem = survey.problem {
            holdUp = problem
            heldUpSince = heldUpSince ?? now
            notBefore = now + Self.longestPause
            return Turn()
        }
        guard survey.changed || isWanted(record, now) else {
            if survey.absent == nil { holdUp = nil }
            return Turn()
        }
        requested = false
        preparedAt = now
        coordinator.countOn(from: max(survey.highest, record.highestPoint))
        coordinator.leaveOut(survey.absent ?? [])
        return tell(.request, &record, now)
    }

    // MARK: Time

    mutating func tickOfSeveral(_ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        var turn = Turn<Action>()
        if now >= takeUpAt ?? .max { turn = takeUpAgain(&record, now) }
        if now >= participant.wakeAt ?? .max { turn = turn + tell(Participant.Event.tick, &record, now) }
        if coordinates, now >= coordinator.wakeAt ?? .max {
            turn = turn + tell(Coordinator.Event.tick, &record, now)
        }
        return turn
    }

    func wakeAtOfSeveral(_ record: GroupRecord) -> UInt64? {
        var times = [participant.wakeAt, coordinates ? coordinator.wakeAt : nil, takeUpAt]
        switch state {
        case .idle: if mayBegin { times.append(ownWakeAt(record)) }
        case .offline: times.append(ownWakeAt(record))
        default: break
        }
        return times.compactMap { $0 }.min()
    }

    /// Another point may be due.
    mutating func goOnIfIdle(_ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        if case .idle = state, mayBegin { tick(&record, now) } else { Turn() }
    }

    // MARK: The coordinator asks

    mutating func asked(_ message: HostMessage, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        let request = message.request
        guard request.body.number <= PointRecord.highestNumber, request.epoch <= PointRecord.highestNumber,
            message.isPlausible
        else {
            return Turn([.contradicted("point \(request.body.number) of epoch \(request.epoch) cannot be")])
        }
        guard request.epoch >= participant.record.epoch else { return tell(.request(request), &record, now) }
        switch (request.body, participant.state) {
        case (.formAtOnce, _): return Turn([.contradicted("one of several hosts does not form at once")])
        case (.makeReady(let number), .idle) where number > participant.record.number:
            guard let problem else { break }
            return said(Stamped(epoch: request.epoch, .failed(number, problem)), &record, now)
        case (.run, .formed(request.body.number, let until)) where now < until:
            guard runs == nil else { return Turn() }
            runs = message
            return Turn([.letGo])
        case (.end(let number), _): haveCommitted(number, message, &record)
        default: break
        }
        return tell(.request(request), &record, now)
    }

    /// Every remote has committed it. Who does not hold it any more is told by its own remote, at the next session: that may have another copy now,
    /// without the point.
    private mutating func haveCommitted(_ number: UInt64, _ message: HostMessage, _ record: inout GroupRecord) {
        guard number > record.lastCommitted?.number ?? 0, var point = record.held, point.number == number else {
            return
        }
        point.formedAt = message.formedAt ?? point.formedAt
        point.committedAt = message.committedAt ?? point.committedAt
        guard point.isPlausible else { return }
        record.primary?.lastCommitted = point
        record.primary?.fromImage = false
        if case .connecting = state { committedMeanwhile = true }
        (resyncing, attempt) = (false, 0)
    }

    mutating func didHold(
        at time: Double, _ changed: [Int], _ record: inout GroupRecord, _ now: UInt64
    ) -> Turn<Action> {
        formed = (time, changed)
        return tell(.formed(participant.record.number), &record, now)
    }

    mutating func didLetGo(_ isIntact: Bool, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        guard let message = runs, case .formed(let number, _) = participant.state else {
            runs = nil
            return Turn()
        }
        // Still set: what lets go anew finds that done.
        defer { runs = nil }
        guard isIntact else {
            return tell(.lost(number, "acknowledgements went by themselves at the deadline"), &record, now)
        }
        if let time = message.formedAt { formed.at = time }
        return tell(.request(message.request), &record, now)
    }

    // MARK: What goes wrong here

    /// The link, and nothing else: a point that is formed is drained over the next.
    mutating func lostLink(_ reason: String, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        let number = participant.record.number
        let told =
            participant.state.kind == .makingReady ? tell(.notReady(number, reason), &record, now) : Turn()
        return told + failed(reason, retry: true, &record, now)
    }

    mutating func lostPoint(_ reason: String, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        tell(.lost(participant.record.number, reason), &record, now)
    }

    /// Whatever point is under way here is given up, and the coordinator told.
    mutating func abandon(
        _ reason: String, _ next: Next, _ record: inout GroupRecord, _ now: UInt64
    ) -> Turn<Action> {
        let number = participant.record.number
        let event: Participant.Event
        switch participant.state.kind {
        case .idle: return carryOut(next, &record, now)
        case .givingUp:
            state = .givingUp(next)
            return Turn()
        case .makingReady: event = .notReady(number, reason)
        case .forming, .formed, .draining: event = .lost(number, reason)
        // As if it were asked to: nobody relies on its word any more.
        case .ready, .drained: event = .request(Stamped(epoch: participant.record.epoch, .giveUp(number)))
        }
        let turn = tell(event, &record, now)
        state = .givingUp(next)
        return turn
    }

    mutating func couldNotSaveOfSeveral(
        _ words: String, _ record: inout GroupRecord, _ now: UInt64
    ) -> Turn<Action> {
        let turn = participant.saveFailed()
        record.take(participant.record, formedAt: formed.at)
        let own = carryOut(turn, &record, now)
        switch state {
        case .stopped, .offline, .givingUp(.stop): return own + closeLink()
        case .givingUp:
            state = .givingUp(.retry(words))
            return own + closeLink()
        case .connecting, .marking, .idle, .surveying, .preparing, .atPoint:
            guard participant.state != .idle else { return own + failed(words, retry: true, &record, now) }
            return own + closeLink() + abandon(words, .retry(words), &record, now)
        }
    }

    // MARK: A new process, a new session

    mutating func takeUpOfSeveral(_ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        let own = carryOut(participant.start(isHeld: record.held != nil), &record, now)
        guard coordinates else { return own }
        let turn = coordinator.start(now: now)
        record.keep(coordinator.record)
        return own + carryOut(turn, &record, now)
    }

    mutating func goOnOfSeveral(_ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        switch participant.state.kind {
        case .idle:
            resyncing = resyncing && record.lastCommitted == nil
            return .saved() + becomeIdle(&record, now, due: now)
        case .draining:
            state = .atPoint(.none)
            return .saved(then: [.rewind]) + startMove(Array(0..<settings.volumes), &record, now)
        case .makingReady, .ready, .forming, .formed, .drained:
            state = .atPoint(.none)
            return .saved()
        case .givingUp:
            state = .givingUp(.carryOn)
            return .saved()
        }
    }

    // MARK: What the two say

    /// To whoever coordinates, here or elsewhere.
    private mutating func said(
        _ answer: Stamped<HostAnswer>, _ record: inout GroupRecord, _ now: UInt64
    ) -> Turn<Action> {
        var answer = answer
        if case .drained(let number, _) = answer.body { answer.body = .drained(number, record.copyIdentity) }
        return Turn([.answer(answer)]) + (coordinates ? tell(.host(ownIndex, answer), &record, now) : Turn())
    }

    mutating func performOfSeveral(
        _ action: Participant.Action, _ record: inout GroupRecord, _ now: UInt64
    ) -> Turn<Action> {
        switch action {
        case .answer(let answer): return said(answer, &record, now)
        case .makeReady(let number):
            if let problem = problemBeforeForming { return tell(.notReady(number, problem), &record, now) }
            state = .preparing(number)
            return Turn([.prepare(number: number)])
        case .holdAndForm(let number): return Turn([.holdAndForm(number: number)])
        case .letGo:
            // They have been let go, or are just being.
            guard runs == nil else { return Turn() }
            return Turn([.letGo])
        case .drain:
            // Without a session it waits for the next.
            guard case .atPoint = state else { return Turn() }
            return startMove(formed.changed, &record, now)
        case .giveUp: return startGivingUp()
        case .end(let number):
            let ended = Turn<Action>([.endPoint(number: number)])
            guard case .atPoint = state else { return ended }
            return ended + becomeIdle(&record, now)
        case .contradiction(let words): return Turn([.contradicted(words)])
        case .formAtOnce: invariantFailed("several hosts do not form at once", #fileID, #line)
        }
    }

    /// Of a point that has just been written down.
    private var problemBeforeForming: String? {
        switch state {
        case .idle, .surveying: nil
        default: problem ?? "it is at a point"
        }
    }

    private mutating func startGivingUp() -> Turn<Action> {
        switch state {
        // Giving up voids what the link or the volumes have been asked: it is asked anew.
        case .atPoint(.moves), .atPoint(.commits), .connecting, .marking:
            state = .givingUp(.connect)
            return closeLink()
        case .atPoint(.none), .preparing, .idle, .surveying: state = .givingUp(.carryOn)
        case .stopped, .offline, .givingUp: break
        }
        return Turn([.giveUp])
    }

    mutating func performOfSeveral(
        _ action: Coordinator.Action, _ record: inout GroupRecord, _ now: UInt64
    ) -> Turn<Action> {
        switch action {
        case .askHost(let host, let request):
            let message = HostMessage(
                request, formedAt: record.held?.formedAt ?? formed.at, committedAt: committedAt)
            return host == ownIndex ? asked(message, &record, now) : Turn([.askHost(host, message)])
        case .askRemote(let remote, let request):
            let message = RemoteMessage(
                request, formedAt: record.held?.formedAt ?? formed.at, absent: coordinator.record.absent,
                copy: coordinator.copies[remote])
            return Turn([.askRemote(remote, message)])
        case .committed:
            (holdUp, pauses) = (behind, 0)
            heldUpSince = nil
            return Turn()
        case .givesUp(let number, let reason):
            holdUp = "point \(number) was given up: \(reason)"
            heldUpSince = heldUpSince ?? now
            requested = true  // whoever asked for it still waits
            notBefore = now + min(Self.readyRetry << UInt64(min(pauses, 10)), Self.longestPause)
            pauses += 1
            return Turn()
        case .stopped(let reason):
            holdUp = reason
            // Its own record may be older than what others have heard: its disk was replaced, or another was named the master before.
            guard let epoch = coordinator.supersededBy, epoch < PointRecord.highestNumber else { return Turn() }
            if settings.part.isElected {
                // The next election goes above it.
                record.hear(epoch)
                coordinates = false
            } else {
                takeUpAt = now + Self.longestPause
            }
            return Turn()
        case .contradiction(let words): return Turn([.contradicted(words)])
        }
    }

    /// The named master takes up above the epoch that others know of.
    private mutating func takeUpAgain(_ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        takeUpAt = nil
        guard coordinates, let epoch = coordinator.supersededBy, epoch < PointRecord.highestNumber else {
            return Turn()
        }
        var own = coordinator.record
        own.epoch = max(own.epoch, epoch)
        coordinator = Coordinator(settings.part.coordination, record: own)
        holdUp = nil
        let turn = coordinator.start(now: now)
        record.keep(coordinator.record)
        return carryOut(turn, &record, now)
    }

    /// Another host cannot be reached, and the group goes on without it.
    mutating func lostHost(_ host: Int, _ record: inout GroupRecord, _ now: UInt64) -> Turn<Action> {
        guard coordinates else { return Turn() }
        return tell(.hostLost(host), &record, now) + goOnIfIdle(&record, now)
    }

    /// Hosts without which the last point was formed.
    private var behind: String? {
        guard let absent = coordinator.record.absent else { return nil }
        let all = settings.part.coordination.hostNames
        let names = absent.filter(all.indices.contains).map { all[$0] }.joined(separator: ", ")
        return "the last point was formed without \(names), which is lost or begins anew; the volumes there are behind"
    }

    mutating func heard(
        _ answer: Stamped<RemoteAnswer>, of remote: Int, at time: Double?, _ record: inout GroupRecord, _ now: UInt64
    ) -> Turn<Action> {
        if case .committed = answer.body, let time { committedAt = time }
        return tell(.remote(remote, answer), &record, now) + goOnIfIdle(&record, now)
    }

    /// Whoever waits for a point is told why there is none.
    package func isHeldUpForLong(_ now: UInt64) -> Bool { heldUpSince.map { now - $0 > Self.longestHoldUp } ?? false }
    private static let longestHoldUp: UInt64 = 5_000_000_000

    /// Whom the coordinator here waits for.
    package var waitsFor: String? {
        guard coordinates else { return nil }
        if case .surveying = state { return "the hosts are asked how they stand" }
        return coordinator.waitsFor
    }

    package var coordinatorRecord: CoordinatorRecord? { coordinates ? coordinator.record : nil }

    /// Whether this host drains the point: then the answer to `run` may wait until it has.
    package func isDraining(_ number: UInt64) -> Bool { participant.state == .draining(number) }
}

extension Cycle.Action {
    /// The coordinator asks for it.
    package var isCoordinators: Bool {
        switch self {
        case .survey, .askHost, .askRemote: true
        default: false
        }
    }
}

extension GroupRecord {
    /// What the coordinator of this site finds again.
    mutating func keep(_ record: CoordinatorRecord) {
        var next = coordination ?? CoordinationRecord()
        next.coordinator = record
        coordination = next
    }

    mutating func keep(_ record: ParticipantRecord) {
        lastNumber = max(lastNumber, record.number)
        hear(record.epoch)
    }

    mutating func hear(_ epoch: UInt64) {
        guard epoch > coordination?.epoch ?? 0 else { return }
        var next = coordination ?? CoordinationRecord()
        next.epoch = epoch
        coordination = next
    }
}
