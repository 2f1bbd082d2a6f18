// FlashCopies.swift: `farcopy flashcopy create | list | show | set | withdraw`.
//
// Must be prevented:
//   a copy takes old content before it is written down (a crash would lose what older copies need)
//   copies of several volumes are of different instants
//   a target overwrites something that is in use

import API
import Base
import FoundationEssentials
import Glibc
import Groups
import NBDServer
import Ring
import Volumes

/// A copy on its way into a volume's chain.
struct NewCopy {
    var volume: VolumeState
    var record: CopyRecord
    var files: CopyFiles
}

extension Site {
    /// Bytes a second of a background copy when nothing is said.
    static let usualRate: UInt64 = 100 << 20

    func members(_ names: [String]) throws -> [VolumeState] {
        guard !names.isEmpty, Set(names).count == names.count else {
            throw Refusal("name each volume once, and at least one", .misuse)
        }
        return try names.map { name in
            guard let volume = volumes[name] else {
                let known = volumes.keys.sorted().joined(separator: ", ")
                throw Refusal("there is no volume '\(name)'; known: \(known)", .unknown)
            }
            return volume
        }
    }

    // MARK: Creating

    /// Takes FlashCopies of several volumes at one instant.
    package func createFlashCopy(_ request: FlashCopyRequest) async throws -> [FlashCopyReport] {
        await copyTurnstile.enter()
        defer { copyTurnstile.leave() }
        let members = try members(request.volumes)
        try checkCopyName(request.name)
        try checkTargets(request)
        try requireDescriptors(forCopies: members.count)
        for volume in members {
            try checkFree(request.name, volume)
            try checkNotSecondary(
                volume, ", which is consistent at its recovery points only; clone one of those, or fail over first")
        }
        try await frozen(members, request.name) {
            try await self.patiently(request.name) { try await self.establish(request, members) }
        }
        note(nil, "FlashCopy '\(request.name)' of \(request.volumes.joined(separator: ", ")) created")
        return try await reports(request.name, members)
    }

    func checkFree(_ name: String, _ volume: VolumeState) throws {
        if volume.copyRecord(name) != nil {
            throw Refusal(
                "volume '\(volume.name)' has a FlashCopy '\(name)' already; withdraw it or choose another name")
        }
        guard volume.copies.count < Limits.copiesPerVolume - 8 else {
            throw Refusal(
                "volume '\(volume.name)' has \(volume.copies.count) copies, which is the limit; withdraw some")
        }
        try checkNotRestoring(volume)
    }

    /// FlashCopies leave room for the recovery points that groups of this site are yet to keep.
    func requireDescriptors(forCopies count: Int) throws {
        var toCome = 0
        for group in groups.values where group.record.role == .secondary {
            toCome += group.entry.volumes.count * (group.record.points.isEmpty ? 2 : 1)
        }
        try descriptors.require(2 * (count + toCome))
    }

    func checkNotRestoring(_ volume: VolumeState) throws {
        let failingBack = group(ofVolume: volume.name)?.record.failedOver?.restoring.contains(volume.name) ?? false
        if let group = group(ofVolume: volume.name), group.record.handingOver != nil || group.isJoining {
            throw Refusal("group '\(group.entry.name)' is changing roles; try again when it has")
        }
        guard volume.record.restoring == nil, !failingBack else {
            throw Refusal(
                "volume '\(volume.name)' is being restored; wait until `farcopy status` shows no more bytes to restore")
        }
    }

    func checkNotSecondary(_ volume: VolumeState, _ advice: String) throws {
        guard group(ofVolume: volume.name)?.record.role == .secondary else { return }
        throw Refusal("volume '\(volume.name)' is a secondary\(advice)")
    }

    /// The hold's deadline let acknowledgements go before every volume was ready; `patiently` tries again.
    func heldApart(_ done: String) -> Refusal {
        Refusal(
            "the volumes could not be held together within \(Limits.holdMilliseconds) ms; nothing was \(done), try again",
            .passing)
    }

    func checkCopyName(_ name: String) throws {
        let valid =
            !name.isEmpty && name.utf8.count <= 64 && !name.allSatisfy(\.isNumber) && name != "secondary"
            && name.utf8.allSatisfy { $0 > 0x20 && $0 < 0x7F && $0 != 0x40 && $0 != 0x2F && $0 != 0x3A }
        guard valid else {
            throw Refusal(
                "'\(name)' is no name for a FlashCopy: use 1 to 64 printable characters without '@', '/', ':' and "
                    + "space, not only digits (those are recovery points), and not 'secondary'", .misuse)
        }
    }

