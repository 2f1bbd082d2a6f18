// LocalRestores.swift: `farcopy restore GROUP --from change-volume`: the volumes of a group become the point again that was committed last,
// from their first intermediates, and from the peer in what the intermediates have of a newer point.
//
// What the volumes may hold otherwise than the point is in CR and OOS, or in what the intermediate has otherwise; it is written as a host
// writes, so FlashCopies keep what they need and the changes are recorded: mirroring goes on with these alone.
//
// Must be prevented:
//   a host, or a point, sees a volume that is half restored: what is begun is written down before, and a start goes on with it
//   volumes of a group are restored to different points
//   what an intermediate has of a newer point is taken for the committed one's

import API
import Base
import Glibc
import Groups
import Link
import NBDServer
import Ring
import Volumes

/// Restores of groups from their change volumes.
@SiteThread
package final class LocalRestores {
    private let home: Holdings
    private let operations: Operations
    private let peers: Peers
    private let restores: Restores
    private let flashCopies: FlashCopies
    private let replication: Replication

    init(
        _ home: Holdings, _ operations: Operations, _ peers: Peers, _ restores: Restores, _ flashCopies: FlashCopies,
        _ replication: Replication
    ) {
        (self.home, self.operations, self.peers) = (home, operations, peers)
        (self.restores, self.flashCopies, self.replication) = (restores, flashCopies, replication)
    }

    private static let workers = 4

    // MARK: By command

    package func restore(_ name: String, _ request: LocalRestoreRequest) async throws -> LocalRestoreReport {
        guard request.from == LocalRestoreRequest.changeVolume else {
            throw Refusal(
                "'\(request.from)' is nothing to restore from; say \(LocalRestoreRequest.changeVolume)", .misuse)
        }
        let group = try home.group(name)
        try check(group)
        var report: LocalRestoreReport?
        do {
            try await operations.operate(group, .restore) {
                await enterTogether(home.copyTurnstile, [group.turnstile])
                defer {
                    home.copyTurnstile.leave()
                    group.turnstile.leave()
                }
                try check(group)
                report = try await restore(group, request)
            }
        } catch {
            if home.isBeingRestored(group) { Task { await resume(group) } }
            throw error
        }
        return report!
    }

    private func check(_ group: GroupState) throws {
        let name = group.entry.name
        guard group.record.role == .primary, group.record.isMirroring else { throw Refusal(home.notMirroring(group)) }
        guard group.entry.mode.hold == .intermediate else {
            throw Refusal(
                "group '\(name)' is in mode '\(group.entry.mode.rawValue)': its volumes have no change volumes")
        }
        guard group.entry.several == nil else {
            throw Refusal(
                "group '\(name)' has several hosts: the point of this one alone would match none of the others'; fail over, or restore FlashCopies"
            )
        }
        if let isolation = group.isolation { throw Refusal("group '\(name)': \(isolation)") }
        for volume in home.members(group) { try home.checkNotRestoring(volume) }
        _ = try lastPoint(group)
    }

    private func lastPoint(_ group: GroupState) throws -> UInt64 {
        guard let point = group.record.lastCommitted, point.isBase != true else {
            throw Refusal(
                "group '\(group.entry.name)' has no point that was committed from here: there is nothing to restore")
        }
        return point.number
    }

    private func restore(_ group: GroupState, _ request: LocalRestoreRequest) async throws -> LocalRestoreReport {
        let members = home.members(group)
        let hosts = await flashCopies.hosts(members)
        if request.disconnect != true { try flashCopies.refuseUnder(hosts) }
        await replication.stopReplication(group)
        var kept: String?
        let point: UInt64
        do {
            try await giveUpPoint(group)
            point = try await pointOf(group)
            try await checkPeer(group, members, point)
            for volume in members { await restores.shutOut(volume) }
            if request.discard != true { kept = try await keep(members) }
            let begun = LocalRestoreRecord(point: point, members: members.map(\.name).sorted())
            for volume in members { try await volume.amend { $0.localRestore = begun } }
            // Who reads it meanwhile would see half of it: it is exported no more.
            for volume in members { await restores.shutOut(volume) }
        } catch {
            await withdraw(group)
            throw error
        }
        let bytes: UInt64
        let fetched: UInt64
        do { (bytes, fetched) = try await carryOut(group) } catch {
            if group.operation?.isAborted == true { throw await givenUp(group, point) }
            throw Refusal(
                "group '\(group.entry.name)': \(error). Hosts are shut out, and it is tried again until it is done; `farcopy abort "
                    + "restore:\(group.entry.name)` lets them in at what is there, which is of two moments then"
                    + (kept.map { "; FlashCopy '\($0)' has what was there before" } ?? ""), .passing)
        }
        let report = LocalRestoreReport(
            group: group.entry.name, point: point, bytes: bytes, fetchedBytes: fetched, keptAs: kept,
            disconnected: hosts.reduce(0) { $0 + $1.clients.count })
        home.note(
            group.entry.name,
            "restored to point \(point) from the change volumes: \(bytes) bytes, \(fetched) of them from '\(group.entry.peer)'"
                + (kept.map { "; what the volumes held before is kept as FlashCopy '\($0)' until it is withdrawn" }
                    ?? ""))
        return report
    }

    /// CR alone says what the peer lacks.
    private func giveUpPoint(_ group: GroupState) async throws {
        await home.onEngines(group) { $0.giveUpPoint() }
        if group.record.held != nil || group.record.forming != nil { try await group.handle.change(.pointGivenUp) }
    }

    private func lacksAnything(_ volume: VolumeState) async -> Bool {
        let number = volume.number
        return await volume.reactor.run { $0.hosted(number).volume.intermediate?.hasElsewhere ?? true }
    }

    private func lacking(_ members: [VolumeState]) async -> [VolumeState] {
        var found: [VolumeState] = []
        for volume in members where await lacksAnything(volume) { found.append(volume) }
        return found
    }

    /// What the peer must give can be had, before anything is changed.
    private func checkPeer(_ group: GroupState, _ members: [VolumeState], _ point: UInt64) async throws {
        for volume in await lacking(members) {
            let (connect, length) = (try remoteExport(volume, group, point), min(volume.geometry.size, 4096))
            do {
                try await home.disks.run {
                    let buffer = try PoolMemory(byteCount: 4096)
                    try connect().read(buffer.memory, Int(length), at: 0)
                }
            } catch {
                throw Refusal(
                    "group '\(group.entry.name)': the change volume of '\(volume.name)' has a part of a newer point already, and what it lacks of "
                        + "point \(point) cannot be had: \(error)")
            }
        }
    }

    /// The point that was committed last. Where the peer is needed it may have committed one more than this site has heard of; of
    /// that the intermediates have the same as of the one before, but in what is elsewhere.
    private func pointOf(_ group: GroupState) async throws -> UInt64 {
        let own = try lastPoint(group)
        guard await !lacking(home.members(group)).isEmpty else { return own }
        let points: [StatusReport.PointReport]
        do {
            // A commit that is on its way has ended then.
            _ = try await peers.openPeersSession(group)
            points = try await peers.callPeer(group, Endpoints.points, seconds: 10)
        } catch {
            throw Refusal(
                "group '\(group.entry.name)': the change volumes have a part of a newer point already, and '\(group.entry.peer)', which has "
                    + "all of point \(own), says: \(error)", .passing)
        }
        guard let newest = points.map(\.id).max(), newest >= own else {
            throw Refusal(
                "group '\(group.entry.name)': '\(group.entry.peer)' has no point \(own) any more; its newest is "
                    + (points.map(\.id).max().map(String.init) ?? "none"))
        }
        return newest
    }

    private func keep(_ members: [VolumeState]) async throws -> String {
        let name = flashCopies.unusedName("before-restore-", members)
        try home.descriptors.require(2 * members.count)
        try await flashCopies.take(FlashCopyRequest(name: name, volumes: members.map(\.name)), members)
        return name
    }

    // MARK: After a restart

    /// A restore had begun, in this process or the last one: it goes on until it is done, or an operator does not wait for it any more.
    func resume(_ group: GroupState) async {
        let name = group.entry.name
        while !home.isStopping, home.isBeingRestored(group) {
            do {
                try await operations.operate(group, .restore) { await goOn(group) }
            } catch {
                home.note(name, "the restore waits: \(error)")  // for another command, which is refused
                await home.wait(seconds: 1) { false }
            }
        }
    }

    private func goOn(_ group: GroupState) async {
        guard let operation = group.operation,
            let point = home.members(group).compactMap(\.record.localRestore?.point).max()
        else { return }
        let name = group.entry.name
        home.note(name, "the restore to point \(point) goes on; hosts are shut out until it is done")
        while !home.isStopping {
            do {
                try await giveUpPoint(group)
                _ = try await carryOut(group)
                return home.note(name, "restored to point \(point)")
            } catch {
                guard !operation.isAborted else {
                    _ = await givenUp(group, point)
                    return
                }
                home.note(name, "the restore to point \(point) is tried again: \(error)")
            }
            await home.wait(seconds: 5) { operation.isAborted }
        }
    }

    /// An operator has hosts let in although the volumes are of two moments. What was written is recorded, so the peer gets the same.
    private func givenUp(_ group: GroupState, _ point: UInt64) async -> Refusal {
        await withdraw(group)
        let words =
            "the restore to point \(point) was given up by the operator; its volumes are in part of that point, and in part as they were"
        home.note(group.entry.name, words)
        return Refusal("group '\(group.entry.name)': \(words)")
    }

    /// No restore is under way any more. Hosts are let in once no record's file says otherwise: a start would go on with it over what they write.
    private func withdraw(_ group: GroupState) async {
        let members = home.members(group)
        for volume in members where volume.record.localRestore != nil || volume.isUnsaved {
            volume.acknowledge { $0.localRestore = nil }
        }
        guard await areSettled(members) else {
            home.note(group.entry.name, "hosts are shut out until it can be written down that no restore is under way")
            Task {
                while !home.isStopping {
                    await home.wait(seconds: 1) { false }
                    if await areSettled(members) { return await letIn(group) }
                }
            }
            return
        }
        await letIn(group)
    }

    private func areSettled(_ members: [VolumeState]) async -> Bool {
        var areSettled = true
        for volume in members { do { try await volume.settle() } catch { areSettled = false } }
        return areSettled
    }

    private func letIn(_ group: GroupState) async {
        for volume in home.members(group) { await restores.letHostsIn(volume) }
        do { try await replication.startMirroring(group) } catch {
            home.note(group.entry.name, "mirroring does not begin after a restore: \(error); restart the site")
        }
    }

    /// At a start: what is under way can be gone on with.
    ///
    /// - Throws: when the configuration is another than it began with.
    func checkUnderWay() throws {
        for volume in home.volumes.values {
            guard let begun = volume.record.localRestore else { continue }
            let group = home.group(ofVolume: volume.name)
            guard let group, group.entry.mode.hold == .intermediate,
                home.members(group).map(\.name).sorted() == begun.members
            else {
                throw Refusal(
                    "volume '\(volume.name)' is being restored to point \(begun.point) from its change volume, together with "
                        + "\(begun.members.joined(separator: ", ")): have these in one group in mode \"change-volume\" until that is done, or was "
                        + "ended with `farcopy abort restore:GROUP`")
            }
        }
    }

    // MARK: Carrying it out

    private func carryOut(_ group: GroupState) async throws -> (bytes: UInt64, fetched: UInt64) {
        // The peer may have dropped the point that this began with, for one that it has committed since; what it must give is fetched anew.
        let point = try await pointOf(group)
        group.operation?.step = "brings back point \(point); hosts are shut out"
        var total: (bytes: UInt64, fetched: UInt64) = (0, 0)
        for volume in home.members(group) {
            let done = try await restore(volume, group, point)
            total.bytes += done.bytes
            total.fetched += done.fetched
        }
        try await VolumeState.flushSources(home.members(group))
        // Most of what is marked is alike again: it is compared, not sent.
        try await group.handle.change(.seeded)
        for volume in home.members(group) { try await volume.amend { $0.localRestore = nil } }
        await letIn(group)
        return total
    }

    private func restore(
        _ volume: VolumeState, _ group: GroupState, _ point: UInt64
    ) async throws -> (bytes: UInt64, fetched: UInt64) {
        guard let hold = volume.pointHold, hold.isIntermediate else {
            throw Refusal("volume '\(volume.name)' has no change volume")
        }
        let (operation, runs) = (group.operation, try await RestoreRuns(volume))
        let peer = try remoteExport(volume, group, point)
        return try await withThrowingTaskGroup(of: (UInt64, UInt64).self) { tasks in
            for _ in 0..<Self.workers { tasks.addTask { try await self.copy(runs, operation, hold.target, peer) } }
            var total: (bytes: UInt64, fetched: UInt64) = (0, 0)
            for try await (bytes, fetched) in tasks { total = (total.bytes + bytes, total.fetched + fetched) }
            return total
        }
    }

    /// Connects to what the peer has of the point.
    private func remoteExport(
        _ volume: VolumeState, _ group: GroupState, _ point: UInt64
    ) throws -> @Sendable () throws -> RemoteExport {
        guard let peer = home.configuration.peers[group.entry.peer] else {
            throw Refusal("there is no [peers.\(group.entry.peer)]")
        }
        let tls = LinkTLS(policy: peer.tls, files: home.configuration.nbd.files, user: peer.tlsUser)
        let (address, export, size) = (peer.nbd, "\(volume.name)@\(point)", volume.geometry.size)
        return {
            let remote = try RemoteExport(address: address, tls: tls, export: export)
            guard remote.size >= Int64(size) else {
                throw Refusal("export '\(export)' at \(address) has \(remote.size) bytes and the volume \(size)")
            }
            return remote
        }
    }

    /// Copies runs until none is left, or some other has failed.
    private func copy(
        _ runs: RestoreRuns, _ operation: Operation?, _ file: OpenFile,
        _ connect: @escaping @Sendable () throws -> RemoteExport
    ) async throws -> (UInt64, UInt64) {
        let buffer = try PoolMemory(byteCount: RestoreRuns.bytes)
        let disks = home.disks
        var remote: RemoteExport?
        var total: (UInt64, UInt64) = (0, 0)
        while !home.isStopping, !Task.isCancelled, operation?.isAborted != true, let run = runs.take() {
            let range = runs.geometry.byteRange(run.grains)
            let (offset, length) = (range.lowerBound, Int(range.upperBound - range.lowerBound))
            if run.isPeers {
                let known = remote
                remote = try await disks.run {
                    let remote = try known ?? connect()
                    try remote.read(buffer.memory, length, at: offset)
                    return remote
                }
                total.1 += UInt64(length)
            } else {
                try await disks.run { try file.readAll(buffer.memory, length, at: offset) }
            }
            let errno = await runs.reactor.write(runs.number, offset: offset, length: length, from: buffer)
            guard errno == 0 else { throw SystemError("write \(runs.path)", errno: errno) }
            total.0 += UInt64(length)
        }
        guard operation?.isAborted != true else { throw Refusal("it was given up by the operator") }
        guard !home.isStopping else { throw Refusal("site '\(home.configuration.site)' stops", .passing) }
        return total
    }
}

