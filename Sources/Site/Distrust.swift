// Distrust.swift: what the next start must not rely on is written down, although the state directory takes nothing any more.
//
// A disk that fails may come back after power loss as it was before, and with it an activity log and marks of copies that know nothing of
// what hosts wrote since. So the note goes where it outlives that: to the volume's own file as an attribute, which leaves the data as it
// is; for a block device to the peer, which asks for all of the volume from then on, and tells the next start (`Standing.untracked`).
//
// Must be prevented:
//   hosts go on before the note is on stable storage (the engine waits for it: `distrustActivityLog`, `failureIsWritten`), or wait for the
//     disk that fails while another would take it
//   a note is removed before the record says the same (`VolumeState.confirm`, `GroupChange.sentAnew`)
//   one note counts for another: the peer knows nothing of FlashCopies
//   hosts wait without bound: what nobody takes in time is told to the operator, and tried again

import API
import Base
import Glibc
import Groups
import Ring
import Volumes

/// What the next start must not rely on is written down.
@SiteThread
package final class Distrust {
    private let home: Holdings
    private let peers: Peers
    private let executor: CopyExecutor

    init(_ home: Holdings, _ peers: Peers, _ executor: CopyExecutor) {
        (self.home, self.peers, self.executor) = (home, peers, executor)
    }

    func activityLogFailed(_ volume: VolumeState, _ errno: Int32) async {
        home.note(
            home.group(ofVolume: volume.name)?.entry.name,
            "volume \(volume.name): its activity log cannot be written (\(String(cString: strerror(errno)))); after power loss "
                + "everything will be compared")
        volume.debt.log = true
        await pay(volume) {
            volume.acknowledge { $0.logIsBroken = true }
            try? await volume.settle()
        } then: {
            $0.distrustActivityLog()
        }
    }

    func failureUnwritten(_ volume: VolumeState, _ id: CopyID, _ errno: Int32) async {
        volume.debt.failed.insert(id)
        await pay(volume) {
            await executor.markFailed(volume, id, errno)
        } then: {
            $0.failureIsWritten()
        }
    }

    /// Elsewhere first, since the disk with the record may take long to fail; hosts go on as soon as somebody has it.
    private func pay(
        _ volume: VolumeState, save: () async -> Void, then goOn: @escaping @Sendable (Volume) -> Void
    ) async {
        let number = volume.number
        var problem: (any Error)?
        do { try await noteElsewhere(volume) } catch { problem = error }
        if problem == nil { volume.reactor.perform { goOn($0.hosted(number).volume) } }
        await save()
        guard let problem else { return }
        volume.reactor.perform { goOn($0.hosted(number).volume) }
        review(volume, problem)
    }

    private func isSaved(_ volume: VolumeState) -> Bool {
        !volume.isUnsaved && home.group(ofVolume: volume.name)?.isUnsaved != true
    }

    /// The records are the last who could have taken it.
    private func review(_ volume: VolumeState, _ problem: any Error) {
        let group = home.group(ofVolume: volume.name)
        guard !isSaved(volume) else { return settle(volume, group) }
        volume.debt.dueAt = monotonicNanoseconds() + UInt64(Limits.distrustSeconds) * 1_000_000_000
        let words =
            "volume \(volume.name): nobody takes the note that its metadata is out of date (\(problem)); should the machine lose "
            + "power before that is mended, run `farcopy adopt \(volume.name)` before the next start"
        guard let group else { return home.note(nil, words) }
        home.alert(group, .distrust, words)
    }

    private func settle(_ volume: VolumeState, _ group: GroupState?) {
        volume.debt.dueAt = nil
        if let group, !home.members(group).contains(where: { $0.debt.dueAt != nil }) { home.endAlert(group, .distrust) }
    }

    /// What nobody has taken yet is tried again.
    func retryDistrust() {
        let now = monotonicNanoseconds()
        for volume in home.volumes.values {
            guard let due = volume.debt.dueAt, now >= due else { continue }
            volume.debt.dueAt = .max
            Task {
                do {
                    if !isSaved(volume) { try await noteElsewhere(volume) }
                    settle(volume, home.group(ofVolume: volume.name))
                } catch {
                    review(volume, error)
                }
            }
        }
    }

    /// - Throws: when something of what is to be noted has found nobody.
    private func noteElsewhere(_ volume: VolumeState) async throws {
        let marking: Result<Void, any Error>
        do { return try await volume.markSource() } catch { marking = .failure(error) }
        let debt = volume.debt
        let group = home.group(ofVolume: volume.name)
        var isOwed = !debt.failed.isEmpty
        if debt.log {
            if let group, group.record.role == .primary, group.record.lineage != nil {
                if !debt.peerKnows { try await tellPeer(group, volume) }
                volume.debt.peerKnows = true
            } else if volume.record.copies.contains(where: { $0.isFilled && $0.state != .lost }) {
                isOwed = true  // what changed since they were taken is in the log as well
            }
        }
        if isOwed { try marking.get() }
    }

    private func tellPeer(_ group: GroupState, _ volume: VolumeState) async throws {
        _ = try await peers.callPeer(
            group, Endpoints.untracked, body: UntrackedRequest(siteID: home.siteRecord.id, volume: volume.name),
            seconds: Int64(Limits.distrustSeconds))
    }

    // MARK: At the peer, and at the next start

    /// The primary cannot write down any more what its hosts change of a volume: all of it may differ once it starts again.
    package func noteUntracked(_ name: String, _ request: UntrackedRequest) async throws {
        let group = try home.group(name, askedBy: request.siteID)
        guard group.entry.volumes.contains(request.volume) else {
            throw Refusal("group '\(name)' has no volume '\(request.volume)'", .unknown)
        }
        try await group.handle.change(
            .untracked(volume: request.volume, lineage: randomIdentity(), session: group.session ?? 0))
        home.note(
            name,
            "'\(group.entry.peer)' cannot write down any more what its hosts change of volume \(request.volume); all of it will be "
                + "compared")
    }

    /// While a primary starts: the last process could not write down any more what hosts changed, nor that the peer was out of reach.
    ///
    /// - Parameter untracked: volumes of which the peer has noted that.
    func distrust(_ group: GroupState, untracked: [String] = []) async throws {
        guard group.record.role == .primary else { return }
        for volume in home.members(group) where untracked.contains(volume.name) { await volume.distrust() }
        if !untracked.isEmpty { try await giveUpUncertainPoint(group) }
        guard home.members(group).contains(where: \.wasAlone), !group.record.isAlone else { return }
        try await group.handle.change(.alone)
    }

    /// A point that was held is given up when one volume does not say any more what of it is still to be sent.
    func giveUpUncertainPoint(_ group: GroupState) async throws {
        // A host of several does not know whether its remote has prepared the point, which then lets it send nothing more of it.
        let isOfSeveral = group.entry.several != nil && group.record.held != nil
        guard
            isOfSeveral
                || group.record.mustGiveUpPoint(heldBy: home.members(group).map(\.heldPoint), group.entry.mode)
        else { return }
        try await group.handle.change(.pointGivenUp)
    }
}
