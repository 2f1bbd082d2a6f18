// StepExecutor.swift: the actions of `Steps`, as a site carries them out.

import API
import Base
import FlashCopies
import Glibc
import Groups
import NBDServer
import Ring
import Volumes

/// Carries out operations on groups.
@SiteThread
final class StepExecutor {
    let home: Holdings
    private let peers: Peers
    private let operations: Operations
    private let chains: Chains
    private let restores: Restores
    private let kept: KeptPoints
    private let executor: CopyExecutor
    private let flashCopies: FlashCopies
    private let comparisons: Comparisons
    private let replication: Replication

    init(
        _ home: Holdings, _ peers: Peers, _ operations: Operations, _ chains: Chains, _ restores: Restores,
        _ kept: KeptPoints, _ executor: CopyExecutor, _ flashCopies: FlashCopies, _ comparisons: Comparisons,
        _ replication: Replication
    ) {
        (
            self.home, self.peers, self.operations, self.chains, self.restores, self.kept, self.executor,
            self.flashCopies, self.comparisons, self.replication
        ) = (home, peers, operations, chains, restores, kept, executor, flashCopies, comparisons, replication)
    }

    /// Carries an operation out.
    func run<Operation: Steps>(_ steps: Operation, _ group: GroupState) async throws -> Operation.Outcome {
        var (steps, answer) = (steps, Answer.begin)
        defer { releaseCopies(group) }
        while true {
            switch steps.next(after: answer, group.record) {
            case .perform(let action):
                do { answer = try await perform(action, group) } catch { answer = .failed(error) }
            case .done(let outcome): return outcome
            case .failed(let error): throw error
            }
        }
    }

    @discardableResult
    func perform(_ action: SiteAction, _ group: GroupState) async throws -> Answer {
        switch action {
        case .settle: try await group.handle.settle()
        case .change(let change):
            try await group.handle.change(change)
            home.happened()
        case .fence(let session): await fence(group, next: session)
        case .survey: return .survey(await survey(group))
        case .flushVolumes(let names): try await VolumeState.flushSources(names.compactMap { home.volumes[$0] })
        case .makePointFiles(let plan): try await makePointFiles(group, plan)
        case .dropPointFiles(let number): await dropPointFiles(group, number)
        case .takePoint(let plan): await takePoint(group, plan)
        case .forgetChanges: await home.onEngines(group) { $0.forgetChanges() }
        case .markDifferences(let point, let names): return .bytes(try await markDifferences(group, names, point))
        case .dropDifferences(let names): for name in names { home.volumes[name]?.restoreBitmap = nil }
        case .open(let point, let names): try await open(group, names, point)
        case .stopMirroring: await replication.stopReplication(group)
        case .startMirroring: try await replication.startMirroring(group)
        case .formPoint(let seconds): return .point(try await operations.pointOf(group, seconds: seconds))
        case .meet(let place): try await meet(group, place)
        case .quiet:
            guard await group.handle.setQuiet(true, seconds: Meetings.laterWait) else {
                throw Refusal("group '\(group.entry.name)': a point is still under way; nothing has changed", .passing)
            }
        case .holdCopies: try await holdCopies(group)
        case .countChanges: return .bytes(await peers.standing(group).changedBytes)
        case .askToPromote(let point): try await peers.promotePeer(group, point)
        case .endPeersSessions: _ = try await peers.openPeersSession(group)
        case .shutHostsOut: await home.shutOutHosts(group)
        case .admitHosts: await admitWhenSettled(group)
        case .settleChanges: try await settleChanges(group)
        case .keepUnsent: try await keepUnsent(group)
        case .dropUnsent: await dropUnsent(group)
        case .serveAsSecondary: await serveAsSecondary(group)
        case .askToYield: return .yielded(try await askToYield(group))
        case .takeChanges: try await takeChanges(group)
        case .copyAtPoint: return .point(try await comparisons.copyAtPoint(group))
        case .pinPoint(let point): try await comparisons.pinPoint(group, point)
        case .comparePoint(let point): try await comparisons.comparePoint(group, point)
        case .dropCopies: await comparisons.dropCopies(group)
        case .unpinPoint(let point): try await comparisons.unpinPoint(group, point)
        }
        return .done
    }

    // MARK: The intake

