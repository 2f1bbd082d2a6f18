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
        case begins, shutsOut(InOrder), prepares(PrepareCopies), notes(InOrder)
        /// Of this volume the kept copy enters, or the restore begins.
        case enters(Int), starts(Int)
        case settles(InOrder), looks, decides, opens(Aftermath)
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
        case (.takesBack(let part, let error), _): return end(error, part, answer, tables)
        case (.begins, .begin): return shutOut(InOrder(copies.indices.map { .shutHostsOut($0) }), answer, tables)
        case (.shutsOut(let part), _): return shutOut(part, answer, tables)
        case (.prepares(let part), _): return prepare(part, answer, tables)
        case (.notes(let part), _): return note(part, answer, tables)
        case (.enters(let index), .entered):
            entered = index + 1
            return go(.starts(index), .beginRestore(index, from: copies[index].id))
        case (.starts(let index), .done): return enter(index + 1, tables)
        case (.settles(let part), _): return settle(part, answer, tables)
        case (.looks, .chain(let chain)): return go(.decides, .change(0, .restoreDecided(at: chain.at)))
        case (.decides, .done): return open(tables)
        // One decision stands: what fails from here on does not take it back.
        case (.opens(let part), _): return open(part, answer, tables)
        case (_, .failed(let error)): return takeBack(error, tables)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }

    private mutating func shutOut(
        _ part: InOrder, _ answer: CopyAnswer, _ tables: [CopyTable]
    ) -> CopyStep<Void> {
        goOn(
            part, after: answer, tables, as: { .shutsOut($0) },
            then: { steps, _ in
                steps.prepare(PrepareCopies(steps.drafts.map { .new($0) }), .begin, tables)
            }, failed: { $0.takeBack($1, tables) })
    }

    private mutating func prepare(
        _ part: PrepareCopies, _ answer: CopyAnswer, _ tables: [CopyTable]
    ) -> CopyStep<Void> {
        goOn(
            part, after: answer, tables, as: { .prepares($0) },
            then: { steps, made in
                steps.kept = made
                return steps.note(InOrder(made.indices.flatMap(steps.noted)), .begin, tables)
            }, failed: { $0.takeBack($1, tables) })
    }

    /// The copy is read-only from here on.
    private func noted(_ index: Int) -> [CopyAction] {
        let restoring = CopyTable.Restoring(copy: copies[index].id, kept: kept[index].id, decision: decision)
        return [.makeRestoreBitmap(index), .change(index, .restoring(restoring))]
            + (copies[index].isWritable ? [.endReaders(index, copies[index].id)] : [])
    }

    private mutating func note(_ part: InOrder, _ answer: CopyAnswer, _ tables: [CopyTable]) -> CopyStep<Void> {
        goOn(
            part, after: answer, tables, as: { .notes($0) }, then: { steps, _ in steps.enter(0, tables) },
            failed: { $0.takeBack($1, tables) })
    }

    /// The kept copy becomes the newest of the chain, and takes what the restore overwrites.
    private mutating func enter(_ index: Int, _ tables: [CopyTable]) -> CopyStep<Void> {
        guard index < kept.count else {
            // What does not have to come back is the copy's as well, and may not have been flushed yet; nor may what clients wrote to it.
            let actions = kept.indices.flatMap { [CopyAction.flush($0), .flushRestoreBitmap($0)] }
            return settle(InOrder(actions), .begin, tables)
        }
        return go(.enters(index), .enter([CopyEntry(volume: index, copy: kept[index], place: .newest)]))
    }

    private mutating func settle(_ part: InOrder, _ answer: CopyAnswer, _ tables: [CopyTable]) -> CopyStep<Void> {
        goOn(
            part, after: answer, tables, as: { .settles($0) }, then: { steps, _ in steps.go(.looks, .look(0, nil)) },
            failed: { $0.takeBack($1, tables) })
    }

    /// The first volume's record tells a start of the decision for all, until its own data is back: so none flows, and no host writes,
    /// before every record says it.
    private mutating func open(_ tables: [CopyTable]) -> CopyStep<Void> {
        let time = tables[0].restoredAt ?? 0
        // Who came to read meanwhile does not know that this is another volume now.
        let opened = copies.indices.flatMap { index -> [CopyAction] in
            [.goOnRestoring(index), .shutHostsOut(index), .admitHosts(index)]
        }
        let actions =
            copies.indices.dropFirst().map { CopyAction.acknowledge($0, .restoreDecided(at: time)) }
            + [.onceSaved(Aftermath(opened))]
        return open(Aftermath(actions), .begin, tables)
    }

    private mutating func open(_ part: Aftermath, _ answer: CopyAnswer, _ tables: [CopyTable]) -> CopyStep<Void> {
        goOn(part, after: answer, tables, as: { .opens($0) }, then: { _, _ in .done(()) })
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
            return end(error, Aftermath(kept.indices.flatMap(forget) + dropped + admitted), .begin, tables)
        }
        // The decision may stand in the first volume's file all the same, and then a start would carry it out for all. So until that
        // is mended, nobody writes, everything that it relies on is kept, and the other volumes' records still know of it.
        let others = kept.indices.dropFirst().flatMap(forget)
        return end(
            error, Aftermath(forget(0) + [.onceSaved(Aftermath(others + dropped + admitted))]), .begin, tables)
    }

    private func forget(_ index: Int) -> [CopyAction] {
        [.acknowledge(index, .restoring(nil))]
            + (index < entered ? [.acknowledge(index, .withdrawing(kept[index].id, alone: true))] : [])
    }

    private mutating func end(
        _ error: any Error, _ part: Aftermath, _ answer: CopyAnswer, _ tables: [CopyTable]
    ) -> CopyStep<Void> {
        goOn(part, after: answer, tables, as: { .takesBack($0, error) }, then: { _, _ in .failed(error) })
    }
}
