// Failover.swift: a secondary becomes primary at a recovery point.
//
// Must be prevented:
//   a stale primary goes on writing after a failover
//   a grain that must come back from the point is forgotten: they are on stable storage before the decision
//   a failover that was not decided leaves a restore behind, or one that was decided is not carried out

package struct Failover: StepTable {
    enum State {
        case begins, fences, marks, decides(bytes: UInt64), opens(bytes: UInt64), drops(any Error), ends(bytes: UInt64)
    }
    var state = State.begins
    private let takeover: Takeover
    /// A point that was prepared, and that the operator does not go to.
    private var passedOver: UInt64?

    package init(_ takeover: Takeover) { self.takeover = takeover }

    /// - Returns: bytes that had arrived after the point and are not part of it.
    package mutating func next(after answer: Answer, _ record: GroupRecord) -> Next<UInt64> {
        switch (state, answer) {
        case (.begins, .begin):
            passedOver = record.coordination?.prepared?.number
            return go(.fences, .fence(next: 0))
        case (.fences, .done):
            return go(.marks, .markDifferences(from: takeover.point, takeover.volumes))
        case (.marks, .bytes(let bytes)):
            return go(.decides(bytes: bytes), .change(.failedOver(takeover)))
        case (.decides(let bytes), .done):
            return go(.opens(bytes: bytes), .open(at: takeover.point, takeover.volumes))
        case (.opens(let bytes), .done):
            guard let passedOver else { return .done(bytes) }
            return go(.ends(bytes: bytes), .dropPointFiles(passedOver))
        case (.ends(let bytes), _): return .done(bytes)
        case (.marks, .failed(let error)), (.decides, .failed(let error)):
            // Nothing is restored. The files stay: should the record's file hold the failover, a start carries it out.
            return go(.drops(error), .dropDifferences(takeover.volumes))
        case (.drops(let error), _): return .failed(error)
        case (_, .failed(let error)): return .failed(error)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }
}
