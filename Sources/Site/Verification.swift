// Verification.swift: a comparison of a point at both sites, while it is under way.

import API
import Ring
import Volumes

extension VerifyReport {
    mutating func add(_ runs: [Range<UInt64>], _ volume: String) {
        for run in runs {
            let length = run.upperBound - run.lowerBound
            differingBytes += length
            differenceCount += 1
            guard differences.count < 1000 else { continue }
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
