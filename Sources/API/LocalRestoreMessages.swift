// LocalRestoreMessages.swift: what is asked and told about restores from change volumes.

package struct LocalRestoreRequest: Codable, Sendable {
    /// `change-volume`: the first intermediates of a group's volumes.
    package static let changeVolume = "change-volume"
    package var from: String
    /// Hosts that have volumes open for writing are disconnected instead of the restore being refused.
    package var disconnect: Bool?
    /// What the volumes hold is not kept.
    package var discard: Bool?

    package init(from: String) { self.from = from }
}

package struct LocalRestoreReport: Codable, Sendable {
    package var group: String
    package var point: UInt64
    /// Bytes that were written to the volumes, and how many of them came from the peer.
    package var bytes: UInt64
    package var fetchedBytes: UInt64
    /// The FlashCopy that keeps what was discarded.
    package var keptAs: String?
    package var disconnected: Int
    enum CodingKeys: String, CodingKey {
        case group, point, bytes, disconnected
        case fetchedBytes = "fetched_bytes"
        case keptAs = "kept_as"
    }

    package init(
        group: String, point: UInt64, bytes: UInt64, fetchedBytes: UInt64, keptAs: String?, disconnected: Int
    ) {
        (self.group, self.point, self.bytes) = (group, point, bytes)
        (self.fetchedBytes, self.keptAs, self.disconnected) = (fetchedBytes, keptAs, disconnected)
    }
}
