// GroupState.swift: one group of a site as the control plane holds it.

import API
import Base
import Groups
import Link
import NBDServer
import Ring
import SiteConfiguration
import Synchronization
import Volumes

/// The record's file, for the group's thread.
final class GroupRecordFile: Sendable {
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

@dynamicMemberLookup
final class GroupState {
    /// What others than the site's thread may read.
    let board: GroupBoard
    var entry: Configuration.GroupEntry { board.entry }
    var handle: GroupHandle { board.handle }
    /// The same, while this site sends to its peer.
    var replicator: GroupHandle? { self.isReplicating ? handle : nil }
    /// Files of a point that is not in the chains yet.
    var madeFiles: (id: CopyID, files: [(VolumeState, CopyFiles)])?
    /// What the exports of its volumes show of recovery points.
    let points = RecoveryPoints()
    /// What carries no recovery point any more, and leaves once the record's file says so.
    var leavingCarriers: [(volume: VolumeState, ids: [CopyID], endsReaders: Bool)] = []
    /// Keeps what the peer lacks, of the last try to give the role up, if that has failed.
    var unsent: String?
    /// A point is being compared.
    var verification: Verification?
    /// An operation on it lets none begin on FlashCopies.
    var holdsCopies = false
    /// This site asks its peer to give up the role.
    var isJoining = false
    /// Sessions, commits and changes of roles come one after the other.
    let turnstile = Turnstile()

    init(entry: Configuration.GroupEntry, record: GroupRecord, file: DurableRecord<GroupRecord>) throws {
        let file = GroupRecordFile(record, file)
        board = GroupBoard(entry, try GroupHandle(name: entry.name, record: record) { try file.save($0) })
    }

    /// Written by the site's thread alone.
    subscript<Value: Sendable>(dynamicMember fact: WritableKeyPath<GroupFacts, Value>) -> Value {
        get { board.facts.withLock { $0[keyPath: fact] } }
        set { board.facts.withLock { $0[keyPath: fact] = newValue } }
    }

    /// The record as it is just now.
    var record: GroupRecord { handle.record }

    /// The record's file may hold another one. The group's thread mends that.
    var isUnsaved: Bool { handle.status.isUnsaved }

    func begin(isolation: isolated (any Actor)? = #isolation, _ configuration: Replicator.Configuration) async {
        self.isReplicating = true
        await handle.begin(configuration)
    }

    func endReplication(isolation: isolated (any Actor)? = #isolation) async {
        await handle.end()
        self.isReplicating = false
    }

    /// What the records of its volumes say while they are served in it, in either role: what the roles mean for the bitmaps is
    /// the group's record's to say.
    var servedAs: String { "group \(entry.group)" }

    /// Whether this site is the group's primary and sends to a peer.
    var isMirroring: Bool { record.isMirroring }

    /// Where the group's hosts elect who coordinates them.
    var election: Election?

    /// By command, this pair changes its role without the group's others.
    var actsAlone = false

    /// Hosts may write here.
    var servesHosts = false
    /// They may as soon as the record's file says nothing else.
    var isAdmitting = false
    /// As a remote: nothing is let in at the intake just now.
    var intakeIsClosed = false
    /// Bytes that clients had written when the group failed over to this site; nil after a restart.
    var writtenAtFailover: UInt64?
    var isRetiring = false
    /// The rate that the replicator was told last.
    var appliedRate: UInt64 = 0
    /// When the schedules are due next, seconds since 1970.
    var nextCycle: Double?
    var nextScrub: Double?
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
