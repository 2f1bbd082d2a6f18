// SimulatedSite.swift: one of two sites: what outlives its processes, and the process that there is.
//
// A process is started as `Site.start` starts one, in whatever role the group's record says, and may end between any two steps of that.

import Base
import FlashCopies
import Groups
import Volumes

/// A volume's recording bitmaps, and which of them records: one mapped file.
final class RecordingFile {
    let first: SimulatedBitmap
    let second: SimulatedBitmap
    private let header = SimulatedBitmap(bits: 8 * MemoryLayout<RecordingRoles>.size, unit: 8)
    let roles: UnsafeMutablePointer<RecordingRoles>

    init(grains: Int) {
        (first, second) = (SimulatedBitmap(bits: grains), SimulatedBitmap(bits: grains))
        roles = header.memory.bindMemory(to: RecordingRoles.self, capacity: 1)
    }

    var parts: [SimulatedBitmap] { [first, second, header] }
    /// - Returns: an errno.
    @discardableResult
    func flush() -> Int32 { parts.map { $0.flush() }.max() ?? 0 }
}

/// What carries out a part of what a site does.
protocol PartOfSite: AnyObject {
    var site: SimulatedSite { get }
}

extension PartOfSite {
    var world: World { site.world }
    var fault: DeliberateFault? { world.fault }
    var life: Int { site.life }
    var record: GroupRecord { site.record }
    var volumes: [SimulatedVolume] { site.volumes }
    var recording: [RecordingFile] { site.recording }
    var peer: SimulatedSite { site.peer }
}

final class SimulatedSite {
    unowned let world: World
    let name: String

    // On disk.
    private(set) var files: [SimulatedFile] = []
    private(set) var recording: [RecordingFile] = []
    /// Takes what colliding writes overwrite while this site is primary, and says which grains it has.
    private(set) var targets: [SimulatedFile] = []
    private(set) var preserved: [SimulatedBitmap] = []
    private(set) var logs: [SimulatedFile] = []
    var copies: [[CopyID: (SimulatedFile, SimulatedBitmap)]] = []
    /// What must come back from the point that was failed over to.
    var restores: [SimulatedBitmap] = []
    private(set) var saved: GroupRecord
    /// What the process knows to be in the file.
    private var known: GroupRecord
    /// By volume; and those that say that old content could not be preserved.
    private var lostFiles: [Set<CopyID>] = Array(repeating: [], count: World.volumes)
    private var failedFiles: [Set<CopyID>] = Array(repeating: [], count: World.volumes)
    /// Volumes whose bitmaps and logs say what is not this run's: no start has come to their end since power was lost.
    private var unconfirmed: Set<Int> = []
    /// The disk under all of these but the volumes takes nothing any more.
    private(set) var stateFails = false
    /// No record can be saved before this step.
    private var fullUntil = 0
    /// Since it was failed over to.
    var hostsWrote = false
    /// Volumes whose own file says that their bitmaps and log are not to be relied on.
    private var distrusted: Set<Int> = []

    // The process.
    private(set) var life = 0
    var volumes: [SimulatedVolume] = []
    var group: Group
    /// Hosts may write.
    var servesHosts = false
    /// There is a process.
    var isUp: Bool { volumes.count == World.volumes }
    /// Hosts wait for a record that is to be saved.
    var isAdmitting = false
    /// The one that the intake lets in; 0 = none.
    var session: UInt64 = 0
    var order = CopyRecord.orderStep
    private var copyBuffers: CopyBuffers
    private let copyMemory: UnsafeMutableRawPointer

    /// What its active points and the one that is held have of its files.
    private(set) var targetFiles: [StoreFile] = []
    private(set) lazy var executor = SimulatedStepExecutor(self)
    private(set) lazy var replicator = SimulatedReplicator(self)
    private(set) lazy var comparisons = SimulatedComparisons(self)
    private(set) lazy var intermediates = SimulatedIntermediates(self)

    var record: GroupRecord { group.record }
    /// As the record says.
    var mayServeHosts: Bool { record.role == .primary && record.handingOver == nil && record.conflict == nil }
    var points: [UInt64] { record.points.map(\.number) }
    var readablePoints: [UInt64] { record.points.filter { $0.isFailed != true }.map(\.number) }
    private var fault: DeliberateFault? { world.fault }
    var peer: SimulatedSite { world.primary === self ? world.secondary : world.primary }