    func checkTargets(_ request: FlashCopyRequest) throws {
        guard let targets = request.targets else { return }
        guard targets.count == request.volumes.count else {
            throw Refusal(
                "\(targets.count) targets for \(request.volumes.count) volumes: give one for each, in the same order",
                .misuse)
        }
        let paths = TargetPaths(allowed: configuration.targets, state: configuration.state)
        for target in targets { try paths.check(target) }
    }

    /// A busy machine may let the hold's deadline pass; a few tries later it seldom does.
    func patiently(_ name: String, _ body: () async throws -> Void) async throws {
        var triesLeft = 5
        while true {
            triesLeft -= 1
            do {
                return try await body()
            } catch let error as Refusal where error.kind == .passing && triesLeft > 0 {
                logger.info("FlashCopy '\(name)': \(error); trying again")
            }
        }
    }

    func establish(_ request: FlashCopyRequest, _ members: [VolumeState]) async throws {
        let set = randomIdentity()
        let made = try await prepareAll(members) { index in
            try await self.prepare(
                request, members[index], target: request.targets?[index], order: members[index].takeOrder(), set: set)
        }
        let intact = await together(members) { index in
            await self.enterChain(made[index].volume, made[index].record, made[index].files) { $0.addCopy($1) }
        }
        try await conclude(made, intact)
    }

    /// Prepares a copy on each volume, or on none.
    func prepareAll(
        _ members: [VolumeState], each: (Int) async throws -> NewCopy
    ) async throws -> [NewCopy] {
        var made: [NewCopy] = []
        do {
            for index in members.indices { made.append(try await each(index)) }
        } catch {
            for copy in made { try? discard(copy) }  // what cannot be written, a start does
            throw error
        }
        return made
    }

    /// Writes a copy down and makes its files; it takes nothing yet.
    func prepare(
        _ request: FlashCopyRequest, _ volume: VolumeState, target: String?, order: UInt64, set: String? = nil,
        originIsDurable: Bool? = nil
    ) async throws -> NewCopy {
        var record = CopyRecord(
            id: VolumeRecord.firstCopyID + volume.record.nextCopy, name: request.name, createdAt: realSeconds(),
            order: order, state: .creating)
        let number = volume.number
        let chainIsDurable = await volume.reactor.run { $0.hosted(number).volume.chainIsDurable }
        record.isFilled = request.copy ?? false
        record.rate = request.rate ?? Self.usualRate
        record.isWritable = request.writable ?? false
        record.isDurable = originIsDurable ?? (request.durable ?? false || chainIsDurable)
        record.target = target
        record.set = set
        let opened: OpenFile
        if let target {
            (opened, record.targetIsZero) = try await openOperatorTarget(target, volume)
        } else {
            opened = try await newTarget(volume, record.id)
        }
        return try await writeDown(record, volume, opened)
    }

    func writeDown(_ record: CopyRecord, _ volume: VolumeState, _ target: OpenFile) async throws -> NewCopy {
        if record.isFilled { try await startActivityLog(volume) }
        let header = volume.header(ofCopy: record.id, recordsChanges: record.isFilled)
        let (path, directory) = (volume.bitmapPath(record.id), "\(volume.directory)/copies")
        let (files, storage) = try await disks.run {
            let bitmap = try BitmapFile(path: path, header: header, create: true)
            if record.isDurable {
                try target.synchronize()
                try synchronizeDirectory(directory)
            }
            return (
                CopyFiles(target: ReopenableFile(target), bitmap: bitmap),
                record.target.map { _ in StorageInstance.text(of: target) }
            )
        }
        do {
            try volume.amend { written in
                written.nextCopy += 1
                written.copies.append(record)
                if let path = record.target { written.storage?[path] = storage }
            }  // from here on a crash finds it
        } catch {
            volume.removeCopyFiles(record.id, targetOwner: record.ownTarget)
            throw error
        }
        return NewCopy(volume: volume, record: record, files: files)
    }

    func newTarget(_ volume: VolumeState, _ owner: CopyID) async throws -> OpenFile {
        let (path, size) = (volume.targetPath(owner), volume.geometry.size)
        return try await disks.run { try makeTarget(path, size: size) }
    }

