// Turnstile.swift: lets one operation, or a few, through at a time, in order, inside an actor that suspends in mid-operation.

package final class Turnstile {
    private var free: Int
    private var waiting: [CheckedContinuation<Void, Never>] = []
    /// Where those wait for one another who enter this one together with another.
    fileprivate private(set) lazy var together = Turnstile()

    package init(places: Int = 1) { free = places }

    /// Who enters now does not wait.
    package var isFree: Bool { free > 0 }
    package var waitingCount: Int { waiting.count }

    package func enter(isolation: isolated (any Actor)? = #isolation) async {
        if free > 0 {
            free -= 1
            return
        }
        await withCheckedContinuation { waiting.append($0) }
    }

    package func leave() {
        if waiting.isEmpty { free += 1 } else { waiting.removeFirst().resume() }
    }
}

/// Enters all of them, but waits for none while it is in another.
///
/// A turnstile is handed to who waits for it. Two who enter the same `others` together would hand them to each other for ever, each finding
/// them taken when it asks again; so they come one after the other.
package func enterTogether(
    isolation: isolated (any Actor)? = #isolation, _ first: Turnstile, _ others: [Turnstile]
) async {
    for other in others { await other.together.enter() }
    while true {
        await first.enter()
        if others.allSatisfy(\.isFree) { break }
        first.leave()
        for other in others {
            await other.enter()
            other.leave()
        }
    }
    for other in others {
        await other.enter()
        other.together.leave()
    }
}
