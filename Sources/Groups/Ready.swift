// Ready.swift: what is to be done, and what of it must not begin before the record is on stable storage.
//
// Must be prevented:
//   a message, or an acknowledgement, is let go that relies on a record which a power loss could take back

/// Whoever drives a group carries out `before`, then saves the record if that is asked for, and then, unless the save has failed, `after`.
package struct Ready: Equatable {
    /// Does not rely on the record as it is now.
    package private(set) var before: [Cycle.Action]
    /// The group's record must be on stable storage.
    package private(set) var saves = false
    /// Only once it is; dropped when it cannot be saved.
    package private(set) var after: [Cycle.Action] = []

    package init(_ actions: [Cycle.Action] = []) { before = actions }

    static func saved(then actions: [Cycle.Action] = []) -> Ready {
        var ready = Ready()
        (ready.saves, ready.after) = (true, actions)
        return ready
    }

    /// Both, one after the other; the record is saved once.
    static func + (first: Ready, second: Ready) -> Ready {
        var ready = first
        if first.saves {
            ready.after += second.before + second.after
        } else {
            ready.before += second.before
            (ready.saves, ready.after) = (second.saves, second.after)
        }
        return ready
    }
}
