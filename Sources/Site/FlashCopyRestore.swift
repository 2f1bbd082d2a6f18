// FlashCopyRestore.swift: `farcopy flashcopy restore`: volumes become a FlashCopy's point in time again.
//
// Must be prevented:
//   a host that had a volume open writes what it has cached over what is restored, and nobody was asked
//   a site gives up its role, or takes one, while its volumes are being exchanged

import API
import Base
import FlashCopies
import Glibc
import Groups
import NBDServer
import Ring
import Volumes

extension FlashCopies {
    /// The volumes become the FlashCopies' point in time again, at once; data flows back in the background.
    package func restoreFlashCopy(_ request: FlashCopyRequest) async throws -> [FlashCopyReport] {
        let members = try home.members(request.volumes)
        for (volume, record) in try copies(request.name, members) { try checkRestorable(volume, record) }
        let groups = try groupsToHold(members)
        // Who gives a role up holds its group and waits for operations on FlashCopies: a failover would wait with it.
        await enterTogether(home.copyTurnstile, groups.map(\.turnstile))
        defer {
            home.copyTurnstile.leave()
            for group in groups { group.turnstile.leave() }
        }
        let found = try copies(request.name, members)
        for (volume, record) in found { try checkRestorable(volume, record) }
        let hosts = await hosts(members)
        if request.disconnect != true { try refuseUnder(hosts) }
        let kept = unusedName("before-restore-", members)
        let drafts = members.map { CopyDraft(volume: $0.name, name: kept) }
        try await executor.run(RestoreVolumes(found.map(\.1), keeping: drafts, decision: randomIdentity()), on: members)
        let names = request.volumes.joined(separator: ", ")
        home.note(
            nil,
            "\(names) restored from FlashCopy '\(request.name)'; what it held before is kept as FlashCopy '\(kept)' until it is "
                + "withdrawn; \(hosts.reduce(0) { $0 + $1.clients.count }) clients were disconnected")
        var reports = try await reports(request.name, members)
        for index in reports.indices {
            reports[index].keptAs = kept
            reports[index].disconnected = hosts[index].clients.count
        }
        return reports
    }

    /// The volumes' groups, none of which is changing roles.
    private func groupsToHold(_ members: [VolumeState]) throws -> [GroupState] {
        let names = Set(members.compactMap { home.group(ofVolume: $0.name)?.entry.name })
        let groups = names.sorted().compactMap { home.groups[$0] }
        for group in groups {
            let name = group.entry.name
            if let operation = group.operation, operation.kind != .verify {
                throw Refusal(
                    "group '\(name)' is in a \(operation.kind.rawValue): \(operation.step); restore when it is over, or end it "
                        + "with `farcopy abort \(operation.kind.rawValue):\(name)`")
            }
        }
        return groups
    }

    private func checkRestorable(_ volume: VolumeState, _ record: CopyRecord) throws {
        try home.checkNotRestoring(volume)
        guard record.state == .active else {
            throw Refusal(
                "FlashCopy '\(record.name)' of volume '\(volume.name)' is \(record.state.rawValue): \(record.reason ?? "it cannot be restored")"
            )
        }
        try checkNotSecondary(volume, "; fail over to a recovery point instead")
        guard volume.copies.count < Limits.copiesPerVolume - Limits.copiesKeptFree else {
            throw Refusal(
                "volume '\(volume.name)' has \(volume.copies.count) copies, which is the limit, and the restore adds one with "
                    + "what it discards; withdraw some")
        }
        if let group = home.group(ofVolume: volume.name), group.record.handingOver != nil {
            throw Refusal("group '\(group.entry.name)' is being handed over to '\(group.entry.peer)'")
        }
    }

    // MARK: Hosts

    func hosts(_ members: [VolumeState]) async -> [(volume: String, clients: [Reactor.Host])] {
        var found: [(String, [Reactor.Host])] = []
        for volume in members {
            let number = volume.number
            found.append((volume.name, await volume.reactor.run { $0.hosts(of: number) }))
        }
        return found
    }

    /// - Throws: with status 412 when clients have one of the volumes open for writing.
    func refuseUnder(_ hosts: [(volume: String, clients: [Reactor.Host])]) throws {
        let words = hosts.compactMap { volume, clients -> String? in
            let writers = clients.filter(\.mayWrite)
            guard !writers.isEmpty else { return nil }
            let origins = Set(writers.map(\.from)).sorted().map { from in
                "\(writers.count { $0.from == from }) from \(from)"
            }
            return
                "volume '\(volume)' is open for writing over \(writers.count) connections (\(origins.joined(separator: ", ")))"
        }
        guard !words.isEmpty else { return }
        throw Refusal(
            words.joined(separator: "; ")
                + ": hosts would write what they have cached over what is restored. Unmount and detach them first, or have the "
                + "restore disconnect them with --yes (\"disconnect\": true); what they have not written yet is then lost",
            .unconfirmed)
    }

    /// "before-restore-3": the first number that none of the volumes has a FlashCopy of.
    func unusedName(_ prefix: String, _ members: [VolumeState]) -> String {
        var number = 1
        while members.contains(where: { $0.record.copies.contains { $0.name == "\(prefix)\(number)" } }) { number += 1 }
        return "\(prefix)\(number)"
    }
}
