// EverySite.swift: what an operator asks of a group at one site, and is done at all that have what this one has of it: suspension, practice.
//
// Must be prevented:
//   practice copies are of one moment at some remotes, and of another, or none, at others

import API
import Base
import Groups
import SiteConfiguration

@SiteThread
package final class EverySite {
    private let home: Holdings
    private let replication: Replication
    private let practices: Practice
    private let remotes: OtherRemotes

    init(_ home: Holdings, _ replication: Replication, _ practices: Practice, _ remotes: OtherRemotes) {
        (self.home, self.replication, self.practices, self.remotes) = (home, replication, practices, remotes)
    }

    // MARK: Suspension

    /// Suspends mirroring at all sites that mirror the group, or takes it up again.
    ///
    /// - Parameter isLed: another site has asked, and asks the others itself.
    /// - Returns: sites that could not be told.
    package func setSuspended(
        _ name: String, _ isSuspended: Bool, fromImage: Bool = false, isLed: Bool
    ) async throws -> [String] {
        if isSuspended {
            try replication.suspend(name)
        } else {
            try await replication.resume(name, fromImage: fromImage)
        }
        guard !isLed else { return [] }
        var missed: [String] = []
        for (fellow, client) in home.clients(home.fellows(try home.pairs(name))) {
            do {
                if isSuspended {
                    _ = try await client.call(Endpoints.suspend, name, [.led: "true"])
                } else {
                    _ = try await client.call(
                        Endpoints.resume, name, [.led: "true", .fromImage: fromImage ? "true" : "false"])
                }
            } catch {
                missed.append("'\(fellow)' (\(error))")
            }
        }
        return missed
    }

    // MARK: Practice

    /// A writable copy of one point, at all remotes.
    package func practice(_ name: String, point wanted: String?, isLed: Bool) async throws -> [FlashCopyReport] {
        let pairs = try home.pairs(name).filter { !$0.entry.volumes.isEmpty }
        guard try home.isOfSeveral(name) else {
            return try await practices.practice(name, point: wanted)
        }
        let others = isLed ? [] : home.fellows(pairs)
        let point = try await practicePoint(name, pairs, wanted, others)
        var reports: [FlashCopyReport] = []
        // What this call has made, and may have made: what somebody practises with already is not its own.
        var (own, begun): ([String], [ControlClient]) = ([], [])
        do {
            for pair in pairs {
                reports += try await practices.practice(pair.entry.name, point: point)
                own.append(pair.entry.name)
            }
            for (other, client) in home.clients(others) {
                do {
                    reports += try await client.call(Endpoints.practice, name, [.point: point, .led: "true"])
                    begun.append(client)
                } catch {
                    if !(error is Refusal) { begun.append(client) }
                    throw Refusal("'\(other)': \(error)", (error as? Refusal)?.kind ?? .passing)
                }
            }
        } catch {
            // One moment everywhere, or none.
            for pair in own { try? await practices.endPractice(pair) }
            for client in begun {
                _ = try? await client.call(Endpoints.endPractice, name, [.led: "true"]) as Done
            }
            throw error
        }
        return reports
    }

    /// The newest that all remotes have.
    private func practicePoint(
        _ name: String, _ pairs: [GroupState], _ wanted: String?, _ others: [String]
    ) async throws -> String {
        if let wanted { return wanted }
        let stands = await remotes.ask(others, name, about: nil)
        if let (silent, word) = stands.filter({ $0.value.word == nil }).min(by: { $0.key < $1.key }) {
            throw Refusal(
                "group '\(name)': '\(silent)' does not say what it has (\(word.problem)), so that no point is known to be there as well",
                .passing)
        }
        let here = pairs.map { $0.record.newestReadable?.number ?? 0 }
        let there = stands.values.flatMap { $0.word?.pairs ?? [] }.map(\.committed)
        guard let point = (here + there).min(), point > 0 else {
            throw Refusal("group '\(name)' has no recovery point yet that all remotes have")
        }
        return String(point)
    }

    package func endPractice(_ name: String, isLed: Bool) async throws {
        let pairs = try home.pairs(name).filter { !$0.entry.volumes.isEmpty }
        guard try home.isOfSeveral(name) else { return try await practices.endPractice(name) }
        var refusal: Refusal?
        for pair in pairs {
            do { try await practices.endPractice(pair.entry.name) } catch let error as Refusal { refusal = error }
        }
        for (other, client) in home.clients(isLed ? [] : home.fellows(pairs)) {
            do {
                _ = try await client.call(Endpoints.endPractice, name, [.led: "true"]) as Done
            } catch {
                refusal = Refusal("'\(other)': \(error)", (error as? Refusal)?.kind ?? .passing)
            }
        }
        if let refusal { throw refusal }
    }
}
