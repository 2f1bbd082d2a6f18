// CopiesAtSite.swift: the actions of `CopySteps`, as a site carries them out.
//
// Must be prevented:
//   a target overwrites something that is in use
//   what cannot be done at once is forgotten: `onceSaved` waits as long as the site goes on

import API
import Base
import FlashCopies
import Glibc
import Groups
import Link
import NBDServer
import Ring
import Synchronization
import Volumes

/// An operation on FlashCopies: its volumes, and what of it is in no chain yet.
final class CopyWork {
    let volumes: [VolumeState]
    /// Files that are made, by their volume.
    var made: [Int: CopyFiles] = [:]
    /// Files of a chain that is taken up.
    var opened: [CopyID: CopyFiles] = [:]
    /// Forms the point that copies are taken with, and that point.
    var replicator: GroupHandle?
    var point: PointRecord?

    init(_ volumes: [VolumeState]) { self.volumes = volumes }

    var isUnsaved: Bool { volumes.contains(where: \.isUnsaved) }
}

/// What a reactor has made of a copy that was to enter a chain.
struct EnteredCopy: Sendable {
    var target: StoreFile
    var bitmap: StoreFile
    /// It has its place.
    var isIn: Bool
}

extension Site {
    /// Carries an operation out.
    @discardableResult
    func run<Operation: CopySteps>(_ operation: Operation, on work: CopyWork) async throws -> Operation.Outcome {
        var operation = operation
        var answer = CopyAnswer.begin
        while true {
            switch operation.next(after: answer, work.volumes.map(\.record.table)) {
            case .perform(let action): answer = await perform(action, work)
            case .done(let outcome): return outcome
            case .failed(let error): throw error
            }
        }
    }

    @discardableResult
    func run<Operation: CopySteps>(_ operation: Operation, on volumes: [VolumeState]) async throws -> Operation.Outcome
    {
        try await run(operation, on: CopyWork(volumes))
    }

    private func perform(_ action: CopyAction, _ work: CopyWork) async -> CopyAnswer {
        do { return try await tryToPerform(action, work) } catch { return .failed(error) }
    }

    private func tryToPerform(_ action: CopyAction, _ work: CopyWork) async throws -> CopyAnswer {
        func volume(_ index: Int) -> VolumeState { work.volumes[index] }
        switch action {
        case .look(let index, let id): return .chain(await look(volume(index), id))
        case .change(let index, let change): try await note(change, volume(index), work, index)
        case .acknowledge(let index, let change): await acknowledge(change, volume(index))
        case .save(let index): try await volume(index).settle()
        case .onceSaved(let aftermath): await onceSaved(aftermath, work)
        case .makeFiles(let index, let copy, let owner): return try await makeFiles(copy, owner, work, index)
        case .discardFiles(let index, let id, let target):
            work.made[index] = nil
            await volume(index).removeCopyFiles(id, targetOwner: target)
        case .removeFiles(let index, let id, let target):
            work.made[index] = nil
            await removeFiles(volume(index), id, target)
        case .flush(let index):
            try await volume(index).flushSource()
            try await volume(index).flushTargets()
            try await flushChanges(volume(index))
        case .flushChanges(let index): try await flushChanges(volume(index))
        case .flushTarget(let index, let id): try await flushTarget(volume(index), id)
        case .flushBitmap(let index, let id): try await flushBitmap(volume(index), id)
        case .enter(let entries): return await enter(entries, work)
        case .enterWithPoint(let entries): return await enterWithPoint(entries, work)
        case .leave(let index, let id): await leave(volume(index), id)
        case .awaitGone(let places):
            // Five seconds are enough unless older copies need a lot.
            await home.wait(seconds: 5) { !places.contains { work.volumes[$0.volume].copies[$0.id] != nil } }
        case .takeOutOfUse(let index, let id): await takeOutOfUse(volume(index), id)
        case .endReaders(let index, let id):
            let number = volume(index).number
            await volume(index).reactor.run { $0.disconnectReaders(number, of: id) }
        case .findTaken(let ids): return .taken(try findTaken(volume(0), ids))
        case .openFiles(let links): return .opened(try openFiles(links, work))
        case .failPoint(let id): return .pointFailed(isKept: try await failPoint(volume(0), id))
        case .loseFiles(let ids): try await loseFiles(volume(0), ids)
        case .resume(let link): try await resumeLink(volume(0), link, work.opened[link.id]!)
        case .takeRole(let role): try await takeRole(volume(0), role)
        case .resumeRestore(let id): try await resumeRestore(volume(0), from: id)
        case .loseFailover: try await loseFailover(volume(0))
        case .forgetRestore: try await forgetRestore(volume(0))
        case .confirm:
            try await volume(0).confirm(bootID: home.bootID, servedAs: home.group(ofVolume: volume(0).name)?.servedAs)
        case .finishResuming: await letGo(volume(0))
        case .shutHostsOut(let index): await shutOut(volume(index))
        case .admitHosts(let index): await letHostsIn(volume(index))
        case .makeRestoreBitmap(let index): _ = try await makeRestoreBitmap(volume(index))
        case .beginRestore(let index, let id):
            guard await beginRestore(volume(index), from: id, fresh: true) else {
                throw Refusal(
                    "volume '\(volume(index).name)': the FlashCopy has failed meanwhile; nothing was restored")
            }
        case .flushRestoreBitmap(let index): if let file = volume(index).restoreBitmap { try await home.flush([file]) }
        case .goOnRestoring(let index): await home.onEngine(volume(index)) { $0.continueRestore() }
        case .dropRestore(let index): await dropRestore(volume(index))
        }
        return .done
    }

