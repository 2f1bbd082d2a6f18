// SimulatedIntermediates.swift: mode `change-volume`: the first intermediates of a site, as `ChangeVolume` and `ChangeVolumes` keep them, and
// whether they hold what they must.

import Glibc
import Groups
import Volumes

final class SimulatedIntermediates: PartOfSite {
    unowned let site: SimulatedSite

    /// The bitmaps of a volume's intermediate, but for `preserved`: one mapped file.
    private struct Marks {
        let advanced = SimulatedBitmap(bits: World.grains)
        let lacking = SimulatedBitmap(bits: World.grains)
        let isVoid = SimulatedBitmap(bits: 64, unit: 8)
        var parts: [SimulatedBitmap] { [advanced, lacking, isVoid] }

        func intermediate(_ file: StoreFile) -> Intermediate {
            Intermediate(
                file: file, advanced: advanced.bitmap(World.grains), lacking: lacking.bitmap(World.grains),
                isVoid: isVoid.memory.bindMemory(to: UInt64.self, capacity: 1))
        }
    }
    private let marks = (0..<World.volumes).map { _ in Marks() }
    /// What is written down: the generation that it was used in, and whether it lacks nothing.
    private var records: [(generation: String, isFilled: Bool)?] = Array(repeating: nil, count: World.volumes)

    init(_ site: SimulatedSite) { self.site = site }

    var bitmaps: [SimulatedBitmap] { marks.flatMap(\.parts) }

    private var generation: String { record.generations.first ?? "" }

    /// Whether a start goes on with what is there.
    func isValid(_ index: Int, isTrusted: Bool) -> Bool {
        guard let written = records[index] else { return false }
        return (written.generation == generation || fault == .trustOldIntermediates)
            && (isTrusted || written.isFilled || fault == .trustUnfilled)
    }

    /// A start, of a primary's volume. Everything that its bitmaps are to say of what changed is in them.
    func takeUp(_ index: Int, _ file: StoreFile, isTrusted: Bool) {
        let engine = volumes[index].volume
        guard isValid(index, isTrusted: isTrusted) else {
            renew(index)
            return engine.useIntermediate(marks[index].intermediate(file), trusted: true)
        }
        engine.useIntermediate(marks[index].intermediate(file), trusted: isTrusted || fault == .trustMarks)
    }

    private func renew(_ index: Int) {
        marks[index].lacking.bitmap(World.grains).setAll()
        if fault != .trustFilled { marks[index].advanced.bitmap(World.grains).setAll() }
        marks[index].isVoid.bitmap(64).clearAll()
        site.preserved[index].bitmap(World.grains).clearAll()
        for bitmap in marks[index].parts + [site.preserved[index]] { bitmap.flush() }
        records[index] = (generation, false)
    }

    /// Mirroring begins, perhaps since the roles have changed.
    func use() {
        guard world.mode.hold == .intermediate else { return }
        for index in volumes.indices {
            let engine = volumes[index].volume
            let isNew = records[index]?.generation != generation && fault != .trustOldIntermediates
            if isNew { records[index] = (generation, false) }
            if engine.intermediate == nil {
                engine.useIntermediate(marks[index].intermediate(site.targetFiles[index]), trusted: true)
            }
            if isNew { engine.distrustIntermediate() }
            volumes[index].pump()
        }
    }

    /// It was a start of another role: what there is takes no part in what the group does.
    func forget() { for index in records.indices { records[index] = nil } }

    // MARK: Flushes

    /// - Returns: whether all that it has taken is on stable storage.
    func flush(_ index: Int) -> Bool {
        let errors = [site.targets[index].flush()] + (marks[index].parts + [site.preserved[index]]).map { $0.flush() }
        guard errors.contains(where: { $0 != 0 }) else { return true }
        volumes[index].volume.distrustIntermediate()
        records[index]?.isFilled = false
        return false
    }

    func wasFilled(_ index: Int) { if flush(index) { records[index]?.isFilled = true } }

    /// Bits that say nothing go.
    func forgetCommitted(_ index: Int) { volumes[index].volume.intermediate?.forgetCommitted() }

    // MARK: What must hold

    /// M1 and M2 of `Intermediate`, at whatever moment: the second against what the other site has committed.
    func check() {
        guard world.mode.hold == .intermediate, site.isUp, record.role == .primary else { return }
        for index in volumes.indices {
            let engine = volumes[index].volume
            guard let current = engine.intermediate, !engine.isRestoring else { continue }
            let lacking = marks[index].lacking.bitmap(World.grains)
            var elsewhere = Set<Int>()
            let bits = SimulatedBitmap(bits: World.grains)
            current.addElsewhere(into: bits.bitmap(World.grains))
            for grain in 0..<World.grains where bits.bitmap(World.grains).contains(grain) { elsewhere.insert(grain) }
            // Of another generation it counts for nothing (`Restore`, until it is used in this one).
            let isUsed = records[index]?.generation == generation
            let committed = isUsed ? committedPoint.flatMap { peer.contents(ofPoint: $0, index) } : nil
            for grain in 0..<World.grains {
                let isKnown =
                    lacking.contains(grain) || engine.changeRecording.contains(grain)
                    || engine.outOfSync.contains(grain)
                if !isKnown, !holds(index, grain, site.files[index].cached) {
                    world.fail("\(site.name)'s intermediate \(index) differs in grain \(grain) from its source")
                }
                if let committed, !elsewhere.contains(grain), !holds(index, grain, committed) {
                    world.fail("\(site.name)'s intermediate \(index) has not the committed point's grain \(grain)")
                }
            }
        }
    }

    /// The point that both sites take for the newest that is committed.
    private var committedPoint: UInt64? {
        guard let point = record.lastCommitted?.number, record.isMirroring, peer.isUp, peer.record.role == .secondary,
            peer.points.last == point, peer.readablePoints.last == point
        else { return nil }
        return point
    }

    private func holds(_ index: Int, _ grain: Int, _ contents: [UInt8]) -> Bool {
        let offset = grain * World.grain
        return site.targets[index].cached.withUnsafeBytes { mine in
            contents.withUnsafeBytes { memcmp(mine.baseAddress! + offset, $0.baseAddress! + offset, World.grain) == 0 }
        }
    }
}
