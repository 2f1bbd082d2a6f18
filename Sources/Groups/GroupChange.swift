// GroupChange.swift: everything that happens to a group but the steps of its cycle, and where it belongs.
//
// Must be prevented:
//   a change comes into a phase that has no place for it: a failover of a primary, a handover of who is failed over
//   an answer that comes late undoes what has come to pass meanwhile
//   what has happened, and cannot be taken back, does not count because it could not be saved

package enum GroupChange: Sendable, Equatable {
    // A secondary's.
    /// The peer, as primary, is of this site and of these generations.
    case paired(site: String, generations: [String])
    /// The peer has opened a session: what it had to learn of the time before it knows.
    case yieldIsKnown
    case committed(CommitPlan)
    /// A point was committed in a session that has begun with all of what was noted as untracked in earlier ones.
    case sentAnew(session: UInt64)
    case failedOver(Takeover)
    /// Of one of several remotes.
    case remotePart(RemotePartChange)

    // A primary's.
    /// Hosts may write what the peer will never see if it takes over.
    case alone
    case conflict(Phase.Conflict?)
    case pointGivenUp
    /// The peer has seen every generation that this site had; from now on it is behind.
    case generationBegun(String)
    case handingOver(point: UInt64)
    case handoverTakenBack
    case failingBack(Bool)
    /// The secondary holds an image that was copied by other means.
    case seeded
    case yielded(Yielding)
    case joined(Joining)
    /// A volume's data has flowed back from the point that was failed over to, or never will.
    case restored(volume: String)

    // Of either.
    /// The peer cannot write down any more what its hosts change of a volume, in this session.
    case untracked(volume: String, lineage: String, session: UInt64)
    /// Bytes a second over the link; nil = as configured.
    case rate(UInt64?)
    case retired([UInt64])
    /// Files that hold points of a volume have lost old content.
    case pointFailed(UInt64, volume: String)
    case started(Membership)
    /// The group's hosts, and the remote of each.
    case places([PairPlace])
    /// Points up to this one are lost; when it is a secondary's newest, the peer must send everything to a copy of this identity.
    case pointsVoided(through: UInt64, lineage: String)

    /// What each phase makes of it.
    package func place(in phase: Phase.Kind) -> Place {
        let (secondary, mirroring, handingOver, failedOver) = row
        return switch phase {
        case .secondary: secondary
        case .mirroring: mirroring
        case .handingOver: handingOver
        case .failedOver: failedOver
        }
    }

    /// As a secondary, mirroring, handing over, failed over.
    private var row: (Place, Place, Place, Place) {
        switch self {
        case .paired, .committed, .failedOver, .remotePart: (.handled, .impossible, .impossible, .impossible)
        case .yieldIsKnown, .sentAnew: (.handled, .late, .late, .late)
        case .alone, .conflict, .pointGivenUp, .failingBack: (.late, .handled, .handled, .handled)
        case .seeded: (.impossible, .handled, .handled, .handled)
        case .generationBegun, .yielded, .joined: (.impossible, .handled, .handled, .handled)
        case .handingOver: (.impossible, .handled, .impossible, .impossible)
        case .handoverTakenBack: (.late, .late, .handled, .late)
        case .restored: (.late, .late, .late, .handled)
        case .untracked, .rate, .retired, .pointFailed, .started, .places, .pointsVoided:
            (.handled, .handled, .handled, .handled)
        }
    }

    /// Without what it is about.
    package var name: String { String("\(self)".prefix { $0 != "(" }) }

    /// It counts even if it cannot be saved yet.
    package var hasHappened: Bool {
        switch self {
        case .restored, .pointFailed: true
        default: false
        }
    }
}

/// A primary that has given up its role: its last state is the first recovery point of the new direction.
package struct Yielding: Sendable, Equatable {
    /// The state that is given up, with its place in the chains.
    package var point: PointRecord
    package var peer: String
    /// Those of the primary that takes its place.
    package var generations: [String]
    /// A new identity, which the peer's bitmaps describe the difference to.
    package var lineage: String
    package var volumes: [String]
    /// Points past their retention.
    package var dropped: [PointRecord]

    package init(
        point: PointRecord, peer: String, generations: [String], lineage: String, volumes: [String],
        dropped: [PointRecord]
    ) {
        self.point = point
        self.peer = peer
        self.generations = generations
        self.lineage = lineage
        self.volumes = volumes
        self.dropped = dropped
    }

    var plan: CommitPlan { CommitPlan(point: point, dropped: dropped) }
}

