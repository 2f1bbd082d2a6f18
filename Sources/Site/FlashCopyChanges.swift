// FlashCopyChanges.swift: `farcopy flashcopy clone | refresh`, and what restores have in common.
//
// Must be prevented:
//   a refreshed copy is taken anew while others still read the old one through it
//   a clone, which others read through, is placed where it holds another instant

import API
import Base
import FoundationEssentials
import Glibc
import Groups
import NBDServer
import Ring
import Synchronization
import Volumes

extension Site {
    // MARK: Clone

    /// Takes FlashCopies of what other FlashCopies, or recovery points, hold.
    ///
    /// - Parameter own: the name is one of the site's own.
    package func cloneFlashCopy(_ request: FlashCopyRequest, own: Bool = false) async throws -> [FlashCopyReport] {
        await copyTurnstile.enter()
        defer { copyTurnstile.leave() }
        guard let origin = request.of else { throw Refusal("a clone needs 'of', a FlashCopy's name", .misuse) }
        let members = try members(request.volumes)
        if !own { try checkCopyName(request.name) }
        try checkTargets(request)
        try requireDescriptors(forCopies: members.count)
        let origins = try members.map { try chainPlace($0, origin) }
        for (volume, found) in zip(members, origins) {
            try checkFree(request.name, volume)
            guard request.durable != true || found.isDurable else {
                throw Refusal(
                    "a clone of '\(origin)' cannot be durable, since it reads through '\(origin)', which is not")
            }
        }
        try await patiently(request.name) { try await self.establishClone(request, members, origins) }
        note(nil, "FlashCopy '\(request.name)' of '\(origin)' of \(request.volumes.joined(separator: ", ")) created")
        return try await reports(request.name, members)
    }

    /// What is cloned. A clone reads through it, and so survives power loss if it does.
    struct Origin {
        var id: CopyID
        var order: UInt64
        var isDurable: Bool
    }

    /// A FlashCopy by name, or a recovery point by number.
    func chainPlace(_ volume: VolumeState, _ name: String) throws -> Origin {
        if let point = UInt64(name),
            let known = group(ofVolume: volume.name)?.record,
            known.points.contains(where: { $0.number == point && $0.isFailed != true }),
            let carrier = known.carrier(of: point, volume.name).flatMap(known.pointRecord)
        {
            return Origin(id: CopyID(carrier.number), order: carrier.order ?? carrier.number, isDurable: true)
        }
        let record = try copies(name, [volume])[0].1
        guard record.state == .active else {
            throw Refusal(
                "FlashCopy '\(name)' of volume '\(volume.name)' is \(record.state.rawValue) and cannot be cloned")
        }
        return Origin(id: record.id, order: record.order, isDurable: record.isDurable)
    }

    /// Right below the origin, where a clone reads everything through it.
    private func orderBelow(_ volume: VolumeState, _ order: UInt64) throws -> UInt64 {
        let record = group(ofVolume: volume.name)?.record
        let points = volume.carriers.compactMap { record?.pointRecord($0) }.map { $0.order ?? $0.number }
        let below = (volume.record.copies.map(\.order) + points).filter { $0 < order }.max() ?? 0
        let middle = below + (order - below) / 2
        guard middle > below else {
            throw Refusal("volume '\(volume.name)' has too many clones of clones; withdraw some")
        }
        return middle
    }

    private func establishClone(
        _ request: FlashCopyRequest, _ members: [VolumeState], _ origins: [Origin]
    ) async throws {
        let set = randomIdentity()
        let made = try await prepareAll(members) { index in
            try await self.prepare(
                request, members[index], target: request.targets?[index],
                order: try self.orderBelow(members[index], origins[index].order), set: set,
                originIsDurable: origins[index].isDurable)
        }
        let vanished = Atomic(false)
        let parts = made.map { ($0.record, $0.files) }
        let intact = await together(members) { index in
            let origin = origins[index].id
            await self.enterChain(members[index], parts[index].0, parts[index].1) { volume, copy in
                if volume.copy(origin)?.state == .active {
                    volume.cloneCopy(origin, as: copy)
                } else {
                    vanished.store(true, ordering: .relaxed)
                }
            }
        }
        guard !vanished.load(ordering: .relaxed) else {
            for copy in made { await leave(copy.volume, copy.record.id) }
            throw Refusal("'\(request.of ?? "")' went away or failed meanwhile; nothing was created")
        }
        try await conclude(made, intact)
    }

