// Group.swift: a group at one site, and the only owner of its record. What happens goes in, what is to be done comes out.
//
// Must be prevented:
//   the record is changed, or saved, by anybody else
//   a change counts that could not be saved, unless it has happened already
//   what a failed save has perhaps left in the file is taken for what the group is: the record is saved again until it is there, and
//     nothing that this would spoil begins before (`settle`)

package struct Group {
    package private(set) var record: GroupRecord
    /// While this site sends to its peer.
    package private(set) var cycle: Cycle?
    /// The file may hold another record than this.
    package private(set) var isUnsaved = false
    private var saveAt: UInt64 = 0
    private static let saveRetry: UInt64 = 1_000_000_000
    /// What counts if the save that was asked for fails; nil = what is there counts all the same.
    private var fallback: GroupRecord?

    package init(record: GroupRecord) { self.record = record }

    // MARK: Changes

    /// What the site, its peer or an operator has decided. It counts durably or, if it has not happened already, not at all.
    package mutating func change(_ change: GroupChange) throws(IllegalPhase) -> Turn<Cycle.Action> {
        var next = record
        try next.apply(change)
        guard next != record || isUnsaved else { return Turn() }
        fallback = change.hasHappened ? nil : record
        record = next
        return .saved()
    }

    /// Makes sure that no change that was taken back stands in the file.
    package func settle() -> Turn<Cycle.Action> { isUnsaved ? .saved() : Turn() }

    /// What `Turn` asked to be saved is on stable storage.
    package mutating func wasSaved() {
        isUnsaved = false
        fallback = nil
        cycle?.wasSaved()
    }

    /// It is not: the file holds the record of before, or the new one.
    ///
    /// - Returns: what the cycle does about it, if the save was of its asking.
    package mutating func saveFailed(_ reason: String, ofCycle: Bool, now: UInt64) -> Turn<Cycle.Action> {
        isUnsaved = true
        saveAt = now + Self.saveRetry
        if let fallback { record = fallback }
        fallback = nil
        return ofCycle ? cycle?.couldNotSave(reason, &record, now) ?? Turn() : Turn()
    }

    // MARK: The cycle

    /// Begins to send to the peer.
    package mutating func begin(_ settings: Cycle.Settings, now: UInt64) -> Turn<Cycle.Action> {
        cycle = Cycle(settings: settings, record)
        return cycle!.start(&record, now: now)
    }

    /// Ends it. A point that is held stays held.
    package mutating func end() { cycle = nil }

    package mutating func handle(_ event: Cycle.Event, now: UInt64) -> Turn<Cycle.Action> {
        let turn = cycle?.handle(event, &record, now: now) ?? Turn()
        guard case .tick = event, isUnsaved, now >= saveAt else { return turn }
        saveAt = now + Self.saveRetry
        return .saved() + turn
    }

    /// This site is elected to form points, or is not any more.
    package mutating func coordinate(epoch: UInt64, _ found: CoordinatorRecord?, now: UInt64) -> Turn<Cycle.Action> {
        cycle?.coordinate(epoch: epoch, found, &record, now) ?? Turn()
    }
    package mutating func stopCoordinating(_ reason: String, now: UInt64) -> Turn<Cycle.Action> {
        cycle?.stopCoordinating(reason, &record, now) ?? Turn()
    }

    /// No point of several hosts begins from here; or they do again.
    package mutating func setQuiet(_ isQuiet: Bool) { cycle?.isQuiet = isQuiet }

    package mutating func adapt(_ pace: MovePace) { cycle?.pace = pace }

    /// The number that a point formed for a request made now will have at least.
    package var nextNumber: UInt64 { cycle?.nextNumber(record) ?? record.lastNumber + 1 }

    /// When `tick` must come at the latest; nil = no need.
    package var wakeAt: UInt64? {
        let next = cycle?.wakeAt(record)
        return isUnsaved ? min(saveAt, next ?? saveAt) : next
    }
}
