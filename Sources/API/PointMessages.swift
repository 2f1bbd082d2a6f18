// PointMessages.swift: what is asked and told about recovery points.

/// Which recovery points are dropped: those with these numbers, or those that were formed before a time.
package struct PointDropRequest: Codable, Sendable {
    package var points: [UInt64]?
    /// A time (RFC 3339), or an age such as "36h".
    package var olderThan: String?
    /// Says only what would be dropped.
    package var preview: Bool?
    enum CodingKeys: String, CodingKey {
        case points, preview
        case olderThan = "older_than"
    }
    package init(points: [UInt64]? = nil, olderThan: String? = nil) {
        self.points = points
        self.olderThan = olderThan
    }
}

package struct PointDropReport: Codable, Sendable {
    package struct Kept: Codable, Sendable {
        package var id: UInt64
        package var reason: String

        package init(id: UInt64, reason: String) {
            self.id = id
            self.reason = reason
        }
    }
    package var dropped: [StatusReport.PointReport]
    /// Those that were asked for by their age and cannot be dropped.
    package var kept: [Kept]
    /// Bytes that the dropped points' files took.
    package var freedBytes: UInt64
    /// Dropped points whose files are still there, since what older copies need of them moves first.
    package var leaving: [UInt64]
    enum CodingKeys: String, CodingKey {
        case dropped, kept, leaving
        case freedBytes = "freed_bytes"
    }

    package init(dropped: [StatusReport.PointReport], kept: [Kept], freedBytes: UInt64, leaving: [UInt64]) {
        self.dropped = dropped
        self.kept = kept
        self.freedBytes = freedBytes
        self.leaving = leaving
    }
}

/// A point that was formed and committed, or, without waiting, that one was asked for.
package enum CycleAnswer: Codable, Sendable {
    case committed(StatusReport.PointReport)
    case asked(Done)

    package init(from decoder: any Decoder) throws {
        if let done = try? Done(from: decoder) {
            self = .asked(done)
        } else {
            self = .committed(try StatusReport.PointReport(from: decoder))
        }
    }

    package func encode(to encoder: any Encoder) throws {
        switch self {
        case .committed(let point): try point.encode(to: encoder)
        case .asked(let done): try done.encode(to: encoder)
        }
    }
}
