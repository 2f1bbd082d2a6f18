// Verify.swift: `farcopy verify`: compares a point at both sites by checksum while mirroring goes on.
//
// A FlashCopy of every volume is taken at the primary in the very instant in which a point is formed; the peer keeps that
// point as a clone. The two must be alike, whatever hosts do meanwhile.
//
// Must be prevented:
//   what hosts write meanwhile counts as a difference
//   a FlashCopy made for it stays behind

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

extension Site {
    /// - Parameter rate: bytes a second; 0 = as fast as it goes.
    package func verify(_ name: String, repair: Bool, rate: UInt64) async throws -> VerifyReport {
        let group = try group(name)
        var report: VerifyReport?
        try await operate(group, .verify) {
            report = try await self.compareSites(group, group.operation!, repair, rate)
        }
        let result = report!
        group.lastVerify = result
        group.verifiedBytes += result.comparedBytes
        group.differencesFound += UInt64(result.differenceCount)
        note(
            name,
            "point \(result.point) compared with '\(group.entry.peer)': \(result.comparedBytes) bytes, \(result.differingBytes) differ"
                + (result.differingBytes > 0 && repair ? "; they are sent again" : ""))
        return result
    }

    private func compareSites(
        _ group: GroupState, _ operation: Operation, _ repair: Bool, _ rate: UInt64
    ) async throws -> VerifyReport {
        guard let replicator = group.replicator else { throw Refusal(notMirroring(group)) }
        guard let peer = peer(group) else {
            throw Refusal("the peer of group '\(group.entry.name)' gives no checksums; it is no Farcopy site")
        }
        let started = realSeconds()
        operation.step = "a point is formed"
        let (point, copies) = try await copyAtPoint(group, replicator)
        let pinned = "\(Self.verifyPrefix)\(point.number)"
        var report: VerifyReport?
        var problem: (any Error)?
        do {
            try await peer.pin(point: point.number, as: pinned)
            report = try await compare(operation, peer, pinned, copies, repair, rate)
        } catch {
            problem = error
        }
        for copy in copies { await leave(copy.volume, copy.id) }
        try? await peer.unpin(pinned)
        if let problem { throw problem }
        report!.point = point.number
        report!.startedAt = timestamp(started)
        report!.finishedAt = timestamp(realSeconds())
        return report!
    }

    /// Names with ':' are the site's own and not exported.
    static let verifyPrefix = "verify:"

    private struct VerifiedCopy {
        var volume: VolumeState
        var id: CopyID
    }

    /// FlashCopies of the instant of a point that the peer has committed.
    private func copyAtPoint(
        _ group: GroupState, _ replicator: GroupHandle
    ) async throws -> (PointRecord, [VerifiedCopy]) {
        await copyTurnstile.enter()
        defer { copyTurnstile.leave() }
        let work = CopyWork(members(group))
        work.replicator = replicator
        let drafts = try work.volumes.map { volume in
            try checkNotRestoring(volume)
            return CopyDraft(volume: volume.name, name: "\(Self.verifyPrefix)\(volume.record.nextCopy)")
        }
        do {
            let made = try await run(TakeCopies(drafts, at: .nextPoint), on: work)
            return (work.point!, zip(work.volumes, made).map { VerifiedCopy(volume: $0, id: $1.id) })
        } catch {
            throw error as? Refusal ?? Refusal("group '\(group.entry.name)': \(error)")
        }
    }

    private func compare(
        _ operation: Operation, _ peer: HTTPPeer, _ pinned: String, _ copies: [VerifiedCopy], _ repair: Bool,
        _ rate: UInt64
    ) async throws -> VerifyReport {
        var report = VerifyReport(
            point: 0, startedAt: "", finishedAt: "", comparedBytes: 0, differingBytes: 0, differenceCount: 0,
            differences: [], repairing: false)
        let total = copies.reduce(0) { $0 + $1.volume.geometry.size }
        let begin = realSeconds()
        for copy in copies {
            let size = copy.volume.geometry.size
            var offset: UInt64 = 0
            while offset < size {
                guard !operation.isAborted else { throw Refusal("aborted by the operator") }
                let parts = Self.parts(from: offset, size)
                let pairs = try await digestPairs(copy, peer, pinned, parts)
                for ((start, length), (ours, theirs)) in zip(parts, pairs) {
                    guard ours.count == theirs.count else { throw Refusal("the peer's checksums make no sense") }
                    let found = Sender.differing(ours, theirs, length, runs: .max).map {
                        start + UInt64($0.lowerBound)..<start + UInt64($0.upperBound)
                    }
                    report.add(found, copy.volume.name)
                    if repair, !found.isEmpty {
                        try await markDifferent(copy.volume, found)
                        report.repairing = true
                    }
                    report.comparedBytes += UInt64(length)
                    offset = start + UInt64(length)
                }
                operation.step = progress(report, total, begin)
                let due = rate == 0 ? 0 : Double(report.comparedBytes) / Double(rate) - (realSeconds() - begin)
                if due > 0 { try await Task.sleep(for: .seconds(min(due, 5))) }
            }
        }
        return report
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
        _ copy: VerifiedCopy, _ peer: HTTPPeer, _ pinned: String, _ parts: [(UInt64, Int)]
    ) async throws -> [([UInt8], [UInt8])] {
        let name = copy.volume.name
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
            let ours = try await digests(copy.volume, .copy(copy.id), offset, length, Comparison.block)
            pairs.append((ours, try await task.value))
        }
        return pairs
    }

    private func markDifferent(_ volume: VolumeState, _ runs: [Range<UInt64>]) async throws {
        let number = volume.number
        await volume.reactor.run { $0.hosted(number).volume.markChanged(runs) }
        try await flush([volume.recording])  // the report says that they are sent again
    }

    // MARK: At the peer

    private func verifiedGroup(_ name: String, _ request: PinRequest) throws -> GroupState {
        let group = try group(name, askedBy: request.siteID)
        guard request.name.hasPrefix(Self.verifyPrefix) else {
            throw Refusal("'\(request.name)' is no FlashCopy of a verification", .refused)
        }
        return group
    }

    /// Keeps a recovery point for a verification, whatever the retention.
    package func pin(_ name: String, _ request: PinRequest) async throws {
        let group = try verifiedGroup(name, request)
        for volume in members(group) where volume.copyRecord(request.name) != nil { return }
        var copy = FlashCopyRequest(name: request.name, volumes: group.entry.volumes)
        copy.of = String(request.point)
        _ = try await cloneFlashCopy(copy, own: true)
    }

    package func unpin(_ name: String, _ request: PinRequest) async throws {
        let group = try verifiedGroup(name, request)
        try await withdrawFlashCopy(FlashCopyRequest(name: request.name, volumes: group.entry.volumes))
    }

    /// What a verification of an earlier process left behind.
    func dropVerifyCopies() async {
        for volume in volumes.values {
            for copy in volume.record.copies where copy.name.hasPrefix(Self.verifyPrefix) {
                try? await withdrawFlashCopy(FlashCopyRequest(name: copy.name, volumes: [volume.name]))
            }
        }
    }
}
