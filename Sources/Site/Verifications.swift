// Verifications.swift: `farcopy verify`, at the site that asks and at its peer.

import API
import FlashCopies
import Groups
import Ring
import Volumes

/// Comparisons that an operator, a schedule or the peer asks for.
@SiteThread
package final class Verifications {
    private let home: Holdings
    private let operations: Operations
    private let steps: StepExecutor
    private let flashCopies: FlashCopies

    init(_ home: Holdings, _ operations: Operations, _ steps: StepExecutor, _ flashCopies: FlashCopies) {
        (self.home, self.operations, self.steps, self.flashCopies) = (home, operations, steps, flashCopies)
    }

    /// - Parameter rate: bytes a second; 0 = as fast as it goes.
    package func verify(_ name: String, repair: Bool, rate: UInt64) async throws -> VerifyReport {
        let group = try home.group(name)
        guard group.isReplicating else { throw Refusal(home.notMirroring(group)) }
        guard let peer = home.peer(group) else {
            throw Refusal("the peer of group '\(name)' gives no checksums; it is no Farcopy site")
        }
        var report: VerifyReport?
        try await operations.operate(group, .verify) {
            let verification = Verification(peer, repair: repair, rate: rate)
            group.verification = verification
            defer { group.verification = nil }
            verification.report.point = try await self.steps.run(Verify(), group).number
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

    /// All pairs, each at a point of its own.
    package func verify(_ name: String, repair: Bool, rate: UInt64, isLed: Bool) async throws -> VerifyReport {
        guard try home.isOfSeveral(name) else { return try await verify(name, repair: repair, rate: rate) }
        let reports = try await home.everywhere(name, isLed: isLed) { [self] in
            var report = try await verify($0, repair: repair, rate: rate)
            for index in report.differences.indices { report.differences[index].site = home.configuration.site }
            return report
        } other: { client in
            try await client.call(
                Endpoints.verify, name, [.repair: "\(repair)", .rate: String(rate), .led: "true"])
        }
        return VerifyReport(reports)
    }

    private func verifiedGroup(_ name: String, _ request: PinRequest) throws -> GroupState {
        let group = try home.group(name, askedBy: request.siteID)
        guard request.name.hasPrefix(FlashCopies.verifyPrefix) else {
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
        _ = try await flashCopies.cloneFlashCopy(copy, own: true)
    }

    package func unpin(_ name: String, _ request: PinRequest) async throws {
        let group = try verifiedGroup(name, request)
        try await flashCopies.withdrawFlashCopy(FlashCopyRequest(name: request.name, volumes: group.entry.volumes))
    }

    /// What a verification of an earlier process left behind.
    func dropVerifyCopies(_ volumes: [VolumeState]) async {
        for volume in volumes {
            for copy in volume.record.copies where copy.name.hasPrefix(FlashCopies.verifyPrefix) {
                try? await flashCopies.withdrawFlashCopy(FlashCopyRequest(name: copy.name, volumes: [volume.name]))
            }
        }
    }
}
