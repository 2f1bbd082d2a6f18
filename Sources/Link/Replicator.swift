// Replicator.swift: the thread of one group at its primary. It drives `Cycle`: reads from the volumes' reactors, sends
// over libnbd, talks to the peer's control API through `PeerClient`.
//
// Must be prevented:
//   an answer that belongs to an earlier drain or link is taken for one of the present (epochs)
//   a buffer is reused while a reactor still reads into it (each drain has its own buffers until all answered)
//   a state is acted on before its record is saved where the order matters (actions are carried out in order)

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
    package var targetFile: StoreFile
    package var target: OpenFile
    /// Which grains of the point are in the target; behind the file's header.
    package var preserved: MappedFile
    /// CR and OOS.
    package var recording: MappedFile

    package init(
        name: String, reactor: ReactorHandle, number: VolumeNumber, geometry: Geometry,
        targetFile: StoreFile, target: OpenFile, preserved: MappedFile, recording: MappedFile
    ) {
        self.name = name
        self.reactor = reactor
        self.number = number
        self.geometry = geometry
        self.targetFile = targetFile
        self.target = target
        self.preserved = preserved
        self.recording = recording
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
    /// Checksums (`Digest`) of a range of the secondary, in blocks; nil when this peer has none to give.
    func checksums(session: UInt64, volume: String, offset: UInt64, length: Int, block: Int) async throws -> [UInt8]?
}

/// What others see of a group's replication.
package struct ReplicationStatus: Sendable {
    package var state = ShownState.simplex
    package var reason: String?
    package var record: GroupRecord
    /// The record's file may hold another one.
    package var isUnsaved = false
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
}

package final class Replicator: Sendable {
    enum Message: Sendable {
        case event(Cycle.Event, epoch: UInt64)
        case opened(PeerState, exports: [String], epoch: UInt64)
        case drained(slot: Int, DrainRead.Answer, epoch: UInt64)
        /// Every grain of the peer's volumes that are not known is marked, in memory.
        case marked(epoch: UInt64)
        /// No reactor holds the point before any more.
        case released(changed: Bool, epoch: UInt64)
        /// The peer's checksums of what a slot holds.
        case compared(slot: Int, [UInt8], epoch: UInt64)
        case setRate(UInt64)
        /// `anyway`: it has happened, whether it can be saved now or later.
        case amend(@Sendable (inout GroupRecord) -> Void, anyway: Bool, @Sendable ((any Error)?) -> Void)
        case wait(Alongside?, @Sendable (Result<PointRecord, ReplicationRefusal>) -> Void)
        case stop(@Sendable () -> Void)
    }

    let mailbox: Mailbox<Message>
    let snapshot: Mutex<ReplicationStatus>
    /// The thread takes no more messages.
    private let ended = Mutex(false)

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

    /// Leaves a message that must be answered; false when nobody would.
    private func ask(_ message: Message) -> Bool {
        ended.withLock { $0 ? false : mailbox.send(message) }
    }

    /// For the thread, when it ends: what was asked for until now is there, and nothing more comes.
    func end() { ended.withLock { $0 = true } }

    /// Changes the record, durably or not at all.
    ///
    /// - Parameter anyway: it has happened: it counts at once, and is saved as soon as that is possible.
    /// - Returns: false when the replicator has ended, and nothing was done.
    package func amend(
        anyway: Bool = false, _ change: @escaping @Sendable (inout GroupRecord) -> Void
    ) async throws -> Bool {
        try await withCheckedThrowingContinuation { (continuation: CheckedContinuation<Bool, any Error>) in
            let asked = ask(
                .amend(change, anyway: anyway) { problem in
                    if let problem {
                        continuation.resume(throwing: problem)
                    } else {
                        continuation.resume(returning: true)
                    }
                })
            if !asked { continuation.resume(returning: false) }
        }
    }

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

    /// Bounds the link, in bytes a second; 0 = unbounded.
    package func setRate(_ rate: UInt64) { mailbox.send(.setRate(rate)) }

    /// Ends the thread; a point that is held stays held and is taken up by the next start.
    package func stop() async {
        await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
            if !ask(.stop { continuation.resume() }) { continuation.resume() }
        }
    }

    package struct Configuration: Sendable {
        package var group: String
        package var settings: Cycle.Settings
        package var volumes: [ReplicatedVolume]
        package var address: Address
        package var tls: LinkTLS
        package var peer: any PeerClient
        package var connectionsPerVolume: Int
        package var compare: ComparePolicy
        /// Seconds after which a peer that acknowledges nothing has stalled.
        package var stallTimeout: Double
        /// Bytes a second; 0 = unbounded.
        package var rate: UInt64
        /// Writes the record durably before it returns.
        package var save: @Sendable (GroupRecord) throws -> Void
        package var log: @Sendable (String) -> Void
        /// The peer refuses this site; perhaps it has taken over.
        package var refused: @Sendable () -> Void

        package init(
            group: String, settings: Cycle.Settings, volumes: [ReplicatedVolume],
            address: Address, tls: LinkTLS, peer: any PeerClient, connectionsPerVolume: Int,
            compare: ComparePolicy, stallTimeout: Double, rate: UInt64,
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
            self.compare = compare
            self.stallTimeout = stallTimeout
            self.rate = rate
            self.save = save
            self.log = log
            self.refused = refused
        }
    }

    func noteHold(_ nanoseconds: UInt64) {
        snapshot.withLock { status in
            status.lastHold = nanoseconds
            status.holds.append(nanoseconds)
            status.holdHistogram.add(Double(nanoseconds) / 1e9)
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
    static let ended = ReplicationRefusal("mirroring from this site has ended")
}

nonisolated func replicatorMain(
    _ replicator: Replicator, _ configuration: Replicator.Configuration, _ record: GroupRecord
) {
    let thread = ReplicatorThread(replicator, configuration, record)
    thread.run()
}