    func openOperatorTarget(_ path: String, _ volume: VolumeState) async throws -> (OpenFile, isZero: Bool) {
        let (name, size) = (volume.name, volume.geometry.size)
        return try await disks.run { try Self.operatorTarget(path, of: name, size) }
    }

    /// A file or device of the operator's, and whether it reads as zeroes.
    ///
    /// - Parameters:
    ///   - name, size: of the volume.
    ///   - recorded: it holds data of a copy, and so must be as large as that left it.
    static func operatorTarget(
        _ path: String, of name: String, _ size: UInt64, recorded: Bool = false
    ) throws -> (OpenFile, isZero: Bool) {
        let target: OpenFile
        do {
            target = try OpenFile.storage(path: path, waitMilliseconds: recorded ? 2000 : 0)
        } catch {
            throw Refusal(
                error.errno == EBUSY
                    ? "the target \(path) is mounted, or in use by another program (`fuser -vm \(path)`); give a device that nobody uses"
                    : "target: \(error)")
        }
        guard target.tryLock() else {
            throw Refusal("the target \(path) is in use: it is a volume, or the target of another FlashCopy")
        }
        let present = try target.size()
        if try target.isRegularFile() {
            if recorded, present != size {
                throw DamagedMetadata(
                    description: "the target \(path) has \(present) bytes instead of \(size): it was cut short")
            }
            guard present == 0 || present == size else {
                throw Refusal(
                    "the target \(path) has \(present) bytes, volume '\(name)' has \(size); give a file of that size, "
                        + "or a new one")
            }
            if present == 0 { try target.truncate(to: size) }
            return (target, present == 0)
        }
        guard present >= size else {
            throw Refusal("the target \(path) has \(present) bytes, volume '\(name)' needs \(size)")
        }
        return (target, false)
    }

    /// Does something on every volume at one instant: acknowledgements are held while it is done. False when the hold's
    /// deadline passed.
    func together(
        _ members: [VolumeState], each: (Int) async -> Void
    ) async -> Bool {
        for index in members.indices {
            let number = members[index].number
            await members[index].reactor.run { $0.hold(number) }
            await each(index)
        }
        var intact = true
        for volume in members {
            let number = volume.number
            if await !volume.reactor.run({ $0.releaseHold(number) }) { intact = false }
        }
        return intact || members.count == 1
    }

    /// Gives the files of a new copy to the volume's reactor, and the copy to `place` there.
    func enterChain(
        _ volume: VolumeState, _ record: CopyRecord, _ parts: CopyFiles, targetFile: StoreFile? = nil,
        place: @escaping @Sendable (Volume, FlashCopy) -> Void
    ) async {
        let entry = Self.chainEntry(volume.number, record, parts, targetFile: targetFile, place: place)
        let (target, bitmap) = await volume.reactor.run(entry)
        entered(volume, record, parts, target, bitmap)
    }

    /// The same for the reactor's thread; `entered` must follow with the numbers that it returns.
    static func chainEntry(
        _ number: VolumeNumber, _ record: CopyRecord, _ parts: CopyFiles, targetFile: StoreFile? = nil,
        place: @escaping @Sendable (Volume, FlashCopy) -> Void
    ) -> @Sendable (Reactor) -> (StoreFile, StoreFile) {
        { reactor in
            let hosted = reactor.hosted(number)
            let isPoint = record.id < VolumeRecord.firstCopyID
            let target = targetFile ?? hosted.addFile(parts.target, mayRest: isPoint)
            let bitmap = hosted.addFile(parts.bitmap.mapping.file, mapping: parts.bitmap.mapping, mayRest: isPoint)
            place(
                hosted.volume,
                FlashCopy(
                    id: record.id, targetFile: target, bitmapFile: bitmap, preserved: parts.bitmap.bitmap(),
                    changes: record.isFilled ? parts.bitmap.bitmap(1) : nil,
                    failureMark: parts.bitmap.failureMark(), durable: record.isDurable,
                    targetIsZero: record.targetIsZero, isFilled: record.isFilled, rate: record.rate))
            return (target, bitmap)
        }
    }

    func entered(
        _ volume: VolumeState, _ record: CopyRecord, _ parts: CopyFiles, _ target: StoreFile, _ bitmap: StoreFile
    ) {
        var files = parts
        (files.targetFile, files.bitmapFile) = (target, bitmap)
        volume.copies[record.id] = files
        fillStarts[record.id] = nil
        // A small one may be complete before it was known here, and says so once.
        if record.isFilled { Task { await reviewCompletion(volume, record.id) } }
    }

