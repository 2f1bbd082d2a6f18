// FailoverPhase.swift: the primary is gone; a recovery point becomes the volumes, and hosts write there while data flows
// back, through crashes and power loss. What is done is `Failover`.
//
// Must hold: a read gives the point's data or what was written since; an acknowledged write survives the process, a
// flushed one power loss; when the restore is over, the raw file is the volume; the other points are as they were.

import Groups
import Volumes

/// What a failed-over volume must hold, sector by sector.
private struct Model {
    var now: [UInt8]
    /// Sectors written since the last flush: power loss may leave any of these values.
    var possible: [Int: [[UInt8]]] = [:]

    func sector(_ index: Int) -> [UInt8] { Array(now[index * 512..<index * 512 + 512]) }
}

extension World {
    /// Fails over to a random point, works there for a while, and checks.
    func failOver() throws(SimulationFailure) {
        shutHostsOut()
        primary.lose(powerLoss: random.chance(50))
        let site = secondary!
        settle(site)
        for copies in site.copies { for (file, _) in copies.values { file.spaceLeft = nil } }
        // A commit that was under way is decided by the record.
        if site.executor.isBusy || !site.chainsAreWhole { site.restart(powerLoss: false) }
        if random.chance(15) { site.loseFilesOfPoint() }
        guard let point = try pointToGoTo(site) else { return }
        site.hostsWrote = false
        note("\(site.name) fails over to point \(point)")
        exchangeSites()
        let kept = site.readablePoints
        let before = try kept.map { number throws(SimulationFailure) in try readNow(number) }
        var models = before[kept.firstIndex(of: point)!].map { Model(now: $0) }
        try carryOutFailover(to: point)
        var operations = 0
        // Few or many: what nobody writes again must be right as well.
        let wanted = random.chance(50) ? random.below(4) : 60
        while operations < wanted || !site.record.failedOver!.restoring.isEmpty {
            operations += 1
            let index = random.below(Self.volumes)
            for _ in 0..<random.below(30) { site.volumes[random.below(Self.volumes)].step(&random) }
            site.collectEvents()
            arriveLate()
            if operations <= wanted { try act(index, &models[index]) }
            if operations < wanted, random.chance(6) { try crashAfterFailover(&models) }
            guard operations < 100_000 else { throw SimulationFailure("a restore never ends") }
        }
        settle(site)
        for index in 0..<Self.volumes where site.files[index].cached != models[index].now {
            throw SimulationFailure("volume \(index) differs from its raw file after the restore")
        }
        for (number, images) in zip(kept, before) where try readNow(number) != images {
            throw SimulationFailure("point \(number) has changed through the failover to point \(point)")
        }
    }

    /// Everything that is under way in a site's volumes ends.
    private func settle(_ site: SimulatedSite) {
        for volume in site.volumes { while !volume.pending.isEmpty { volume.step(&random) } }
    }

    /// The operator wants one of them, or the newest.
    private func pointToGoTo(_ site: SimulatedSite) throws(SimulationFailure) -> UInt64? {
        let wanted = random.chance(80) ? site.points.randomElement(using: &random) : nil
        let point = try? (try? site.record.failoverPoint(wanted)) ?? site.record.failoverPoint(nil)
        guard let point else {
            guard site.readablePoints.isEmpty else { throw SimulationFailure("no failover although there are points") }
            return nil
        }
        guard point.isFailed != true else {
            throw SimulationFailure("a failover goes to point \(point.number), which has failed")
        }
        return point.number
    }

    /// Of what was on its way when the primary was lost.
    private func arriveLate() { if !tasks.isEmpty, random.chance(50) { arrive() } }

    /// The operator tries until it is done; the process may end, power and saves may fail between any two steps.
    private func carryOutFailover(to point: UInt64) throws(SimulationFailure) {
        let site = primary!
        for attempt in 0..<1000 {
            if attempt >= 10 { site.endTrouble() }
            var outcome: Result<UInt64, any Error>?
            site.executor.run(
                Failover(
                    Takeover(
                        point: point, volumes: ["0", "1"], generation: "\(random.next())", at: 0, joins: false))
            ) { outcome = $0 }
            while outcome == nil {
                if attempt < 4, random.chance(10) { break }
                if site.executor.steps.isEmpty { throw SimulationFailure("the failover waits for ever") }
                site.executor.steps.removeFirst()()
                arriveLate()
                site.volumes[random.below(Self.volumes)].step(&random)
            }
            if outcome == nil { site.restart(powerLoss: random.chance(50)) }
            // Decided and not carried out: a start has gone on.
            if site.record.failedOver != nil { return }
        }
        throw SimulationFailure("the failover is never done")
    }

