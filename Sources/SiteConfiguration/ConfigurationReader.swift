// ConfigurationReader.swift: values out of the parsed TOML file, each error with its line.

import Base
import Etcd
import FoundationEssentials
import Groups
import Link
import NBDProtocol
import NBDServer
import TLS
import TOMLKit
import Volumes

/// Takes values out of the parsed file and names the line of whatever is wrong with them.
struct ConfigurationReader {
    let path: String
    private let lines: [Substring]
    /// Where each table begins: a site may have thousands.
    private let headers: [String: Int]

    init(path: String, text: String) {
        self.path = path
        let lines = text.split(separator: "\n", omittingEmptySubsequences: false)
        self.lines = lines
        let found = lines.enumerated().compactMap { index, raw in
            Self.header(raw.drop { $0 == " " || $0 == "\t" }).map { ($0, index + 1) }
        }
        headers = Dictionary(found) { first, _ in first }
    }

    func error(_ line: Int, _ message: String) -> ConfigurationError {
        ConfigurationError(line > 0 ? "\(path):\(line): \(message)" : "\(path): \(message)")
    }

    /// The line of a key in a table, or of the table's header; the parser does not tell positions of values.
    func line(_ section: String, _ key: String?) -> Int {
        guard let key else { return headers[section] ?? 0 }
        var current = ""
        var header = 0
        for (index, raw) in lines.enumerated() {
            let text = raw.drop { $0 == " " || $0 == "\t" }
            if let name = Self.header(text) {
                current = name
                if current == join(section, key) { return index + 1 }
                if current == section { header = index + 1 }
            } else if current == section {
                let word = text.prefix { $0 != "=" && $0 != " " && $0 != "." && $0 != "\t" }
                if word.filter({ $0 != "\"" }) == key { return index + 1 }
            }
        }
        return header
    }

    private static func header(_ text: Substring) -> String? {
        guard text.hasPrefix("[") else { return nil }
        return text.dropFirst().prefix { $0 != "]" }.filter { $0 != "\"" && $0 != " " }
    }

    private func join(_ section: String, _ key: String) -> String {
        section.isEmpty ? key : "\(section).\(key)"
    }

    private func fail(_ section: String, _ key: String, _ message: String) -> ConfigurationError {
        error(line(section, key), "\(join(section, key)) \(message)")
    }

    func check(_ table: TOMLTable, _ section: String, known: [String]) throws {
        for key in table.keys where !known.contains(key) {
            throw error(
                line(section, key),
                "unknown key '\(join(section, key))'; known here: \(known.joined(separator: ", "))")
        }
    }

    func table(_ parent: TOMLTable, _ section: String, _ key: String) throws -> TOMLTable {
        guard let value = parent[key] else {
            throw error(0, "the section [\(join(section, key))] is missing")
        }
        guard let table = value.table else { throw fail(section, key, "must be a section") }
        return table
    }

    func string(_ table: TOMLTable, _ section: String, _ key: String) throws -> String {
        guard let value = table[key] else {
            throw error(line(section, nil), "\(join(section, key)) is missing")
        }
        guard let text = value.string else { throw fail(section, key, "must be a string") }
        return text
    }

    func name(_ table: TOMLTable, _ section: String, _ key: String) throws -> String {
        let text = try string(table, section, key)
        try checkName(text, section, key)
        return text
    }

    /// Names become file names and export names, where '@' and '/' have a meaning.
    private func checkName(_ text: String, _ section: String, _ key: String) throws {
        let valid =
            !text.isEmpty && text.utf8.count <= 64 && text.first != "." && text.first != "-"
            && text.utf8.allSatisfy {
                (0x30...0x39).contains($0) || (0x41...0x5A).contains($0)
                    || (0x61...0x7A).contains($0) || $0 == 0x2D || $0 == 0x2E || $0 == 0x5F
            }
        guard valid else {
            throw fail(
                section, key,
                "has the name '\(text)'; use 1 to 64 letters, digits, '.', '_' and '-', "
                    + "beginning with a letter, a digit or '_'")
        }
    }

