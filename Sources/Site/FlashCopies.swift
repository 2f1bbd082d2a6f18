// FlashCopies.swift: `farcopy flashcopy create | list | show | set | withdraw`.
//
// What is done, in which order, and how it is taken back, is in the room FlashCopies; here is who may ask for it, and what is shown.
//
// Must be prevented:
//   an operation begins on a volume that another one, or a change of roles, is about to change

import API
import Base
import FlashCopies
import Groups
import NBDServer
import Ring
import Volumes

/// What an operator asks of FlashCopies.
@SiteThread
package final class FlashCopies {
    let home: Holdings
    let chains: Chains
    let executor: CopyExecutor
    let hooks: Hooks

    init(_ home: Holdings, _ chains: Chains, _ executor: CopyExecutor, _ hooks: Hooks) {
        (self.home, self.chains, self.executor, self.hooks) = (home, chains, executor, hooks)
    }

    /// Bytes a second of a background copy when nothing is said.
    static let usualRate: UInt64 = 100 << 20
    /// Names with ':' are the site's own and not exported.
    static let verifyPrefix = "verify:"

    // MARK: Creating

    /// Takes FlashCopies of several volumes at one instant.
    package func createFlashCopy(_ request: FlashCopyRequest) async throws -> [FlashCopyReport] {
        await home.copyTurnstile.enter()
        defer { home.copyTurnstile.leave() }
        let members = try home.members(request.volumes)
        try checkCopyName(request.name)
        try checkTargets(request)
        try requireDescriptors(forCopies: members.count)
        for volume in members {
            try checkFree(request.name, volume)
            try checkNotSecondary(
                volume, ", which is consistent at its recovery points only; clone one of those, or fail over first")
        }
        try await hooks.frozen(members, request.name) { try await self.take(request, members) }
        home.note(nil, "FlashCopy '\(request.name)' of \(request.volumes.joined(separator: ", ")) created")
        return try await reports(request.name, members)
    }

    func checkFree(_ name: String, _ volume: VolumeState) throws {
        if volume.copyRecord(name) != nil {
            throw Refusal(
                "volume '\(volume.name)' has a FlashCopy '\(name)' already; withdraw it or choose another name")
        }
        guard volume.copies.count < Limits.copiesPerVolume - Limits.copiesKeptFree else {
            throw Refusal(
                "volume '\(volume.name)' has \(volume.copies.count) copies, which is the limit; withdraw some")
        }
        try home.checkNotRestoring(volume)
    }

    /// FlashCopies leave room for the recovery points that groups of this site are yet to keep.
    func requireDescriptors(forCopies count: Int) throws {
        var toCome = 0
        for group in home.groups.values where group.record.role == .secondary {
            toCome += group.entry.volumes.count * (group.record.points.isEmpty ? 2 : 1)
        }
        try home.descriptors.require(2 * (count + toCome))
    }

    func checkNotSecondary(_ volume: VolumeState, _ advice: String) throws {
        guard home.group(ofVolume: volume.name)?.record.role == .secondary else { return }
        throw Refusal("volume '\(volume.name)' is a secondary\(advice)")
    }

    func checkCopyName(_ name: String) throws {
        let valid =
            !name.isEmpty && name.utf8.count <= 64 && !name.allSatisfy(\.isNumber) && name != "secondary"
            && name.utf8.allSatisfy { $0 > 0x20 && $0 < 0x7F && $0 != 0x40 && $0 != 0x2F && $0 != 0x3A }
        guard valid else {
            throw Refusal(
                "'\(name)' is no name for a FlashCopy: use 1 to 64 printable characters without '@', '/', ':' and "
                    + "space, not only digits (those are recovery points), and not 'secondary'", .misuse)
        }
    }

    func checkTargets(_ request: FlashCopyRequest) throws {
        guard let targets = request.targets else { return }
        guard targets.count == request.volumes.count else {
            throw Refusal(
                "\(targets.count) targets for \(request.volumes.count) volumes: give one for each, in the same order",
                .misuse)
        }
        let paths = TargetPaths(allowed: home.configuration.targets, state: home.configuration.state)
        for target in targets { try paths.check(target) }
    }

    /// A busy machine may let the hold's deadline pass; a few tries later it seldom does.
    func patiently(_ name: String, _ body: () async throws -> Void) async throws {
        var triesLeft = 5
        while true {
            triesLeft -= 1
            do {
                return try await body()
            } catch let error as Refusal where error.kind == .passing && triesLeft > 0 {
                home.logger.info("FlashCopy '\(name)': \(error); trying again")
            }
        }
    }

    func take(_ request: FlashCopyRequest, _ members: [VolumeState]) async throws {
        try await patiently(request.name) {
            try await self.executor.run(TakeCopies(self.drafts(request, members)), on: members)
        }
    }

    func drafts(
        _ request: FlashCopyRequest, _ members: [VolumeState], _ origins: [CopyDraft.Origin]? = nil
    ) -> [CopyDraft] {
        let set = randomIdentity()
        return members.enumerated().map { index, volume in
            var draft = CopyDraft(volume: volume.name, name: request.name)
            draft.target = request.targets?[index]
            draft.isFilled = request.copy ?? false
            draft.rate = request.rate ?? Self.usualRate
            draft.isWritable = request.writable ?? false
            draft.isDurable = request.durable ?? false
            draft.set = set
            draft.origin = origins?[index]
            return draft
        }
    }

    // MARK: Showing

    package func listFlashCopies() async throws -> [FlashCopyReport] {
        var all: [FlashCopyReport] = []
        for volume in home.volumes.values.sorted(by: { $0.name < $1.name }) {
            for record in volume.record.copies
            where record.isListed && !record.name.hasPrefix(Self.verifyPrefix) {
                all.append(await report(volume, record))
            }
        }
        return all
    }

    package func showFlashCopy(_ name: String, _ names: [String]) async throws -> [FlashCopyReport] {
        try await reports(name, try copies(name, home.members(names)).map(\.0))
    }

    func reports(_ name: String, _ members: [VolumeState]) async throws -> [FlashCopyReport] {
        var found: [FlashCopyReport] = []
        for (volume, record) in try copies(name, members) { found.append(await report(volume, record)) }
        return found
    }

    /// The volumes with the records of their copies of that name.
    func copies(_ name: String, _ members: [VolumeState]) throws -> [(VolumeState, CopyRecord)] {
        try members.map { volume in
            guard let record = volume.copyRecord(name) else {
                let known = volume.record.copies.map(\.name).joined(separator: ", ")
                throw Refusal(
                    "volume '\(volume.name)' has no FlashCopy '\(name)'; it has \(known.isEmpty ? "none" : known)",
                    .unknown)
            }
            return (volume, record)
        }
    }

    private func report(_ volume: VolumeState, _ record: CopyRecord) async -> FlashCopyReport {
        let (number, id, grain) = (volume.number, record.id, UInt64(volume.geometry.grain))
        let grains = await volume.reactor.run { $0.hosted(number).volume.copy(id)?.preservedCount ?? 0 }
        var report = FlashCopyReport(
            volume: volume.name, name: record.name, export: "\(volume.name)@\(record.name)",
            createdAt: timestamp(record.createdAt), state: record.state.rawValue, reason: record.reason,
            writable: record.isWritable,
            survivesPowerLoss: record.state == .active && (record.isDurable || record.isComplete),
            target: record.target ?? volume.targetPath(record.targetOwner),
            preservedBytes: min(volume.geometry.size, UInt64(grains) * grain), size: volume.geometry.size)
        guard record.isFilled else { return report }
        let now = monotonicNanoseconds()
        let place = volume.place(id)
        let start = chains.fillStarts[place] ?? (now, grains)
        chains.fillStarts[place] = start
        let seconds = Double(now - start.0) / 1e9
        let rate = seconds > 0 ? Double(grains - start.1) * Double(grain) / seconds : 0
        let left = Double(volume.geometry.size - report.preservedBytes)
        report.backgroundCopy = FlashCopyReport.BackgroundReport(
            complete: record.isComplete, rateBytesPerSecond: record.rate, measuredBytesPerSecond: rate,
            etaSeconds: record.isComplete
                ? nil : rate > 0 ? left / rate : record.rate > 0 ? left / Double(record.rate) : nil)
        return report
    }

    // MARK: Changing and ending

    /// Changes the rate of a background copy, or whether clients may write.
    package func setFlashCopy(_ request: FlashCopyRequest) async throws -> [FlashCopyReport] {
        await home.copyTurnstile.enter()
        defer { home.copyTurnstile.leave() }
        let members = try home.members(request.volumes)
        for (volume, record) in try copies(request.name, members) {
            let (number, id) = (volume.number, record.id)
            try await volume.amend(.set(id, rate: request.rate, writable: request.writable))
            if let rate = request.rate {
                chains.fillStarts[volume.place(id)] = nil
                await volume.reactor.run { $0.hosted(number).volume.setRate(id, rate) }
            }
            home.publish(volume, home.group(ofVolume: volume.name))
            if request.writable == false { await volume.reactor.run { $0.disconnectReaders(number, of: id) } }
        }
        return try await reports(request.name, members)
    }

    /// Takes FlashCopies out of service; readers are disconnected, and what older copies need is handed over first.
    package func withdrawFlashCopy(_ request: FlashCopyRequest) async throws {
        await home.copyTurnstile.enter()
        defer { home.copyTurnstile.leave() }
        let found = try copies(request.name, home.members(request.volumes))
        for (volume, record) in found where volume.record.restoring?.copy == record.id {
            throw Refusal(
                "volume '\(volume.name)' is being restored from '\(request.name)'; wait until it holds all of it")
        }
        try await executor.run(WithdrawCopies(found.map(\.1.id)), on: found.map(\.0))
        home.note(nil, "FlashCopy '\(request.name)' of \(request.volumes.joined(separator: ", ")) withdrawn")
    }
}
