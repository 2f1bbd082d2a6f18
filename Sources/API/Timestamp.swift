// Timestamp.swift: how times are shown.

import Glibc
import Groups

/// RFC 3339 in UTC with milliseconds.
package func timestamp(_ seconds: Double) -> String {
    guard (-PointRecord.latestTime...PointRecord.latestTime).contains(seconds) else { return "?" }
    var whole = time_t(seconds.rounded(.down))
    var parts = tm()
    gmtime_r(&whole, &parts)
    func two(_ value: Int32) -> String { value < 10 ? "0\(value)" : "\(value)" }
    let milliseconds = Int(((seconds - seconds.rounded(.down)) * 1000).rounded(.down))
    let fraction = String(repeating: "0", count: 3 - String(milliseconds).count) + String(milliseconds)
    return "\(1900 + parts.tm_year)-\(two(parts.tm_mon + 1))-\(two(parts.tm_mday))T"
        + "\(two(parts.tm_hour)):\(two(parts.tm_min)):\(two(parts.tm_sec)).\(fraction)Z"
}