    func absolutePath(_ table: TOMLTable, _ section: String, _ key: String) throws -> String {
        let text = try string(table, section, key)
        guard text.hasPrefix("/") else { throw fail(section, key, "must be an absolute path") }
        return text
    }

    func absolutePaths(_ table: TOMLTable, _ section: String, _ key: String) throws -> [String] {
        let list = try strings(table, section, key)
        guard list.allSatisfy({ $0.hasPrefix("/") }) else { throw fail(section, key, "must hold absolute paths") }
        return list
    }

    func address(_ table: TOMLTable, _ section: String, _ key: String) throws -> Address {
        let text = try string(table, section, key)
        guard let address = Address(text) else {
            throw fail(section, key, "'\(text)' is neither unix:/absolute/path nor host:port")
        }
        return address
    }

    func addresses(
        _ table: TOMLTable, _ section: String, _ key: String, mayBeEmpty: Bool = false
    ) throws -> [Address] {
        guard let value = table[key] else {
            if mayBeEmpty { return [] }
            throw error(line(section, nil), "\(join(section, key)) is missing")
        }
        guard let array = value.array, !array.isEmpty || mayBeEmpty else {
            throw fail(section, key, "must be a list of addresses with at least one in it")
        }
        return try array.map { element in
            guard let text = element.string, let address = Address(text) else {
                throw fail(section, key, "holds something that is neither unix:/absolute/path nor host:port")
            }
            return address
        }
    }

    func volumes(_ root: TOMLTable) throws -> [Configuration.VolumeEntry] {
        let table = try table(root, "", "volumes")
        return try table.keys.sorted().map { name in
            let section = "volumes.\(name)"
            try checkName(name, "volumes", name)
            let entry = try self.table(table, "volumes", name)
            try check(
                entry, section,
                known: [
                    "path", "size", "grain", "change_volume", "cache", "read_only", "allow_clients", "allow_addresses",
                ]
                    + Self.hookKeys)
            let size = try entry["size"].map { _ in try self.size(entry, section, "size") }
            let grain = try entry["grain"].map { _ in try self.size(entry, section, "grain") }
            if let grain, Geometry(size: 1 << 40, grain: Int(clamping: grain)) == nil {
                throw fail(section, "grain", "must be a power of two from 4KiB to 1MiB")
            }
            if let size, size == 0 || size % 512 != 0 || size > UInt64(Int64.max) {
                throw fail(section, "size", "must be a multiple of 512 bytes, more than 0 and less than 8EiB")
            }
            return Configuration.VolumeEntry(
                name: name, path: try absolutePath(entry, section, "path"), size: size,
                grain: grain.map { Int($0) },
                changeVolume: try entry["change_volume"].map { _ in try absolutePath(entry, section, "change_volume") },
                cache: try choice(entry, section, "cache", among: [.writeback, .none]) ?? .writeback,
                readOnly: try flag(entry, section, "read_only") ?? false,
                access: try access(entry, section), hooks: try hooks(entry, section), line: line(section, nil))
        }
    }

    private static let hookKeys = ["on_freeze", "on_thaw", "hook_timeout"]

    /// Commands around FlashCopies.
    private func hooks(_ entry: TOMLTable, _ section: String) throws -> HookCommands {
        var hooks = HookCommands()
        if entry["on_freeze"] != nil { hooks.onFreeze = try string(entry, section, "on_freeze") }
        if entry["on_thaw"] != nil { hooks.onThaw = try string(entry, section, "on_thaw") }
        if entry["hook_timeout"] != nil {
            let text = try string(entry, section, "hook_timeout")
            guard let seconds = seconds(text), (0.1...3600).contains(seconds) else {
                throw fail(section, "hook_timeout", "is '\(text)'; write a time from \"100ms\" to \"1h\"")
            }
            hooks.timeout = seconds
        }
        return hooks
    }

