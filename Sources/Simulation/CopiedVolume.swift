// CopiedVolume.swift: one volume of `CopyWorld` with its FlashCopies: what lies on disk, the process's engine, and what must be read.

import FlashCopies
import Groups
import Volumes

extension CopyID {
    /// For people.
    var label: Int64 { self - CopyTable.firstID }
}

final class CopiedVolume {
    static let grain = 4096
    static let size = 11 * grain + 1536
    static let sectors = size / SimulatedFile.sector
    static let grains = 12
    static let regionBytes: UInt64 = 8192

    unowned let world: CopyWorld
    let index: Int

    // What outlives the process.
    var source = SimulatedFile(byteCount: size)
    let recording = SimulatedBitmap(bits: 128)
    let roles = UnsafeMutablePointer<RecordingRoles>.allocate(capacity: 1)
    let log = SimulatedFile(byteCount: ActivityLog.fileOffset + 4096)
    /// What the file of `table` says; a save that fails may have reached it all the same (`KeptRecord`).
    private(set) var saved = CopyTable()
    /// The record says that mapped files are as the last process left them (`VolumeState.confirm`).
    var isTrusted = true
    /// The source's own file says so (`SourceMark`): the log is not to be relied on, and these copies have failed.
    var isDistrusted = false
    var failedUnwritten: Set<CopyID> = []
    /// Grains to restore; nil = there is no such file.
    var pending: SimulatedBitmap?
    var targets: [CopyID: SimulatedFile] = [:]
    /// `preserved`, `changes`, and whether the copy has taken over the target of the one that it takes the place of.
    var bitmaps: [CopyID: SimulatedBitmap] = [:]

    // The process.
    private(set) var table = CopyTable()
    private(set) var isUnsaved = false
    /// Of copies that have left while the record's file may name them.
    private var unnamed: [(id: CopyID, target: CopyID?)] = []
    var process: SimulatedVolume!
    var volume: Volume { process.volume }
    var nextOrder = CopyRecord.orderStep
    /// By the target's owner.
    private var targetFiles: [CopyID: StoreFile] = [:]
    private var opened: [CopyID: (owner: CopyID, bitmap: StoreFile)] = [:]
    var readyTasks: [CopyID: () -> Void] = [:]
    var shutsHostsOut = false
    /// Requests of hosts to the volume itself.
    private var underWay: Set<Int> = []
    private var requests = 0
    private let copyMemory: UnsafeMutableRawPointer
    private let copyBytes: Int

    // What must be there.
    var contents = Contents(sectors: sectors)
    /// While a restore is not decided: what a crash brings back.
    var unrestored: Contents?
    /// What the volume held before the newest restore.
    var overwritten: Contents?
    /// When hosts saw another volume all at once: what was read across it says nothing.
    var flippedAt = 0
    /// Of every copy whose files are there: what it must hold whenever its record says that it is active.
    var images: [CopyID: Contents] = [:]
    /// When the target of a background copy that was finished was flushed.
    var flushedAt: [CopyID: Int] = [:]
    /// What the volume held when its change recording was last cleared.
    private var mirrored: [UInt8]?
    var hasStalled = false

    private var fault: DeliberateFault? { world.fault }

    init(_ world: CopyWorld, _ index: Int, copyBytes: Int) {
        (self.world, self.index, self.copyBytes) = (world, index, copyBytes)
        copyMemory = .allocate(byteCount: 1 << 20, alignment: 4096)
        roles.initialize(to: RecordingRoles())
    }

    deinit {
        copyMemory.deallocate()
        roles.deallocate()
    }

    func note(_ text: @autoclosure () -> String) { world.note("volume \(index): \(text())") }

    // MARK: The record

    private func save(_ next: CopyTable) -> Bool {
        switch world.outcomeOfSave() {
        case .saved: break
        case .failed:
            isUnsaved = true
            return false
        case .reachedAllTheSame:
            (saved, isUnsaved) = (next, true)
            return false
        }
        (saved, isUnsaved) = (next, false)
        return true
    }

    /// Durably, or not at all.
    func amend(_ change: CopyChange) -> Bool {
        var next = table
        next.apply(change)
        if fault == .recordAfterChain, case .added = change {
            // What the record would have said is lost by a crash.
            table = next
            return true
        }
        guard save(next) else {
            note("it cannot be written down that \(Self.words(change))")
            return false
        }
        table = next
        return true
    }

