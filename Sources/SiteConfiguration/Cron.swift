// Cron.swift: times of day in cron's syntax: minute, hour, day of month, month, day of week, in local time.

import Glibc

package struct CronSchedule: Sendable, Equatable {
    private var minutes: Set<Int>
    private var hours: Set<Int>
    private var days: Set<Int>
    private var months: Set<Int>
    private var weekdays: Set<Int>
    /// As in cron, a day must satisfy one of the two fields if both are restricted.
    private var anyDay: Bool
    private var anyWeekday: Bool

    /// Nil when it is no schedule.
    package init?(_ text: String) {
        let fields = text.split(separator: " ").map(String.init)
        guard fields.count == 5, let minutes = Self.field(fields[0], 0...59), let hours = Self.field(fields[1], 0...23),
            let days = Self.field(fields[2], 1...31), let months = Self.field(fields[3], 1...12),
            let weekdays = Self.field(fields[4], 0...7)
        else { return nil }
        self.minutes = minutes
        self.hours = hours
        self.days = days
        self.months = months
        self.weekdays = Set(weekdays.map { $0 % 7 })
        anyDay = fields[2] == "*"
        anyWeekday = fields[4] == "*"
    }

    /// "*", "5", "1-5", "*/10", "8-18/2", and lists of these with commas.
    private static func field(_ text: String, _ range: ClosedRange<Int>) -> Set<Int>? {
        var values: Set<Int> = []
        for part in text.split(separator: ",", omittingEmptySubsequences: false) {
            let halves = part.split(separator: "/", maxSplits: 1, omittingEmptySubsequences: false)
            guard let step = halves.count == 1 ? 1 : Int(halves[1]), step > 0 else { return nil }
            let bounds = halves[0].split(separator: "-", omittingEmptySubsequences: false).map { Int($0) }
            if halves[0] == "*" {
                values.formUnion(stride(from: range.lowerBound, through: range.upperBound, by: step))
            } else if bounds.count == 1, let value = bounds[0], range.contains(value) {
                values.formUnion(stride(from: value, through: halves.count == 1 ? value : range.upperBound, by: step))
            } else if bounds.count == 2, let low = bounds[0], let high = bounds[1], low <= high, range.contains(low),
                range.contains(high)
            {
                values.formUnion(stride(from: low, through: high, by: step))
            } else {
                return nil
            }
        }
        return values
    }

    private func includesDay(_ time: tm) -> Bool {
        guard months.contains(Int(time.tm_mon) + 1) else { return false }
        let day = days.contains(Int(time.tm_mday))
        let weekday = weekdays.contains(Int(time.tm_wday))
        return anyDay || anyWeekday ? day && weekday : day || weekday
    }

    /// The first time after `seconds` (since 1970) that the schedule names; nil when there is none in four years.
    package func next(after seconds: Double) -> Double? {
        var time = time_t(seconds) / 60 * 60 + 60
        let end = time + 4 * 366 * 86400
        while time < end {
            var parts = tm()
            localtime_r(&time, &parts)
            if !includesDay(parts) {
                // To the next hour, so that a change of the clocks is not jumped over.
                time += 3600 - time_t(parts.tm_min) * 60
            } else if !hours.contains(Int(parts.tm_hour)) {
                time += 3600 - time_t(parts.tm_min) * 60
            } else if minutes.contains(Int(parts.tm_min)) {
                return Double(time)
            } else {
                time += 60
            }
        }
        return nil
    }
}
