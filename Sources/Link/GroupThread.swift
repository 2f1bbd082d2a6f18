// GroupThread.swift: the one thread of a group: it has the group's record, and carries out what `Group` says.
//
// Must be prevented:
//   something is begun that relies on a record which is not on stable storage (`Turn`)
//   somebody waits for an answer that nobody gives any more

import Base
import Glibc
import Groups
import Ring
import Synchronization

final class GroupThread {
    let handle: GroupHandle
    var mailbox: Mailbox<GroupHandle.Message> { handle.mailbox }
    private var group: Group
    private let save: @Sendable (GroupRecord) throws -> Void
    /// While this site sends to its peer.
    private var replicator: Replicator?
    private var epoch: UInt64 = 0
    private var events: [Cycle.Event] = []
    private var performing = false
    private struct Waiter {
        var number: UInt64
        /// Done in the instant of the point; then only that very point will do.
        var alongside: GroupHandle.Alongside?
        var answer: @Sendable (Result<PointRecord, ReplicationRefusal>) -> Void
    }
    private var waiters: [Waiter] = []
    private var stopped: [@Sendable () -> Void] = []
    /// Of a coordinator at another site, in the order in which they came.
    private struct Question {
        var message: HostMessage
        var until: UInt64
        var answer: @Sendable (Stamped<HostAnswer>?) -> Void
    }
    private var questions: [Question] = []
    private var waiting: (words: String?, since: UInt64) = (nil, 0)
    private static let longWaitNanoseconds: UInt64 = 2_000_000_000
    private var quietWaiters: [(until: UInt64, done: @Sendable (Bool) -> Void)] = []
    /// By election: where the coordinator's record is kept, and what is there.
    private var store: (any CoordinatorStore)?
    private var stored: CoordinatorRecord?
    private static let questionLimit = 32
    private static let questionPatience: UInt64 = 1_000_000_000

    init(_ handle: GroupHandle, _ record: GroupRecord, _ save: @escaping @Sendable (GroupRecord) throws -> Void) {
        self.handle = handle
        self.save = save
        group = Group(record: record)
    }

    var record: GroupRecord { group.record }

    func run() {
        while stopped.isEmpty {
            publish()
            wait()
            takeMessages()
            replicator?.service()
            endParkedQuestions()
            if let wakeAt = group.wakeAt, monotonicNanoseconds() >= wakeAt { handle(.tick) }
        }
        end()
        handle.threadEnds()
        takeMessages()
        for answer in stopped { answer() }
    }

    private func wait() {
        var entries = [pollfd(fd: mailbox.eventDescriptor, events: Int16(POLLIN), revents: 0)]
        entries += replicator?.pollEntries() ?? []
        var milliseconds: Int32 = replicator == nil ? -1 : 1000
        let now = monotonicNanoseconds()
        for wait in [
            group.wakeAt.map { $0 <= now ? 0 : ($0 - now) / 1_000_000 + 1 },
            questions.first.map { $0.until <= now ? 0 : ($0.until - now) / 1_000_000 + 1 },
            replicator?.wait.map { $0 / 1_000_000 + 1 },
        ] {
            guard let wait else { continue }
            let bounded = Int32(min(1000, wait))
            milliseconds = milliseconds < 0 ? bounded : min(milliseconds, bounded)
        }
        let count = poll(&entries, nfds_t(entries.count), milliseconds)
        if count > 0 { replicator?.notify(entries[1...]) }
    }

    private func takeMessages() {
        for message in mailbox.drain() {
            switch message {
            case .change(let change, let done): take(change, done)
            case .settle(let done): done(save(group.settle()))
            case .stop(let done): stopped.append(done)
            case .end(let done):
                end()
                done()
            // Nothing more is begun; the record is still changed for who asks.
            case .begin(_, let done) where !stopped.isEmpty: done()
            case .wait(_, let answer) where !stopped.isEmpty: answer(.failure(.ended))
            case .begin(let configuration, let done):
                begin(configuration)
                done()
            case .wait(let alongside, let answer): wait(alongside, answer)
            case .event(let event, let asker): replicator?.event(event, asker)
            case .opened(let state, let exports, let asker): replicator?.opened(state, exports, asker)
            case .drained(let slot, let answer, let asker): replicator?.drained(slot, answer, asker)
            case .compared(let slot, let digests, let asker): replicator?.compared(slot, digests, asker)
            case .intermediateFlushed(let asker): replicator?.intermediateFlushed(asker)
            case .setRate(let rate): replicator?.setRate(rate)
            case .asked(let message, let waits, let answer): asked(message, waits: waits, answer)
            case .surveyed(let answer): survey(answer)
            case .ownSurvey(let survey, let asker): replicator?.surveyed(survey, asker)
            case .coordinate(let epoch, let record, let store): coordinate(epoch, record, store)
            case .stopCoordinating(let reason): stopCoordinating(reason)
            case .quiet(let isQuiet, let seconds, let done): setQuiet(isQuiet, seconds, done)
            case .noPoint(let reason): refuseWaiters(reason)
            case .callAnswered(let host): replicator?.callAnswered(host: host)
            case .callEnded(let host, let remote, let isReached, let problem):
                replicator?.callEnded(host: host, remote: remote, isReached: isReached, problem: problem)
            case .marked(let asker): replicator?.marked(asker)
            case .released(let changed, let used, let asker): replicator?.released(changed, used, asker)
            }
        }
    }