    /// What has happened already.
    func acknowledge(_ change: CopyChange) {
        let before = table
        table.apply(change)
        if table != before, !save(table) { note("it is yet to be written down that \(Self.words(change))") }
    }

    private static func words(_ change: CopyChange) -> String {
        switch change {
        case .added(let copy): "copy \(copy.id.label) is added"
        case .resumed: "the chain is taken up"
        case .active(let id): "copy \(id.label) is active"
        case .failed(let id, _): "copy \(id.label) has failed"
        default: "\(change)"
        }
    }

    func settle() -> Bool {
        if isUnsaved, !save(table) { return false }
        for (id, target) in unnamed { remove(id, target) }
        unnamed = []
        return true
    }

    // MARK: Files

    /// Target and bitmap of a new copy.
    ///
    /// - Returns: whether the target reads as zeroes; nil when it is in use.
    func makeFiles(_ copy: CopyRecord, over owner: CopyID?) -> Bool? {
        if owner == nil, targetFiles[copy.targetOwner] != nil { return nil }
        nextOrder = max(nextOrder, CopyRecord.order(after: copy.order))
        var isZero = owner == nil && copy.target == nil
        if owner == nil {
            let file = SimulatedFile(byteCount: Self.size)
            if copy.target != nil, world.random.chance(70) {
                Self.bytes(0xDEAD, Self.sectors).withUnsafeBytes { file.write(0, $0) }
            } else {
                isZero = true
            }
            file.flush()
            targets[copy.targetOwner] = file
        }
        bitmaps[copy.id] = SimulatedBitmap(bits: 256)
        // It may begin with data that one which was not durable has left in the target.
        if copy.isDurable, fault != .skipFlushes { targets[copy.targetOwner]?.flush() }
        return isZero
    }

    func removeFiles(_ id: CopyID, target: CopyID?) {
        let target = fault == .dropSharedTarget ? opened[id]?.owner : target
        if isUnsaved, fault != .dropFilesUnsaved { return unnamed.append((id, target)) }
        remove(id, target)
    }

    func remove(_ id: CopyID, _ target: CopyID?) {
        bitmaps[id] = nil
        images[id] = nil
        if let open = opened.removeValue(forKey: id) {
            process.stores[Int(open.bitmap)] = nil
            // Unless its successor has it.
            if !opened.values.contains(where: { $0.owner == open.owner }),
                let file = targetFiles.removeValue(forKey: open.owner)
            {
                process.stores[Int(file)] = nil
            }
        }
        if let target { targets[target] = nil }
    }

    func enterChain(_ copy: CopyRecord, place: (Volume, FlashCopy) -> Bool) -> Bool {
        let bitmap = bitmaps[copy.id]!
        guard let file = targets[copy.targetOwner] else {
            world.fail("the target of copy \(copy.id.label) of volume \(index) has gone")
            return false
        }
        let target = targetFiles[copy.targetOwner] ?? process.addStore(.file(file))
        targetFiles[copy.targetOwner] = target
        let bitmapFile = process.addStore(.bitmap(bitmap))
        opened[copy.id] = (copy.targetOwner, bitmapFile)
        let isIn = place(
            volume,
            FlashCopy(
                id: copy.id, targetFile: target, bitmapFile: bitmapFile,
                preserved: Bitmap(memory: bitmap.memory, count: Self.grains),
                changes: copy.isFilled ? Bitmap(memory: bitmap.memory + 8, count: Self.grains) : nil,
                failureMark: (bitmap.memory + Self.markOffset).assumingMemoryBound(to: UInt64.self),
                durable: copy.isDurable, targetIsZero: copy.targetIsZero, isFilled: copy.isFilled, rate: copy.rate))
        process.pump()
        return isIn
    }

    private static let (takenOffset, markOffset) = (16, 24)

    func markTaken(_ id: CopyID) {
        bitmaps[id]!.memory.storeBytes(of: 1, toByteOffset: Self.takenOffset, as: UInt8.self)
    }

    func hasTaken(_ id: CopyID) -> Bool {
        bitmaps[id]?.memory.load(fromByteOffset: Self.takenOffset, as: UInt8.self) == 1
    }

    /// - Returns: an errno.
    func flush() -> Int32 {
        let flushed = [source.flush()] + targets.keys.sorted().map { targets[$0]!.flush() }
        return max(flushed.max() ?? 0, flushChanges())
    }

    func flushChanges() -> Int32 {
        table.copies.filter(\.isFilled).map { bitmaps[$0.id]?.flush() ?? 0 }.max() ?? 0
    }

