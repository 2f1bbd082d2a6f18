// CoordinationMessages.swift: what coordinator, hosts and remotes say to each other. Every message may be lost, late, or come twice.
//
// Must be prevented:
//   an answer means one thing when it is sent and another when it arrives: `refuses`, `outOfOrder`, `failed` and `gaveUp` are for good, and durable
//     where somebody relies on that

/// A message of a coordinator's process, or the answer to one.
package struct Stamped<Body: Codable & Equatable & Sendable>: Codable, Equatable, Sendable {
    package var epoch: UInt64
    package var body: Body
    package init(epoch: UInt64, _ body: Body) { (self.epoch, self.body) = (epoch, body) }
}

/// Of the coordinator, to a host. A number is a point's.
package enum HostRequest: Codable, Equatable, Sendable {
    /// Write down that the point may be half formed from now on, and make its bitmaps and targets. Nothing is held yet.
    case makeReady(UInt64)
    /// Hold acknowledgements and form, in one step.
    case form(UInt64)
    /// The same in one step where there is only one host: it lets go when all of its volumes have formed.
    case formAtOnce(UInt64)
    /// Every host has formed: let go, and drain. Asked again, it is a question how far that is.
    case run(UInt64)
    /// The point never counts.
    case giveUp(UInt64)
    /// Every remote has committed it.
    case end(UInt64)

    package var number: UInt64 {
        switch self {
        case .makeReady(let number), .form(let number), .formAtOnce(let number), .run(let number), .giveUp(let number),
            .end(let number):
            number
        }
    }
}

/// Of a host.
package enum HostAnswer: Codable, Equatable, Sendable {
    case ready(UInt64)
    /// Every volume has formed, and acknowledgements are held.
    case formed(UInt64)
    /// It let go because of `run`, or because all had formed at once; the point is held, also through a restart.
    case ran(UInt64)
    /// All of the point is at its remote, flushed, in this copy.
    case drained(UInt64, CopyIdentity? = nil)
    /// It let go by itself, or the point was lost: it can never count.
    case failed(UInt64, String)
    /// Nothing is left of it here, and it is not formed again.
    case gaveUp(UInt64)
    case ended(UInt64)
    /// A coordinator's process of this epoch was heard: the one that asks has been followed.
    case superseded(by: UInt64)
}

/// Of the coordinator, to a remote.
package enum RemoteRequest: Codable, Equatable, Sendable {
    /// All hosts' data of the point is there. `after`: the point that every remote has committed last; 0 = none.
    case prepare(UInt64, after: UInt64)
    /// It is decided. `others`: another remote has committed it, so that a promise to refuse it is void.
    case commit(UInt64, others: Bool)
    /// The same in one step, where there is only one remote, whose record is the decision.
    case commitAtOnce(UInt64, after: UInt64)
    /// Nobody commits it, ever.
    case drop(UInt64)

    package var number: UInt64 {
        switch self {
        case .prepare(let number, _), .commit(let number, _), .commitAtOnce(let number, _), .drop(let number): number
        }
    }

    /// What is to become of the point, in a word.
    package var wanted: String {
        switch self {
        case .prepare: "prepared"
        case .commit, .commitAtOnce: "committed"
        case .drop: "dropped"
        }
    }
}

/// Of a remote, to the coordinator.
package enum RemoteAnswer: Codable, Equatable, Sendable {
    /// It flushes, and makes files: that may take long.
    case checking(UInt64)
    case prepared(UInt64)
    case committed(UInt64)
    /// For good: only that another remote has committed it changes that.
    case refuses(UInt64, String)
    /// As `refuses`: the newest point that it has committed is another than was expected; 0 = none.
    case outOfOrder(UInt64, newest: UInt64)
    /// For good: it has not prepared the point that was decided; the copy that had is lost.
    case gone(UInt64)
    case dropped(UInt64)
    case failedOver(at: UInt64)
    case superseded(by: UInt64)
}

/// Which copy of a host's volumes a remote has: another one, on another disk, lacks what was sent to it.
package struct CopyIdentity: Codable, Equatable, Sendable {
    var lineage: String?
    var volumes: [String: String]?

    package init(lineage: String?, volumes: [String: String]? = nil) {
        (self.lineage, self.volumes) = (lineage, volumes)
    }
}

extension GroupRecord {
    /// At both ends of a pair the same, as long as the host sends to what the remote has.
    var copyIdentity: CopyIdentity { CopyIdentity(lineage: lineage, volumes: volumeLineages) }

    /// - Parameter copy: that a host has sent to.
    func isCopy(_ copy: CopyIdentity) -> Bool {
        // What the session under way sends of an untracked volume is whole (`sentAnew`); the next one hears of its new lineage.
        copy.lineage == lineage
            && (volumeLineages ?? [:]).allSatisfy { copy.volumes?[$0.key] == $0.value || untracked?[$0.key] != nil }
    }
}

/// Why a point was refused.
func disorder(_ number: UInt64, newest: UInt64, expected: UInt64) -> String {
    func words(_ point: UInt64) -> String { point == 0 ? "none" : String(point) }
    return
        "point \(number) is out of order: the newest at the remote is \(words(newest)), where \(words(expected)) is expected"
}

/// Of a remote, to another one that is in doubt about a point.
package enum Testimony: Codable, Equatable, Sendable {
    case committed
    /// It has not committed it, and has durably promised to refuse a later commit. `prepared`: everything of it is, or was, there.
    case refuses(prepared: Bool)
}
