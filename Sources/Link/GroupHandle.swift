// GroupHandle.swift: a group as the rest of the site sees it: what it asks for goes to the group's thread, which owns the record.
//
// Must be prevented:
//   somebody waits for an answer that nobody gives any more: what is asked of a thread that has ended is refused

import Base
import Groups
import NBDServer
import Ring
import Synchronization

/// What others see of a group.
package struct GroupStatus: Sendable {
    package var record: GroupRecord
    /// The record's file may hold another one.
    package var isUnsaved = false
    /// Of a group that mirrors from this site: how that stands, and why it does not go on.
    package var state = ShownState.simplex
    package var reason: String?
    package var bytesPerSecond: Double = 0
    /// For how long the peer has let wait what it was sent or asked, once that is longer than usual.
    package var silentSeconds: Double?
    /// Bytes that may be on their way to the peer, and bytes that were found alike there and not sent.
    package var windowBytes: Double = 0
    package var bytesSpared: UInt64 = 0
    /// Longest hold of acknowledgements of the points so far, and of the last, in nanoseconds.
    package var lastHold: UInt64 = 0
    package var holds: [UInt64] = []
    package var holdHistogram = HoldHistogram()
    /// Several hosts, at the coordinator: why points are not formed.
    package var holdUp: String?
    /// Several hosts: points are formed from here.
    package var coordinates = false
}

