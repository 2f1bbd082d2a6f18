// ChangeVolumes.swift: what becomes of the first intermediates of a site's volumes (mode `change-volume`).
//
// Must be prevented:
//   an intermediate is called whole before what was copied there is on stable storage
//   one whose flush has failed counts as having anything

import Glibc
import Groups
import Ring
import Volumes

/// The first intermediates of a site's volumes.
@SiteThread
final class ChangeVolumes {
    private let home: Holdings

    init(_ home: Holdings) {
        self.home = home
    }

    /// It lacks nothing any more: from now on power loss does not cost all of it.
    func filled(_ volume: VolumeState) async {
        guard let hold = volume.pointHold, let generation = volume.record.changeVolume?.generation else { return }
        do {
            try await home.disks.run { try hold.synchronize() }
            try await volume.amend { record in
                if record.changeVolume?.generation == generation { record.changeVolume?.isFilled = true }
            }
            home.note(
                home.group(ofVolume: volume.name)?.entry.name,
                "volume \(volume.name): its change volume \(hold.target.path) has everything")
        } catch {
            await flushFailed(volume.name, error)
        }
    }

    func failed(_ volume: VolumeState, _ errno: Int32) {
        note(
            volume,
            "does not take what it lacks (\(String(cString: strerror(errno)))); mend it and restart the site. Points are formed as far "
                + "as it takes what they need")
    }

    /// Of a flush that was asked for by a drain: nothing there is to be relied on.
    func flushFailed(_ name: String, _ error: any Error) async {
        guard let volume = home.volumes[name] else { return }
        note(volume, "could not be flushed (\(error)); all of it is copied anew")
        let number = volume.number
        await volume.reactor.run { $0.hosted(number).volume.distrustIntermediate() }
        volume.acknowledge { $0.changeVolume?.isFilled = false }
        try? await volume.settle()
    }

    private func note(_ volume: VolumeState, _ words: String) {
        home.note(
            home.group(ofVolume: volume.name)?.entry.name,
            "volume \(volume.name): its change volume \(volume.pointHold?.target.path ?? "") \(words)")
    }
}
