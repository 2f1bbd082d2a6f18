// CoordinationClients.swift: hosts' writes in the scenario `Coordination`, which depend on each other across all volumes, and what a point must
// hold of them.

struct CoordinationClients {
    /// The write that each of them waits for.
    private var waiting: [(host: Int, grain: Int)?] = Array(repeating: nil, count: 4)
    private var moment = 0
    private(set) var count = 0

    mutating func write(_ hosts: inout [CoordinationHost], _ random: inout SeededGenerator) {
        guard let client = waiting.firstIndex(where: { $0 == nil }) else { return }
        let (host, grain) = (random.below(hosts.count), random.below(CoordinationHost.grainCount))
        guard hosts[host].machine != nil, hosts[host].grains[grain].underWay == nil else { return }
        moment += 1
        count += 1
        waiting[client] = (host, grain)
        hosts[host].grains[grain].issuedAt.append(moment)
        hosts[host].grains[grain].acknowledgedAt.append(nil)
        hosts[host].grains[grain].underWay = (hosts[host].grains[grain].issuedAt.count - 1, false)
    }

    /// Writes that have reached their volume, or have not, and whose acknowledgement is not held.
    private func someWrite(
        applied: Bool, _ hosts: [CoordinationHost], _ random: inout SeededGenerator
    ) -> (host: Int, grain: Int)? {
        var found: [(host: Int, grain: Int)] = []
        for host in hosts.indices {
            for (grain, written) in hosts[host].grains.enumerated() where written.underWay?.isApplied == applied {
                if !hosts[host].held.contains(grain) { found.append((host, grain)) }
            }
        }
        return random.one(of: found)
    }

    mutating func apply(_ hosts: inout [CoordinationHost], _ random: inout SeededGenerator) {
        guard let (host, grain) = someWrite(applied: false, hosts, &random) else { return }
        let write = hosts[host].grains[grain].underWay!.write
        hosts[host].grains[grain].content = write
        hosts[host].grains[grain].underWay = (write, true)
        hosts[host].recording.insert(grain)
    }

    mutating func acknowledge(_ hosts: inout [CoordinationHost], _ random: inout SeededGenerator) {
        guard let (host, grain) = someWrite(applied: true, hosts, &random) else { return }
        if hosts[host].heldSince == nil { return acknowledged(host, grain, &hosts) }
        hosts[host].held.append(grain)
    }

    mutating func acknowledged(_ host: Int, _ grain: Int, _ hosts: inout [CoordinationHost]) {
        guard let (write, _) = hosts[host].grains[grain].underWay else { return }
        moment += 1
        hosts[host].grains[grain].acknowledgedAt[write] = moment
        hosts[host].grains[grain].underWay = nil
        forget(host, grain)
    }

    /// Nobody waits for it any more.
    mutating func forget(_ host: Int, _ grain: Int) {
        for client in waiting.indices where waiting[client].map({ $0 == (host, grain) }) == true {
            waiting[client] = nil
        }
    }
}

struct CoordinationPoints {
    /// What each host's volumes were when they formed the point.
    private(set) var formed: [UInt64: [Int: [Int]]] = [:]
    private var closed: Set<UInt64> = []

    /// - Returns: whether that is the first time.
    mutating func form(_ number: UInt64, _ host: Int, _ image: [Int]) -> Bool {
        let isFirst = formed[number]?[host] == nil
        formed[number, default: [:]][host] = image
        return isFirst
    }

    /// If a write is in the point, so is every write that was acknowledged before that one was issued.
    mutating func brokenCut(_ number: UInt64, _ hosts: [CoordinationHost]) -> String? {
        guard !closed.contains(number) else { return nil }
        closed.insert(number)
        guard let point = formed[number], point.count == hosts.count else {
            return "a point is committed that not every host has formed"
        }
        let newest =
            hosts.indices.flatMap { host in
                hosts[host].grains.indices.map { hosts[host].grains[$0].issuedAt[point[host]![$0]] }
            }.max() ?? 0
        for host in hosts.indices {
            for (grain, written) in hosts[host].grains.enumerated() {
                for missing in written.acknowledgedAt[(point[host]![grain] + 1)...] where missing ?? .max < newest {
                    return "a committed point lacks a write that was acknowledged before another in it was issued"
                }
            }
        }
        return nil
    }
}
