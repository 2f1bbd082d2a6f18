// KeptPoints.swift: after the points of a group have changed, exports and chains follow.
//
// Must be prevented:
//   a name shows another point than its own: files are told of before their point, and go out of the exports after it
//   what carries a point leaves although the record's file may still name that point: a start would miss its files, and void every
//     point up to it

import API
import Groups
import NBDServer
import Volumes

/// Exports and chains follow the points that a group keeps.
@SiteThread
final class KeptPoints {
    private let home: Holdings
    private let chains: Chains

    init(_ home: Holdings, _ chains: Chains) {
        (self.home, self.chains) = (home, chains)
    }

    /// The exports show the points that are kept, and what carries none of them leaves the chains.
    ///
    /// - Parameter endsReaders: of what leaves; otherwise it stays until they have gone.
    func settlePoints(_ group: GroupState, endsReaders: Bool = false) async {
        let readable = group.record.points.filter { $0.isFailed != true }
        group.points.keep(readable)
        let carriers = group.record.carriers(of: group.entry.volumes)
        for volume in home.members(group) where carriers[volume.name] ?? [] != volume.carriers {
            let now = carriers[volume.name] ?? []
            let leaving = volume.carriers.filter { !now.contains($0) }.map { CopyID($0) }
            volume.carriers = now
            home.exports.setCarriers(volume.name, now)
            if !leaving.isEmpty { group.leavingCarriers.append((volume, leaving, endsReaders)) }
        }
        group.points.show(readable)
        await withdrawCarriers(group)
    }

    /// As soon as the record's file does not name them any more.
    func withdrawCarriers(_ group: GroupState) async {
        guard !group.isUnsaved else { return }
        let leaving = group.leavingCarriers
        group.leavingCarriers = []
        for (volume, ids, endsReaders) in leaving {
            // Oldest first: it has nobody to hand over to, and those after it then have not either.
            if endsReaders { for id in ids { await chains.leave(volume, id) } } else { withdraw(volume, ids) }
        }
    }

    /// The record's file may still name what the copy carries.
    func waitsToLeave(_ volume: VolumeState, _ id: CopyID) -> Bool {
        home.group(ofVolume: volume.name)?.leavingCarriers.contains { $0.volume === volume && $0.ids.contains(id) }
            == true
    }

    private func withdraw(_ volume: VolumeState, _ ids: [CopyID]) {
        let number = volume.number
        volume.reactor.perform { reactor in
            for id in ids { reactor.hosted(number).volume.withdrawCopy(id) }
        }
    }
}

extension RecoveryPoints {
    /// Shows no point any more but these.
    fileprivate func keep(_ points: [PointRecord]) {
        let numbers = points.map(\.number)
        all.removeAll { !numbers.contains($0.number) }
    }

    fileprivate func show(_ points: [PointRecord]) {
        let shown = all
        all = points.map { point in
            shown.first { $0.number == point.number }
                ?? Point(
                    number: point.number, order: point.chainOrder,
                    text: "recovery point \(point.number) of \(timestamp(point.formedAt))")
        }
    }
}
