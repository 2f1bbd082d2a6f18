// Practice.swift: `farcopy practice`: a writable copy of a point, while mirroring goes on.

import API
import Groups
import Volumes

/// A writable copy of a point.
@SiteThread
package final class Practice {
    private let home: Holdings
    private let flashCopies: FlashCopies

    init(_ home: Holdings, _ flashCopies: FlashCopies) {
        (self.home, self.flashCopies) = (home, flashCopies)
    }

    private static let practiceName = "practice"

    /// A writable FlashCopy `practice` of a point over all volumes of the group. Mirroring, lag and points are not touched.
    ///
    /// - Parameter wanted: the recovery point's number; nil = the newest.
    package func practice(_ name: String, point wanted: String?) async throws -> [FlashCopyReport] {
        let group = try home.group(name)
        let volumes = home.members(group)
        if volumes.contains(where: { $0.copyRecord(Self.practiceName) != nil }) {
            throw Refusal(
                "group '\(name)' is being practised with already; `farcopy practice \(name) --end` ends that")
        }
        guard let newest = group.record.newestReadable else {
            throw Refusal(
                group.record.role == .primary
                    ? "group '\(name)' is primary at '\(home.configuration.site)'; practise at '\(group.entry.peer)', which has its points"
                    : "group '\(name)' has no recovery point that can be read: its first copy is not complete, or they have failed"
            )
        }
        let point = wanted ?? String(newest.number)
        let readable = group.record.readablePoints
        guard readable.contains(where: { String($0.number) == point }) else {
            let known = readable.map { String($0.number) }.joined(separator: ", ")
            throw Refusal("group '\(name)' has no point \(point); it has \(known)", .unknown)
        }
        var request = FlashCopyRequest(name: Self.practiceName, volumes: group.entry.volumes)
        request.of = point
        request.writable = true
        let reports = try await flashCopies.cloneFlashCopy(request)
        home.note(name, "practice with point \(point) begins")
        return reports
    }

    package func endPractice(_ name: String) async throws {
        let group = try home.group(name)
        let volumes = home.members(group).filter { $0.copyRecord(Self.practiceName) != nil }.map(\.name)
        guard !volumes.isEmpty else { throw Refusal("group '\(name)' is not being practised with", .unknown) }
        try await flashCopies.withdrawFlashCopy(FlashCopyRequest(name: Self.practiceName, volumes: volumes))
        home.note(name, "practice ends")
    }
}