    // MARK: Refresh

    /// Takes FlashCopies anew, of this instant; with a background copy, only what changed on either side is copied.
    package func refreshFlashCopy(_ request: FlashCopyRequest) async throws -> [FlashCopyReport] {
        await copyTurnstile.enter()
        defer { copyTurnstile.leave() }
        let members = try members(request.volumes)
        for (volume, record) in try copies(request.name, members) {
            try checkNotRestoring(volume)
            guard record.state != .withdrawing else {
                throw Refusal("FlashCopy '\(request.name)' of volume '\(volume.name)' is being withdrawn")
            }
            try checkNotSecondary(volume, "; clone one of its recovery points instead")
        }
        // Before anything is frozen, since it may take a while.
        for (volume, record) in try copies(request.name, members) { try await takeOutOfUse(volume, record) }
        try await frozen(members, request.name) {
            try await self.patiently(request.name) { try await self.retake(request.name, members) }
        }
        note(nil, "FlashCopy '\(request.name)' of \(request.volumes.joined(separator: ", ")) taken anew")
        return try await reports(request.name, members)
    }

    /// Waits until nobody reads a copy, and older ones have what they need of it.
    private func takeOutOfUse(_ volume: VolumeState, _ record: CopyRecord) async throws {
        guard volume.copies[record.id] != nil else { return }  // lost: nothing of it is left
        let (number, id) = (volume.number, record.id)
        guard let state = await volume.reactor.run({ $0.hosted(number).volume.copy(id)?.state }) else { return }
        guard state != .withdrawing else {
            throw Refusal(
                "FlashCopy '\(record.name)' of volume '\(volume.name)' still hands over what older ones need; try again soon"
            )
        }
        try volume.update(record.id) { $0.state = .refreshing }
        publish(volume, group(ofVolume: volume.name))
        await withCheckedContinuation { continuation in
            readyWaiters[id] = continuation
            volume.reactor.perform { reactor in
                reactor.disconnectReaders(number, of: id)
                reactor.hosted(number).volume.beginRefresh(id)
            }
        }
    }

    func copyReady(_ id: CopyID) { readyWaiters.removeValue(forKey: id)?.resume() }

    private func retake(_ name: String, _ members: [VolumeState]) async throws {
        for (volume, record) in try copies(name, members) { try await takeOutOfUse(volume, record) }
        let old = try copies(name, members)
        let made = try await prepareAll(members) { index in try await self.successor(old[index].0, old[index].1) }
        let parts = made.map { ($0.record, $0.files) }
        let missed = Mutex<Set<Int>>([])
        let intact = await together(members) { index in
            let (volume, record) = old[index]
            let oldFiles = volume.copies[record.id]
            let id = record.id
            let (successor, files) = parts[index]
            let shared = successor.targetOwner == record.targetOwner ? oldFiles?.targetFile : nil
            await self.enterChain(volume, successor, files, targetFile: shared) { volume, copy in
                if oldFiles == nil {
                    volume.addCopy(copy)
                } else if volume.mayRetake(id) {
                    let mark = files.bitmap.mapping.memory + BitmapHeader.takenOffset
                    mark.storeBytes(of: UInt64(1).littleEndian, as: UInt64.self)
                    volume.retakeCopy(id, as: copy)
                } else {
                    missed.withLock { _ = $0.insert(index) }
                }
            }
        }
        let inUse = missed.withLock { $0 }
        var problem: (any Error)?
        for (index, new) in made.enumerated() {
            let (volume, record) = old[index]
            let keepsTarget = new.record.targetOwner == record.targetOwner
            // The record comes before the files: it must never name what is not there.
            if inUse.contains(index) {
                do {
                    try volume.amend { $0.copies.removeAll { $0.id == new.record.id } }
                    release(volume, new.record, keepsTarget: keepsTarget)
                } catch { problem = error }  // it stays `creating`, and a start takes it out
                continue
            }
            var reason: String?
            do { try await settle(new) } catch {
                problem = error
                reason = "it could not be made durable: \(error)"
            }
            volume.acknowledge { written in
                written.copies.removeAll { $0.id == record.id }
                written.change(new.record.id) { copy in
                    guard copy.state == .creating else { return }  // it has failed already
                    copy.state = reason == nil ? .active : .failed
                    copy.reason = reason
                }
            }
            // Nobody is told of what a start would not find.
            do { try volume.settle() } catch { problem = problem ?? error }
            release(volume, record, keepsTarget: keepsTarget)
            publish(volume, group(ofVolume: volume.name))
        }
        if let problem { throw problem }
        guard intact, inUse.isEmpty else {
            throw Refusal(
                "FlashCopy '\(name)' could not be taken anew on all volumes at one instant; refresh it again",
                .passing)
        }
    }

