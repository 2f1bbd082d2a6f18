// RetakeCopies.swift: FlashCopies are taken anew, of this instant; with a background copy, only what changed on either side is copied.
//
// Must be prevented:
//   a copy is taken anew while others still read the old one through it
//   the old copy's record goes before the new one has its place, or its files before the record
//   somebody is told of a copy that a start would not find

import Groups
import Volumes

/// Nobody reads the copies any more, and older ones have what they need of them. May take a while.
package struct TakeOutOfUse: CopyStepTable {
    enum State { case begins, looks(Int), writesDown(Int), waits(Int) }
    var state = State.begins
    private let ids: [CopyID]
    private let volumes: [String]

    /// - Parameters:
    ///   - ids: one for each of the operation's volumes.
    ///   - volumes: their names.
    package init(_ ids: [CopyID], volumes: [String]) { (self.ids, self.volumes) = (ids, volumes) }

    package mutating func next(after answer: CopyAnswer, _ tables: [CopyTable]) -> CopyStep<Void> {
        switch (state, answer) {
        case (.begins, .begin): return look(0)
        case (.looks(let index), .chain(let chain)): return looked(index, chain, tables[index])
        case (.writesDown(let index), .done): return go(.waits(index), .takeOutOfUse(index, ids[index]))
        case (.waits(let index), .done): return look(index + 1)
        case (_, .failed(let error)): return .failed(error)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }

    private mutating func look(_ index: Int) -> CopyStep<Void> {
        index < ids.count ? go(.looks(index), .look(index, ids[index])) : .done(())
    }

    private mutating func looked(_ index: Int, _ chain: ChainLook, _ table: CopyTable) -> CopyStep<Void> {
        let copy = table[ids[index]]
        if chain.copy == nil, copy?.state == .lost { return look(index + 1) }  // nothing of it is left
        guard let state = chain.copy, state != .withdrawing else {
            return .failed(
                Refusal(
                    "FlashCopy '\(copy?.name ?? "")' of volume '\(volumes[index])' still hands over what older ones need; try again soon"
                ))
        }
        return go(.writesDown(index), .change(index, .refreshing(ids[index])))
    }
}

package struct RetakeCopies: CopyStepTable {
    enum State {
        case begins, takesOutOfUse(TakeOutOfUse), prepares(PrepareCopies), enters
        case removes(Int), flushes(Int), replaces(Int), saves(Int), cleansUp(Int)
    }
    var state = State.begins
    private let ids: [CopyID]
    private let name: String
    private let volumes: [String]
    private var old: [CopyRecord] = []
    private var made: [CopyRecord] = []
    private var missed: Set<Int> = []
    private var apart: (any Error)?
    private var problem: (any Error)?

    /// - Parameters:
    ///   - ids: one for each of the operation's volumes.
    ///   - name: of all of them.
    ///   - volumes: their names.
    package init(_ ids: [CopyID], name: String, volumes: [String]) {
        (self.ids, self.name, self.volumes) = (ids, name, volumes)
    }

    package mutating func next(after answer: CopyAnswer, _ tables: [CopyTable]) -> CopyStep<Void> {
        switch (state, answer) {
        case (.begins, .begin): return takeOutOfUse(TakeOutOfUse(ids, volumes: volumes), answer, tables)
        case (.takesOutOfUse(let part), _): return takeOutOfUse(part, answer, tables)
        case (.prepares(let part), _): return prepare(part, answer, tables)
        case (.enters, .entered(let missed, let apart)):
            (self.missed, self.apart) = (missed, apart)
            return conclude(0)
        case (.removes(let index), .done): return cleanUp(index, made[index], tables)
        case (.removes(let index), .failed(let error)):
            problem = error  // it stays `creating`, and a start takes it out
            return conclude(index + 1)
        case (.flushes(let index), .done): return replace(index, nil)
        case (.flushes(let index), .failed(let error)):
            problem = error
            return replace(index, "it could not be made durable: \(error)")
        case (.replaces(let index), .done): return go(.saves(index), .save(index))
        case (.saves(let index), _):
            if case .failed(let error) = answer { problem = problem ?? error }
            return cleanUp(index, old[index], tables)
        case (.cleansUp(let index), _): return conclude(index + 1)
        case (_, .failed(let error)): return .failed(error)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }

    private mutating func takeOutOfUse(
        _ part: TakeOutOfUse, _ answer: CopyAnswer, _ tables: [CopyTable]
    ) -> CopyStep<Void> {
        goOn(part, after: answer, tables, as: { .takesOutOfUse($0) }) { steps, _ in
            steps.old = zip(steps.ids, tables).compactMap { $1[$0] }
            guard steps.old.count == steps.ids.count else {
                return .failed(Refusal("FlashCopy '\(steps.name)' has left meanwhile", .unknown))
            }
            let successors = zip(steps.old, steps.volumes).map { Successor(old: $0, volume: $1) }
            return steps.prepare(PrepareCopies(successors.map { .successor($0) }), .begin, tables)
        }
    }

    private mutating func prepare(
        _ part: PrepareCopies, _ answer: CopyAnswer, _ tables: [CopyTable]
    ) -> CopyStep<Void> {
        goOn(part, after: answer, tables, as: { .prepares($0) }) { steps, made in
            steps.made = made
            let entries = zip(made, steps.ids).enumerated().map { index, pair in
                CopyEntry(volume: index, copy: pair.0, place: .insteadOf(pair.1))
            }
            return steps.go(.enters, .enter(entries))
        }
    }

    /// What has become of the copy of one volume is written down.
    private mutating func conclude(_ index: Int) -> CopyStep<Void> {
        guard index < made.count else { return end() }
        if missed.contains(index) { return go(.removes(index), .change(index, .removed(made[index].id))) }
        return made[index].isDurable ? go(.flushes(index), .flush(index)) : replace(index, nil)
    }

    private mutating func replace(_ index: Int, _ reason: String?) -> CopyStep<Void> {
        go(.replaces(index), .acknowledge(index, .replaced(ids[index], by: made[index].id, failed: reason)))
    }

    private mutating func cleanUp(_ index: Int, _ copy: CopyRecord, _ tables: [CopyTable]) -> CopyStep<Void> {
        go(.cleansUp(index), removeFiles(index, copy, tables[index]))
    }

    private func end() -> CopyStep<Void> {
        if let problem { return .failed(problem) }
        guard missed.isEmpty, apart == nil else {
            return .failed(
                Refusal(
                    "FlashCopy '\(name)' could not be taken anew on all volumes at one instant; refresh it again",
                    .passing))
        }
        return .done(())
    }
}
