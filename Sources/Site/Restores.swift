// Restores.swift: a volume is shut off from its hosts, and becomes what a copy of its chain holds.

import Glibc
import Groups
import NBDServer
import Ring
import Volumes

/// A volume is shut off from its hosts, and becomes what a copy holds.
@SiteThread
final class Restores {
    private let home: Holdings

    init(_ home: Holdings) {
        self.home = home
    }

    /// Until `letHostsIn`: what hosts have cached is void.
    func shutOut(_ volume: VolumeState) async {
        volume.shutsHostsOut = true
        await home.shutOutHosts(of: volume, home.group(ofVolume: volume.name))
    }

    func letHostsIn(_ volume: VolumeState) async {
        volume.shutsHostsOut = false
        await home.admitHosts(to: volume, home.group(ofVolume: volume.name))
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

    func dropRestore(_ volume: VolumeState) async {
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
