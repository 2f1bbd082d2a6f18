// Meetings.swift: where the pairs of a group, at several sites, wait for each other during a switchover: at the first of the sites that have
// what they have.
//
// Must be prevented:
//   hosts are shut out for long because one pair does not come: every wait has an end, and then nobody who waits goes on
//   some go on, and others not: all are let go in one instant, when all are there

import Base
import Groups

@SiteThread
final class Meetings {
    private struct Waiter {
        var number: UInt64
        var pair: String
        var place: Int
        var goesOn: CheckedContinuation<Bool, Never>
    }
    private var waiting: [String: [Waiter]] = [:]
    private var lastNumber: UInt64 = 0
    private static let firstWait = 60.0
    /// Hosts are shut out meanwhile.
    static let laterWait = 20.0

    nonisolated init() {}

    /// Until all pairs are at that place of the switchover.
    func meet(_ group: String, _ pair: String, place: Int, all: [String]) async throws {
        lastNumber += 1
        let number = lastNumber
        let limit = place == 0 ? Self.firstWait : Self.laterWait
        let end = Task {
            try await Task.sleep(for: .seconds(limit))
            leave(group, number)
        }
        let haveMet = await withCheckedContinuation { (goesOn: CheckedContinuation<Bool, Never>) in
            for other in waiting[group] ?? [] where other.pair == pair { leave(group, other.number) }
            waiting[group, default: []].append(Waiter(number: number, pair: pair, place: place, goesOn: goesOn))
            let here = (waiting[group] ?? []).filter { $0.place == place }
            guard Set(here.map(\.pair)) == Set(all) else { return }
            waiting[group]?.removeAll { $0.place == place }
            for waiter in here { waiter.goesOn.resume(returning: true) }
        }
        end.cancel()
        guard haveMet else {
            throw Refusal(
                "group '\(group)': not every host has come so far in \(Int(limit)) s; nothing has changed", .passing)
        }
    }

    private func leave(_ group: String, _ number: UInt64) {
        guard let index = waiting[group]?.firstIndex(where: { $0.number == number }) else { return }
        waiting[group]?.remove(at: index).goesOn.resume(returning: false)
    }
}
