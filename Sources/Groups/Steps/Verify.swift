// Verify.swift: a point is compared at both sites while mirroring goes on.
//
// Must be prevented:
//   what hosts write meanwhile counts as a difference
//   a FlashCopy made for it stays behind, at either site, whatever fails

package struct Verify: StepTable {
    enum State {
        case begins, takes, pins(PointRecord), compares(PointRecord)
        case drops(PointRecord, (any Error)?), unpins(PointRecord, (any Error)?)
    }
    var state = State.begins

    package init() {}

    /// - Returns: the point that was compared.
    package mutating func next(after answer: Answer, _ record: GroupRecord) -> Next<PointRecord> {
        switch (state, answer) {
        case (.begins, .begin): return go(.takes, .copyAtPoint)
        case (.takes, .point(let point)): return go(.pins(point), .pinPoint(point.number))
        case (.takes, .failed(let error)): return .failed(error)
        case (.pins(let point), .done): return go(.compares(point), .comparePoint(point.number))
        case (.compares(let point), .done): return go(.drops(point, nil), .dropCopies)
        // It may be pinned all the same: the answer was lost.
        case (.pins(let point), .failed(let error)), (.compares(let point), .failed(let error)):
            return go(.drops(point, error), .dropCopies)
        case (.drops(let point, let error), _): return go(.unpins(point, error), .unpinPoint(point.number))
        case (.unpins(let point, let error), _): return error.map { .failed($0) } ?? .done(point)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }
}
