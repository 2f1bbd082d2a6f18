// Distrust.swift: what the next start must not rely on is written down, although the state directory takes nothing any more.
//
// A disk that fails may come back after power loss as it was before, and with it an activity log and marks of copies that know nothing of
// what hosts wrote since. So the note goes where it outlives that: to the volume's own file as an attribute, which leaves the data as it
// is; for a block device to the peer, which then asks for all of the volume.
//
// Must be prevented:
//   hosts go on before the note is on stable storage (the engine waits for it: `distrustActivityLog`, `failureIsWritten`)
//   a note is removed before the record says the same (`VolumeState.confirm`)
//   hosts wait without bound: what nobody takes in time is told to the operator, and tried again

import API
import Base
import FoundationEssentials
import Glibc
import Replication
import Ring
import Volumes

/// An attribute of a volume's file.
struct SourceMark: Codable, Equatable {
    private static let attribute = "user.farcopy.distrust"
    /// Identity of the volume whose metadata is meant: a file that was copied with its attributes is another's.
    var volume: String
    var logIsBroken = false
    /// Durable FlashCopies and recovery points that have failed.
    var failed: [CopyID] = []

    /// - Throws: when it cannot be told whether there is one.
    static func read(_ source: OpenFile, volume: String) throws -> SourceMark? {
        guard let bytes = try source.attribute(attribute) else { return nil }
        // What nobody understands was left by a newer version: the worst is assumed.
        let mark =
            (try? JSONDecoder().decode(SourceMark.self, from: Data(bytes))) ?? Self(volume: volume, logIsBroken: true)
        return mark.volume == volume ? mark : nil
    }

    func write(_ source: OpenFile) throws {
        try source.setAttribute(Self.attribute, [UInt8](try JSONEncoder().encode(self)))
    }

    static func remove(_ source: OpenFile) throws { try source.removeAttribute(attribute) }
}

extension Site {
    func activityLogFailed(_ volume: VolumeState, _ errno: Int32) async {
        volume.acknowledge { $0.logIsBroken = true }
        note(
            group(ofVolume: volume.name)?.entry.name,
            "volume \(volume.name): its activity log cannot be written (\(String(cString: strerror(errno)))); after power loss "
                + "everything will be compared")
        await writeDownDistrust(volume)
        let number = volume.number
        volume.reactor.perform { $0.hosted(number).volume.distrustActivityLog() }
    }

    func failureUnwritten(_ volume: VolumeState, _ id: CopyID, _ errno: Int32) async {
        await markFailed(volume, id, errno)
        await writeDownDistrust(volume, failed: [id])
        let number = volume.number
        volume.reactor.perform { $0.hosted(number).volume.failureIsWritten() }
    }

    /// Somebody has on stable storage what the records in memory say must not be relied on, or was asked in vain.
    private func writeDownDistrust(_ volume: VolumeState, failed: Set<CopyID> = []) async {
        let group = group(ofVolume: volume.name)
        volume.failedUnwritten.formUnion(failed)
        let isNew = volume.distrustDueAt == nil
        volume.distrustDueAt = nil
        guard volume.isUnsaved || group?.isUnsaved == true else { return volume.failedUnwritten.removeAll() }
        do { try await noteElsewhere(volume, group) } catch {
            volume.distrustDueAt = monotonicNanoseconds() + UInt64(Limits.distrustSeconds) * 1_000_000_000
            guard isNew else { return }
            note(
                group?.entry.name,
                "volume \(volume.name): neither the state directory, nor the volume's file, nor the peer takes the note that its metadata "
                    + "is out of date (\(error)); should the machine lose power before that is mended, run `farcopy adopt \(volume.name)` "
                    + "before the next start")
        }
    }

    /// What nobody has taken yet is tried again.
    func retryDistrust() {
        let now = monotonicNanoseconds()
        for volume in volumes.values {
            guard let due = volume.distrustDueAt, now >= due else { continue }
            volume.distrustDueAt = .max
            Task { await writeDownDistrust(volume) }
        }
    }

    private func noteElsewhere(_ volume: VolumeState, _ group: GroupState?) async throws {
        let marking = Result { try volume.markSource() }
        if case .success = marking { return }
        // The peer knows nothing of FlashCopies.
        guard volume.failedUnwritten.isEmpty, let group else { return try marking.get() }
        try await tellPeer(group, volume)
    }

    private func tellPeer(_ group: GroupState, _ volume: VolumeState) async throws {
        // Otherwise nobody relies on what changes here.
        guard group.record.role == .primary, group.record.lineage != nil else { return }
        _ = try await callPeer(
            group, Endpoints.untracked, body: UntrackedRequest(siteID: siteRecord.id, volume: volume.name),
            seconds: Int64(Limits.distrustSeconds))
    }

    /// The primary cannot write down any more what its hosts change of a volume: all of it may differ once it starts again.
    package func noteUntracked(_ name: String, _ request: UntrackedRequest) async throws {
        let group = try group(name)
        guard group.entry.volumes.contains(request.volume) else {
            throw Refusal("group '\(name)' has no volume '\(request.volume)'", .unknown)
        }
        guard group.record.peerSite == request.siteID else {
            throw Refusal("group '\(name)' at '\(configuration.site)' belongs to another site", .refused)
        }
        try await group.amend { $0.noteUntracked(request.volume, lineage: randomIdentity()) }
        group.untrackedIn = group.session
        note(
            name,
            "'\(group.entry.peer)' cannot write down any more what its hosts change of volume \(request.volume); all of it will be "
                + "compared")
    }
}
