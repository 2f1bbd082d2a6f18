// Scenario.swift: what can be run from a seed, replayed, and made shorter.

package struct SimulationFailure: Error, CustomStringConvertible {
    package var description: String
    init(_ description: String) { self.description = description }
}

/// What a run has done.
package struct SimulationFigures: Sendable {
    package var steps = 0
    /// Requests of hosts and operators.
    package var operations = 0
    /// Reads that were compared.
    package var checks = 0
    package var crashes = 0
    /// Points committed.
    package var commits = 0
    /// Volumes that had no files of a point at its commit, since they had not changed.
    package var unchanged = 0
    /// Points that a comparison found alike at both sites.
    package var comparisons = 0
    package init() {}

    package static func += (sum: inout SimulationFigures, more: SimulationFigures) {
        sum.steps += more.steps
        sum.operations += more.operations
        sum.checks += more.checks
        sum.crashes += more.crashes
        sum.commits += more.commits
        sum.unchanged += more.unchanged
        sum.comparisons += more.comparisons
    }
}

package protocol Scenario: AnyObject {
    init(seed: UInt64, fault: DeliberateFault?)
    var trace: [String] { get }
    var steps: Int { get }
    var figures: SimulationFigures { get }
    /// Runs `count` steps, leaving out those of `skipped`, and then lets everything come to its end. What a step does follows
    /// from the seed, its number and what is there, so that the others stay what they are when one is left out.
    func run(steps count: Int, skipping skipped: Set<Int>) throws(SimulationFailure)
}

extension Scenario {
    /// What goes wrong, without the numbers; nil when nothing does.
    private static func failure(
        _ seed: UInt64, _ fault: DeliberateFault?, _ steps: Int, _ skipped: Set<Int>
    ) -> (kind: String, step: Int)? {
        let world = Self(seed: seed, fault: fault)
        do {
            try world.run(steps: steps, skipping: skipped)
            return nil
        } catch {
            return (error.description.filter { !$0.isNumber }, world.steps)
        }
    }

    /// Leaves out steps, in ever smaller pieces, as long as the same rule breaks.
    ///
    /// - Returns: how many steps there are to the end, and which of them can be left out.
    package static func shortest(
        seed: UInt64, fault: DeliberateFault?, steps: Int, tries: Int = 600
    ) -> (steps: Int, skipped: Set<Int>) {
        guard let first = failure(seed, fault, steps, []) else { return (steps, []) }
        // The end is part of a run: a failure in the middle of the steps must come from a run that stops there.
        let end = first.step < steps && failure(seed, fault, first.step, [])?.kind == first.kind ? first.step : steps
        var kept = Array(0..<end)
        var left = tries
        var piece = max(1, kept.count / 2)
        while left > 0 {
            var start = 0
            while start < kept.count, left > 0 {
                let shorter = kept[..<start] + kept[min(kept.count, start + piece)...]
                left -= 1
                if failure(seed, fault, end, Set(0..<end).subtracting(shorter))?.kind == first.kind {
                    kept = Array(shorter)
                } else {
                    start += piece
                }
            }
            if piece == 1 { break }
            piece /= 2
        }
        return (end, Set(0..<end).subtracting(kept))
    }
}
