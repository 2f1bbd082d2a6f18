// CopyEvents.swift: what FlashCopies do by themselves: they fail, are complete, leave; and what is restored from them is done.

import FlashCopies
import Glibc
import Groups
import NBDServer
import Volumes

extension CopyExecutor {
    func copyFailed(_ volume: VolumeState, _ id: CopyID, _ errno: Int32) async {
        let name = volume.record.table[id]?.name ?? String(id)
        let isRetired = volume.copyIsRetired(id)
        let reason = await markFailed(volume, id, errno)
        // What was leaving already, and only had readers left.
        if isRetired, !kept.waitsToLeave(volume, id) { await chains.leave(volume, id) }
        home.note(nil, "volume \(volume.name): FlashCopy '\(name)' has failed: \(reason)")
        chains.copyReady(volume, id)  // a refresh that waits for it begins again
    }

    /// - Returns: why, in words.
    @discardableResult
    func markFailed(_ volume: VolumeState, _ id: CopyID, _ errno: Int32) async -> String {
        let target = volume.copies[id].map { " in \($0.target.path)" } ?? ""
        let reason = "old content could not be preserved\(target): \(String(cString: strerror(errno)))"
        await chains.acknowledge(.failed(id, reason: reason), volume)
        if let group = home.group(ofVolume: volume.name) { await failPoints(group, volume, UInt64(id)) }
        return reason
    }

    /// Recovery points that have failed are none any more (`GroupChange.pointFailed`).
    private func failPoints(_ group: GroupState, _ volume: VolumeState, _ carrier: UInt64) async {
        guard volume.carriers.contains(carrier) else { return }
        try? await group.handle.change(.pointFailed(carrier, volume: volume.name))
        await kept.settlePoints(group, endsReaders: true)
    }

    func reviewCompletion(_ volume: VolumeState, _ id: CopyID) async {
        let number = volume.number
        guard await volume.reactor.run({ $0.hosted(number).volume.copy(id)?.isComplete }) == true else { return }
        await copyCompleted(volume, id)
    }

    /// May be told of twice (`reviewCompletion`): it is written down, and said, once.
    func copyCompleted(_ volume: VolumeState, _ id: CopyID) async {
        guard volume.copies[id] != nil, let copy = volume.record.table[id], !copy.isComplete,
            volume.completing.insert(id).inserted
        else { return }
        defer { volume.completing.remove(id) }
        let name = copy.name
        do {
            guard try await run(CompleteCopy(id), on: [volume]) else { return }
            home.note(nil, "volume \(volume.name): the background copy of '\(name)' is complete")
        } catch {
            home.note(nil, "volume \(volume.name): the background copy of '\(name)' is not complete for sure: \(error)")
        }
    }

    /// A copy has left the chain.
    func copyWithdrawn(_ volume: VolumeState, _ id: CopyID) async {
        let name = volume.record.table[id]?.name
        do { try await run(ForgetCopy(id, of: 0, wasInChain: true), on: [volume]) } catch {
            home.note(
                nil,
                "volume \(volume.name): FlashCopy '\(name ?? String(id))' has left, but that cannot be written down: \(error)"
            )
        }
        chains.copyReady(volume, id)  // who waits for it finds that it has left
        home.happened()
    }

    /// A volume holds all of the copy, or point, that it was restored from.
    func restoreFinished(_ volume: VolumeState) async {
        if volume.record.restoring != nil { await chains.acknowledge(.restoring(nil), volume) }
        restores.dropRestoreBitmap(volume)
        let group = home.group(ofVolume: volume.name)
        home.note(group?.entry.name, "volume \(volume.name) holds all of its point in time again")
        home.publish(volume, group)
    }
}
