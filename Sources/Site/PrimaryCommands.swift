// PrimaryCommands.swift: what an operator asks of a primary that sends: points, and whether it sends at all.

import API
import Groups
import Link

extension Site {
    package nonisolated static var version: String { StatusBoard.version }

    /// Answered from the board: nobody's work is waited for.
    package nonisolated func status(group: String? = nil) async throws -> StatusReport {
        try await home.board.report(group: group)
    }
    package nonisolated func points(_ name: String) throws -> [StatusReport.PointReport] { try home.board.points(name) }
    package nonisolated var isStarted: Bool { home.board.isStarted.load(ordering: .acquiring) }

    private func replicator(_ name: String) throws -> GroupHandle {
        let group = try home.group(name)
        guard let replicator = group.replicator else {
            throw Refusal(home.notMirroring(group))
        }
        return replicator
    }

    package func suspend(_ name: String) throws { try replicator(name).suspend() }

    /// - Parameter fromImage: the secondary was seeded; until the first commit only what differs by checksum is sent.
    package func resume(_ name: String, fromImage: Bool = false) async throws {
        let replicator = try replicator(name)
        if fromImage { try await home.group(name).handle.change(.seeded) }
        replicator.resume()
    }

    package func cycle(_ name: String) async throws -> StatusReport.PointReport {
        let replicator = try replicator(name)
        do {
            return try await replicator.cycle().report
        } catch {
            throw Refusal("group '\(name)': \(error)")
        }
    }

    package func request(_ name: String) throws { try replicator(name).request() }
}
