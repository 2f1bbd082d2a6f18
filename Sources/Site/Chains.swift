// Chains.swift: FlashCopies and recovery points enter the chains of volumes, and leave them.

import API
import Base
import FlashCopies
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

/// Copies enter the chains of volumes, and leave them.
@SiteThread
final class Chains {
    private let home: Holdings
    /// A copy is not in its chain any more.
    var whenGone: @SiteThread (VolumeState, CopyID) async -> Void = { _, _ in }
    /// One that is filled in the background is in its chain; a small one may be complete already.
    var whenEntered: @SiteThread (VolumeState, CopyID) async -> Void = { _, _ in }
    /// Refreshes that wait until a copy is out of use.
    private var readyWaiters: [ChainedCopy: CheckedContinuation<Void, Never>] = [:]
    /// When the progress of a background copy was looked at first, and how many grains it had.
    var fillStarts: [ChainedCopy: (at: UInt64, grains: Int)] = [:]

    init(_ home: Holdings) {
        self.home = home
    }

    func enter(_ entries: [CopyEntry], _ work: CopyWork) async -> CopyAnswer {
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

    func enterWithPoint(_ entries: [CopyEntry], _ work: CopyWork) async -> CopyAnswer {
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
        if record.isFilled { Task { await whenEntered(volume, record.id) } }
    }

    /// Takes a copy out of the chain; `copyWithdrawn` follows.
    func leave(_ volume: VolumeState, _ id: CopyID) async {
        let number = volume.number
        let present = await volume.reactor.run { reactor in
            reactor.disconnectReaders(number, of: id)
            reactor.hosted(number).volume.withdrawCopy(id)
            return reactor.hosted(number).volume.copy(id) != nil
        }
        if !present { await whenGone(volume, id) }
    }

    func takeOutOfUse(_ volume: VolumeState, _ id: CopyID) async {
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

    func look(_ volume: VolumeState, _ id: CopyID?) async -> ChainLook {
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

    /// Writes to the volume are logged before they are issued, from now on.
    func startActivityLog(_ volume: VolumeState) async throws {
        guard !volume.activityLogIsOn else { return }
        let (number, log) = (volume.number, try volume.openActivityLog())
        volume.activityLogIsOn = true
        await volume.reactor.run { reactor in
            let hosted = reactor.hosted(number)
            let file = hosted.addFile(log.mapping.file, mapping: log.mapping)
            hosted.volume.startActivityLog(file: file, contents: log.contents, recordingFile: hosted.recordingFile)
        }
    }

    // MARK: The record

    /// Unless its chain is not in place yet.
    func show(_ volume: VolumeState) {
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
}
