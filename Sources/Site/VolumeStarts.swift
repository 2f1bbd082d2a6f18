// VolumeStarts.swift: how a site carries out the start of a volume (`StartVolume`).

import Base
import FlashCopies
import Glibc
import Groups
import NBDServer
import Ring
import Volumes

/// The parts of a volume's start.
@SiteThread
final class VolumeStarts {
    private let home: Holdings
    private let chains: Chains
    private let restores: Restores

    init(_ home: Holdings, _ chains: Chains, _ restores: Restores) {
        (self.home, self.chains, self.restores) = (home, chains, restores)
    }

    // MARK: The chain

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
                + "damaged\(group.record.role == .secondary && last == group.record.points.last?.number ? "; everything is copied anew" : "")"
        )
        try await group.handle.change(.pointsVoided(through: last, lineage: randomIdentity()))
    }

    func resumeLink(_ volume: VolumeState, _ link: ChainLink, _ files: CopyFiles) async throws {
        let record = link.copy
        let fails = link.resumption == .servesOlder
        await chains.enterChain(volume, record, files) { volume, copy in volume.resumeCopy(copy, failed: fails) }
        let (number, id) = (volume.number, link.id)
        if record.isFilled, !volume.isTrusted {
            let regions = volume.activeRegions
            let forgets = volume.record.logIsBroken || record.mayLackChanges(in: volume.record.copies)
            await volume.reactor.run { reactor in
                reactor.hosted(number).volume.recoverChanges(of: id, regions: forgets ? regions.all : regions.bitmap)
            }
        }
        if record.isFilled { try await chains.startActivityLog(volume) }
        if link.resumption == .leaves { volume.reactor.perform { $0.hosted(number).volume.withdrawCopy(id) } }
    }

    // MARK: The role

    func takeRole(_ volume: VolumeState, _ role: RoleStart) async throws {
        let number = volume.number
        let group = home.group(ofVolume: volume.name)
        volume.carriers = group?.record.carriers(of: [volume.name])[volume.name] ?? []
        let serves = role.role != .secondary && home.hostsMayWrite(to: volume, group)
        let isPrimary = role.role == .primary
        let hold = isPrimary ? volume.pointHold : nil
        let usesIntermediate = isPrimary && group?.entry.mode.hold == .intermediate
        let isTrusted = volume.changeVolumeIsTrusted
        let regions = role.marksRegions ? volume.activeRegions : nil
        if isPrimary { try await chains.startActivityLog(volume) }
        volume.pointTargetFile = await volume.reactor.run { reactor in
            let hosted = reactor.hosted(number)
            let targetFile = hold.map { hosted.addFile($0.target) } ?? -1
            hosted.writable = serves
            hosted.volume.policy = role.role == .secondary ? .copiesFirst : .hostFirst
            hosted.volume.recording = isPrimary
            if role.marksAll { hosted.volume.markAllChanged() }
            if let regions { hosted.volume.recoverChanges(regions: regions.bitmap) }
            if usesIntermediate, let hold {
                hosted.volume.useIntermediate(hold.bitmap.intermediate(in: targetFile), trusted: isTrusted)
            }
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
        await restores.beginRestore(volume, from: id, fresh: false)
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
