// SeveralSite.swift: a site of the scenario `SeveralHosts`, host or remote: its group, the group's record on a disk, and a process that may end
// between any two actions. What a turn of the group's wants is done as `GroupThread` does it.
//
// Must be prevented:
//   something begins that relies on a record which is not in the file; a save that fails has perhaps reached the file all the same

import Groups

class SeveralSite {
    unowned let world: SeveralHosts
    let name: String
    /// On disk.
    private(set) var saved: GroupRecord
    /// What the process knows to be there.
    private var known: GroupRecord

    // The process.
    var group: Group
    private(set) var life = 0
    private(set) var isUp = false
    /// The group's thread.
    var inbox: [() -> Void] = []
    private var events: [Cycle.Event] = []
    private(set) var performing = false
    /// Who waits for an answer of this process.
    private var callers: [Int: () -> Void] = [:]
    private var nextCaller = 0

    var record: GroupRecord { group.record }
    var fault: DeliberateFault? { world.fault }

    init(_ world: SeveralHosts, _ name: String, _ role: Role) {
        (self.world, self.name) = (world, name)
        saved = .first(role, identity: name)
        known = saved
        group = Group(record: saved)
    }

    // MARK: Processes

    /// - Returns: false when the process is one of a site that is up.
    func begin() -> Bool {
        guard !isUp else { return false }
        known = saved
        group = Group(record: saved)
        isUp = true
        return true
    }

    func end() {
        life += 1
        isUp = false
        (inbox, events, performing) = ([], [], false)
        let waiting = callers.sorted { $0.key < $1.key }
        callers = [:]
        for (_, tell) in waiting { tell() }
    }

    /// - Returns: what ends the wait.
    func isAsked(_ lost: @escaping () -> Void) -> Int {
        nextCaller += 1
        callers[nextCaller] = lost
        return nextCaller
    }

    /// - Returns: false when somebody else has.
    func answers(_ caller: Int) -> Bool { callers.removeValue(forKey: caller) != nil }

    /// A copy of other volumes, of which nothing is known.
    func exchange(_ identity: String) { saved = .first(.secondary, identity: identity) }

    // MARK: The group

    /// Carries out what the cycle wants.
    func perform(_ action: Cycle.Action) { world.fail("\(name) is a secondary, and is to do \(action)") }

    /// What the group takes for the time.
    private var clock: UInt64 { fault == .countExpiredHold ? world.now - world.settings.maxCoordination : world.now }

    func handle(_ event: Cycle.Event) {
        events.append(event)
        guard !performing else { return }
        performing = true
        let process = life
        while process == life, !events.isEmpty { carryOut(group.handle(events.removeFirst(), now: clock)) }
        if process == life { performing = false }
    }

    /// - Returns: whether the record is saved, if that was wanted.
    @discardableResult
    func carryOut(_ turn: Turn<Cycle.Action>, ofCycle: Bool = true) -> Bool {
        let process = life
        for action in turn.before {
            if world.dies(self) { return false }
            perform(action)
            if process != life { return false }
        }
        guard turn.saves else { return true }
        if world.dies(self) { return false }
        guard save() else {
            carryOut(group.saveFailed("no space", ofCycle: ofCycle, now: clock), ofCycle: ofCycle)
            return false
        }
        group.wasSaved()
        for action in turn.after {
            if world.dies(self) { return false }
            perform(action)
            if process != life { return false }
        }
        return true
    }

    /// Begins the cycle; what comes up meanwhile waits.
    func begin(_ settings: Cycle.Settings) {
        let process = life
        performing = true
        carryOut(group.begin(settings, now: clock))
        guard process == life else { return }
        performing = false
        handle(.tick)
    }

    private func save() -> Bool {
        do { try record.check(after: known) } catch { world.fail("\(name)'s record: \(error)") }
        let fails = world.saveFails()
        if !fails || world.random.chance(50) { saved = record }
        if fails { world.note("\(name) cannot save its record") } else { known = record }
        return !fails
    }

    func take(_ change: GroupChange) -> Bool {
        guard let turn = try? group.change(change) else { return false }
        return carryOut(turn, ofCycle: false)
    }

    /// It counts, and no file says so.
    func takeUnsaved(_ change: GroupChange) {
        _ = try? group.change(change)
        group.wasSaved()
    }

    func settle() -> Bool { carryOut(group.settle(), ofCycle: false) }

    func tick() {
        guard isUp, let wake = group.wakeAt, wake <= clock else { return }
        let process = life
        handle(.tick)
        if process == life, let next = group.wakeAt, next <= clock, !performing {
            world.fail("\(name) is woken at full speed: \(group.cycle.map { "\($0.state)" } ?? "")")
        }
    }
}
