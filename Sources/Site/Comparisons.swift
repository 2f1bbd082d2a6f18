// Comparisons.swift: a point is compared at both sites by checksum while mirroring goes on.
//
// A FlashCopy of every volume is taken at the primary in the very instant in which a point is formed; the peer keeps that
// point as a clone. The two must be alike, whatever hosts do meanwhile.

import API
import Base
import FlashCopies
import Groups
import Link
import NBDServer
import Ring
import TLS
import Volumes

/// The parts of a comparison of a point at both sites.
@SiteThread
final class Comparisons {
    private let home: Holdings
    private let chains: Chains
    private let executor: CopyExecutor
    private let checksums: Checksums

    init(_ home: Holdings, _ chains: Chains, _ executor: CopyExecutor, _ checksums: Checksums) {
        (self.home, self.chains, self.executor, self.checksums) = (home, chains, executor, checksums)
    }

    private func verification(_ group: GroupState) -> Verification {
        guard let verification = group.verification else {
            invariantFailed("what is compared is known before it is", #fileID, #line)
        }
        return verification
    }

    /// FlashCopies of the instant of a point that the peer has committed.
    func copyAtPoint(_ group: GroupState) async throws -> PointRecord {
        guard let replicator = group.replicator else { throw Refusal(home.notMirroring(group)) }
        group.operation?.step = "a point is formed"
        await home.copyTurnstile.enter()
        defer { home.copyTurnstile.leave() }
        let work = CopyWork(home.members(group))
        work.replicator = replicator
        let drafts = try work.volumes.map { volume in
            try home.checkNotRestoring(volume)
            return CopyDraft(volume: volume.name, name: "\(FlashCopies.verifyPrefix)\(volume.record.nextCopy)")
        }
        do {
            let made = try await executor.run(TakeCopies(drafts, at: .nextPoint), on: work)
            verification(group).copies = zip(work.volumes, made).map { ($0, $1.id) }
            return work.point!
        } catch {
            throw error as? Refusal ?? Refusal("group '\(group.entry.name)': \(error)")
        }
    }

    func pinPoint(_ group: GroupState, _ point: UInt64) async throws {
        try await verification(group).peer.pin(point: point, as: "\(FlashCopies.verifyPrefix)\(point)")
    }

    func unpinPoint(_ group: GroupState, _ point: UInt64) async throws {
        try await verification(group).peer.unpin("\(FlashCopies.verifyPrefix)\(point)")
    }

    func dropCopies(_ group: GroupState) async {
        for (volume, id) in verification(group).copies { await chains.leave(volume, id) }
    }

    func comparePoint(_ group: GroupState, _ point: UInt64) async throws {
        let verification = verification(group)
        let operation = group.operation!
        let pinned = "\(FlashCopies.verifyPrefix)\(point)"
        let total = verification.copies.reduce(0) { $0 + $1.volume.geometry.size }
        let begin = realSeconds()
        for (volume, id) in verification.copies {
            let size = volume.geometry.size
            var offset: UInt64 = 0
            while offset < size {
                guard !operation.isAborted else { throw Refusal("aborted by the operator") }
                let parts = Self.parts(from: offset, size)
                let pairs = try await digestPairs(volume, id, verification.peer, pinned, parts)
                for ((start, length), (ours, theirs)) in zip(parts, pairs) {
                    guard ours.count == theirs.count else { throw Refusal("the peer's checksums make no sense") }
                    let found = Sender.differing(ours, theirs, length, runs: .max).map {
                        start + UInt64($0.lowerBound)..<start + UInt64($0.upperBound)
                    }
                    verification.report.add(found, volume.name)
                    if verification.repairs, !found.isEmpty {
                        try await markDifferent(volume, found)
                        verification.report.repairing = true
                    }
                    verification.report.comparedBytes += UInt64(length)
                    offset = start + UInt64(length)
                }
                operation.step = progress(verification.report, total, begin)
                let rate = Double(verification.rate)
                let due = rate == 0 ? 0 : Double(verification.report.comparedBytes) / rate - (realSeconds() - begin)
                if due > 0 { try await Task.sleep(for: .seconds(min(due, 5))) }
            }
        }
    }

    private func progress(_ report: VerifyReport, _ total: UInt64, _ begin: Double) -> String {
        let rate = Double(report.comparedBytes) / max(0.001, realSeconds() - begin)
        let left = Double(total - report.comparedBytes) / max(1, rate)
        return "compared \(report.comparedBytes) of \(total) bytes at \(Int(rate)) bytes/s, \(Int(left)) s left, "
            + "\(report.differingBytes) bytes differ"
    }

    /// A few parts at a time, so that a link with a long way is used.
    private static func parts(from offset: UInt64, _ size: UInt64) -> [(UInt64, Int)] {
        (0..<UInt64(8)).compactMap { index in
            let start = offset + index * UInt64(Limits.checksumBytes)
            return start < size ? (start, Int(min(UInt64(Limits.checksumBytes), size - start))) : nil
        }
    }

    private func digestPairs(
        _ volume: VolumeState, _ id: CopyID, _ peer: ControlPeer, _ pinned: String, _ parts: [(UInt64, Int)]
    ) async throws -> [([UInt8], [UInt8])] {
        let name = volume.name
        var theirs: [Task<[UInt8], any Error>] = []
        for (offset, length) in parts {
            theirs.append(
                Task {
                    try await peer.checksums(
                        copy: pinned, volume: name, offset: offset, length: length, block: Comparison.block)
                })
        }
        var pairs: [([UInt8], [UInt8])] = []
        for ((offset, length), task) in zip(parts, theirs) {
            let ours = try await checksums.digests(volume, .copy(id), offset, length, Comparison.block)
            pairs.append((ours, try await task.value))
        }
        return pairs
    }

    private func markDifferent(_ volume: VolumeState, _ runs: [Range<UInt64>]) async throws {
        let number = volume.number
        await volume.reactor.run { $0.hosted(number).volume.markChanged(runs) }
        try await home.flush([volume.recording])  // the report says that they are sent again
    }
}
