// SwitchoverPhase.swift: the roles are exchanged while both sites are there, and hosts go on at the other: nothing that was acknowledged is
// lost.
//
// What is done is `HandOver` at the primary, `Failover` at its peer, which then joins; each tried until it is done, through crashes, power
// loss, saves that fail and answers that are lost. Must hold: hosts never write at both sites; what they find after the exchange is what was
// acknowledged to them.

import Groups
import Volumes

extension World {
    /// Exchanges the roles under hosts, goes on for a while, and compares the sites.
    func switchOver(steps count: Int) throws(SimulationFailure) {
        endTrouble()
        note("\(primary.name) hands over to \(secondary.name)")
        let (old, new) = (primary!, secondary!)
        var asked = false
        let (calm, deadline) = (steps + random.below(12_000), steps + 400_000)
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
            if old.isUp, !old.isBusy, old.record.role == .primary {
                if old.record.handingOver != nil {
                    if random.chance(1) { finishHandover(old) }
                } else if new.record.role == .secondary, old.group.cycle?.suspension == nil, !asked || random.chance(2)
                {
                    asked = true
                    old.run(HandOver(seconds: 1)) { _ in }
                }
            }
            if new.isUp, !new.isBusy, new.record.failedOver?.joins == true {
                join(new, old)
            }
        }
        if primary === old { try moveHosts() }
        for _ in 0..<(random.chance(50) ? random.below(200) : count) { try step(faults: true) }
        try settle()
    }

    private func join(_ site: SimulatedSite, _ other: SimulatedSite) {
        guard site.record.failedOver?.restoring.isEmpty == true else { return }
        let theirs = Standing(
            site: other.name, siteID: other.name, record: other.record, wrote: true, changedBytes: 0)
        site.run(Join(site.record, theirs, identity: "\(random.next())")) { _ in }
    }

    /// As `Site.finishHandover`: asks again, and takes it back when the peer surely does not take over.
    private func finishHandover(_ site: SimulatedSite) {
        guard let point = site.record.handingOver else { return }
        site.run(Promotion(point: point)) { [unowned self] outcome in
            if case .failure(let error) = outcome, error is PeerRefusal || self.fault == .takeBackUnheard {
                site.run(TakeBack()) { _ in }
            }
        }
    }

    /// Hosts find at the other site what was acknowledged to them.
    private func moveHosts() throws(SimulationFailure) {
        exchangeSites()
        remembered = [:]
        hosts.lostServer(primary.files.map(\.cached), powerLoss: false)
    }
}

/// The peer is asked once more.
private struct Promotion: Steps {
    var point: UInt64
    mutating func next(after answer: Answer, _ record: GroupRecord) -> Next<Void> {
        switch answer {
        case .begin: .perform(.askToPromote(point))
        case .failed(let error): .failed(error)
        default: .done(())
        }
    }
}
