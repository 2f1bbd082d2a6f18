// GroupState.swift: one group of a site as the control plane holds it.

import API
import Base
import Groups
import Link
import Ring
import SiteConfiguration
import Synchronization

/// The record's file, shared by the site and, while the group is primary, its replicator.
final class GroupRecordFile: @unchecked Sendable {
    // Safe because: the file is used under the mutex only.
    private let saved: Mutex<GroupRecord>
    private let file: DurableRecord<GroupRecord>

    init(_ record: GroupRecord, _ file: DurableRecord<GroupRecord>) {
        saved = Mutex(record)
        self.file = file
    }

    /// - Throws: also when the record cannot follow the one that was saved last.
    func save(_ record: GroupRecord) throws {
        try saved.withLock { saved in
            try record.check(after: saved)
            try file.save(record)
            saved = record
        }
    }
}

extension GroupRecord: VersionedRecord {}

final class GroupState {
    let entry: Configuration.GroupEntry
    /// Counts while the group has no replicator; otherwise the replicator's copy does.
    private let kept: KeptRecord<GroupRecord>
    let file: GroupRecordFile
    private(set) var replicator: Replicator?
    /// The session of the primary's replicator (secondary).
    var session: UInt64?
    /// This site asks its peer to give up the role.
    var isJoining = false
    /// Sessions, commits and changes of roles come one after the other.
    let turnstile = Turnstile()

    init(entry: Configuration.GroupEntry, record: GroupRecord, file: DurableRecord<GroupRecord>) {
        self.entry = entry
        let file = GroupRecordFile(record, file)
        self.file = file
        kept = KeptRecord(record) { try file.save($0) }
    }

    /// The record as it is just now, whoever has it.
    var record: GroupRecord { replicator?.status.record ?? kept.value }

    /// The record's file may hold another one, and no replicator saves it again; `settle` mends that.
    var isUnsaved: Bool { replicator == nil && kept.isUnsaved }
    /// The same, whoever has the record.
    var mayDiffer: Bool { replicator?.status.isUnsaved ?? kept.isUnsaved }

    /// Changes the record, durably or not at all, whoever has it.
    func amend(
        isolation: isolated (any Actor)? = #isolation, _ change: @escaping @Sendable (inout GroupRecord) -> Void
    ) async throws {
        while let replicator {
            if try await replicator.amend(change) { return }
            // It has just ended; whoever ended it takes its record over.
            await Task.yield()
        }
        try kept.amend(change)
    }

    /// The same while the group has no replicator, as during a start.
    func amendAlone(_ change: (inout GroupRecord) throws -> Void) throws {
        invariant(replicator == nil, "the record is the replicator's while there is one")
        try kept.amend(change)
    }

    /// Takes over what has happened already: in memory at once, and in the file as soon as it can be written.
    func acknowledge(
        isolation: isolated (any Actor)? = #isolation, _ change: @escaping @Sendable (inout GroupRecord) -> Void
    ) async {
        while let replicator {
            if (try? await replicator.amend(anyway: true, change)) == true { return }
            await Task.yield()
        }
        kept.acknowledge(change)
    }

    /// Makes sure that no change that was taken back stands in the file. Nothing of the peer's is let in before.
    func settle() throws { if replicator == nil { try kept.settle() } }

    func begin(_ replicator: Replicator) { self.replicator = replicator }

    /// The replicator has ended: its record is the group's.
    func endReplication() {
        guard let status = replicator?.status else { return }
        kept.takeOver(status.record, isUnsaved: status.isUnsaved)
        replicator = nil
    }

    /// What the records of its volumes say while they are served in it, in either role: what the roles mean for the bitmaps is
    /// the group's record's to say.
    var servedAs: String { "group \(entry.name)" }

    /// Whether this site is the group's primary and sends to a peer.
    var isMirroring: Bool { record.isMirroring }

    /// Hosts may write here.
    var servesHosts = false
    /// Why a primary does not serve hosts yet.
    var isolation: String?
    /// Bytes that clients had written when the group failed over to this site; nil after a restart.
    var writtenAtFailover: UInt64?
    var operation: Operation?
    var isRetiring = false
    var lastVerify: VerifyReport?
    /// Since the start.
    var verifiedBytes: UInt64 = 0
    var differencesFound: UInt64 = 0
    /// The rate that the replicator was told last.
    var appliedRate: UInt64 = 0
    /// When the schedules are due next, seconds since 1970.
    var nextCycle: Double?
    var nextScrub: Double?
    /// Alerts that are on, with what they say.
    var alerts: [AlertKind: String] = [:]
}

/// What happened, for `farcopy events`; the newest thousand.
package final class EventLog: Sendable {
    private let entries = Mutex<[EventEntry]>([])

    func add(group: String?, _ text: String) {
        entries.withLock { entries in
            if entries.count >= 1000 { entries.removeFirst(100) }
            entries.append(EventEntry(at: realSeconds(), group: group, text: text))
        }
    }

    package func list(group: String?) -> [EventEntry] {
        entries.withLock { $0.filter { group == nil || $0.group == group } }
    }
}
