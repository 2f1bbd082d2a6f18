// Configuration.swift: a site's TOML file, read and checked completely before anything is touched.

import Base
import TOMLKit
import Volumes

/// Where something listens.
package enum Address: Sendable, Hashable, CustomStringConvertible {
    case unix(path: String)
    case tcp(host: String, port: UInt16)

    /// "unix:/path" or "host:port" (IPv6 hosts in brackets); nil when it is neither.
    package init?(_ text: String) {
        if text.hasPrefix("unix:") {
            let path = String(text.dropFirst(5))
            guard path.hasPrefix("/"), path.utf8.count < 108 else { return nil }
            self = .unix(path: path)
            return
        }
        guard let colon = text.lastIndex(of: ":"), let port = UInt16(text[text.index(after: colon)...])
        else { return nil }
        var host = String(text[..<colon])
        if host.hasPrefix("["), host.hasSuffix("]") { host = String(host.dropFirst().dropLast()) }
        guard !host.isEmpty else { return nil }
        self = .tcp(host: host, port: port)
    }

    package var description: String {
        switch self {
        case .unix(let path): "unix:\(path)"
        case .tcp(let host, let port): host.contains(":") ? "[\(host)]:\(port)" : "\(host):\(port)"
        }
    }
}

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
        var line: Int
    }

    package enum Mode: String, Sendable { case flashcopy }

    package enum Role: String, Sendable { case primary, secondary }

    package struct GroupEntry: Sendable {
        package var name: String
        package var volumes: [String]
        package var role: Role
        package var peer: String
        package var mode: Mode
        package var interval: IntervalSetting
        package var keep: Int
        var line: Int
    }

    package enum IntervalSetting: Sendable, Equatable {
        case continuous
        case seconds(Double)
        case manual
    }

    package struct PeerEntry: Sendable {
        package var name: String
        package var nbd: Address
        package var control: Address
    }

    package var path: String
    package var site: String
    package var state: String
    package var control: [Address]
    package var listen: [Address]
    package var volumes: [VolumeEntry]
    package var groups: [GroupEntry]
    package var peers: [String: PeerEntry]

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
        try reader.check(table, "", known: ["site", "nbd", "volumes", "groups", "peers"])
        let siteTable = try reader.table(table, "", "site")
        try reader.check(siteTable, "site", known: ["name", "state", "control"])
        site = try reader.name(siteTable, "site", "name")
        state = try reader.absolutePath(siteTable, "site", "state")
        control = try reader.addresses(siteTable, "site", "control")
        let nbdTable = try reader.table(table, "", "nbd")
        try reader.check(nbdTable, "nbd", known: ["listen"])
        listen = try reader.addresses(nbdTable, "nbd", "listen")
        volumes = try reader.volumes(table)
        peers = try reader.peers(table)
        groups = try reader.groups(table)
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
        for group in groups {
            guard peers[group.peer] != nil else {
                throw reader.error(
                    group.line, "group '\(group.name)': there is no [peers.\(group.peer)]")
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
        let addresses = control + listen
        if Set(addresses).count != addresses.count {
            throw ConfigurationError("\(path): an address is listened on twice")
        }
    }
}

/// Takes values out of the parsed file and names the line of whatever is wrong with them.
struct ConfigurationReader {
    let path: String
    private let lines: [Substring]

    init(path: String, text: String) {
        self.path = path
        lines = text.split(separator: "\n", omittingEmptySubsequences: false)
    }

    func error(_ line: Int, _ message: String) -> ConfigurationError {
        ConfigurationError(line > 0 ? "\(path):\(line): \(message)" : "\(path): \(message)")
    }

