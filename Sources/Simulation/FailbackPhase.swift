// FailbackPhase.swift: the old primary comes back with what it never sent; it becomes the secondary of the new one, which
// takes its changed grains into its own bitmaps; then everything goes on in the other direction, with faults.
//
// The decisions are those of Replication/Standing.swift, the steps those of Site/Roles.swift. Must hold: in the end the sites
// are alike, although only grains that one of them has changed were sent.

import Base
import Groups
import Volumes

extension World {
    /// Exchanges the sites' roles, goes on for a while, and compares them.
    func failBack(steps count: Int) throws(SimulationFailure) {
        guard !westPoints.isEmpty else { return }
        endTrouble()
        note("east comes back and becomes the secondary of west")
        let changed = yield()
        for index in 0..<Self.volumes {
            guard fault != .forgetPeersChanges else { break }
            for grain in 0..<Self.grains where changed[index][grain >> 6] & (1 << UInt64(grain & 63)) != 0 {
                let start = UInt64(grain * Self.grain)
                west[index].volume.markChanged([start..<start + UInt64(Self.grain)])
            }
            westRecording[index].flush()
        }
        exchange()
        for _ in 0..<(random.chance(50) ? random.below(200) : count) { try step(faults: true) }
        try settle()
    }

    /// The returning primary gives up what it held; what it has changed is in one bitmap, durably.
    private func yield() -> [[UInt64]] {
        tasks = []
        westTasks = []
        if random.chance(30) { loseEast(powerLoss: true) }
        startEast()
        var changed: [[UInt64]] = []
        for volume in east {
            volume.volume.giveUpPoint()
            volume.pump()
            while !volume.pending.isEmpty || !volume.volume.mayFormPoint { volume.step(&random) }
            changed.append(volume.volume.changedWords(from: 0, count: 8))
        }
        for volume in east + west { volume.crash(&random) }
        for file in eastFiles { file.flush() }
        return changed
    }

    private func exchange() {
        let base = PointRecord(
            number: max(eastSaved.highestPoint, westRecord.highestPoint) + 1, formedAt: 0, committedAt: 0,
            order: CopyRecord.orderStep, isBase: true)
        let secondary = eastSaved.after(
            .yielded(
                Yielding(
                    point: base, peer: "west", generations: ["back"], lineage: "west", volumes: [], dropped: [])))
        let primary = westRecord.after(
            .joined(Joining(peer: "west", lineage: "west", volumeLineages: nil, point: base)))
        (eastFiles, westFiles) = (westFiles, eastFiles)
        (eastRecording, westRecording) = (westRecording, eastRecording)
        (eastLogs, westLogs) = (westLogs, eastLogs)
        setRecords(east: primary, west: secondary)
        for index in 0..<Self.volumes {
            eastTargets[index] = SimulatedFile(byteCount: Self.size)
            eastPreserved[index] = SimulatedBitmap(bits: Self.grains)
            westCopies[index] = [:]
            // The new primary's bitmaps have them.
            westRecording[index].first.bitmap(Self.grains).clearAll()
            westRecording[index].second.bitmap(Self.grains).clearAll()
            eastRecording[index].roles.pointee.heldPoint = 0
        }
        westOrder = 2 * CopyRecord.orderStep
        remembered = [:]
        hosts = Hosts(chains: Self.chains, era: hosts.era + 1)
        east = []
        startWest()
        startEast()
    }
}

extension GroupRecord {
    fileprivate func after(_ changes: GroupChange...) -> GroupRecord {
        changes.reduce(into: self) { record, change in
            do { try record.apply(change) } catch { fatalError("\(error)") }
        }
    }
}