    func peers(_ root: TOMLTable, site: String, tls: TLSPolicy) throws -> [String: Configuration.PeerEntry] {
        guard root["peers"] != nil else { return [:] }
        let table = try table(root, "", "peers")
        var peers: [String: Configuration.PeerEntry] = [:]
        for name in table.keys {
            let section = "peers.\(name)"
            let entry = try self.table(table, "peers", name)
            try check(
                entry, section,
                known: ["nbd", "control", "commit_command", "tls", "tls_user", "allow_clients", "allow_addresses"])
            if entry["control"] != nil, entry["commit_command"] != nil {
                throw fail(section, "commit_command", "is for peers without control, which are no Farcopy sites")
            }
            peers[name] = Configuration.PeerEntry(
                name: name, nbd: try address(entry, section, "nbd"),
                control: entry["control"] == nil ? nil : try address(entry, section, "control"),
                commitCommand: entry["commit_command"] == nil ? nil : try string(entry, section, "commit_command"),
                tls: try choice(entry, section, "tls", among: [.off, .allow, .require]) ?? tls,
                tlsUser: entry["tls_user"] == nil ? site : try string(entry, section, "tls_user"),
                access: try access(entry, section))
        }
        return peers
    }

    func groups(_ root: TOMLTable, site: String) throws -> [Configuration.GroupEntry] {
        guard root["groups"] != nil else { return [] }
        let table = try table(root, "", "groups")
        return try table.keys.sorted().flatMap { name in
            try checkName(name, "groups", name)
            let entry = try self.table(table, "groups", name)
            return try pairs(entry, try group(entry, name), site)
        }
    }

    private func group(_ entry: TOMLTable, _ name: String) throws -> Configuration.GroupEntry {
        let section = "groups.\(name)"
        try check(
            entry, section,
            known: [
                "volumes", "role", "peer", "peers", "hosts", "remotes", "master", "max_coordination", "on_host_lost",
                "mode",
                "collision",
                "collision_memory", "max_collision_wait", "interval",
                "keep", "allow_clients", "allow_addresses",
                "on_isolated",
                "isolation_timeout", "lag_limit", "drain_limit", "connections", "stall_timeout", "rate", "rates",
                "compare",
                "schedule", "scrub",
            ] + Self.hookKeys + GroupEvent.allCases.map(\.rawValue))
        guard let list = entry["volumes"]?.array, !list.isEmpty else {
            throw fail(section, "volumes", "must be a list of volume names with at least one in it")
        }
        let volumes = try list.map { element in
            guard let text = element.string else {
                throw fail(section, "volumes", "must be a list of strings")
            }
            return text
        }
        guard volumes.count <= Limits.volumesPerGroup, Set(volumes).count == volumes.count else {
            throw fail(
                section, "volumes", "must name each volume once, and at most \(Limits.volumesPerGroup)")
        }
        let roleText = try string(entry, section, "role")
        guard let role = Role(rawValue: roleText) else {
            throw fail(section, "role", "is '\(roleText)'; it must be 'primary' or 'secondary'")
        }
        let modeText = entry["mode"] == nil ? "flashcopy" : try string(entry, section, "mode")
        guard let mode = Mode(rawValue: modeText) else {
            throw fail(
                section, "mode",
                "is '\(modeText)'; it must be one of "
                    + Mode.allCases.map { "'\($0.rawValue)'" }.joined(separator: ", "))
        }
        var commands: [GroupEvent: String] = [:]
        for event in GroupEvent.allCases where entry[event.rawValue] != nil {
            commands[event] = try string(entry, section, event.rawValue)
        }
        return Configuration.GroupEntry(
            name: name, group: name, volumes: volumes, role: role,
            peer: entry["peers"] == nil ? try string(entry, section, "peer") : "",
            mode: mode, collisions: try collisions(entry, section, mode, volumes: volumes.count),
            interval: try interval(entry, section),
            keep: try retention(entry, section),
            access: try access(entry, section), hooks: try hooks(entry, section),
            onIsolated: try isolation(entry, section),
            isolationTimeout: try time(entry, section, "isolation_timeout", 0...600) ?? 3,
            lagLimit: try time(entry, section, "lag_limit", 0.1...31 * 86400),
            drainLimit: try time(entry, section, "drain_limit", 0.1...31 * 86400), commands: commands,
            link: try link(entry, section), schedule: try schedule(entry, section, "schedule"),
            scrub: try schedule(entry, section, "scrub"), line: line(section, nil))
    }