    // MARK: Starting (`CopyExecutor.host`)

    /// A process takes the volume up; between any two actions it may end.
    ///
    /// - Parameter goesOn: says after each action whether it does.
    /// - Returns: whether it came to its end.
    func start(_ goesOn: () -> Bool) -> Bool {
        var start = VolumeStart(isTrusted: isTrusted)
        (start.role, start.knowsNothing) = (.primary, isDistrusted)
        if fault == .confirmEarly { isTrusted = true }
        volume.beginResuming()
        switch takeUp(StartVolume(start), { table }, goesOn, { perform($0, start.isTrusted) }) {
        case .success: return true
        case .failure(let error):
            note("the start fails: \(error)")
            return false
        case nil: return false
        }
    }

    private var mapped: [SimulatedBitmap] {
        [recording] + (pending.map { [$0] } ?? []) + bitmaps.keys.sorted().map { bitmaps[$0]! }
    }

    /// A process that has the record, and has taken up nothing yet.
    func makeProcess() {
        (table, isUnsaved, unnamed) = (saved, false, [])
        (targetFiles, opened, readyTasks, underWay) = ([:], [:], [:], [])
        shutsHostsOut = false
        roles.pointee.sourceLost = 0
        process = SimulatedVolume(
            volume: Volume(
                geometry: Geometry(size: UInt64(Self.size), grain: Self.grain)!,
                bitmaps: (
                    Bitmap(memory: recording.memory, count: Self.grains),
                    Bitmap(memory: recording.memory + 8, count: Self.grains)
                ),
                roles: roles, copyBuffers: CopyBuffers(pool: BufferPool(base: copyMemory, size: copyBytes)),
                requestCapacity: 24, smallestRegion: Self.regionBytes, faults: world.fault?.engine ?? []))
        process.skipFlushes = fault == .skipFlushes
        _ = process.addStore(.file(source))
    }

    private func readLog(_ body: (UnsafeRawBufferPointer) -> Void) {
        log.cached.withUnsafeBytes { body(UnsafeRawBufferPointer(rebasing: $0[ActivityLog.fileOffset...])) }
    }

    private func perform(_ action: CopyAction, _ trusted: Bool) -> CopyAnswer {
        switch action {
        case .findTaken(let ids): return .taken(Set(ids.filter(hasTaken)))
        case .openFiles(let links): return .opened(open(links))
        case .change(_, let change): return CopyAnswer(isDone: amend(change))
        case .flushChanges: return CopyAnswer(isDone: fault == .skipFlushes || flushChanges() == 0)
        case .resume(let link): resume(link, trusted)
        case .takeRole(let role): take(role)
        case .resumeRestore(let id):
            guard pending != nil else {
                world.fail("the bitmap of what volume \(index) is still to be given back is missing")
                return CopyAnswer(isDone: false)
            }
            startRestore(from: id, fresh: false)
        case .forgetRestore:
            // Part of it is of the copy's time, part is newer: the site says so.
            if table.restoring?.decided == true, let overwritten { contents.mixed(with: overwritten) }
            return CopyAnswer(isDone: amend(.restoring(nil)))
        case .confirm: return CopyAnswer(isDone: confirm())
        case .finishResuming:
            volume.finishResuming()
            process.pump()
        default: world.fail("'\(action)' is none of a start here")
        }
        return .done
    }

    private func take(_ role: RoleStart) {
        for copy in table.copies where copy.state == .active && images[copy.id] == nil {
            world.fail("copy \(copy.id.label) of volume \(index) is active again, although it had failed, or had left")
        }
        volume.recording = true
        let regions = activeRegions()
        let bitmapFile = process.addStore(.bitmap(recording))
        let logFile = process.addStore(.file(log))
        readLog { volume.startActivityLog(file: logFile, contents: $0, recordingFile: bitmapFile) }
        if role.marksAll { volume.markAllChanged() }
        if role.marksRegions, fault != .trustBitmapsAfterPowerLoss {
            volume.recoverChanges(regions: Bitmap(memory: regions.memory, count: Self.regionCount))
        }
    }

    private static let regionCount = ActivityLog.layout(size: UInt64(size), smallest: regionBytes).count

    private func activeRegions() -> SimulatedBitmap {
        let regions = SimulatedBitmap(bits: 64)
        readLog { _ = ActivityLog.decode($0, into: Bitmap(memory: regions.memory, count: Self.regionCount)) }
        return regions
    }

