// CopySteps.swift: an operation on FlashCopies as a value: what it does next, after what has become of the step before.
//
// A site carries the actions out; the simulator carries out the very same, and lets a process die, power or a save fail between any two.
//
// Must be prevented:
//   a record names files that are not there, or files go while the record's file may name them
//   files of one copy go with another that had its identifier before
//   an operation that fails leaves something standing: its value says how that is taken back

import Groups
import Volumes

/// What the site of an operation's volumes is asked to do; `Int` is the volume's index in the operation. Each has ended before the next
/// begins.
package indirect enum CopyAction: Sendable, Equatable {
    /// Answered by `CopyAnswer.chain`.
    case look(Int, CopyID?)

    // The record.
    /// Durably, or not at all.
    case change(Int, CopyChange)
    /// What has happened already: in memory at once, in the file as soon as it can be written.
    case acknowledge(Int, CopyChange)
    /// The record's file says what memory does.
    case save(Int)

    /// These, as soon as the records' files of all the operation's volumes say what memory does. The operation does not wait for that.
    case onceSaved(Aftermath)

    // Files.
    /// Target and bitmap of a copy, under their names; on stable storage if the copy is durable. The target is that of the copy that is
    /// named, if one is. Answered by `CopyAnswer.files`.
    case makeFiles(Int, CopyRecord, targetOf: CopyID?)
    /// Removes what was made of a copy that could not be written down: at once, since its identifier is used again. Should the record's
    /// file name it all the same, a start makes its files anew.
    case discardFiles(Int, CopyID, target: CopyID?)
    /// Closes a copy's files, and removes the bitmap and that target in the state directory; as soon as the record's file does not name
    /// the copy.
    case removeFiles(Int, CopyID, target: CopyID?)
    /// The volume, the targets of its copies and what these have noted as changed are on stable storage.
    case flush(Int)
    /// What older copies have noted as changed is on stable storage, with what a copy that leaves has handed over to them.
    case flushChanges(Int)
    case flushTarget(Int, CopyID)
    /// With the names of the copy's files.
    case flushBitmap(Int, CopyID)

    // The chain.
    /// Every copy takes its place, all at one instant. Answered by `CopyAnswer.entered`.
    case enter([CopyEntry])
    /// The same, in the instant of a group's next point.
    case enterWithPoint([CopyEntry])
    /// Ends its readers, and takes it out of the chain; that it has left follows.
    case leave(Int, CopyID)
    /// Another try may want the same targets.
    case awaitGone([CopyPlace])
    /// Nobody reads the copy any more, and older ones have what they need of it.
    case takeOutOfUse(Int, CopyID)
    case endReaders(Int, CopyID)

    // A start, of the operation's only volume.
    /// Which of these copies have begun to use their target. Answered by `CopyAnswer.taken`.
    case findTaken([CopyID])
    /// Files that no link needs go. Answered by `CopyAnswer.opened`, for each link in its order.
    case openFiles([ChainLink])
    /// Recovery points that the copy carries have failed, and the group's record's file says so. Answered by `CopyAnswer.pointFailed`.
    case failPoint(CopyID)
    /// The recovery points that these carry, and all before them, are void; then their bitmaps go.
    case loseFiles(Set<CopyID>)
    /// Takes its place, as the newest so far, and does what its resumption says.
    case resume(ChainLink)
    case takeRole(RoleStart)
    /// Grains that have not come back yet come back from that copy, as their bitmap says. Fails when that is damaged.
    case resumeRestore(from: CopyID)
    /// What was failed over to is lost: the group's record says that nothing comes back any more.
    case loseFailover
    /// A restore that was not decided, or whose copy is lost, is none any more.
    case forgetRestore
    /// What was taken up is on stable storage; then the volume's record says that it is this run's.
    case confirm
    /// Hosts, the peer and work in the background are let in.
    case finishResuming

    // A restore.
    /// Ends the hosts' connections; what they asked for has been carried out. New ones can only read.
    case shutHostsOut(Int)
    case admitHosts(Int)
    /// Empty, on stable storage.
    case makeRestoreBitmap(Int)
    /// Hosts see what the copy holds; nothing flows back yet. Fails when the copy does not serve any more.
    case beginRestore(Int, from: CopyID)
    case flushRestoreBitmap(Int)
    /// Data flows back.
    case goOnRestoring(Int)
    /// As if it had not begun. A start finds no bitmap.
    case dropRestore(Int)
}

package struct CopyPlace: Sendable, Equatable {
    package var volume: Int
    package var id: CopyID
}

