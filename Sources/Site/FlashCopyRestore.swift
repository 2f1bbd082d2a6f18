// FlashCopyRestore.swift: `farcopy flashcopy restore`: volumes become a FlashCopy's point in time again.
//
//   hosts are shut out ─► what is discarded becomes a FlashCopy ─► hosts would see the restored state, nothing flows
//   ─► everything that this relies on is flushed ─► the decision, for each volume ─► data flows back, hosts are let in
//
// Must be prevented:
//   a host that had a volume open writes what it has cached over what is restored
//   what is discarded is not kept
//   the source changes before the decision to restore it is on stable storage
//   some of the volumes are restored and others not: once one decision is on stable storage, a start makes the others
//   a site gives up its role, or takes one, while its volumes are being exchanged

import API
import Base
import Glibc
import Groups
import NBDServer
import Ring
import Volumes

/// A volume on its way to what a FlashCopy of it holds.
private struct Restoration {
    var volume: VolumeState
    var copy: CopyRecord
    /// Keeps what is discarded.
    var kept: NewCopy?
    var keptIsInChain = false
}

extension Site {
    /// The volumes become the FlashCopies' point in time again, at once; data flows back in the background.
    package func restoreFlashCopy(_ request: FlashCopyRequest) async throws -> [FlashCopyReport] {
        let members = try members(request.volumes)
        let groups = try groupsToHold(members)
        // In this order, as where a role is given up.
        for group in groups { await group.turnstile.enter() }
        defer { for group in groups { group.turnstile.leave() } }
        await copyTurnstile.enter()
        defer { copyTurnstile.leave() }
        let found = try copies(request.name, members)
        for (volume, record) in found { try checkRestorable(volume, record) }
        let hosts = await hosts(members)
        if request.disconnect != true { try refuseUnder(hosts) }
        let kept = unusedName("before-restore-", members)
        try await restore(found.map { Restoration(volume: $0, copy: $1) }, keptAs: kept)
        let names = request.volumes.joined(separator: ", ")
        note(
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
        let names = Set(members.compactMap { group(ofVolume: $0.name)?.entry.name })
        let groups = names.sorted().compactMap { self.groups[$0] }
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
        try checkNotRestoring(volume)
        guard record.state == .active else {
            throw Refusal(
                "FlashCopy '\(record.name)' of volume '\(volume.name)' is \(record.state.rawValue): \(record.reason ?? "it cannot be restored")"
            )
        }
        try checkNotSecondary(volume, "; fail over to a recovery point instead")
        guard volume.copies.count < Limits.copiesPerVolume - 8 else {
            throw Refusal(
                "volume '\(volume.name)' has \(volume.copies.count) copies, which is the limit, and the restore adds one with "
                    + "what it discards; withdraw some")
        }
        if let group = group(ofVolume: volume.name), group.record.handingOver != nil {
            throw Refusal("group '\(group.entry.name)' is being handed over to '\(group.entry.peer)'")
        }
    }

    // MARK: Hosts

    private func hosts(_ members: [VolumeState]) async -> [(volume: String, clients: [Reactor.Host])] {
        var found: [(String, [Reactor.Host])] = []
        for volume in members {
            let number = volume.number
            found.append((volume.name, await volume.reactor.run { $0.hosts(of: number) }))
        }
        return found
    }

    /// - Throws: with status 412 when clients have one of the volumes open for writing.
    private func refuseUnder(_ hosts: [(volume: String, clients: [Reactor.Host])]) throws {
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

    /// Ends the hosts' connections, readers' as well, since what they have cached is void; what they asked for is carried out
    /// first. New ones can only read until `letHostsIn`.
    private func shutOut(_ volume: VolumeState) async {
        volume.shutsHostsOut = true
        let (number, reactor) = (volume.number, volume.reactor)
        await reactor.run { $0.hosted(number).writable = false }
        publish(volume, group(ofVolume: volume.name))
        await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
            reactor.perform { $0.disconnect(number, .hosts) { continuation.resume() } }
        }
    }

    private func letHostsIn(_ volume: VolumeState) async {
        volume.shutsHostsOut = false
        let number = volume.number
        let group = group(ofVolume: volume.name)
        let writable =
            group == nil || group?.servesHosts == true && group?.record.leftOut?.contains(volume.name) != true
        await volume.reactor.run { $0.hosted(number).writable = writable }
        publish(volume, group)
    }

    // MARK: The steps

    /// Nobody writes to the volumes meanwhile, so that what is kept and what is restored is of one instant on all of them.
    private func restore(_ parts: [Restoration], keptAs name: String) async throws {
        var parts = parts
        for part in parts { await shutOut(part.volume) }
        let decision = randomIdentity()
        do {
            for index in parts.indices { try await prepareRestore(&parts[index], keptAs: name, decision) }
            for index in parts.indices { await enterRestore(&parts[index]) }
            for part in parts { try await settle(part) }
            try parts[0].volume.amend { $0.decideRestore(at: realSeconds()) }
        } catch {
            for part in parts { await takeBack(part) }
            throw error
        }
        // One decision stands: a start would make these.
        for part in parts.dropFirst() { part.volume.acknowledge { $0.decideRestore(at: realSeconds()) } }
        for part in parts {
            let number = part.volume.number
            await part.volume.reactor.run { $0.hosted(number).volume.continueRestore() }
            await shutOut(part.volume)  // who came to read meanwhile does not know that this is another volume now
            await letHostsIn(part.volume)
        }
    }

    private func prepareRestore(_ part: inout Restoration, keptAs name: String, _ decision: String) async throws {
        let volume = part.volume
        let kept = try await prepare(
            FlashCopyRequest(name: name, volumes: [volume.name]), volume, target: nil, order: volume.takeOrder())
        part.kept = kept
        _ = try await makeRestoreBitmap(volume)
        try volume.amend { record in
            record.restoring = VolumeRecord.Restoring(
                copy: part.copy.id, decided: false, kept: kept.record.id, decision: decision)
        }
        publish(volume, group(ofVolume: volume.name))  // the copy is read-only from here on
        guard part.copy.isWritable else { return }
        let (number, id) = (volume.number, part.copy.id)
        await volume.reactor.run { $0.disconnectReaders(number, of: id) }
    }

    /// The kept copy becomes the newest of the chain, and takes what the restore overwrites.
    private func enterRestore(_ part: inout Restoration) async {
        guard let kept = part.kept else { return }
        await enterChain(part.volume, kept.record, kept.files) { $0.addCopy($1) }
        part.keptIsInChain = true
        await beginRestore(part.volume, from: part.copy.id, fresh: true)
    }

    /// What does not have to come back is the copy's as well, and may not have been flushed yet; nor may what clients wrote to
    /// the copy.
    private func settle(_ part: Restoration) async throws {
        try await part.volume.flushSource()
        try await part.volume.flushTargets(disks)
        if let bitmap = part.volume.restoreBitmap { try await disks.run { try bitmap.synchronize() } }
        if let kept = part.kept { try await settle(kept) }
    }

    /// As if the restore had not been asked for: nothing has flowed back. A decision that may stand in the record's file all the same
    /// finds no bitmap, and a start says so.
    private func takeBack(_ part: Restoration) async {
        let volume = part.volume
        let number = volume.number
        if part.keptIsInChain { await volume.reactor.run { $0.hosted(number).volume.cancelRestore() } }
        unlink(volume.restoreBitmapPath)
        volume.acknowledge { $0.restoring = nil }
        dropRestoreBitmap(volume)
        if let kept = part.kept, part.keptIsInChain {
            await leave(volume, kept.record.id)
        } else if let kept = part.kept {
            try? discard(kept)  // what cannot be written, a start does
        }
        await letHostsIn(volume)
    }

    /// At a start: a restore that was decided for one of its volumes is decided for all.
    func completeRestoreDecisions() throws {
        let decided = Set(volumes.values.compactMap { $0.record.restoring }.filter(\.decided).compactMap(\.decision))
        for volume in volumes.values {
            guard let restoring = volume.record.restoring, !restoring.decided, let decision = restoring.decision,
                decided.contains(decision)
            else { continue }
            try volume.amend { $0.decideRestore(at: realSeconds()) }
        }
    }

    /// "before-restore-3": the first number that none of the volumes has a FlashCopy of.
    private func unusedName(_ prefix: String, _ members: [VolumeState]) -> String {
        var number = 1
        while members.contains(where: { $0.record.copies.contains { $0.name == "\(prefix)\(number)" } }) { number += 1 }
        return "\(prefix)\(number)"
    }
}

extension VolumeRecord {
    mutating func decideRestore(at time: Double) {
        restoring?.decided = true
        restoredAt = time
        guard let kept = restoring?.kept, let index = copies.firstIndex(where: { $0.id == kept }) else { return }
        copies[index].beActive()
    }
}
