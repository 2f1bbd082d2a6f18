// Contents.swift: what a volume or a FlashCopy must hold, sector by sector, whatever happens.
//
// A sector has a history: the values written since the last that is surely on stable storage. Without a crash it holds the
// last one. After a process crash, or where a copy was taken of it, a write in flight is done or not. After power loss it
// may be any of the history. A read settles what was open.

struct Contents {
    struct Entry {
        var value: UInt32
        /// What it may have been instead: nobody has found out.
        var others: Set<UInt32> = []
        var all: Set<UInt32> { others.union([value]) }
        /// Step at which the write was acknowledged; nil = in flight.
        var doneAt: Int?
    }

    private(set) var history: [[Entry]]
    /// Sectors that may hold one of several values.
    private(set) var open: [Int: Set<UInt32>] = [:]
    /// Sectors with a write in flight when the volume was restored: its end does not tell which came last.
    private var restoredMeanwhile: Set<Int> = []
    /// Step at which a write to the sector was issued or acknowledged last.
    private(set) var touchedAt: [Int]

    init(sectors: Int, value: UInt32 = 0) {
        history = Array(repeating: [Entry(value: value, doneAt: 0)], count: sectors)
        touchedAt = Array(repeating: 0, count: sectors)
    }

    func isBusy(_ sectors: Range<Int>) -> Bool { sectors.contains { history[$0].contains { $0.doneAt == nil } } }

    // MARK: Writing

    /// Writes to one sector are issued one after the other.
    mutating func issue(_ sectors: Range<Int>, _ value: UInt32, at step: Int) {
        for sector in sectors {
            history[sector].append(Entry(value: value, doneAt: nil))
            touchedAt[sector] = step
        }
    }

    mutating func acknowledge(_ sectors: Range<Int>, durable: Bool, at step: Int) {
        for sector in sectors {
            history[sector][history[sector].count - 1].doneAt = step
            if durable { history[sector].removeFirst(history[sector].count - 1) }
            if restoredMeanwhile.remove(sector) == nil, let values = open.removeValue(forKey: sector), !durable {
                // What was there before the write may still be what is on stable storage.
                history[sector][history[sector].count - 2].others.formUnion(values)
            }
            touchedAt[sector] = step
        }
    }

    /// A write that failed leaves either value.
    mutating func fail(_ sectors: Range<Int>, at step: Int) {
        for sector in sectors {
            history[sector][history[sector].count - 1].doneAt = step
            open[sector, default: []].formUnion(history[sector].suffix(2).map(\.value))
            restoredMeanwhile.remove(sector)
            touchedAt[sector] = step
        }
    }

    /// A flush that was issued at `step` has ended.
    mutating func flushed(issuedAt step: Int) {
        for sector in history.indices where open[sector] == nil {
            guard let last = history[sector].lastIndex(where: { $0.doneAt ?? Int.max <= step }), last > 0 else {
                continue
            }
            history[sector].removeFirst(last)
        }
    }

    // MARK: Crashes and copies

    /// What may be there without power loss.
    private func possible(_ sector: Int) -> Set<UInt32> {
        var values = open[sector] ?? []
        if let done = history[sector].last(where: { $0.doneAt != nil }), open[sector] == nil {
            values.insert(done.value)
        }
        for entry in history[sector] where entry.doneAt == nil { values.insert(entry.value) }
        return values
    }

    mutating func processDied(at step: Int) {
        restoredMeanwhile = []
        for sector in history.indices {
            let values = possible(sector)
            for index in history[sector].indices where history[sector][index].doneAt == nil {
                history[sector][index].doneAt = step
            }
            if values.count > 1 { open[sector] = values }
        }
    }

    mutating func powerLost(at step: Int) {
        processDied(at: step)
        for sector in history.indices where history[sector].count > 1 || !history[sector][0].others.isEmpty {
            open[sector] = history[sector].reduce(into: open[sector] ?? []) { $0.formUnion($1.all) }
        }
    }

    /// What a FlashCopy of this instant holds; all of it as safe as the copy itself.
    func copied(at step: Int) -> Contents {
        var copy = self
        for sector in history.indices {
            let values = possible(sector)
            copy.history[sector] = [Entry(value: history[sector].last { $0.doneAt != nil }?.value ?? 0, doneAt: step)]
            copy.open[sector] = values.count > 1 ? values : nil
            copy.restoredMeanwhile = []
            if values.count == 1 { copy.history[sector] = [Entry(value: values.first!, doneAt: step)] }
            copy.touchedAt[sector] = step
        }
        return copy
    }

    /// The volume becomes what `origin` holds; a write in flight comes before or after.
    mutating func restored(from origin: Contents, at step: Int) {
        for sector in history.indices {
            let inFlight = history[sector].filter { $0.doneAt == nil }
            history[sector] = [Entry(value: origin.history[sector].last!.value, doneAt: step)] + inFlight
            var values = origin.possible(sector)
            for entry in inFlight { values.insert(entry.value) }
            if !inFlight.isEmpty { restoredMeanwhile.insert(sector) }
            open[sector] = values.count > 1 ? values : nil
            touchedAt[sector] = step
        }
    }

    /// Any mixture of both may be there.
    mutating func mixed(with other: Contents) {
        for sector in history.indices {
            let both = history[sector] + other.history[sector]
            let values = both.reduce(into: possible(sector).union(other.possible(sector))) { $0.formUnion($1.all) }
            if values.count > 1 { open[sector] = values }
            history[sector].insert(contentsOf: other.history[sector], at: 0)
        }
    }

    // MARK: Reading

    /// Compares what a read issued at `step` found; the first wrong sector, or nil. Sectors that were written to meanwhile
    /// are passed over; what was open is settled.
    mutating func check(_ sectors: Range<Int>, _ found: [UInt32], issuedAt step: Int) -> Int? {
        for (index, sector) in sectors.enumerated() {
            let busy = history[sector].contains { $0.doneAt == nil }
            if busy || touchedAt[sector] >= step { continue }
            guard possible(sector).contains(found[index]) else { return sector }
            guard let values = open.removeValue(forKey: sector) else { continue }
            let step = history[sector].last!.doneAt
            // What an older entry of this value may have been instead may still be what is on stable storage.
            let same = history[sector].filter { $0.value == found[index] }
            let others = same.reduce(history[sector].last!.all.union(values)) { $0.union($1.others) }
            history[sector].removeAll { $0.value == found[index] }
            history[sector].append(Entry(value: found[index], others: others.subtracting([found[index]]), doneAt: step))
        }
        return nil
    }

    /// After power loss what was found is on stable storage.
    mutating func settleDurable() {
        for sector in history.indices where open[sector] == nil {
            history[sector].removeFirst(history[sector].count - 1)
            history[sector][0].others = []
        }
    }

    func expected(_ sector: Int) -> String { possible(sector).sorted().map(String.init).joined(separator: " or ") }
}
