// Turn.swift: what a machine of several sites wants done after an event, and what of it must not begin before its record is saved.
//
// Must be prevented:
//   a message is let go that relies on a record which a crash could take back
//   an event is swallowed because nobody has thought of it: each has its place in a table, and what is impossible is reported

import Base

/// Whoever drives a machine carries out `before`, then saves the record if that is asked for, and then tells the machine: `wasSaved` and
/// `after`, or `saveFailed`.
package struct Turn<Action: Equatable & Sendable>: Equatable, Sendable {
    /// Does not rely on the record as it is now.
    package private(set) var before: [Action]
    /// The machine's record must be on stable storage.
    package private(set) var saves = false
    /// Only once it is; dropped when it cannot be saved.
    package private(set) var after: [Action] = []

    package var isEmpty: Bool { before.isEmpty && !saves }

    init(_ actions: [Action] = []) { before = actions }

    static func saved(then actions: [Action]) -> Turn {
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
}

/// A message of a coordinator's process, or the answer to one.
package struct Stamped<Body: Equatable & Sendable>: Equatable, Sendable {
    package var epoch: UInt64
    package var body: Body
    package init(epoch: UInt64, _ body: Body) { (self.epoch, self.body) = (epoch, body) }
}

/// A table of places: a row for each event, in it a letter for each state.
enum Places {
    /// H = handled, l = late, x = impossible; spaces are for the eye.
    static func place(_ row: StaticString, _ column: Int) -> Place {
        let letters = row.withUTF8Buffer { bytes in bytes.filter { $0 != UInt8(ascii: " ") } }
        invariant(column < letters.count, "a table of places has a letter for each state")
        return switch letters[column] {
        case UInt8(ascii: "H"): .handled
        case UInt8(ascii: "l"): .late
        default: .impossible
        }
    }
}

/// Whose answer is waited for, and when they are asked again: after 10 ms, then after twice as long each time, at most 8 s.
package struct Round: Equatable, Sendable {
    package private(set) var waiting: [Int]
    /// Asked again, they answered that they are still at it.
    private var heard: [Int] = []
    private var repeatAt: UInt64
    private var attempts = 0
    private static let shortest: UInt64 = 10_000_000
    private static let longest: UInt64 = 8_000_000_000
    /// About half a minute of silence.
    private static let patience = 12

    init(_ waiting: [Int], now: UInt64) {
        self.waiting = waiting
        repeatAt = now + Self.shortest
    }

    var isComplete: Bool { waiting.isEmpty }
    var wakeAt: UInt64? { isComplete ? nil : repeatAt }
    /// Somebody has not answered although asked again and again.
    var isHopeless: Bool { attempts >= Self.patience }

    mutating func answered(_ who: Int) { waiting.removeAll { $0 == who } }
    mutating func isAtIt(_ who: Int) { if !heard.contains(who) { heard.append(who) } }

    /// - Returns: whether those who are waited for are to be asked again.
    mutating func isDue(_ now: UInt64) -> Bool {
        guard !isComplete, now >= repeatAt else { return false }
        // Who is at it is asked more seldom, and never given up.
        attempts = waiting.allSatisfy(heard.contains) ? min(attempts + 1, Self.patience - 4) : attempts + 1
        heard = []
        repeatAt = now + min(Self.shortest << UInt64(min(attempts, 10)), Self.longest)
        return true
    }
}
