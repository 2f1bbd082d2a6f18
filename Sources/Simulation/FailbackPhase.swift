// FailbackPhase.swift: the old primary comes back with what it never sent; it becomes the secondary of the new one, which
// takes its changed grains into its own bitmaps; then everything goes on in the other direction, with faults.
//
// What is done is `Join` at the one and `Yield` at the other, tried until it is done, through crashes, power loss, saves that fail and
// answers that are lost. Must hold: in the end the sites are alike, although only grains that one of them has changed were sent.

import Groups
import Volumes

extension World {
    /// Exchanges the sites' roles, goes on for a while, and compares them.
    func failBack(steps count: Int) throws(SimulationFailure) {
        guard primary.record.failedOver != nil else { return }
        endTrouble()
        note("\(secondary.name) comes back and becomes the secondary of \(primary.name)")
        secondary.start()
        try join()
        admitHosts()
        for _ in 0..<(random.chance(50) ? random.below(200) : count) { try step(faults: true) }
        try settle()
    }

    /// The operator tries until it is done.
    private func join() throws(SimulationFailure) {
        var tries = 0
        while !primary.record.isMirroring {
            tries += 1
            guard tries < 500 else { throw SimulationFailure("the old primary never becomes secondary") }
            let process = primary.life
            var outcome: Result<Void, any Error>?
            primary.join { outcome = $0 }
            let deadline = steps + 100_000
            while outcome == nil, process == primary.life {
                try step(faults: tries < 20)
                guard steps < deadline else { throw SimulationFailure("a change of roles waits for ever") }
            }
        }
    }
}
