// Verify.swift: `farcopy verify`: compares a point at both sites by checksum while mirroring goes on.
//
// A FlashCopy of every volume is taken at the primary in the very instant in which a point is formed; the peer keeps that
// point as a clone. The two must be alike, whatever hosts do meanwhile.

import API
import Base
import FlashCopies
import FoundationEssentials
import Glibc
import Groups
import Link
import NBDServer
import Ring
import TLS
import Volumes

extension VerifyReport {
    fileprivate mutating func add(_ runs: [Range<UInt64>], _ volume: String) {
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
    let peer: HTTPPeer
    let repairs: Bool
    /// Bytes a second; 0 = as fast as it goes.
    let rate: UInt64
    var copies: [(volume: VolumeState, id: CopyID)] = []
    var report = VerifyReport(
        point: 0, startedAt: timestamp(realSeconds()), finishedAt: "", comparedBytes: 0, differingBytes: 0,
        differenceCount: 0, differences: [], repairing: false)

    init(_ peer: HTTPPeer, repair: Bool, rate: UInt64) { (self.peer, repairs, self.rate) = (peer, repair, rate) }
}

extension Site {
    /// - Parameter rate: bytes a second; 0 = as fast as it goes.
    package func verify(_ name: String, repair: Bool, rate: UInt64) async throws -> VerifyReport {
        let group = try home.group(name)
        guard group.isReplicating else { throw Refusal(home.notMirroring(group)) }
        guard let peer = home.peer(group) else {
            throw Refusal("the peer of group '\(name)' gives no checksums; it is no Farcopy site")
        }
        var report: VerifyReport?
        try await operate(group, .verify) {
            let verification = Verification(peer, repair: repair, rate: rate)
            group.verification = verification
            defer { group.verification = nil }
            verification.report.point = try await self.run(Verify(), group).number
            verification.report.finishedAt = timestamp(realSeconds())
            report = verification.report
        }
        let result = report!
        group.lastVerify = result
        group.verifiedBytes += result.comparedBytes
        group.differencesFound += UInt64(result.differenceCount)
        home.note(
            name,
            "point \(result.point) compared with '\(group.entry.peer)': \(result.comparedBytes) bytes, \(result.differingBytes) differ"
                + (result.differingBytes > 0 && repair ? "; they are sent again" : ""))
        return result
    }

    /// Names with ':' are the site's own and not exported.
    static let verifyPrefix = "verify:"

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
            try checkNotRestoring(volume)
            return CopyDraft(volume: volume.name, name: "\(Self.verifyPrefix)\(volume.record.nextCopy)")
        }
        do {
            let made = try await run(TakeCopies(drafts, at: .nextPoint), on: work)
            verification(group).copies = zip(work.volumes, made).map { ($0, $1.id) }
            return work.point!
        } catch {
            throw error as? Refusal ?? Refusal("group '\(group.entry.name)': \(error)")
        }
    }

    func pinPoint(_ group: GroupState, _ point: UInt64) async throws {
        try await verification(group).peer.pin(point: point, as: "\(Self.verifyPrefix)\(point)")
    }

    func unpinPoint(_ group: GroupState, _ point: UInt64) async throws {
        try await verification(group).peer.unpin("\(Self.verifyPrefix)\(point)")
    }

    func dropCopies(_ group: GroupState) async {
        for (volume, id) in verification(group).copies { await leave(volume, id) }
    }

    func comparePoint(_ group: GroupState, _ point: UInt64) async throws {
        let verification = verification(group)
        let operation = group.operation!
        let pinned = "\(Self.verifyPrefix)\(point)"
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
        _ volume: VolumeState, _ id: CopyID, _ peer: HTTPPeer, _ pinned: String, _ parts: [(UInt64, Int)]
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
            let ours = try await digests(volume, .copy(id), offset, length, Comparison.block)
            pairs.append((ours, try await task.value))
        }
        return pairs
    }

    private func markDifferent(_ volume: VolumeState, _ runs: [Range<UInt64>]) async throws {
        let number = volume.number
        await volume.reactor.run { $0.hosted(number).volume.markChanged(runs) }
        try await home.flush([volume.recording])  // the report says that they are sent again
    }

    // MARK: At the peer

    private func verifiedGroup(_ name: String, _ request: PinRequest) throws -> GroupState {
        let group = try home.group(name, askedBy: request.siteID)
        guard request.name.hasPrefix(Self.verifyPrefix) else {
            throw Refusal("'\(request.name)' is no FlashCopy of a verification", .refused)
        }
        return group
    }

    /// Keeps a recovery point for a verification, whatever the retention.
    package func pin(_ name: String, _ request: PinRequest) async throws {
        let group = try verifiedGroup(name, request)
        for volume in home.members(group) where volume.copyRecord(request.name) != nil { return }
        // The primary compares one point at a time: it died, or could not be heard, before it let go of this one.
        await dropVerifyCopies(home.members(group))
        var copy = FlashCopyRequest(name: request.name, volumes: group.entry.volumes)
        copy.of = String(request.point)
        _ = try await cloneFlashCopy(copy, own: true)
    }

    package func unpin(_ name: String, _ request: PinRequest) async throws {
        let group = try verifiedGroup(name, request)
        try await withdrawFlashCopy(FlashCopyRequest(name: request.name, volumes: group.entry.volumes))
    }

    /// What a verification of an earlier process left behind.
    func dropVerifyCopies(_ volumes: [VolumeState]) async {
        for volume in volumes {
            for copy in volume.record.copies where copy.name.hasPrefix(Self.verifyPrefix) {
                try? await withdrawFlashCopy(FlashCopyRequest(name: copy.name, volumes: [volume.name]))
            }
        }
    }
}
