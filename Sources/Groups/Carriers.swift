// Carriers.swift: whose files hold what a recovery point is of each volume.
//
// A volume that did not change since the point before has no files of a point. What the point is of it, an older point's files hold:
// the volume's carrier of it. So a point costs what has changed.
//
// Must be prevented:
//   a carrier leaves while a point that is kept is read through it
//   files that are missing are taken for files that were never made: the record says which volumes have any (`PointRecord.changed`)

extension PointRecord {
    /// Whether a volume, if the point holds it, has files of it.
    package func hasFiles(of volume: String) -> Bool { changed?.contains(volume) != false }
}

extension GroupRecord {
    /// The point whose files hold what a recovery point is of a volume; nil when there is no such point, or the volume has no part in it.
    package func carrier(of number: UInt64, _ volume: String) -> UInt64? {
        guard let point = points.first(where: { $0.number == number }), holds(point, volume) else { return nil }
        return filed(volume).filter { $0 <= number }.max()
    }

    /// What is written down of a point, kept or not.
    package func pointRecord(_ number: UInt64) -> PointRecord? {
        points.first { $0.number == number } ?? retired?.first { $0.number == number }
    }

    /// Points whose files hold what others are of volumes, oldest first, without those that only points hold that are not kept.
    ///
    /// - Parameter volumes: names of the group's volumes.
    /// - Returns: by the volume's name; absent when no point that is kept holds the volume.
    package func carriers(of volumes: [String]) -> [String: [UInt64]] {
        var found: [String: [UInt64]] = [:]
        let newestFirst = (points.map { ($0, true) } + (retired ?? []).map { ($0, false) }).sorted {
            $0.0.number > $1.0.number
        }
        // From the newest on: each one that is kept asks of every volume for the next that has files.
        var asked = 0
        var answered: [String: Int] = [:]
        for (point, isKept) in newestFirst {
            if isKept { asked += 1 }
            for volume in point.changed ?? volumes where asked > answered[volume] ?? 0 && holds(point, volume) {
                answered[volume] = asked
                found[volume, default: []].append(point.number)
            }
        }
        return found.mapValues { $0.reversed() }
    }

    /// Points that are kept, and are of a volume what another's files hold; oldest first.
    package func points(carriedBy carrier: UInt64, _ volume: String) -> [PointRecord] {
        let next = filed(volume).filter { $0 > carrier }.min() ?? .max
        return points.filter { $0.number >= carrier && $0.number < next && holds($0, volume) }
    }

    /// Points that have files of a volume, kept or not, in no order.
    private func filed(_ volume: String) -> [UInt64] {
        (points + (retired ?? [])).filter { $0.hasFiles(of: volume) && holds($0, volume) }.map(\.number)
    }
}
