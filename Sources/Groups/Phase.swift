// Phase.swift: what a group is to a site, with exactly the data of that.
//
// Must be prevented:
//   data of one phase is found in another: a point that is held by a secondary, a failover of who hands over
//   a phase follows one that it cannot follow: a secondary that mirrors without having taken over, a failover during a handover

package enum Phase: Sendable, Equatable {
    /// It receives points.
    case secondary(Secondary)
    /// It sends points to its peer, or tries to.
    case mirroring(Primary)
    /// A switchover: hosts are shut out, and the point is all of their data; the peer may have taken over.
    case handingOver(Primary, point: UInt64)
    /// It has taken over at a recovery point, and does not mirror yet.
    case failedOver(Primary, Failover)

    package struct Secondary: Sendable, Equatable {
        /// The point at which this site gave up the role of primary; until the peer has opened a session, its recording bitmaps
        /// say what the peer must take into its own.
        package var yielded: UInt64?
        package init(yielded: UInt64? = nil) { self.yielded = yielded }
    }

    package struct Primary: Sendable, Equatable {
        package var lastCommitted: PointRecord?
        package var point = OwnPoint.none
        /// By command; also through restarts.
        package var suspendedByOperator = false
        /// The peer is out of reach: hosts may write what it will never see if it takes over.
        package var alone = false
        /// The secondary was seeded: until the first commit only what differs by checksum is sent.
        package var fromImage = false
        /// A failback is under way: once the peer has everything, the roles are exchanged.
        package var failingBack = false
        /// The peer has taken over as well: this site does not mirror.
        package var conflict: Conflict?
        package init() {}
    }

    /// The point that a primary is at.
    package enum OwnPoint: Sendable, Equatable {
        case none
        /// Set before any volume forms it; found at a start, it means that the point may be half formed.
        case forming(UInt64)
        /// It is held and drained.
        case held(PointRecord)
    }

    package struct Conflict: Codable, Sendable, Equatable {
        package enum Kind: String, Codable, Sendable {
            /// Hosts are shut out here.
            case stale
            /// Hosts wrote at both sites.
            case splitBrain = "split-brain"
        }
        package var kind: Kind
        /// Seconds since 1970.
        package var at: Double
        package init(kind: Kind, at: Double) {
            self.kind = kind
            self.at = at
        }
    }

    package struct Failover: Codable, Sendable, Equatable {
        package var point: UInt64
        package var at: Double
        /// Volumes whose data is still flowing back from the point.
        package var restoring: [String]
        /// By switchover: the peer gives up its role by itself, and mirroring begins in the other direction.
        package var joins: Bool?
        package init(point: UInt64, at: Double, restoring: [String], joins: Bool? = nil) {
            self.point = point
            self.at = at
            self.restoring = restoring
            self.joins = joins
        }
    }

    package enum Kind: String, Sendable {
        case secondary, mirroring
        case handingOver = "handing over"
        case failedOver = "failed over"

        /// Which phases may come next, by whatever command or message. The same phase may always go on.
        package var successors: Set<Kind> {
            switch self {
            case .secondary: [.failedOver]
            case .mirroring: [.handingOver, .secondary]
            case .handingOver: [.mirroring, .secondary]
            case .failedOver: [.mirroring, .secondary]
            }
        }
    }

    package var kind: Kind {
        switch self {
        case .secondary: .secondary
        case .mirroring: .mirroring
        case .handingOver: .handingOver
        case .failedOver: .failedOver
        }
    }

    /// Data of a primary; nil at a secondary. What is set there is of no effect.
    package var primary: Primary? {
        get {
            switch self {
            case .secondary: nil
            case .mirroring(let primary), .handingOver(let primary, _), .failedOver(let primary, _): primary
            }
        }
        set {
            guard let newValue else { return }
            switch self {
            case .secondary: break
            case .mirroring: self = .mirroring(newValue)
            case .handingOver(_, let point): self = .handingOver(newValue, point: point)
            case .failedOver(_, let failover): self = .failedOver(newValue, failover)
            }
        }
    }
}

/// A change that no command and no message may make.
package struct IllegalPhase: Error, CustomStringConvertible {
    package var description: String
}

extension GroupRecord {
    /// - Throws: when this cannot come after `previous`.
    package func check(after previous: GroupRecord) throws(IllegalPhase) {
        let (from, to) = (previous.phase.kind, phase.kind)
        guard from == to || from.successors.contains(to) else {
            throw IllegalPhase(description: "a group that is \(from.rawValue) cannot be \(to.rawValue) next")
        }
        guard lastNumber >= previous.lastNumber else {
            throw IllegalPhase(description: "point \(previous.lastNumber) was counted, and would be forgotten")
        }
        if case .held(let point) = phase.primary?.point, point.number > lastNumber {
            throw IllegalPhase(
                description: "point \(point.number) is held, and \(lastNumber) is the highest that was counted")
        }
        if let before = previous.coordination {
            do { try (coordination ?? CoordinationRecord()).check(after: before) } catch {
                throw IllegalPhase(description: error.description)
            }
        }
        if let point = held, previous.held?.number == point.number {
            let renewed = (volumeLineages ?? [:]).contains { name, copy in
                previous.volumeLineages?[name].map { $0 != copy } == true
            }
            guard lineage == previous.lineage, !renewed else {
                throw IllegalPhase(description: "point \(point.number) is held, and was formed for another copy")
            }
        }
    }