    // MARK: Several hosts and remotes

    /// A host has one pair of a group, and a remote one for each of its hosts: with the volumes that the host says are its own, which are the
    /// first entry's until then.
    private func pairs(
        _ entry: TOMLTable, _ group: Configuration.GroupEntry, _ site: String
    ) throws -> [Configuration.GroupEntry] {
        let section = "groups.\(group.name)"
        let keys = ["peers", "hosts", "remotes", "master", "max_coordination", "on_host_lost"].filter {
            entry[$0] != nil
        }
        guard let first = keys.first else { return [group] }
        guard group.mode != .flashcopy else {
            throw fail(section, first, "is for groups with mode = \"global-mirror\" or \"change-volume\"")
        }
        return group.role == .primary
            ? [try host(entry, group, section, site)] : try remote(entry, group, section, site)
    }

    private func host(
        _ entry: TOMLTable, _ group: Configuration.GroupEntry, _ section: String, _ site: String
    ) throws -> Configuration.GroupEntry {
        if entry["peers"] != nil {
            throw fail(section, "peers", "is for remotes; a host has one 'peer', the remote that its volumes go to")
        }
        let remotes = try sites(entry, section, "remotes") ?? [group.peer]
        guard remotes.contains(group.peer) else {
            throw fail(section, "remotes", "must name '\(group.peer)', the peer of this site, as well")
        }
        let hosts = try sites(entry, section, "hosts")
        guard let hosts, hosts.count > 1 else {
            if let hosts, hosts != [site] { throw fail(section, "hosts", "must name '\(site)', this site, as well") }
            if remotes.count > 1 {
                throw fail(section, "remotes", "are several, so 'hosts' must be there: each host has one remote")
            }
            for key in ["master", "max_coordination", "on_host_lost"] where entry[key] != nil {
                throw fail(section, key, "is for groups with several 'hosts'")
            }
            return group
        }
        guard hosts.contains(site) else { throw fail(section, "hosts", "must name '\(site)', this site, as well") }
        var group = group
        var several = Configuration.SeveralEntry(pair: site, hosts: hosts, remotes: remotes)
        let master = entry["master"] == nil ? hosts[0] : try string(entry, section, "master")
        guard hosts.contains(master) || master == Configuration.SeveralEntry.etcd else {
            throw fail(section, "master", "is '\(master)', which is none of 'hosts', and not \"etcd\"")
        }
        several.master = master
        let most = Double(Coordinator.Settings.longestCoordination) / 1e9
        if let seconds = try time(entry, section, "max_coordination", 0.001...most) {
            several.maxCoordination = UInt64(seconds * 1e9)
        }
        if entry["on_host_lost"] != nil {
            let text = try string(entry, section, "on_host_lost")
            guard ["wait", "go-on"].contains(text) else {
                throw fail(section, "on_host_lost", "is '\(text)'; it must be 'wait' or 'go-on'")
            }
            several.goesOnWithoutLost = text == "go-on"
        }
        group.several = several
        return group
    }

    private func remote(
        _ entry: TOMLTable, _ group: Configuration.GroupEntry, _ section: String, _ site: String
    ) throws -> [Configuration.GroupEntry] {
        for key in ["hosts", "master", "max_coordination", "on_host_lost"] where entry[key] != nil {
            throw fail(section, key, "is for hosts; this site's role is 'secondary'")
        }
        if entry["peers"] != nil, entry["peer"] != nil {
            throw fail(section, "peer", "and 'peers' say the same; leave one of them out")
        }
        let remotes = try sites(entry, section, "remotes") ?? [site]
        guard remotes.contains(site) else { throw fail(section, "remotes", "must name '\(site)', this site, as well") }
        let peers = try sites(entry, section, "peers") ?? [group.peer]
        guard peers.count > 1 || remotes.count > 1 else {
            var group = group
            group.peer = peers[0]
            return [group]
        }
        var pool = group
        pool.peer = peers.count == 1 ? peers[0] : ""
        if peers.count > 1 { pool.name += "@" }
        pool.several = Configuration.SeveralEntry(pair: pool.peer, remotes: remotes)
        guard peers.count > 1 else { return [pool] }
        return [pool]
            + peers.map { peer in
                var pair = pool
                (pair.name, pair.peer, pair.volumes) = ("\(group.name)@\(peer)", peer, [])
                pair.several?.pair = peer
                return pair
            }
    }

