// Hosts.swift: chains of dependent writes over two volumes, and noise; what they may rely on, and the cut's check.
//
// Step s of a chain goes to volume s mod 2 after step s - 1 was acknowledged, into sector (s / 2) mod slots of the
// chain. Grains are shared by the chains. Noise writes, zeroes and trims large ranges apart from them; the last grains are
// as they were at first.

import Volumes

/// The site that hosts write to.
protocol ServesHosts: AnyObject {
    var random: SeededGenerator { get set }
    var hosts: Hosts { get set }
    var servedVolumes: [SimulatedVolume] { get }
}

/// Two volumes at each of two sites.
enum SitesLayout {
    static let grain = 4096
    static let grains = 24
    static let size = grains * grain
    static let volumes = 2
    static let chains = 4
}

struct Hosts {
    static let slots = 6
    /// Grains that chains write to, and those at the end that nobody writes to; the rest is for noise.
    static let chainGrains = 12
    static let stillGrains = 2

    private struct Chain {
        var issued = 0
        var acknowledged = 0
        /// Steps up to here may be missing: power loss took writes that were acknowledged but never flushed.
        var floor = 0
    }

    private var chains: [Chain]
    private var noiseUnderWay = 0
    private var noiseCounter: UInt64 = 0
    /// Changes when the server dies: completions of the old one do not count.
    private var life = 0
    var stopped = false

    /// Chains of another era count as never written.
    let era: Int

    init(chains count: Int, era: Int = 0) {
        chains = Array(repeating: Chain(), count: count)
        self.era = era
    }

    static func offset(_ chain: Int, _ step: Int) -> Int {
        let slot = (step / 2) % slots
        let sectorsPerGrain = SitesLayout.grain / SimulatedFile.sector
        let index = slot * SitesLayout.chains + chain
        // Spread over the grains so that chains share them.
        let grain = index % chainGrains
        let sector = (index / chainGrains) % sectorsPerGrain
        return grain * SitesLayout.grain + sector * SimulatedFile.sector
    }

    private func mark(_ chain: Int) -> UInt64 { UInt64(era * 64 + chain + 1) }

    private func sector(_ chain: Int, _ step: Int) -> [UInt8] {
        var bytes: [UInt8] = []
        let word = mark(chain) << 48 | UInt64(step)
        for _ in 0..<SimulatedFile.sector / 8 {
            for shift in 0..<8 { bytes.append(UInt8(truncatingIfNeeded: word >> UInt64(8 * shift))) }
        }
        return bytes
    }

    mutating func act(_ world: any ServesHosts) {
        guard !stopped else { return }
        if world.random.chance(15) { return noise(world) }
        let chain = world.random.below(chains.count)
        guard chains[chain].issued == chains[chain].acknowledged else { return }
        let step = chains[chain].issued + 1
        let life = life
        let fua = world.random.chance(5)
        let accepted = world.servedVolumes[step % 2].submit(
            .write, offset: Self.offset(chain, step), length: SimulatedFile.sector,
            data: sector(chain, step), fua: fua
        ) { [unowned world] request in
            guard world.hosts.life == life, request.error == 0 else { return }
            world.hosts.chains[chain].acknowledged = step
        }
        if accepted { chains[chain].issued = step }
    }

    private mutating func noise(_ world: any ServesHosts) {
        guard noiseUnderWay == 0 else { return }
        let volume = world.random.below(SitesLayout.volumes)
        let area = (SitesLayout.grains - Self.chainGrains - Self.stillGrains) * SitesLayout.grain
        let start = world.random.below(area / 512) * 512
        let length = (1 + world.random.below((area - start) / 512)) * 512
        noiseCounter += 1
        let byte = UInt8(truncatingIfNeeded: noiseCounter)
        let kinds: [Request.Operation] = [.write, .write, .writeZeroes, .trim]
        let kind = kinds[world.random.below(kinds.count)]
        let life = life
        let accepted = world.servedVolumes[volume].submit(
            kind, offset: Self.chainGrains * SitesLayout.grain + start, length: length,
            data: kind == .write ? Array(repeating: byte, count: length) : nil
        ) { [unowned world] _ in
            if world.hosts.life == life { world.hosts.noiseUnderWay = 0 }
        }
        if accepted { noiseUnderWay = 1 }
    }

    func isIdle(_ world: any ServesHosts) -> Bool {
        noiseUnderWay == 0 && chains.allSatisfy { $0.issued == $0.acknowledged }
    }

    /// The server is gone: hosts find out what is there and go on from it.
    mutating func lostServer(_ images: [[UInt8]], powerLoss: Bool) {
        life += 1
        noiseUnderWay = 0
        for chain in chains.indices {
            let last = lastWhole(images, chain)
            precondition(
                powerLoss || last >= chains[chain].acknowledged, "an acknowledged write survives the process")
            chains[chain].issued = last
            chains[chain].acknowledged = last
            if powerLoss { chains[chain].floor = last }
        }
    }

    /// The step up to which a chain's sectors are whole after a crash of its own site, where later ones may be lost.
    private func lastWhole(_ images: [[UInt8]], _ chain: Int) -> Int {
        var newest = 0
        for step in steps(images, chain) { newest = max(newest, step) }
        return newest
    }

    private func steps(_ images: [[UInt8]], _ chain: Int) -> [Int] {
        var found: [Int] = []
        for volume in 0..<SitesLayout.volumes {
            for slot in 0..<Self.slots {
                let step = storedStep(images[volume], chain, slot)
                if step > 0 { found.append(step) }
            }
        }
        return found
    }

    private func storedStep(_ image: [UInt8], _ chain: Int, _ slot: Int) -> Int {
        let at = Self.offset(chain, 2 * slot)
        var word: UInt64 = 0
        for shift in 0..<8 { word |= UInt64(image[at + shift]) << UInt64(8 * shift) }
        return word >> 48 == mark(chain) ? Int(word & 0xFFFF_FFFF_FFFF) : 0
    }

    /// What is wrong with a pair of images as a cut; nil when it is closed.
    func brokenCut(_ images: [[UInt8]]) -> String? {
        for chain in chains.indices {
            let found = steps(images, chain)
            let newest = found.max() ?? 0
            let oldest = max(chains[chain].floor + 1, newest - 2 * Self.slots + 2)
            for step in stride(from: newest, through: oldest, by: -1) where !found.contains(step) {
                return "chain \(chain) has step \(newest) but not step \(step)"
            }
        }
        return nil
    }
}