    /// One request, carried through while background work goes on.
    private func act(_ index: Int, _ model: inout Model) throws(SimulationFailure) {
        let area = (Self.grains - Hosts.stillGrains) * Self.grain
        let start = random.below(area / 512) * 512
        let length = min(area - start, (1 + random.below(24)) * 512)
        let flushes = random.chance(20)
        if flushes {
            _ = try complete(index, .flush, 0, 0, nil)
            model.possible = [:]
            return
        }
        if random.chance(40) {
            let data = try complete(index, .read, start, length, nil)
            guard data == Array(model.now[start..<start + length]) else {
                throw SimulationFailure("a read of volume \(index) after the failover is wrong")
            }
            return
        }
        let byte = UInt8(truncatingIfNeeded: random.next())
        let fua = random.chance(20)
        primary.hostsWrote = true
        _ = try complete(index, .write, start, length, Array(repeating: byte, count: length), fua: fua)
        for sector in start / 512..<(start + length) / 512 {
            let old = model.sector(sector)
            model.possible[sector, default: [old]].append(Array(repeating: byte, count: 512))
            for offset in 0..<512 { model.now[sector * 512 + offset] = byte }
            if fua { model.possible[sector] = nil }
        }
    }

    private func complete(
        _ index: Int, _ operation: Request.Operation, _ offset: Int, _ length: Int, _ data: [UInt8]?, fua: Bool = false
    ) throws(SimulationFailure) -> [UInt8] {
        var result: [UInt8]?
        var errno: Int32 = 0
        let accepted = primary.volumes[index].submit(operation, offset: offset, length: length, data: data, fua: fua) {
            request in
            errno = request.error
            result =
                operation == .read ? Array(UnsafeRawBufferPointer(start: request.buffer, count: length)) : []
        }
        var waited = 0
        while accepted, result == nil {
            primary.volumes[index].step(&random)
            waited += 1
            if waited > 100_000 { throw SimulationFailure("a \(operation) after the failover never ends") }
        }
        guard accepted, errno == 0 else { throw SimulationFailure("a \(operation) after the failover fails: \(errno)") }
        return result!
    }

    private func crashAfterFailover(_ models: inout [Model]) throws(SimulationFailure) {
        let powerLoss = primary.restart(powerLoss: random.chance(50))
        for index in 0..<Self.volumes {
            let found = try complete(index, .read, 0, Self.size, nil)
            for sector in 0..<Self.size / 512 {
                let bytes = Array(found[sector * 512..<sector * 512 + 512])
                if bytes == models[index].sector(sector) { continue }
                guard powerLoss, models[index].possible[sector]?.contains(bytes) == true else {
                    throw SimulationFailure(
                        "sector \(sector) of volume \(index) after \(powerLoss ? "power loss" : "a kill") is neither what "
                            + "was flushed nor what was written since")
                }
            }
            if powerLoss { models[index] = Model(now: found) }
        }
    }

    /// Both images of a recovery point, read in full.
    private func readNow(_ point: UInt64) throws(SimulationFailure) -> [[UInt8]] {
        var images: [[UInt8]] = []
        for index in 0..<Self.volumes {
            var image: [UInt8]?
            let accepted = primary.volumes[index].submit(
                .read, view: .copy(CopyID(primary.carrier(of: point, index))), offset: 0, length: Self.size
            ) {
                request in
                image = request.error == 0 ? Array(UnsafeRawBufferPointer(start: request.buffer, count: Self.size)) : []
            }
            while accepted, image == nil { primary.volumes[index].step(&random) }
            guard let image, !image.isEmpty else { throw SimulationFailure("point \(point) cannot be read") }
            images.append(image)
        }
        return images
    }
}