    /// Where hosts elect who coordinates a group.
    func coordination(_ root: TOMLTable) throws -> Configuration.CoordinationEntry? {
        guard root["coordination"] != nil else { return nil }
        let (entry, section) = (try table(root, "", "coordination"), "coordination")
        try check(
            entry, section,
            known: ["endpoints", "user", "password_file", "tls_ca", "tls_certificate", "tls_key", "prefix", "lease"])
        let endpoints = try strings(entry, section, "endpoints")
        let schemes = ["http://", "https://"]
        guard !endpoints.isEmpty, endpoints.allSatisfy({ url in schemes.contains { url.hasPrefix($0) } }) else {
            throw fail(section, "endpoints", "must be a list such as [\"http://127.0.0.1:2379\"]")
        }
        func text(_ key: String) throws -> String? { entry[key] == nil ? nil : try string(entry, section, key) }
        func path(_ key: String) throws -> String? { entry[key] == nil ? nil : try absolutePath(entry, section, key) }
        let user = try text("user")
        guard (user == nil) == (entry["password_file"] == nil) else {
            throw fail(section, user == nil ? "password_file" : "user", "needs both 'user' and 'password_file'")
        }
        guard (entry["tls_certificate"] == nil) == (entry["tls_key"] == nil) else {
            throw fail(
                section, entry["tls_key"] == nil ? "tls_certificate" : "tls_key",
                "needs both 'tls_certificate' and 'tls_key'")
        }
        var coordination = Configuration.CoordinationEntry(
            etcd: EtcdSettings(
                endpoints: endpoints.map { $0.hasSuffix("/") ? String($0.dropLast()) : $0 }, user: user,
                password: try path("password_file").map { try password(in: $0, section) },
                authority: try path("tls_ca"), certificate: try path("tls_certificate"), key: try path("tls_key")))
        if let prefix = try text("prefix") { coordination.prefix = prefix }
        if let seconds = try time(entry, section, "lease", 2...60) { coordination.leaseSeconds = Int64(seconds) }
        return coordination
    }

    private func password(in path: String, _ section: String) throws -> String {
        guard let data = FileManager.default.contents(atPath: path) else {
            throw fail(section, "password_file", "names \(path), which cannot be read")
        }
        let text = String(decoding: data, as: UTF8.self)
        return text.hasSuffix("\n") ? String(text.dropLast()) : text
    }

    /// Names of sites, each once; nil where the key is absent.
    private func sites(_ entry: TOMLTable, _ section: String, _ key: String) throws -> [String]? {
        guard entry[key] != nil else { return nil }
        let names = try strings(entry, section, key)
        guard Coordinator.Settings.members.contains(names.count), Set(names).count == names.count else {
            throw fail(section, key, "must name 1 to \(Coordinator.Settings.members.upperBound) sites, each once")
        }
        return names
    }