    /// What was taken up is on stable storage before the record says that it is this run's.
    private func confirm() -> Bool {
        if fault != .skipFlushes { for bitmap in mapped { bitmap.flush() } }
        guard save(table) else { return false }
        isTrusted = true
        (isDistrusted, failedUnwritten) = (false, [])
        return true
    }

    private func open(_ links: [ChainLink]) -> [LinkFiles] {
        nextOrder = CopyRecord.order(after: links.last?.copy.order ?? 0)
        // Files that nobody needs (`StateDirectory.removeOrphans`).
        for id in bitmaps.keys.sorted() where !links.contains(where: { $0.id == id }) {
            bitmaps[id] = nil
            images[id] = nil
        }
        for id in targets.keys.sorted() where !links.contains(where: { $0.copy.targetOwner == id }) {
            targets[id] = nil
        }
        return links.map { link in
            let copy = link.copy
            guard let bitmap = bitmaps[link.id], targets[copy.targetOwner] != nil else {
                // Files come before the record that names them, except those of a copy of which nobody was told yet.
                guard copy.state == .creating else {
                    world.fail(
                        "the \(bitmaps[link.id] == nil ? "bitmap" : "target") of copy \(link.id.label) of volume \(index), \(copy.state), is missing"
                    )
                    return .damaged
                }
                bitmaps[link.id] = SimulatedBitmap(bits: 256)
                if targets[copy.targetOwner] == nil { targets[copy.targetOwner] = SimulatedFile(byteCount: Self.size) }
                return .whole
            }
            let hasFailed =
                bitmap.memory.load(fromByteOffset: Self.markOffset, as: UInt64.self) == 1
                || failedUnwritten.contains(link.id)
            return hasFailed && fault != .trustFailed ? .failed : .whole
        }
    }

    private func resume(_ link: ChainLink, _ trusted: Bool) {
        let copy = link.copy
        _ = enterChain(copy) { volume, copy in
            volume.resumeCopy(copy, failed: link.resumption == .servesOlder)
            return true
        }
        if copy.isFilled, !trusted {
            let active = activeRegions()
            let regions = Bitmap(memory: active.memory, count: Self.regionCount)
            if isDistrusted || copy.mayLackChanges(in: table.copies) { regions.setAll() }
            volume.recoverChanges(of: copy.id, regions: regions)
        }
        if link.resumption == .leaves { volume.withdrawCopy(copy.id) }
    }

    func startRestore(from id: CopyID, fresh: Bool) {
        let file = process.addStore(.bitmap(pending!))
        let bitmap = Bitmap(memory: pending!.memory, count: Self.grains)
        if fresh { volume.markDifferences(from: id, in: bitmap) }
        volume.startRestore(from: id, pending: bitmap, bitmapFile: file, paused: fresh)
        process.pump()
    }

    // MARK: Crashing

    func crash(powerLoss: Bool) {
        if let at = CopyWorld.watching { noteState(at) }
        process.crash(&world.random)
        // What could not be read would leave open what the next checks must find.
        for file in [source] + targets.values { file.latent = [] }
        if powerLoss { losePower() }
    }

    func losePower() {
        for file in [source, log] { file.losePower(&world.random) }
        for id in targets.keys.sorted() { targets[id]!.losePower(&world.random) }
        for bitmap in mapped { bitmap.losePower(&world.random) }
        isTrusted = false
    }

    func setState(fails: Bool) {
        for file in [log] + targets.values { file.isDead = fails }
        for bitmap in mapped { bitmap.isDead = fails }
    }

    /// Dirty pages reach the disk, flushed or not.
    func writeBack() {
        source.writeBack(&world.random)
        for id in targets.keys.sorted() { targets[id]!.writeBack(&world.random) }
        for bitmap in mapped { bitmap.writeBack(&world.random) }
    }

    func forEachImage(_ change: (inout Contents) -> Void) {
        change(&contents)
        for id in images.keys.sorted() { change(&images[id]!) }
    }

    // MARK: A mirror

    /// It has everything: nothing has changed since.
    func mirror() {
        guard volume.modifyingInFlight == 0, !volume.isRestoring else { return }
        volume.changeRecording.clearAll()
        volume.mergeOutOfSync()
        volume.recountChanges()
        recording.flush()
        source.flush()
        mirrored = source.cached
    }