    private func look(_ volume: VolumeState, _ id: CopyID?) async -> ChainLook {
        let record = home.group(ofVolume: volume.name)?.record
        let points = volume.copies.keys.filter { $0 < CopyTable.firstID }.map { id in
            record?.pointRecord(UInt64(id))?.chainOrder ?? UInt64(id)
        }
        let number = volume.number
        let (isDurable, count, copy) = await volume.reactor.run { reactor in
            let engine = reactor.hosted(number).volume
            return (engine.chainIsDurable, engine.chainCount, id.flatMap { engine.copy($0)?.state })
        }
        return ChainLook(
            isDurable: isDurable, nextOrder: volume.nextOrder, points: points, count: count, copy: copy,
            at: realSeconds())
    }

    // MARK: The record

    private func note(_ change: CopyChange, _ volume: VolumeState, _ work: CopyWork, _ index: Int) async throws {
        let target: (path: String, storage: String)? =
            if case .added(let copy) = change, let path = copy.target,
                let file = try work.made[index]?.target.open()
            {
                (path, StorageInstance.text(of: file))
            } else {
                nil
            }
        defer { show(volume) }
        try await volume.amend { record in
            record.table.apply(change)
            if let target { record.storage?[target.path] = target.storage }
        }
    }

    /// Unless its chain is not in place yet.
    private func show(_ volume: VolumeState) {
        if volume.isConfirmed { home.publish(volume, home.group(ofVolume: volume.name)) }
        home.happened()
    }

    func acknowledge(_ change: CopyChange, _ volume: VolumeState) async {
        var table = volume.record.table
        table.apply(change)
        guard table != volume.record.table else { return }  // a recovery point, which the group's record tells of
        volume.acknowledge { $0.table = table }
        show(volume)
        try? await volume.settle()
        home.happened()
    }

    private func onceSaved(_ aftermath: Aftermath, _ work: CopyWork) async {
        for volume in work.volumes { try? await volume.settle() }
        guard work.isUnsaved else { return await carryOut(aftermath, work) }
        let names = work.volumes.map(\.name).joined(separator: ", ")
        home.note(nil, "an operation on FlashCopies of \(names) waits until their records can be written")
        Task {
            await home.wait(seconds: nil) { !work.isUnsaved }
            if !home.isStopping { await carryOut(aftermath, work) }
        }
    }

    private func carryOut(_ aftermath: Aftermath, _ work: CopyWork) async {
        try? await run(aftermath, on: work)  // it ends, whatever fails
    }

    // MARK: Files