    /// What a durable copy reads elsewhere is on stable storage before anybody is told of it.
    func settle(_ copy: NewCopy) async throws {
        guard copy.record.isDurable else { return }
        try await copy.volume.flushSource()
        try await copy.volume.flushTargets(disks)
        try synchronizeChanges(copy.volume)
    }

    /// What a copy that left had noted is in the bitmaps of older ones now; they are on stable storage before its own goes.
    func synchronizeChanges(_ volume: VolumeState) throws {
        for files in volume.copies.values where files.bitmap.header.bitmaps > 1 { try files.bitmap.synchronize() }
    }

    /// Records that the copies are there; or takes them out again when they are not of one instant.
    func conclude(_ made: [NewCopy], _ intact: Bool) async throws {
        guard intact else {
            for copy in made { await leave(copy.volume, copy.record.id) }
            await waitUntilGone(made)
            throw heldApart("created")
        }
        do {
            for copy in made { try await settle(copy) }
            for copy in made { try copy.volume.update(copy.record.id) { $0.beActive() } }
        } catch {
            await giveUp(made)
            throw error
        }
        for copy in made { publish(copy.volume, group(ofVolume: copy.volume.name)) }
    }

    /// Takes copies out that may be recorded as active: one that leaves preserves nothing any more, and so must not be served by a
    /// start that finds such a record, of this copy or of another of its set.
    private func giveUp(_ made: [NewCopy]) async {
        for copy in made { copy.volume.acknowledge(copy.record.id) { $0.state = .withdrawing } }
        guard made.contains(where: { $0.volume.isUnsaved }) else {
            for copy in made { await leave(copy.volume, copy.record.id) }
            return
        }
        Task {
            await wait(seconds: nil) { !made.contains { $0.volume.isUnsaved } }
            guard !isStopping else { return }
            for copy in made { await leave(copy.volume, copy.record.id) }
        }
    }

    /// A site may end between the records of copies that were taken together (`CopyRecord.set`): all of them are there, or leave.
    func completeSets() throws {
        func sets(_ state: CopyRecord.State) -> Set<String> {
            Set(volumes.values.flatMap { $0.record.copies.filter { $0.state == state }.compactMap(\.set) })
        }
        let (taken, givenUp) = (sets(.active), sets(.withdrawing))
        for volume in volumes.values {
            let decided = volume.record.copies.compactMap { copy -> (CopyID, CopyRecord.State)? in
                guard let set = copy.set else { return nil }
                if givenUp.contains(set), copy.state == .active || copy.state == .creating {
                    return (copy.id, .withdrawing)
                }
                return taken.contains(set) && copy.state == .creating ? (copy.id, .active) : nil
            }
            guard !decided.isEmpty else { continue }
            try volume.amend { record in for (id, state) in decided { record.change(id) { $0.state = state } } }
        }
    }

    /// Takes a copy out of the chain; `copyWithdrawn` follows.
    func leave(_ volume: VolumeState, _ id: CopyID) async {
        let number = volume.number
        let present = await volume.reactor.run { reactor in
            reactor.disconnectReaders(number, of: id)
            reactor.hosted(number).volume.withdrawCopy(id)
            return reactor.hosted(number).volume.copy(id) != nil
        }
        if !present { copyWithdrawn(volume, id) }
    }

    /// Another try may want the same targets; five seconds are enough unless older copies need a lot.
    func waitUntilGone(_ copies: [NewCopy]) async {
        await wait(seconds: 5) { !copies.contains { $0.volume.copies[$0.record.id] != nil } }
    }

    /// Takes back what was prepared; a target that belongs to the copy before stays.
    func discard(_ copy: NewCopy) throws {
        let (record, volume) = (copy.record, copy.volume)
        try volume.amend { $0.copies.removeAll { $0.id == record.id } }
        volume.removeCopyFiles(record.id, targetOwner: record.ownTarget)
    }

    // MARK: Showing

    package func listFlashCopies() async throws -> [FlashCopyReport] {
        var all: [FlashCopyReport] = []
        for volume in volumes.values.sorted(by: { $0.name < $1.name }) {
            for record in volume.record.copies
            where record.isListed && !record.name.hasPrefix(Self.verifyPrefix) {
                all.append(await report(volume, record))
            }
        }
        return all
    }

    package func showFlashCopy(_ name: String, _ names: [String]) async throws -> [FlashCopyReport] {
        try await reports(name, try copies(name, members(names)).map(\.0))
    }

