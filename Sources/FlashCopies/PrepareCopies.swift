// PrepareCopies.swift: files and records of new copies, before they take anything; all of them, or none.
//
// Must be prevented:
//   a copy takes old content before it is written down: a crash would lose what older copies need
//   a copy that must survive power loss is written down before its files are on stable storage
//   a copy that is newer than a durable one is not durable, although that one reads through it
//   a clone is written down below something that it does not read through: after a restart it would
//   a chain becomes longer than the engine can hold

import Base
import Groups
import Volumes

/// A copy that is to be taken of one of an operation's volumes.
package struct CopyDraft: Sendable {
    /// What is cloned. A clone reads through it, and so survives power loss if it does.
    package struct Origin: Sendable, Equatable {
        package var id: CopyID
        package var name: String
        package var order: UInt64
        package var isDurable: Bool

        package init(id: CopyID, name: String, order: UInt64, isDurable: Bool) {
            (self.id, self.name, self.order, self.isDurable) = (id, name, order, isDurable)
        }
    }

    /// The volume's name, for whoever reads why it cannot be.
    package var volume: String
    package var name: String
    package var target: String?
    package var isFilled = false
    /// Bytes a second; 0 = as fast as it goes.
    package var rate: UInt64 = 0
    package var isWritable = false
    /// Survives power loss; others may have to, all the same.
    package var isDurable = false
    package var set: String?
    package var origin: Origin?

    package init(volume: String, name: String) { (self.volume, self.name) = (volume, name) }

    fileprivate func copy(_ chain: ChainLook, _ table: CopyTable) throws -> CopyRecord {
        var copy = CopyRecord(
            id: table.nextID, name: name, createdAt: chain.at, order: chain.nextOrder, state: .creating)
        if let origin { copy.order = try place(below: origin.order, chain, table) }
        copy.target = target
        (copy.isFilled, copy.rate, copy.isWritable) = (isFilled, rate, isWritable)
        copy.isDurable = origin?.isDurable ?? (isDurable || chain.isDurable)
        copy.set = set
        return copy
    }

    /// Half-way to the next older one.
    private func place(below order: UInt64, _ chain: ChainLook, _ table: CopyTable) throws -> UInt64 {
        let older = (table.copies.map(\.order) + chain.points).filter { $0 < order }.max() ?? 0
        let middle = older + (order - older) / 2
        guard middle > older else {
            throw Refusal("volume '\(volume)' has too many clones of clones; withdraw some")
        }
        return middle
    }
}

/// What takes the place of a copy that is taken anew: the same, over the same target.
struct Successor: Sendable {
    let old: CopyRecord
    /// The volume's name.
    let volume: String

    func copy(_ chain: ChainLook, _ table: CopyTable) -> CopyRecord {
        var copy = old
        (copy.id, copy.createdAt, copy.order) = (table.nextID, chain.at, chain.nextOrder)
        (copy.state, copy.reason, copy.isComplete, copy.set) = (.creating, nil, false, nil)
        copy.isDurable = old.isDurable || chain.isDurable
        if !keepsTarget(chain), copy.target == nil { copy.targetOwner = copy.id }
        return copy
    }

    /// Only what changed on either side has to be copied; of one that is not filled nothing in the target counts any more.
    func keepsTarget(_ chain: ChainLook) -> Bool { chain.copy != nil && (old.isFilled || old.target != nil) }
}

package struct PrepareCopies: CopyStepTable {
    enum State {
        case begins, looks(Int), makes(Int, CopyRecord), writesDown(Int, CopyRecord)
        case takesBack(Aftermath, any Error)
    }
    enum Part {
        case new(CopyDraft), successor(Successor)
    }
    var state = State.begins
    private let parts: [Part]
    private var made: [CopyRecord] = []

    init(_ parts: [Part]) { self.parts = parts }

    /// - Returns: the copies, in the order of the drafts.
    package mutating func next(after answer: CopyAnswer, _ tables: [CopyTable]) -> CopyStep<[CopyRecord]> {
        switch (state, answer) {
        case (.takesBack(let part, let error), _): return end(error, part, answer, tables)
        case (.begins, .begin): return look(0)
        case (.looks(let index), .chain(let chain)): return makeFiles(index, chain, tables)
        case (.makes(let index, var copy), .files(let targetIsZero)):
            copy.targetIsZero = targetIsZero
            return go(.writesDown(index, copy), .change(index, .added(copy)))
        case (.writesDown(let index, let copy), .done):
            made.append(copy)
            return index + 1 < parts.count ? look(index + 1) : .done(made)
        case (.makes(let index, let copy), .failed(let error)), (.writesDown(let index, let copy), .failed(let error)):
            let target = tables[index].unusedTarget(of: copy)
            return takeBack(tables, [.discardFiles(index, copy.id, target: target)], error)
        case (_, .failed(let error)): return takeBack(tables, [], error)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }

    private static func checkRoom(_ chain: ChainLook, _ volume: String) throws {
        guard chain.count < Limits.copiesPerVolume - Limits.copiesKeptFree else {
            throw Refusal(
                "volume '\(volume)' has \(chain.count) FlashCopies and recovery points, which is the limit; withdraw some"
            )
        }
    }

    private mutating func look(_ index: Int) -> CopyStep<[CopyRecord]> {
        let id: CopyID? = if case .successor(let successor) = parts[index] { successor.old.id } else { nil }
        return go(.looks(index), .look(index, id))
    }

    private mutating func makeFiles(
        _ index: Int, _ chain: ChainLook, _ tables: [CopyTable]
    ) -> CopyStep<[CopyRecord]> {
        let table = tables[index]
        switch parts[index] {
        case .new(let draft):
            do {
                try Self.checkRoom(chain, draft.volume)
                let copy = try draft.copy(chain, table)
                return go(.makes(index, copy), .makeFiles(index, copy, targetOf: nil))
            } catch {
                return takeBack(tables, [], error)
            }
        case .successor(let successor):
            // In place of one that is lost it is one more.
            do { if chain.copy == nil { try Self.checkRoom(chain, successor.volume) } } catch {
                return takeBack(tables, [], error)
            }
            let copy = successor.copy(chain, table)
            let kept = successor.keepsTarget(chain) ? successor.old.id : nil
            return go(.makes(index, copy), .makeFiles(index, copy, targetOf: kept))
        }
    }

    private mutating func takeBack(
        _ tables: [CopyTable], _ first: [CopyAction], _ error: any Error
    ) -> CopyStep<[CopyRecord]> {
        end(error, Aftermath(first + made.indices.flatMap { discard($0, made[$0], tables) }), .begin, tables)
    }

    private mutating func end(
        _ error: any Error, _ part: Aftermath, _ answer: CopyAnswer, _ tables: [CopyTable]
    ) -> CopyStep<[CopyRecord]> {
        goOn(part, after: answer, tables, as: { .takesBack($0, error) }, then: { _, _ in .failed(error) })
    }
}

/// Takes back what was prepared and has not entered the chain; a target that belongs to the copy before stays.
func discard(_ volume: Int, _ copy: CopyRecord, _ tables: [CopyTable]) -> [CopyAction] {
    [.change(volume, .removed(copy.id)), removeFiles(volume, copy, tables[volume])]
}

func removeFiles(_ volume: Int, _ copy: CopyRecord, _ table: CopyTable) -> CopyAction {
    .removeFiles(volume, copy.id, target: table.unusedTarget(of: copy))
}
