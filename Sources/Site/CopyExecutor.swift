// CopyExecutor.swift: the actions of `CopySteps`, as a site carries them out.
//
// Must be prevented:
//   what cannot be done at once is forgotten: `onceSaved` waits as long as the site goes on

import API
import Base
import FlashCopies
import Glibc
import Groups
import Link
import NBDServer
import Ring
import Volumes

/// Carries out operations on FlashCopies, and what copies do by themselves.
@SiteThread
final class CopyExecutor {
    let home: Holdings
    let chains: Chains
    private let storage: CopyStorage
    let restores: Restores
    private let starts: VolumeStarts
    let kept: KeptPoints

    init(
        _ home: Holdings, _ chains: Chains, _ storage: CopyStorage, _ restores: Restores, _ starts: VolumeStarts,
        _ kept: KeptPoints
    ) {
        (self.home, self.chains, self.storage, self.restores, self.starts, self.kept) = (
            home, chains, storage, restores, starts, kept
        )
    }

    func host(_ volume: VolumeState) async throws {
        let setup = volume.setup
        let group = home.group(ofVolume: volume.name)
        volume.number = await volume.reactor.run { reactor in
            let number = reactor.host(setup)
            reactor.hosted(number).volume.beginResuming()
            return number
        }
        var start = VolumeStart(isTrusted: volume.isTrusted)
        if let group {
            start = try VolumeStart(isTrusted: volume.isTrusted, group.record, volume.name) { point in
                try exists(volume.bitmapPath(CopyID(point)))
            }
        }
        start.knowsNothing =
            volume.record.servedAs != group?.servedAs || !volume.recordingIsWhole
            || (!volume.isTrusted && volume.record.logIsBroken)
        try await run(StartVolume(start), on: [volume])
        home.publish(volume, group)
    }

    /// Carries an operation out.
    @discardableResult
    func run<Operation: CopySteps>(_ operation: Operation, on work: CopyWork) async throws -> Operation.Outcome {
        var operation = operation
        var answer = CopyAnswer.begin
        while true {
            switch operation.next(after: answer, work.volumes.map(\.record.table)) {
            case .perform(let action): answer = await perform(action, work)
            case .done(let outcome): return outcome
            case .failed(let error): throw error
            }
        }
    }

    @discardableResult
    func run<Operation: CopySteps>(_ operation: Operation, on volumes: [VolumeState]) async throws -> Operation.Outcome
    {
        try await run(operation, on: CopyWork(volumes))
    }

    private func perform(_ action: CopyAction, _ work: CopyWork) async -> CopyAnswer {
        do { return try await tryToPerform(action, work) } catch { return .failed(error) }
    }

    private func tryToPerform(_ action: CopyAction, _ work: CopyWork) async throws -> CopyAnswer {
        func volume(_ index: Int) -> VolumeState { work.volumes[index] }
        switch action {
        case .look(let index, let id): return .chain(await chains.look(volume(index), id))
        case .change(let index, let change): try await note(change, volume(index), work, index)
        case .acknowledge(let index, let change): await chains.acknowledge(change, volume(index))
        case .save(let index): try await volume(index).settle()
        case .onceSaved(let aftermath): await onceSaved(aftermath, work)
        case .makeFiles(let index, let copy, let owner): return try await storage.makeFiles(copy, owner, work, index)
        case .discardFiles(let index, let id, let target):
            work.made[index] = nil
            await volume(index).removeCopyFiles(id, targetOwner: target)
        case .removeFiles(let index, let id, let target):
            work.made[index] = nil
            await storage.removeFiles(volume(index), id, target)
        case .flush(let index):
            try await volume(index).flushSource()
            try await volume(index).flushTargets()
            try await storage.flushChanges(volume(index))
        case .flushChanges(let index): try await storage.flushChanges(volume(index))
        case .flushTarget(let index, let id): try await storage.flushTarget(volume(index), id)
        case .flushBitmap(let index, let id): try await storage.flushBitmap(volume(index), id)
        case .enter(let entries): return await chains.enter(entries, work)
        case .enterWithPoint(let entries): return await chains.enterWithPoint(entries, work)
        case .leave(let index, let id): await chains.leave(volume(index), id)
        case .awaitGone(let places):
            // Five seconds are enough unless older copies need a lot.
            await home.wait(seconds: 5) { !places.contains { work.volumes[$0.volume].copies[$0.id] != nil } }
        case .takeOutOfUse(let index, let id): await chains.takeOutOfUse(volume(index), id)
        case .endReaders(let index, let id):
            let number = volume(index).number
            await volume(index).reactor.run { $0.disconnectReaders(number, of: id) }
        case .findTaken(let ids): return .taken(try storage.findTaken(volume(0), ids))
        case .openFiles(let links): return .opened(try storage.openFiles(links, work))
        case .failPoint(let id): return .pointFailed(isKept: try await starts.failPoint(volume(0), id))
        case .loseFiles(let ids): try await starts.loseFiles(volume(0), ids)
        case .resume(let link): try await starts.resumeLink(volume(0), link, work.opened[link.id]!)
        case .takeRole(let role): try await starts.takeRole(volume(0), role)
        case .resumeRestore(let id): try await starts.resumeRestore(volume(0), from: id)
        case .loseFailover: try await starts.loseFailover(volume(0))
        case .forgetRestore: try await starts.forgetRestore(volume(0))
        case .confirm:
            try await volume(0).confirm(bootID: home.bootID, servedAs: home.group(ofVolume: volume(0).name)?.servedAs)
        case .finishResuming: await starts.letGo(volume(0))
        case .shutHostsOut(let index): await restores.shutOut(volume(index))
        case .admitHosts(let index): await restores.letHostsIn(volume(index))
        case .makeRestoreBitmap(let index): _ = try await restores.makeRestoreBitmap(volume(index))
        case .beginRestore(let index, let id):
            guard await restores.beginRestore(volume(index), from: id, fresh: true) else {
                throw Refusal(
                    "volume '\(volume(index).name)': the FlashCopy has failed meanwhile; nothing was restored")
            }
        case .flushRestoreBitmap(let index): if let file = volume(index).restoreBitmap { try await home.flush([file]) }
        case .goOnRestoring(let index): await home.onEngine(volume(index)) { $0.continueRestore() }
        case .dropRestore(let index): await restores.dropRestore(volume(index))
        }
        return .done
    }

    // MARK: The record

    private func note(_ change: CopyChange, _ volume: VolumeState, _ work: CopyWork, _ index: Int) async throws {
        let target: (path: String, storage: String)? =
            if case .added(let copy) = change, let path = copy.target,
                let file = try work.made[index]?.target.open()
            {
                (path, StorageInstance.text(of: file))
            } else {
                nil
            }
        defer { chains.show(volume) }
        try await volume.amend { record in
            record.table.apply(change)
            if let target { record.storage?[target.path] = target.storage }
        }
    }

    private func onceSaved(_ aftermath: Aftermath, _ work: CopyWork) async {
        for volume in work.volumes { try? await volume.settle() }
        guard work.isUnsaved else { return await carryOut(aftermath, work) }
        let names = work.volumes.map(\.name).joined(separator: ", ")
        home.note(nil, "an operation on FlashCopies of \(names) waits until their records can be written")
        Task {
            await home.wait(seconds: nil) { !work.isUnsaved }
            if !home.isStopping { await carryOut(aftermath, work) }
        }
    }

    private func carryOut(_ aftermath: Aftermath, _ work: CopyWork) async {
        try? await run(aftermath, on: work)  // it ends, whatever fails
    }
}