    private func makeFiles(
        _ copy: CopyRecord, _ owner: CopyID?, _ work: CopyWork, _ index: Int
    ) async throws -> CopyAnswer {
        let volume = work.volumes[index]
        volume.nextOrder = max(volume.nextOrder, CopyRecord.order(after: copy.order))
        let target: OpenFile
        var isZero = true
        if let owner, let files = volume.copies[owner] {
            (target, isZero) = (try files.target.open(), false)
        } else if let path = copy.target {
            let (name, size) = (volume.name, volume.geometry.size)
            (target, isZero) = try await home.disks.run { try Self.operatorTarget(path, of: name, size) }
        } else {
            let (path, size) = (volume.targetPath(copy.targetOwner), volume.geometry.size)
            target = try await home.disks.run { try makeTarget(path, size: size) }
        }
        if copy.isFilled { try await startActivityLog(volume) }
        let header = volume.header(ofCopy: copy.id, recordsChanges: copy.isFilled)
        let (path, directory) = (volume.bitmapPath(copy.id), "\(volume.directory)/copies")
        let files = try await home.disks.run {
            let bitmap = try BitmapFile(path: path, header: header, create: true)
            if copy.isDurable {
                try target.synchronize()
                try synchronizeDirectory(directory)
            }
            return CopyFiles(target: ReopenableFile(target), bitmap: bitmap)
        }
        work.made[index] = files
        return .files(targetIsZero: isZero)
    }

