// VolumeState.swift: one volume of a site as the control plane holds it: its files and what they are worth.
//
// Must be prevented:
//   metadata of another volume, of a newer version, or damaged, is taken for this volume's
//   a volume file that was exchanged, or written to while nobody looked, is believed to be what the bitmaps describe

import API
import Base
import CLibURing
import FlashCopies
import Glibc
import Groups
import NBDServer
import Ring
import SiteConfiguration
import Volumes

/// A copy of a volume's chain; identifiers are the volume's own.
struct ChainedCopy: Hashable {
    var volume: String
    var id: CopyID
}

/// Files of one FlashCopy or recovery point.
struct CopyFiles: Sendable {
    var target: ReopenableFile
    var bitmap: BitmapFile
    var targetFile: StoreFile = -1
    var bitmapFile: StoreFile = -1
}

/// The files of a recovery point that is to be made.
struct NewPoint: Sendable {
    var target: String
    /// Bytes of the volume.
    var size: UInt64
    var bitmap: String
    var header: BitmapHeader

    /// On return the files are on stable storage, under their names.
    func make() throws -> CopyFiles {
        let file = try makeTarget(target, size: size)
        let files = CopyFiles(
            target: ReopenableFile(file), bitmap: try BitmapFile(path: bitmap, header: header, create: true))
        try file.synchronize()
        try synchronizeDirectory(parentDirectory(target))
        return files
    }
}

/// An empty sparse file; one that is there is left over from an attempt that was not recorded.
func makeTarget(_ path: String, size: UInt64) throws -> OpenFile {
    unlink(path)
    let target = try OpenFile(path: path, flags: O_RDWR | O_CREAT)
    try target.truncate(to: size)
    return target
}

final class VolumeState {
    let entry: Configuration.VolumeEntry
    let geometry: Geometry
    let source: OpenFile
    let directory: String
    let reactor: ReactorHandle
    private let disks: DiskThreads
    /// What others than the site's thread may read.
    let board: VolumeBoard
    var number: VolumeNumber = -1 { didSet { board.number.store(number, ordering: .releasing) } }
    private let kept: KeptRecord<VolumeRecord>
    var record: VolumeRecord { kept.value }
    let recording: BitmapFile
    /// Takes the old content of a point, and says which grains it has; nil until the volume is a primary's, and if that is memory.
    private(set) var pointHold: PointHold?
    /// Whether the bitmaps of the intermediate are as the last process left them.
    private(set) var changeVolumeIsTrusted = false
    var pointTargetFile: StoreFile = -1
    /// For a point that is held in memory (`HoldPlace.memory`).
    private var madeImageMarks: PoolMemory?
    /// Nil until changes must be recorded: at a primary, and for FlashCopies with a background copy.
    private(set) var activityLog: BitmapFile?
    var activityLogIsOn = false
    var copies: [CopyID: CopyFiles] = [:]
    /// Recovery points whose files hold those that its group keeps, oldest first.
    var carriers: [UInt64] = []
    /// Of copies that have left while the record's file may still name them: `settle` removes them, or the next start.
    private var unnamedFiles: [(id: CopyID, targetOwner: CopyID?)] = []
    /// Their background copies are finished, and that is being written down.
    var completing: Set<CopyID> = []
    var restoreBitmap: BitmapFile?
    var restoreFile: StoreFile = -1
    var debt = DistrustDebt()
    private let marking = Turnstile()
    /// While a restore begins hosts can only read.
    var shutsHostsOut = false
    /// Larger than the order of every copy and point in the chain.
    var nextOrder = CopyRecord.orderStep

    // What the last run left, and what it is worth. The record says what the last run said until all of that was taken up
    // (`confirm`), so that a start that ends before finds the same.
    /// Mapped files are as the last process left them.
    private(set) var isTrusted: Bool
    /// The record is this run's.
    private(set) var isConfirmed = false
    /// The mark of a clean stop.
    let cleanMark: VolumeRecord.CleanMark?
    /// What the last process has left at the volume's own file.
    private let mark: SourceMark?
    /// It could not write down any more what hosts changed, while this file was well: they went on.
    var wasAlone: Bool { mark?.logIsBroken == true }