package final class GroupHandle: Sendable {
    enum Message: Sendable {
        case event(Cycle.Event, epoch: UInt64)
        case opened(PeerState, exports: [String], epoch: UInt64)
        case drained(slot: Int, DrainRead.Answer, epoch: UInt64)
        /// Every grain of the peer's volumes that are not known is marked, in memory.
        case marked(epoch: UInt64)
        /// No reactor holds the point before any more.
        case released(changed: Bool, used: [Int], epoch: UInt64)
        /// The peer's checksums of what a slot holds.
        case compared(slot: Int, [UInt8], epoch: UInt64)
        /// What an intermediate had taken when that was asked for is on stable storage.
        case intermediateFlushed(epoch: UInt64)
        case setRate(UInt64)
        /// The group's coordinator, at another site, asks this host; nil when it has nothing to say yet.
        case asked(HostMessage, waits: Bool, @Sendable (Stamped<HostAnswer>?) -> Void)
        case surveyed(@Sendable (Survey) -> Void)
        /// Of this host, for the coordinator here.
        case ownSurvey(Survey, epoch: UInt64)
        case callAnswered(host: Int)
        case callEnded(host: Int?, remote: Int?, isReached: Bool, problem: String? = nil)
        /// No point begins; answered when none is under way.
        case quiet(Bool, seconds: Double, @Sendable (Bool) -> Void)
        /// By election: this site forms points; or it does not any more.
        case coordinate(epoch: UInt64, CoordinatorRecord?, any CoordinatorStore)
        case stopCoordinating(String)
        /// What those who wait for a point hear.
        case noPoint(String)
        case change(GroupChange, @Sendable ((any Error)?) -> Void)
        case settle(@Sendable ((any Error)?) -> Void)
        case wait(Alongside?, @Sendable (Result<PointRecord, ReplicationRefusal>) -> Void)
        case begin(Replicator.Configuration, @Sendable () -> Void)
        case end(@Sendable () -> Void)
        case stop(@Sendable () -> Void)
    }

    let mailbox: Mailbox<Message>
    let snapshot: Mutex<GroupStatus>
    /// The thread takes no more messages.
    private let ended = Mutex(false)

    /// Starts the group's thread.
    ///
    /// - Parameter save: writes the record durably before it returns.
    package init(
        name: String, record: GroupRecord, save: @escaping @Sendable (GroupRecord) throws -> Void
    ) throws(SystemError) {
        mailbox = try Mailbox()
        snapshot = Mutex(GroupStatus(record: record))
        startThread(name: "group-\(name)") { [self] in groupMain(self, record, save) }
    }

    package var status: GroupStatus { snapshot.withLock { $0 } }
    package var record: GroupRecord { snapshot.withLock { $0.record } }

    // MARK: The record

    /// Changes the record: durably or, unless it has happened already, not at all.
    package func change(_ change: GroupChange) async throws { try await answer { .change(change, $0) } }

    /// Makes sure that no change that was taken back stands in the record's file.
    package func settle() async throws { try await answer { .settle($0) } }

    private func answer(_ message: (@escaping @Sendable ((any Error)?) -> Void) -> Message) async throws {
        try await withCheckedThrowingContinuation { (continuation: CheckedContinuation<Void, any Error>) in
            let asked = ask(
                message { problem in
                    if let problem { continuation.resume(throwing: problem) } else { continuation.resume() }
                })
            if !asked { continuation.resume(throwing: Refusal("the site stops", .passing)) }
        }
    }

    // MARK: Mirroring

    /// Begins to send to the peer.
    package func begin(_ configuration: Replicator.Configuration) async { await until { .begin(configuration, $0) } }

    /// Ends it. A point that is held stays held, and is taken up when it begins again.
    package func end() async { await until { .end($0) } }

    package func suspend() { mailbox.send(.event(.suspend, epoch: 0)) }
    package func resume() { mailbox.send(.event(.resume, epoch: 0)) }

    /// Forms a point as soon as the one before is committed.
    package func request() { mailbox.send(.event(.request, epoch: 0)) }

    /// A volume could not hold its point; without a number, whichever is at hand is given up by command.
    package func pointLost(_ reason: String, number: UInt64? = nil) {
        mailbox.send(.event(.pointLost(reason, number: number), epoch: 0))
    }

    /// Hosts wait for old images of a volume, by its index in the group.
    package func imagesWanted(_ volume: Int) { mailbox.send(.event(.move(.wanted(volume: volume)), epoch: 0)) }

    /// Bounds the link, in bytes a second; 0 = unbounded.
    package func setRate(_ rate: UInt64) { mailbox.send(.setRate(rate)) }

    /// What is done on the reactor of each volume, by its index, in the instant of a point.
    package typealias Alongside = @Sendable (Reactor, Int) -> Void

    /// Forms a point after this call and returns it once the peer has committed it.
    ///
    /// - Parameter alongside: done in the instant of that point; with it, the point fails here if it is given up.
    package func cycle(alongside: Alongside? = nil) async throws(ReplicationRefusal) -> PointRecord {
        let result: Result<PointRecord, ReplicationRefusal> = await withCheckedContinuation {
            continuation in
            if !ask(.wait(alongside) { continuation.resume(returning: $0) }) {
                continuation.resume(returning: .failure(.ended))
            }
        }
        return try result.get()
    }

    // MARK: Several hosts

    /// This site is elected to form points.
    ///
    /// - Parameters:
    ///   - record: what the one before it has left.
    ///   - store: keeps it.
    package func coordinate(epoch: UInt64, record: CoordinatorRecord?, _ store: any CoordinatorStore) {
        snapshot.withLock { $0.coordinates = true }
        mailbox.send(.coordinate(epoch: epoch, record, store))
    }

    package func stopCoordinating(_ reason: String) { mailbox.send(.stopCoordinating(reason)) }

    /// No point of several hosts begins from here any more; or they begin again.
    ///
    /// - Returns: false when one was still under way after so many seconds.
    @discardableResult
    package func setQuiet(_ isQuiet: Bool, seconds: Double = 0) async -> Bool {
        await withCheckedContinuation { continuation in
            if !ask(.quiet(isQuiet, seconds: seconds) { continuation.resume(returning: $0) }) {
                continuation.resume(returning: true)
            }
        }
    }

    /// The group's coordinator asks this host.
    ///
    /// - Parameter waits: if the host drains the point, its answer may come when it has.
    /// - Returns: nil when it has nothing to say yet.
    package func asked(_ message: HostMessage, waits: Bool) async -> Stamped<HostAnswer>? {
        await withCheckedContinuation { continuation in
            if !ask(.asked(message, waits: waits) { continuation.resume(returning: $0) }) {
                continuation.resume(returning: nil)
            }
        }
    }

    /// Whether this host can form a point now, and has anything for it.
    package func survey() async -> Survey {
        await withCheckedContinuation { continuation in
            if !ask(.surveyed { continuation.resume(returning: $0) }) {
                continuation.resume(returning: Survey(changed: false, problem: "the site stops", highest: 0))
            }
        }
    }

    // MARK: The thread

    /// Ends the thread.
    package func stop() async { await until { .stop($0) } }

    /// Leaves a message, and waits until it was taken, or nobody takes it any more.
    private func until(_ message: (@escaping @Sendable () -> Void) -> Message) async {
        await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
            if !ask(message { continuation.resume() }) { continuation.resume() }
        }
    }

    /// Leaves a message that must be answered; false when nobody would.
    private func ask(_ message: Message) -> Bool {
        ended.withLock { $0 ? false : mailbox.send(message) }
    }

    /// For the thread, when it ends: what was asked for until now is there, and nothing more comes.
    func threadEnds() { ended.withLock { $0 = true } }

    func noteHold(_ nanoseconds: UInt64) {
        snapshot.withLock { status in
            status.lastHold = nanoseconds
            status.holds.append(nanoseconds)
            status.holdHistogram.add(Double(nanoseconds) / 1e9)
            if status.holds.count > 1024 { status.holds.removeFirst(512) }
        }
    }
}

package struct ReplicationRefusal: Error, CustomStringConvertible {
    package var description: String
    init(_ description: String) { self.description = description }
    static let ended = ReplicationRefusal("mirroring from this site has ended")
}

nonisolated func groupMain(
    _ handle: GroupHandle, _ record: GroupRecord, _ save: @escaping @Sendable (GroupRecord) throws -> Void
) {
    GroupThread(handle, record, save).run()
}