    func reports(_ name: String, _ members: [VolumeState]) async throws -> [FlashCopyReport] {
        var found: [FlashCopyReport] = []
        for (volume, record) in try copies(name, members) { found.append(await report(volume, record)) }
        return found
    }

    /// The volumes with the records of their copies of that name.
    func copies(_ name: String, _ members: [VolumeState]) throws -> [(VolumeState, CopyRecord)] {
        try members.map { volume in
            guard let record = volume.copyRecord(name) else {
                let known = volume.record.copies.map(\.name).joined(separator: ", ")
                throw Refusal(
                    "volume '\(volume.name)' has no FlashCopy '\(name)'; it has \(known.isEmpty ? "none" : known)",
                    .unknown)
            }
            return (volume, record)
        }
    }

    private func report(_ volume: VolumeState, _ record: CopyRecord) async -> FlashCopyReport {
        let (number, id, grain) = (volume.number, record.id, UInt64(volume.geometry.grain))
        let grains = await volume.reactor.run { $0.hosted(number).volume.copy(id)?.preservedCount ?? 0 }
        var report = FlashCopyReport(
            volume: volume.name, name: record.name, export: "\(volume.name)@\(record.name)",
            createdAt: timestamp(record.createdAt), state: record.state.rawValue, reason: record.reason,
            writable: record.isWritable,
            survivesPowerLoss: record.state == .active && (record.isDurable || record.isComplete),
            target: record.target ?? volume.targetPath(record.targetOwner),
            preservedBytes: min(volume.geometry.size, UInt64(grains) * grain), size: volume.geometry.size)
        guard record.isFilled else { return report }
        let now = monotonicNanoseconds()
        let start = fillStarts[id] ?? (now, grains)
        fillStarts[id] = start
        let seconds = Double(now - start.0) / 1e9
        let rate = seconds > 0 ? Double(grains - start.1) * Double(grain) / seconds : 0
        let left = Double(volume.geometry.size - report.preservedBytes)
        report.backgroundCopy = FlashCopyReport.BackgroundReport(
            complete: record.isComplete, rateBytesPerSecond: record.rate, measuredBytesPerSecond: rate,
            etaSeconds: record.isComplete
                ? nil : rate > 0 ? left / rate : record.rate > 0 ? left / Double(record.rate) : nil)
        return report
    }

    // MARK: Changing and ending

    /// Changes the rate of a background copy, or whether clients may write.
    package func setFlashCopy(_ request: FlashCopyRequest) async throws -> [FlashCopyReport] {
        await copyTurnstile.enter()
        defer { copyTurnstile.leave() }
        let members = try members(request.volumes)
        for (volume, record) in try copies(request.name, members) {
            let (number, id) = (volume.number, record.id)
            try volume.update(id) { copy in
                copy.rate = request.rate ?? copy.rate
                if let writable = request.writable { copy.allowWrites(writable) }
            }
            if let rate = request.rate {
                fillStarts[id] = nil
                await volume.reactor.run { $0.hosted(number).volume.setRate(id, rate) }
            }
            publish(volume, group(ofVolume: volume.name))
            if request.writable == false { await volume.reactor.run { $0.disconnectReaders(number, of: id) } }
        }
        return try await reports(request.name, members)
    }

    /// Takes FlashCopies out of service; readers are disconnected, and what older copies need is handed over first.
    package func withdrawFlashCopy(_ request: FlashCopyRequest) async throws {
        await copyTurnstile.enter()
        defer { copyTurnstile.leave() }
        let found = try copies(request.name, members(request.volumes))
        for (volume, record) in found where volume.record.restoring?.copy == record.id {
            throw Refusal(
                "volume '\(volume.name)' is being restored from '\(request.name)'; wait until it holds all of it")
        }
        for (volume, record) in found {
            guard volume.copies[record.id] != nil else {
                forget(volume, record.id, wasInChain: false)
                continue
            }
            try volume.update(record.id) { copy in
                copy.state = .withdrawing
                copy.set = nil  // this one alone
            }
            publish(volume, group(ofVolume: volume.name))
            await leave(volume, record.id)
        }
        note(nil, "FlashCopy '\(request.name)' of \(request.volumes.joined(separator: ", ")) withdrawn")
    }

    // MARK: Events