    init(_ world: World, _ name: String, _ role: Role) {
        (self.world, self.name) = (world, name)
        saved = .first(role, identity: name)
        known = saved
        group = Group(record: saved)
        copyMemory = .allocate(byteCount: 8 << 20, alignment: 4096)
        copyBuffers = CopyBuffers(pool: BufferPool(base: copyMemory, size: 8 << 20))
        for _ in 0..<World.volumes {
            files.append(SimulatedFile(byteCount: World.size))
            // The sites have nothing in common: what a first copy forgets is seen.
            files.last!.fill(&world.random)
            recording.append(RecordingFile(grains: World.grains))
            targets.append(SimulatedFile(byteCount: World.size))
            preserved.append(SimulatedBitmap(bits: World.grains))
            logs.append(SimulatedFile(byteCount: ActivityLog.fileOffset + 4096))
            copies.append([:])
            restores.append(SimulatedBitmap(bits: World.grains))
        }
    }

    deinit { copyMemory.deallocate() }

    // MARK: The record

    /// A save that fails may have reached the file all the same.
    @discardableResult
    func save(_ turn: Turn<Cycle.Action>?, ofCycle: Bool = false) -> Bool {
        guard let turn else { return false }
        for action in turn.before { replicator.perform(action) }
        if turn.saves {
            do { try group.record.check(after: known) } catch { world.fail("\(name)'s record: \(error)") }
            let isFull = world.steps < fullUntil && !world.isQuiet
            let fails = stateFails || isFull || world.saveFails()
            if !fails || (!stateFails && !isFull && world.random.chance(50)) { saved = group.record }
            guard !fails || (ofCycle && fault == .goOnUnsaved) else {
                if !isFull { fullUntil = world.steps + world.recordWasNotSaved(self) }
                world.note("\(name) cannot save its record")
                save(group.saveFailed("no space", ofCycle: ofCycle, now: world.now), ofCycle: ofCycle)
                replicator.lookAtTheTime()
                return false
            }
            known = group.record
            let wasUnsaved = group.isUnsaved
            group.wasSaved()
            if wasUnsaved { settleChains() }
        }
        for action in turn.after { replicator.perform(action) }
        return true
    }

    func take(_ change: GroupChange) -> Bool { save(try? group.change(change)) }

    // MARK: Starting

    /// As often as it takes: a start may end between any two of its steps.
    ///
    /// - Returns: whether power was lost meanwhile.
    @discardableResult
    func start() -> Bool {
        var lostPower = false
        while !tryStart(endingAt: !world.isQuiet && world.random.chance(15) ? world.random.below(16) : nil) {
            let powerLoss = world.random.chance(50)
            lose(powerLoss: powerLoss)
            lostPower = lostPower || powerLoss
        }
        servesHosts = mayServeHosts
        if record.isMirroring { replicator.beginMirroring() }
        return lostPower
    }

    /// - Parameter last: the step before which it ends; nil = it goes through.
    private func tryStart(endingAt last: Int?) -> Bool {
        var step = 0
        func goesOn() -> Bool {
            step += 1
            return step != last
        }
        let isTrusted = recording.indices.map { !unconfirmed.contains($0) && !distrusted.contains($0) }
        known = saved
        group = Group(record: saved)
        if fault == .confirmPrimaryEarly { unconfirmed = [] }
        guard goesOn() else { return false }
        let isHeld = isTrusted.enumerated().map { index, isTrusted in
            isTrusted && (world.mode.hold != .intermediate || intermediates.isValid(index, isTrusted: true))
        }
        let held = zip(recording, isHeld).map { $1 ? $0.roles.pointee.heldPoint : nil }
        if record.mustGiveUpPoint(heldBy: held, world.mode), fault != .takeUpImages, !take(.pointGivenUp) {
            return false
        }
        copyBuffers = CopyBuffers(pool: BufferPool(base: copyMemory, size: 8 << 20))
        replicator.start()
        (targetFiles, volumes) = ([], [])
        for index in 0..<World.volumes {
            volumes.append(makeVolume(index))
            guard goesOn(), startVolume(index, isTrusted[index], goesOn) else { return false }
        }
        settleChains()
        return true
    }

    private func startVolume(_ index: Int, _ isTrusted: Bool, _ goesOn: () -> Bool) -> Bool {
        var start = VolumeStart(isTrusted: isTrusted, record, "\(index)") { copies[index][CopyID($0)] != nil }
        start.knowsNothing = distrusted.contains(index)
        volumes[index].volume.beginResuming()
        guard case .success = takeUp(StartVolume(start), { CopyTable() }, goesOn, { perform($0, index, isTrusted) })
        else { return false }
        return true
    }

