// EndCopies.swift: how a background copy is finished, and how a copy leaves.
//
// Must be prevented:
//   a target counts as an image by itself before its data is on stable storage
//   what a copy that leaves has noted as changed for older ones is lost with it
//   files go while the record's file may name the copy

import Groups
import Volumes

/// The background copy is finished; once its data is on stable storage the target is an image by itself.
package struct CompleteCopy: CopyStepTable {
    enum State { case begins, flushesTarget, flushesBitmap, writesDown }
    var state = State.begins
    private let id: CopyID

    package init(_ id: CopyID) { self.id = id }

    /// - Returns: whether it is written down: it may have failed, or left, meanwhile.
    package mutating func next(after answer: CopyAnswer, _ tables: [CopyTable]) -> CopyStep<Bool> {
        switch (state, answer) {
        case (.begins, .begin):
            guard isThere(tables[0]) else { return .done(false) }
            return go(.flushesTarget, .flushTarget(0, id))
        case (.flushesTarget, .done): return go(.flushesBitmap, .flushBitmap(0, id))
        case (.flushesBitmap, .done):
            guard isThere(tables[0]) else { return .done(false) }
            return go(.writesDown, .change(0, .complete(id)))
        case (.writesDown, .done): return .done(true)
        case (_, .failed(let error)): return .failed(error)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }

    private func isThere(_ table: CopyTable) -> Bool {
        guard let copy = table[id] else { return false }
        return copy.state != .failed && copy.state != .lost
    }
}

/// Takes copies out of service: their readers are disconnected, what older ones need is handed over, and then they leave (`ForgetCopy`).
package struct WithdrawCopies: CopyStepTable {
    enum State { case begins, looks(Int), writesDown(Int), leaves(Int), forgets(Int, ForgetCopy) }
    var state = State.begins
    private let ids: [CopyID]

    /// - Parameter ids: one for each of the operation's volumes.
    package init(_ ids: [CopyID]) { self.ids = ids }

    package mutating func next(after answer: CopyAnswer, _ tables: [CopyTable]) -> CopyStep<Void> {
        switch (state, answer) {
        case (.begins, .begin): return look(0)
        case (.looks(let index), .chain(let chain)):
            guard chain.copy != nil else { return forget(index, ForgetCopy(ids[index], of: index), .begin, tables) }
            // Its set may be leaving, once that can be written down: then it waits for the others.
            if tables[index][ids[index]]?.state == .withdrawing { return look(index + 1) }
            // This one alone: others of its set stay.
            return go(.writesDown(index), .change(index, .withdrawing(ids[index], alone: true)))
        case (.writesDown(let index), .done): return go(.leaves(index), .leave(index, ids[index]))
        case (.leaves(let index), .done): return look(index + 1)
        case (.forgets(let index, let part), _): return forget(index, part, answer, tables)
        case (_, .failed(let error)): return .failed(error)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }

    private mutating func look(_ index: Int) -> CopyStep<Void> {
        index < ids.count ? go(.looks(index), .look(index, ids[index])) : .done(())
    }

    /// What is not in the chain has nothing to hand over.
    private mutating func forget(
        _ index: Int, _ part: ForgetCopy, _ answer: CopyAnswer, _ tables: [CopyTable]
    ) -> CopyStep<Void> {
        goOn(part, after: answer, tables, as: { .forgets(index, $0) }) { steps, _ in steps.look(index + 1) }
    }
}

/// A copy is out of the chain: its record and files go, or, when only its content was lost, its files.
package struct ForgetCopy: CopyStepTable {
    enum State { case begins, flushes, writesDown(CopyAction), removes }
    var state = State.begins
    private let id: CopyID
    private let volume: Int
    private let wasInChain: Bool

    /// - Parameters:
    ///   - id: of a FlashCopy or of a recovery point.
    ///   - volume: its index in the operation.
    package init(_ id: CopyID, of volume: Int, wasInChain: Bool = false) {
        (self.id, self.volume, self.wasInChain) = (id, volume, wasInChain)
    }

    /// - Throws: when what older copies have noted could not be flushed. Its record still says what they may lack: it stays, and leaves
    ///   with the next start, or when asked again.
    package mutating func next(after answer: CopyAnswer, _ tables: [CopyTable]) -> CopyStep<Void> {
        switch (state, answer) {
        case (.begins, .begin): return go(.flushes, .flushChanges(volume))
        case (.flushes, .done):
            let table = tables[volume]
            let target = table[id].map { table.unusedTarget(of: $0) } ?? table.unusedTarget(ofOwner: id, besides: id)
            return go(
                .writesDown(.removeFiles(volume, id, target: target)),
                .acknowledge(volume, wasInChain ? .left(id) : .removed(id)))
        case (.writesDown(let removal), .done): return go(.removes, removal)
        case (.removes, .done): return .done(())
        case (_, .failed(let error)): return .failed(error)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }
}
