// StartVolume.swift: how a site takes a volume up from what the last run left; before that nobody may read or write it.
//
// Must be prevented:
//   bitmaps are trusted after power loss, beyond what the activity log allows
//   a restore that nobody was told of goes on; one that was decided does not
//   a start that ends in the middle leaves less behind than it found: the volume's record becomes this run's when everything was taken
//     up and flushed, before hosts, peers or work in the background change anything

import Groups
import Volumes

/// What the group's record says of a volume, and what its own metadata is worth.
package struct VolumeStart: Sendable, Equatable {
    /// Mapped files are as the last process left them.
    package var isTrusted: Bool
    /// Nothing says what hosts changed: all of it may differ.
    package var knowsNothing = false
    /// Nil = it is in no group.
    package var role: Role?
    /// This site has given the role up: what it had changed may be asked for.
    package var hasYielded = false
    /// The point that is held and drained.
    package var held: UInt64?
    /// Recovery points of which there are files.
    package var points: [ChainLink] = []
    package var failover = Failover.none

    /// What data flows back from since a failover.
    package enum Failover: Sendable, Equatable {
        case none, from(CopyID)
        /// It is not there any more.
        case lost
    }

    package init(isTrusted: Bool) { self.isTrusted = isTrusted }

    /// - Parameters:
    ///   - record: of the volume's group.
    ///   - hasFiles: whether there are files of a point that is not kept.
    package init(
        isTrusted: Bool, _ record: GroupRecord, _ volume: String, hasFiles: (UInt64) throws -> Bool
    ) rethrows {
        self.isTrusted = isTrusted
        role = record.role
        hasYielded = record.yielded != nil
        held = record.held?.number
        points = try record.links(of: volume, hasFiles: hasFiles)
        if let failover = record.failedOver, failover.restoring.contains(volume) {
            self.failover = record.carrier(of: failover.point, volume).map { .from(CopyID($0)) } ?? .lost
        }
    }
}

/// What a volume's engine is told of its role.
package struct RoleStart: Sendable, Equatable {
    /// In the group; nil = the volume is in none.
    package var role: Role?
    /// Everything counts as changed.
    package var marksAll: Bool
    /// What the activity log calls active counts as changed.
    package var marksRegions: Bool
    /// The point that goes on; nil at a primary = what was to be sent counts as changed.
    package var held: UInt64?
}

extension GroupRecord {
    /// Recovery points that a volume's chain has: those that carry what is kept must be there, the others leave.
    fileprivate func links(of volume: String, hasFiles: (UInt64) throws -> Bool) rethrows -> [ChainLink] {
        let carriers = carriers(of: [volume])[volume] ?? []
        var links = carriers.compactMap { pointRecord($0) }.map { point in
            let hasFailed = points(carriedBy: point.number, volume).allSatisfy { $0.isFailed == true }
            return ChainLink(CopyRecord(point), hasFailed ? .servesOlder : .serves, isPoint: true)
        }
        for point in retired ?? [] where !carriers.contains(point.number) {
            guard try hasFiles(point.number) else { continue }
            links.append(ChainLink(CopyRecord(point), .leaves, isPoint: true))
        }
        return links
    }
}

extension CopyRecord {
    /// A recovery point in a volume's chain. It is written down in its group's record.
    package init(_ point: PointRecord) {
        self.init(
            id: CopyID(point.number), name: "", createdAt: point.formedAt, order: point.chainOrder, state: .active)
        isDurable = true
    }
}

package struct StartVolume: CopyStepTable {
    enum State {
        case begins, takesUp(ResumeChain), takesRole, restores, forgets, confirms, letsGo
    }
    var state = State.begins
    private let start: VolumeStart
    private var chain: Set<CopyID> = []

    package init(_ start: VolumeStart) { self.start = start }

    /// Of the operation's only volume.
    package mutating func next(after answer: CopyAnswer, _ tables: [CopyTable]) -> CopyStep<Void> {
        switch (state, answer) {
        case (.begins, .begin):
            return takeUp(ResumeChain(trusted: start.isTrusted, points: start.points), answer, tables)
        case (.takesUp(let part), _): return takeUp(part, answer, tables)
        case (.takesRole, .done): return restoreAfterFailover(tables[0])
        case (.restores, .done): return restore(tables[0])
        case (.forgets, .done): return go(.confirms, .confirm)
        case (.confirms, .done): return go(.letsGo, .finishResuming)
        case (.letsGo, .done): return .done(())
        case (_, .failed(let error)): return .failed(error)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }

    private mutating func takeUp(
        _ part: ResumeChain, _ answer: CopyAnswer, _ tables: [CopyTable]
    ) -> CopyStep<Void> {
        goOn(part, after: answer, tables, as: { .takesUp($0) }) { steps, chain in
            steps.chain = chain
            return steps.go(.takesRole, .takeRole(steps.role))
        }
    }

    private var role: RoleStart {
        let isPrimary = start.role == .primary
        return RoleStart(
            role: start.role, marksAll: (isPrimary || start.hasYielded) && start.knowsNothing,
            marksRegions: isPrimary && !start.isTrusted && !start.knowsNothing, held: isPrimary ? start.held : nil)
    }

    private mutating func restoreAfterFailover(_ table: CopyTable) -> CopyStep<Void> {
        switch start.failover {
        case .none: return restore(table)
        case .from(let point) where chain.contains(point): return go(.restores, .resumeRestore(from: point))
        case .from, .lost: return go(.restores, .loseFailover)
        }
    }

    private mutating func restore(_ table: CopyTable) -> CopyStep<Void> {
        guard let restoring = table.restoring else { return go(.confirms, .confirm) }
        guard restoring.decided, chain.contains(restoring.copy) else {
            return go(.forgets, .forgetRestore)
        }
        return go(.forgets, .resumeRestore(from: restoring.copy))
    }
}
