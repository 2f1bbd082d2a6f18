// CollisionReport.swift: what hosts' writes to grains that must still be sent have cost a group of mode `global-mirror`.

/// Since the site's start, of all the group's volumes at this site.
package struct CollisionReport: Codable, Sendable, Equatable {
    /// `hold-image` or `send-first`.
    package var policy: String
    /// Bytes of old images that went to memory.
    package var heldBytes: UInt64 = 0
    /// Bytes of memory for them: in use, the most there ever were, and the bound.
    package var memoryInUse: Int
    package var memoryPeak: Int
    package var memoryLimit: Int
    /// Writes that waited until an old image was sent; for how long, in seconds, and how many for at most each of `waitBounds`, or longer.
    package var waits: UInt64 = 0
    package var waitSeconds = 0.0
    package var waitBounds: [Double]
    package var waitCounts: [UInt64]
    /// Points that could not be held, and why the last one.
    package var pointsGivenUp: UInt64 = 0
    package var lastGivenUp: String?

    enum CodingKeys: String, CodingKey {
        case policy, waits
        case heldBytes = "held_bytes"
        case memoryInUse = "memory_bytes"
        case memoryPeak = "memory_peak_bytes"
        case memoryLimit = "memory_limit_bytes"
        case waitSeconds = "wait_seconds"
        case waitBounds = "wait_bounds"
        case waitCounts = "wait_counts"
        case pointsGivenUp = "points_given_up"
        case lastGivenUp = "last_given_up"
    }

    /// - Parameter memory: bytes in use, the peak, and the limit.
    package init(policy: String, memory: (Int, Int, Int), waitBounds: [Double]) {
        self.policy = policy
        (memoryInUse, memoryPeak, memoryLimit) = memory
        self.waitBounds = waitBounds
        waitCounts = Array(repeating: 0, count: waitBounds.count + 1)
    }
}
