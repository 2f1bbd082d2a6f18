// StatusReport.swift: what `farcopy status` shows, as values.

import Groups

package struct StatusReport: Codable, Sendable {
    package struct VolumeReport: Codable, Sendable {
        package var size: UInt64
        package var grain: Int
        package var exports: [String]
        package var restoringBytes: UInt64
        package var bytesRead: UInt64
        package var bytesWritten: UInt64
        package var flashcopies: [CopyReport]
        /// Bytes that would be compared anew if the machine went down now; nil while nothing is logged.
        package var activeBytes: UInt64?
        /// What is still to be copied to the volume's change volume; nil while it has none.
        package var changeVolumeLacksBytes: UInt64?
        enum CodingKeys: String, CodingKey {
            case size, grain, exports, flashcopies
            case activeBytes = "active_bytes"
            case changeVolumeLacksBytes = "change_volume_lacks_bytes"
            case restoringBytes = "restoring_bytes"
            case bytesRead = "bytes_read"
            case bytesWritten = "bytes_written"
        }

        package init(
            size: UInt64, grain: Int, exports: [String], restoringBytes: UInt64, bytesRead: UInt64,
            bytesWritten: UInt64, flashcopies: [CopyReport], activeBytes: UInt64? = nil
        ) {
            self.size = size
            self.grain = grain
            self.exports = exports
            self.restoringBytes = restoringBytes
            self.bytesRead = bytesRead
            self.bytesWritten = bytesWritten
            self.flashcopies = flashcopies
            self.activeBytes = activeBytes
        }
    }

    package struct CopyReport: Codable, Sendable {
        package var name: String
        package var state: String
        package var reason: String?

        package init(name: String, state: String, reason: String? = nil) {
            self.name = name
            self.state = state
            self.reason = reason
        }
    }

    package struct PointReport: Codable, Sendable {
        package var id: UInt64
        package var formedAt: String
        package var committedAt: String?
        /// Bytes that crossed the link for it, and the seconds from its forming to its commit (primary).
        package var bytes: UInt64?
        package var seconds: Double?
        /// Of a group with several hosts or remotes.
        package var state: State?
        package enum State: String, Codable, Sendable {
            case prepared, committed
            case inDoubt = "in doubt"
        }
        enum CodingKeys: String, CodingKey {
            case id, bytes, seconds, state
            case formedAt = "formed_at"
            case committedAt = "committed_at"
        }

        package init(
            id: UInt64, formedAt: String, committedAt: String? = nil, bytes: UInt64? = nil, seconds: Double? = nil
        ) {
            self.id = id
            self.formedAt = formedAt
            self.committedAt = committedAt
            self.bytes = bytes
            self.seconds = seconds
        }
    }

    /// Something under way that `farcopy abort` ends.
    package struct OperationReport: Codable, Sendable {
        package var name: String
        package var startedAt: String?
        package var step: String
        enum CodingKeys: String, CodingKey {
            case name, step
            case startedAt = "started_at"
        }

        package init(name: String, startedAt: String? = nil, step: String) {
            self.name = name
            self.startedAt = startedAt
            self.step = step
        }
    }

    /// How a group stands at another site, as that site has said.
    package struct MemberReport: Codable, Sendable {
        package var site: String
        package var role: String?
        package var state: String?
        package var reason: String?
        package var point: UInt64?
        package var lagSeconds: Double?
        /// What holds things up, as the site knows it.
        package var notice: String?
        /// Why nothing is known of it.
        package var problem: String?
        /// When it was asked, in seconds since 1970.
        package var at: Double
        enum CodingKeys: String, CodingKey {
            case site, role, state, reason, point, notice, problem, at
            case lagSeconds = "lag_seconds"
        }

        package init(site: String, at: Double) { (self.site, self.at) = (site, at) }
    }

    package struct GroupReport: Codable, Sendable {
        package var role: String
        package var state: String
        package var reason: String?
        package var mode: String
        package var peer: String
        package var volumes: [String]
        package var point: PointReport?
        package var lagSeconds: Double?
        package var pendingBytes: UInt64?
        package var rateBytesPerSecond: Double?
        package var etaSeconds: Double?
        /// Acknowledgements were held this long for the newest point, and at the 99th percentile of the last thousand.
        package var holdSeconds: Double?
        package var holdSecondsP99: Double?
        package var holdHistogram: HoldHistogram?
        /// What the volumes of a secondary show.
        package var consistentAsOf: String?
        package var alerts: [String]?
        package var operation: OperationReport?
        /// Where the remote is not consistent at every instant, or does not answer just now.
        package var notice: String?
        package var windowBytes: UInt64?
        /// Bytes that the remote had already and that were not sent.
        package var sparedBytes: UInt64?
        package var rateLimit: UInt64?
        /// Of a primary in mode `global-mirror`.
        package var collisions: CollisionReport?
        /// The other sites of a group with several hosts or remotes.
        package var members: [MemberReport]?
        package var lastVerify: VerifyReport?
        package var verifiedBytes: UInt64 = 0
        package var differencesFound: UInt64 = 0
        /// Of the first copy: what the peer has, from 0 to 1.
        package var progress: Double?
        enum CodingKeys: String, CodingKey {
            case role, state, reason, mode, peer, volumes, point, alerts, operation, notice, progress, collisions,
                members
            case windowBytes = "window_bytes"
            case sparedBytes = "spared_bytes"
            case rateLimit = "rate_limit"
            case lastVerify = "last_verify"
            case verifiedBytes = "verified_bytes"
            case differencesFound = "differences_found"
            case consistentAsOf = "consistent_as_of"
            case lagSeconds = "lag_seconds"
            case pendingBytes = "pending_bytes"
            case rateBytesPerSecond = "rate_bytes_per_second"
            case etaSeconds = "eta_seconds"
            case holdSeconds = "hold_seconds"
            case holdSecondsP99 = "hold_seconds_p99"
            case holdHistogram = "hold_histogram"
        }

        /// Of a group of several pairs at this site: what is worst of them, or least.
        package init(_ pairs: [GroupReport]) {
            self = pairs[0]
            for pair in pairs.dropFirst() { merge(pair) }
        }

        private mutating func merge(_ other: GroupReport) {
            if other.role != role { role = "\(role), \(other.role)" }
            let order = ["mirroring", "resyncing", "copying", "simplex", "failed-over", "suspended", "split-brain"]
            if (order.firstIndex(of: other.state) ?? 0) > (order.firstIndex(of: state) ?? 0) {
                (state, reason) = (other.state, other.reason)
            }
            if !other.peer.isEmpty { peer = peer.isEmpty ? other.peer : "\(peer), \(other.peer)" }
            volumes += other.volumes
            if other.point?.id ?? 0 < point?.id ?? 0 { (point, consistentAsOf) = (other.point, other.consistentAsOf) }
            lagSeconds = lagSeconds.flatMap { mine in other.lagSeconds.map { max(mine, $0) } }
            pendingBytes = pendingBytes.map { $0 + (other.pendingBytes ?? 0) } ?? other.pendingBytes
            rateBytesPerSecond =
                rateBytesPerSecond.map { $0 + (other.rateBytesPerSecond ?? 0) } ?? other.rateBytesPerSecond
            etaSeconds = [etaSeconds, other.etaSeconds].compactMap { $0 }.max()
            alerts = alerts.map { $0 + (other.alerts ?? []) } ?? other.alerts
            (operation, notice) = (operation ?? other.operation, notice ?? other.notice)
            (lastVerify, progress) = (lastVerify ?? other.lastVerify, progress ?? other.progress)
            verifiedBytes += other.verifiedBytes
            differencesFound += other.differencesFound
        }

        package init(role: String, state: String, mode: String, peer: String, volumes: [String]) {
            self.role = role
            self.state = state
            self.mode = mode
            self.peer = peer
            self.volumes = volumes
        }
    }

    package var site: String
    package var version: String
    /// Where the NBD server listens.
    package var nbd: [String]
    package var volumes: [String: VolumeReport] = [:]
    package var groups: [String: GroupReport] = [:]
    /// Of the site as a whole.
    package var alerts: [String]?
    /// Those that the site writes to.
    package var fileSystems: [FileSystemReport]?
    enum CodingKeys: String, CodingKey {
        case site, version, nbd, volumes, groups, alerts
        case fileSystems = "file_systems"
    }

    package init(site: String, version: String, nbd: [String]) {
        self.site = site
        self.version = version
        self.nbd = nbd
    }
}

