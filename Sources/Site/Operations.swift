// Operations.swift: long commands of groups: one at a time, which say what they wait for and end when they are told to.

import API
import Groups
import Link
import Volumes

/// Long commands of groups.
@SiteThread
final class Operations {
    private let home: Holdings

    init(_ home: Holdings) {
        self.home = home
    }

    /// Runs an operation; a group has one at a time.
    func operate(_ group: GroupState, _ kind: Operation.Kind, _ body: () async throws -> Void) async throws {
        if let running = group.operation {
            throw Refusal(
                "group '\(group.entry.name)' is in a \(running.kind.rawValue): \(running.step); `farcopy abort "
                    + "\(running.kind.rawValue):\(group.entry.name)` ends it")
        }
        group.operation = Operation(kind)
        defer { group.operation = nil }
        try await body()
    }

    /// Tries again while the reason is one that passes.
    func persist(_ operation: Operation, _ body: () async throws -> Void) async throws {
        while true {
            do {
                return try await body()
            } catch let error as Refusal where error.kind == .passing {
                operation.step = error.description
            }
            try checkGoesOn(operation)
            try await Task.sleep(for: .milliseconds(200))
        }
    }

    func waitUntil(
        _ operation: Operation, seconds: Double, _ condition: @escaping () -> Bool
    ) async throws {
        await home.wait(seconds: seconds) { condition() || operation.isAborted }
        guard !condition() else { return }
        try checkGoesOn(operation)
        throw Refusal("it took longer than \(Int(seconds)) s")
    }

    private func checkGoesOn(_ operation: Operation) throws {
        guard !operation.isAborted else { throw Refusal("aborted by the operator") }
        guard !home.isStopping else { throw Refusal("site '\(home.configuration.site)' stops") }
    }

    /// A point formed from now on and committed by the peer.
    func pointOf(_ group: GroupState, seconds: Double) async throws -> PointRecord {
        guard let replicator = group.replicator, let operation = group.operation else {
            throw Refusal(home.notMirroring(group))
        }
        operation.step =
            group.servesHosts
            ? "sends what has changed while hosts go on" : "hosts are shut out; sends the last point"
        let outcome = Outcome()
        Task {
            do {
                let point = try await replicator.cycle()
                settle(outcome, .success(point))
            } catch {
                settle(outcome, .failure(Refusal("\(error)")))
            }
        }
        try await waitUntil(operation, seconds: seconds) { outcome.result != nil }
        return try outcome.result!.get()
    }

    @SiteThread
    private final class Outcome {
        var result: Result<PointRecord, Refusal>?
    }

    private func settle(_ outcome: Outcome, _ result: Result<PointRecord, Refusal>) {
        outcome.result = result
        home.happened()
    }
}
