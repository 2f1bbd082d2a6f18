// Round.swift: who is waited for, and how often they are asked.
//
// Must be prevented:
//   somebody is asked for ever at full speed

/// Whose answer is waited for, and when they are asked again: after 10 ms, then after twice as long each time, at most 1 s, so that
/// who comes back is not waited for much longer.
package struct Round: Equatable, Sendable {
    package private(set) var waiting: [Int]
    /// Asked again, they answered that they are still at it.
    private var heard: [Int] = []
    private var repeatAt: UInt64
    private var attempts = 0
    private static let shortest: UInt64 = 10_000_000
    private static let longest: UInt64 = 1_000_000_000
    /// About half a minute of silence.
    private static let patience = 36

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
