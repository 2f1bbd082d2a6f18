// GroupFailover.swift: a failover of a group with several remotes, at one of them: all go to one point.
//
//   announce it → ask how the others stand → settle what is in doubt → take over, pair by pair → lead the others → retract it
//
// Must be prevented:
//   remotes fail over to different points, unless an operator says so
//   two failovers, at two remotes, wait for each other

package struct GroupFailover: FailoverSteps {
    /// What an operator wants.
    package struct Order: Sendable, Equatable {
        package var group: String
        package var site: String
        /// nil = the newest that counts.
        package var point: UInt64?
        /// The others are not asked, and not led.
        package var alone: Bool
        /// The group's other remotes.
        package var others: [String]
        /// At random.
        package var id: UInt64

        package init(group: String, site: String, point: UInt64?, alone: Bool, others: [String], id: UInt64) {
            (self.group, self.site, self.point, self.alone) = (group, site, point, alone)
            (self.others, self.id) = (alone ? [] : others, id)
        }

        var flag: FailoverFlag { FailoverFlag(id: id, point: point) }
    }

    package struct Outcome: Sendable {
        package var target: FailoverTarget
        /// Other remotes that have not followed, and why.
        package var behind: [(remote: String, error: any Error)]
    }

    /// What a try goes by.
    private struct Hearing {
        /// The newest point of each pair before the others were asked.
        var seen: [UInt64]
        var heard: [String: Heard]
        /// By an operator who is alone, or at a remote that has failed over: what it is about is not asked any more.
        var chosen: UInt64?
    }

    private enum State {
        case begins, announces
        case asks(seen: [UInt64])
        case settles(DoubtSettlement, Hearing)
        case takesOver(FailoverTarget, Hearing, pair: Int)
        case leads(FailoverTarget, committed: UInt64, left: ArraySlice<String>, behind: [(String, any Error)])
        case retracts(Result<Outcome, any Error>)
    }
    private var state = State.begins
    private let order: Order
    private var tries = 1
    private static let mostTries = 20

    package init(_ order: Order) { self.order = order }

    package mutating func next(after answer: FailoverAnswer, _ pairs: [OwnPair]) -> Step<FailoverAction, Outcome> {
        do {
            switch (state, answer) {
            case (.begins, .begin):
                try FailoverOutlook(order: order, pairs: pairs, heard: [:]).checkAlone()
                // Nobody else is told of one that asks nobody.
                if order.alone { return ask(pairs) }
                state = .announces
                return .perform(.announce(order.flag))
            case (.announces, .done): return ask(pairs)
            case (.announces, .failed(let error)): return .failed(error)
            case (.retracts(.success(let outcome)), _): return .done(outcome)
            case (.retracts(.failure(let error)), _): return .failed(error)
            case (.asks(let seen), .heard(let heard)): return try hear(heard, seen, pairs)
            case (.settles(let doubt, let hearing), _): return try settle(doubt, hearing, answer, pairs)
            case (.takesOver(let target, let hearing, let pair), .done):
                return takeOver(target, hearing, from: pair + 1, pairs)
            case (.takesOver, .overtaken): return try askAgain(pairs)
            case (.leads(let target, let committed, let left, let behind), .done):
                return lead(target, committed, left.dropFirst(), behind)
            case (.leads(let target, let committed, let left, let behind), .failed(let error)):
                return lead(target, committed, left.dropFirst(), behind + [(left.first!, error)])
            case (_, .failed(let error)): throw error
            default: throw UnexpectedAnswer(answer, state)
            }
        } catch {
            return end(.failure(error))
        }
    }

    private mutating func end(_ result: Result<Outcome, any Error>) -> Step<FailoverAction, Outcome> {
        state = .retracts(result)
        return order.alone ? next(after: .done, []) : .perform(.retract(order.others))
    }

    // MARK: How the others stand

    /// What they say is of after that: whoever has a newer point then, or takes part in it, says so.
    private mutating func ask(_ pairs: [OwnPair]) -> Step<FailoverAction, Outcome> {
        state = .asks(seen: Self.newest(pairs))
        return .perform(.ask(order.others, about: nil))
    }

    private mutating func askAgain(_ pairs: [OwnPair]) throws -> Step<FailoverAction, Outcome> {
        guard tries < Self.mostTries else { throw OvertakenFailover() }
        tries += 1
        return ask(pairs)
    }

    private static func newest(_ pairs: [OwnPair]) -> [UInt64] { pairs.map { $0.record.newestReadable?.number ?? 0 } }

    private mutating func hear(
        _ heard: [String: Heard], _ seen: [UInt64], _ pairs: [OwnPair]
    ) throws -> Step<FailoverAction, Outcome> {
        let agreed = try FailoverOutlook(order: order, pairs: pairs, heard: heard).agreed()
        let chosen = order.alone ? order.point : agreed
        let doubt = DoubtSettlement(order.group, others: order.others, chosen: chosen)
        return try settle(doubt, Hearing(seen: seen, heard: heard, chosen: chosen), .begin, pairs)
    }

    private mutating func settle(
        _ doubt: DoubtSettlement, _ hearing: Hearing, _ answer: FailoverAnswer, _ pairs: [OwnPair]
    ) throws -> Step<FailoverAction, Outcome> {
        var doubt = doubt
        switch doubt.next(after: answer, pairs) {
        case .perform(let action):
            state = .settles(doubt, hearing)
            return .perform(action)
        case .failed(let error): throw error
        case .done: return try choose(hearing, pairs)
        }
    }

    // MARK: The same point everywhere

    private mutating func choose(_ hearing: Hearing, _ pairs: [OwnPair]) throws -> Step<FailoverAction, Outcome> {
        guard hearing.seen == Self.newest(pairs) else { return try askAgain(pairs) }
        let outlook = FailoverOutlook(order: order, pairs: pairs, heard: hearing.heard)
        let target = try outlook.target(hearing.chosen ?? order.point)
        try outlook.checkOlder()
        try outlook.checkAll(target)
        return takeOver(target, hearing, from: 0, pairs)
    }

    private mutating func takeOver(
        _ target: FailoverTarget, _ hearing: Hearing, from first: Int, _ pairs: [OwnPair]
    ) -> Step<FailoverAction, Outcome> {
        guard let pair = pairs.indices.dropFirst(first).first(where: { !pairs[$0].isEmpty }) else {
            return lead(target, pairs.map(\.record.newestCommitted).max() ?? 0, order.others[...], [])
        }
        state = .takesOver(target, hearing, pair: pair)
        guard pairs[pair].record.failedOver != nil || !target.leaves(pairs[pair]) else {
            return .perform(.leave(pair: pair))
        }
        let newest = hearing.chosen == nil ? hearing.seen[pair] : nil
        return .perform(.takeOver(target.takeover(pair, pairs[pair], ifNewestIs: newest)))
    }

    private mutating func lead(
        _ target: FailoverTarget, _ committed: UInt64, _ left: ArraySlice<String>, _ behind: [(String, any Error)]
    ) -> Step<FailoverAction, Outcome> {
        guard let next = left.first else { return end(.success(Outcome(target: target, behind: behind))) }
        state = .leads(target, committed: committed, left: left, behind: behind)
        return .perform(.lead(next, target, committed: committed))
    }
}