/// A copy that takes its place in a volume's chain.
package struct CopyEntry: Sendable, Equatable {
    package enum Place: Sendable, Equatable {
        case newest
        /// Right below that copy, where it reads everything through it; unless that one does not serve any more.
        case below(CopyID)
        /// In place of that copy, as the newest; unless that one is in use again.
        case insteadOf(CopyID)
    }
    package var volume: Int
    package var copy: CopyRecord
    package var place: Place
}

/// What has become of an action.
package enum CopyAnswer: Sendable {
    /// There was none yet.
    case begin
    case done
    case failed(any Error)
    case chain(ChainLook)
    case files(targetIsZero: Bool)
    /// - Parameters:
    ///   - missed: indices of the entries that took no place.
    ///   - apart: they are not of one instant, and why.
    case entered(missed: Set<Int>, apart: (any Error)?)
    case taken(Set<CopyID>)
    case opened([LinkFiles])
    /// - Parameter isKept: the group keeps some point all the same, whose files these are.
    case pointFailed(isKept: Bool)
}

/// A volume's chain as it is at the moment.
package struct ChainLook: Sendable {
    /// Some copy of it survives power loss, so that a newer one must.
    package var isDurable: Bool
    /// Larger than the order of everything in it.
    package var nextOrder: UInt64
    /// The orders of all recovery points in it, those that are past their retention included.
    package var points: [UInt64]
    /// How many copies and points it has.
    package var count: Int
    /// Of the copy that was asked for; nil = it is not there.
    package var copy: FlashCopy.State?
    /// Seconds since 1970.
    package var at: Double

    package init(
        isDurable: Bool, nextOrder: UInt64, points: [UInt64], count: Int, copy: FlashCopy.State?, at: Double
    ) {
        (self.isDurable, self.nextOrder, self.points, self.count) = (isDurable, nextOrder, points, count)
        (self.copy, self.at) = (copy, at)
    }
}

package protocol CopySteps {
    associatedtype Outcome: Sendable
    /// - Parameter tables: of the operation's volumes, as they are now.
    mutating func next(after answer: CopyAnswer, _ tables: [CopyTable]) -> CopyStep<Outcome>
}

package typealias CopyStep<Outcome: Sendable> = Step<CopyAction, Outcome>

/// Steps that are a table: in this state, after this answer, that comes next.
protocol CopyStepTable: CopySteps {
    associatedtype State
    var state: State { get set }
}

extension CopyStepTable {
    mutating func go(_ next: State, _ action: CopyAction) -> CopyStep<Outcome> {
        state = next
        return .perform(action)
    }

    /// Goes on with a part of the operation, which is an operation by itself.
    ///
    /// - Parameters:
    ///   - state: of the whole, while that part is under way.
    ///   - next: what comes after the part's end.
    mutating func goOn<Part: CopySteps>(
        _ part: Part, after answer: CopyAnswer, _ tables: [CopyTable], as state: (Part) -> State,
        then next: (inout Self, Part.Outcome) -> CopyStep<Outcome>,
        failed: (inout Self, any Error) -> CopyStep<Outcome> = { .failed($1) }
    ) -> CopyStep<Outcome> {
        var part = part
        switch part.next(after: answer, tables) {
        case .perform(let action): return go(state(part), action)
        case .done(let outcome): return next(&self, outcome)
        case .failed(let error): return failed(&self, error)
        }
    }
}

/// One after the other, until one of them fails.
struct InOrder: CopySteps {
    private var todo: ArraySlice<CopyAction>
    init(_ todo: [CopyAction]) { self.todo = todo[...] }

    mutating func next(after answer: CopyAnswer, _ tables: [CopyTable]) -> CopyStep<Void> {
        switch answer {
        case .begin, .done: todo.popFirst().map { .perform($0) } ?? .done(())
        case .failed(let error): .failed(error)
        default: .failed(UnexpectedAnswer(answer, self))
        }
    }
}

/// One after the other, whatever becomes of each. What cannot be taken out of a record keeps its files: a start removes both.
package struct Aftermath: CopySteps, Sendable, Equatable {
    private var todo: ArraySlice<CopyAction>
    init(_ todo: [CopyAction]) { self.todo = todo[...] }

    package mutating func next(after answer: CopyAnswer, _ tables: [CopyTable]) -> CopyStep<Void> {
        if case .failed = answer, case .removeFiles = todo.first { todo.removeFirst() }
        return todo.popFirst().map { .perform($0) } ?? .done(())
    }
}