    /// Rule 2 after power loss: what differs from the mirrored image is marked.
    func checkRecording() {
        guard let mirrored, !volume.isRestoring else { return }
        for grain in 0..<Self.grains {
            let bytes = grain * Self.grain..<min(Self.size, (grain + 1) * Self.grain)
            if mirrored[bytes] != source.cached[bytes], !volume.changeRecording.contains(grain) {
                return world.fail("grain \(grain) changed before power was lost, and nothing says so")
            }
        }
    }

    // MARK: Hosts

    private func range() -> Range<Int> {
        let start = world.busy.lowerBound + world.random.below(world.busy.count)
        let count = world.random.chance(30) ? 8 : 1 + world.random.below(world.random.chance(20) ? 40 : 6)
        return start..<min(Self.sectors, start + count)
    }

    /// The volume, or now and then a writable copy.
    private func writableView() -> CopyID? {
        guard world.random.chance(25) else { return nil }
        return world.random.one(
            of: table.copies.filter { $0.isWritable && $0.state == .active && table.restoring?.copy != $0.id }.map(\.id)
        )
    }

    func write() {
        let id = writableView()
        if id == nil, shutsHostsOut { return }
        guard id == nil || images[id!] != nil else { return }
        if world.random.chance(12) { return flush(id) }
        let sectors = range()
        guard !(id.map { images[$0]! } ?? contents).isBusy(sectors) else { return }
        let kind: Request.Operation = world.random.chance(80) ? .write : world.random.chance(50) ? .writeZeroes : .trim
        let value = world.takeValue()
        let written = kind == .write ? value : 0
        let fua = world.random.chance(10)
        let process = process!
        note("\(kind) to \(name(id)), sectors \(sectors), value \(written)")
        let number = id == nil ? beginRequest() : 0
        let isTaken = process.submit(
            kind, view: id.map { .copy($0) } ?? .volume, offset: sectors.lowerBound * 512, length: sectors.count * 512,
            data: kind == .write ? Self.bytes(written, sectors.count) : nil, fua: fua,
            before: { change(id) { $0.issue(sectors, written, at: world.steps) } }
        ) { [unowned self] request in
            guard process === self.process else { return }
            underWay.remove(number)
            if request.error == 0 {
                change(id) { $0.acknowledge(sectors, durable: fua, at: world.steps) }
            } else if id == nil, !(world.troubled && volume.isRestoring), roles.pointee.sourceLost == 0 {
                // Only where the rest of a grain must come back from a copy that cannot be read, or, with FUA, once the record of what
                // has come back could not be flushed.
                world.fail("a host write fails with \(request.error)")
            } else {
                change(id) { $0.fail(sectors, at: world.steps) }
            }
        }
        if !isTaken { underWay.remove(number) }
    }

    private func beginRequest() -> Int {
        requests += 1
        underWay.insert(requests)
        return requests
    }

    /// What hosts have asked of the volume up to now has been carried out.
    func hasAnswered(upTo last: Int) -> Bool { !underWay.contains { $0 <= last } }
    var lastRequest: Int { requests }

    private func change(_ id: CopyID?, _ body: (inout Contents) -> Void) {
        guard let id else {
            body(&contents)
            if unrestored != nil { body(&unrestored!) }
            return
        }
        if images[id] != nil { body(&images[id]!) }
    }