    private func fence(_ group: GroupState, next session: UInt64) async {
        group.session = session == 0 ? nil : session
        group.madeFiles = nil
        for volume in home.members(group) {
            await endIntake(volume, next: session)
            if session != 0 { home.publish(volume, group) }
        }
    }

    /// Ends the intake's connections, waits until nothing of them is under way, and lets only `next` in.
    private func endIntake(_ volume: VolumeState, next: UInt64) async {
        let number = volume.number
        let reactor = volume.reactor
        await withCheckedContinuation { (continuation: CheckedContinuation<Void, Never>) in
            reactor.perform { reactor in
                reactor.hosted(number).intakeSession = next
                reactor.hosted(number).intakeIsClosed = false
                reactor.disconnect(number, .intake) { continuation.resume() }
            }
        }
    }

    private func survey(_ group: GroupState) async -> IntakeSurvey {
        let (members, record) = (home.members(group), group.record)
        let carriers = members.map { volume in
            record.points.last.flatMap { record.carrier(of: $0.number, volume.name) }.map { CopyID($0) }
        }
        let found = await home.ask(members) { hosted, index in
            (
                writes: hosted.volume.modifyingInFlight,
                isUnchanged: carriers[index].map { hosted.volume.isUnchanged(since: $0) } ?? false
            )
        }
        let retired = (record.retired ?? []).map { point in
            (point.number, members.filter { $0.copies[CopyID(point.number)] != nil }.map(\.name))
        }
        return IntakeSurvey(
            writesUnderWay: found.reduce(0) { $0 + $1.writes },
            order: members.map(\.nextOrder).max() ?? CopyRecord.orderStep,
            changed: zip(members, found).filter { !$1.isUnchanged }.map(\.0.name),
            retired: Dictionary(uniqueKeysWithValues: retired), at: realSeconds())
    }

    // MARK: Points

    private func makePointFiles(_ group: GroupState, _ plan: CommitPlan) async throws {
        let id = CopyID(plan.point.number)
        let members = home.members(group).filter { plan.point.hasFiles(of: $0.name) }
        for volume in home.members(group) { volume.nextOrder = (plan.point.order ?? 0) + CopyRecord.orderStep }
        if let made = group.madeFiles, made.id == id, made.files.map(\.0.name) == members.map(\.name) { return }
        try home.descriptors.require(2 * members.count)
        for volume in members { try await makeRoom(volume) }
        do {
            let made = try await home.disks.each(members.map { $0.newPoint(id) }) { try $0.make() }
            group.madeFiles = (id, Array(zip(members, made)))
        } catch {
            for volume in members where volume.copies[id] == nil { await volume.removeCopyFiles(id, targetOwner: id) }
            throw error
        }
    }

    private func dropPointFiles(_ group: GroupState, _ number: UInt64) async {
        guard let made = group.madeFiles, made.id == CopyID(number) else { return }
        group.madeFiles = nil
        for (volume, _) in made.files where volume.copies[made.id] == nil {
            await volume.removeCopyFiles(made.id, targetOwner: made.id)
        }
    }

    private func takePoint(_ group: GroupState, _ plan: CommitPlan) async {
        let made = group.madeFiles
        group.madeFiles = nil
        invariant(made?.id == CopyID(plan.point.number), "the files of a point are made before it is taken")
        for (volume, files) in made!.files {
            await chains.enterChain(volume, CopyRecord(plan.point), files) { $0.addCopy($1) }
            let number = volume.number
            volume.reactor.perform { $0.hosted(number).restFiles() }
        }
        await kept.settlePoints(group)
    }

    /// Points that readers keep open past their retention must not fill the chain.
    private func makeRoom(_ volume: VolumeState) async throws {
        let number = volume.number
        await volume.reactor.run { reactor in
            let engine = reactor.hosted(number).volume
            if engine.chainCount >= Limits.copiesPerVolume - 4, let oldest = engine.oldestCopy {
                reactor.disconnectReaders(number, of: oldest.id)
            }
        }
        guard volume.copies.count < Limits.copiesPerVolume - 2 else {
            throw Refusal("volume '\(volume.name)' has \(volume.copies.count) copies; withdraw some", .passing)
        }
    }

    // MARK: A takeover

