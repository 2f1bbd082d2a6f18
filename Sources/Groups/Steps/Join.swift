// Join.swift: a primary takes up mirroring to a peer that gives up its role for it: only grains that one of the two has changed are sent.
//
// Must be prevented:
//   a grain in which the sites differ is in neither's bitmaps when the direction changes: the peer's are taken over, durably, before
//     the record says that it is this site's secondary
//   mirroring in whatever direction the record says ends because this has failed

package struct Join: StepTable {
    enum State {
        case begins, stops, settles, givesUp, begunGeneration, asks, takes(Joining), decides, admits, starts
        case goesOn(any Error)
    }
    var state = State.begins
    /// The peer has seen every generation that this site had.
    private let generation: String?

    /// - Parameters:
    ///   - theirs: how the group stands at the peer.
    ///   - identity: a new one, for a generation of which the peer knows nothing.
    package init(_ record: GroupRecord, _ theirs: Standing, identity: String) {
        let isKnown = record.generations.first.map { theirs.role == .primary && theirs.generations.contains($0) }
        generation = isKnown == true ? identity : nil
    }

    package mutating func next(after answer: Answer, _ record: GroupRecord) -> Next<Void> {
        switch (state, answer) {
        case (.goesOn(let error), _): return .failed(error)
        case (_, .failed(let error)): return go(.goesOn(error), .startMirroring)
        case (.begins, .begin): return go(.stops, .stopMirroring)
        // A point that was held is not the new direction's.
        case (.stops, .done): return go(.settles, .settleChanges)
        case (.settles, .done): return go(.givesUp, .change(.pointGivenUp))
        case (.givesUp, .done):
            guard let generation else { return go(.asks, .askToYield) }
            return go(.begunGeneration, .change(.generationBegun(generation)))
        case (.begunGeneration, .done): return go(.asks, .askToYield)
        case (.asks, .yielded(let joining)):
            guard joining.point.isPlausible else {
                return go(.goesOn(Refusal("the peer's answer makes no sense")), .startMirroring)
            }
            return go(.takes(joining), .takeChanges)
        case (.takes(let joining), .done): return go(.decides, .change(.joined(joining)))
        case (.decides, .done): return go(.admits, .admitHosts)
        case (.admits, .done): return go(.starts, .startMirroring)
        case (.starts, .done): return .done(())
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }
}
