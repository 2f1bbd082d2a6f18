// FailoverOutlook.swift: which point a group with several remotes fails over to, by what one of them has and what the others say.
//
// Must be prevented:
//   a group is to go to a point that a remote which takes part in it, and answers, does not have

struct FailoverOutlook: Sendable {
    let order: GroupFailover.Order
    let pairs: [OwnPair]
    let heard: [String: Heard]

    /// With their volumes known.
    private var served: [OwnPair] { pairs.filter { !$0.isEmpty } }
    private var stands: [(remote: String, stand: RemoteStand)] {
        heard.sorted { $0.key < $1.key }.flatMap { remote, heard in
            (heard.word?.pairs ?? []).map { (remote, $0) }
        }
    }

    // MARK: Where others are

    /// The point that another remote has failed over to already; nil = none.
    ///
    /// - Throws: when the operator wants another one, or one that is under way somewhere does.
    func agreed() throws(Refusal) -> UInt64? {
        for remote in heard.keys.sorted() {
            // A pair that was left out has gone to an older one.
            let over = (heard[remote]?.word?.pairs ?? []).filter { stand in
                stand.failedOver.map { !isLeftOut(stand.pair, after: $0) } ?? false
            }
            guard let point = over.compactMap(\.failedOver).max() else { continue }
            guard let wanted = order.point, wanted != point else { return point }
            throw Refusal(
                "group '\(order.group)': '\(remote)' has failed over to point \(point); point \(wanted) here would not match it. "
                    + "`farcopy failover \(order.group) --alone \(wanted)` does it all the same")
        }
        for (remote, heard) in heard.sorted(by: { $0.key < $1.key }) {
            guard let other = heard.underWay, other.point != order.point else { continue }
            throw other.refusal(order.group, remote, order.flag, isSilent: heard.word == nil)
        }
        return nil
    }

    private func isLeftOut(_ pair: String, after point: UInt64) -> Bool {
        pairs.flatMap(\.record.points).contains { $0.number > point && $0.without?.contains(pair) == true }
    }

    // MARK: The point

    /// The newest point that all pairs here have, and all others that answer, but those that were left out; or the one that is wanted.
    func target(_ wanted: UInt64?) throws(Refusal) -> FailoverTarget {
        let points =
            served.flatMap { $0.record.points.map { ($0.number, $0.without ?? []) } }
            + stands.map { ($0.stand.committed, $0.stand.without ?? []) }
        let last = points.max { $0.0 < $1.0 } ?? (0, [])
        let without = points.first { $0.0 == wanted }?.1 ?? last.1
        let taking = served.filter { !without.contains($0.name) }
        let newestHere = taking.isEmpty ? last.0 : taking.map(Self.newest).min() ?? 0
        let point = wanted ?? newestEverywhere(newestHere, taking, without)
        if let lack = lack(of: point, without) {
            throw Refusal(
                "group '\(order.group)': \(lack), so that not all remotes can go to point \(point); nothing has changed. "
                    + "`farcopy failover \(order.group) --alone \(point)` goes there all the same")
        }
        guard point > 0 else {
            throw Refusal(
                "group '\(order.group)' at '\(order.site)' has no recovery point yet: its first copy is not complete")
        }
        return FailoverTarget(point: point, without: without)
    }

    private static func newest(_ pair: OwnPair) -> UInt64 {
        pair.record.failedOver?.point ?? pair.record.newestReadable?.number ?? 0
    }

    private func newestEverywhere(_ newest: UInt64, _ taking: [OwnPair], _ without: [String]) -> UInt64 {
        guard let first = taking.first, first.record.failedOver == nil, lack(of: newest, without) != nil else {
            return newest
        }
        let readable = taking.map { Set($0.record.readablePoints.map(\.number)) }
        let common = readable.dropFirst().reduce(readable[0]) { $0.intersection($1) }
        return common.filter { lack(of: $0, without) == nil }.max() ?? newest
    }

    /// A remote that answers, takes part in the point, and does not have it.
    private func lack(of point: UInt64, _ without: [String]) -> String? {
        let lacking = stands.first { !without.contains($0.stand.pair) && !$0.stand.has(point) }
        guard let (remote, stand) = lacking else { return nil }
        let known = stand.points.isEmpty ? "none" : stand.points.map(String.init).joined(separator: ", ")
        return "'\(remote)' has no point \(point) of '\(stand.pair)'; it has \(known)"
    }

    // MARK: What stands in the way

    /// One that the operator names may be older than what a remote that does not answer would go to by itself.
    func checkOlder() throws(Refusal) {
        guard !order.alone, let wanted = order.point else { return }
        guard let (silent, word) = heard.filter({ $0.value.word == nil }).min(by: { $0.key < $1.key }) else { return }
        throw Refusal(
            "group '\(order.group)': '\(silent)' does not say what it has (\(word.problem)), and would go to its newest point by itself, not to point \(wanted); bring it "
                + "back, or `farcopy failover \(order.group) --alone \(wanted)`", .passing)
    }

    /// Before the first of them fails over.
    func checkAll(_ target: FailoverTarget) throws(Refusal) {
        for pair in served where pair.record.failedOver == nil && !target.leaves(pair) {
            do throws(TakeoverRefusal) { _ = try pair.record.failoverPoint(target.point(of: pair)) } catch {
                throw Refusal(
                    "group '\(order.group)' at '\(order.site)', volumes of '\(pair.name)': \(error)")
            }
        }
        guard served.contains(where: { $0.record.failedOver != nil || !target.leaves($0) }) else {
            throw Refusal("group '\(order.group)' has no volumes at '\(order.site)' yet")
        }
    }

    /// Before anything is decided: a slip must not drop a point that is in doubt.
    func checkAlone() throws(Refusal) {
        guard order.alone else { return }
        guard let wanted = order.point else { throw Refusal("say which point: --alone POINT", .misuse) }
        for pair in served where pair.record.failedOver == nil {
            let prepared = pair.record.coordination?.prepared?.number
            guard wanted != prepared else { continue }
            do throws(TakeoverRefusal) { _ = try pair.record.failoverPoint(wanted) } catch {
                let words = prepared.map { "; and point \($0), which is in doubt" } ?? ""
                throw Refusal("group '\(order.group)' at '\(order.site)': \(error)\(words)")
            }
        }
    }
}

extension FailoverTarget {
    /// Left out before its first copy was complete: there is nothing to fail over to.
    func leaves(_ pair: OwnPair) -> Bool { pair.record.newestReadable == nil && without.contains(pair.name) }

    /// One that was left out goes to its newest point.
    func point(of pair: OwnPair) -> UInt64 {
        guard without.contains(pair.name) else { return point }
        if let over = pair.record.failedOver?.point { return over }
        return pair.record.readablePoints.last { $0.number <= point }?.number ?? point
    }

    func takeover(_ place: Int, _ pair: OwnPair, ifNewestIs newest: UInt64? = nil) -> PairTakeover {
        let own = point(of: pair)
        let isBehind = pair.record.failedOver == nil && own < point
        return PairTakeover(pair: place, point: own, ifNewestIs: newest, behind: isBehind ? point : nil)
    }
}