    private func perform(_ action: CopyAction, _ index: Int, _ isTrusted: Bool) -> CopyAnswer {
        let simulated = volumes[index]
        switch action {
        case .openFiles(let links): return .opened(open(links, index))
        case .change(_, .lost): break  // there are no FlashCopies
        case .failPoint(let id): return failPoint(id, index)
        case .loseFiles(let ids): return CopyAnswer(isDone: loseFiles(ids, index))
        case .resume(let link):
            addPoint(UInt64(link.id), to: simulated, index, resume: true, failed: link.resumption == .servesOlder)
            if link.resumption == .leaves { simulated.volume.withdrawCopy(link.id) }
        case .takeRole(let role): take(role, index, isTrusted)
        case .resumeRestore(let id): startRestore(index, simulated, from: UInt64(id))
        case .loseFailover: world.fail("the point that was failed over to is lost")
        case .confirm:
            // What hosts wrote while nothing was logged is on no stable storage, and was perhaps sent.
            if !isTrusted { files[index].flush() }
            recording[index].flush()
            unconfirmed.remove(index)
            distrusted.remove(index)
        case .finishResuming: simulated.volume.finishResuming()
        default: world.fail("'\(action)' is none of a start of volumes without FlashCopies")
        }
        return .done
    }

    /// What was made for a point that no record names goes.
    private func open(_ links: [ChainLink], _ index: Int) -> [LinkFiles] {
        for id in copies[index].keys where !links.contains(where: { $0.id == id }) { copies[index][id] = nil }
        return links.map { link in
            if copies[index][link.id] != nil { return failedFiles[index].contains(link.id) ? .failed : .whole }
            if fault == .trustMissing { return .whole }
            if lostFiles[index].contains(link.id) { return .damaged }
            world.fail("the files of point \(link.id) are missing at a start")
            return .damaged
        }
    }

    private func failPoint(_ id: CopyID, _ index: Int) -> CopyAnswer {
        guard take(.pointFailed(UInt64(id), volume: "\(index)")), save(group.settle()) else {
            return .failed(SimulationFailure("it cannot be written down"))
        }
        return .pointFailed(isKept: !record.points(carriedBy: UInt64(id), "\(index)").isEmpty)
    }

    private func loseFiles(_ ids: Set<CopyID>, _ index: Int) -> Bool {
        let voided = ids.compactMap { record.points(carriedBy: UInt64($0), "\(index)").last?.number }.max()
        if let voided, !take(.pointsVoided(through: voided, lineage: "\(world.random.next())")) { return false }
        for id in ids { copies[index][id] = nil }
        return true
    }

    private func take(_ role: RoleStart, _ index: Int, _ isTrusted: Bool) {
        let simulated = volumes[index]
        let engine = simulated.volume
        let isPrimary = role.role == .primary
        simulated.skipFlushes = fault == .skipFlushes && !isPrimary
        let target = simulated.addStore(.file(targets[index]))
        targetFiles.append(target)
        engine.policy = isPrimary ? .hostFirst : .copiesFirst
        engine.recording = isPrimary
        if isPrimary { startLog(index, simulated, marksRegions: role.marksRegions) }
        if role.marksAll { engine.markAllChanged() }
        if isPrimary, world.mode.hold == .intermediate {
            intermediates.takeUp(index, target, isTrusted: isTrusted)
        } else {
            intermediates.forget()
        }
        if let held = role.held {
            engine.resumePoint(
                number: held, targetFile: target, preserved: preserved[index].bitmap(World.grains))
        } else if isPrimary {
            engine.mergeOutOfSync()
        }
    }

    private func makeVolume(_ index: Int) -> SimulatedVolume {
        let recording = recording[index]
        let simulated = SimulatedVolume(
            volume: Volume(
                geometry: Geometry(size: UInt64(World.size), grain: World.grain)!,
                bitmaps: (recording.first.bitmap(World.grains), recording.second.bitmap(World.grains)),
                roles: recording.roles, copyBuffers: copyBuffers, requestCapacity: 48,
                smallestRegion: World.regionBytes, faults: fault?.engine ?? []), now: { [unowned world] in world.now })
        _ = simulated.addStore(.file(files[index]))
        return simulated
    }

    /// Points whose files a volume's chain must have.
    func carriers(_ index: Int) -> [UInt64] { record.carriers(of: World.names)["\(index)"] ?? [] }

    /// The point whose files hold what another is of a volume.
    func carrier(of point: UInt64, _ index: Int) -> UInt64 {
        guard let carrier = record.carrier(of: point, "\(index)") else {
            world.fail("nothing holds point \(point) of volume \(index)")
            return point
        }
        return carrier
    }

    /// Of every point that is kept, the chains have what holds it.
    var chainsAreWhole: Bool {
        volumes.indices.allSatisfy { index in
            carriers(index).allSatisfy { volumes[index].volume.copy(CopyID($0)) != nil }
        }
    }