    /// A file or device of the operator's, and whether it reads as zeroes.
    ///
    /// - Parameters:
    ///   - name, size: of the volume.
    ///   - recorded: it holds data of a copy, and so must be as large as that left it.
    nonisolated static func operatorTarget(
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

    private func openFiles(_ links: [ChainLink], _ work: CopyWork) throws -> [LinkFiles] {
        let volume = work.volumes[0]
        return zip(links, try openFiles(volume, links)).map { link, files in
            guard let files else { return .damaged }
            work.opened[link.id] = files
            return files.bitmap.hasFailed || volume.hadFailed(link.copy) ? .failed : .whole
        }
    }

    private func removeFiles(_ volume: VolumeState, _ id: CopyID, _ target: CopyID?) async {
        if let files = volume.copies.removeValue(forKey: id) {
            let number = volume.number
            // Its successor's, from now on.
            let isShared = volume.copies.values.contains { $0.targetFile == files.targetFile }
            volume.reactor.perform { reactor in
                reactor.hosted(number).removeFile(files.bitmapFile)
                if !isShared { reactor.hosted(number).removeFile(files.targetFile) }
            }
        }
        await volume.removeUnnamedFiles(id, targetOwner: target)
    }

    /// What a copy that left had noted is in the bitmaps of older ones now.
    func flushChanges(_ volume: VolumeState) async throws {
        let noting = volume.copies.values.map(\.bitmap).filter { $0.header.bitmaps > 1 }
        if !noting.isEmpty { try await home.flush(noting) }
    }

    private func flushTarget(_ volume: VolumeState, _ id: CopyID) async throws {
        guard let files = volume.copies[id] else { return }
        do { try await home.disks.run { try files.target.open().synchronize() } } catch {
            let errno = (error as? SystemError)?.errno ?? EIO
            await home.onEngine(volume) { $0.targetFlushFailed(id, errno: errno) }
            throw error
        }
    }

    private func flushBitmap(_ volume: VolumeState, _ id: CopyID) async throws {
        guard let files = volume.copies[id] else { return }
        let directory = "\(volume.directory)/copies"
        try await home.disks.run {
            try files.bitmap.synchronize()
            try synchronizeDirectory(directory)
        }
    }

    // MARK: The chain

    private func enter(_ entries: [CopyEntry], _ work: CopyWork) async -> CopyAnswer {
        let places = entries.map { ServedVolume(work.volumes[$0.volume].reactor, work.volumes[$0.volume].number) }
        let parts = chainEntries(entries, work)
        let taken = Mutex<[Int: EnteredCopy]>([:])
        let outcome = await withCheckedContinuation { continuation in
            holdTogether(places) { reactor, place in
                let made = parts[place](reactor)
                taken.withLock { $0[place] = made }
            } done: {
                continuation.resume(returning: $0)
            }
        }
        let made = taken.withLock { $0 }
        for (place, made) in made { entered(entries[place], made, work) }
        return .entered(
            missed: Set(made.filter { !$0.value.isIn }.map(\.key)),
            // One volume's copy is of one instant, whatever has become of the hold.
            apart: outcome.isIntact || entries.count == 1
                ? nil
                : Refusal(
                    "the volumes could not be held together within \(Limits.holdMilliseconds) ms; nothing was created, try again",
                    .passing))
    }

    private func entered(_ entry: CopyEntry, _ made: EnteredCopy, _ work: CopyWork) {
        guard let files = work.made.removeValue(forKey: entry.volume) else { return }
        entered(work.volumes[entry.volume], entry.copy, files, made)
    }

    private func enterWithPoint(_ entries: [CopyEntry], _ work: CopyWork) async -> CopyAnswer {
        guard let replicator = work.replicator else {
            return .entered(missed: Set(entries.indices), apart: Refusal("the group does not mirror", .passing))
        }
        let parts = chainEntries(entries, work)
        let taken = Mutex(TakenCopies())
        var problem: (any Error)?
        do {
            work.point = try await replicator.cycle { reactor, index in
                taken.withLock { if !$0.isOver { $0.made[index] = parts[index](reactor) } }
            }
        } catch {
            problem = error
        }
        // A reactor that has not formed yet must not take what is removed from here on.
        let made = taken.withLock { taken in
            taken.isOver = true
            return taken.made
        }
        for (place, made) in made { entered(entries[place], made, work) }
        let missed = Set(entries.indices.filter { made[$0] == nil })
        if problem == nil, !missed.isEmpty {
            problem = Refusal("the point was formed without its FlashCopies; try again", .passing)
        }
        return .entered(missed: missed, apart: problem)
    }

    /// What the reactors have done of the copies of one point, by the entry's index.
    private struct TakenCopies: Sendable {
        var made: [Int: EnteredCopy] = [:]
        var isOver = false
    }

    /// For the reactors' threads; `entered` must follow with what these return.
    private func chainEntries(_ entries: [CopyEntry], _ work: CopyWork) -> [@Sendable (Reactor) -> EnteredCopy] {
        entries.map { chainEntry(work.volumes[$0.volume], $0, work.made[$0.volume]!) }
    }

    private func chainEntry(
        _ volume: VolumeState, _ entry: CopyEntry, _ files: CopyFiles
    ) -> @Sendable (Reactor) -> EnteredCopy {
        let number = volume.number
        switch entry.place {
        case .newest:
            return Self.chainEntry(number, entry.copy, files) { engine, copy in
                engine.addCopy(copy)
                return true
            }
        case .below(let origin):
            return Self.chainEntry(number, entry.copy, files) { engine, copy in
                guard engine.copy(origin)?.state == .active else { return false }
                engine.cloneCopy(origin, as: copy)
                return true
            }
        case .insteadOf(let old):
            let (before, owner) = (volume.copies[old], volume.record.table[old]?.targetOwner)
            let shared = entry.copy.targetOwner == owner ? before?.targetFile : nil
            return Self.chainEntry(number, entry.copy, files, targetFile: shared) { engine, copy in
                guard engine.copy(old) != nil else {
                    engine.addCopy(copy)
                    return true
                }
                guard engine.mayRetake(old) else { return false }
                let mark = files.bitmap.mapping.memory + BitmapHeader.takenOffset
                mark.storeBytes(of: UInt64(1).littleEndian, as: UInt64.self)
                engine.retakeCopy(old, as: copy)
                return true
            }
        }
    }

    private static func chainEntry(
        _ number: VolumeNumber, _ record: CopyRecord, _ parts: CopyFiles, targetFile: StoreFile? = nil,
        place: @escaping @Sendable (Volume, FlashCopy) -> Bool
    ) -> @Sendable (Reactor) -> EnteredCopy {
        { reactor in
            let hosted = reactor.hosted(number)
            let isPoint = record.id < CopyTable.firstID
            let target = targetFile ?? hosted.addFile(parts.target, mayRest: isPoint)
            let bitmap = hosted.addFile(parts.bitmap.mapping.file, mapping: parts.bitmap.mapping, mayRest: isPoint)
            let isIn = place(
                hosted.volume,
                FlashCopy(
                    id: record.id, targetFile: target, bitmapFile: bitmap, preserved: parts.bitmap.bitmap(),
                    changes: record.isFilled ? parts.bitmap.bitmap(1) : nil,
                    failureMark: parts.bitmap.failureMark(), durable: record.isDurable,
                    targetIsZero: record.targetIsZero, isFilled: record.isFilled, rate: record.rate))
            return EnteredCopy(target: target, bitmap: bitmap, isIn: isIn)
        }
    }

    /// Gives the files of a copy to the volume's reactor, and the copy to `place` there.
    func enterChain(
        _ volume: VolumeState, _ record: CopyRecord, _ files: CopyFiles,
        place: @escaping @Sendable (Volume, FlashCopy) -> Void
    ) async {
        let entry = Self.chainEntry(volume.number, record, files) { engine, copy in
            place(engine, copy)
            return true
        }
        entered(volume, record, files, await volume.reactor.run(entry))
    }

    private func entered(_ volume: VolumeState, _ record: CopyRecord, _ files: CopyFiles, _ made: EnteredCopy) {
        var files = files
        (files.targetFile, files.bitmapFile) = (made.target, made.bitmap)
        volume.copies[record.id] = files
        fillStarts[volume.place(record.id)] = nil
        // A small one may be complete before it was known here, and says so once.
        if record.isFilled { Task { await reviewCompletion(volume, record.id) } }
    }

    /// Takes a copy out of the chain; `copyWithdrawn` follows.
    func leave(_ volume: VolumeState, _ id: CopyID) async {
        let number = volume.number
        let present = await volume.reactor.run { reactor in
            reactor.disconnectReaders(number, of: id)
            reactor.hosted(number).volume.withdrawCopy(id)
            return reactor.hosted(number).volume.copy(id) != nil
        }
        if !present { await copyWithdrawn(volume, id) }
    }

    private func takeOutOfUse(_ volume: VolumeState, _ id: CopyID) async {
        let number = volume.number
        await withCheckedContinuation { continuation in
            readyWaiters[volume.place(id)] = continuation
            Task {
                let isThere = await volume.reactor.run { reactor in
                    reactor.disconnectReaders(number, of: id)
                    reactor.hosted(number).volume.beginRefresh(id)
                    return reactor.hosted(number).volume.copy(id) != nil
                }
                if !isThere { copyReady(volume, id) }  // it has left meanwhile
            }
        }
    }

    func copyReady(_ volume: VolumeState, _ id: CopyID) { readyWaiters.removeValue(forKey: volume.place(id))?.resume() }

    // MARK: Restores

    /// Ends the hosts' connections, readers' as well, since what they have cached is void; what they asked for is carried out
    /// first. New ones can only read until `letHostsIn`.
    private func shutOut(_ volume: VolumeState) async {
        volume.shutsHostsOut = true
        let (number, reactor) = (volume.number, volume.reactor)
        await reactor.run { $0.hosted(number).writable = false }
        home.publish(volume, home.group(ofVolume: volume.name))
        await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
            reactor.perform { $0.disconnect(number, .hosts) { continuation.resume() } }
        }
    }