    private func flush(_ id: CopyID?) {
        let issued = world.steps
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

    /// Copies that clients can read.
    var readable: [CopyID] { images.keys.sorted().filter { table[$0]?.state == .active } }

    func readSomething() {
        let id: CopyID? = world.random.chance(30) ? nil : world.random.one(of: readable)
        _ = read(id, world.random.chance(15) ? 0..<Self.sectors : range())
    }

    @discardableResult
    func read(_ id: CopyID?, _ sectors: Range<Int>, done: @escaping () -> Void = {}) -> Bool {
        if let id, !volume.retainCopy(id) { return false }
        let process = process!
        let issued = world.steps
        let number = id == nil ? beginRequest() : 0
        let accepted = process.submit(
            .read, view: id.map { .copy($0) } ?? .volume, offset: sectors.lowerBound * 512, length: sectors.count * 512
        ) { [unowned self] request in
            if let id { process.volume.releaseCopy(id) }
            if process === self.process { underWay.remove(number) }
            defer { done() }
            guard request.error == 0, process === self.process else {
                if id == nil, request.error != 0, !world.troubled, !hasStalled {
                    world.fail("a read of the volume fails with \(request.error)")
                }
                return
            }
            if let id {
                if table[id]?.state != .active { return }  // its readers are disconnected
            } else if issued <= flippedAt {
                return
            }
            var found: [UInt32] = []
            for index in 0..<sectors.count {
                let bytes = UnsafeRawBufferPointer(start: request.buffer! + index * 512, count: 512)
                let value = bytes.loadUnaligned(as: UInt32.self)
                for word in 1..<128 where bytes.loadUnaligned(fromByteOffset: 4 * word, as: UInt32.self) != value {
                    return world.fail("sector \(sectors.lowerBound + index) of \(name(id)) is torn")
                }
                found.append(value)
            }
            verify(id, sectors, found, issued)
        }
        if !accepted {
            underWay.remove(number)
            if let id { volume.releaseCopy(id) }
        }
        return accepted
    }

    private func name(_ id: CopyID?) -> String { id.map { "copy \($0.label)" } ?? "the volume" }

    private func verify(_ id: CopyID?, _ sectors: Range<Int>, _ found: [UInt32], _ issued: Int) {
        world.checked()
        // What a restore shows before it is decided says nothing of what a crash brings back.
        let wrong: Int? =
            if let id { images[id]?.check(sectors, found, issuedAt: issued) } else {
                contents.check(sectors, found, issuedAt: issued)
            }
        guard let wrong else { return }
        noteState(wrong)
        let expected = (id.flatMap { images[$0] } ?? contents).expected(wrong)
        world.fail(
            "sector \(wrong) of \(name(id)) of volume \(index) holds \(found[wrong - sectors.lowerBound]) instead of \(expected)"
        )
    }

    func readEverything() {
        for id in [nil] + readable {
            var done = false
            guard read(id, 0..<Self.sectors, done: { done = true }) else { continue }
            var patience = 20_000
            while !done, !world.hasFailed {
                process.step(&world.random)
                world.takeEvents()
                patience -= 1
                if patience == 0 {
                    world.fail("a read never ends: \(volume.waiting), \(process.pending.count) I/O pending")
                }
            }
        }
    }

    // MARK: The end

    func compareTargets() throws(SimulationFailure) {
        for copy in table.copies where copy.state == .active && copy.isComplete {
            guard let image = images[copy.id], let target = targets[copy.targetOwner] else { continue }
            for sector in 0..<Self.sectors
            where target.cached[sector * 512..<sector * 512 + 4].elementsEqual(
                withUnsafeBytes(of: image.history[sector].last!.value) { Array($0) }) == false
            {
                throw SimulationFailure("sector \(sector) of the finished target of copy \(copy.id.label) is wrong")
            }
        }
    }

    /// C1: a grain that differs between the volume and a copy counts as changed.
    func compareChanges() throws(SimulationFailure) {
        guard !volume.isRestoring else { return }
        for id in readable {
            let image = images[id]!
            for sector in 0..<Self.sectors
            where image.history[sector].last!.value != contents.history[sector].last!.value {
                // What could not be read is not known.
                if image.open[sector] != nil || contents.open[sector] != nil { continue }
                let run = volume.changedRun(since: id, in: .volume, offset: UInt64(sector) * 512, length: 512)
                if !run.changed {
                    noteState(sector)
                    throw SimulationFailure(
                        "sector \(sector) differs from copy \(id.label), and does not count as changed")
                }
            }
        }
    }

    private static func value(_ file: SimulatedFile?, _ sector: Int) -> String {
        guard let file else { return "none" }
        func word(_ bytes: [UInt8]) -> UInt32 {
            bytes.withUnsafeBytes { $0.loadUnaligned(fromByteOffset: sector * 512, as: UInt32.self) }
        }
        return "\(word(file.cached)) (flushed: \(word(file.durable)))"
    }

    func noteState(_ sector: Int) {
        note("source \(Self.value(source, sector)), restore \(table.restoring.map { "\($0)" } ?? "none")")
        for copy in table.copies {
            let bits = bitmaps[copy.id].map { bitmap in
                [0, 8].map { String(Bitmap(memory: bitmap.memory + $0, count: Self.grains).word(0), radix: 2) }.joined(
                    separator: " ")
            }
            let kind = [
                copy.isFilled ? "filled" : "", copy.isDurable ? "durable" : "", copy.isWritable ? "writable" : "",
            ]
            note(
                "copy \(copy.id.label) order \(copy.order >> 17) \(copy.state) \(kind) preserved, changes: \(bits ?? "none"), target \(Self.value(targets[copy.targetOwner], sector))"
            )
        }
    }
}