    private func collisions(
        _ entry: TOMLTable, _ section: String, _ mode: Mode, volumes: Int
    ) throws -> Configuration.CollisionEntry {
        var collisions = Configuration.CollisionEntry()
        for key in ["collision", "collision_memory", "max_collision_wait"]
        where entry[key] != nil && mode.hold != .memory {
            throw fail(section, key, "is for groups with mode = \"global-mirror\"")
        }
        if entry["collision"] != nil {
            let text = try string(entry, section, "collision")
            let known = [Configuration.CollisionEntry.holdImage, Configuration.CollisionEntry.sendFirst]
            guard known.contains(text) else {
                throw fail(section, "collision", "is '\(text)'; it must be '\(known[0])' or '\(known[1])'")
            }
            collisions.rules.sendsFirst = text == Configuration.CollisionEntry.sendFirst
        }
        if entry["collision_memory"] != nil {
            let bytes = try size(entry, section, "collision_memory")
            guard bytes.nonzeroBitCount == 1, (UInt64(Limits.maximumGrain)...64 << 30).contains(bytes) else {
                throw fail(section, "collision_memory", "must be a power of two from 1MiB to 64GiB")
            }
            guard bytes >= UInt64(volumes * Limits.imageChunkBytes) else {
                throw fail(
                    section, "collision_memory",
                    "must be at least \(Limits.imageChunkBytes >> 10)KiB for each of the \(volumes) volumes")
            }
            collisions.memory = Int(bytes)
        }
        if let seconds = try time(entry, section, "max_collision_wait", 0.001...10) {
            collisions.rules.longestWait = UInt64(seconds * 1e9)
        }
        return collisions
    }

    /// `keep = 8`, or `keep = { last = 24, hourly = 48, daily = 14 }`.
    private func retention(_ entry: TOMLTable, _ section: String) throws -> Retention {
        guard let value = entry["keep"] else { return Retention(last: 8) }
        if let number = value.int, (1...Limits.pointsPerGroup).contains(number) { return Retention(last: number) }
        guard let table = value.table else {
            throw fail(
                section, "keep",
                "must be a number of recovery points from 1 to \(Limits.pointsPerGroup), or such as { last = 24, hourly = 48, "
                    + "daily = 14 }")
        }
        let inner = join(section, "keep")
        try check(table, inner, known: ["last", "hourly", "daily"])
        let range = 0...Limits.pointsPerGroup
        let kept = Retention(
            last: try number(table, inner, "last", 1...Limits.pointsPerGroup) ?? 1,
            hourly: try number(table, inner, "hourly", range) ?? 0, daily: try number(table, inner, "daily", range) ?? 0
        )
        guard kept.most <= Limits.pointsPerGroup else {
            throw fail(
                section, "keep", "adds up to \(kept.most) recovery points; at most \(Limits.pointsPerGroup) can be kept"
            )
        }
        return kept
    }

    private func isolation(_ entry: TOMLTable, _ section: String) throws -> Configuration.IsolationPolicy {
        guard entry["on_isolated"] != nil else { return .serve }
        switch try string(entry, section, "on_isolated") {
        case "continue": return .serve
        case "refuse": return .refuse
        case let command: return .command(command)
        }
    }

    private func link(_ entry: TOMLTable, _ section: String) throws -> Configuration.LinkEntry {
        var link = Configuration.LinkEntry()
        link.connections = try number(entry, section, "connections", 1...Limits.connectionsPerLink)
        link.stallTimeout = try time(entry, section, "stall_timeout", 0.1...3600) ?? link.stallTimeout
        if entry["rate"] != nil { link.rate = try rate(entry, section, "rate") }
        link.compare = try choice(entry, section, "compare", among: ComparePolicy.allCases) ?? link.compare
        guard let windows = entry["rates"] else { return link }
        guard let list = windows.array else {
            throw fail(
                section, "rates", "must be a list such as [{ from = \"22:00\", to = \"06:00\", rate = \"1GiB\" }]")
        }
        link.rateWindows = try list.map { element in
            guard let table = element.table else { throw fail(section, "rates", "must be a list of tables") }
            let inner = join(section, "rates")
            try check(table, inner, known: ["from", "to", "rate"])
            return Configuration.RateWindow(
                from: try timeOfDay(table, inner, "from"), to: try timeOfDay(table, inner, "to"),
                rate: try rate(table, inner, "rate"))
        }
        return link
    }

    /// Bytes a second; "unlimited" is 0.
    private func rate(_ table: TOMLTable, _ section: String, _ key: String) throws -> UInt64 {
        if table[key]?.string == "unlimited" { return 0 }
        let bytes = try size(table, section, key)
        guard bytes >= 16 << 10 else { throw fail(section, key, "must be at least 16KiB (a second), or \"unlimited\"") }
        return bytes
    }

