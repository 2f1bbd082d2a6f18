// Configuration.swift: a site's TOML file, read and checked completely before anything is touched.

import Base
import Etcd
import Groups
import Link
import NBDProtocol
import NBDServer
import TLS
import TOMLKit
import Volumes

package struct ConfigurationError: Error, CustomStringConvertible {
    package var description: String
    init(_ description: String) { self.description = description }
}

package struct Configuration: Sendable {
    package struct VolumeEntry: Sendable {
        package var name: String
        package var path: String
        /// Bytes; nil = as large as the file or device is.
        package var size: UInt64?
        package var grain: Int?
        /// The first intermediate in mode `change-volume`; nil = a sparse file in the state directory.
        package var changeVolume: String?
        package var cache: Cache
        package var readOnly: Bool
        package var access: AccessList
        package var hooks: HookCommands
        var line: Int
    }

    /// Whether the kernel's page cache stands between the volume and its storage (QEMU's names).
    package enum Cache: String, Sendable { case writeback, none }

    package struct NBDEntry: Sendable {
        package var listen: [Address]
        package var tls: TLSPolicy
        package var files: TLSFiles
        package var limits: ServerLimits
    }

    package struct GroupEntry: Sendable {
        /// Of the pair, where a site has several of a group: `GROUP@HOST`.
        package var name: String
        /// As operators and other sites say it.
        package var group: String
        package var volumes: [String]
        package var role: Role
        /// Empty where it is not known yet which host's the volumes are.
        package var peer: String
        /// The hosts and remotes of the group, and which host coordinates them; nil = one of each.
        package var several: SeveralEntry?
        package var mode: Mode
        package var collisions: CollisionEntry
        package var interval: Interval
        package var keep: Retention
        package var access: AccessList
        package var hooks: HookCommands
        /// What a primary does at its start when its peer does not answer, and how long it asks, in seconds.
        package var onIsolated: IsolationPolicy
        package var isolationTimeout: Double
        /// Seconds; nil = no alert.
        package var lagLimit: Double?
        package var drainLimit: Double?
        package var commands: [GroupEvent: String]
        package var link: LinkEntry
        /// When points are formed besides the interval; nil = never.
        package var schedule: CronSchedule?
        /// When the sites are compared.
        package var scrub: CronSchedule?
        var line: Int
    }

    /// A group with several hosts or several remotes, as one site knows it.
    package struct SeveralEntry: Sendable, Equatable {
        /// Of the host, by which a pair is known at both of its sites.
        package var pair: String
        /// At a host: all of them, in the order that the configuration has.
        package var hosts: [String] = []
        /// All remotes.
        package var remotes: [String] = []
        package var master: String?
        /// As the master's name: elected by a lease in etcd.
        package static let etcd = "etcd"
        /// Nanoseconds.
        package var maxCoordination: UInt64 = 50_000_000
        /// Points are formed without hosts that are lost.
        package var goesOnWithoutLost = false
    }

    /// Mode `global-mirror`: what becomes of hosts' writes to grains that must still be sent.
    package struct CollisionEntry: Sendable, Equatable {
        package var rules = CollisionRules()
        /// Bytes for old images, of the whole group; a power of two.
        package var memory = 256 << 20
        package static let holdImage = "hold-image"
        package static let sendFirst = "send-first"
        package var policy: String { rules.sendsFirst ? Self.sendFirst : Self.holdImage }
    }

    package enum IsolationPolicy: Sendable, Equatable {
        case serve
        case refuse
        /// Serves if the command succeeds.
        case command(String)
    }

    /// How a group's data crosses the link.
    package struct LinkEntry: Sendable, Equatable {
        /// Connections to each volume's intake; nil = as many as suit the number of volumes.
        package var connections: Int?
        /// A peer that acknowledges nothing for so many seconds has stalled.
        package var stallTimeout: Double = 30
        /// Bytes a second; 0 = unbounded.
        package var rate: UInt64 = 0
        /// Other rates at times of day; the first that applies counts.
        package var rateWindows: [RateWindow] = []
        /// Whether the peer's checksums are asked for before data is sent.
        package var compare = ComparePolicy.auto
    }

    /// A rate for part of each day, in local time.
    package struct RateWindow: Sendable, Equatable {
        /// Minutes since midnight; a window whose end is not after its start goes past midnight.
        package var from: Int
        package var to: Int
        package var rate: UInt64
    }

    package struct PeerEntry: Sendable {
        package var name: String
        package var nbd: Address
        /// Nil: any NBD server instead of a Farcopy site.
        package var control: Address?
        /// Takes the snapshot that is a commit, where the peer is no Farcopy site.
        package var commitCommand: String?
        package var tls: TLSPolicy
        /// The name that this site goes by in the peer's PSK file.
        package var tlsUser: String
        /// Who may open the intake of volumes that this peer mirrors to here, besides knowing its secret name.
        package var access: AccessList
    }

    /// Where hosts elect who coordinates a group.
    package struct CoordinationEntry: Sendable, Equatable {
        package var etcd: EtcdSettings
        /// Of the keys.
        package var prefix = "farcopy"
        package var leaseSeconds: Int64 = 5
    }

    package var path: String
    package var site: String
    package var state: String
    package var control: [Address]
    /// Names that the control addresses go by, besides their own, the machine's and the site's.
    package var controlNames: [String]
    /// Files, devices and directories in which FlashCopies may have targets.
    package var targets: [String]
    /// A command that runs when a file system that the site writes to becomes full.
    package var onSpaceLow: String?
    package var nbd: NBDEntry
    package var volumes: [VolumeEntry]
    package var groups: [GroupEntry]
    package var peers: [String: PeerEntry]
    package var coordination: CoordinationEntry?

    /// - Throws: `ConfigurationError` naming file, line and key.
    package init(text: String, path: String) throws {
        let table: TOMLTable
        do {
            table = try TOMLTable(string: text)
        } catch let error as TOMLParseError {
            throw ConfigurationError(
                "\(path):\(error.source.begin.line): \(error.description)")
        }
        let reader = ConfigurationReader(path: path, text: text)
        self.path = path
        try reader.check(table, "", known: ["site", "nbd", "volumes", "groups", "peers", "coordination"])
        let siteTable = try reader.table(table, "", "site")
        try reader.check(
            siteTable, "site", known: ["name", "state", "control", "control_names", "targets", "on_space_low"])
        site = try reader.name(siteTable, "site", "name")
        state = try reader.absolutePath(siteTable, "site", "state")
        control = try reader.addresses(siteTable, "site", "control")
        controlNames =
            try siteTable["control_names"].map { _ in
                try reader.strings(siteTable, "site", "control_names")
            } ?? []
        targets =
            try siteTable["targets"].map { _ in
                try reader.absolutePaths(siteTable, "site", "targets")
            } ?? [state]
        onSpaceLow = siteTable["on_space_low"] == nil ? nil : try reader.string(siteTable, "site", "on_space_low")
        nbd = try reader.nbd(table)
        volumes = try reader.volumes(table)
        peers = try reader.peers(table, site: site, tls: nbd.tls)
        groups = try reader.groups(table, site: site)
        coordination = try reader.coordination(table)
        try crossCheck(reader)
    }

    private func crossCheck(_ reader: ConfigurationReader) throws {
        var owners: [String: String] = [:]
        var paths: [String: String] = [:]
        for volume in volumes {
            if let other = paths.updateValue(volume.name, forKey: volume.path) {
                throw reader.error(
                    volume.line, "volumes '\(other)' and '\(volume.name)' have the same path")
            }
        }
        for volume in volumes {
            guard let path = volume.changeVolume else { continue }
            if let other = paths.updateValue(volume.name, forKey: path) {
                throw reader.error(
                    reader.line("volumes.\(volume.name)", "change_volume"),
                    "volumes.\(volume.name).change_volume is a path of volume '\(other)' already")
            }
        }
        for group in groups {
            let others = (group.several.map { $0.hosts + $0.remotes } ?? []).filter { $0 != site }
            for peer in (group.peer.isEmpty ? [] : [group.peer]) + others {
                guard let entry = peers[peer] else {
                    throw reader.error(group.line, "group '\(group.group)': there is no [peers.\(peer)]")
                }
                if group.several != nil, entry.control == nil {
                    throw reader.error(
                        group.line,
                        "group '\(group.group)': peers.\(peer) needs 'control', since the group has several hosts or remotes"
                    )
                }
            }
            for volume in group.volumes {
                guard volumes.contains(where: { $0.name == volume }) else {
                    throw reader.error(
                        group.line, "group '\(group.name)': there is no [volumes.\(volume)]")
                }
                if let other = owners.updateValue(group.name, forKey: volume) {
                    throw reader.error(
                        group.line,
                        "volume '\(volume)' is in group '\(other)' and in group '\(group.name)'; "
                            + "a volume belongs to one group")
                }
            }
        }
        for group in groups where group.several?.master == SeveralEntry.etcd && coordination == nil {
            throw reader.error(
                reader.line("groups.\(group.group)", "master"),
                "groups.\(group.group).master is \"etcd\", which needs [coordination] with its 'endpoints'")
        }
        let named =
            volumes.map { ("volumes.\($0.name)", $0.access) } + groups.map { ("groups.\($0.name)", $0.access) }
            + peers.values.map { ("peers.\($0.name)", $0.access) }
        for (section, access) in named where access.clients != nil && nbd.tls == .off {
            throw reader.error(
                reader.line(section, "allow_clients"),
                "\(section).allow_clients needs nbd.tls: without it no client can say who it is")
        }
        for group in groups where group.role == .secondary && !group.peer.isEmpty && peers[group.peer]?.control == nil {
            throw reader.error(
                group.line,
                "group '\(group.name)': a secondary needs peers.\(group.peer).control, since its peer is a Farcopy site"
            )
        }
        for peer in peers.values where peer.tls != .off && nbd.files.isEmpty {
            throw reader.error(
                reader.line("peers.\(peer.name)", "tls"),
                "peers.\(peer.name).tls needs nbd.tls_certificates or nbd.tls_psk_file")
        }
        let addresses = control + nbd.listen
        if Set(addresses).count != addresses.count {
            throw ConfigurationError("\(path): an address is listened on twice")
        }
    }
}
