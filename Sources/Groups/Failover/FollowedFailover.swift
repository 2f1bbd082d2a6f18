// FollowedFailover.swift: another remote has failed over, and leads this one to the same point.
//
// Must be prevented:
//   a remote that is led drops a point that others have

package struct FollowedFailover: FailoverSteps {
    private enum State {
        case begins, asks
        /// Pairs before this one have followed.
        case settles(pair: Int)
        case takesOver(pair: Int)
    }
    private var state = State.begins
    private let group: String
    private let site: String
    private let leader: String
    private let target: FailoverTarget
    private let committed: UInt64

    /// - Parameter committed: what is prepared here counts up to this point.
    package init(group: String, site: String, leader: String, _ target: FailoverTarget, committed: UInt64) {
        (self.group, self.site, self.leader) = (group, site, leader)
        (self.target, self.committed) = (target, committed)
    }

    package mutating func next(after answer: FailoverAnswer, _ pairs: [OwnPair]) -> Step<FailoverAction, Void> {
        switch (state, answer) {
        case (_, .failed(let error)): return .failed(error)
        case (.begins, .begin):
            // A call that was held up must not lead anybody when nobody waits for that any more.
            state = .asks
            return .perform(.ask([leader], about: nil))
        case (.asks, .heard(let heard)):
            guard leads(heard[leader]?.word) else {
                return .failed(
                    Refusal("'\(leader)' does not say that it has failed over to point \(target.point)", .refused))
            }
            return follow(from: 0, pairs)
        case (.settles(let pair), .done): return takeOver(pair, pairs[pair])
        case (.takesOver(let pair), .done): return follow(from: pair + 1, pairs)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }

    private func leads(_ word: RemoteWord?) -> Bool {
        word?.pairs.contains { $0.failedOver == target.point || target.without.contains($0.pair) } ?? false
    }

    private mutating func follow(from first: Int, _ pairs: [OwnPair]) -> Step<FailoverAction, Void> {
        for (place, pair) in pairs.enumerated().dropFirst(first) where !pair.isEmpty {
            if let done = pair.record.failedOver?.point {
                guard done != target.point(of: pair) else { continue }
                return .failed(
                    Refusal("group '\(group)' at '\(site)' has failed over to point \(done) already", .refused))
            }
            guard let point = pair.record.undecided else { return takeOver(place, pair) }
            state = .settles(pair: place)
            return .perform(
                .settle(
                    Settlement(pair: place, point: point, forward: point <= committed, reason: .led(by: leader))))
        }
        return .done(())
    }

    private mutating func takeOver(_ place: Int, _ pair: OwnPair) -> Step<FailoverAction, Void> {
        state = .takesOver(pair: place)
        return .perform(.takeOver(target.takeover(place, pair)))
    }
}
