// Failover.swift: a secondary becomes primary at a recovery point.
//
// Must be prevented:
//   a stale primary goes on writing after a failover
//   a grain that must come back from the point is forgotten: they are on stable storage before the decision
//   a failover that was not decided leaves a restore behind, or one that was decided is not carried out

package struct Failover: Steps {
    private enum State {
        case begins, fences, marks, decides(bytes: UInt64), opens(bytes: UInt64), drops(any Error)
    }
    private var state = State.begins
    private let takeover: Takeover

    package init(_ takeover: Takeover) { self.takeover = takeover }

    /// - Returns: bytes that had arrived after the point and are not part of it.
    package mutating func next(after answer: Answer, _ record: GroupRecord) -> Next<UInt64> {
        switch (state, answer) {
        case (.begins, .begin):
            state = .fences
            return .perform(.fence(next: 0))
        case (.fences, .done):
            state = .marks
            return .perform(.markDifferences(from: takeover.point, takeover.volumes))
        case (.marks, .bytes(let bytes)):
            state = .decides(bytes: bytes)
            return .perform(.change(.failedOver(takeover)))
        case (.decides(let bytes), .done):
            state = .opens(bytes: bytes)
            return .perform(.open(at: takeover.point, takeover.volumes))
        case (.opens(let bytes), .done): return .done(bytes)
        case (.marks, .failed(let error)), (.decides, .failed(let error)):
            // Nothing is restored. The files stay: should the record's file hold the failover, a start carries it out.
            state = .drops(error)
            return .perform(.dropDifferences(takeover.volumes))
        case (.drops(let error), _): return .failed(error)
        case (_, .failed(let error)): return .failed(error)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }
}