    /// The peer has noted what the record could not: this start trusts as little as after power loss.
    func distrust(isolation: isolated (any Actor)? = #isolation) async {
        isTrusted = false
        acknowledge { $0.logIsBroken = true }
        try? await settle()
    }

    /// Whether a copy had failed when the last process ended, and could not be marked.
    func hadFailed(_ copy: CopyRecord) -> Bool {
        guard let mark, copy.isDurable else { return false }
        return mark.failed?.contains(copy.id) ?? true
    }
    /// The recording bitmaps say what changed.
    private(set) var recordingIsWhole = true
    /// So does the bitmap of the point that was held.
    private(set) var pointIsWhole = true
    /// The point that the bitmaps are of; nil = they say nothing.
    var heldPoint: UInt64? {
        guard isTrusted, recordingIsWhole, pointIsWhole else { return nil }
        return (recording.mapping.memory + BitmapHeader.rolesOffset).load(as: RecordingRoles.self).heldPoint
    }
    /// What was found wrong and mended, for the log.
    private(set) var findings: [String] = []

    var name: String { entry.name }
    var identity: (UInt64, UInt64) { identityWords(record.id) }

    /// Opens the volume's file and its metadata, creating what is new.
    ///
    /// - Parameters:
    ///   - role: in its group; nil = it is in none.
    ///   - servedAs: what the record says of a volume of that group.
    ///   - hasPoints: the group has recovery points of it.
    ///   - hold: where a point's old content goes.
    ///   - generation: the group's newest.
    init(
        _ entry: Configuration.VolumeEntry, state: StateDirectory, disks: DiskThreads, reactor: ReactorHandle,
        bootID: String, role: Role?, servedAs: String?, hasPoints: Bool, hold: HoldKind?, generation: String,
        force: Bool
    ) throws {
        self.entry = entry
        self.reactor = reactor
        self.disks = disks
        directory = state.volume(entry.name)
        try StateDirectory.makeDirectory(directory)
        try StateDirectory.makeDirectory("\(directory)/copies")
        source = try Self.openSource(entry, force)
        let present = try source.size()
        let size = try source.isRegularFile() ? max(present, entry.size ?? 0) : present
        var found: VolumeRecord?
        let recordFile = try DurableRecord<VolumeRecord>(path: "\(directory)/volume.record", value: &found)
        let grain = found?.grain ?? entry.grain ?? Geometry.defaultGrain(size: size)
        guard let geometry = Geometry(size: size, grain: grain) else {
            throw Refusal("volume '\(entry.name)': \(entry.path) has \(size) bytes, which is no volume")
        }
        self.geometry = geometry
        guard size % UInt64(max(1, source.directAlignment)) == 0 else {
            throw Refusal(
                "volume '\(entry.name)': its size \(size) is no multiple of \(source.directAlignment) bytes, which "
                    + "direct I/O needs; remove cache = \"none\"")
        }
        let mark = if let found { try SourceMark.read(source, volume: found.id) } else { SourceMark?.none }
        self.mark = mark
        var record =
            found
            ?? VolumeRecord(id: randomIdentity(), name: entry.name, size: size, grain: grain, bootID: bootID)
        isTrusted =
            record.clean != nil
            || mark == nil && record.bootID == bootID && Self.storageStayed(record, directory, source)
                && !Self.lostSource("\(directory)/recording.bitmap")
        var findings: [String] = []
        if let mark {
            findings.append("its metadata could not be written any more when the last process ended (see \(directory))")
            record.logIsBroken = record.logIsBroken || mark.logIsBroken
        }
        if found != nil, let change = try Self.changeBehindOurBack(source, record) {
            try Self.refuseIfCopiesAreLost(entry, change, record, hasPoints)
            findings.append("\(change); every grain counts as changed")
            record.servedAs = VolumeRecord.anotherFile
            // What it had still to send would be read from this one.
            pointIsWhole = false
        }
        if record.size < size {
            if present < size {
                record.clean?.modifiedAt = nil  // by us, if a crash follows
                try recordFile.save(record)
                try source.truncate(to: size)
                try source.synchronize()
            }
            findings.append("it has grown from \(record.size) to \(size) bytes")
            try Growth.carryOut(directory, &record, to: geometry, trusted: isTrusted)
            try recordFile.save(record)
        }
        let checksums = record.clean
        cleanMark = checksums
        let identity = identityWords(record.id)
        func header(_ kind: BitmapHeader.Kind, _ bitmaps: Int = 1) -> BitmapHeader {
            BitmapHeader(kind, volume: identity, geometry: geometry, bitmaps: bitmaps)
        }
        let isNew = found == nil
        let directory = self.directory
        var held: BitmapFile?
        func open(_ name: String, _ header: BitmapHeader) throws -> (BitmapFile, whole: Bool) {
            let path = "\(directory)/\(name)"
            if isNew { return (try BitmapFile(path: path, header: header, create: true), true) }
            do {
                let file = try BitmapFile(path: path, header: header)
                try Self.verify(file, name, checksums)
                return (file, true)
            } catch let damage as DamagedMetadata {
                findings.append("\(damage); what it said is lost, and the worst is assumed")
                try beforeReplacing(header.kind)
                let filled = header.kind == .recording ? [0] : []
                return (try BitmapFile(path: path, header: header, create: true, filled: filled), false)
            }
        }
        // What takes the place of a damaged file must not say less than is known: a start that ends here finds it whole.
        func beforeReplacing(_ kind: BitmapHeader.Kind) throws {
            switch kind {
            case .point:
                (held!.mapping.memory + BitmapHeader.rolesOffset)
                    .assumingMemoryBound(to: RecordingRoles.self).pointee.heldPoint = 0
                try held!.synchronize()
            case .activityLog:
                record.logIsBroken = true
                try recordFile.save(record)
            case .recording, .copy, .restore, .change: break
            }
        }
        (recording, recordingIsWhole) = try open("recording.bitmap", header(.recording, 2))
        held = recording
        if role == .secondary || role == .primary && !isNew, found?.servedAs != servedAs {
            try Self.makeGroupFiles(directory, hold == .target ? size : nil, header)
        }
        // A point that another mode held is in no bitmap of this one's.
        if role == .primary, (record.changeVolume != nil) != (hold == .intermediate) { pointIsWhole = false }
        switch role == .primary ? hold : nil {
        case .target:
            let (bitmap, isWhole) = try open(PointHold.targetBitmapName, header(.point))
            pointIsWhole = pointIsWhole && isWhole
            pointHold = PointHold(target: try PointHold.openTarget(directory, size), bitmap: bitmap)
        case .intermediate:
            let change = ChangeVolume(entry.changeVolume, directory: directory, identity: identity, geometry)
            let (file, wasShort) = try change.openFile()
            changeVolumeIsTrusted =
                isTrusted || [bootID, ChangeVolumeRecord.anyBoot].contains(record.changeVolume?.adoptedIn)
            if !wasShort,
                try change.isSame(
                    file, as: record.changeVolume, generation: generation, stoppedInOrder: checksums != nil),
                changeVolumeIsTrusted || record.changeVolume?.isFilled == true,
                case let (bitmap, isWhole) = try open(ChangeVolume.bitmapName, change.header), isWhole
            {
                pointHold = PointHold(target: file, bitmap: bitmap)
            } else {
                try beforeReplacing(.point)
                pointIsWhole = false
                pointHold = PointHold(target: file, bitmap: try change.makeBitmap())
                record.changeVolume = try change.record(file, generation: generation)
                changeVolumeIsTrusted = true
                try recordFile.save(record)
            }
        case .memory, nil: break
        }
        pointHold?.bitmap.mapping.file.rest()
        if role == .primary || record.copies.contains(where: \.isFilled) {
            activityLog = try open("activity.log", header(.activityLog)).0
        }
        self.findings = findings
        try synchronizeDirectory(directory)
        if isNew {
            try synchronizeDirectory("\(state.path)/volumes")
            try recordFile.save(record)
        }
        kept = KeptRecord(record) { record in try await disks.run { try recordFile.save(record) } }
        board = VolumeBoard(entry.name, geometry, reactor)
        showCopies()
    }