    func copyFailed(_ volume: VolumeState, _ id: CopyID, _ errno: Int32) async {
        let name = volume.record.copies.first { $0.id == id }?.name ?? String(id)
        let isRetired = volume.copyIsRetired(id)
        let reason = await markFailed(volume, id, errno)
        // What was leaving already, and only had readers left.
        if isRetired, !waitsToLeave(volume, id) { await leave(volume, id) }
        note(nil, "volume \(volume.name): FlashCopy '\(name)' has failed: \(reason)")
        copyReady(id)  // a refresh that waits for it begins again
        publish(volume, group(ofVolume: volume.name))
    }

    /// - Returns: why, in words.
    @discardableResult
    func markFailed(_ volume: VolumeState, _ id: CopyID, _ errno: Int32) async -> String {
        let target = volume.copies[id].map { " in \($0.target.path)" } ?? ""
        let reason = "old content could not be preserved\(target): \(String(cString: strerror(errno)))"
        volume.acknowledge(id) { copy in
            copy.state = .failed
            copy.reason = reason
        }
        if let group = group(ofVolume: volume.name) { await failPoints(group, volume, UInt64(id)) }
        return reason
    }

    /// Recovery points that have failed are none any more (`GroupChange.pointFailed`).
    private func failPoints(_ group: GroupState, _ volume: VolumeState, _ carrier: UInt64) async {
        guard volume.carriers.contains(carrier) else { return }
        try? await group.handle.change(.pointFailed(carrier, volume: volume.name))
        await settlePoints(group, endsReaders: true)
    }

    private func reviewCompletion(_ volume: VolumeState, _ id: CopyID) async {
        let number = volume.number
        guard await volume.reactor.run({ $0.hosted(number).volume.copy(id)?.isComplete }) == true,
            volume.record.copies.contains(where: { $0.id == id && !$0.isComplete })
        else { return }
        await copyCompleted(volume, id)
    }

    /// The background copy is finished; once its data is on stable storage the target is an image by itself.
    func copyCompleted(_ volume: VolumeState, _ id: CopyID) async {
        guard let files = volume.copies[id], let record = volume.record.copies.first(where: { $0.id == id }) else {
            return
        }
        do { try await disks.run { try files.target.open().synchronize() } } catch {
            let (number, errno) = (volume.number, (error as? SystemError)?.errno ?? EIO)
            volume.reactor.perform { $0.hosted(number).volume.targetFlushFailed(id, errno: errno) }
            return
        }
        let directory = "\(volume.directory)/copies"
        do {
            try await disks.run {
                try files.bitmap.synchronize()
                try synchronizeDirectory(directory)
            }
            // It may have failed, or left, meanwhile.
            guard volume.record.copies.contains(where: { $0.id == id && $0.state != .failed && $0.state != .lost })
            else { return }
            try volume.update(id) { $0.isComplete = true }
        } catch {
            note(
                nil, "volume \(volume.name): the background copy of '\(record.name)' is not complete for sure: \(error)"
            )
            return
        }
        note(nil, "volume \(volume.name): the background copy of '\(record.name)' is complete")
    }

    /// A copy has left the chain: its record and files go, or, when only its content was lost, its files.
    func copyWithdrawn(_ volume: VolumeState, _ id: CopyID) {
        let files = volume.copies.removeValue(forKey: id)
        if let files {
            let number = volume.number
            volume.reactor.perform { reactor in
                reactor.hosted(number).removeFile(files.targetFile)
                reactor.hosted(number).removeFile(files.bitmapFile)
            }
        }
        forget(volume, id, wasInChain: files != nil)
        happened()
    }

    private func forget(_ volume: VolumeState, _ id: CopyID, wasInChain: Bool) {
        let record = volume.record.copies.first { $0.id == id }
        // A target that its successor has taken over stays.
        let owner = record?.targetOwner ?? id
        let shared = volume.record.copies.contains { $0.id != id && $0.targetOwner == owner && $0.state != .lost }
        do {
            try synchronizeChanges(volume)
        } catch {
            // Its record still says what older copies may lack: it stays, and leaves with the next start, or when asked again.
            note(
                nil,
                "volume \(volume.name): FlashCopy '\(record?.name ?? String(id))' has left, but that cannot be written down: \(error)"
            )
            return
        }
        volume.acknowledge { record in
            guard let index = record.copies.firstIndex(where: { $0.id == id }) else { return }
            if !wasInChain || !record.copies[index].hasLeft() { record.copies.remove(at: index) }
        }
        volume.removeUnnamedFiles(id, targetOwner: shared || record?.target != nil ? nil : owner)
    }
}
