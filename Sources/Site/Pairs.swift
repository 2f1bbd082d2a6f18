// Pairs.swift: a group with several hosts or remotes at one site: a host has one pair of it, and a remote one for each of its hosts. Each pair
// is a group of its own here, with record, session and bitmaps; what they have in common is their points.
//
// Must be prevented:
//   a host writes to volumes of another: whose a volume is, the first host that names it says, durably, before anything is let in

import API
import Base
import Groups
import Link
import Ring
import SiteConfiguration

/// Which host's each volume of a group is, at a remote of several.
struct ClaimsRecord: VersionedRecord {
    static let currentFormat = 1
    var format = currentFormat
    var hosts: [String: String] = [:]
}

extension Configuration.GroupEntry {
    /// Volumes of which no host has said yet that they are its own.
    var isPool: Bool { several != nil && peer.isEmpty }
}

extension GroupState {
    /// Sites that have what this one has of the group, this one among them: its hosts, or its remotes.
    var fellows: [String] {
        guard let several = entry.several else { return [] }
        guard several.hosts.isEmpty else { return several.hosts.sorted() }
        return Set(several.remotes + (record.coordination?.places ?? []).map(\.remote)).sorted()
    }

    /// The group's pairs, by name, in the order in which they are counted; nil when they are not all known yet.
    var pairNames: [String]? {
        guard let several = entry.several else { return nil }
        return several.hosts.isEmpty ? record.coordination?.places?.map(\.host) : several.hosts
    }
}

extension Holdings {
    /// All pairs of a group.
    func pairs(_ name: String) throws -> [GroupState] {
        if let group = groups[name], group.entry.several == nil { return [group] }
        let found = groups.values.filter { $0.entry.group == name && !$0.entry.isPool }
            .sorted { $0.entry.name < $1.entry.name }
        return found.isEmpty ? [try group(name)] : found
    }

    /// Whether a group has several hosts or remotes.
    func isOfSeveral(_ name: String) throws -> Bool { try pairs(name).contains { $0.entry.several != nil } }

    /// Other sites that have what this one has of the group.
    func fellows(_ pairs: [GroupState]) -> [String] {
        Set(pairs.flatMap(\.fellows)).subtracting([configuration.site]).sorted()
    }

    /// How other sites are asked; those whose control API is not known are left out.
    func clients(_ sites: [String]) -> [(site: String, client: ControlClient)] {
        sites.compactMap { site in
            configuration.peers[site]?.control.map { (site, ControlClient(address: $0)) }
        }
    }

    /// Of the pair with that name.
    func handle(_ name: String, _ pair: String) -> GroupHandle? {
        try? pairs(name).first { $0.entry.several?.pair == pair }?.handle
    }

    /// Asks the pair that coordinates the others, at this site, for a point.
    func requestPoint(_ name: String) -> Bool {
        guard let group = try? pairs(name).first(where: { $0.replicator?.status.coordinates == true }) else {
            return false
        }
        group.handle.request()
        return true
    }

    /// The pair with a site.
    func pair(_ name: String, with site: String) throws -> GroupState {
        let found = groups.values.filter { $0.entry.group == name && !$0.entry.isPool }
        if found.count == 1, let group = found.first { return group }
        guard let group = found.first(where: { $0.entry.peer == site }) else {
            guard !found.isEmpty else { return try group(name) }
            let known = found.map { "'\($0.entry.peer)'" }.sorted().joined(separator: " and ")
            throw Refusal(
                "group '\(name)' at '\(configuration.site)' has the peers \(known), not '\(site)'", .refused)
        }
        return group
    }

    /// The pair with a site of that identity; another when there is none, which whoever asks must look at.
    func pair(_ name: String, withID siteID: String) throws -> GroupState {
        let found = groups.values.filter { $0.entry.group == name && !$0.entry.isPool }
        return try found.first { $0.record.peerSite == siteID } ?? found.first ?? group(name)
    }

    /// The pair that a volume is of.
    func pair(_ name: String, of volume: String) throws -> GroupState {
        try groups.values.first { $0.entry.group == name && $0.entry.volumes.contains(volume) } ?? group(name)
    }

    // MARK: Claims

    private func claims(of group: String) throws -> (DurableRecord<ClaimsRecord>, ClaimsRecord) {
        let directory = state.group(group)
        try StateDirectory.makeDirectory(directory)
        var found: ClaimsRecord?
        let file = try DurableRecord<ClaimsRecord>(path: "\(directory)/claims.record", value: &found)
        return (file, found ?? ClaimsRecord())
    }

    /// What hosts have said before this start.
    func applyClaims(_ entries: [Configuration.GroupEntry]) throws -> [Configuration.GroupEntry] {
        var entries = entries
        for pool in entries.indices where entries[pool].isPool {
            let name = entries[pool].group
            let claims = try claims(of: name).1.hosts
            for index in entries.indices where entries[index].group == name && index != pool {
                let peer = entries[index].peer
                entries[index].volumes = entries[pool].volumes.filter { claims[$0] == peer }
            }
            let peers = entries.filter { $0.group == name && !$0.isPool }.map(\.peer)
            entries[pool].volumes.removeAll { claims[$0].map(peers.contains) ?? false }
        }
        return entries
    }

    /// A host names its volumes; those that nobody has named yet become its own.
    ///
    /// - Returns: these.
    func claim(_ names: [String], for group: GroupState) throws -> [String] {
        guard let pool = groups.values.first(where: { $0.entry.group == group.entry.group && $0.entry.isPool }) else {
            return []
        }
        let new = names.filter(pool.entry.volumes.contains)
        guard !new.isEmpty else { return [] }
        var (file, claims) = try claims(of: group.entry.group)
        for name in new { claims.hosts[name] = group.entry.peer }
        try file.save(claims)
        let all = configuration.groups.first { $0.name == pool.entry.name }?.volumes ?? []
        group.board.setVolumes(all.filter { (group.entry.volumes + new).contains($0) })
        pool.board.setVolumes(pool.entry.volumes.filter { !new.contains($0) })
        note(group.entry.name, "'\(group.entry.peer)' mirrors \(new.joined(separator: ", ")) here")
        return new
    }
}