/// A primary whose peer has given up its role, once the peer's changed grains are in its own bitmaps.
package struct Joining: Sendable, Equatable {
    package var peer: String
    package var lineage: String
    package var volumeLineages: [String: String]?
    package var point: PointRecord

    package init(peer: String, lineage: String, volumeLineages: [String: String]?, point: PointRecord) {
        self.peer = peer
        self.lineage = lineage
        self.volumeLineages = volumeLineages
        self.point = point
    }
}

/// A secondary that becomes primary at a recovery point, of a new generation.
package struct Takeover: Sendable, Equatable {
    package var point: UInt64
    package var volumes: [String]
    /// Volumes that had no part in the point.
    package var leftOut: [String]
    package var generation: String
    package var at: Double
    /// By switchover (`Phase.Failover.joins`).
    package var joins: Bool

    package init(
        point: UInt64, volumes: [String], leftOut: [String] = [], generation: String, at: Double, joins: Bool
    ) {
        self.point = point
        self.volumes = volumes
        self.leftOut = leftOut
        self.generation = generation
        self.at = at
        self.joins = joins
    }
}

/// What a start has found of the volumes that are configured.
package struct Membership: Sendable, Equatable {
    package var volumes: [String]
    /// Those that were not served in this group last, each with a new identity. Hosts may have written to them.
    package var foreign: [String: String]
    /// Those of `foreign` whose file is not the one that points and restores read from.
    package var exchanged: Set<String>
    /// A new identity, should everything have to be copied anew.
    package var lineage: String

    package init(volumes: [String], foreign: [String: String], exchanged: Set<String>, lineage: String) {
        self.volumes = volumes
        self.foreign = foreign
        self.exchanged = exchanged
        self.lineage = lineage
    }
}

extension GroupRecord {
    /// - Throws: when the phase has no place for it; then nothing has changed.
    package mutating func apply(_ change: GroupChange) throws(IllegalPhase) {
        switch change.place(in: phase.kind) {
        case .late: return
        case .impossible:
            throw IllegalPhase(description: "a group that is \(phase.kind.rawValue) cannot take '\(change.name)'")
        case .handled: carryOut(change)
        }
    }

    private mutating func carryOut(_ change: GroupChange) {
        switch change {
        case .paired(let site, let generations): (peerSite, self.generations) = (site, generations)
        case .yieldIsKnown: phase = .secondary(Phase.Secondary())
        case .committed(let plan): commit(plan)
        case .sentAnew(let session): forgetUntracked(before: session)
        case .failedOver(let takeover): failOver(takeover)
        case .remotePart(let part): take(part)
        case .alone: primary?.alone = true
        case .conflict(let conflict): primary?.conflict = conflict
        case .pointGivenUp: primary?.point = .none
        case .generationBegun(let identity): beginGeneration(identity)
        case .handingOver(let point):
            if case .mirroring(let primary) = phase { phase = .handingOver(primary, point: point) }
        case .handoverTakenBack: if case .handingOver(let primary, _) = phase { phase = .mirroring(primary) }
        case .failingBack(let isOn): primary?.failingBack = isOn
        case .seeded: primary?.fromImage = true
        case .yielded(let yielding): yield(yielding)
        case .joined(let joining): join(joining)
        case .restored(let volume): endRestore(of: volume)
        case .untracked(let volume, let lineage, let session):
            noteUntracked(volume, lineage: lineage, session: session)
        case .rate(let rate): self.rate = rate
        case .retired(let numbers): retire(numbers)
        case .pointFailed(let number, let volume): fail(points(carriedBy: number, volume))
        case .started(let membership): begin(membership)
        case .places(let places): coordination = (coordination ?? CoordinationRecord()).with(places)
        case .pointsVoided(let number, let lineage): voidPoints(through: number, lineage)
        }
    }

    // MARK: Of a secondary

    mutating func commit(_ plan: CommitPlan) {
        points.append(plan.point)
        retired = retired?.compactMap { point in
            guard let names = plan.retired[point.number] else { return point }
            var point = point
            point.changed = names
            return names.isEmpty ? nil : point
        }
        retire(plan.dropped.map(\.number))
    }

    private mutating func failOver(_ takeover: Takeover) {
        phase = .failedOver(
            Phase.Primary(),
            Phase.Failover(
                point: takeover.point, at: takeover.at, restoring: takeover.volumes,
                joins: takeover.joins ? true : nil))
        beginGeneration(takeover.generation)
        // It is never committed here, and others must not take that for their own word.
        if let prepared = coordination?.prepared { coordination?.inDoubt = prepared.number }
        coordination?.prepared = nil
        coordination?.coordinator = nil
        if !takeover.leftOut.isEmpty { leftOut = takeover.leftOut }
    }