    private func markDifferences(_ group: GroupState, _ names: [String], _ point: UInt64) async throws -> UInt64 {
        home.reserve.release()  // whatever is full
        var bytes: UInt64 = 0
        for volume in names.compactMap({ home.volumes[$0] }) {
            bytes += try await prepareRestore(volume, from: carrier(of: point, volume, group))
        }
        return bytes
    }

    /// The copy in the volume's chain that holds a recovery point.
    func carrier(of point: UInt64, _ volume: VolumeState, _ group: GroupState) throws -> CopyID {
        guard let carrier = group.record.carrier(of: point, volume.name) else {
            throw Refusal("point \(point) has no part of volume '\(volume.name)'")
        }
        return CopyID(carrier)
    }

    private func open(_ group: GroupState, _ names: [String], _ point: UInt64) async throws {
        group.servesHosts = true
        var written: UInt64 = 0
        for volume in names.compactMap({ home.volumes[$0] }) {
            written += try await open(volume, carrier(of: point, volume, group), group)
        }
        group.writtenAtFailover = written
    }

    private func open(_ volume: VolumeState, _ id: CopyID, _ group: GroupState) async throws -> UInt64 {
        let number = volume.number
        await restores.beginRestore(volume, from: id, fresh: false)
        try await chains.startActivityLog(volume)
        let written = await volume.reactor.run { reactor in
            let hosted = reactor.hosted(number)
            hosted.volume.policy = .hostFirst
            hosted.volume.recording = true
            hosted.writable = true
            return hosted.bytesWritten
        }
        home.publish(volume, group)
        return written
    }

    /// Writes down, durably, which grains must come back from the point: to restore them, and because the old primary's
    /// bitmaps take them for sent.
    ///
    /// - Returns: their bytes.
    private func prepareRestore(_ volume: VolumeState, from id: CopyID) async throws -> UInt64 {
        _ = try volume.openActivityLog()  // a start finds it, should this be decided
        let file = try await restores.makeRestoreBitmap(volume)
        let number = volume.number
        let grains = await volume.reactor.run { reactor in
            let engine = reactor.hosted(number).volume
            engine.markDifferences(from: id, in: file.bitmap())
            engine.markChanged(file.bitmap())
            return file.bitmap().population()
        }
        try await home.flush([file, volume.recording])
        return UInt64(grains) * UInt64(volume.geometry.grain)
    }

    // MARK: A primary's role

    /// Waits for the group's other pairs, wherever they are.
    private func meet(_ group: GroupState, _ place: Int) async throws {
        guard let pair = group.entry.several?.pair, let all = group.pairNames, let first = group.fellows.first else {
            return
        }
        group.operation?.step = "waits for the group's other hosts"
        if first == home.configuration.site {
            return try await home.meetings.meet(group.entry.group, pair, place: place, all: all)
        }
        guard let address = home.configuration.peers[first]?.control else {
            throw Refusal("there is no [peers.\(first)] with 'control'")
        }
        let call = MeetCall(site: home.configuration.site, pair: pair, place: place)
        do {
            _ = try await ControlClient(address: address).call(Endpoints.meet, group.entry.group, body: call) as Done
        } catch let refusal as Refusal {
            throw refusal
        } catch {
            throw Refusal(
                "'\(first)', where the group's hosts wait for each other, cannot be reached: \(error)", .passing)
        }
    }

    private func holdCopies(_ group: GroupState) async throws {
        await home.enterCopies(for: group.entry.group)
        group.holdsCopies = true
        try home.refuseWhileRestoring(group)
    }

    private func releaseCopies(_ group: GroupState) {
        if group.holdsCopies { home.leaveCopies(of: group.entry.group) }
        group.holdsCopies = false
    }

    private func admitWhenSettled(_ group: GroupState) async {
        if (try? await group.handle.settle()) != nil { return await home.admitHosts(group) }
        home.note(group.entry.name, "hosts stay shut out until the group's record can be written")
        group.isAdmitting = true
        Task {
            await home.wait(seconds: nil) { !group.isUnsaved || !group.isAdmitting }
            // An operation that has shut hosts out since then says itself what becomes of them.
            if !home.isStopping, group.isAdmitting { await home.admitHosts(group) }
        }
    }

