// DoubtSettlement.swift: of every point that is prepared here, and not known to be decided, whether it counts.
//
// Must be prevented:
//   a remote decides alone about a point that it has prepared

package struct DoubtSettlement: FailoverSteps {
    private struct Doubt {
        var pair: Int
        var point: UInt64
        /// Pairs that have no part in it; and all of the group's, as the coordinator has said, if it has.
        var without: [String] = []
        var places: [String] = []
        var testimonies: [Testimony] = []

        /// What a pair says that takes no part in the point says nothing about who has committed it.
        func counts(_ pair: String) -> Bool {
            !without.contains(pair) && (places.isEmpty || places.contains(pair))
        }
    }

    private enum State {
        /// Pairs before this one are settled.
        case looks(from: Int)
        /// The doubt's own pair promises first, then these do.
        case promises(Doubt, asked: Int?, [Int])
        case asks(Doubt)
        case settles(pair: Int)
    }
    private var state = State.looks(from: 0)
    private let group: String
    private let others: [String]
    private let chosen: UInt64?

    /// - Parameters:
    ///   - others: remotes that may have committed what is prepared here.
    ///   - chosen: by an operator, here or at a remote that has failed over: nobody is asked.
    package init(_ group: String, others: [String], chosen: UInt64? = nil) {
        (self.group, self.others, self.chosen) = (group, others, chosen)
    }

    package mutating func next(after answer: FailoverAnswer, _ pairs: [OwnPair]) -> Step<FailoverAction, Void> {
        switch (state, answer) {
        case (_, .failed(let error)): return .failed(error)
        case (.looks(let first), .begin): return look(from: first, pairs)
        case (.promises(var doubt, let asked, let left), .testimony(let testimony)):
            // What the pair itself says is that it does not know.
            if let asked, doubt.counts(pairs[asked].name), let testimony { doubt.testimonies.append(testimony) }
            return promise(doubt, left)
        case (.asks(let doubt), .heard(let heard)): return decide(doubt, heard, pairs)
        case (.settles(let pair), .done): return look(from: pair + 1, pairs)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }

    private mutating func look(from first: Int, _ pairs: [OwnPair]) -> Step<FailoverAction, Void> {
        for pair in pairs.indices.dropFirst(first) {
            guard let point = pairs[pair].record.undecided else { continue }
            if let chosen {
                // What is not chosen is passed over by the takeover itself: should that fail, nothing has changed.
                guard chosen == point else { continue }
                return settle(pair, point, forward: true, .chosen)
            }
            // Its own promise comes first.
            let record = pairs[pair].record
            let prepared = record.coordination?.prepared ?? record.points.first { $0.number == point }
            let doubt = Doubt(
                pair: pair, point: point, without: prepared?.without ?? [],
                places: record.coordination?.places?.map(\.host) ?? [])
            state = .promises(doubt, asked: nil, pairs.indices.filter { $0 != pair })
            return .perform(.promise(pair: pair, point))
        }
        return .done(())
    }

    private mutating func promise(_ doubt: Doubt, _ left: [Int]) -> Step<FailoverAction, Void> {
        guard let next = left.first else {
            state = .asks(doubt)
            return .perform(.ask(others, about: doubt.point))
        }
        state = .promises(doubt, asked: next, Array(left.dropFirst()))
        return .perform(.promise(pair: next, doubt.point))
    }

    /// One has committed it: forward. One has never had it, or all have promised to refuse it: back.
    private mutating func decide(
        _ doubt: Doubt, _ heard: [String: Heard], _ pairs: [OwnPair]
    ) -> Step<FailoverAction, Void> {
        let testimonies =
            doubt.testimonies
            + heard.values.flatMap { $0.word?.pairs ?? [] }.filter { doubt.counts($0.pair) }.compactMap(\.testimony)
        if testimonies.contains(.committed) { return settle(doubt.pair, doubt.point, forward: true, .committed) }
        let silent = others.filter { heard[$0]?.word == nil }
        guard silent.isEmpty || testimonies.contains(.refuses(prepared: false)) else {
            return .failed(refusal(doubt, silent, heard, pairs))
        }
        return settle(doubt.pair, doubt.point, forward: false, .uncommitted)
    }

    private mutating func settle(
        _ pair: Int, _ point: UInt64, forward: Bool, _ reason: Settlement.Reason
    ) -> Step<FailoverAction, Void> {
        state = .settles(pair: pair)
        return .perform(.settle(Settlement(pair: pair, point: point, forward: forward, reason: reason)))
    }

    private func refusal(
        _ doubt: Doubt, _ silent: [String], _ heard: [String: Heard], _ pairs: [OwnPair]
    ) -> Refusal {
        let names = silent.map { "'\($0)'" }.joined(separator: ", ")
        let reasons = silent.map { heard[$0]?.problem ?? "it was not asked" }.joined(separator: "; ")
        let committed = pairs.map(\.record.newestCommitted).max() ?? 0
        return Refusal(
            "group '\(group)': point \(doubt.point) is in doubt: it is prepared here, and \(names), which may have committed it, does not "
                + "say (\(reasons)). Bring \(names) back and try again; or choose: `farcopy failover \(group) --alone \(doubt.point)` takes "
                + "it, `--alone \(committed)` drops it. If \(names) went the other way, what is there does not match what is here"
        )
    }
}
