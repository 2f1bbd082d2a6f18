// Turnstile.swift: lets one operation through at a time, in order, inside an actor that suspends in mid-operation.

final class Turnstile {
    private var taken = false
    private var waiting: [CheckedContinuation<Void, Never>] = []

    func enter(isolation: isolated (any Actor)? = #isolation) async {
        if !taken {
            taken = true
            return
        }
        await withCheckedContinuation { waiting.append($0) }
    }

    func leave() {
        if waiting.isEmpty { taken = false } else { waiting.removeFirst().resume() }
    }
}