    // MARK: The record

    private func take(_ change: GroupChange, _ done: ((any Error)?) -> Void) {
        do {
            let problem = save(try group.change(change))
            done(change.hasHappened ? nil : problem)
        } catch {
            done(error)
        }
    }

    /// What is not of the cycle's asking; whoever asked finds it in the status.
    private func save(_ turn: Turn<Cycle.Action>) -> (any Error)? {
        defer { publish() }
        return perform(turn, ofCycle: false)
    }

    /// - Returns: why the record could not be saved.
    @discardableResult
    private func perform(_ turn: Turn<Cycle.Action>, ofCycle: Bool = true) -> (any Error)? {
        for action in turn.before { replicator?.perform(action) }
        if turn.saves {
            do {
                try save(group.record)
                group.wasSaved()
                try keepCoordinator()
            } catch let failure as LostElection {
                // What the others are asked relies on it; what this host does is written down here.
                for action in turn.after where !action.isCoordinators { replicator?.perform(action) }
                stopCoordinating(failure.description)
                return nil
            } catch {
                perform(group.saveFailed("\(error)", ofCycle: ofCycle, now: monotonicNanoseconds()))
                return error
            }
        }
        for action in turn.after { replicator?.perform(action) }
        return nil
    }

    // MARK: Mirroring

    /// Events that come up while actions are carried out wait until all of those are.
    func handle(_ event: Cycle.Event) {
        events.append(event)
        guard !performing else { return }
        performing = true
        while !events.isEmpty {
            perform(group.handle(events.removeFirst(), now: monotonicNanoseconds()))
        }
        performing = false
    }

    func adapt(_ pace: MovePace) { group.adapt(pace) }

    private func begin(_ configuration: Replicator.Configuration) {
        end()
        epoch += 1
        replicator = Replicator(self, configuration, epoch: epoch)
        performing = true
        perform(group.begin(configuration.settings, now: monotonicNanoseconds()))
        performing = false
        handle(.tick)
        publish()
    }

    private func end() {
        replicator?.endCoordination()
        for question in questions { question.answer(nil) }
        questions = []
        replicator?.closeLink()
        epoch = replicator?.epoch ?? epoch
        (store, stored) = (nil, nil)
        replicator = nil
        group.end()
        publish()
        for waiter in waiters { waiter.answer(.failure(.ended)) }
        waiters = []
    }

    // MARK: Several hosts

    private func asked(
        _ message: HostMessage, waits: Bool, _ answer: @escaping @Sendable (Stamped<HostAnswer>?) -> Void
    ) {
        guard let cycle = group.cycle else { return answer(nil) }
        if questions.count >= Self.questionLimit { questions.removeFirst().answer(nil) }
        let isDraining = cycle.isDraining(message.request.body.number)
        questions.append(
            Question(message: message, until: monotonicNanoseconds() + Self.questionPatience, answer: answer))
        if !waits || !isDraining { handle(.asked(message)) }
    }

    func answered(_ answer: Stamped<HostAnswer>) {
        func isAnswered(_ question: Question) -> Bool {
            let (request, number) = (question.message.request, answer.body.number)
            return request.epoch == answer.epoch && (number == nil || number == request.body.number)
        }
        for question in questions where isAnswered(question) { question.answer(answer) }
        questions.removeAll(where: isAnswered)
    }

    /// Who asks hears after a second that there is nothing new.
    private func endParkedQuestions() {
        let now = monotonicNanoseconds()
        while let question = questions.first, question.until <= now {
            questions.removeFirst()
            let (number, epoch) = (question.message.request.body.number, question.message.request.epoch)
            let isDraining = group.cycle?.isDraining(number) == true
            question.answer(isDraining ? Stamped(epoch: epoch, .ran(number)) : nil)
        }
    }

    private struct LostElection: Error { var description: String }

    private func coordinate(_ epoch: UInt64, _ record: CoordinatorRecord?, _ store: any CoordinatorStore) {
        (self.store, stored) = (store, record)
        replicator?.endConversations()
        performing = true
        perform(group.coordinate(epoch: epoch, record, now: monotonicNanoseconds()))
        performing = false
        handle(.tick)
        publish()
    }

