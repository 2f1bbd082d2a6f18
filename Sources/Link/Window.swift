// Window.swift: how much may be on its way to the peer at a time.
//
// Twice the product of the highest rate at which data was acknowledged lately and the shortest time that took (BBR's
// model: Cardwell et al., "BBR: Congestion-Based Congestion Control", ACM Queue 2016): less would leave the wire idle, more
// would only wait in queues, and with it everything that must pass them, such as a point's commit.

package struct Window {
    /// Bytes between the smallest and the largest window.
    private let floor: Double
    private let ceiling: Double
    private var delivered: Double = 0
    /// Highest rate of the present and of the last period, bytes a nanosecond.
    private var rates: (Double, Double) = (0, 0)
    private var periodEnds: UInt64 = 0
    /// Shortest round trip of the present and of the last ten seconds, nanoseconds.
    private var trips: (Double, Double) = (.infinity, .infinity)
    private var tripsEnd: UInt64 = 0

    package init(floor: Int = 1 << 20, ceiling: Int = 64 << 20) {
        self.floor = Double(floor)
        self.ceiling = Double(ceiling)
    }

    /// What is remembered about something that was sent, until it is acknowledged.
    package struct Sending: BitwiseCopyable {
        package var at: UInt64 = 0
        var delivered: Double = 0
        package init() {}
    }

    package func sending(at now: UInt64) -> Sending {
        var sending = Sending()
        sending.at = now
        sending.delivered = delivered
        return sending
    }

    /// - Parameter bytes: of the acknowledged sending.
    package mutating func acknowledged(_ sending: Sending, bytes: Int, now: UInt64) {
        delivered += Double(bytes)
        let time = Double(max(1, now &- sending.at))
        if now >= tripsEnd {
            tripsEnd = now + 10_000_000_000
            trips = (.infinity, trips.0)
        }
        trips.0 = min(trips.0, time)
        if now >= periodEnds {
            periodEnds = now + UInt64(max(10 * roundTrip, 1_000_000))
            rates = (0, rates.0)
        }
        rates.0 = max(rates.0, (delivered - sending.delivered) / time)
    }

    private var roundTrip: Double {
        let shortest = min(trips.0, trips.1)
        return shortest.isFinite ? shortest : 0
    }

    /// Highest rate at which data was acknowledged lately, bytes a second.
    package var bytesPerSecond: Double { max(rates.0, rates.1) * 1e9 }

    /// Bytes that may be on their way. On a short way processors and disks take the time: twenty milliseconds' worth keeps all of
    /// them busy, and holds nothing up.
    package var bytes: Double {
        let rate = max(rates.0, rates.1)
        return min(ceiling, max(floor, rate * max(2 * roundTrip, 20e6)))
    }

    /// Bytes that may be on their way over a link that has been given a rate (bytes a second), or all of it goes at once when the
    /// link has stalled for a while: a quarter of a second's worth, more on a long way.
    package func bytes(at rate: UInt64) -> Double {
        min(bytes, Double(rate) * min(1, max(2 * roundTrip / 1e9, 0.25)))
    }
}

/// Lets bytes pass at a rate; what was not used is kept for at most a tenth of a second.
package struct TokenBucket {
    /// Bytes a second; 0 = unbounded.
    package var rate: UInt64 {
        didSet { if rate != oldValue { level = 0 } }
    }
    private var level: Double = 0
    private var filledAt: UInt64 = 0

    package init(rate: UInt64) { self.rate = rate }

    /// Whether something may pass now. It may be more than there is: the next one waits for that.
    package mutating func mayPass(now: UInt64) -> Bool {
        guard rate > 0 else { return true }
        level = min(Double(rate) / 10, level + Double(now &- filledAt) / 1e9 * Double(rate))
        filledAt = now
        return level >= 0
    }

    package mutating func pass(_ bytes: Int) { if rate > 0 { level -= Double(bytes) } }

    /// Nanoseconds until something may pass.
    package var wait: UInt64 { rate > 0 && level < 0 ? UInt64(-level / Double(rate) * 1e9) + 1 : 0 }
}