    private func timeOfDay(_ table: TOMLTable, _ section: String, _ key: String) throws -> Int {
        let text = try string(table, section, key)
        let parts = text.split(separator: ":").map { Int($0) }
        guard parts.count == 2, let hours = parts[0], let minutes = parts[1], (0...24).contains(hours),
            (0...59).contains(minutes), hours * 60 + minutes <= 24 * 60
        else { throw fail(section, key, "is '\(text)'; write a time of day such as \"22:00\"") }
        return hours * 60 + minutes
    }

    private func schedule(_ entry: TOMLTable, _ section: String, _ key: String) throws -> CronSchedule? {
        guard entry[key] != nil else { return nil }
        let text = try string(entry, section, key)
        guard let schedule = CronSchedule(text) else {
            throw fail(
                section, key,
                "is '\(text)'; write minute, hour, day of month, month and day of week, such as \"30 2 * * *\"")
        }
        return schedule
    }

    private func time(_ entry: TOMLTable, _ section: String, _ key: String, _ range: ClosedRange<Double>) throws
        -> Double?
    {
        guard entry[key] != nil else { return nil }
        let text = try string(entry, section, key)
        guard let seconds = seconds(text), range.contains(seconds) else {
            throw fail(
                section, key, "is '\(text)'; write a time from \"\(range.lowerBound)s\" to \"\(range.upperBound)s\"")
        }
        return seconds
    }

    private func interval(_ entry: TOMLTable, _ section: String) throws -> Interval {
        guard entry["interval"] != nil else { return .every(5_000_000_000) }
        let text = try string(entry, section, "interval")
        if text == "manual" { return .manual }
        if let seconds = seconds(text), seconds <= 31 * 86400 {
            return seconds == 0 ? .continuous : .every(UInt64(seconds * 1e9))
        }
        throw fail(
            section, "interval",
            "is '\(text)'; write a time such as \"500ms\", \"5s\", \"10min\" or \"1h\", \"0s\" for continuously, or \"manual\""
        )
    }

    // MARK: The NBD server

    func nbd(_ root: TOMLTable) throws -> Configuration.NBDEntry {
        let entry = try table(root, "", "nbd")
        try check(
            entry, "nbd",
            known: [
                "listen", "tls", "tls_certificates", "tls_psk_file", "tls_verify_peer", "max_connections",
                "max_connections_per_address", "max_handshakes", "handshake_timeout",
            ])
        let files = TLSFiles(
            certificates: entry["tls_certificates"] == nil ? nil : try absolutePath(entry, "nbd", "tls_certificates"),
            pskFile: entry["tls_psk_file"] == nil ? nil : try absolutePath(entry, "nbd", "tls_psk_file"),
            verifyPeer: try flag(entry, "nbd", "tls_verify_peer") ?? true)
        let tls = try choice(entry, "nbd", "tls", among: [TLSPolicy.off, .allow, .require]) ?? .off
        if tls != .off, files.isEmpty {
            throw fail("nbd", "tls", "needs tls_certificates or tls_psk_file")
        }
        return Configuration.NBDEntry(
            listen: try addresses(entry, "nbd", "listen", mayBeEmpty: SocketActivation.isOffered), tls: tls,
            files: files, limits: try limits(entry))
    }

    private func limits(_ entry: TOMLTable) throws -> ServerLimits {
        var limits = ServerLimits()
        let most = Limits.connectionsPerReactor
        limits.connections = try number(entry, "nbd", "max_connections", 1...64 * most) ?? limits.connections
        limits.connectionsPerAddress =
            try number(entry, "nbd", "max_connections_per_address", 1...64 * most) ?? limits.connectionsPerAddress
        limits.handshakes = try number(entry, "nbd", "max_handshakes", 1...most) ?? limits.handshakes
        if entry["handshake_timeout"] != nil {
            let text = try string(entry, "nbd", "handshake_timeout")
            guard let seconds = seconds(text), (1...600).contains(seconds) else {
                throw fail("nbd", "handshake_timeout", "is '\(text)'; write a time from \"1s\" to \"10min\"")
            }
            limits.handshakeSeconds = Int(seconds)
        }
        return limits
    }

