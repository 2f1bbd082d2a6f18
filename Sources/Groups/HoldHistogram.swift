// HoldHistogram.swift: how long the points of a group have held its hosts.

/// How long acknowledgements were held, since the start; the buckets of a Prometheus histogram.
package struct HoldHistogram: Codable, Sendable, Equatable {
    /// Upper bounds in seconds.
    package static let bounds = [0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05]
    package var counts = Array(repeating: UInt64(0), count: bounds.count + 1)
    package var sum = 0.0

    package init() {}

    package mutating func add(_ seconds: Double) {
        counts[Self.bounds.firstIndex { seconds <= $0 } ?? Self.bounds.count] += 1
        sum += seconds
    }
}
