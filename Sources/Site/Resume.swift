// Resume.swift: how a site carries out the start of a volume (`StartVolume`).

import Base
import FlashCopies
import Glibc
import Groups
import NBDServer
import Ring
import Volumes

extension Site {
    func host(_ volume: VolumeState) async throws {
        let setup = volume.setup
        let group = home.group(ofVolume: volume.name)
        volume.number = await volume.reactor.run { reactor in
            let number = reactor.host(setup)
            reactor.hosted(number).volume.beginResuming()
            return number
        }
        var start = VolumeStart(isTrusted: volume.isTrusted)
        if let group {
            start = try VolumeStart(isTrusted: volume.isTrusted, group.record, volume.name) { point in
                try exists(volume.bitmapPath(CopyID(point)))
            }
        }
        start.knowsNothing =
            volume.record.servedAs != group?.servedAs || !volume.recordingIsWhole
            || (!volume.isTrusted && volume.record.logIsBroken)
        try await run(StartVolume(start), on: [volume])
        home.publish(volume, group)
    }

    // MARK: The chain

    func findTaken(_ volume: VolumeState, _ ids: [CopyID]) throws -> Set<CopyID> {
        Set(
            try ids.filter { id in
                guard try exists(volume.bitmapPath(id)) else { return false }
                let file = try OpenFile(path: volume.bitmapPath(id), flags: O_RDONLY)
                return try file.read(at: BitmapHeader.takenOffset, count: 1).first == 1
            })
    }

    /// - Returns: the files of each link; nil where they cannot be relied on.
    func openFiles(_ volume: VolumeState, _ links: [ChainLink]) throws -> [CopyFiles?] {
        let group = home.group(ofVolume: volume.name)
        let newest = max(links.last?.copy.order ?? 0, group?.record.points.last?.order ?? 0)
        volume.nextOrder = CopyRecord.order(after: newest)
        home.state.removeOrphans(
            volume.name, bitmaps: Set(links.map(\.id)), targets: Set(links.map(\.copy.targetOwner)))
        return try links.map { link in
            do {
                return try openLink(volume, link)
            } catch let damage as DamagedMetadata {
                home.note(group?.entry.name, "volume \(volume.name): \(damage)")
                return nil
            }
        }
    }

    private func openLink(_ volume: VolumeState, _ link: ChainLink) throws -> CopyFiles {
        let record = link.copy
        // Files come before the record that names them, except those of a copy of which nobody was told yet.
        let missing = try !exists(volume.bitmapPath(link.id))
        if missing, record.state != .creating {
            throw DamagedMetadata(description: "\(volume.bitmapPath(link.id)) is missing")
        }
        let bitmap = try BitmapFile(
            path: volume.bitmapPath(link.id), header: volume.header(ofCopy: link.id, recordsChanges: record.isFilled),
            create: missing)
        try volume.verify(bitmap, "copies/\(link.id).bitmap")
        // A bit that only the last process's mapping had must be durable before a write relies on it: `VolumeState.confirm` flushes it
        // before anything is written.
        let target =
            if let path = record.target {
                try Self.operatorTarget(path, of: volume.name, volume.geometry.size, recorded: true).0
            } else if missing, record.targetOwner == record.id {
                try makeTarget(volume.targetPath(link.id), size: volume.geometry.size)
            } else {
                try volume.openTarget(record.targetOwner)
            }
        // If a flush of it has failed in the last run, only what is on storage counts.
        if record.isDurable {
            try target.synchronize()
            target.dropCache()
        }
        return CopyFiles(target: ReopenableFile(target), bitmap: bitmap)
    }

    /// A recovery point had failed when the last process ended, perhaps before it could write that down.
    ///
    /// - Returns: whether the group keeps some point all the same, whose files these are.
    func failPoint(_ volume: VolumeState, _ id: CopyID) async throws -> Bool {
        guard let group = home.group(ofVolume: volume.name) else { return true }
        try await group.handle.change(.pointFailed(UInt64(id), volume: volume.name))
        try await group.handle.settle()  // nothing else says so once the volume is taken up
        home.note(
            group.entry.name, "volume \(volume.name): recovery point \(id) had failed when the last process ended")
        return !group.record.points(carriedBy: UInt64(id), volume.name).isEmpty
    }

    func loseFiles(_ volume: VolumeState, _ ids: Set<CopyID>) async throws {
        try await voidPoints(volume, home.group(ofVolume: volume.name), ids)
        for id in ids { unlink(volume.bitmapPath(id)) }
    }

    private func voidPoints(_ volume: VolumeState, _ group: GroupState?, _ ids: Set<CopyID>) async throws {
        guard let group,
            let last = ids.compactMap({
                $0 < 0 ? nil : group.record.points(carriedBy: UInt64($0), volume.name).last?.number
            }).max()
        else { return }
        home.note(
            group.entry.name,
            "volume \(volume.name): the recovery points up to \(last) are void, since a bitmap is "
                + "damaged\(last == group.record.points.last?.number ? "; everything is copied anew" : "")")
        try await group.handle.change(.pointsVoided(through: last, lineage: randomIdentity()))
    }

