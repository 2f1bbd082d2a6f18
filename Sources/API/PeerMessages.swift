// PeerMessages.swift: what one site asks of another.

import Groups

package struct SessionRequest: Codable, Sendable {
    package struct Volume: Codable, Sendable {
        package var name: String
        package var size: UInt64

        package init(name: String, size: UInt64) {
            self.name = name
            self.size = size
        }
    }
    package var site: String
    package var siteID: String
    package var volumes: [Volume]
    package var generations: [String]
    package var lastCommitted: UInt64?

    package init(site: String, siteID: String, volumes: [Volume], generations: [String], lastCommitted: UInt64? = nil) {
        self.site = site
        self.siteID = siteID
        self.volumes = volumes
        self.generations = generations
        self.lastCommitted = lastCommitted
    }
}

package struct SessionAnswer: Codable, Sendable {
    package var state: PeerState
    package var exports: [String]

    package init(state: PeerState, exports: [String]) {
        self.state = state
        self.exports = exports
    }
}

package struct CommitRequest: Codable, Sendable {
    package var siteID: String
    package var session: UInt64
    package var number: UInt64
    package var previous: UInt64?
    package var formedAt: Double

    package init(siteID: String, session: UInt64, number: UInt64, previous: UInt64? = nil, formedAt: Double) {
        self.siteID = siteID
        self.session = session
        self.number = number
        self.previous = previous
        self.formedAt = formedAt
    }
}

package struct CommitAnswer: Codable, Sendable {
    package var committedAt: Double
    package init(committedAt: Double) { self.committedAt = committedAt }
}

package struct YieldRequest: Codable, Sendable {
    package var site: String
    package var siteID: String
    /// Of the site that is primary from now on.
    package var generations: [String]
    package var highestPoint: UInt64
    package var volumes: [SessionRequest.Volume]

    package init(
        site: String, siteID: String, generations: [String], highestPoint: UInt64, volumes: [SessionRequest.Volume]
    ) {
        self.site = site
        self.siteID = siteID
        self.generations = generations
        self.highestPoint = highestPoint
        self.volumes = volumes
    }
}

package struct YieldAnswer: Codable, Sendable {
    package var siteID: String
    package var lineage: String
    package var volumeLineages: [String: String]?
    package var point: PointRecord

    package init(siteID: String, lineage: String, volumeLineages: [String: String]? = nil, point: PointRecord) {
        self.siteID = siteID
        self.lineage = lineage
        self.volumeLineages = volumeLineages
        self.point = point
    }
}

/// Words of a volume's CR and OOS bitmaps together.
package struct ChangesAnswer: Codable, Sendable {
    package var grain: Int
    package var size: UInt64
    package var words: [UInt64]

    package init(grain: Int, size: UInt64, words: [UInt64]) {
        self.grain = grain
        self.size = size
        self.words = words
    }
}

package struct PromoteRequest: Codable, Sendable {
    package var siteID: String
    package var session: UInt64
    package var point: UInt64

    package init(siteID: String, session: UInt64, point: UInt64) {
        self.siteID = siteID
        self.session = session
        self.point = point
    }
}

package struct PinRequest: Codable, Sendable {
    package var siteID: String
    package var point: UInt64
    package var name: String

    package init(siteID: String, point: UInt64, name: String) {
        self.siteID = siteID
        self.point = point
        self.name = name
    }
}

package struct ChecksumRequest: Codable, Sendable {
    package var siteID: String
    /// Of the secondary's present content, in this session …
    package var session: UInt64?
    /// … or of a FlashCopy or recovery point by name.
    package var copy: String?
    package var volume: String
    package var offset: UInt64
    package var length: Int
    package var block: Int

    package init(
        siteID: String, session: UInt64? = nil, copy: String? = nil, volume: String, offset: UInt64, length: Int,
        block: Int
    ) {
        self.siteID = siteID
        self.session = session
        self.copy = copy
        self.volume = volume
        self.offset = offset
        self.length = length
        self.block = block
    }
}

/// Base64 of the checksums (`Digest`), one after the other.
package struct ChecksumAnswer: Codable, Sendable {
    package var digests: String
    package init(digests: String) { self.digests = digests }
}

package struct UntrackedRequest: Codable, Sendable {
    package var siteID: String
    package var volume: String

    package init(siteID: String, volume: String) {
        self.siteID = siteID
        self.volume = volume
    }
}