    private mutating func voidPoints(through number: UInt64, _ identity: String) {
        // At a primary they are from when it was secondary; `lineage` is the peer's copy.
        if role == .secondary, points.last?.number ?? 0 <= number { lineage = identity }
        retire(points.map(\.number).filter { $0 <= number })
    }

    // MARK: Of a primary

    /// Puts a new generation in front; very old ones, of which no site can be any more, are forgotten.
    private mutating func beginGeneration(_ identity: String) {
        generations.insert(identity, at: 0)
        if generations.count > 64 { generations.removeLast(generations.count - 64) }
    }

    private mutating func yield(_ yielding: Yielding) {
        phase = .secondary(Phase.Secondary(yielded: yielding.point.number))
        coordination?.coordinator = nil
        coordination?.inDoubt = nil
        peerSite = yielding.peer
        generations = yielding.generations
        lineage = yielding.lineage
        volumeLineages = Dictionary(uniqueKeysWithValues: yielding.volumes.map { ($0, yielding.lineage) })
        points.append(yielding.point)
        retire(yielding.dropped.map(\.number))
    }

    private mutating func join(_ joining: Joining) {
        var primary = Phase.Primary()
        primary.lastCommitted = joining.point
        primary.failingBack = isFailingBack
        primary.fromImage = self.primary?.fromImage == true
        lastNumber = max(highestPoint, joining.point.number)
        coordination?.coordinator = nil
        phase = .mirroring(primary)
        peerSite = joining.peer
        lineage = joining.lineage
        volumeLineages = joining.volumeLineages
        untracked = nil
    }

    private mutating func endRestore(of volume: String) {
        guard case .failedOver(let primary, var failover) = phase else { return }
        failover.restoring.removeAll { $0 == volume }
        phase = .failedOver(primary, failover)
    }

    // MARK: Of either

    /// A secondary gets a new identity: the primary, when it opens a session, marks all of the volume.
    private mutating func noteUntracked(_ volume: String, lineage: String, session: UInt64) {
        untracked = (untracked ?? [:]).merging([volume: session]) { _, new in new }
        if role == .secondary { volumeLineages = (volumeLineages ?? [:]).merging([volume: lineage]) { _, new in new } }
    }

    private mutating func forgetUntracked(before session: UInt64) {
        let left = untracked?.filter { $0.value == session }
        untracked = left?.isEmpty == false ? left : nil
    }

    /// Ends recovery points. They stay written down as long as some volume has files of them.
    mutating func retire(_ numbers: [UInt64]) {
        let ended = points.filter { numbers.contains($0.number) }
        points.removeAll { numbers.contains($0.number) }
        retired = (retired ?? []) + ended
    }

    /// Recovery points have lost old content. They go, unless the primary goes on from one, or a failover went to it: then it stays, as
    /// one that cannot be read.
    private mutating func fail(_ failed: [PointRecord]) {
        let numbers = failed.map(\.number)
        for index in points.indices where numbers.contains(points[index].number) { points[index].isFailed = true }
        retire(numbers.filter { $0 != points.last?.number && $0 != failedOver?.point })
    }

    private mutating func begin(_ membership: Membership) {
        let names = membership.volumes
        joinedAfter = joinedAfter?.filter { names.contains($0.key) }
        leftOut = leftOut?.filter { names.contains($0) }
        var lineages = (volumeLineages ?? [:]).filter { names.contains($0.key) }
        if role == .primary {
            if volumeLineages != nil { volumeLineages = lineages }
            for name in membership.exchanged.sorted() {
                // Points from when this site was secondary read through a file that is not what they knew.
                fail(points)
                endRestore(of: name)
            }
            return
        }
        // A secondary that hosts have written to is no copy of anything: it begins anew, with a lineage that tells the primary to send
        // everything. A volume that joins the group begins alone.
        if membership.foreign.keys.contains(where: { lineages[$0] != nil }) {
            points = []
            lineage = membership.lineage
        }
        // A point that was prepared is not what the exchanged file holds.
        if membership.foreign.keys.contains(where: { lineages[$0] != nil }) { coordination?.prepared = nil }
        lineages.merge(membership.foreign) { _, new in new }
        if let newest = points.last, !membership.foreign.isEmpty {
            joinedAfter = (joinedAfter ?? [:]).merging(membership.foreign.mapValues { _ in newest.number }) { _, new in
                new
            }
        }
        volumeLineages = lineages
    }
}
