// Verification.swift: a comparison of a point at both sites, while it is under way.

import API
import Ring
import Volumes

extension VerifyReport {
    private static let longestList = 1000

    /// Of all pairs together.
    init(_ reports: [VerifyReport]) {
        self.init(
            point: reports.map(\.point).min() ?? 0, startedAt: reports.map(\.startedAt).min() ?? "",
            finishedAt: reports.map(\.finishedAt).max() ?? "",
            comparedBytes: reports.reduce(0) { $0 + $1.comparedBytes },
            differingBytes: reports.reduce(0) { $0 + $1.differingBytes },
            differenceCount: reports.reduce(0) { $0 + $1.differenceCount },
            differences: Array(reports.flatMap(\.differences).prefix(Self.longestList)),
            repairing: reports.contains(where: \.repairing))
    }

    mutating func add(_ runs: [Range<UInt64>], _ volume: String) {
        for run in runs {
            let length = run.upperBound - run.lowerBound
            differingBytes += length
            differenceCount += 1
            guard differences.count < Self.longestList else { continue }
            differences.append(Difference(volume: volume, offset: run.lowerBound, length: length))
        }
    }
}

/// A comparison that is under way.
final class Verification {
    let peer: ControlPeer
    let repairs: Bool
    /// Bytes a second; 0 = as fast as it goes.
    let rate: UInt64
    var copies: [(volume: VolumeState, id: CopyID)] = []
    var report = VerifyReport(
        point: 0, startedAt: timestamp(realSeconds()), finishedAt: "", comparedBytes: 0, differingBytes: 0,
        differenceCount: 0, differences: [], repairing: false)

    init(_ peer: ControlPeer, repair: Bool, rate: UInt64) { (self.peer, repairs, self.rate) = (peer, repair, rate) }
}
