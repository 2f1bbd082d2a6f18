// RestoreVolumes.swift: volumes become a FlashCopy's point in time again.
//
//   hosts are shut out ─► what is discarded becomes a FlashCopy ─► hosts would see the restored state, nothing flows
//   ─► everything that this relies on is flushed ─► the decision, for each volume ─► data flows back, hosts are let in
//
// Nobody writes to the volumes meanwhile, so that what is kept and what is restored is of one instant on all of them.
//
// Must be prevented:
//   a host that had a volume open writes what it has cached over what is restored
//   what is discarded is not kept
//   the source changes before the decision to restore it is on stable storage
//   some of the volumes are restored and others not: once one decision is on stable storage, a start makes the others; so that one
//     stays until all are
//   a volume is restored from a copy that has failed
//   a start carries out a restore that was taken back, over what hosts wrote since, or calls active what left with it

import Groups
import Volumes

package struct RestoreVolumes: CopyStepTable {
    enum State {
        case begins, shutsOut([CopyAction]), prepares(PrepareCopies), notes([CopyAction])
        /// Of this volume the kept copy enters, or the restore begins.
        case enters(Int), starts(Int)
        case settles([CopyAction]), looks, decides, opens([CopyAction])
        case takesBack(Aftermath, any Error)
    }
    var state = State.begins
    private let copies: [CopyRecord]
    private let drafts: [CopyDraft]
    private let decision: String
    private var kept: [CopyRecord] = []
    private var entered = 0

    /// - Parameters:
    ///   - copies: what the volumes become, one for each.
    ///   - drafts: of the copies that keep what is discarded.
    ///   - decision: names this restore, and no other.
    package init(_ copies: [CopyRecord], keeping drafts: [CopyDraft], decision: String) {
        (self.copies, self.drafts, self.decision) = (copies, drafts, decision)
    }

    package mutating func next(after answer: CopyAnswer, _ tables: [CopyTable]) -> CopyStep<Void> {
        switch (state, answer) {
        case (.takesBack(let aftermath, let error), _): return takeBack(aftermath, answer, error)
        case (.begins, .begin): return shutOut(copies.indices.map { .shutHostsOut($0) }, tables)
        case (.shutsOut(let todo), .done): return shutOut(todo, tables)
        case (.prepares(let part), _): return prepare(part, answer, tables)
        case (.notes(let todo), .done): return note(todo)
        case (.enters(let index), .entered):
            entered = index + 1
            return go(.starts(index), .beginRestore(index, from: copies[index].id))
        case (.starts(let index), .done): return enter(index + 1)
        case (.settles(let todo), .done): return settle(todo)
        case (.looks, .chain(let chain)): return go(.decides, .change(0, .restoreDecided(at: chain.at)))
        case (.decides, .done): return open(tables)
        // One decision stands: what fails from here on does not take it back.
        case (.opens(let todo), _): return open(todo)
        case (_, .failed(let error)): return takeBack(error, tables)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }

    private mutating func shutOut(_ todo: [CopyAction], _ tables: [CopyTable]) -> CopyStep<Void> {
        guard let action = todo.first else {
            return prepare(PrepareCopies(drafts.map { .new($0) }), .begin, tables)
        }
        return go(.shutsOut(Array(todo.dropFirst())), action)
    }

    private mutating func prepare(
        _ part: PrepareCopies, _ answer: CopyAnswer, _ tables: [CopyTable]
    ) -> CopyStep<Void> {
        var part = part
        switch part.next(after: answer, tables) {
        case .perform(let action): return go(.prepares(part), action)
        case .failed(let error): return takeBack(error, tables)
        case .done(let made):
            kept = made
            return note(made.indices.flatMap { noted($0) })
        }
    }

    /// The copy is read-only from here on.
    private func noted(_ index: Int) -> [CopyAction] {
        let restoring = CopyTable.Restoring(copy: copies[index].id, kept: kept[index].id, decision: decision)
        return [.makeRestoreBitmap(index), .change(index, .restoring(restoring))]
            + (copies[index].isWritable ? [.endReaders(index, copies[index].id)] : [])
    }

    private mutating func note(_ todo: [CopyAction]) -> CopyStep<Void> {
        guard let action = todo.first else { return enter(0) }
        return go(.notes(Array(todo.dropFirst())), action)
    }

    /// The kept copy becomes the newest of the chain, and takes what the restore overwrites.
    private mutating func enter(_ index: Int) -> CopyStep<Void> {
        guard index < kept.count else {
            // What does not have to come back is the copy's as well, and may not have been flushed yet; nor may what clients wrote to it.
            return settle(kept.indices.flatMap { [.flush($0), .flushRestoreBitmap($0)] })
        }
        return go(.enters(index), .enter([CopyEntry(volume: index, copy: kept[index], place: .newest)]))
    }

    private mutating func settle(_ todo: [CopyAction]) -> CopyStep<Void> {
        guard let action = todo.first else { return go(.looks, .look(0, nil)) }
        return go(.settles(Array(todo.dropFirst())), action)
    }

    /// The first volume's record tells a start of the decision for all, until its own data is back: so none flows, and no host writes,
    /// before every record says it.
    private mutating func open(_ tables: [CopyTable]) -> CopyStep<Void> {
        let time = tables[0].restoredAt ?? 0
        // Who came to read meanwhile does not know that this is another volume now.
        let opened = copies.indices.flatMap { index -> [CopyAction] in
            [.goOnRestoring(index), .shutHostsOut(index), .admitHosts(index)]
        }
        return open(
            copies.indices.dropFirst().map { .acknowledge($0, .restoreDecided(at: time)) }
                + [.onceSaved(Aftermath(opened))])
    }

    private mutating func open(_ todo: [CopyAction]) -> CopyStep<Void> {
        guard let action = todo.first else { return .done(()) }
        return go(.opens(Array(todo.dropFirst())), action)
    }

    /// As if the restore had not been asked for: nothing has flowed back.
    private mutating func takeBack(_ error: any Error, _ tables: [CopyTable]) -> CopyStep<Void> {
        let dropped = kept.indices.flatMap { index -> [CopyAction] in
            [.dropRestore(index)]
                + (index < entered ? [.leave(index, kept[index].id)] : discard(index, kept[index], tables))
        }
        let admitted = copies.indices.map { CopyAction.admitHosts($0) }
        guard case .decides = state else {
            // No file says that it is decided, so a start forgets it as well.
            return takeBack(Aftermath(kept.indices.flatMap { forget($0) } + dropped + admitted), .begin, error)
        }
        // The decision may stand in the first volume's file all the same, and then a start would carry it out for all. So until that
        // is mended, nobody writes, everything that it relies on is kept, and the other volumes' records still know of it.
        let others = kept.indices.dropFirst().flatMap { forget($0) }
        return takeBack(
            Aftermath(forget(0) + [.onceSaved(Aftermath(others + dropped + admitted))]), .begin, error)
    }

    private func forget(_ index: Int) -> [CopyAction] {
        [.acknowledge(index, .restoring(nil))]
            + (index < entered ? [.acknowledge(index, .withdrawing(kept[index].id, alone: true))] : [])
    }

    private mutating func takeBack(
        _ aftermath: Aftermath, _ answer: CopyAnswer, _ error: any Error
    ) -> CopyStep<Void> {
        var aftermath = aftermath
        guard let action = aftermath.next(after: answer) else { return .failed(error) }
        return go(.takesBack(aftermath, error), action)
    }
}
