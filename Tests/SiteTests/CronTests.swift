import Glibc
import Site
import SiteConfiguration
import Testing

/// Seconds of a local time.
private func time(_ year: Int32, _ month: Int32, _ day: Int32, _ hour: Int32, _ minute: Int32) -> Double {
    var parts = tm()
    (parts.tm_year, parts.tm_mon, parts.tm_mday) = (year - 1900, month - 1, day)
    (parts.tm_hour, parts.tm_min, parts.tm_isdst) = (hour, minute, -1)
    return Double(mktime(&parts))
}

@Test("the next time of a schedule is the first that all fields name")
func theNextTimeIsTheFirstThatAllFieldsName() throws {
    let now = time(2026, 11, 21, 17, 30)  // a Saturday
    let cases: [(String, Double)] = [
        ("* * * * *", time(2026, 11, 21, 17, 31)),
        ("30 2 * * *", time(2026, 11, 22, 2, 30)),
        ("*/20 * * * *", time(2026, 11, 21, 17, 40)),
        ("0 8-18/5 * * *", time(2026, 11, 21, 18, 0)),
        ("15 4 * * 1", time(2026, 11, 23, 4, 15)),
        ("0 0 1 * *", time(2026, 12, 1, 0, 0)),
        ("0 0 29 2 *", time(2028, 2, 29, 0, 0)),
        ("0 12 1 * 0", time(2026, 11, 22, 12, 0)),
        ("5,50 17 * 11 7", time(2026, 11, 22, 17, 5)),
    ]
    for (text, expected) in cases {
        let schedule = try #require(CronSchedule(text))
        #expect(schedule.next(after: now) == expected, "\(text)")
    }
    #expect(CronSchedule("0 0 31 2 *")?.next(after: now) == nil)
}

@Test(
    "what is no schedule is refused",
    arguments: [
        "", "* * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "5-1 * * * *", "*/0 * * * *", "a * * * *",
        "1,,2 * * * *",
    ])
func whatIsNoScheduleIsRefused(_ text: String) {
    #expect(CronSchedule(text) == nil)
}