    package var role: Role { phase.kind == .secondary ? .secondary : .primary }
    package internal(set) var primary: Phase.Primary? {
        get { phase.primary }
        set { phase.primary = newValue }
    }

    package var lastCommitted: PointRecord? { primary?.lastCommitted }
    package var suspendedByOperator: Bool { primary?.suspendedByOperator == true }
    package var isAlone: Bool { primary?.alone == true }
    package var isFailingBack: Bool { primary?.failingBack == true }
    package var conflict: Phase.Conflict? { primary?.conflict }

    package var forming: UInt64? {
        if case .forming(let number) = primary?.point { number } else { nil }
    }
    package var held: PointRecord? {
        if case .held(let point) = primary?.point { point } else { nil }
    }
    package var handingOver: UInt64? {
        if case .handingOver(_, let point) = phase { point } else { nil }
    }
    package var failedOver: Phase.Failover? {
        if case .failedOver(_, let failover) = phase { failover } else { nil }
    }
    package var yielded: UInt64? {
        if case .secondary(let secondary) = phase { secondary.yielded } else { nil }
    }

    /// Whether a site with this record sends to its peer.
    package var isMirroring: Bool { phase.kind == .mirroring && conflict == nil }
}

// MARK: On disk

extension GroupRecord: Codable {
    /// As FORMAT.md has it: flat, so that a field is where every version has looked for it.
    private struct Stored: Codable {
        var format = GroupRecord.currentFormat
        var role: Role
        var generations: [String]
        var peerSite: String?
        var lastNumber: UInt64
        var lastCommitted: PointRecord?
        var forming: UInt64?
        var held: PointRecord?
        var suspendedByOperator: Bool
        var lineage: String?
        var alone: Bool?
        var conflict: Phase.Conflict?
        var handingOver: UInt64?
        var failingBack: Bool?
        var fromImage: Bool?
        var rate: UInt64?
        var volumeLineages: [String: String]?
        var joinedAfter: [String: UInt64]?
        var leftOut: [String]?
        var yielded: UInt64?
        var points: [PointRecord]
        var retired: [PointRecord]?
        var untracked: [String: UInt64]?
        var failedOver: Phase.Failover?
        var coordination: CoordinationRecord?

        /// - Throws: when the fields contradict each other.
        func phase() throws(IllegalPhase) -> Phase {
            guard role == .primary else {
                let foreign: [(String, Bool)] = [
                    ("held", held != nil), ("forming", forming != nil), ("handingOver", handingOver != nil),
                    ("failedOver", failedOver != nil), ("conflict", conflict != nil),
                ]
                for (name, isThere) in foreign where isThere {
                    throw IllegalPhase(
                        description: "it says that the site is secondary, and has '\(name)', which is a primary's")
                }
                return .secondary(Phase.Secondary(yielded: yielded))
            }
            guard yielded == nil else {
                throw IllegalPhase(
                    description: "it says that the site is primary, and has 'yielded', which is a secondary's")
            }
            var primary = Phase.Primary()
            primary.lastCommitted = lastCommitted
            primary.point = forming.map { .forming($0) } ?? held.map { .held($0) } ?? .none
            primary.suspendedByOperator = suspendedByOperator
            primary.alone = alone == true
            primary.fromImage = fromImage == true
            primary.failingBack = failingBack == true
            primary.conflict = conflict
            switch (handingOver, failedOver) {
            case (nil, nil): return .mirroring(primary)
            case (let point?, nil): return .handingOver(primary, point: point)
            case (nil, let failover?): return .failedOver(primary, failover)
            case (_?, _?):
                throw IllegalPhase(description: "it has 'handingOver' and 'failedOver', which exclude each other")
            }
        }
    }

    package init(from decoder: any Decoder) throws {
        let stored = try Stored(from: decoder)
        phase = try stored.phase()
        format = GroupRecord.currentFormat
        generations = stored.generations
        peerSite = stored.peerSite
        lastNumber = stored.lastNumber
        lineage = stored.lineage
        rate = stored.rate
        volumeLineages = stored.volumeLineages
        joinedAfter = stored.joinedAfter
        leftOut = stored.leftOut
        points = stored.points
        retired = stored.retired
        untracked = stored.untracked
        coordination = stored.coordination
    }

    package func encode(to encoder: any Encoder) throws {
        let primary = primary
        try Stored(
            format: format, role: role, generations: generations, peerSite: peerSite, lastNumber: lastNumber,
            lastCommitted: lastCommitted, forming: forming, held: held, suspendedByOperator: suspendedByOperator,
            lineage: lineage, alone: primary?.alone == true ? true : nil, conflict: conflict, handingOver: handingOver,
            failingBack: primary?.failingBack == true ? true : nil, fromImage: primary?.fromImage == true ? true : nil,
            rate: rate,
            volumeLineages: volumeLineages, joinedAfter: joinedAfter, leftOut: leftOut, yielded: yielded,
            points: points,
            retired: retired, untracked: untracked, failedOver: failedOver, coordination: coordination
        ).encode(to: encoder)
    }
}
