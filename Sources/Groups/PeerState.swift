// PeerState.swift: what the peer says when a session opens.

/// What the peer says when a session opens.
package struct PeerState: Sendable, Equatable, Codable {
    package var session: UInt64
    package var site: String
    /// Identity of the secondary copy; changes when the secondary starts from nothing.
    package var lineage: String
    /// The same of each volume, by name.
    package var volumeLineages: [String: String]?
    /// Its newest point.
    package var committed: PointRecord?
    package init(
        session: UInt64, site: String, lineage: String, volumeLineages: [String: String]? = nil, committed: PointRecord?
    ) {
        self.session = session
        self.site = site
        self.lineage = lineage
        self.volumeLineages = volumeLineages
        self.committed = committed
    }
}
