// Turnstile.swift: lets one operation, or a few, through at a time, in order, inside an actor that suspends in mid-operation.

package final class Turnstile {
    private var free: Int
    private var waiting: [CheckedContinuation<Void, Never>] = []

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