    private func showCopies() {
        let copies = record.copies
        board.copies.withLock { $0 = copies }
    }

    // MARK: What only some need

    /// What the volume of a group needs as a primary's has its space from the beginning: a failover may come when the disk is full.
    ///
    /// - Parameter targetSize: of the target of points; nil = they have none.
    private static func makeGroupFiles(
        _ directory: String, _ targetSize: UInt64?, _ header: (BitmapHeader.Kind, Int) -> BitmapHeader
    ) throws {
        var kinds = [("activity.log", BitmapHeader.Kind.activityLog)]
        if targetSize != nil { kinds.append((PointHold.targetBitmapName, .point)) }
        for (name, kind) in kinds {
            guard try !exists("\(directory)/\(name)") else { continue }
            _ = try BitmapFile(path: "\(directory)/\(name)", header: header(kind, 1), create: true)
        }
        if let targetSize { _ = try PointHold.openTarget(directory, targetSize) }
    }

    /// What the volume needs as a primary's, on stable storage.
    func openPointHold() throws -> PointHold {
        if let pointHold { return pointHold }
        let hold = PointHold(
            target: try PointHold.openTarget(directory, geometry.size),
            bitmap: try openLate(PointHold.targetBitmapName, .point))
        hold.bitmap.mapping.file.rest()
        pointHold = hold
        return hold
    }

