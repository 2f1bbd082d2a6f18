// Metrics.swift: `/metrics`.

import API
import Groups

/// Prometheus text exposition, from the same figures as the status.
enum Metrics {
    // `Double.init` as a value may also be `init(bitPattern:)`, which makes nonsense of a count.
    static func text(_ status: StatusReport) -> String {
        var lines: [String] = []
        func family(_ name: String, _ help: String, _ values: [(String, Double?)]) {
            lines.append("# HELP farcopy_\(name) \(help)")
            lines.append("# TYPE farcopy_\(name) gauge")
            for case (let labels, let value?) in values { lines.append("farcopy_\(name){\(labels)} \(value)") }
        }
        let groups = status.groups.sorted { $0.key < $1.key }
        let volumes = status.volumes.sorted { $0.key < $1.key }
        func each(_ value: (StatusReport.GroupReport) -> Double?) -> [(String, Double?)] {
            groups.map { ("group=\"\($0.key)\"", value($0.value)) }
        }
        family("lag_seconds", "Age of the newest point that the remote has committed.", each(\.lagSeconds))
        family(
            "pending_bytes", "Bytes that differ from the newest committed point.",
            each { $0.pendingBytes.map { Double($0) } })
        family("point", "Number of the newest committed point.", each { $0.point.map { Double($0.id) } })
        family("rate_bytes_per_second", "Bytes sent to the peer.", each(\.rateBytesPerSecond))
        family("hold_seconds_p99", "Time that acknowledgements were held to form a point.", each(\.holdSecondsP99))
        family(
            "verified_bytes_total", "Bytes compared with the peer since the start.", each { Double($0.verifiedBytes) })
        family(
            "verify_differences_total", "Differences that comparisons have found since the start.",
            each { Double($0.differencesFound) })
        family("spared_bytes_total", "Bytes that the peer had already.", each { $0.sparedBytes.map { Double($0) } })
        family(
            "window_bytes", "Bytes that may be on their way to the peer.", each { $0.windowBytes.map { Double($0) } })
        family("point_bytes", "Bytes sent for the newest committed point.", each { $0.point?.bytes.map { Double($0) } })
        family(
            "point_seconds", "Time from forming to commit of the newest committed point.", each { $0.point?.seconds })
        func histogram(
            _ name: String, _ help: String,
            _ value: (StatusReport.GroupReport) -> (bounds: [Double], counts: [UInt64], sum: Double)?
        ) {
            lines.append("# HELP farcopy_\(name) \(help)")
            lines.append("# TYPE farcopy_\(name) histogram")
            for (group, report) in groups {
                guard let (bounds, counts, sum) = value(report) else { continue }
                lines += Self.buckets(name, group, bounds, counts, sum: sum)
            }
        }
        histogram("hold_seconds", "Time that acknowledgements were held to form a point.") {
            $0.holdHistogram.map { (HoldHistogram.bounds, $0.counts, $0.sum) }
        }
        histogram("collision_wait_seconds", "Time that hosts' writes waited until an old image was sent.") {
            $0.collisions.map { ($0.waitBounds, $0.waitCounts, $0.waitSeconds) }
        }
        func collisions(_ value: @escaping (CollisionReport) -> Double) -> [(String, Double?)] {
            each { $0.collisions.map(value) }
        }
        family(
            "collision_held_bytes_total", "Bytes of old images that went to memory since the start.",
            collisions { Double($0.heldBytes) })
        family(
            "collision_memory_bytes", "Bytes of memory that old images take.", collisions { Double($0.memoryInUse) })
        family(
            "collision_memory_peak_bytes", "The most that old images have taken since the start.",
            collisions { Double($0.memoryPeak) })
        family(
            "collision_memory_limit_bytes", "Bytes of memory that old images may take.",
            collisions { Double($0.memoryLimit) })
        family(
            "collision_points_given_up_total", "Points that could not be held since the start.",
            collisions { Double($0.pointsGivenUp) })
        family(
            "group_alert", "1 for each alert that is on.",
            groups.flatMap { name, group -> [(String, Double?)] in
                (group.alerts ?? []).map {
                    ("group=\"\(name)\",alert=\"\($0.split(separator: ":").first.map(String.init) ?? "")\"", 1)
                }
            })
        family(
            "filesystem_used_ratio", "How full a file system is that the site writes to, from 0 to 1.",
            (status.fileSystems ?? []).map { ("path=\"\($0.path)\"", $0.usedRatio) })
        family(
            "group_state", "1 for the state that the group is in.",
            groups.map { ("group=\"\($0.key)\",state=\"\($0.value.state)\",role=\"\($0.value.role)\"", 1) })
        family(
            "volume_size_bytes", "Size of the volume.", volumes.map { ("volume=\"\($0.key)\"", Double($0.value.size)) })
        family(
            "volume_read_bytes", "Bytes read by clients.",
            volumes.map { ("volume=\"\($0.key)\"", Double($0.value.bytesRead)) })
        family(
            "volume_written_bytes", "Bytes written by clients.",
            volumes.map { ("volume=\"\($0.key)\"", Double($0.value.bytesWritten)) })
        return lines.joined(separator: "\n") + "\n"
    }

    /// - Parameter counts: for each bound, and for what is above the last.
    private static func buckets(
        _ name: String, _ group: String, _ bounds: [Double], _ counts: [UInt64], sum: Double
    ) -> [String] {
        var (lines, total): ([String], UInt64) = ([], 0)
        for (bound, count) in zip(bounds.map { "\($0)" } + ["+Inf"], counts) {
            total += count
            lines.append("farcopy_\(name)_bucket{group=\"\(group)\",le=\"\(bound)\"} \(total)")
        }
        lines.append("farcopy_\(name)_sum{group=\"\(group)\"} \(sum)")
        lines.append("farcopy_\(name)_count{group=\"\(group)\"} \(total)")
        return lines
    }
}