    private func stopCoordinating(_ reason: String) {
        (store, stored) = (nil, nil)
        replicator?.endConversations()
        let wasPerforming = performing
        performing = true
        perform(group.stopCoordinating(reason, now: monotonicNanoseconds()))
        performing = wasPerforming
        if !wasPerforming { handle(.tick) }
        if replicator != nil { refuseWaiters("no site coordinates the group just now: \(reason)") }
        publish()
    }

    /// Where the next who is elected finds it.
    private func keepCoordinator() throws {
        guard let store, let record = group.cycle?.coordinatorRecord, record != stored else { return }
        do { try store.save(record) } catch { throw LostElection(description: "\(error)") }
        stored = record
    }

    private func setQuiet(_ isQuiet: Bool, _ seconds: Double, _ done: @escaping @Sendable (Bool) -> Void) {
        group.setQuiet(isQuiet)
        quietWaiters.append((monotonicNanoseconds() + UInt64(seconds * 1e9), done))
        handle(.tick)
        tellQuiet()  // also when the thread ends, and nothing is published any more
    }

    /// Whom the coordinator here waits for, once that has taken long.
    private func longWait() -> String? {
        let (waitsFor, now) = (group.cycle?.waitsFor, monotonicNanoseconds())
        if waitsFor != waiting.words { waiting = (waitsFor, now) }
        guard let waitsFor, now - waiting.since > Self.longWaitNanoseconds else { return nil }
        return waitsFor + (replicator?.remotesProblem.map { " (\($0))" } ?? "")
    }

    private func tellQuiet() {
        guard !quietWaiters.isEmpty else { return }
        let (isAtRest, now) = (group.cycle?.isAtRest != false, monotonicNanoseconds())
        for (until, done) in quietWaiters where isAtRest || now >= until { done(isAtRest) }
        quietWaiters.removeAll { isAtRest || now >= $0.until }
    }

    private func survey(_ answer: @escaping @Sendable (Survey) -> Void) {
        let highest = group.record.highestPoint
        guard let replicator, let cycle = group.cycle else {
            let isStale = group.record.conflict != nil
            let problem =
                isStale ? "its remote has failed over, or hosts may have written at both" : "it does not mirror"
            return answer(Survey(changed: false, problem: problem, highest: highest, isStale: isStale))
        }
        if let problem = cycle.problem {
            return answer(Survey(changed: false, problem: problem, highest: highest, isStale: cycle.isRefused))
        }
        // Its volumes are free once the next point's first message has come.
        if cycle.isAtPoint { return answer(Survey(changed: true, problem: nil, highest: highest)) }
        replicator.survey(answer)
    }

    // MARK: Who waits

    private func wait(
        _ alongside: GroupHandle.Alongside?,
        _ answer: @escaping @Sendable (Result<PointRecord, ReplicationRefusal>) -> Void
    ) {
        guard let cycle = group.cycle else { return answer(.failure(.ended)) }
        if let reason = cycle.suspension {
            return answer(.failure(ReplicationRefusal("the group is suspended: \(reason)")))
        }
        waiters.append(Waiter(number: group.nextNumber, alongside: alongside, answer: answer))
        handle(.request)
        if !cycle.coordinates { replicator?.askForPoint() }
    }

    private func refuseWaiters(_ reason: String) {
        for waiter in waiters { waiter.answer(.failure(ReplicationRefusal(reason))) }
        waiters = []
    }

    /// What is to be done in the instant of a point.
    func alongside(_ number: UInt64) -> GroupHandle.Alongside? {
        waiters.first { $0.number == number && $0.alongside != nil }?.alongside
    }

    private func publish() {
        let (record, isUnsaved, state, reason) = (
            group.record, group.isUnsaved, group.shownState, group.cycle?.suspension
        )
        tellQuiet()
        let (holdUp, coordinates) = (group.cycle?.holdUp ?? longWait(), group.cycle?.coordinates == true)
        handle.snapshot.withLock { status in
            (status.record, status.isUnsaved) = (record, isUnsaved)
            (status.state, status.reason) = (state, reason)
            (status.holdUp, status.coordinates) = (holdUp, coordinates)
            replicator?.tell(state, reason, in: &status)
        }
        if let committed = record.lastCommitted {
            for waiter in waiters where waiter.number <= committed.number {
                waiter.answer(
                    waiter.alongside == nil || waiter.number == committed.number
                        ? .success(committed) : .failure(ReplicationRefusal("the point was given up; try again")))
            }
            waiters.removeAll { $0.number <= committed.number }
        }
        if let reason { refuseWaiters("the group is suspended: \(reason)") }
        if let holdUp, group.cycle?.isHeldUpForLong(monotonicNanoseconds()) == true { refuseWaiters(holdUp) }
    }
}