    /// The same in mode `change-volume`. What was not used as this generation's lacks everything.
    ///
    /// - Returns: whether that is so.
    func openChangeVolume(
        generation: String, isolation: isolated (any Actor)? = #isolation
    ) async throws -> (PointHold, isNew: Bool) {
        if let pointHold, record.changeVolume?.generation == generation { return (pointHold, false) }
        let change = ChangeVolume(entry.changeVolume, directory: directory, identity: identity, geometry)
        let hold = try pointHold ?? PointHold(target: change.openFile().file, bitmap: change.makeBitmap())
        hold.bitmap.mapping.file.rest()
        pointHold = hold
        changeVolumeIsTrusted = true
        let fresh = try change.record(hold.target, generation: generation)
        try await amend { $0.changeVolume = fresh }
        return (hold, true)
    }

    /// Made when the volume first needs them, and kept.
    func imageMarks() throws -> PoolMemory {
        if let madeImageMarks { return madeImageMarks }
        let marks = try PoolMemory(byteCount: HoldPlace.markBytes(geometry))
        madeImageMarks = marks
        return marks
    }

    func openActivityLog() throws -> BitmapFile {
        if let activityLog { return activityLog }
        let log = try openLate("activity.log", .activityLog)
        activityLog = log
        return log
    }

    /// What the start had no need of says nothing that anybody relies on: if it is missing or damaged it is made anew.
    private func openLate(_ name: String, _ kind: BitmapHeader.Kind) throws -> BitmapFile {
        let path = "\(directory)/\(name)"
        let header = BitmapHeader(kind, volume: identity, geometry: geometry)
        do {
            let file = try BitmapFile(path: path, header: header)
            try verify(file, name)
            return file
        } catch is DamagedMetadata {
            let file = try BitmapFile(path: path, header: header, create: true)
            try synchronizeDirectory(directory)
            return file
        }
    }

    // MARK: What the last run left

    /// Whether everything that may hold pages of the last run is still what it was then.
    private static func storageStayed(_ record: VolumeRecord, _ directory: String, _ source: OpenFile) -> Bool {
        guard let known = record.storage else { return true }
        let present = storage(record, directory, source)
        return known.allSatisfy { present[$0.key] == $0.value }
    }

    private static func storage(_ record: VolumeRecord, _ directory: String, _ source: OpenFile) -> [String: String] {
        var found = [source.path: StorageInstance.text(of: source)]
        let operators = record.copies.compactMap(\.target) + [record.changeVolume?.path].compactMap { $0 }
        for path in [directory] + operators {
            guard let file = try? OpenFile(path: path, flags: O_RDONLY) else { continue }
            found[path] = StorageInstance.text(of: file)
        }
        return found
    }

