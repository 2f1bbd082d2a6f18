// Retention.swift: which recovery points a secondary keeps.
//
// Must be prevented: the newest point is dropped, on which the primary's next one builds.

/// By count, and by a grandfather scheme: the newest point of each of the newest hours and days that have any (UTC).
package struct Retention: Sendable, Equatable {
    package var last: Int
    package var hourly: Int
    package var daily: Int

    package init(last: Int, hourly: Int = 0, daily: Int = 0) {
        self.last = max(1, last)
        self.hourly = hourly
        self.daily = daily
    }

    /// Most points that are kept at a time.
    package var most: Int { last + hourly + daily }

    /// The points that are no longer kept.
    ///
    /// - Parameter points: oldest first; the last of them is always kept.
    package func dropped(_ points: [PointRecord]) -> [PointRecord] {
        var kept = Set(points.suffix(last).map(\.number))
        keepNewest(of: hourly, seconds: 3600, points, &kept)
        keepNewest(of: daily, seconds: 86400, points, &kept)
        return points.filter { !kept.contains($0.number) }
    }

    private func keepNewest(of periods: Int, seconds: Double, _ points: [PointRecord], _ kept: inout Set<UInt64>) {
        var seen: [Double] = []
        for point in points.reversed() {
            let period = (point.formedAt / seconds).rounded(.down)
            guard !seen.contains(period) else { continue }
            guard seen.count < periods else { return }
            seen.append(period)
            kept.insert(point.number)
        }
    }
}