    func resumeLink(_ volume: VolumeState, _ link: ChainLink, _ files: CopyFiles) async throws {
        let record = link.copy
        let fails = link.resumption == .servesOlder
        await enterChain(volume, record, files) { volume, copy in volume.resumeCopy(copy, failed: fails) }
        let (number, id) = (volume.number, link.id)
        if record.isFilled, !volume.isTrusted {
            let regions = volume.activeRegions
            let forgets = volume.record.logIsBroken || record.mayLackChanges(in: volume.record.copies)
            await volume.reactor.run { reactor in
                reactor.hosted(number).volume.recoverChanges(of: id, regions: forgets ? regions.all : regions.bitmap)
            }
        }
        if record.isFilled { try await startActivityLog(volume) }
        if link.resumption == .leaves { volume.reactor.perform { $0.hosted(number).volume.withdrawCopy(id) } }
    }

    // MARK: The role

    func takeRole(_ volume: VolumeState, _ role: RoleStart) async throws {
        let number = volume.number
        let group = home.group(ofVolume: volume.name)
        volume.carriers = group?.record.carriers(of: [volume.name])[volume.name] ?? []
        let serves =
            role.role != .secondary && group?.servesHosts != false
            && group?.record.leftOut?.contains(volume.name) != true
        let isPrimary = role.role == .primary
        let hold = isPrimary ? try volume.openPointHold() : nil
        let regions = role.marksRegions ? volume.activeRegions : nil
        if isPrimary { try await startActivityLog(volume) }
        volume.pointTargetFile = await volume.reactor.run { reactor in
            let hosted = reactor.hosted(number)
            let targetFile = hold.map { hosted.addFile($0.target) } ?? -1
            hosted.writable = serves
            hosted.volume.policy = role.role == .secondary ? .copiesFirst : .hostFirst
            hosted.volume.recording = isPrimary
            if role.marksAll { hosted.volume.markAllChanged() }
            if let regions { hosted.volume.recoverChanges(regions: regions.bitmap) }
            if let hold, let held = role.held {
                hosted.volume.resumePoint(number: held, targetFile: targetFile, preserved: hold.bitmap.bitmap())
            } else if isPrimary {
                hosted.volume.mergeOutOfSync()
            }
            return targetFile
        }
        guard let regions else { return }
        home.note(
            group?.entry.name,
            "volume \(volume.name): the machine went down; \(regions.bitmap.population()) active regions of "
                + "\(regions.bitmap.count) are compared anew")
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

    // MARK: Restores

    func loseFailover(_ volume: VolumeState) async throws {
        guard let group = home.group(ofVolume: volume.name) else { return }
        home.note(
            group.entry.name,
            "volume \(volume.name): point \(group.record.failedOver?.point ?? 0), which was failed over to, is lost; what had not "
                + "flowed back is as the old primary sent it last")
        try await group.handle.change(.restored(volume: volume.name))
        try await group.handle.settle()
    }

    func forgetRestore(_ volume: VolumeState) async throws {
        if volume.record.restoring?.decided == true {
            home.note(
                home.group(ofVolume: volume.name)?.entry.name,
                "volume \(volume.name): it was being restored from a FlashCopy that is lost; parts of it are of the FlashCopy's "
                    + "time and parts are newer: restore it from another copy")
        }
        try await volume.amend(.restoring(nil))
    }

    func resumeRestore(_ volume: VolumeState, from id: CopyID) async throws {
        try openRestoreBitmap(volume)
        await beginRestore(volume, from: id, fresh: false)
    }

    func letGo(_ volume: VolumeState) async {
        let number = volume.number
        await volume.reactor.run { reactor in
            reactor.hosted(number).volume.finishResuming()
            reactor.hosted(number).restFiles()
        }
    }

    /// No worst can be assumed here: a grain that is restored once too often loses what hosts wrote to it.
    private func openRestoreBitmap(_ volume: VolumeState) throws {
        do {
            let file = try BitmapFile(path: volume.restoreBitmapPath, header: volume.restoreHeader)
            try volume.verify(file, "restore.bitmap")
            volume.restoreBitmap = file
        } catch let damage as DamagedMetadata {
            throw Refusal(
                "volume '\(volume.name)': \(damage), and it says what is still to be restored; bring it back from a backup, or "
                    + "give the restore up with `farcopy adopt \(volume.name) --config FILE`")
        }
    }
}

/// The regions of a volume that its activity log says may have changed since the bitmaps were flushed.
final class Regions: @unchecked Sendable {
    // Safe because: filled by init and read afterwards.
    private let memory: UnsafeMutableRawPointer
    let bitmap: Bitmap
    let all: Bitmap
    let damagedSectors: Int

    /// - Parameter log: the bytes of a log behind its header.
    init(size: UInt64, log: UnsafeRawBufferPointer) {
        let count = ActivityLog.layout(size: size).count
        let bytes = Bitmap.byteCount(bits: count)
        memory = .allocate(byteCount: 2 * bytes, alignment: 8)
        memory.initializeMemory(as: UInt8.self, repeating: 0, count: 2 * bytes)
        bitmap = Bitmap(memory: memory, count: count)
        all = Bitmap(memory: memory + bytes, count: count)
        all.setAll()
        damagedSectors = ActivityLog.decode(log, into: bitmap)
    }

    deinit { memory.deallocate() }
}
