// RoleChanges.swift: `farcopy resync | switchover | failback | abort`: what an operator does about roles.
//
// Must be prevented:
//   data is discarded by a command that did not name it
//   hosts stay shut out because a step failed
//   a switchover that the peer may have carried out is taken back here

import API
import Base
import Groups
import Link
import NBDServer
import Ring
import Volumes

extension Roles {
    // MARK: Resync

    /// Takes up mirroring again after hosts wrote at both sites, or after a failover.
    ///
    /// - Parameter loser: the site whose changes are discarded there, and kept as a FlashCopy.
    package func resync(_ name: String, discard loser: String) async throws -> ResyncReport {
        let group = try pair(name, discarding: loser)
        if loser == home.configuration.site {
            _ = try await requirePrimary(group)
            return try await peers.callPeer(group, Endpoints.resync, [.discard: loser], seconds: 600)
        }
        let report = try await previewResync(name, discard: loser)
        try await operations.operate(group, .resync) {
            try await operations.persist(group.operation!) { try await self.joinAlone(group) }
        }
        return report
    }

    /// Of several pairs, the one that is meant.
    private func pair(_ name: String, discarding loser: String) throws -> GroupState {
        let pairs = try home.pairs(name)
        return try pairs.first { $0.entry.peer == loser } ?? (pairs.count == 1 ? pairs[0] : home.group(name))
    }

    /// What a resync would send and discard.
    package func previewResync(_ name: String, discard loser: String) async throws -> ResyncReport {
        let group = try pair(name, discarding: loser)
        if loser == home.configuration.site {
            return try await peers.callPeer(group, Endpoints.previewResync, [.discard: loser])
        }
        guard loser == group.entry.peer else {
            throw Refusal(
                "group '\(name)' is at '\(home.configuration.site)' and '\(group.entry.peer)'; there is no site '\(loser)'",
                .misuse)
        }
        let mine = try await requirePrimary(group)
        let theirs = try await peers.peerStanding(group)
        if group.isMirroring, group.record.conflict == nil, theirs.role == .secondary {
            throw Refusal(
                "group '\(name)': '\(loser)' is the secondary of '\(home.configuration.site)' already; there is nothing to discard"
            )
        }
        let (differing, grains) = try await differences(group)
        return ResyncReport(
            from: mine.site, to: loser, sentBytes: differing, discardedBytes: theirs.changedBytes,
            discardedGrains: grains,
            since: theirs.changedBytes == 0 ? nil : theirs.since.map(timestamp))
    }

    private func requirePrimary(_ group: GroupState) async throws -> Standing {
        let mine = await peers.standing(group)
        guard mine.role == .primary else {
            throw Refusal(
                "group '\(group.entry.name)' is secondary at '\(home.configuration.site)'; only a failover makes it primary"
            )
        }
        return mine
    }

    private func joinAlone(_ group: GroupState) async throws {
        await group.turnstile.enter()
        defer { group.turnstile.leave() }
        if group.isMirroring, group.record.conflict == nil, group.replicator != nil,
            try await peers.peerStanding(group).role == .secondary
        {
            return  // done by an earlier try, or by the peer's promotion meanwhile
        }
        try await join(group)
    }

    // MARK: Switchover

    /// Exchanges the roles without losing anything: hosts are shut out, the last point is sent, the peer takes over.
    package func switchover(_ name: String) async throws -> StatusReport.PointReport {
        let group = try home.group(name)
        var point: PointRecord?
        try await operations.operate(group, .switchover) {
            // A point that was quiet after an earlier try.
            await group.handle.setQuiet(false)
            point = try await self.exchangeRoles(group, group.operation!)
        }
        return point!.report
    }

    private func exchangeRoles(_ group: GroupState, _ operation: Operation) async throws -> PointRecord {
        let name = group.entry.name
        await group.turnstile.enter()
        let point: PointRecord
        do {
            point = try await handOver(group, operation)
        } catch {
            group.turnstile.leave()
            throw error
        }
        group.turnstile.leave()
        operation.step = "'\(group.entry.peer)' has taken over; mirroring from there begins"
        try await operations.waitUntil(operation, seconds: 60) { group.record.role == .secondary }
        home.note(name, "switched over to '\(group.entry.peer)' at point \(point.number)")
        return point
    }

    private func handOver(_ group: GroupState, _ operation: Operation) async throws -> PointRecord {
        let name = group.entry.name
        guard group.record.handingOver == nil else {
            throw Refusal("group '\(name)' is handing over already; `farcopy abort switchover:\(name)` takes it back")
        }
        guard let replicator = group.replicator, group.isMirroring else { throw Refusal(home.notMirroring(group)) }
        if let reason = replicator.status.reason { throw Refusal("group '\(name)' is suspended: \(reason)") }
        try home.refuseWhileRestoring(group)
        guard peers.peerClient(group) != nil else {
            throw Refusal("the peer '\(group.entry.peer)' is no Farcopy site and cannot take over")
        }
        do {
            return try await steps.run(
                HandOver(
                    seconds: Double(Limits.handOverSeconds),
                    isOfSeveral: !group.actsAlone && group.entry.several != nil && group.pairNames != nil),
                group)
        } catch let failure as HandOverFailure {
            throw refusal(failure, group)
        }
    }

