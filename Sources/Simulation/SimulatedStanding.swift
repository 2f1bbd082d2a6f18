// SimulatedStanding.swift: how a group stands at a simulated site, and what that learns from how it stands at the other.

import Groups
import Volumes

extension SimulatedSite {
    /// In how much the peer may differ.
    var changedBytes: UInt64 {
        UInt64(volumes.reduce(0) { $0 + $1.volume.changedGrains + $1.volume.outOfSyncGrains } * World.grain)
    }

    var standing: Standing {
        let wrote = record.failedOver == nil || hostsWrote
        return Standing(site: name, siteID: name, record: record, wrote: wrote, changedBytes: changedBytes)
    }

    /// As a primary that starts does: one whose peer has taken over shuts hosts out, durably.
    func learnStanding(_ verdict: Verdict) {
        let kind: Phase.Conflict.Kind = verdict == .splitBrain ? .splitBrain : .stale
        while !take(.conflict(Phase.Conflict(kind: kind, at: 0))) { endTrouble() }
        endMirroring()
        servesHosts = false
    }
}

extension World {
    /// An old primary comes back and asks. Whoever the operator keeps, both know that there are two, and which of them is behind; and if
    /// hosts wrote at both while these could not hear each other, nothing is overwritten unless a command says so.
    func judgeSites() throws(SimulationFailure) -> Verdict {
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
}
