// CopyStorage.swift: the files of FlashCopies: made, opened again at a start, flushed, removed.
//
// Must be prevented:
//   a target overwrites something that is in use

import API
import Base
import FlashCopies
import Glibc
import Groups
import NBDServer
import Ring
import Volumes

/// The files of FlashCopies.
@SiteThread
final class CopyStorage {
    private let home: Holdings
    private let chains: Chains

    init(_ home: Holdings, _ chains: Chains) {
        (self.home, self.chains) = (home, chains)
    }

    func makeFiles(
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
        if copy.isFilled { try await chains.startActivityLog(volume) }
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
    private nonisolated static func operatorTarget(
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

    func openFiles(_ links: [ChainLink], _ work: CopyWork) throws -> [LinkFiles] {
        let volume = work.volumes[0]
        return zip(links, try openFiles(volume, links)).map { link, files in
            guard let files else { return .damaged }
            work.opened[link.id] = files
            return files.bitmap.hasFailed || volume.hadFailed(link.copy) ? .failed : .whole
        }
    }

    func removeFiles(_ volume: VolumeState, _ id: CopyID, _ target: CopyID?) async {
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

    func flushTarget(_ volume: VolumeState, _ id: CopyID) async throws {
        guard let files = volume.copies[id] else { return }
        do { try await home.disks.run { try files.target.open().synchronize() } } catch {
            let errno = (error as? SystemError)?.errno ?? EIO
            await home.onEngine(volume) { $0.targetFlushFailed(id, errno: errno) }
            throw error
        }
    }

    func flushBitmap(_ volume: VolumeState, _ id: CopyID) async throws {
        guard let files = volume.copies[id] else { return }
        let directory = "\(volume.directory)/copies"
        try await home.disks.run {
            try files.bitmap.synchronize()
            try synchronizeDirectory(directory)
        }
    }

    func findTaken(_ volume: VolumeState, _ ids: [CopyID]) throws -> Set<CopyID> {
        Set(
            try ids.filter { id in
                guard try exists(volume.bitmapPath(id)) else { return false }
                let file = try OpenFile(path: volume.bitmapPath(id), flags: O_RDONLY)
                return try file.read(at: BitmapHeader.takenOffset, count: 1).first == 1
            })
    }

    /// - Returns: the files of each link; nil where they cannot be relied on.
    private func openFiles(_ volume: VolumeState, _ links: [ChainLink]) throws -> [CopyFiles?] {
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
}
