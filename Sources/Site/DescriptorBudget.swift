// DescriptorBudget.swift: how many of the process's descriptors files, links and connections may take.
//
// Must be prevented:
//   clients take the descriptors that a record, a commit or a call to the peer needs
//   a site starts that must run out of descriptors when it does what it is configured for

import Base
import FlashCopies
import FoundationEssentials
import Glibc
import Groups
import Ring
import SiteConfiguration

package struct DescriptorBudget: Sendable {
    /// What the process may have open.
    let limit: Int
    /// Files may be open, those of copies that are yet to be made included.
    let files: Int
    /// Connections to all control addresses.
    package let control: Int
    /// Connections of NBD clients.
    let clients: Int
    /// What could be less than was asked for, in words.
    let notices: [String]

    static let remedy = "raise it (`ulimit -n`, or LimitNOFILE= in the systemd unit)"

    /// - Parameter limit: for tests; otherwise what the process has.
    /// - Throws: `Refusal` with the figures when what is configured cannot fit.
    init(_ configuration: Configuration, limit: Int = processLimit()) throws {
        let need = Need(configuration)
        let least = need.now + Limits.fewestClients + need.intake + Limits.fewestControlConnections
        guard limit >= least else {
            throw Refusal(
                "this site needs \(least) descriptors and may have \(limit): \(need.words); \(Self.remedy)")
        }
        let left = limit - least
        control = min(Limits.controlConnections, Limits.fewestControlConnections + left / 4)
        let room = Limits.fewestClients + need.intake + left / 2
        let asked = configuration.nbd.limits.connections
        clients = min(asked, room)
        files = limit - need.apart - control - clients
        self.limit = limit
        var notices: [String] = []
        if clients < asked || control < Limits.controlConnections {
            notices.append(
                "the limit of \(limit) descriptors leaves room for \(clients) NBD clients (nbd.max_connections is \(asked)) and "
                    + "\(control) connections to the control API; \(Self.remedy) for more")
        }
        let perAddress = configuration.nbd.limits.connectionsPerAddress
        if need.intake > min(asked, perAddress) {
            notices.append(
                "the links of peers take up to \(need.intake) connections; nbd.max_connections is \(asked), "
                    + "nbd.max_connections_per_address \(perAddress): raise them, or set 'connections' lower in the groups at the peers"
            )
        }
        if need.now + need.later > limit {
            notices.append(
                "as secondary of all its groups this site would need \(least + need.later) descriptors and may have \(limit); "
                    + "\(Self.remedy) before roles are exchanged")
        }
        self.notices = notices
    }

    /// - Throws: when so many files more would take what connections and records need.
    func require(_ count: Int) throws {
        let open = OpenFile.openCount
        guard open + count > files else { return }
        throw Refusal(
            "\(open) files are open, and at most \(files) of the \(limit) descriptors of this process are for files; withdraw "
                + "FlashCopies, or stop the site and \(Self.remedy)", .passing)
    }

    static func processLimit() -> Int {
        var limit = rlimit()
        getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
        return Int(clamping: limit.rlim_cur)
    }
}

/// What a configuration, and the copies that are there, need.
private struct Need {
    /// Rings, mailboxes, event loops, calls to peers, files that are open for a moment.
    var apart: Int
    var volumes = 0
    var flashCopies = 0
    var points = 0
    /// Recovery points of groups that are primary now.
    var later = 0
    /// Connections of peers to volumes that are secondary.
    var intake = 0

    var now: Int { apart + volumes + flashCopies + points }
    var words: String {
        "\(volumes) for volumes, \(flashCopies) for FlashCopies, \(points) for recovery points, "
            + "\(intake + Limits.fewestClients) for NBD clients and \(apart + Limits.fewestControlConnections) for itself"
    }

    /// Its own file, the bitmaps of changes, the activity log, those of a restore; a primary's besides: the target of points, and a record
    /// while it is replaced.
    private static let filesPerVolume = 4
    private static let filesPerPrimary = 2
    private static let filesPerCopy = 2

    init(_ configuration: Configuration) {
        let cores = max(1, sysconf(Int32(_SC_NPROCESSORS_ONLN)))
        apart = Limits.spareDescriptors + 8 * cores + 32 * configuration.peers.count + configuration.groups.count
        volumes = Self.filesPerVolume * configuration.volumes.count
        var pointsThere: [String: Int] = [:]
        for volume in configuration.volumes {
            let ids = Self.copies(of: volume.name, configuration.state)
            let known = ids.count { $0 < CopyTable.firstID }
            flashCopies += Self.filesPerCopy * (ids.count - known)
            pointsThere[volume.name] = known
        }
        // Of several pairs, the first entry has the volumes.
        for group in configuration.groups where !group.volumes.isEmpty {
            let each = group.link.connections ?? max(1, 4 / group.volumes.count)
            let isSecondary = configuration.groups.filter { $0.group == group.group }.allSatisfy {
                Self.isSecondary($0, configuration.state)
            }
            let ofPrimary = Self.filesPerPrimary * group.volumes.count
            if isSecondary { later += ofPrimary } else { volumes += ofPrimary }
            if isSecondary { intake += each * group.volumes.count } else { apart += each * group.volumes.count + 2 }
            for name in group.volumes {
                // Older ones are open while they are read. One more is made before the newest is one of those.
                let present = Self.filesPerCopy * min(1, pointsThere[name] ?? 0)
                points += isSecondary ? 2 * Self.filesPerCopy : present
                later += isSecondary ? 0 : 2 * Self.filesPerCopy - present
            }
        }
    }

    private static func copies(of volume: String, _ state: String) -> [Int64] {
        let names = (try? FileManager.default.contentsOfDirectory(atPath: "\(state)/volumes/\(volume)/copies")) ?? []
        return names.compactMap { $0.hasSuffix(".bitmap") ? Int64($0.dropLast(7)) : nil }
    }

    /// As the record says, or the configuration where there is none. A record that cannot be read is told of elsewhere.
    private static func isSecondary(_ group: Configuration.GroupEntry, _ state: String) -> Bool {
        let path = "\(state)/groups/\(group.name)/group.record"
        var record: GroupRecord?
        if (try? exists(path)) == true { _ = try? DurableRecord(path: path, value: &record) }
        return record.map { $0.role == .secondary } ?? (group.role == .secondary)
    }
}