    private func letHostsIn(_ volume: VolumeState) async {
        volume.shutsHostsOut = false
        let number = volume.number
        let group = home.group(ofVolume: volume.name)
        let writable =
            group == nil || group?.servesHosts == true && group?.record.leftOut?.contains(volume.name) != true
        await volume.reactor.run { $0.hosted(number).writable = writable }
        home.publish(volume, group)
    }

    /// Gives the bitmap of grains to restore to the reactor. `fresh`: it is filled there, and the restore begins paused.
    ///
    /// - Returns: false when the copy does not serve any more.
    @discardableResult
    func beginRestore(_ volume: VolumeState, from id: CopyID, fresh: Bool) async -> Bool {
        guard let file = volume.restoreBitmap else { return false }
        let number = volume.number
        let slot = await volume.reactor.run { reactor -> StoreFile? in
            let hosted = reactor.hosted(number)
            if fresh, hosted.volume.copy(id)?.state != .active { return nil }
            let slot = hosted.addFile(file.mapping.file, mapping: file.mapping)
            if fresh { hosted.volume.markDifferences(from: id, in: file.bitmap()) }
            hosted.volume.startRestore(from: id, pending: file.bitmap(), bitmapFile: slot, paused: fresh)
            return slot
        }
        volume.restoreFile = slot ?? -1
        return slot != nil
    }

    /// An empty bitmap of grains to restore, on stable storage.
    func makeRestoreBitmap(_ volume: VolumeState) async throws -> BitmapFile {
        let (path, header, directory) = (volume.restoreBitmapPath, volume.restoreHeader, volume.directory)
        let file = try await home.disks.run {
            let file = try BitmapFile(path: path, header: header, create: true)
            try synchronizeDirectory(directory)
            return file
        }
        volume.restoreBitmap = file
        return file
    }

    private func dropRestore(_ volume: VolumeState) async {
        await home.onEngine(volume) { $0.cancelRestore() }
        unlink(volume.restoreBitmapPath)
        dropRestoreBitmap(volume)
    }

    func dropRestoreBitmap(_ volume: VolumeState) {
        let (number, slot) = (volume.number, volume.restoreFile)
        volume.restoreFile = -1
        volume.restoreBitmap = nil
        if slot >= 0 { volume.reactor.perform { $0.hosted(number).removeFile(slot) } }
    }
}
