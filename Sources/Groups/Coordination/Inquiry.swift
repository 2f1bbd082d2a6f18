// Inquiry.swift: a remote in doubt about a point asks the others, before it fails over.
//
// Must be prevented:
//   remotes fail over to different points: silence is no answer, and whoever says that it has not committed the point has promised first
//     never to do so on the coordinator's word, which closes the race with a commit under way

package struct Inquiry: Equatable, Sendable {
    package enum Outcome: Equatable, Sendable {
        /// Another has committed it: so must this one.
        case rollForward
        /// Nobody has, and nobody can any more.
        case drop
    }

    private(set) var round: Round

    init(_ others: [Int], now: UInt64) { round = Round(others, now: now) }

    var unheard: [Int] { round.waiting }

    /// - Returns: nil while that is open.
    mutating func take(_ testimony: Testimony, of remote: Int) -> Outcome? {
        round.answered(remote)
        switch testimony {
        case .committed: return .rollForward
        // It never prepares the point either, so that it is never decided.
        case .refuses(prepared: false): return .drop
        case .refuses(prepared: true): return round.isComplete ? .drop : nil
        }
    }

    /// Whether the others are to be asked again.
    mutating func isDue(_ now: UInt64) -> Bool { round.isDue(now) }
}