    /// The line of a key in a table, or of the table's header; the parser does not tell positions of values.
    func line(_ section: String, _ key: String?) -> Int {
        var current = ""
        var header = 0
        for (index, raw) in lines.enumerated() {
            let text = raw.drop { $0 == " " || $0 == "\t" }
            if text.hasPrefix("[") {
                current = text.dropFirst().prefix { $0 != "]" }.filter { $0 != "\"" && $0 != " " }
                if current == section || (key != nil && current == join(section, key!)) {
                    header = index + 1
                    if key == nil || current != section { return header }
                }
            } else if current == section, let key {
                let word = text.prefix { $0 != "=" && $0 != " " && $0 != "." && $0 != "\t" }
                if word.filter({ $0 != "\"" }) == key { return index + 1 }
            }
        }
        return header
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

    func address(_ table: TOMLTable, _ section: String, _ key: String) throws -> Address {
        let text = try string(table, section, key)
        guard let address = Address(text) else {
            throw fail(section, key, "'\(text)' is neither unix:/absolute/path nor host:port")
        }
        return address
    }

    func addresses(_ table: TOMLTable, _ section: String, _ key: String) throws -> [Address] {
        guard let value = table[key] else {
            throw error(line(section, nil), "\(join(section, key)) is missing")
        }
        guard let array = value.array, !array.isEmpty else {
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
            try check(entry, section, known: ["path", "size", "grain"])
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
                grain: grain.map { Int($0) }, line: line(section, nil))
        }
    }

    func peers(_ root: TOMLTable) throws -> [String: Configuration.PeerEntry] {
        guard root["peers"] != nil else { return [:] }
        let table = try table(root, "", "peers")
        var peers: [String: Configuration.PeerEntry] = [:]
        for name in table.keys {
            let section = "peers.\(name)"
            let entry = try self.table(table, "peers", name)
            try check(entry, section, known: ["nbd", "control"])
            peers[name] = Configuration.PeerEntry(
                name: name, nbd: try address(entry, section, "nbd"),
                control: try address(entry, section, "control"))
        }
        return peers
    }

    func groups(_ root: TOMLTable) throws -> [Configuration.GroupEntry] {
        guard root["groups"] != nil else { return [] }
        let table = try table(root, "", "groups")
        return try table.keys.sorted().map { name in
            try checkName(name, "groups", name)
            return try group(try self.table(table, "groups", name), name)
        }
    }

    private func group(_ entry: TOMLTable, _ name: String) throws -> Configuration.GroupEntry {
        let section = "groups.\(name)"
        try check(entry, section, known: ["volumes", "role", "peer", "mode", "interval", "keep"])
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
        guard let role = Configuration.Role(rawValue: roleText) else {
            throw fail(section, "role", "is '\(roleText)'; it must be 'primary' or 'secondary'")
        }
        let modeText = entry["mode"] == nil ? "flashcopy" : try string(entry, section, "mode")
        guard let mode = Configuration.Mode(rawValue: modeText) else {
            throw fail(section, "mode", "is '\(modeText)'; this version has the mode 'flashcopy'")
        }
        var keep = 8
        if let value = entry["keep"] {
            guard let number = value.int, (1...64).contains(number) else {
                throw fail(section, "keep", "must be a number of recovery points from 1 to 64")
            }
            keep = number
        }
        return Configuration.GroupEntry(
            name: name, volumes: volumes, role: role, peer: try string(entry, section, "peer"),
            mode: mode, interval: try interval(entry, section), keep: keep, line: line(section, nil))
    }

    private func interval(_ entry: TOMLTable, _ section: String) throws
        -> Configuration.IntervalSetting
    {
        guard entry["interval"] != nil else { return .seconds(5) }
        let text = try string(entry, section, "interval")
        if text == "manual" { return .manual }
        let units: [(String, Double)] = [("ms", 0.001), ("s", 1), ("min", 60), ("h", 3600)]
        for (unit, seconds) in units where text.hasSuffix(unit) {
            guard let number = Double(text.dropLast(unit.count)), number >= 0,
                number * seconds <= 31 * 86400
            else { continue }
            return number == 0 ? .continuous : .seconds(number * seconds)
        }
        throw fail(
            section, "interval",
            "is '\(text)'; write a time such as \"500ms\", \"5s\", \"10min\" or \"1h\", \"0s\" for continuously, or \"manual\""
        )
    }

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