    /// Before the bitmaps are opened, since they may have to grow first.
    private static func lostSource(_ path: String) -> Bool {
        guard let file = try? OpenFile(path: path, flags: O_RDONLY),
            let mark = try? file.read(at: BitmapHeader.sourceLostOffset, count: 1)
        else { return false }
        return mark.first == 1
    }

    /// Everything that the last run left was taken up, and what that changed in the bitmaps is on stable storage: from now on the
    /// record is this run's. Hosts, the peer and work in the background are let in after this.
    func confirm(
        bootID: String, servedAs: String?, isolation: isolated (any Actor)? = #isolation
    ) async throws {
        // A log that is broken, or a flush that failed: only what is flushed now is known to be there.
        if record.logIsBroken || recording.hasLostSource || !isTrusted { try source.synchronize() }
        if recording.hasLostSource { source.dropCache() }
        let roles = (recording.mapping.memory + BitmapHeader.rolesOffset).assumingMemoryBound(to: RecordingRoles.self)
        roles.pointee.sourceLost = 0
        try recording.synchronize()
        for files in copies.values { try files.bitmap.synchronize() }
        if usesChangeVolume { try pointHold?.bitmap.synchronize() }
        // What the log says is in memory, and may not be on disk.
        var logIsWhole = true
        if record.logIsBroken, let activityLog {
            activityLog.mapping.flushFailed()
            logIsWhole = (try? activityLog.synchronize()) != nil
        }
        let usesChangeVolume = usesChangeVolume
        var next = record
        if usesChangeVolume { next.changeVolume?.adoptedIn = nil } else { next.changeVolume = nil }
        let (changeVolume, storage) = (next.changeVolume, Self.storage(next, directory, source))
        let file = try source.identity()
        try await kept.amend { record in
            record.clean = nil
            record.bootID = bootID
            record.storage = storage
            record.file = file
            record.servedAs = servedAs
            record.logIsBroken = !logIsWhole
            record.changeVolume = changeVolume
            for index in record.copies.indices { record.copies[index].completeBytes = nil }
        }
        isConfirmed = true
        if mark != nil { try SourceMark.remove(source) }
    }

    // MARK: What is written down

    /// Notes at the volume's own file what the next start must not rely on.
    ///
    /// - Throws: for a block device, which has no attributes that last.
    func markSource(isolation: isolated (any Actor)? = #isolation) async throws {
        // One after the other: each says what all have said before it.
        await marking.enter()
        defer { marking.leave() }
        let source = source
        let mark = SourceMark(volume: record.id, logIsBroken: debt.log || record.logIsBroken, failed: debt.failed)
        try await disks.run {
            guard try source.isRegularFile() else { throw SystemError("mark \(source.path)", errno: EOPNOTSUPP) }
            try mark.write(source)
        }
    }

    /// Changes the record, durably or not at all.
    func amend(
        isolation: isolated (any Actor)? = #isolation, _ change: (inout VolumeRecord) -> Void
    ) async throws {
        try await kept.amend(change)
        showCopies()
    }

    /// Takes over what has happened already: in memory at once, and in the file as soon as it can be written (`settle`).
    func acknowledge(_ change: (inout VolumeRecord) -> Void) {
        kept.acknowledge(change)
        showCopies()
    }

    /// The record's file may hold another one; `settle` mends that.
    var isUnsaved: Bool { kept.isUnsaved }
    /// So it does, or files wait to be removed.
    var isUnsettled: Bool { kept.isUnsaved || !unnamedFiles.isEmpty }
    func settle(isolation: isolated (any Actor)? = #isolation) async throws {
        try await kept.settle()
        let left = unnamedFiles
        unnamedFiles = []
        for (id, targetOwner) in left { await removeCopyFiles(id, targetOwner: targetOwner) }
    }

