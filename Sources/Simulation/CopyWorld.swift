// CopyWorld.swift: one volume with its FlashCopies: hosts that write to the volume and to copies, an operator who takes,
// clones, refreshes, restores and withdraws them, full and failing targets, unreadable sectors, crashes and power loss.
//
// The engine is the production code, and so is what a record means after a restart (`CopyRecord.resume`). The operator's
// steps are those of Site/FlashCopies.swift and FlashCopyChanges.swift, each record a step of its own.
//
// Must hold: a host write to the volume succeeds; every copy that says that it is active reads as its moment, with what
// was written to it since; the target of a finished background copy is that image by itself; a grain in which the volume
// differs from a copy counts as changed; after power loss every grain that changed since the last flush of the bitmaps is in
// them or in the activity log.

import Base
import Volumes

package final class CopyWorld: Scenario {
    static let grain = 4096
    static let size = 11 * grain + 1536
    static let sectors = size / SimulatedFile.sector
    static let grains = 12
    static let regionBytes: UInt64 = 8192

    var random: SeededGenerator
    private let weights: [Int]
    let engineFaults: EngineFaults
    let fault: DeliberateFault?
    package private(set) var trace: [String] = []
    package private(set) var steps = 0
    package private(set) var figures = SimulationFigures()
    private var failure: SimulationFailure?

    // What outlives the process.
    private var source = SimulatedFile(byteCount: CopyWorld.size)
    private var recording = SimulatedBitmap(bits: 128)
    private var roles = UnsafeMutablePointer<RecordingRoles>.allocate(capacity: 1)
    private var log = SimulatedFile(byteCount: ActivityLog.fileOffset + 4096)
    private var records: [CopyRecord] = []
    /// What the file of `records` says; a save that fails may have reached it all the same (`KeptRecord`).
    private var saved: [CopyRecord] = []
    private var isUnsaved = false
    /// One save in so many fails; 0 = none.
    private let failingSaves: Int
    /// The volume's record says that mapped files are as the last process left them (`VolumeState.confirm`).
    private var isTrusted = true
    /// The disk under all of these but the source takes nothing any more.
    private var stateFails = false
    /// The source's own file says so (`SourceMark`): the log is not to be relied on, and these copies have failed.
    private var isDistrusted = false
    private var failedUnwritten: Set<CopyID> = []
    private var restoring: (id: CopyID, decided: Bool)?
    private var pending = SimulatedBitmap(bits: 64)
    private var targets: [CopyID: SimulatedFile] = [:]
    /// `preserved`, `changes`, and whether the copy has taken over the target of the one that it refreshes.
    private var bitmaps: [CopyID: SimulatedBitmap] = [:]
    private var nextID: CopyID = 1
    private var nextOrder = CopyRecord.orderStep

    // The process.
    private var process: SimulatedVolume!
    private var volume: Volume { process.volume }
    private var targetFiles: [CopyID: StoreFile] = [:]
    private var restoreFile: StoreFile = -1
    private var tasks: [() -> Void] = []
    private var readyTasks: [CopyID: () -> Void] = [:]
    private var operating = false
    private let copyMemory: UnsafeMutableRawPointer
    private let copyBytes: Int

    // What must be there.
    private var contents = Contents(sectors: CopyWorld.sectors)
    /// While a restore is not decided: what a crash brings back.
    private var unrestored: Contents?
    /// What the volume held before the newest restore.
    private var overwritten: Contents?
    private var images: [CopyID: Contents] = [:]
    /// Of copies that were given up, and whose record may say that they are active all the same.
    private var givenUp: [CopyID: Contents] = [:]
    /// What the volume held when its change recording was last cleared.
    private var mirrored: [UInt8]?
    private var nextValue: UInt32 = 1
    /// A sector to tell about in the trace (the simulate command's WATCH).
    // Safe because: set once, before the first run.
    package nonisolated(unsafe) static var watching: Int?
    private var watched: Int? { Self.watching }

    private enum Happening: CaseIterable {
        case write, read, io, task, operate, kill, powerLoss, trouble, sweep, mirror, writeBack
        var weight: Int {
            switch self {
            case .write: 1500
            case .read: 700
            case .io: 6000
            case .task: 700
            case .operate: 180
            case .kill: 12
            case .powerLoss: 8
            case .trouble: 10
            case .sweep, .writeBack: 40
            case .mirror: 15
            }
        }
        var varies: [Int] { [.kill, .powerLoss, .trouble].contains(self) ? [0, 1, 3] : [1, 2, 4] }
    }

    package init(seed: UInt64, fault: DeliberateFault? = nil) {
        var generator = SeededGenerator(seed: seed ^ 0xC0FFEE)
        weights = Happening.allCases.map { $0.weight * $0.varies[generator.below(3)] }
        failingSaves = [0, 20, 6, 3][generator.below(4)]
        random = generator
        self.fault = fault
        engineFaults = fault?.engine ?? []
        copyMemory = .allocate(byteCount: 1 << 20, alignment: 4096)
        // Seldom enough memory for every job at once.
        copyBytes = generator.chance(50) ? 1 << 20 : 1 << 16
        roles.initialize(to: RecordingRoles())
        start()
    }

    deinit {
        process.crash(&random)
        process = nil
        copyMemory.deallocate()
        roles.deallocate()
    }

    func note(_ text: @autoclosure () -> String) {
        trace.append("\(steps): \(text())")
        if trace.count > 400 { trace.removeFirst(200) }
    }

    private func fail(_ text: String) { if failure == nil { failure = SimulationFailure(text) } }

    // MARK: Starting (Site/Resume.swift)

    /// A start may end between any two of its steps, by a kill or by power loss; the next one finds what it has left.
    ///
    /// - Returns: whether power was lost.
    @discardableResult
    private func start() -> Bool {
        var powerLoss = false
        while !tryStart(endingAt: random.chance(20) ? random.below(8) : nil) {
            note("the start ends in the middle")
            process.crash(&random)
            if random.chance(40) {
                losePower()
                powerLoss = true
            }
            records = saved
        }
        return powerLoss
    }

    /// - Returns: whether it came to its end.
    private func tryStart(endingAt last: Int?) -> Bool {
        let trusted = isTrusted
        if fault == .confirmEarly { isTrusted = true }
        var step = 0
        func ends() -> Bool {
            step += 1
            return step == last
        }
        targetFiles = [:]
        tasks = []
        readyTasks = [:]
        operating = false
        roles.pointee.sourceLost = 0
        process = SimulatedVolume(
            volume: Volume(
                geometry: Geometry(size: UInt64(Self.size), grain: Self.grain)!,
                bitmaps: (
                    Bitmap(memory: recording.memory, count: Self.grains),
                    Bitmap(memory: recording.memory + 8, count: Self.grains)
                ),
                roles: roles, copyBuffers: CopyBuffers(pool: BufferPool(base: copyMemory, size: copyBytes)),
                requestCapacity: 24, smallestRegion: Self.regionBytes,
                faults: engineFaults))
        process.skipFlushes = fault == .skipFlushes
        _ = process.addStore(.file(source))
        volume.recording = true
        volume.beginResuming()
        let regions = SimulatedBitmap(bits: 64)
        let region = Bitmap(
            memory: regions.memory, count: ActivityLog.layout(size: UInt64(Self.size), smallest: Self.regionBytes).count
        )
        readLog { _ = ActivityLog.decode($0, into: region) }
        if !trusted, fault != .trustBitmapsAfterPowerLoss { volume.recoverChanges(regions: region) }
        if isDistrusted { volume.markAllChanged() }
        if ends() { return false }
        guard resumeChain(trusted, region, ends) else { return false }
        let bitmapFile = process.addStore(.bitmap(recording))
        let logFile = process.addStore(.file(log))
        readLog { volume.startActivityLog(file: logFile, contents: $0, recordingFile: bitmapFile) }
        resumeRestore()
        if ends() { return false }
        if fault != .skipFlushes { flushAtStart() }
        if ends() { return false }
        isTrusted = true
        (isDistrusted, failedUnwritten) = (false, [])
        if ends() { return false }
        volume.finishResuming()
        process.pump()
        return true
    }

    /// `VolumeState.confirm`: what was taken up is on stable storage before the record says that it is this run's.
    private func flushAtStart() {
        for bitmap in [recording, pending] + bitmaps.values { bitmap.flush() }
    }

    private func readLog(_ body: (UnsafeRawBufferPointer) -> Void) {
        log.cached.withUnsafeBytes { body(UnsafeRawBufferPointer(rebasing: $0[ActivityLog.fileOffset...])) }
    }

    private func resumeChain(_ trusted: Bool, _ regions: Bitmap, _ ends: () -> Bool) -> Bool {
        var links: [(CopyRecord, CopyRecord.Resumption)] = []
        var resumed = records
        for index in resumed.indices {
            let record = resumed[index]
            let overtaken =
                record.state == .refreshing
                && records.contains {
                    $0.state == .creating && $0.targetOwner == record.targetOwner && hasTaken($0.id)
                }
            let resumption = resumed[index].resume(trusted: trusted, overtaken: overtaken)
            links.append((resumed[index], resumption))
        }
        // A start whose save fails ends, and the next one begins anew.
        (records, saved, isUnsaved) = (resumed, resumed, false)
        if ends() { return false }
        for (record, resumption) in links where resumption == .forgotten || resumption == .absent {
            images[record.id] = nil
            bitmaps[record.id] = nil
        }
        for (record, var resumption) in links.sorted(by: { $0.0.order < $1.0.order })
        where resumption != .forgotten && resumption != .absent {
            let bitmap = openFiles(record)
            let isMarked = bitmap.memory.load(fromByteOffset: Self.markOffset, as: UInt64.self) == 1
            if resumption == .serves, isMarked || failedUnwritten.contains(record.id) {
                // `noteFailed`: nobody could write down yet that it has.
                resumption = .servesOlder
                acknowledge(record.id) { $0.state = .failed }
                images[record.id] = nil
            }
            if record.isDurable, fault != .trustUnflushedBits { bitmap.flush() }
            enterChain(record) { $0.resumeCopy($1, failed: resumption == .servesOlder) }
            if !trusted, record.isFilled {
                let all = SimulatedBitmap(bits: 64)
                let every = Bitmap(memory: all.memory, count: regions.count)
                every.setAll()
                volume.recoverChanges(
                    of: record.id, regions: isDistrusted || record.mayLackChanges(in: records) ? every : regions)
            }
            if resumption == .serves, let image = givenUp.removeValue(forKey: record.id) { images[record.id] = image }
            if resumption == .leaves {
                images[record.id] = nil
                volume.withdrawCopy(record.id)
            }
            if ends() { return false }
        }
        let forgotten = Set(links.filter { $0.1 == .forgotten }.map(\.0.id))
        guard !forgotten.isEmpty else { return true }
        flushChanges()
        if ends() { return false }
        records.removeAll { forgotten.contains($0.id) }
        saved = records
        return true
    }

    /// Files come before the record that names them, except those of a copy of which nobody was told yet.
    private func openFiles(_ record: CopyRecord) -> SimulatedBitmap {
        if let bitmap = bitmaps[record.id] { return bitmap }
        if record.state != .creating { fail("the bitmap of copy \(record.id), \(record.state), is missing") }
        bitmaps[record.id] = SimulatedBitmap(bits: 256)
        if targets[record.targetOwner] == nil { targets[record.targetOwner] = SimulatedFile(byteCount: Self.size) }
        return bitmaps[record.id]!
    }

    private static let markOffset = 24

    // MARK: The record

    private func save(_ next: [CopyRecord]) -> Bool {
        if stateFails {
            isUnsaved = true
            return false
        }
        if failingSaves > 0, random.below(failingSaves) == 0 {
            if random.chance(50) { saved = next }
            isUnsaved = true
            return false
        }
        saved = next
        isUnsaved = false
        // Files of copies that have left go when no record names them any more.
        for id in bitmaps.keys where !next.contains(where: { $0.id == id }) && volume.copy(id) == nil {
            bitmaps[id] = nil
        }
        return true
    }

    /// `KeptRecord.amend`: durably, or not at all.
    private func amend(_ change: (inout [CopyRecord]) -> Void) -> Bool {
        var next = records
        change(&next)
        guard save(next) else { return false }
        records = next
        return true
    }

    /// `KeptRecord.acknowledge`: what has happened already.
    private func acknowledge(_ change: (inout [CopyRecord]) -> Void) {
        change(&records)
        _ = save(records)
    }

    private func acknowledge(_ id: CopyID, _ change: (inout CopyRecord) -> Void) {
        acknowledge { records in
            if let index = records.firstIndex(where: { $0.id == id }) { change(&records[index]) }
        }
    }

    private func update(_ id: CopyID, _ change: (inout CopyRecord) -> Void) -> Bool {
        amend { records in
            if let index = records.firstIndex(where: { $0.id == id }) { change(&records[index]) }
        }
    }

    private func hasTaken(_ id: CopyID) -> Bool {
        bitmaps[id]?.memory.load(fromByteOffset: 16, as: UInt8.self) == 1
    }

    private func resumeRestore() {
        guard let current = restoring else { return }
        guard current.decided, volume.copy(current.id) != nil else {
            // Part of it is of the copy's time, part is newer: Control says so.
            if current.decided, let before = overwritten { contents.mixed(with: before) }
            restoring = nil
            return
        }
        beginRestore(current.id, fresh: false)
    }

    private func enterChain(_ record: CopyRecord, place: (Volume, FlashCopy) -> Void) {
        let bitmap = bitmaps[record.id]!
        let target = targetFiles[record.targetOwner] ?? process.addStore(.file(targets[record.targetOwner]!))
        targetFiles[record.targetOwner] = target
        place(
            volume,
            FlashCopy(
                id: record.id, targetFile: target, bitmapFile: process.addStore(.bitmap(bitmap)),
                preserved: Bitmap(memory: bitmap.memory, count: Self.grains),
                changes: record.isFilled ? Bitmap(memory: bitmap.memory + 8, count: Self.grains) : nil,
                failureMark: (bitmap.memory + Self.markOffset).assumingMemoryBound(to: UInt64.self),
                durable: record.isDurable, targetIsZero: record.targetIsZero, isFilled: record.isFilled,
                rate: record.rate))
        process.pump()
    }

    // MARK: Crashing

    private func crash(powerLoss: Bool) {
        note(powerLoss ? "power is lost" : "the process is killed")
        if let at = watched { noteState(at) }
        figures.crashes += 1
        process.crash(&random)
        // What could not be read would leave open what the next checks must find.
        for file in [source] + targets.values { file.latent = [] }
        if powerLoss { losePower() }
        records = saved
        if let before = unrestored { contents = before }
        unrestored = nil
        if !powerLoss { forEachImage { $0.processDied(at: steps) } }
        if start() || powerLoss {
            forEachImage { $0.powerLost(at: steps) }
            readEverything()
            forEachImage { $0.settleDurable() }
            checkRecording()
        } else {
            readEverything()
        }
    }

    private func forEachImage(_ change: (inout Contents) -> Void) {
        change(&contents)
        for id in images.keys.sorted() { change(&images[id]!) }
        for id in givenUp.keys.sorted() { change(&givenUp[id]!) }
    }

    private func losePower() {
        for file in [source, log] { file.losePower(&random) }
        for id in targets.keys.sorted() { targets[id]!.losePower(&random) }
        for id in bitmaps.keys.sorted() { bitmaps[id]!.losePower(&random) }
        for bitmap in [recording, pending] { bitmap.losePower(&random) }
        isTrusted = false
        setState(fails: false)  // it comes back
    }

    private func setState(fails: Bool) {
        stateFails = fails
        for file in [log] + targets.values { file.isDead = fails }
        for bitmap in [recording, pending] + bitmaps.values { bitmap.isDead = fails }
    }

    private func readEverything() {
        for id in [nil] + images.keys.sorted() {
            var done = false
            guard read(id, 0..<Self.sectors, done: { done = true }) else { continue }
            var patience = 20_000
            while !done, failure == nil {
                process.step(&random)
                takeEvents()
                patience -= 1
                if patience == 0 { fail("a read never ends: \(volume.waiting), \(process.pending.count) I/O pending") }
            }
        }
    }

    /// Rule 2 after power loss: what differs from the mirrored image is marked.
    private func checkRecording() {
        guard let mirrored, !volume.isRestoring else { return }
        for grain in 0..<Self.grains {
            let bytes = grain * Self.grain..<min(Self.size, (grain + 1) * Self.grain)
            if mirrored[bytes] != source.cached[bytes], !volume.changeRecording.contains(grain) {
                return fail("grain \(grain) changed before power was lost, and nothing says so")
            }
        }
    }

    // MARK: Running

    package func run(steps count: Int, skipping skipped: Set<Int>) throws(SimulationFailure) {
        let seed = random.next()
        for index in 0..<count where !skipped.contains(index) {
            random = SeededGenerator(seed: seed &+ UInt64(index) &* 0x9E37_79B9)
            try step(index)
        }
        random = SeededGenerator(seed: ~seed)
        try settle()
    }

    private func step(_ index: Int) throws(SimulationFailure) {
        steps = index + 1
        figures.steps += 1
        if let next = relapse, steps >= next {
            relapse = nil
            crash(powerLoss: true)
        }
        let happening = random.one(of: Happening.allCases, weights: weights)
        switch happening {
        case .write: write()
        case .read: readSomething()
        case .io: process.step(&random)
        case .task: if !tasks.isEmpty { tasks.removeFirst()() }
        case .operate: if !stateFails { operate() }
        case .kill, .powerLoss:
            crash(powerLoss: happening == .powerLoss || stateFails)
            if random.chance(25) { relapse = steps + random.below(random.chance(50) ? 20 : 400) }
        case .trouble: makeTrouble()
        case .sweep:
            volume.sweepActivity()
            volume.advanceClock(to: UInt64(steps) * 1_000_000)
            process.pump()
            if isUnsaved { _ = save(records) }
        case .mirror: mirror()
        case .writeBack: writeBack()
        }
        takeEvents()
        if let failure { throw failure }
    }

    private func takeEvents() {
        for event in process.takeEvents() {
            switch event {
            case .copyFailed(let id, _):
                note("copy \(id) fails")
                acknowledge(id) { $0.state = .failed }
                images[id] = nil
                readyTasks.removeValue(forKey: id)?()
            case .copyWithdrawn(let id): withdrawn(id)
            case .copyReady(let id): readyTasks.removeValue(forKey: id)?()
            case .copyCompleted(let id):
                tasks.append { [unowned self] in completed(id) }
            case .restoreFinished:
                note("the restore is finished")
                restoring = nil
            case .restoreFailed: stallRestore()
            case .activityLogFailed:
                tasks.append { [unowned self] in
                    if fault != .goOnUnwritten { isDistrusted = true }
                    volume.distrustActivityLog()
                    process.pump()
                }
            case .failureUnwritten(let id, _):
                tasks.append { [unowned self] in
                    if fault != .goOnUnwritten { failedUnwritten.insert(id) }
                    volume.failureIsWritten()
                    process.pump()
                }
            default: break
            }
        }
    }

    /// What cannot be restored stays as it is; nothing more is known.
    private func stallRestore() {
        hasStalled = true
    }
    private var hasStalled = false
    /// Power is lost at this step, soon after a restart: what the last process left is hardly used yet.
    private var relapse: Int?

    private func withdrawn(_ id: CopyID) {
        note("copy \(id) has left")
        flushChanges()
        acknowledge { records in
            if let index = records.firstIndex(where: { $0.id == id }), !records[index].hasLeft() {
                records.remove(at: index)
            }
        }
        images[id] = nil
    }

    /// Control's `synchronizeChanges`.
    private func flushChanges() {
        guard fault != .skipFlushes else { return }
        for record in records where record.isFilled { bitmaps[record.id]?.flush() }
    }

    /// Control's `copyCompleted`: flush, then record.
    private func completed(_ id: CopyID) {
        guard let record = records.first(where: { $0.id == id }), record.state == .active else { return }
        if fault != .skipFlushes {
            targets[record.targetOwner]?.flush()
            bitmaps[id]?.flush()
        }
        guard update(id, { $0.isComplete = true }) else { return }
        images[id]?.flushed(issuedAt: steps)
        note("copy \(id) is complete")
    }

    // MARK: Hosts

    private func range() -> Range<Int> {
        let start = random.below(Self.sectors)
        let count = random.chance(30) ? 8 : 1 + random.below(random.chance(20) ? 40 : 6)
        return start..<min(Self.sectors, start + count)
    }

    /// The volume, or now and then a writable copy.
    private func writableView() -> CopyID? {
        guard random.chance(25) else { return nil }
        let ids = records.filter { $0.isWritable && $0.state == .active && restoring?.id != $0.id }.map(\.id)
        return random.one(of: ids)
    }

    private func write() {
        figures.operations += 1
        let id = writableView()
        guard id == nil || images[id!] != nil else { return }
        if random.chance(12) { return flush(id) }
        let sectors = range()
        guard !(id.map { images[$0]! } ?? contents).isBusy(sectors) else { return }
        let kind: Request.Operation = random.chance(80) ? .write : random.chance(50) ? .writeZeroes : .trim
        nextValue += 1
        let value = kind == .write ? nextValue : 0
        let fua = random.chance(10)
        let process = process!
        note("\(kind) to \(name(id)), sectors \(sectors), value \(value)")
        _ = process.submit(
            kind, view: id.map { .copy($0) } ?? .volume, offset: sectors.lowerBound * 512, length: sectors.count * 512,
            data: kind == .write ? Self.bytes(value, sectors.count) : nil, fua: fua,
            before: { [unowned self] in change(id) { $0.issue(sectors, value, at: steps) } }
        ) { [unowned self] request in
            guard process === self.process else { return }
            if request.error == 0 {
                change(id) { $0.acknowledge(sectors, durable: fua, at: steps) }
            } else if id == nil, !(troubled && volume.isRestoring), roles.pointee.sourceLost == 0 {
                // Only where the rest of a grain must come back from a copy that cannot be read, or, with FUA, once the record of what
                // has come back could not be flushed.
                fail("a host write fails with \(request.error)")
            } else {
                change(id) { $0.fail(sectors, at: steps) }
            }
        }
    }

    private func change(_ id: CopyID?, _ body: (inout Contents) -> Void) {
        guard let id else {
            body(&contents)
            if unrestored != nil { body(&unrestored!) }
            return
        }
        if images[id] != nil { body(&images[id]!) }
    }

    private func flush(_ id: CopyID?) {
        let issued = steps
        let process = process!
        _ = process.submit(.flush, view: id.map { .copy($0) } ?? .volume, offset: 0, length: 0) {
            [unowned self] request in
            guard request.error == 0, process === self.process else { return }
            // What was acknowledged before the flush was issued.
            change(id) { $0.flushed(issuedAt: issued - 1) }
        }
    }

    static func bytes(_ value: UInt32, _ sectors: Int) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: sectors * 512)
        bytes.withUnsafeMutableBytes { buffer in
            for index in 0..<sectors * 128 { buffer.storeBytes(of: value, toByteOffset: 4 * index, as: UInt32.self) }
        }
        return bytes
    }

    private func readSomething() {
        figures.operations += 1
        let ids = images.keys.sorted()
        let id: CopyID? = random.chance(30) ? nil : random.one(of: ids)
        _ = read(id, random.chance(15) ? 0..<Self.sectors : range())
    }

    @discardableResult
    private func read(_ id: CopyID?, _ sectors: Range<Int>, done: @escaping () -> Void = {}) -> Bool {
        if let id, !volume.retainCopy(id) { return false }
        let process = process!
        let issued = steps
        let accepted = process.submit(
            .read, view: id.map { .copy($0) } ?? .volume, offset: sectors.lowerBound * 512, length: sectors.count * 512
        ) { [unowned self] request in
            if let id { process.volume.releaseCopy(id) }
            defer { done() }
            guard request.error == 0, process === self.process else {
                if id == nil, request.error != 0, !mayBeUnreadable {
                    fail("a read of the volume fails with \(request.error)")
                }
                return
            }
            var found: [UInt32] = []
            for index in 0..<sectors.count {
                let bytes = UnsafeRawBufferPointer(start: request.buffer! + index * 512, count: 512)
                let value = bytes.loadUnaligned(as: UInt32.self)
                for word in 1..<128 where bytes.loadUnaligned(fromByteOffset: 4 * word, as: UInt32.self) != value {
                    return fail("sector \(sectors.lowerBound + index) of \(name(id)) is torn")
                }
                found.append(value)
            }
            verify(id, sectors, found, issued)
        }
        if !accepted, let id { volume.releaseCopy(id) }
        return accepted
    }

    private var mayBeUnreadable: Bool { troubled || hasStalled }
    private var troubled = false

    private func name(_ id: CopyID?) -> String { id.map { "copy \($0)" } ?? "the volume" }

    private func verify(_ id: CopyID?, _ sectors: Range<Int>, _ found: [UInt32], _ issued: Int) {
        figures.checks += 1
        // What a restore shows before it is decided says nothing of what a crash brings back.
        let wrong: Int? =
            if let id { images[id]?.check(sectors, found, issuedAt: issued) } else {
                contents.check(sectors, found, issuedAt: issued)
            }
        guard let wrong else { return }
        noteState(wrong)
        let expected = (id.flatMap { images[$0] } ?? contents).expected(wrong)
        fail("sector \(wrong) of \(name(id)) holds \(found[wrong - sectors.lowerBound]) instead of \(expected)")
    }

    private static func value(_ file: SimulatedFile?, _ sector: Int) -> String {
        guard let file else { return "none" }
        func word(_ bytes: [UInt8]) -> UInt32 {
            bytes.withUnsafeBytes { $0.loadUnaligned(fromByteOffset: sector * 512, as: UInt32.self) }
        }
        return "\(word(file.cached)) (flushed: \(word(file.durable)))"
    }

    private func noteState(_ sector: Int) {
        note("source \(Self.value(source, sector)), restore \(restoring.map { "\($0)" } ?? "none")")
        for record in records {
            let bits = bitmaps[record.id].map { bitmap in
                [0, 8].map { String(Bitmap(memory: bitmap.memory + $0, count: Self.grains).word(0), radix: 2) }.joined(
                    separator: " ")
            }
            let kind = [
                record.isFilled ? "filled" : "", record.isDurable ? "durable" : "", record.isWritable ? "writable" : "",
            ]
            note(
                "copy \(record.id) order \(record.order >> 17) \(record.state) \(kind) preserved, changes: \(bits ?? "none"), target \(Self.value(targets[record.targetOwner], sector))"
            )
        }
    }

    // MARK: The operator

    private func operate() {
        guard !operating else { return }
        figures.operations += 1
        let active = records.filter { $0.state == .active }
        let one = random.one(of: active)
        switch random.below(10) {
        case 0...2: if records.count < 7 { create() }
        case 3: if let one, records.count < 7 { clone(one) }
        case 4, 5: if let one, restoring == nil { refresh(one) }
        case 6: if let one, restoring == nil { restore(one) }
        case 7 where random.chance(30):
            if let one { _ = update(one.id) { $0.allowWrites(!$0.isWritable) } }
        default:
            if let one = random.one(of: records), records.count > 2 || random.chance(30) { withdraw(one) }
        }
    }

    private func newRecord(_ order: UInt64) -> CopyRecord {
        var record = CopyRecord(id: nextID, name: "c\(nextID)", createdAt: 0, order: order, state: .creating)
        nextID += 1
        record.isFilled = random.chance(40)
        record.rate = random.chance(70) ? 0 : 4_000_000
        record.isWritable = random.chance(40)
        record.isDurable = random.chance(25) || volume.chainIsDurable
        record.targetIsZero = random.chance(70)
        return record
    }

    private func takeOrder() -> UInt64 {
        nextOrder += CopyRecord.orderStep
        return nextOrder - CopyRecord.orderStep
    }

    /// Control's `writeDown`: files, then the record.
    private func writeDown(_ record: CopyRecord) -> Bool {
        if targets[record.targetOwner] == nil {
            let file = SimulatedFile(byteCount: Self.size)
            if !record.targetIsZero { Self.bytes(0xDEAD, Self.sectors).withUnsafeBytes { file.write(0, $0) } }
            file.flush()
            targets[record.targetOwner] = file
        }
        bitmaps[record.id] = SimulatedBitmap(bits: 256)
        // A durable copy may begin with data that one which was not durable has left in the target.
        if record.isDurable, fault != .skipFlushes { targets[record.targetOwner]!.flush() }
        guard amend({ $0.append(record) }) else {
            note("copy \(record.id) cannot be written down")
            bitmaps[record.id] = nil
            operating = false
            return false
        }
        return true
    }

    private func then(_ body: @escaping () -> Void) { tasks.append(body) }

    private func create() {
        guard restoring == nil else { return }
        operating = true
        let record = newRecord(takeOrder())
        note("copy \(record.id) is created\(record.isFilled ? ", filled" : "")\(record.isDurable ? ", durable" : "")")
        let place = { [unowned self] in
            images[record.id] = contents.copied(at: steps)
            enterChain(record) { $0.addCopy($1) }
        }
        if fault == .recordAfterChain {
            // What the record would have said is lost by a crash in between.
            targets[record.id] = SimulatedFile(byteCount: Self.size)
            bitmaps[record.id] = SimulatedBitmap(bits: 256)
            place()
            then { [unowned self] in
                records.append(record)
                saved = records
                activate(record.id)
            }
            return
        }
        guard writeDown(record) else { return }
        then { [unowned self] in
            place()
            then { [unowned self] in activate(record.id) }
        }
    }

    /// Control's `settle` and `conclude`.
    private func activate(_ id: CopyID) {
        settleDurable(id)
        if !update(id, { if $0.state == .creating { $0.state = .active } }) { giveUp(id) }
        operating = false
    }

    private func settleDurable(_ id: CopyID) {
        guard records.contains(where: { $0.id == id && $0.isDurable }), fault != .skipFlushes else { return }
        source.flush()
        for file in targets.values { file.flush() }
        flushChanges()
    }

    private func giveUp(_ id: CopyID) {
        note("copy \(id) cannot be recorded as active, and is given up")
        givenUp[id] = images.removeValue(forKey: id)
        if fault == .leaveUnsaved { return volume.withdrawCopy(id) }
        acknowledge(id) { $0.state = .withdrawing }
        leaveWhenSaved(id)
    }

    private func leaveWhenSaved(_ id: CopyID) {
        if isUnsaved, !save(records) { return then { [unowned self] in leaveWhenSaved(id) } }
        volume.withdrawCopy(id)
        process.pump()
    }

    private func clone(_ origin: CopyRecord) {
        let below = records.map(\.order).filter { $0 < origin.order }.max() ?? 0
        let middle = below + (origin.order - below) / 2
        guard middle > below, restoring == nil else { return }
        operating = true
        var record = newRecord(middle)
        record.isDurable = origin.isDurable
        note("copy \(record.id) is a clone of \(origin.id)")
        guard writeDown(record) else { return }
        then { [unowned self, record] in
            guard volume.copy(origin.id)?.state == .active, let image = images[origin.id] else {
                withdrawn(record.id)
                operating = false
                return
            }
            images[record.id] = image.copied(at: steps)
            enterChain(record) { $0.cloneCopy(origin.id, as: $1) }
            then { [unowned self] in activate(record.id) }
        }
    }

    private func refresh(_ old: CopyRecord) {
        operating = true
        note("copy \(old.id) is refreshed")
        takeOutOfUse(old)
    }

    private func takeOutOfUse(_ old: CopyRecord) {
        guard update(old.id, { $0.state = .refreshing }) else {
            operating = false
            return
        }
        images[old.id] = nil
        readyTasks[old.id] = { [unowned self] in then { [unowned self] in retake(old) } }
        volume.beginRefresh(old.id)
        process.pump()
    }

    private func retake(_ old: CopyRecord) {
        guard records.contains(where: { $0.id == old.id && $0.state == .refreshing }) else {
            if volume.copy(old.id)?.state == .failed { takeOutOfUse(old) } else { operating = false }
            return
        }
        var record = old
        record.id = nextID
        nextID += 1
        record.order = takeOrder()
        record.state = .creating
        record.isComplete = false
        record.isDurable = old.isDurable || volume.chainIsDurable
        record.targetIsZero = false
        if !record.isFilled, random.chance(50) {
            record.targetOwner = record.id
            record.targetIsZero = true
        }
        guard writeDown(record) else { return }
        then { [unowned self] in
            guard volume.mayRetake(old.id) else {
                _ = amend { $0.removeAll { $0.id == record.id } }
                if volume.copy(old.id) != nil { takeOutOfUse(old) } else { operating = false }
                return
            }
            images[record.id] = contents.copied(at: steps)
            bitmaps[record.id]!.memory.storeBytes(of: 1, toByteOffset: 16, as: UInt8.self)
            enterChain(record) { $0.retakeCopy(old.id, as: $1) }
            note("copy \(old.id) is taken anew as \(record.id)")
            then { [unowned self] in
                settleDurable(record.id)
                acknowledge { records in
                    records.removeAll { $0.id == old.id }
                    if let index = records.firstIndex(where: { $0.id == record.id }), records[index].state == .creating
                    {
                        records[index].state = .active
                    }
                }
                operating = false
            }
        }
    }

    private func restore(_ record: CopyRecord) {
        guard !hasStalled else { return }
        operating = true
        note("the volume is restored from copy \(record.id)")
        pending = SimulatedBitmap(bits: 64)
        restoring = (record.id, false)
        then { [unowned self] in
            guard let image = images[record.id], volume.copy(record.id)?.state == .active,
                !image.isBusy(0..<Self.sectors),
                volume.copy(record.id)?.readers == 0
            else {
                restoring = nil
                operating = false
                return
            }
            unrestored = contents
            overwritten = contents
            contents.restored(from: image, at: steps)
            beginRestore(record.id, fresh: true)
            then { [unowned self] in
                if fault != .skipFlushes {
                    pending.flush()
                    source.flush()
                    for file in targets.values { file.flush() }
                }
                restoring = (record.id, true)
                unrestored = nil
                volume.continueRestore()
                process.pump()
                operating = false
            }
        }
    }

    private func beginRestore(_ id: CopyID, fresh: Bool) {
        restoreFile = process.addStore(.bitmap(pending))
        let bitmap = Bitmap(memory: pending.memory, count: Self.grains)
        if fresh { volume.markDifferences(from: id, in: bitmap) }
        volume.startRestore(from: id, pending: bitmap, bitmapFile: restoreFile, paused: fresh)
        process.pump()
    }

    private func withdraw(_ record: CopyRecord) {
        guard restoring?.id != record.id, record.state != .creating else { return }
        guard volume.copy(record.id) != nil else {
            flushChanges()
            acknowledge { $0.removeAll { $0.id == record.id } }
            return
        }
        guard update(record.id, { $0.state = .withdrawing }) else { return }
        note("copy \(record.id) is withdrawn")
        images[record.id] = nil
        volume.withdrawCopy(record.id)
        process.pump()
    }

    // MARK: Trouble

    private func makeTrouble() {
        troubled = true
        switch random.below(5) {
        case 0: source.latent.insert(random.below(Self.sectors))
        case 1:
            guard let id = targets.keys.sorted().randomElement(using: &random) else { return }
            targets[id]!.spaceLeft = random.below(30)
        case 2:
            guard let id = targets.keys.sorted().randomElement(using: &random) else { return }
            targets[id]!.refusesWrites = random.chance(50)
        case 3:
            guard !operating, restoring == nil else { return }
            note("the state disk fails")
            setState(fails: true)
            relapse = steps + random.below([100, 600, 3000][random.below(3)])
        default:
            guard let id = targets.keys.sorted().randomElement(using: &random) else { return }
            targets[id]!.latent.insert(random.below(Self.sectors))
        }
    }

    /// Dirty pages reach the disk, flushed or not.
    private func writeBack() {
        source.writeBack(&random)
        for id in targets.keys.sorted() { targets[id]!.writeBack(&random) }
        for id in bitmaps.keys.sorted() { bitmaps[id]!.writeBack(&random) }
        for bitmap in [recording, pending] { bitmap.writeBack(&random) }
    }

    /// A mirror has everything: nothing has changed since.
    private func mirror() {
        guard volume.modifyingInFlight == 0, !volume.isRestoring, !stateFails else { return }
        volume.changeRecording.clearAll()
        volume.mergeOutOfSync()
        volume.recountChanges()
        recording.flush()
        source.flush()
        mirrored = source.cached
    }

    // MARK: The end

    /// No more faults: everything under way ends, and every copy is compared with what it must hold.
    private func settle() throws(SimulationFailure) {
        source.latent = []
        setState(fails: false)
        for file in targets.values {
            file.latent = []
            file.spaceLeft = nil
            file.refusesWrites = false
        }
        for id in records.map(\.id) { volume.setRate(id, 0) }
        var patience = 200_000
        while !process.pending.isEmpty || !tasks.isEmpty || volume.backgroundDue || operating {
            if let task = tasks.first {
                tasks.removeFirst()
                task()
            }
            process.step(&random)
            takeEvents()
            patience -= 1
            if patience == 0 {
                throw SimulationFailure(
                    "something never ends: \(volume.waiting); \(process.pending.count) I/O, \(tasks.count) tasks, background due: \(volume.backgroundDue), operating: \(operating)"
                )
            }
            if let failure { throw failure }
        }
        guard volume.modifyingInFlight == 0 else {
            throw SimulationFailure("a write waits for ever: \(volume.waiting)")
        }
        troubled = false
        steps += 1
        readEverything()
        if let failure { throw failure }
        try compareTargets()
        try compareChanges()
    }

    private func compareTargets() throws(SimulationFailure) {
        for record in records where record.state == .active && record.isComplete {
            guard let image = images[record.id], let target = targets[record.targetOwner] else { continue }
            for sector in 0..<Self.sectors
            where target.cached[sector * 512..<sector * 512 + 4].elementsEqual(
                withUnsafeBytes(of: image.history[sector].last!.value) { Array($0) }) == false
            {
                throw SimulationFailure("sector \(sector) of the finished target of copy \(record.id) is wrong")
            }
        }
    }

    /// C1: a grain that differs between the volume and a copy counts as changed.
    private func compareChanges() throws(SimulationFailure) {
        guard !volume.isRestoring else { return }
        for record in records where record.state == .active {
            guard let image = images[record.id] else { continue }
            for sector in 0..<Self.sectors
            where image.history[sector].last!.value != contents.history[sector].last!.value {
                // What could not be read is not known.
                if image.open[sector] != nil || contents.open[sector] != nil { continue }
                let run = volume.changedRun(since: record.id, in: .volume, offset: UInt64(sector) * 512, length: 512)
                if !run.changed {
                    noteState(sector)
                    throw SimulationFailure(
                        "sector \(sector) differs from copy \(record.id), and does not count as changed")
                }
            }
        }
    }
}