/// What is to be written to one volume, in runs that lie in one place.
@SiteThread
private final class RestoreRuns {
    nonisolated static let bytes = max(1 << 20, Limits.maximumGrain)
    let reactor: ReactorHandle
    let number: VolumeNumber
    let geometry: Geometry
    let path: String
    private let memory: PoolMemory
    /// Grains in which the volume may differ from the point; and those of them of which the peer alone has the point's content.
    private let grains: Bitmap
    private let peers: Bitmap
    private var next = 0

    init(_ volume: VolumeState) async throws {
        (reactor, number, geometry, path) = (volume.reactor, volume.number, volume.geometry, volume.source.path)
        let (count, bytes) = (geometry.grainCount, Bitmap.byteCount(bits: geometry.grainCount))
        let memory = try PoolMemory(byteCount: 2 * bytes)
        let number = number
        await reactor.run { reactor in
            let engine = reactor.hosted(number).volume
            let all = Bitmap(memory: memory.memory, count: count)
            let peers = Bitmap(memory: memory.memory + bytes, count: count)
            engine.intermediate?.addElsewhere(into: peers)
            all.formUnion(engine.changeRecording)
            all.formUnion(peers)
        }
        self.memory = memory
        grains = Bitmap(memory: memory.memory, count: count)
        peers = Bitmap(memory: memory.memory + bytes, count: count)
    }

    func take() -> (grains: Range<Int>, isPeers: Bool)? {
        guard let first = grains.firstSet(in: min(next, grains.count)..<grains.count) else { return nil }
        let bound = first..<min(grains.count, first + Self.bytes / geometry.grain)
        var end = grains.firstClear(in: bound) ?? bound.upperBound
        let isPeers = peers.contains(first)
        end = (isPeers ? peers.firstClear(in: first..<end) : peers.firstSet(in: first..<end)) ?? end
        next = end
        return (first..<end, isPeers)
    }
}