package struct FileSystemReport: Codable, Sendable, Equatable {
    /// What the site has there: the state directory, a volume's file, a FlashCopy's target.
    package var path: String
    package var usedBytes: UInt64
    /// Used and available together.
    package var sizeBytes: UInt64
    package var usedRatio: Double { sizeBytes > 0 ? Double(usedBytes) / Double(sizeBytes) : 0 }
    enum CodingKeys: String, CodingKey {
        case path
        case usedBytes = "used_bytes"
        case sizeBytes = "size_bytes"
    }
    package init(path: String, usedBytes: UInt64, sizeBytes: UInt64) {
        self.path = path
        self.usedBytes = usedBytes
        self.sizeBytes = sizeBytes
    }

    package var words: String {
        let percent = Int((usedRatio * 1000).rounded())
        return "\(path): its file system is \(percent / 10).\(percent % 10) % full: \(megabytes(usedBytes)) of "
            + "\(megabytes(sizeBytes)) MiB"
    }

    private func megabytes(_ bytes: UInt64) -> UInt64 { (bytes + (1 << 19)) >> 20 }
}

package struct VerifyReport: Codable, Sendable {
    package struct Difference: Codable, Sendable {
        package var volume: String
        package var offset: UInt64
        package var length: UInt64
        /// Whose volume, of a group with several hosts.
        package var site: String?

        package init(volume: String, offset: UInt64, length: UInt64) {
            self.volume = volume
            self.offset = offset
            self.length = length
        }
    }
    package var point: UInt64
    package var startedAt: String
    package var finishedAt: String
    package var comparedBytes: UInt64
    package var differingBytes: UInt64
    package var differenceCount: Int
    /// The first thousand.
    package var differences: [Difference]
    /// The differing grains are sent again with the next point.
    package var repairing: Bool
    enum CodingKeys: String, CodingKey {
        case point, differences, repairing
        case startedAt = "started_at"
        case finishedAt = "finished_at"
        case comparedBytes = "compared_bytes"
        case differingBytes = "differing_bytes"
        case differenceCount = "difference_count"
    }

    package init(
        point: UInt64, startedAt: String, finishedAt: String, comparedBytes: UInt64, differingBytes: UInt64,
        differenceCount: Int, differences: [Difference], repairing: Bool
    ) {
        self.point = point
        self.startedAt = startedAt
        self.finishedAt = finishedAt
        self.comparedBytes = comparedBytes
        self.differingBytes = differingBytes
        self.differenceCount = differenceCount
        self.differences = differences
        self.repairing = repairing
    }
}

/// Something that has happened at a site.
package struct EventEntry: Codable, Sendable {
    /// Seconds since 1970.
    package var at: Double
    package var group: String?
    package var text: String

    package init(at: Double, group: String?, text: String) {
        self.at = at
        self.group = group
        self.text = text
    }
}
