// TakeCopies.swift: FlashCopies of several volumes at one instant, or clones of copies that they have.
//
// Must be prevented:
//   copies of several volumes are of different instants
//   somebody is told of a copy that a start, or power loss, takes away
//   a copy leaves that its record may call active: a start would serve it, and it has preserved nothing since

import Groups
import Volumes

package struct TakeCopies: CopyStepTable {
    package enum Instant: Sendable {
        case now
        /// Of the group's next point, for as long as a comparison takes: nobody is told of them, and a start takes them out.
        case nextPoint
    }
    enum State {
        case begins, prepares(PrepareCopies), enters([CopyRecord])
        /// Flushed and written down.
        case settles([CopyRecord], InOrder)
        case ends(Aftermath, any Error)
    }
    var state = State.begins
    private let drafts: [CopyDraft]
    private let instant: Instant

    /// - Parameter drafts: one for each of the operation's volumes.
    package init(_ drafts: [CopyDraft], at instant: Instant = .now) { (self.drafts, self.instant) = (drafts, instant) }

    /// - Returns: the copies, in the order of the drafts.
    package mutating func next(after answer: CopyAnswer, _ tables: [CopyTable]) -> CopyStep<[CopyRecord]> {
        switch (state, answer) {
        case (.begins, .begin): return prepare(PrepareCopies(drafts.map { .new($0) }), answer, tables)
        case (.prepares(let part), _): return prepare(part, answer, tables)
        case (.enters(let made), .entered(let missed, let apart)): return entered(made, missed, apart, tables)
        case (.settles(let made, let part), _): return settle(made, part, answer, tables)
        case (.ends(let part, let error), _): return end(error, part, answer, tables)
        case (_, .failed(let error)): return .failed(error)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }

    private mutating func prepare(
        _ part: PrepareCopies, _ answer: CopyAnswer, _ tables: [CopyTable]
    ) -> CopyStep<[CopyRecord]> {
        goOn(part, after: answer, tables, as: { .prepares($0) }) { steps, made in
            let entries = made.enumerated().map { index, copy in
                let place = steps.drafts[index].origin.map { CopyEntry.Place.below($0.id) } ?? .newest
                return CopyEntry(volume: index, copy: copy, place: place)
            }
            return steps.go(.enters(made), steps.instant == .now ? .enter(entries) : .enterWithPoint(entries))
        }
    }

    private mutating func entered(
        _ made: [CopyRecord], _ missed: Set<Int>, _ apart: (any Error)?, _ tables: [CopyTable]
    ) -> CopyStep<[CopyRecord]> {
        guard missed.isEmpty, apart == nil else {
            let error =
                drafts.first?.origin.flatMap { origin in
                    missed.isEmpty
                        ? nil : Refusal("'\(origin.name)' went away or failed meanwhile; nothing was created")
                } ?? apart ?? Refusal("the copies took no place; nothing was created, try again", .passing)
            let taken = made.indices.filter { !missed.contains($0) }.map { CopyPlace(volume: $0, id: made[$0].id) }
            let actions =
                missed.sorted().flatMap { discard($0, made[$0], tables) } + taken.map { .leave($0.volume, $0.id) }
                + (taken.isEmpty ? [] : [.awaitGone(taken)])
            return end(error, Aftermath(actions), .begin, tables)
        }
        guard instant == .now else { return .done(made) }
        let actions =
            made.indices.filter { made[$0].isDurable }.map { .flush($0) }
            + made.enumerated().map { CopyAction.change($0, .active($1.id)) }
        return settle(made, InOrder(actions), .begin, tables)
    }

    private mutating func settle(
        _ made: [CopyRecord], _ part: InOrder, _ answer: CopyAnswer, _ tables: [CopyTable]
    ) -> CopyStep<[CopyRecord]> {
        goOn(
            part, after: answer, tables, as: { .settles(made, $0) }, then: { _, _ in .done(made) },
            failed: { $0.giveUp(made, $1, tables) })
    }

    /// Of this copy or of another of its set a record may say that it is active.
    private mutating func giveUp(
        _ made: [CopyRecord], _ error: any Error, _ tables: [CopyTable]
    ) -> CopyStep<[CopyRecord]> {
        let leaving = made.enumerated().map { CopyAction.leave($0, $1.id) }
        let withdrawn = made.enumerated().map { CopyAction.acknowledge($0, .withdrawing($1.id, alone: false)) }
        return end(error, Aftermath(withdrawn + [.onceSaved(Aftermath(leaving))]), .begin, tables)
    }

    private mutating func end(
        _ error: any Error, _ part: Aftermath, _ answer: CopyAnswer, _ tables: [CopyTable]
    ) -> CopyStep<[CopyRecord]> {
        goOn(part, after: answer, tables, as: { .ends($0, error) }, then: { _, _ in .failed(error) })
    }
}
