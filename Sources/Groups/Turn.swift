// Turn.swift: what a machine wants done after an event, and what of it must not begin before its record is on stable storage.
//
// Must be prevented:
//   a message, or an acknowledgement, is let go that relies on a record which a power loss could take back

/// Whoever drives a machine carries out `before`, then saves the record if that is asked for, tells the machine what became of that, and
/// carries out `after` unless the save has failed.
package struct Turn<Action: Equatable & Sendable>: Equatable, Sendable {
    /// Does not rely on the record as it is now.
    package private(set) var before: [Action]
    /// The machine's record must be on stable storage.
    package private(set) var saves = false
    /// Only once it is; dropped when it cannot be saved.
    package private(set) var after: [Action] = []

    package var isEmpty: Bool { before.isEmpty && !saves }

    package init(_ actions: [Action] = []) { before = actions }

    static func saved(then actions: [Action] = []) -> Turn {
        var turn = Turn()
        (turn.saves, turn.after) = (true, actions)
        return turn
    }

    /// Both, one after the other; the record is saved once.
    static func + (first: Turn, second: Turn) -> Turn {
        var turn = first
        if first.saves {
            turn.after += second.before + second.after
        } else {
            turn.before += second.before
            (turn.saves, turn.after) = (second.saves, second.after)
        }
        return turn
    }

    /// What each of its actions comes to, in the same order, with what waits for the save behind the save.
    func flatMap<Other>(_ body: (Action) -> Turn<Other>) -> Turn<Other> {
        var turn = Turn<Other>()
        for action in before { turn = turn + body(action) }
        if saves { turn = turn + .saved() }
        for action in after { turn = turn + body(action) }
        return turn
    }
}