    /// Ends the point that is held, so that CR alone says what the peer lacks, on stable storage.
    private func settleChanges(_ group: GroupState) async throws {
        let deadline = monotonicNanoseconds() + UInt64(Limits.handOverSeconds) * 1_000_000_000
        for volume in home.members(group) {
            let number = volume.number
            await volume.reactor.run { $0.hosted(number).volume.giveUpPoint() }
            while await !volume.reactor.run({ $0.hosted(number).volume.mayFormPoint }) {
                guard monotonicNanoseconds() < deadline else {
                    throw Refusal("volume '\(volume.name)' is busy with a restore or a flush; try again", .passing)
                }
                try await Task.sleep(for: .milliseconds(2))
            }
            try await home.flush([volume.recording])
            try await volume.flushSource()
        }
    }

    /// What an earlier try has kept, whose record may say that the role was given up, goes once the same is kept anew.
    private func keepUnsent(_ group: GroupState) async throws {
        let earlier = group.unsent
        group.unsent = nil
        guard await peers.standing(group).changedBytes > 0 else { return }
        let members = home.members(group)
        // The point of the new direction needs its files as well.
        try home.descriptors.require(4 * members.count)
        let base = "unsent-after-\(group.record.divergedFrom?.number ?? 0)"
        var (name, attempt) = (base, 1)
        while members.contains(where: { volume in volume.record.copies.contains { $0.name == name } }) {
            attempt += 1
            name = "\(base)-\(attempt)"
        }
        var request = FlashCopyRequest(name: name, volumes: members.map(\.name))
        request.durable = true
        try await flashCopies.take(request, members)
        await drop(unsent: earlier, group)
        group.unsent = name
        home.note(
            group.entry.name,
            "what hosts wrote here and '\(group.entry.peer)' lacks is kept as FlashCopy '\(name)' until it is withdrawn"
        )
    }

    private func dropUnsent(_ group: GroupState) async {
        await drop(unsent: group.unsent, group)
        group.unsent = nil
    }

    private func drop(unsent name: String?, _ group: GroupState) async {
        guard let name else { return }
        let found = home.members(group).compactMap { volume in volume.copyRecord(name).map { (volume, $0) } }
        // An operator has begun to use it.
        guard !found.contains(where: { $1.isWritable }) else { return }
        do { try await executor.run(WithdrawCopies(found.map(\.1.id)), on: found.map(\.0)) } catch {
            home.note(group.entry.name, "FlashCopy '\(name)' stays, although the role was not given up: \(error)")
        }
    }

    private func serveAsSecondary(_ group: GroupState) async {
        await home.onEngines(group) { engine in
            engine.policy = .copiesFirst
            engine.recording = false
        }
        for volume in home.members(group) { home.publish(volume, group) }
    }

    private func askToYield(_ group: GroupState) async throws -> Joining {
        let answer = try await peers.callPeer(
            group, Endpoints.yield,
            body: YieldRequest(
                site: home.configuration.site, siteID: home.siteRecord.id, generations: group.record.generations,
                highestPoint: group.record.highestPoint, volumes: peers.sessionVolumes(group)))
        return Joining(
            peer: answer.siteID, lineage: answer.lineage, volumeLineages: answer.volumeLineages, point: answer.point)
    }

    private func takeChanges(_ group: GroupState) async throws {
        for volume in home.members(group) {
            let number = volume.number
            try await peers.eachPeerChange(group, volume) { words, first, geometry in
                let ranges = byteRanges(words, firstWord: first, geometry)
                await volume.reactor.run { $0.hosted(number).volume.markChanged(ranges) }
            }
            try await home.flush([volume.recording])
        }
    }

    /// The byte ranges of the set bits of a part of a bitmap.
    private func byteRanges(_ words: [UInt64], firstWord: Int, _ geometry: Geometry) -> [Range<UInt64>] {
        var words = words
        let (first, bits) = (firstWord * 64, words.count * 64)
        return words.withUnsafeMutableBytes { memory in
            let part = Bitmap(memory: memory.baseAddress!, count: min(bits, geometry.grainCount - first))
            var (ranges, at): ([Range<UInt64>], Int) = ([], 0)
            while let start = part.firstSet(in: at..<part.count) {
                at = part.firstClear(in: start..<part.count) ?? part.count
                ranges.append(geometry.byteRange(first + start..<first + at))
            }
            return ranges
        }
    }
}