    private func refusal(_ failure: HandOverFailure, _ group: GroupState) -> Refusal {
        let (name, peer) = (group.entry.name, group.entry.peer)
        if group.record.handingOver != nil { Task { await finishHandover(group) } }
        switch failure {
        case .refused(let refusal, nil): return Refusal("'\(peer)' does not take over: \(refusal)")
        // It may have failed over meanwhile. Hosts stay shut out until it is known who is primary.
        case .refused(let refusal, let error?):
            return Refusal("'\(peer)' does not take over: \(refusal); nor can the switchover be taken back: \(error)")
        case .unknown(let error):
            return Refusal(
                "'\(peer)' may or may not have taken over (\(error)); hosts stay shut out until it answers, or until "
                    + "`farcopy abort switchover:\(name)` takes the switchover back")
        }
    }

    /// After an interruption: asks again until the peer has taken over, or the switchover is aborted.
    func finishHandover(_ group: GroupState) async {
        while let point = group.record.handingOver, group.record.role == .primary {
            await group.turnstile.enter()
            if group.record.handingOver == point, let theirs = try? await peers.peerStanding(group),
                theirs.role == .secondary
            {
                do {
                    try await steps.run(Promotion(at: point), group)
                } catch HandOverFailure.refused(let refusal, _) {
                    home.note(group.entry.name, "'\(group.entry.peer)' does not take over: \(refusal)")
                } catch {
                    home.logger.info("group \(group.entry.name): handing over: \(error)")
                }
            }
            group.turnstile.leave()
            try? await Task.sleep(for: .seconds(1))
        }
    }

    /// The primary hands over: this site takes its place, and mirrors to it as soon as it has given up its role.
    package func promote(_ name: String, _ request: PromoteRequest) async throws {
        let group = try home.pair(name, withID: request.siteID)
        await group.turnstile.enter()
        defer { group.turnstile.leave() }
        if let done = group.record.failedOver, done.joins == true, done.point == request.point { return }
        guard group.record.peerSite == request.siteID, group.session == request.session else {
            throw Refusal("the switchover comes from a session that has ended", .refused)
        }
        guard let newest = group.record.points.last, newest.number == request.point, group.record.role == .secondary
        else {
            throw Refusal("point \(request.point) is not the newest at '\(home.configuration.site)'", .refused)
        }
        try await intake.takeOver(group, newest, joins: true)
        home.note(name, "'\(group.entry.peer)' has handed over at point \(newest.number)")
        Task { await joinAfterPromotion(group) }
    }

    /// Until mirroring in the other direction has begun.
    func joinAfterPromotion(_ group: GroupState) async {
        while group.record.failedOver?.joins == true {
            do {
                await group.turnstile.enter()
                defer { group.turnstile.leave() }
                guard group.record.failedOver?.joins == true else { return }
                try await join(group)
                return
            } catch {
                home.logger.info("group \(group.entry.name): not mirroring yet: \(error)")
            }
            try? await Task.sleep(for: .milliseconds(300))
        }
    }

    // MARK: Failback

    /// The roles as the configuration has them: the peer becomes secondary, gets what differs, and takes over.
    package func failback(_ name: String) async throws -> StatusReport.PointReport {
        let group = try home.group(name)
        try await checkFailback(group)
        var point: PointRecord?
        try await operations.operate(group, .failback) {
            try await group.handle.change(.failingBack(true))
            do {
                point = try await self.runFailback(group, group.operation!)
            } catch {
                // The next start goes on with it.
                if !home.isStopping { try await group.handle.change(.failingBack(false)) }
                throw error
            }
        }
        return point!.report
    }

    /// What a failback would do.
    package func previewFailback(_ name: String) async throws -> ResyncReport {
        let group = try home.group(name)
        try await checkFailback(group)
        if !group.isMirroring || group.record.conflict != nil {
            return try await previewResync(name, discard: group.entry.peer)
        }
        let bytes = await peers.standing(group).changedBytes
        return ResyncReport(
            from: home.configuration.site, to: group.entry.peer, sentBytes: bytes, discardedBytes: 0, discardedGrains: 0
        )
    }

    private func checkFailback(_ group: GroupState) async throws {
        let name = group.entry.name
        _ = try await requirePrimary(group)
        guard group.entry.role == .secondary else {
            throw Refusal(
                "group '\(name)' is primary at '\(home.configuration.site)', as the configuration says; there is nothing to fail back"
            )
        }
    }