    /// Flushes the volume's own file, for whom the outcome matters, through its engine: the kernel tells an error once, and hosts must
    /// hear of it as well.
    func flushSource(isolation: isolated (any Actor)? = #isolation) async throws { try await Self.flushSources([self]) }

    /// The same for several at once.
    static func flushSources(_ volumes: [VolumeState], isolation: isolated (any Actor)? = #isolation) async throws {
        let sources = volumes.map { (reactor: $0.reactor, number: $0.number, path: $0.source.path) }
        try await withThrowingTaskGroup(of: Void.self) { tasks in
            for source in sources {
                tasks.addTask {
                    let errno = await source.reactor.flush(source.number)
                    guard errno == 0 else {
                        throw SystemError(
                            "flush \(source.path), now or since the site was started (restart it)", errno: errno)
                    }
                }
            }
            try await tasks.waitForAll()
        }
    }

    /// Flushes the targets of all copies, for what reads through them. An error counts for the copy jobs that write there as well.
    func flushTargets(isolation: isolated (any Actor)? = #isolation) async throws {
        // All that one at rest has is there already.
        for (id, files) in copies {
            guard let target = files.target.openNow else { continue }
            do { try await disks.run { try target.synchronize() } } catch {
                let (number, errno) = (number, (error as? SystemError)?.errno ?? EIO)
                await reactor.run { $0.hosted(number).volume.targetFlushFailed(id, errno: errno) }
                throw error
            }
        }
    }

    /// After a clean stop a bitmap has the checksum that it had then.
    private static func verify(_ file: BitmapFile, _ name: String, _ mark: VolumeRecord.CleanMark?) throws {
        guard let expected = mark?.checksums[name], name != "activity.log" else { return }
        guard try file.checksum() == expected else {
            throw DamagedMetadata(description: "\(file.path) is not as the last stop left it: some bits are wrong")
        }
    }

    func verify(_ file: BitmapFile, _ name: String) throws { try Self.verify(file, name, cleanMark) }

    private static func openSource(_ entry: Configuration.VolumeEntry, _ force: Bool) throws -> OpenFile {
        let direct = entry.cache == .none ? farcopy_open_direct : 0
        let source: OpenFile
        do {
            source = try OpenFile.storage(path: entry.path, flags: direct, claim: !force, waitMilliseconds: 2000)
        } catch {
            if error.errno == EBUSY {
                throw Refusal(
                    "volume '\(entry.name)': the device \(entry.path) is mounted, or in use by another program; unmount it "
                        + "(`lsblk \(entry.path)`, `fuser -vm \(entry.path)`), or start with --force if that is meant to be"
                )
            }
            guard error.errno == EINVAL, direct != 0 else { throw error }
            throw Refusal(
                "volume '\(entry.name)': the storage of \(entry.path) has no direct I/O; remove cache = \"none\"")
        }
        guard source.tryLock() else {
            throw Refusal("volume '\(entry.name)': \(entry.path) is served by another farcopy process")
        }
        if try source.isRegularFile(), try source.size() == 0, let size = entry.size {
            try source.truncate(to: size)
            try source.synchronize()
            try synchronizeDirectory(parentDirectory(entry.path))
        }
        return source
    }

    // MARK: What others may have done to the file

    private static func changeBehindOurBack(_ source: OpenFile, _ record: VolumeRecord) throws -> String? {
        if let known = record.file, let present = try source.identity(), known != present {
            return "\(source.path) is another file than the one that was served last"
        }
        if let mark = record.clean, let known = mark.modifiedAt, let present = try source.modifiedAt(), known != present
        {
            return "\(source.path) was written to at \(timestamp(Double(present) / 1e9)), while Farcopy was stopped"
        }
        return nil
    }

    private static func refuseIfCopiesAreLost(
        _ entry: Configuration.VolumeEntry, _ change: String, _ record: VolumeRecord, _ hasPoints: Bool
    ) throws {
        let names = record.copies.filter { $0.state == .active }.map { "'\($0.name)'" }
        guard !names.isEmpty || hasPoints else { return }
        let lost = names.isEmpty ? "its recovery points" : "the FlashCopies \(names.joined(separator: ", "))"
        throw Refusal(
            "volume '\(entry.name)': \(change), and \(lost) would be lost; bring the file back as it was, or accept it "
                + "with `farcopy adopt \(entry.name) --config FILE`")
    }

    // MARK: Checking before anything is touched

    /// Checks what can be known without touching anything.
    static func check(_ entry: Configuration.VolumeEntry, state: String) throws {
        let what = "volume '\(entry.name)'"
        var facts = stat()
        if stat(entry.path, &facts) == 0 {
            let kind = facts.st_mode & S_IFMT
            guard kind == S_IFREG || kind == S_IFBLK else {
                throw Refusal("\(what): \(entry.path) is neither a file nor a block device")
            }
            guard access(entry.path, R_OK | W_OK) == 0 else {
                throw Refusal("\(what): \(entry.path) cannot be read and written by this user")
            }
            let size = try OpenFile(path: entry.path, flags: O_RDONLY).size()
            let grows = try kind == S_IFREG && exists("\(state)/volumes/\(entry.name)/volume.record")
            if let wanted = entry.size, wanted != size, size != 0 || kind == S_IFBLK, wanted < size || !grows {
                throw Refusal(
                    "\(what): \(entry.path) has \(size) bytes, the configuration says \(wanted); correct 'size'")
            }
            if size == 0, entry.size == nil {
                throw Refusal("\(what): \(entry.path) is empty; give 'size'")
            }
            try checkRecorded(entry, size: max(size, entry.size ?? 0), state: state)
        } else {
            guard entry.size != nil else {
                throw Refusal("\(what): \(entry.path) does not exist; give 'size' to have it created")
            }
            if try exists("\(state)/volumes/\(entry.name)/volume.record") {
                throw Refusal(
                    "\(what): \(entry.path) is missing, but this site has served it before; bring the file back, "
                        + "or remove \(state)/volumes/\(entry.name) to begin with an empty volume")
            }
            let directory = parentDirectory(entry.path)
            guard access(directory, W_OK) == 0 else {
                throw Refusal("\(what): the directory \(directory) does not exist or cannot be written")
            }
        }
    }

    private static func checkRecorded(_ entry: Configuration.VolumeEntry, size: UInt64, state: String) throws {
        let path = "\(state)/volumes/\(entry.name)/volume.record"
        guard try exists(path) else { return }
        var found: VolumeRecord?
        _ = try DurableRecord(path: path, value: &found)
        guard let found else { return }
        guard found.name == entry.name else {
            throw Refusal(
                "volume '\(entry.name)': \(path) is of volume '\(found.name)'; bring this volume's own directory back, or "
                    + "remove it to begin anew (what it described must then be copied in full)")
        }
        if found.size > size {
            throw Refusal(
                "volume '\(entry.name)': \(entry.path) has \(size) bytes, but had \(found.size) when it was served last; "
                    + "a volume can grow and not shrink; is it another file?")
        }
        if let grain = entry.grain, grain != found.grain {
            throw Refusal(
                "volume '\(entry.name)': the grain is \(found.grain) and cannot be changed to \(grain) without a new "
                    + "first copy; remove 'grain', or the directory \(state)/volumes/\(entry.name)")
        }
    }

    // MARK: Copies

    /// Bytes that the last run left changed, at most; for a volume that is not hosted yet.
    var changesLeft: UInt64 {
        let grains = recording.bitmap(0).population() + recording.bitmap(1).population()
        let regions = isTrusted || activityLog == nil ? 0 : activeRegions.bitmap.population()
        return UInt64(grains) * UInt64(geometry.grain) + UInt64(regions)
            << UInt64(ActivityLog.layout(size: geometry.size).shift)
    }

    func header(ofCopy id: CopyID, recordsChanges: Bool) -> BitmapHeader {
        BitmapHeader(.copy, volume: identity, geometry: geometry, copy: id, bitmaps: recordsChanges ? 2 : 1)
    }

    var restoreBitmapPath: String { "\(directory)/restore.bitmap" }
    var restoreHeader: BitmapHeader { BitmapHeader(.restore, volume: identity, geometry: geometry) }
    /// The regions that the last run was active in.
    var activeRegions: Regions {
        guard let activityLog else { invariantFailed("who asks for regions has opened the log", #fileID, #line) }
        return Regions(size: geometry.size, log: activityLog.contents)
    }

    func bitmapPath(_ id: CopyID) -> String { "\(directory)/copies/\(id).bitmap" }
    func targetPath(_ owner: CopyID) -> String { "\(directory)/copies/\(owner).target" }

    /// Opens the sparse target of a copy in the state directory.
    func openTarget(_ owner: CopyID) throws -> OpenFile {
        guard try exists(targetPath(owner)) else {
            throw DamagedMetadata(description: "\(targetPath(owner)) is missing")
        }
        let target = try OpenFile(path: targetPath(owner), flags: O_RDWR)
        if try target.size() != geometry.size {
            throw DamagedMetadata(
                description:
                    "\(targetPath(owner)) has \(try target.size()) bytes instead of \(geometry.size): it was cut short")
        }
        return target
    }

    func newPoint(_ id: CopyID) -> NewPoint {
        NewPoint(
            target: targetPath(id), size: geometry.size, bitmap: bitmapPath(id),
            header: header(ofCopy: id, recordsChanges: false))
    }

    /// Lets go of a copy's files and removes those that lie in the state directory.
    func removeCopyFiles(
        _ id: CopyID, targetOwner: CopyID?, isolation: isolated (any Actor)? = #isolation
    ) async {
        copies[id] = nil
        let paths = [bitmapPath(id)] + (targetOwner.map { [targetPath($0)] } ?? [])
        try? await disks.run { for path in paths { unlink(path) } }
    }

    /// The same, once no record's file may name the copy any more: without its files it would take the older ones with it.
    func removeUnnamedFiles(
        _ id: CopyID, targetOwner: CopyID?, isolation: isolated (any Actor)? = #isolation
    ) async {
        unnamedFiles.append((id, targetOwner))
        try? await settle()
    }

    /// Whether a copy is neither written down as one of the volume's nor carries a recovery point of its group.
    func copyIsRetired(_ id: CopyID) -> Bool {
        !record.copies.contains { $0.id == id } && !carriers.contains { CopyID($0) == id }
    }

    func copyRecord(_ name: String) -> CopyRecord? {
        record.copies.first { $0.name == name && $0.isListed }
    }

    func amend(_ change: CopyChange, isolation: isolated (any Actor)? = #isolation) async throws {
        try await amend { $0.table.apply(change) }
    }

    func place(_ id: CopyID) -> ChainedCopy { ChainedCopy(volume: name, id: id) }

    // MARK: Stopping

    private var usesChangeVolume: Bool { pointHold?.isIntermediate == true }

    private var bitmaps: [(name: String, file: BitmapFile)] {
        var all = [("recording.bitmap", recording)]
        if let pointHold { all.append((pointHold.bitmapName, pointHold.bitmap)) }
        if let restoreBitmap { all.append(("restore.bitmap", restoreBitmap)) }
        return all + copies.map { ("copies/\($0.key).bitmap", $0.value.bitmap) }
    }

    /// Everything is on stable storage, and the record says how it was left.
    func finish(isolation: isolated (any Actor)? = #isolation) async throws {
        guard !recording.hasLostSource else { throw SystemError("flush \(source.path)", errno: EIO) }
        try source.synchronize()
        do { try pointHold?.target.synchronize() } catch {
            // The next start, in the same boot, hears of no error.
            pointHold?.distrust(heldBy: recording, geometry)
            acknowledge { $0.changeVolume?.isFilled = false }
            try? await settle()
            throw error
        }
        for files in copies.values { try files.target.openNow?.synchronize() }
        var mark = VolumeRecord.CleanMark(stoppedAt: realSeconds(), modifiedAt: try source.modifiedAt(), checksums: [:])
        for (name, file) in bitmaps {
            try file.synchronize()
            mark.checksums[name] = try file.checksum()
        }
        let changedAt = usesChangeVolume ? try pointHold?.target.modifiedAt() : nil
        try await amend { record in
            record.clean = mark
            record.changeVolume?.modifiedAt = changedAt
        }
    }

    var setup: VolumeSetup {
        VolumeSetup(name: name, geometry: geometry, source: source, recording: recording.mapping)
    }
}