    /// The bitmap of a copy that was taken anew goes, and its target unless that lives on.
    private func release(_ volume: VolumeState, _ record: CopyRecord, keepsTarget: Bool) {
        guard let files = volume.copies.removeValue(forKey: record.id) else { return }
        let number = volume.number
        volume.reactor.perform { reactor in
            reactor.hosted(number).removeFile(files.bitmapFile)
            if !keepsTarget { reactor.hosted(number).removeFile(files.targetFile) }
        }
        volume.removeUnnamedFiles(
            record.id, targetOwner: keepsTarget || record.target != nil ? nil : record.targetOwner)
    }

    /// What takes the place of a copy: the same, over the same target.
    private func successor(_ volume: VolumeState, _ old: CopyRecord) async throws -> NewCopy {
        var record = old
        record.id = VolumeRecord.firstCopyID + volume.record.nextCopy
        record.createdAt = realSeconds()
        record.order = volume.takeOrder()
        record.state = .creating
        record.reason = nil
        record.isComplete = false
        record.set = nil
        let number = volume.number
        let chainIsDurable = await volume.reactor.run { $0.hosted(number).volume.chainIsDurable }
        record.isDurable = old.isDurable || chainIsDurable
        let target: OpenFile
        if let files = volume.copies[old.id], record.isFilled || record.target != nil {
            target = try files.target.open()
            record.targetIsZero = false
        } else if let path = old.target {
            (target, record.targetIsZero) = try await openOperatorTarget(path, volume)
        } else {
            record.targetOwner = record.id
            target = try await newTarget(volume, record.id)
            record.targetIsZero = true
        }
        return try await writeDown(record, volume, target)
    }

    // MARK: Restores

    /// Gives the bitmap of grains to restore to the reactor. `fresh`: it is filled there, and the restore begins paused.
    func beginRestore(_ volume: VolumeState, from id: CopyID, fresh: Bool) async {
        guard let file = volume.restoreBitmap else { return }
        let number = volume.number
        volume.restoreFile = await volume.reactor.run { reactor in
            let hosted = reactor.hosted(number)
            let slot = hosted.addFile(file.mapping.file, mapping: file.mapping)
            if fresh { hosted.volume.markDifferences(from: id, in: file.bitmap()) }
            hosted.volume.startRestore(from: id, pending: file.bitmap(), bitmapFile: slot, paused: fresh)
            return slot
        }
    }

    /// An empty bitmap of grains to restore, on stable storage.
    func makeRestoreBitmap(_ volume: VolumeState) async throws -> BitmapFile {
        let (path, header, directory) = (volume.restoreBitmapPath, volume.restoreHeader, volume.directory)
        let file = try await disks.run {
            let file = try BitmapFile(path: path, header: header, create: true)
            try synchronizeDirectory(directory)
            return file
        }
        volume.restoreBitmap = file
        return file
    }

    func dropRestoreBitmap(_ volume: VolumeState) {
        let (number, slot) = (volume.number, volume.restoreFile)
        volume.restoreFile = -1
        volume.restoreBitmap = nil
        if slot >= 0 { volume.reactor.perform { $0.hosted(number).removeFile(slot) } }
    }

    func restoreFinished(_ volume: VolumeState) {
        if volume.record.restoring != nil { volume.acknowledge { $0.restoring = nil } }
        dropRestoreBitmap(volume)
        note(group(ofVolume: volume.name)?.entry.name, "volume \(volume.name) holds all of its point in time again")
        publish(volume, group(ofVolume: volume.name))
    }
}
