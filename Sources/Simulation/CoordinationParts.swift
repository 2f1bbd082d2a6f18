// CoordinationParts.swift: hosts, remotes and messages of the scenario `Coordination`: as little of them as the machines' rules need.

import Groups

/// A grain of a host's volume, and all that was ever written to it. A grain's content is the number of its last write.
struct WrittenGrain {
    /// Moments at which each write was issued and acknowledged; the first is what was there.
    var issuedAt = [0]
    var acknowledgedAt: [Int?] = [0]
    var content = 0
    /// A write that is under way, and whether it has reached the volume.
    var underWay: (write: Int, isApplied: Bool)?
}

/// A record's file: a save that fails may have reached it all the same, or not.
struct RecordFile<Record> {
    var content: Record {
        didSet { sure = content }
    }
    /// What was saved last, or found at the start: what anybody may rely on.
    private(set) var sure: Record

    init(_ record: Record) { (content, sure) = (record, record) }

    mutating func perhaps(_ record: Record) {
        let kept = sure
        content = record
        sure = kept
    }

    mutating func isRead() { sure = content }
}

/// A host with its volumes. What is written survives a crash, as do the bits, and what is held of a point if only the process dies; held
/// acknowledgements and what is under way do not.
struct CoordinationHost {
    static let volumes = 2
    static let grainsPerVolume = 3
    static let grainCount = volumes * grainsPerVolume

    let remote: Int
    var file = RecordFile(ParticipantRecord())
    var grains = Array(repeating: WrittenGrain(), count: grainCount)
    /// CR and OOS.
    var recording: Set<Int> = []
    var outOfSync: Set<Int> = []

    // The process.
    var machine: Participant?
    var tasks: [Participant.Event] = []
    /// Acknowledgements are held since then, and go to these grains' writes.
    var heldSince: UInt64?
    var held: [Int] = []
    /// What volumes that have formed hold of the point, and its number once all have.
    var image: [Int] = []
    var heldPoint: UInt64?
    var forming: UInt64?
    /// It lets go when all have formed.
    var isAtOnce = false
    var sending: Sending?

    /// A drain, in a session of its own.
    struct Sending {
        var number: UInt64
        var session: Int?
        var unsent: Set<Int>
        var unanswered: Set<Int> = []
    }

    init(remote: Int) { self.remote = remote }

    /// A volume does: its bitmaps change roles.
    mutating func form(_ volume: Range<Int>) {
        let changed = recording.intersection(volume)
        outOfSync.subtract(volume)
        outOfSync.formUnion(changed)
        recording.subtract(volume)
        image += volume.map { grains[$0].content }
    }

    /// Those that were under way have reached their volume, or not.
    ///
    /// - Returns: where to.
    mutating func loseWrites(_ random: inout SeededGenerator) -> [Int] {
        let lost = grains.indices.filter { grains[$0].underWay != nil }
        for grain in lost {
            let (write, isApplied) = grains[grain].underWay!
            if !isApplied, random.chance(50) {
                grains[grain].content = write
                recording.insert(grain)
            }
            grains[grain].underWay = nil
        }
        return lost
    }

    /// Its bits are merged back.
    mutating func giveUpPoint() {
        recording.formUnion(outOfSync)
        (outOfSync, image, heldPoint) = ([], [], nil)
    }

    mutating func die(powerLoss: Bool) {
        (machine, tasks, heldSince, held) = (nil, [], nil, [])
        (forming, isAtOnce, sending) = (nil, false, nil)
        if powerLoss { (image, heldPoint) = ([], nil) }
    }

    /// When acknowledgements that are held must go; nil while none are.
    func deadline(_ longest: UInt64) -> UInt64? { machine?.wakeAt ?? (isAtOnce ? heldSince.map { $0 + longest } : nil) }
}

/// A remote with the secondary copies of some hosts.
struct CoordinationRemote {
    var file = RecordFile(TwoPhaseRecord())
    /// By host; and what of it is on stable storage.
    var secondary: [Int: [Int]] = [:]
    var flushed: [Int: [Int]] = [:]
    /// Recovery points, newest alone.
    var point: (number: UInt64, contents: [Int: [Int]])?
    /// Hosts' sessions that are let in.
    var sessions: [Int: Int] = [:]
    var machine: TwoPhaseCommit?
    var tasks: [TwoPhaseCommit.Event] = []
    /// Where it has failed over to, and whether the operator did not wait for the others.
    var failedOver: UInt64?
    var isAlone = false

    init(hosts: [Int]) {
        for host in hosts { secondary[host] = Array(repeating: 0, count: CoordinationHost.grainCount) }
        flushed = secondary
    }

    mutating func die(powerLoss: Bool, _ random: inout SeededGenerator) {
        (machine, tasks, sessions) = (nil, [], [:])
        guard powerLoss else { return }
        for host in secondary.keys.sorted() {
            for grain in 0..<CoordinationHost.grainCount where random.chance(50) {
                secondary[host]![grain] = flushed[host]![grain]
            }
        }
        // What is there at the start is what stable storage holds.
        flushed = secondary
    }
}

enum CoordinationProcess: Hashable {
    case coordinator
    /// The coordinator's process of before: it was taken for dead, and goes on.
    case stale
    case host(Int)
    case remote(Int)
}

struct CoordinationMessage {
    enum Body {
        case toHost(Stamped<HostRequest>)
        case ofHost(Int, Stamped<HostAnswer>)
        case toRemote(Stamped<RemoteRequest>)
        case ofRemote(Int, Stamped<RemoteAnswer>)
        case question(of: Int, UInt64)
        case testimony(of: Int, UInt64, Testimony)
    }
    var from: CoordinationProcess
    var to: CoordinationProcess
    var body: Body
    /// It is under way for long.
    var isSlow: Bool
}

/// A grain's content on its way to a remote.
struct CoordinationData {
    var host: Int
    var session: Int
    var grain: Int
    var content: Int
    var isSlow: Bool
}

extension CoordinatorRecord {
    func changed(lastNumber: UInt64? = nil, point: Point) -> CoordinatorRecord {
        CoordinatorRecord(epoch: epoch, lastNumber: lastNumber ?? self.lastNumber, point: point, committed: committed)
    }
}

extension Coordinator.State {
    func holdsUndecided(for process: CoordinationProcess) -> Bool {
        switch (process, self) {
        case (.host(let index), .makingReady(_, let round)), (.host(let index), .holding(_, let round, _)),
            (.host(let index), .running(_, let round, _)), (.host(let index), .draining(_, let round)),
            (.remote(let index), .preparing(_, let round)):
            round.waiting.contains(index)
        default: false
        }
    }
}
