// SimulatedStart.swift: a start of a volume, whose actions follow one another without anything between them but its end.

import FlashCopies
import Groups

extension CopyAnswer {
    /// Of what is written down or flushed.
    init(isDone: Bool) { self = isDone ? .done : .failed(SimulationFailure("it cannot be written down")) }
}

/// Carries a start out.
///
/// - Parameter goesOn: whether the process does, after each action.
/// - Returns: nil when the process has ended before the start did.
func takeUp(
    _ start: StartVolume, _ table: () -> CopyTable, _ goesOn: () -> Bool, _ perform: (CopyAction) -> CopyAnswer
) -> Result<Void, any Error>? {
    var (start, answer) = (start, CopyAnswer.begin)
    while true {
        switch start.next(after: answer, [table()]) {
        case .perform(let action): answer = perform(action)
        case .done: return .success(())
        case .failed(let error): return .failure(error)
        }
        guard goesOn() else { return nil }
    }
}