    private func runFailback(_ group: GroupState, _ operation: Operation) async throws -> PointRecord {
        try await operations.persist(operation) {
            if !group.isMirroring || group.record.conflict != nil { try await self.joinAlone(group) }
        }
        while true {
            operation.step = "sends what differs"
            try await operations.waitUntil(operation, seconds: 365 * 86400) {
                // What else differs is sent by the switchover, while hosts go on.
                guard let point = group.record.lastCommitted, point.isBase != true else { return false }
                return group.replicator.map { $0.status.reason == nil } == true
            }
            do {
                return try await exchangeRoles(group, operation)
            } catch let error as Refusal {
                // A link that is lost comes back.
                guard group.isMirroring, !operation.isAborted, !home.isStopping else { throw error }
                operation.step = error.description
                try await Task.sleep(for: .seconds(1))
            }
        }
    }

    /// A failback that was under way when the process ended goes on.
    func resumeFailback(_ group: GroupState) async {
        do {
            _ = try await failback(group.entry.name)
        } catch {
            home.note(group.entry.name, "failback: \(error)")
        }
    }

    // MARK: Operations

    /// Ends an operation: `KIND:GROUP`.
    package func abort(_ text: String) async throws -> String {
        let parts = text.split(separator: ":", maxSplits: 1).map(String.init)
        guard parts.count == 2 else {
            throw Refusal(
                "'\(text)' names no operation; write KIND:GROUP, such as switchover:shop, or restore:VOLUME",
                .misuse)
        }
        let (kind, name) = (parts[0], parts[1])
        if kind == "restore", home.groups[name]?.operation?.kind != .restore { return try await abandonRestore(name) }
        let pairs = try home.pairs(name)
        guard pairs.count == 1 else { return try await abort(kind, of: pairs) }
        let group = pairs[0]
        if let operation = group.operation, operation.kind.rawValue == kind {
            operation.abort()
            home.happened()
            return "\(text) ends\(operation.kind.aftermath)"
        }
        switch kind {
        case "switchover" where group.record.handingOver != nil:
            await group.turnstile.enter()
            defer { group.turnstile.leave() }
            guard group.record.handingOver != nil else { throw Refusal("the switchover is over") }
            do {
                try await steps.run(TakeBack(), group)
            } catch {
                throw Refusal("the switchover cannot be taken back: \(error)")
            }
            return "\(text) is taken back; hosts may write again"
        case "copy" where group.replicator?.status.state == .copying,
            "resync" where group.replicator?.status.state == .resyncing:
            group.replicator?.suspend()
            return "\(text) is suspended; `farcopy resume \(name)` goes on where it was"
        case "cycle":
            guard let replicator = group.replicator else { throw Refusal(home.notMirroring(group)) }
            replicator.pointLost("the point was given up by the operator")
            return "the point is given up; its changes go with the next one"
        default: throw Refusal("there is no \(kind) of '\(name)' under way", .unknown)
        }
    }

    /// Of whichever pairs have it.
    private func abort(_ kind: String, of pairs: [GroupState]) async throws -> String {
        var done: [String] = []
        var refusal: Refusal?
        for pair in pairs {
            do { done.append(try await abort("\(kind):\(pair.entry.name)")) } catch let error as Refusal {
                refusal = error
            }
        }
        if done.isEmpty, let refusal { throw refusal }
        return done.joined(separator: "; ")
    }

    /// Gives up the rest of a restore that has stalled.
    private func abandonRestore(_ name: String) async throws -> String {
        guard let volume = home.volumes[name] else { throw Refusal("there is no volume '\(name)'", .unknown) }
        guard volume.restoreBitmap != nil else {
            throw Refusal("volume '\(name)' is not being restored", .unknown)
        }
        let (number, grain) = (volume.number, UInt64(volume.geometry.grain))
        guard let grains = await volume.reactor.run({ $0.hosted(number).volume.abandonRestore() }) else {
            throw Refusal(
                "the restore of volume '\(name)' goes on and ends by itself; only one that has stalled is given up")
        }
        let text = "\(UInt64(grains) * grain) bytes of volume '\(name)' could not be restored and stay as they were"
        home.note(home.group(ofVolume: name)?.entry.name, text)
        return text
    }

    /// Bytes in which the sites may differ, and how many grains the peer has changed.
    private func differences(_ group: GroupState) async throws -> (bytes: UInt64, grains: UInt64) {
        var (bytes, grains) = (UInt64(0), UInt64(0))
        for volume in home.members(group) {
            let (number, own) = (volume.number, UInt64(volume.geometry.grain))
            let changed = await volume.reactor.run { reactor in
                let engine = reactor.hosted(number).volume
                return UInt64(engine.changedGrains + engine.outOfSyncGrains)
            }
            try await peers.eachPeerChange(group, volume) { words, first, geometry in
                let theirs = words.reduce(0) { $0 + UInt64($1.nonzeroBitCount) }
                grains += theirs
                guard geometry == volume.geometry else {
                    // Grains of two sizes are not counted together: at most this.
                    bytes += theirs * UInt64(geometry.grain) + (first == 0 ? changed * own : 0)
                    return
                }
                let mine = await volume.reactor.run {
                    $0.hosted(number).volume.changedWords(from: first, count: words.count)
                }
                for (one, other) in zip(mine, words) { bytes += UInt64((one | other).nonzeroBitCount) * own }
            }
        }
        return (bytes, grains)
    }
}