    /// What a point holds of a volume, at whatever moment; nil if its files have failed.
    func contents(ofPoint point: UInt64, _ index: Int) -> [UInt8]? {
        guard let first = record.carrier(of: point, "\(index)"), volumes[index].volume.copy(CopyID(first)) != nil else {
            return nil
        }
        let chain = copies[index].keys.sorted().filter { $0 >= CopyID(first) && $0 < CopyTable.firstID }
        guard chain.allSatisfy({ volumes[index].volume.copy($0)?.state == .active }) else { return nil }
        var contents = files[index].cached
        for grain in 0..<World.grains {
            guard let id = chain.first(where: { copies[index][$0]!.1.bitmap(World.grains).contains(grain) }) else {
                continue
            }
            let range = grain * World.grain..<(grain + 1) * World.grain
            contents.replaceSubrange(range, with: copies[index][id]!.0.cached[range])
        }
        return contents
    }

    /// What carries no point that is kept leaves, once the record's file does not name it any more.
    func settleChains() {
        guard !group.isUnsaved || fault == .leaveUnsaid else { return }
        for index in volumes.indices {
            let carriers = fault == .dropCarriers ? points : carriers(index)
            for id in copies[index].keys.sorted() where id < CopyTable.firstID && !carriers.contains(UInt64(id)) {
                volumes[index].volume.withdrawCopy(id)
            }
            volumes[index].pump()
        }
    }

    func addPoint(
        _ point: UInt64, to simulated: SimulatedVolume, _ index: Int, resume: Bool, failed: Bool = false
    ) {
        let id = CopyID(point)
        let files = copies[index][id] ?? (SimulatedFile(byteCount: World.size), SimulatedBitmap(bits: World.grains))
        copies[index][id] = files
        // A bit that only the killed process's mapping had must be durable before a write relies on it.
        if resume, fault != .trustUnflushedBits { files.1.flush() }
        let copy = FlashCopy(
            id: id, targetFile: simulated.addStore(.file(files.0)),
            bitmapFile: simulated.addStore(.bitmap(files.1)), preserved: files.1.bitmap(World.grains), durable: true)
        if resume { simulated.volume.resumeCopy(copy, failed: failed) } else { simulated.volume.addCopy(copy) }
    }

    func startLog(_ index: Int, _ simulated: SimulatedVolume, marksRegions: Bool = false) {
        let regions = SimulatedBitmap(bits: 64)
        let layout = ActivityLog.layout(size: UInt64(World.size), smallest: World.regionBytes)
        let region = Bitmap(memory: regions.memory, count: layout.count)
        let bitmapFile = simulated.addStore(.bitmaps(recording[index].parts))
        let logFile = simulated.addStore(.file(logs[index]))
        logs[index].cached.withUnsafeBytes { bytes in
            let contents = UnsafeRawBufferPointer(rebasing: bytes[ActivityLog.fileOffset...])
            _ = ActivityLog.decode(contents, into: region)
            simulated.volume.startActivityLog(file: logFile, contents: contents, recordingFile: bitmapFile)
        }
        if marksRegions, fault != .trustBitmapsAfterPowerLoss { simulated.volume.recoverChanges(regions: region) }
    }

    func startRestore(_ index: Int, _ simulated: SimulatedVolume, from point: UInt64) {
        simulated.volume.startRestore(
            from: CopyID(point), pending: restores[index].bitmap(World.grains),
            bitmapFile: simulated.addStore(.bitmap(restores[index])))
        simulated.pump()
    }

