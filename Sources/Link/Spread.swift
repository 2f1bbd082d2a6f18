// Spread.swift: a point is sent evenly over some milliseconds rather than in one burst.
//
// A burst keeps the threads that send, and those that receive where the remote is on the same machine, on their processors for as long as it
// takes, and hosts' requests wait behind them; at continuous cycles that happens twenty times a second, so that their tail is the burst.
// Sent little by little each thread runs for a moment at a time. What is expected is what the point before had; what goes beyond is let go ever
// faster, and after twice that time all of it, so that a large point, or a first copy, begins at full speed after an instant.

import Glibc

package struct Spread {
    /// Over which a point is sent that has as much as the one before.
    package static let nanoseconds = 25e6
    /// Bytes that need no spreading, and what a point is expected to have at least.
    private static let atOnce = Double(64 << 10)
    private static let least = Double(256 << 10)

    /// What is sent.
    package private(set) var point: UInt64 = 0
    private var begin: UInt64 = 0
    private var passed = 0.0
    private var expected = Spread.least

    package init() {}

    /// A point of this number is sent, from now on unless that has begun already.
    package mutating func sends(point number: UInt64, now: @autoclosure () -> UInt64) {
        guard number != point else { return }
        (point, begin, expected, passed) = (number, now(), max(Self.least, passed), 0)
    }

    /// Whether something may pass now. It may be more than there is room for: the next one waits for that.
    package func mayPass(now: UInt64) -> Bool { wait(now: now) == 0 }

    package mutating func pass(_ bytes: Int) { passed += Double(bytes) }

    /// Nanoseconds until something may pass.
    package func wait(now: UInt64) -> UInt64 {
        let share = (passed - Self.atOnce) / expected
        guard share > 0 else { return 0 }
        let due = min(share < 1 ? share : cbrt(share), 2) * Self.nanoseconds
        let age = Double(now &- begin)
        return due > age ? UInt64(due - age) + 1 : 0
    }
}
