// World.swift: two sites, hosts that write dependent data, a link, and faults, all in the order that a seed gives.
//
// The engine (`Volume`), the cycle and the drain are the production code. What stands in for the rest: reactors and
// their mailboxes (messages in order for each volume), the link (sends arrive and are acknowledged in any order), and what the
// actions of `Steps` do to files and volumes.

import Base
import Groups
import Volumes

/// What a step may do.
private enum Happening: CaseIterable {
    case host, eastIO, westIO, message, task, killEast, eastPower, killWest, westPower, linkLoss, partition, trouble,
        read, sweep, writeBack

    /// Out of about ten thousand.
    var usualWeight: Int {
        switch self {
        case .host: 1500
        case .eastIO: 3000
        case .westIO: 2500
        case .message: 1200
        case .task: 1700
        case .killEast, .killWest: 5
        case .eastPower: 3
        case .westPower: 7
        case .linkLoss: 8
        case .partition: 2
        case .trouble: 4
        case .sweep, .writeBack: 20
        case .read: 70
        }
    }

    var isFault: Bool {
        switch self {
        case .killEast, .eastPower, .killWest, .westPower, .linkLoss, .partition, .trouble: true
        default: false
        }
    }
}

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

package final class World: Scenario {
    static let grain = 4096
    static let grains = 24
    static let size = grains * grain
    static let volumes = 2
    static let regionBytes: UInt64 = 8192
    static let chains = 4

    var random: SeededGenerator
    /// Each seed has its own mix: some disks are slow, some links bad, some hosts busy.
    private let weights: [Int]
    private let quietWeights: [Int]
    /// One of so many saves of a record fails; 0 = none.
    private let failingSaves: Int
    /// Faults are over.
    private var isQuiet = false
    let fault: DeliberateFault?
    var now: UInt64 = 0
    package private(set) var trace: [String] = []
    package private(set) var steps = 0
    package internal(set) var figures = SimulationFigures()

    // East: files and metadata outlive its processes.
    var eastFiles: [SimulatedFile] = []
    var eastRecording: [RecordingFile] = []
    var eastTargets: [SimulatedFile] = []
    var eastPreserved: [SimulatedBitmap] = []
    var eastLogs: [SimulatedFile] = []
    /// In its file; the group has what the process believes.
    private(set) var eastSaved = GroupRecord.first(.primary, identity: "east")
    /// What the bitmaps and logs say is this run's: a start came to its end since power was lost.
    private var eastIsConfirmed = true
    /// The disk under all of these but the volumes takes nothing any more.
    private var eastStateFails = false
    /// Volumes whose own file says that their bitmaps and log are not to be relied on.
    private var eastDistrusted: Set<Int> = []
    var east: [SimulatedVolume] = []
    private var eastGroup = Group(record: .first(.primary, identity: "east"))
    private var mailboxes: [[() -> Void]] = []
    private var targetFiles: [StoreFile] = []

    // West.
    var westFiles: [SimulatedFile] = []
    var westRecording: [RecordingFile] = []
    /// Used once west is primary.
    var westLogs: [SimulatedFile] = []
    var westCopies: [[CopyID: (SimulatedFile, SimulatedBitmap)]] = []
    /// As the process believes, and in its file.
    var westGroup = Group(record: .first(.secondary, identity: "west"))
    private var westSaved = GroupRecord.first(.secondary, identity: "west")
    var westRecord: GroupRecord { westGroup.record }
    var westPoints: [UInt64] { westRecord.points.map(\.number) }
    /// What must come back from the point that was failed over to.
    var westRestores: [SimulatedBitmap] = []
    var westOrder = CopyRecord.orderStep
    var west: [SimulatedVolume] = []
    private(set) var westLife = 0
    /// An operation is under way there.
    var westIsBusy = false
    /// Steps of an operation there, which go on when the primary dies.
    var westTasks: [() -> Void] = []
    var session: UInt64 = 0
    /// The session that the primary's connections belong to.
    private var linkSession: UInt64 = 0

    // The link and everything else that takes time: run in any order.
    var tasks: [() -> Void] = []
    private var epoch: UInt64 = 0
    /// Nothing reaches the other site before this step.
    private var partitionedUntil = 0
    /// A site that was restarted loses power at this step: what the last process left is hardly used yet.
    private var relapse: (step: Int, atEast: Bool)?
    private var copyBuffers: CopyBuffers
    private let copyMemory: UnsafeMutableRawPointer

    var hosts: Hosts
    /// The end of each volume, which hosts leave as the first primary had it.
    private var still: [ArraySlice<UInt8>] = []
    var remembered: [UInt64: [[UInt8]]] = [:]
    private var failure: SimulationFailure?

    package init(seed: UInt64, fault: DeliberateFault? = nil) {
        var generator = SeededGenerator(seed: seed)
        weights = Happening.allCases.map { happening in
            let factors = happening.isFault ? [0, 1, 2, 5] : [1, 2, 4, 8]
            return happening.usualWeight * factors[generator.below(4)]
        }
        quietWeights = Happening.allCases.map { $0.isFault ? 0 : $0.usualWeight }
        failingSaves = [0, 40, 12, 5][generator.below(4)]
        random = generator
        self.fault = fault
        copyMemory = .allocate(byteCount: 16 << 20, alignment: 4096)
        copyBuffers = CopyBuffers(pool: BufferPool(base: copyMemory, size: 8 << 20))
        hosts = Hosts(chains: Self.chains)
        for index in 0..<Self.volumes {
            eastFiles.append(SimulatedFile(byteCount: Self.size))
            eastTargets.append(SimulatedFile(byteCount: Self.size))
            eastPreserved.append(SimulatedBitmap(bits: Self.grains))
            eastLogs.append(Self.newLog())
            eastRecording.append(RecordingFile(grains: Self.grains))
            westFiles.append(SimulatedFile(byteCount: Self.size))
            westRecording.append(RecordingFile(grains: Self.grains))
            westLogs.append(Self.newLog())
            westCopies.append([:])
            westRestores.append(SimulatedBitmap(bits: Self.grains))
            // The sites have nothing in common: what a first copy forgets is seen.
            eastFiles[index].fill(&random)
            westFiles[index].fill(&random)
            still.append(eastFiles[index].cached.suffix(Hosts.stillGrains * Self.grain))
        }
        startWest()
        startEast()
    }

    deinit {
        for volume in east + west { volume.crash(&random) }
        east = []
        west = []
        copyMemory.deallocate()
    }

    static func newLog() -> SimulatedFile { SimulatedFile(byteCount: ActivityLog.fileOffset + 4096) }

    func note(_ text: @autoclosure () -> String) {
        trace.append("\(steps): \(text())")
        if trace.count > 400 { trace.removeFirst(200) }
    }

    // MARK: Starting and crashing

    private func makeVolume(_ source: SimulatedFile, _ recording: RecordingFile) -> SimulatedVolume {
        let volume = SimulatedVolume(
            volume: Volume(
                geometry: Geometry(size: UInt64(Self.size), grain: Self.grain)!,
                bitmaps: (recording.first.bitmap(Self.grains), recording.second.bitmap(Self.grains)),
                roles: recording.roles, copyBuffers: copyBuffers, requestCapacity: 48, smallestRegion: Self.regionBytes,
                faults: fault?.engine ?? []))
        _ = volume.addStore(.file(source))
        return volume
    }

    /// Starts the primary, as often as it takes: a start may end between any two of its steps.
    func startEast() {
        while !tryStartEast(endingAt: !isQuiet && random.chance(15) ? random.below(Self.volumes + 2) : nil) {
            loseEast(powerLoss: random.chance(50))
        }
        events = []
        let ready = eastGroup.begin(
            Cycle.Settings(interval: .continuous, volumes: Self.volumes, window: 4, checkpointBytes: 4))
        eastGroup.adapt(windowLimit: 1 + random.below(4), checkpointBytes: 4)
        performing = true
        perform(ready)
        performing = false
    }

    /// - Parameter last: the step before which it ends; nil = it goes through.
    private func tryStartEast(endingAt last: Int?) -> Bool {
        east = []
        let trusted = eastIsConfirmed && eastDistrusted.isEmpty
        if fault == .confirmPrimaryEarly { eastIsConfirmed = true }
        if last == 0 { return false }
        eastGroup = Group(record: eastSaved)
        let held = eastRecording.map { trusted ? $0.roles.pointee.heldPoint : nil }
        if eastGroup.record.mustGiveUpPoint(heldBy: held), !changeEast(.pointGivenUp) { return false }
        copyBuffers = CopyBuffers(pool: BufferPool(base: copyMemory, size: 8 << 20))
        targetFiles = []
        mailboxes = Array(repeating: [], count: Self.volumes)
        epoch += 1
        for index in 0..<Self.volumes {
            if last == index + 1 { return false }
            let simulated = makeVolume(eastFiles[index], eastRecording[index])
            let target = simulated.addStore(.file(eastTargets[index]))
            targetFiles.append(target)
            simulated.volume.recording = true
            startLog(simulated, eastLogs[index], eastRecording[index], trusted)
            if eastDistrusted.contains(index) { simulated.volume.markAllChanged() }
            if let held = eastGroup.record.held?.number {
                simulated.volume.resumePoint(
                    number: held, targetFile: target,
                    preserved: eastPreserved[index].bitmap(Self.grains))
            } else {
                simulated.volume.mergeOutOfSync()
            }
            east.append(simulated)
        }
        if last == Self.volumes + 1 { return false }
        // As `VolumeState.confirm`: what hosts wrote while nothing was logged is on no stable storage, and was perhaps sent.
        if !trusted { for file in eastFiles { file.flush() } }
        for recording in eastRecording { recording.flush() }
        eastIsConfirmed = true
        eastDistrusted = []
        return true
    }

    func startLog(
        _ simulated: SimulatedVolume, _ log: SimulatedFile, _ recording: RecordingFile, _ trusted: Bool
    ) {
        let regions = SimulatedBitmap(bits: 64)
        let layout = ActivityLog.layout(size: UInt64(Self.size), smallest: Self.regionBytes)
        let region = Bitmap(memory: regions.memory, count: layout.count)
        let (bitmapFile, logFile) = (
            simulated.addStore(.bitmaps(recording.parts)), simulated.addStore(.file(log))
        )
        log.cached.withUnsafeBytes { bytes in
            let contents = UnsafeRawBufferPointer(rebasing: bytes[ActivityLog.fileOffset...])
            _ = ActivityLog.decode(contents, into: region)
            simulated.volume.startActivityLog(file: logFile, contents: contents, recordingFile: bitmapFile)
        }
        if !trusted, fault != .trustBitmapsAfterPowerLoss { simulated.volume.recoverChanges(regions: region) }
    }

    func startWest() {
        westLife += 1
        westIsBusy = false
        westGroup = Group(record: westSaved)
        // What was made for a point that no record names.
        for index in 0..<Self.volumes {
            let known = westPoints + (westRecord.retired ?? []).map(\.number)
            for id in westCopies[index].keys where !known.contains(UInt64(id)) { westCopies[index][id] = nil }
        }
        west = []
        copyBuffers = CopyBuffers(pool: BufferPool(base: copyMemory + (8 << 20), size: 8 << 20))
        session = 0
        for index in 0..<Self.volumes {
            let simulated = makeVolume(westFiles[index], westRecording[index])
            simulated.volume.policy = .copiesFirst
            simulated.skipFlushes = fault == .skipFlushes
            simulated.volume.beginResuming()
            let retired = (westRecord.retired ?? []).map(\.number).filter { westCopies[index][CopyID($0)] != nil }
            for point in retired + westPoints { addPoint(point, to: simulated, index, resume: true) }
            for point in retired { simulated.volume.withdrawCopy(CopyID(point)) }
            simulated.volume.finishResuming()
            west.append(simulated)
        }
    }

    func addPoint(_ point: UInt64, to simulated: SimulatedVolume, _ index: Int, resume: Bool) {
        let id = CopyID(point)
        let files = westCopies[index][id] ?? (SimulatedFile(byteCount: Self.size), SimulatedBitmap(bits: Self.grains))
        westCopies[index][id] = files
        // A bit that only the killed process's mapping had must be durable before a write relies on it.
        if resume, fault != .trustUnflushedBits { files.1.flush() }
        let copy = FlashCopy(
            id: id, targetFile: simulated.addStore(.file(files.0)),
            bitmapFile: simulated.addStore(.bitmap(files.1)), preserved: files.1.bitmap(Self.grains),
            durable: true)
        if resume { simulated.volume.resumeCopy(copy, failed: false) } else { simulated.volume.addCopy(copy) }
    }

    private func crashSite(atEast: Bool, powerLoss: Bool) {
        atEast ? crashEast(powerLoss: powerLoss) : crashWest(powerLoss: powerLoss)
        if random.chance(40) { relapse = (steps + random.below([20, 300, 1500][random.below(3)]), atEast) }
    }

    private func crashEast(powerLoss: Bool) {
        loseEast(powerLoss: powerLoss)
        tasks = []
        startEast()
    }

    func loseEast(powerLoss: Bool) {
        note("east \(powerLoss ? "loses power" : "is killed")")
        figures.crashes += 1
        for volume in east { volume.crash(&random) }
        east = []
        if powerLoss {
            for file in eastFiles { file.losePower(&random) }
            loseEastState()
        }
        if eastStateFails {
            // It comes back as it was.
            if !powerLoss { loseEastState() }
            setEastState(fails: false)
        }
        hosts.lostServer(eastFiles.map(\.cached), powerLoss: powerLoss)
    }

    private func loseEastState() {
        eastIsConfirmed = false
        for file in eastLogs + eastTargets { file.losePower(&random) }
        for bitmap in eastPreserved + eastRecording.flatMap(\.parts) { bitmap.losePower(&random) }
    }

    /// It takes nothing any more, while the volumes' own disk is well. Hosts were quiet before: the log has few regions.
    private func failEastState() {
        for volume in east + east {
            volume.volume.sweepActivity()
            volume.pump()
            for _ in 0..<200 where !volume.pending.isEmpty { volume.step(&random) }
        }
        note("east's state disk fails")
        setEastState(fails: true)
        relapse = (steps + random.below([100, 600, 3000][random.below(3)]), true)
    }

    private func setEastState(fails: Bool) {
        eastStateFails = fails
        for file in eastLogs + eastTargets { file.isDead = fails }
        for bitmap in eastPreserved + eastRecording.flatMap(\.parts) { bitmap.isDead = fails }
    }

    private func crashWest(powerLoss: Bool) {
        restartWest(powerLoss: powerLoss)
        loseLink()
    }

    func restartWest(powerLoss: Bool) {
        note("west \(powerLoss ? "loses power" : "is killed")")
        figures.crashes += 1
        for volume in west { volume.crash(&random) }
        if powerLoss {
            for file in westFiles + westLogs { file.losePower(&random) }
            for copies in westCopies {
                for id in copies.keys.sorted() {
                    copies[id]!.0.losePower(&random)
                    copies[id]!.1.losePower(&random)
                }
            }
            for bitmap in westRecording.flatMap(\.parts) + westRestores { bitmap.losePower(&random) }
        }
        startWest()
    }

    private func loseLink() {
        let sender = epoch
        tasks.append { [unowned self] in event(.linkLost("the link broke"), sender) }
    }

    // MARK: The primary's replicator

    private func event(_ event: Cycle.Event, _ sender: UInt64) {
        guard sender == epoch else { return }
        handle(event)
    }

    private var events: [Cycle.Event] = []
    private var performing = false

    private func handle(_ event: Cycle.Event) {
        events.append(event)
        guard !performing else { return }
        performing = true
        while !events.isEmpty { perform(eastGroup.handle(events.removeFirst(), now: now)) }
        performing = false
    }

    /// - Returns: whether the record was saved, or need not be.
    @discardableResult
    private func perform(_ ready: Ready, ofCycle: Bool = true) -> Bool {
        for action in ready.before { perform(action) }
        if ready.saves {
            guard !eastStateFails, save(eastGroup.record, to: &eastSaved) else {
                note("east cannot save its record")
                perform(eastGroup.saveFailed("no space", ofCycle: ofCycle, now: now))
                return false
            }
            eastGroup.wasSaved()
        }
        for action in ready.after { perform(action) }
        return true
    }

    private func changeEast(_ change: GroupChange) -> Bool {
        guard let ready = try? eastGroup.change(change) else { return false }
        return perform(ready, ofCycle: false)
    }

    /// A save that fails may have reached the file all the same.
    private func save(_ next: GroupRecord, to file: inout GroupRecord) -> Bool {
        guard failingSaves > 0, !isQuiet, random.below(failingSaves) == 0 else {
            file = next
            return true
        }
        if random.chance(50) { file = next }
        return false
    }

    /// Both sites' records, in memory and on disk.
    func setRecords(east: GroupRecord, west: GroupRecord) {
        (eastSaved, westSaved) = (east, west)
        (eastGroup, westGroup) = (Group(record: east), Group(record: west))
    }

    func saveWest(_ ready: Ready?) -> Bool {
        guard let ready, ready.saves else { return ready != nil }
        guard save(westGroup.record, to: &westSaved) else {
            _ = westGroup.saveFailed("no space", ofCycle: false, now: now)
            return false
        }
        westGroup.wasSaved()
        return true
    }

    private func perform(_ action: Cycle.Action) {
        switch action {
        case .openSession:
            epoch += 1
            openSession(epoch)
        case .closeLink: epoch += 1
        case .prepare: prepare()
        case .form(let number): form(number)
        case .rewind:
            epoch += 1
            for index in 0..<Self.volumes { post(index) { $0.volume.rewindDrain() } }
        case .drain(let action): perform(action)
        case .commit(let number, let previous, _): commit(number, previous)
        case .endPoint(let number):
            for index in 0..<Self.volumes { post(index) { $0.volume.endPoint(number: number) } }
        case .giveUp:
            epoch += 1
            let sender = epoch
            note("the point is given up")
            everyVolume(
                { $0.volume.giveUpPoint() }, then: { [unowned self] in event(.gaveUp, sender) })
        case .markAllChanged(_): markAllChanged()
        }
    }

    private func markAllChanged() {
        let sender = epoch
        let forgets = fault == .forgetFirstCopy
        everyVolume(
            { if !forgets { $0.volume.markAllChanged() } },
            then: { [unowned self] in
                // The record relies on the marks, and outlives power loss.
                let failed = fault != .relyOnUnflushedMarks && eastRecording.map({ $0.flush() }).contains { $0 != 0 }
                event(failed ? .linkLost("the marks cannot be flushed") : .allMarked, sender)
            })
    }

    /// Leaves a message for the volume's reactor; messages for one volume are taken in order.
    private func post(_ index: Int, _ body: @escaping (SimulatedVolume) -> Void) {
        let process = east[index]
        mailboxes[index].append {
            body(process)
            process.pump()
        }
    }

    private func everyVolume(_ body: @escaping (SimulatedVolume) -> Void, then done: @escaping () -> Void) {
        var left = Self.volumes
        for index in 0..<Self.volumes {
            post(index) { volume in
                body(volume)
                left -= 1
                if left == 0 { done() }
            }
        }
    }

    private func prepare() {
        let sender = epoch
        let clear: () -> Void = { [unowned self] in
            guard sender == epoch else { return }
            guard east.allSatisfy({ $0.volume.mayFormPoint }) else { return handle(.notReady) }
            for bitmap in eastPreserved { bitmap.bitmap(Self.grains).clearAll() }
            handle(.prepared(changed: east.contains { $0.volume.changedGrains > 0 }))
        }
        if fault == .prepareWithoutBarrier { return tasks.append(clear) }
        everyVolume({ _ in }, then: { [unowned self] in tasks.append(clear) })
    }

    private func form(_ number: UInt64) {
        let sender = epoch
        note("point \(number) forms")
        let early = fault == .releaseEarly
        everyVolumeIndexed(
            { [unowned self] index, volume in
                volume.volume.formPoint(
                    number: number, targetFile: targetFiles[index],
                    preserved: eastPreserved[index].bitmap(Self.grains))
                if early { volume.volume.releaseHold() }
            },
            then: { [unowned self] in
                everyVolume(
                    { $0.volume.releaseHold() },
                    then: { [unowned self] in
                        tasks.append { [unowned self] in event(.formed(at: Double(now), intact: true), sender) }
                    })
            })
    }

    private func everyVolumeIndexed(_ body: @escaping (Int, SimulatedVolume) -> Void, then done: @escaping () -> Void) {
        var left = Self.volumes
        for index in 0..<Self.volumes {
            post(index) { volume in
                body(index, volume)
                left -= 1
                if left == 0 { done() }
            }
        }
    }

    private func perform(_ action: Drain.Action) {
        let sender = epoch
        switch action {
        case .read(let slot, let index):
            guard let point = eastGroup.record.held?.number else { return }
            post(index) { [unowned self] volume in drainRead(slot, volume, point, sender) }
        case .send: break  // follows the read at once; see drainRead
        case .flush: flush(sender)
        case .clear(let runs):
            guard let point = eastGroup.record.held?.number else { return }
            for run in runs { post(run.volume) { $0.volume.clearOutOfSync(run.grains, point: point) } }
        case .finished: break
        }
    }

    private func drainRead(_ slot: Int, _ volume: SimulatedVolume, _ point: UInt64, _ sender: UInt64) {
        guard volume.volume.point?.number == point, sender == epoch else { return }
        guard let grains = volume.volume.nextOutOfSync(limit: 1 + random.below(4)) else {
            tasks.append { [unowned self] in event(.read(slot: slot, grains: nil, offset: 0, length: 0), sender) }
            return
        }
        let range = volume.volume.geometry.byteRange(grains)
        let (offset, length) = (Int(range.lowerBound), Int(range.upperBound - range.lowerBound))
        let index = east.firstIndex { $0 === volume }!
        let submitted = volume.submit(.read, view: .point, offset: offset, length: length) { [unowned self] request in
            guard request.error == 0 else {
                return tasks.append { [unowned self] in event(.pointLost("it cannot be read"), sender) }
            }
            let data = Array(UnsafeRawBufferPointer(start: request.buffer, count: length))
            tasks.append { [unowned self] in
                guard sender == epoch else { return }
                handle(.read(slot: slot, grains: grains, offset: UInt64(offset), length: length))
                if fault == .clearEarly { post(index) { $0.volume.clearOutOfSync(grains, point: point) } }
                send(slot, index, offset, data, sender)
            }
        }
        if !submitted {
            volume.volume.returnOutOfSync(from: grains.lowerBound)
            post(index) { [unowned self] volume in drainRead(slot, volume, point, sender) }
        }
    }

    // MARK: The link and the secondary

    private func openSession(_ sender: UInt64) {
        tasks.append { [unowned self] in
            guard sender == epoch else { return }
            guard steps >= partitionedUntil else { return loseSession(sender) }
            // Sessions, commits and failovers come one after the other.
            guard !westIsBusy else { return openSession(sender) }
            let asked = IntakeSession(
                site: "east", generations: eastGroup.record.generations, session: random.next() | 1)
            runWest(asked) { [unowned self] answer in
                guard case .success(let opened) = answer else { return loseSession(sender) }
                tasks.append { [unowned self] in
                    if sender == epoch { linkSession = opened }
                    event(
                        .sessionOpened(
                            PeerState(
                                session: opened, site: "west", lineage: "west", committed: westRecord.points.last)),
                        sender)
                }
            }
        }
    }

    private func loseSession(_ sender: UInt64) {
        tasks.append { [unowned self] in event(.sessionFailed("the peer is gone", retry: true), sender) }
    }

    private func send(_ slot: Int, _ index: Int, _ offset: Int, _ data: [UInt8], _ sender: UInt64) {
        let opened = linkSession
        tasks.append { [unowned self] in
            // The session's end closes its connections: what has not arrived never does.
            guard session == opened else { return event(.linkLost("the connection is closed"), sender) }
            let zero = !data.contains { $0 != 0 }
            let accepted = west[index].submit(
                zero ? .writeZeroes : .write, offset: offset, length: data.count, data: zero ? nil : data
            ) { [unowned self] request in
                let failed = request.error != 0
                tasks.append { [unowned self] in
                    event(failed ? .linkLost("the peer failed") : .sent(slot: slot, wire: 1), sender)
                }
            }
            if !accepted { send(slot, index, offset, data, sender) }
        }
        if fault == .commitEarly { event(.sent(slot: slot, wire: 1), sender) }
    }

    private func flush(_ sender: UInt64) {
        let opened = linkSession
        if fault == .acknowledgeFlushEarly {
            tasks.append { [unowned self] in event(.flushed, sender) }
            return
        }
        var left = Self.volumes
        for index in 0..<Self.volumes {
            tasks.append { [unowned self] in
                flushOne(index, opened) { [unowned self] in
                    left -= 1
                    if left == 0 { tasks.append { [unowned self] in event(.flushed, sender) } }
                }
            }
        }
    }

    private func flushOne(_ index: Int, _ opened: UInt64, done: @escaping () -> Void) {
        guard session == opened else { return }
        if !west[index].submit(.flush, offset: 0, length: 0, done: { _ in done() }) {
            tasks.append { [unowned self] in flushOne(index, opened, done: done) }
        }
    }

    private func commit(_ number: UInt64, _ previous: UInt64?) {
        let sender = epoch
        let opened = linkSession
        tasks.append { [unowned self] in
            guard session == opened, steps >= partitionedUntil, !westIsBusy else { return loseLink() }
            let asked = RemoteCommit(
                number: number, after: previous, formedAt: 0, keep: Retention(last: 4), session: opened)
            runWest(asked) { [unowned self] answer in
                switch answer {
                case .success: answerCommit(sender)
                case .failure(let refusal as TakeoverRefusal):
                    failure = SimulationFailure("a commit is refused: \(refusal)")
                case .failure: tasks.append { [unowned self] in event(.linkLost("the commit failed"), sender) }
                }
            }
        }
    }

    private func answerCommit(_ sender: UInt64) {
        // The answer may be lost.
        if random.chance(5) { return loseLink() }
        tasks.append { [unowned self] in event(.committed(at: Double(now)), sender) }
    }

    // MARK: Running

    /// Runs `count` steps with faults. Then either everything settles and the sites are compared, or the secondary
    /// takes over from wherever it is; the seed decides.
    package func run(steps count: Int, skipping skipped: Set<Int>) throws(SimulationFailure) {
        let seed = random.next()
        for index in 0..<count where !skipped.contains(index) {
            steps = index
            random = SeededGenerator(seed: seed &+ UInt64(index) &* 0x9E37_79B9)
            try step(faults: true)
        }
        random = SeededGenerator(seed: ~seed)
        let settles = random.chance(50)
        if settles { try settle() }
        if fault == nil || !settles {
            try failOver()
            try failBack(steps: count / 4)
        }
    }

    func step(faults: Bool) throws(SimulationFailure) {
        steps += 1
        figures.steps += 1
        isQuiet = !faults
        now += UInt64(random.below(20_000_000))
        handle(.tick)
        if faults, let next = relapse, steps >= next.step {
            relapse = nil
            next.atEast ? crashEast(powerLoss: true) : crashWest(powerLoss: true)
        }
        switch choose(faults) {
        case .host:
            figures.operations += 1
            hosts.act(self)
        case .eastIO: east[random.below(Self.volumes)].step(&random)
        case .westIO: west[random.below(Self.volumes)].step(&random)
        case .message: takeMessage()
        case .task: takeTask()
        case .killEast: crashSite(atEast: true, powerLoss: false)
        case .eastPower: crashSite(atEast: true, powerLoss: true)
        case .killWest: crashSite(atEast: false, powerLoss: false)
        case .westPower: crashSite(atEast: false, powerLoss: true)
        case .linkLoss: loseLink()
        case .partition:
            partitionedUntil = steps + random.below(800)
            loseLink()
        case .trouble: makeTrouble()
        case .read: readPoint()
        case .sweep:
            for volume in east {
                volume.volume.sweepActivity()
                volume.pump()
            }
        case .writeBack: writeBack()
        }
        collectEvents()
        if let failure { throw failure }
    }

    private func choose(_ faults: Bool) -> Happening {
        let weights = faults ? weights : quietWeights
        var left = random.below(weights.reduce(0, +))
        for (happening, weight) in zip(Happening.allCases, weights) {
            if left < weight { return happening }
            left -= weight
        }
        return .task
    }

    private func takeMessage() {
        let index = random.below(Self.volumes)
        if !mailboxes[index].isEmpty { mailboxes[index].removeFirst()() }
    }

    private func takeTask() {
        if !westTasks.isEmpty, random.chance(30) { return westTasks.removeFirst()() }
        guard !tasks.isEmpty else { return }
        tasks.remove(at: random.below(tasks.count))()
    }

    /// Dirty pages of both sites reach the disk, flushed or not.
    private func writeBack() {
        for file in eastFiles + eastTargets + westFiles { file.writeBack(&random) }
        for bitmap in eastPreserved + (eastRecording + westRecording).flatMap(\.parts) { bitmap.writeBack(&random) }
        for copies in westCopies {
            for id in copies.keys.sorted() {
                copies[id]!.0.writeBack(&random)
                copies[id]!.1.writeBack(&random)
            }
        }
    }

    /// A target that is full or fails, a sector that cannot be read: for a while.
    private func makeTrouble() {
        switch random.below(5) {
        case 0: eastTargets[random.below(Self.volumes)].spaceLeft = random.below(40)
        case 1: eastFiles[random.below(Self.volumes)].latent.insert(random.below(Self.size / SimulatedFile.sector))
        case 2:
            let copies = westCopies[random.below(Self.volumes)]
            if let id = copies.keys.sorted().last { copies[id]!.0.spaceLeft = random.below(20) }
        case 3: failEastState()
        default: endTrouble()
        }
    }

    func endTrouble() {
        setEastState(fails: false)
        for file in eastFiles { file.latent = [] }
        for target in eastTargets { target.spaceLeft = nil }
        for copies in westCopies { for (file, _) in copies.values { file.spaceLeft = nil } }
    }

    private func collectEvents() {
        for index in east.indices {
            for event in east[index].takeEvents() {
                note("east: \(event)")
                switch event {
                case .pointGivenUp: tasks.append { [unowned self] in handle(.pointLost("a volume could not hold it")) }
                case .activityLogFailed: distrust(index)
                default: break
                }
            }
        }
        for volume in west {
            for case .copyWithdrawn(let id) in volume.takeEvents() {
                let index = west.firstIndex { $0 === volume }!
                westCopies[index][id] = nil
            }
        }
    }

    /// The volume's own file knows before its hosts go on.
    private func distrust(_ index: Int) {
        let process = east[index]
        tasks.append { [unowned self] in
            guard east.indices.contains(index), east[index] === process else { return }
            if fault != .goOnUnlogged { eastDistrusted.insert(index) }
            post(index) { $0.volume.distrustActivityLog() }
        }
    }

    /// Reads one recovery point of both volumes in full, while everything goes on.
    private func readPoint() {
        guard let point = westPoints.randomElement(using: &random) else { return }
        let process = west
        var images: [[UInt8]?] = [nil, nil]
        for index in 0..<Self.volumes {
            guard process[index].volume.retainCopy(CopyID(point)) else { return }
            _ = process[index].submit(.read, view: .copy(CopyID(point)), offset: 0, length: Self.size) {
                [unowned self] request in
                process[index].volume.releaseCopy(CopyID(point))
                guard request.error == 0 else { return }
                images[index] = Array(UnsafeRawBufferPointer(start: request.buffer, count: Self.size))
                if let first = images[0], let second = images[1] { check(point, [first, second]) }
            }
        }
    }

    private func check(_ point: UInt64, _ images: [[UInt8]]) {
        figures.checks += 1
        if let before = remembered[point], before != images {
            failure = SimulationFailure("point \(point) has changed since it was read before")
            return
        }
        if westPoints.contains(point) { remembered[point] = images }
        for index in 0..<Self.volumes where images[index].suffix(still[index].count) != still[index] {
            failure = SimulationFailure("point \(point) lacks what was there at first in volume \(index)")
            return
        }
        if let problem = hosts.brokenCut(images) {
            failure = SimulationFailure("point \(point) is no closed cut: \(problem)")
        }
    }

    /// No more faults: hosts stop, everything under way ends, a last point holds all that was acknowledged.
    func settle() throws(SimulationFailure) {
        hosts.stopped = true
        endTrouble()
        partitionedUntil = 0
        let deadline = steps + 200_000
        while !hosts.isIdle(self) {
            try step(faults: false)
            guard steps < deadline else { throw SimulationFailure("hosts wait for ever") }
        }
        let wanted = eastGroup.nextNumber + 1
        while westPoints.last ?? 0 < wanted {
            try step(faults: false)
            guard steps < deadline else {
                throw SimulationFailure(
                    "no point is committed any more: \(eastGroup.shownState) \(eastGroup.cycle?.suspension ?? "")\(stuckState)"
                )
            }
        }
        while west.contains(where: { $0.volume.copy(CopyID(westPoints.last!)) == nil }) { try step(faults: false) }
        try compareSites(westPoints.last!)
    }

    private var stuckState: String {
        let volumes = east.map {
            "point \($0.volume.point?.number ?? 0) oos \($0.volume.outOfSyncGrains) ready \($0.volume.mayFormPoint) requests \($0.volume.requestsInUse) io \($0.pending.count)"
        }
        return
            " \(eastGroup.cycle!.state), east \(volumes), west \(west.map(\.volume.modifyingInFlight)), tasks \(tasks.count)"
    }

    private func compareSites(_ point: UInt64) throws(SimulationFailure) {
        var images: [[UInt8]?] = Array(repeating: nil, count: Self.volumes)
        for index in 0..<Self.volumes {
            var submitted = false
            while images[index] == nil {
                if !submitted {
                    submitted = west[index].submit(.read, view: .copy(CopyID(point)), offset: 0, length: Self.size) {
                        request in
                        images[index] = Array(UnsafeRawBufferPointer(start: request.buffer, count: Self.size))
                    }
                }
                west[index].step(&random)
            }
            guard images[index]! == eastFiles[index].cached else {
                let grain = (0..<Self.grains).first {
                    images[index]![$0 * Self.grain..<($0 + 1) * Self.grain]
                        != eastFiles[index].cached[$0 * Self.grain..<($0 + 1) * Self.grain]
                }!
                throw SimulationFailure("grain \(grain) of volume \(index) differs at the end: a change was forgotten")
            }
        }
    }
}
