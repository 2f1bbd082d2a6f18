// SeveralClients.swift: writes in the scenario `SeveralHosts` that depend on each other across all hosts, and what a point must hold of them.

struct SeveralClients {
    typealias Place = (host: Int, volume: Int, grain: Int)
    /// The write that each of them waits for.
    private var waiting: [Place?] = Array(repeating: nil, count: 4)
    private var moment = 0
    private(set) var count = 0

    mutating func write(_ hosts: [SeveralHost], _ random: inout SeededGenerator) {
        guard let client = waiting.firstIndex(where: { $0 == nil }) else { return }
        let place = (
            random.below(hosts.count), random.below(SeveralHost.volumes), random.below(SeveralVolume.grainCount)
        )
        let volume = hosts[place.0].volumes[place.1]
        guard hosts[place.0].isUp, volume.grains[place.2].underWay == nil else { return }
        moment += 1
        count += 1
        waiting[client] = place
        volume.grains[place.2].issuedAt.append(moment)
        volume.grains[place.2].acknowledgedAt.append(nil)
        volume.grains[place.2].underWay = (volume.grains[place.2].issuedAt.count - 1, false)
    }

    /// A write that has reached its volume, or has not, and whose acknowledgement is not held.
    private func someWrite(
        applied: Bool, _ hosts: [SeveralHost], _ random: inout SeededGenerator
    ) -> (volume: SeveralVolume, place: Place)? {
        var found: [(SeveralVolume, Place)] = []
        for case let place? in waiting {
            let volume = hosts[place.host].volumes[place.volume]
            guard volume.grains[place.grain].underWay?.isApplied == applied else { continue }
            if !volume.waiting.contains(place.grain) { found.append((volume, place)) }
        }
        return random.one(of: found)
    }

    func apply(_ hosts: [SeveralHost], _ random: inout SeededGenerator) {
        guard let (volume, place) = someWrite(applied: false, hosts, &random) else { return }
        let write = volume.grains[place.grain].underWay!.write
        volume.grains[place.grain].content = write
        volume.grains[place.grain].underWay = (write, true)
        volume.mark(place.grain)
    }

    mutating func acknowledge(_ hosts: [SeveralHost], _ random: inout SeededGenerator) {
        guard let (volume, place) = someWrite(applied: true, hosts, &random) else { return }
        if volume.isDone(place.grain) { acknowledged(volume, [place.grain]) }
    }

    mutating func acknowledged(_ volume: SeveralVolume, _ grains: [Int]) {
        for grain in grains {
            guard let (write, _) = volume.grains[grain].underWay else { continue }
            moment += 1
            volume.grains[grain].acknowledgedAt[write] = moment
            volume.grains[grain].underWay = nil
        }
    }

    /// Those whose write is over have nothing to wait for.
    mutating func goOn(_ hosts: [SeveralHost]) {
        for client in waiting.indices {
            guard let place = waiting[client] else { continue }
            if hosts[place.host].volumes[place.volume].grains[place.grain].underWay == nil { waiting[client] = nil }
        }
    }

    /// A host has died: what was under way has reached its volume, or not.
    mutating func lost(_ volume: SeveralVolume, _ random: inout SeededGenerator) {
        for grain in volume.grains.indices {
            guard let (write, isApplied) = volume.grains[grain].underWay else { continue }
            if !isApplied, random.chance(50) {
                volume.grains[grain].content = write
                volume.mark(grain)
            }
            volume.grains[grain].underWay = nil
        }
    }
}

/// What was formed under each number.
struct SeveralPoints {
    /// By number, host and volume.
    private var formed: [UInt64: [Int: [Int: [Int]]]] = [:]
    private var checked: Set<UInt64> = []

    /// - Returns: what is wrong.
    mutating func form(_ number: UInt64, _ host: Int, _ volume: Int, _ image: [Int]) -> String? {
        if formed[number]?[host]?[volume] != nil { return "a host forms a point anew" }
        formed[number, default: [:]][host, default: [:]][volume] = image
        return nil
    }

    /// Of all volumes of a host.
    func image(_ number: UInt64, _ host: Int) -> [[Int]]? {
        let images = (0..<SeveralHost.volumes).compactMap { formed[number]?[host]?[$0] }
        return images.count == SeveralHost.volumes ? images : nil
    }

    /// If a write is in the point, so is every write that was acknowledged before that one was issued.
    mutating func brokenCut(_ number: UInt64, _ hosts: [SeveralHost]) -> String? {
        guard checked.insert(number).inserted else { return nil }
        var newest = 0
        for host in hosts.indices {
            guard let images = image(number, host) else { return "a point is committed that not every host has formed" }
            for (volume, image) in zip(hosts[host].volumes, images) {
                for (grain, write) in zip(volume.grains, image) { newest = max(newest, grain.issuedAt[write]) }
            }
        }
        for host in hosts.indices {
            for (volume, image) in zip(hosts[host].volumes, image(number, host)!) {
                for (grain, write) in zip(volume.grains, image) {
                    for missing in grain.acknowledgedAt[(write + 1)...] where missing ?? .max < newest {
                        return "a committed point lacks a write that was acknowledged before another in it was issued"
                    }
                }
            }
        }
        return nil
    }
}
