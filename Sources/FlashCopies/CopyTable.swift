// CopyTable.swift: what is written down about the FlashCopies of one volume, and every way in which that changes.
//
// Must be prevented:
//   a copy that has failed, leaves or is lost becomes active again (`CopyRecord.State.mayBecome`)
//   the target of a copy goes with it although another copy has taken it over
//   copies that were taken together, or volumes that were restored together, are found by a start some of them done and others not

import Volumes

package struct CopyTable: Sendable, Equatable {
    /// Identifiers of FlashCopies begin here, apart from those of recovery points, which are their numbers.
    package static let firstID: CopyID = 1 << 62

    package var copies: [CopyRecord] = []
    package var nextCopy: Int64 = 1
    /// The volume becomes a FlashCopy's point in time again.
    package var restoring: Restoring?
    /// When it was last decided that it does, seconds since 1970: what a host has cached from before is not of this volume.
    package var restoredAt: Double?

    package init(
        copies: [CopyRecord] = [], nextCopy: Int64 = 1, restoring: Restoring? = nil, restoredAt: Double? = nil
    ) {
        (self.copies, self.nextCopy) = (copies, nextCopy)
        (self.restoring, self.restoredAt) = (restoring, restoredAt)
    }

    package struct Restoring: Codable, Sendable, Equatable {
        package var copy: CopyID
        /// False: nothing has flowed back yet, and nobody was told that it would.
        package var decided: Bool
        /// The FlashCopy that keeps what is discarded; it counts once this is decided.
        package var kept: CopyID?
        /// The same for all volumes that are restored together: once one of them is decided, all are.
        package var decision: String?

        package init(copy: CopyID, decided: Bool = false, kept: CopyID?, decision: String?) {
            (self.copy, self.decided, self.kept, self.decision) = (copy, decided, kept, decision)
        }
    }

    package var nextID: CopyID { Self.firstID + nextCopy }

    package subscript(id: CopyID) -> CopyRecord? { copies.first { $0.id == id } }

    /// The target in the state directory that nobody needs once a copy has gone; nil = it is the operator's, or another copy's by now.
    package func unusedTarget(of copy: CopyRecord) -> CopyID? {
        copy.target == nil ? unusedTarget(ofOwner: copy.targetOwner, besides: copy.id) : nil
    }

    /// The same, of a copy whose record has gone, or of a recovery point: its own, unless another copy has taken that over.
    package func unusedTarget(ofOwner owner: CopyID, besides id: CopyID) -> CopyID? {
        copies.contains { $0.id != id && $0.targetOwner == owner && $0.state != .lost } ? nil : owner
    }
}

package enum CopyChange: Sendable, Equatable {
    case added(CopyRecord)
    /// Nobody was told of it.
    case removed(CopyID)
    /// It is there; unless it has failed since it was taken.
    case active(CopyID)
    case refreshing(CopyID)
    /// Alone: although others of its set stay.
    case withdrawing(CopyID, alone: Bool)
    case failed(CopyID, reason: String)
    /// The background copy is finished, and its data on stable storage.
    case complete(CopyID)
    case set(CopyID, rate: UInt64?, writable: Bool?)
    /// It was taken anew; with a reason, that has failed.
    case replaced(CopyID, by: CopyID, failed: String?)
    /// It is out of the chain.
    case left(CopyID)
    /// The same, of which nothing was there.
    case forgotten(Set<CopyID>)
    /// Damage has taken them.
    case lost(Set<CopyID>, reason: String)
    /// What a restart has made of them.
    case resumed([CopyRecord])
    case restoring(CopyTable.Restoring?)
    case restoreDecided(at: Double)
}

extension CopyTable {
    package mutating func apply(_ change: CopyChange) {
        switch change {
        case .added(let copy):
            nextCopy += 1
            copies.append(copy)
        case .removed(let id): copies.removeAll { $0.id == id }
        case .active(let id): self.change(id) { $0.become(.active) }
        case .refreshing(let id): self.change(id) { $0.become(.refreshing) }
        case .withdrawing(let id, let alone):
            self.change(id) { copy in
                if copy.become(.withdrawing), alone { copy.set = nil }
            }
        case .failed(let id, let reason):
            self.change(id) { $0.become(.failed, reason: reason) }
        case .complete(let id): self.change(id) { $0.isComplete = true }
        case .set(let id, let rate, let writable):
            self.change(id) { copy in
                copy.rate = rate ?? copy.rate
                if let writable { copy.allowWrites(writable) }
            }
        case .replaced(let old, let new, let reason):
            copies.removeAll { $0.id == old }
            self.change(new) { copy in
                guard copy.state == .creating else { return }  // it has failed already
                copy.become(reason == nil ? .active : .failed, reason: reason)
            }
        case .left(let id):
            copies.removeAll { $0.id == id && $0.state != .refreshing }
            self.change(id) { $0.become(.lost) }  // for the operator to see what became of it
        case .forgotten(let ids): copies.removeAll { ids.contains($0.id) }
        case .lost(let ids, let reason):
            for index in copies.indices where ids.contains(copies[index].id) {
                copies[index].become(.lost, reason: reason)
            }
        case .resumed(let copies): self.copies = copies
        case .restoring(let restoring): self.restoring = restoring
        case .restoreDecided(let time):
            restoring?.decided = true
            restoredAt = time
            if let kept = restoring?.kept { self.change(kept) { $0.become(.active) } }
        }
    }

    private mutating func change(_ id: CopyID, _ change: (inout CopyRecord) -> Void) {
        guard let index = copies.firstIndex(where: { $0.id == id }) else { return }
        change(&copies[index])
    }

    // MARK: What a start completes

    /// A site may end between the records of copies that were taken together (`CopyRecord.set`): all of them are there, or leave. The
    /// same holds for volumes that were restored together.
    ///
    /// - Parameter tables: of all volumes of the site.
    /// - Returns: what is still to be written down, by the table's index.
    package static func completions(_ tables: [CopyTable], at time: Double) -> [(table: Int, change: CopyChange)] {
        func sets(_ state: CopyRecord.State) -> Set<String> {
            Set(tables.flatMap { $0.copies.filter { $0.state == state }.compactMap(\.set) })
        }
        let (taken, givenUp) = (sets(.active), sets(.withdrawing))
        let decided = Set(tables.compactMap(\.restoring).filter(\.decided).compactMap(\.decision))
        var found: [(Int, CopyChange)] = []
        for (index, table) in tables.enumerated() {
            if let restoring = table.restoring, !restoring.decided, let decision = restoring.decision,
                decided.contains(decision)
            {
                found.append((index, .restoreDecided(at: time)))
            }
            for copy in table.copies {
                guard let set = copy.set, copy.state == .active || copy.state == .creating else { continue }
                if givenUp.contains(set) {
                    found.append((index, .withdrawing(copy.id, alone: false)))
                } else if taken.contains(set), copy.state == .creating {
                    found.append((index, .active(copy.id)))
                }
            }
        }
        return found
    }
}
