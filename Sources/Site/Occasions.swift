// Occasions.swift: who waits for what comes about at this site looks when something has happened, not again and again.
//
// Must be prevented:
//   somebody waits for ever: every wait has an end, if only that of the site
//   something happens that somebody waits for, and nobody is told: whatever a condition looks at says `happened` when it changes

extension Holdings {
    /// Copies have left, records are saved, a role, a phase or how mirroring stands has changed, an operation is aborted, the site stops.
    func happened() {
        for (number, one) in waiting where one.condition() { endWait(number) }
    }

    /// Until it has come about, or the site stops.
    ///
    /// - Parameter seconds: at most; nil = as long as the site goes on.
    func wait(seconds: Double?, until condition: @escaping () -> Bool) async {
        guard !condition(), !isStopping else { return }
        lastWait += 1
        let number = lastWait
        let end = seconds.map { seconds in
            Task {
                try await Task.sleep(for: .seconds(seconds))
                endWait(number)
            }
        }
        await withCheckedContinuation { continuation in
            waiting[number] = Waiting(condition: { condition() || self.isStopping }, goesOn: continuation)
        }
        end?.cancel()
    }

    private func endWait(_ number: UInt64) { waiting.removeValue(forKey: number)?.goesOn.resume() }
}