    /// Who may open an export.
    private func access(_ entry: TOMLTable, _ section: String) throws -> AccessList {
        var access = AccessList()
        if entry["allow_clients"] != nil { access.clients = try strings(entry, section, "allow_clients") }
        if entry["allow_addresses"] != nil {
            access.addresses = try strings(entry, section, "allow_addresses").map { text in
                guard let range = AddressRange(text) else {
                    throw fail(
                        section, "allow_addresses",
                        "holds '\(text)'; write \"unix\", an address, or a network such as \"10.0.0.0/8\"")
                }
                return range
            }
        }
        return access
    }

    func strings(_ table: TOMLTable, _ section: String, _ key: String) throws -> [String] {
        guard let array = table[key]?.array else { throw fail(section, key, "must be a list of strings") }
        return try array.map { element in
            guard let text = element.string else { throw fail(section, key, "must be a list of strings") }
            return text
        }
    }

    private func flag(_ table: TOMLTable, _ section: String, _ key: String) throws -> Bool? {
        guard let value = table[key] else { return nil }
        guard let flag = value.bool else { throw fail(section, key, "must be true or false") }
        return flag
    }

    private func number(
        _ table: TOMLTable, _ section: String, _ key: String, _ range: ClosedRange<Int>
    ) throws -> Int? {
        guard let value = table[key] else { return nil }
        guard let number = value.int, range.contains(number) else {
            throw fail(section, key, "must be a number from \(range.lowerBound) to \(range.upperBound)")
        }
        return number
    }

    private func choice<Value: RawRepresentable<String>>(
        _ table: TOMLTable, _ section: String, _ key: String, among values: [Value]
    ) throws -> Value? {
        guard table[key] != nil else { return nil }
        let text = try string(table, section, key)
        guard let value = values.first(where: { $0.rawValue == text }) else {
            let known = values.map { "'\($0.rawValue)'" }.joined(separator: ", ")
            throw fail(section, key, "is '\(text)'; it must be one of \(known)")
        }
        return value
    }

    // MARK: Times and sizes

    private func seconds(_ text: String) -> Double? { parseDuration(text) }

    /// "10GiB", "512MiB", "4096" …; bytes.
    private func size(_ table: TOMLTable, _ section: String, _ key: String) throws -> UInt64 {
        if let number = table[key]?.int, number >= 0 { return UInt64(number) }
        let text = try string(table, section, key)
        guard let bytes = parseSize(text) else {
            throw fail(section, key, "is '\(text)'; write a size such as \"10GiB\", \"512MiB\" or \"4KiB\"")
        }
        return bytes
    }
}

/// Seconds of "500ms", "5s", "10min", "1h" or "7d"; nil when it is no duration.
package func parseDuration(_ text: String) -> Double? {
    let units: [(String, Double)] = [("ms", 0.001), ("s", 1), ("min", 60), ("h", 3600), ("d", 86400)]
    for (unit, seconds) in units where text.hasSuffix(unit) {
        if let number = Double(text.dropLast(unit.count)), number.isFinite, number >= 0 { return number * seconds }
    }
    return nil
}

/// Bytes of "10GiB", "1.5TiB", "4096"; nil when it is no size.
package func parseSize(_ text: String) -> UInt64? {
    let units: [(String, UInt64)] = [
        ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40), ("PiB", 1 << 50),
    ]
    for (unit, factor) in units where text.hasSuffix(unit) {
        let number = text.dropLast(3)
        if let whole = UInt64(number) {
            let (bytes, overflow) = whole.multipliedReportingOverflow(by: factor)
            return overflow ? nil : bytes
        }
        guard let value = Double(number), value >= 0, value * Double(factor) < 9e18 else { return nil }
        return UInt64(value * Double(factor))
    }
    return UInt64(text)
}