    // MARK: How it stands

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
        replicator.endMirroring()
        servesHosts = false
    }

    // MARK: Ending

    /// - Returns: whether power was lost.
    @discardableResult
    func restart(powerLoss: Bool) -> Bool {
        lose(powerLoss: powerLoss)
        return start() || powerLoss
    }

    /// A secondary comes back with other files: nothing is known of them, and no point is left.
    func exchangeVolumes() {
        world.note("\(name)'s volumes are exchanged")
        lose(powerLoss: false)
        let lost = GroupChange.pointsVoided(through: saved.points.last?.number ?? 0, lineage: "\(world.random.next())")
        do { try saved.apply(lost) } catch { world.fail("\(error)") }
        for index in files.indices {
            files[index].fill(&world.random)
            copies[index] = [:]
        }
        start()
    }

    /// Somebody, or a check of the file system, has removed files of a point; or the last process could not preserve old content for it.
    func loseFilesOfPoint() {
        let index = world.random.below(World.volumes)
        lose(powerLoss: false)
        if let id = copies[index].keys.sorted().randomElement(using: &world.random) {
            let isGone = world.random.chance(50)
            world.note("files of point \(id) of \(name)'s volume \(index) \(isGone ? "are gone" : "have failed")")
            if isGone {
                copies[index][id] = nil
                lostFiles[index].insert(id)
            } else {
                failedFiles[index].insert(id)
            }
        }
        start()
    }

    func lose(powerLoss: Bool) {
        world.note("\(name) \(powerLoss ? "loses power" : "is killed")")
        world.figures.crashes += 1
        for volume in volumes { volume.crash(&world.random) }
        (volumes, session, servesHosts, isAdmitting) = ([], 0, false, false)
        life += 1
        replicator.die()
        comparisons.die()
        fullUntil = 0  // a start would wait for the operator
        executor.die()
        if powerLoss {
            for file in files { file.losePower(&world.random) }
            loseState()
        }
        if stateFails {
            // It comes back as it was.
            if !powerLoss { loseState() }
            setState(fails: false)
        }
        world.siteWasLost(self, powerLoss: powerLoss)
    }

    private func loseState() {
        unconfirmed = Set(0..<World.volumes)
        for file in stateFiles { file.losePower(&world.random) }
        for bitmap in stateBitmaps { bitmap.losePower(&world.random) }
    }

    private var stateFiles: [SimulatedFile] {
        logs + targets + copies.flatMap { copies in copies.keys.sorted().map { copies[$0]!.0 } }
    }
    private var stateBitmaps: [SimulatedBitmap] {
        preserved + recording.flatMap(\.parts) + restores + intermediates.bitmaps
            + copies.flatMap { copies in copies.keys.sorted().map { copies[$0]!.1 } }
    }

    /// Dirty pages reach the disk, flushed or not.
    func writeBack() {
        for file in files + stateFiles { file.writeBack(&world.random) }
        for bitmap in stateBitmaps { bitmap.writeBack(&world.random) }
    }

    // MARK: Trouble

    /// Takes nothing any more, while the volumes' own disk is well. Hosts were quiet before: the log has few regions.
    func failState() {
        for volume in volumes + volumes {
            volume.volume.sweepActivity()
            volume.pump()
            for _ in 0..<200 where !volume.pending.isEmpty { volume.step(&world.random) }
        }
        world.note("\(name)'s state disk fails")
        setState(fails: true)
    }

    func setState(fails: Bool) {
        stateFails = fails
        for file in stateFiles { file.isDead = fails }
        for bitmap in stateBitmaps { bitmap.isDead = fails }
    }

    func endTrouble() {
        setState(fails: false)
        fullUntil = 0
        for file in files { file.latent = [] }
        for target in targets { target.spaceLeft = nil }
        for copies in copies { for (file, _) in copies.values { file.spaceLeft = nil } }
    }

    // MARK: Events of its volumes

    func collectEvents() {
        for index in volumes.indices {
            for event in volumes[index].takeEvents() {
                world.note("\(name): \(event)")
                carryOut(event, index)
            }
        }
    }

    private func carryOut(_ event: VolumeEvent, _ index: Int) {
        let process = life
        switch event {
        case .pointGivenUp(let number, _):
            world.tasks.append { [unowned self] in
                if process == life { replicator.handle(.pointLost("a volume could not hold it", number: number)) }
            }
        case .imagesWanted:
            world.tasks.append { [unowned self] in
                if process == life { replicator.handle(.move(.wanted(volume: index))) }
            }
        case .activityLogFailed: distrust(index)
        case .copyWithdrawn(let id): copies[index][id] = nil
        case .copyFailed(let id, _), .failureUnwritten(let id, _):
            guard id < CopyTable.firstID else {
                if case .failureUnwritten = event { volumes[index].volume.failureIsWritten() }
                return
            }
            // The disk that is full has the record as well.
            if !world.isQuiet, world.random.chance(30) { fullUntil = world.steps + world.random.below(600) }
            _ = take(.pointFailed(UInt64(id), volume: "\(index)"))
            if case .failureUnwritten = event { volumes[index].volume.failureIsWritten() }
            settleChains()
        case .intermediateFilled: intermediates.wasFilled(index)
        case .restoreFinished: _ = take(.restored(volume: "\(index)"))
        default: break
        }
    }

    /// The volume's own file knows before its hosts go on.
    private func distrust(_ index: Int) {
        let process = life
        world.tasks.append { [unowned self] in
            guard process == life else { return }
            if fault != .goOnUnlogged { distrusted.insert(index) }
            replicator.post(index) { $0.volume.distrustActivityLog() }
        }
    }
}
