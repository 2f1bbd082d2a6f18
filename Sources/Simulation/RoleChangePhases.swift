// RoleChangePhases.swift: a run, and what comes after its first direction: the sites exchange their roles, under hosts or after a failover.
//
// Switchover: `HandOver` at the primary, `Failover` at its peer, which then joins. Must hold: hosts never write at both sites; what they find
// after the exchange is what was acknowledged to them.
//
// Failback: the old primary comes back with what it never sent; `Join` at the one and `Yield` at the other. Must hold: in the end the sites
// are alike, although only grains that one of them has changed were sent.
//
// Each is tried until it is done, through crashes, power loss, saves that fail and answers that are lost.

import Groups
import Volumes

extension World {
    /// Runs `count` steps with faults. Then either everything settles and the sites are compared, or the secondary
    /// takes over from wherever it is; the seed decides.
    package func run(steps count: Int, skipping skipped: Set<Int>) throws(SimulationFailure) {
        let seed = random.next()
        for index in 0..<count where !skipped.contains(index) {
            try step(index, of: seed)
        }
        random = SeededGenerator(seed: ~seed)
        if random.chance(33) || mustChangeRoles { return try switchOver(steps: count / 4) }
        let settles = random.chance(50)
        if settles { try settle() }
        if fault == nil || !settles {
            try failOver()
            try failBack(steps: count / 4)
        }
    }

    var mustChangeRoles: Bool { fault?.showsWhere.contains(.rolesChange) == true }

    // MARK: Switchover

    /// Exchanges the roles under hosts, goes on for a while, and compares the sites.
    func switchOver(steps count: Int) throws(SimulationFailure) {
        endTrouble()
        note("\(primary.name) hands over to \(secondary.name)")
        let (old, new) = (primary!, secondary!)
        var asked = false
        let calm = steps + (mustChangeRoles ? 40_000 : random.below(12_000))
        let deadline = steps + 400_000
        while !new.record.isMirroring {
            if steps == calm { endTrouble() }
            try step(faults: steps < calm)
            if new.servesHosts, primary === old { try moveHosts() }
            guard !(old.servesHosts && new.servesHosts) else { throw SimulationFailure("hosts write at both sites") }
            guard steps < deadline else {
                throw SimulationFailure(
                    "a switchover waits for ever: \(old.record.phase.kind), \(new.record.phase.kind)")
            }
            // As `switchover`, `finishHandover` and `joinAfterPromotion`: whoever has something left to do does it.
            if old.isUp, !old.executor.isBusy, old.record.role == .primary {
                if let point = old.record.handingOver {
                    if random.chance(1) { old.executor.run(Promotion(at: point)) { _ in } }
                } else if new.record.role == .secondary, old.group.cycle?.suspension == nil, !asked || random.chance(2)
                {
                    asked = true
                    old.executor.run(HandOver(seconds: 1)) { _ in }
                }
            }
            if new.isUp, !new.executor.isBusy, new.record.failedOver?.joins == true,
                new.record.failedOver?.restoring.isEmpty == true
            {
                new.executor.join { _ in }
            }
        }
        if primary === old { try moveHosts() }
        for _ in 0..<(random.chance(50) ? random.below(200) : count) { try step(faults: true) }
        try settle()
    }

    /// Hosts find at the other site what was acknowledged to them.
    private func moveHosts() throws(SimulationFailure) {
        exchangeSites()
        remembered = [:]
        hosts.lostServer(primary.files.map(\.cached), powerLoss: false)
    }

    // MARK: Failback

    /// Exchanges the sites' roles, goes on for a while, and compares them.
    func failBack(steps count: Int) throws(SimulationFailure) {
        guard primary.record.failedOver != nil else { return }
        endTrouble()
        secondary.start()
        let verdict = try judgeSites()
        // The operator says whose data stays, perhaps before the one that comes back has asked.
        if random.chance(70) { secondary.learnStanding(verdict) }
        try leaveAlone(primary)
        if random.chance(30) { exchangeSites() }
        note("\(secondary.name) becomes the secondary of \(primary.name)")
        try join()
        admitHosts()
        for _ in 0..<(random.chance(50) ? random.below(200) : count) { try step(faults: true) }
        try settle()
    }

    /// An old primary comes back and asks. Whoever the operator keeps, both know that there are two, and which of them is behind; and if
    /// hosts wrote at both while these could not hear each other, nothing is overwritten unless a command says so.
    private func judgeSites() throws(SimulationFailure) -> Verdict {
        let (new, old) = (primary!.standing, secondary!.standing)
        let (behind, ahead) = (judge(old, new), judge(new, old))
        note("\(secondary.name) is \(behind), \(primary.name) is \(ahead)")
        guard behind == .stale || behind == .splitBrain, ahead == .inOrder || ahead == .splitBrain else {
            throw SimulationFailure("a primary whose peer has taken over is \(behind), and that is \(ahead)")
        }
        guard behind == .splitBrain || !wroteAlone || !new.wrote else {
            throw SimulationFailure("hosts wrote at both sites, and that is no split-brain")
        }
        guard behind == .stale || new.wrote else {
            throw SimulationFailure("a split-brain although hosts wrote at one site")
        }
        return behind
    }

    /// Nobody writes to the new primary, least of all the old one.
    private func leaveAlone(_ site: SimulatedSite) throws(SimulationFailure) {
        let before = site.files.map(\.cached)
        for _ in 0..<random.below(1000) { try step(faults: false) }
        guard zip(before, site.files).allSatisfy({ isSame($0, $1.cached) }) else {
            throw SimulationFailure(
                "something was written to \(site.name) although it has failed over, and nobody wrote")
        }
    }

    /// The operator tries until it is done.
    private func join() throws(SimulationFailure) {
        var tries = 0
        while !primary.record.isMirroring || secondary.record.role == .primary {
            tries += 1
            guard tries < 500 else { throw SimulationFailure("the old primary never becomes secondary") }
            // One operation after the other.
            while primary.executor.isBusy { try step(faults: tries < 20) }
            let process = primary.life
            var outcome: Result<Void, any Error>?
            primary.executor.join { outcome = $0 }
            let deadline = steps + 100_000
            while outcome == nil, process == primary.life {
                try step(faults: tries < 20)
                guard steps < deadline else { throw SimulationFailure("a change of roles waits for ever") }
            }
        }
    }
}
