import API
import Site
import Testing

private func use(_ path: String, _ percent: UInt64) -> FileSystemReport {
    FileSystemReport(path: path, usedBytes: percent << 20, sizeBytes: 100 << 20)
}

@Test("a file system is too full from 80 % on, until it is below 78 %, and each is told once")
func fullness() {
    var watch = SpaceWatch()
    var told: [String] = []
    for percent: UInt64 in [79, 80, 79, 78, 77, 79, 81, 81, 50] {
        let (began, over) = watch.take([use("/a", percent), use("/b", 10)])
        told += began.map { "\($0.path) \(percent)" } + over.map { "\($0.path) over \(percent)" }
        #expect(watch.alerts.count == watch.full.count)
    }
    #expect(told == ["/a 80", "/a over 77", "/a 81", "/a over 50"])
}

@Test("the words of an alert have path and figures; one whose path is gone is not on any more")
func alertWords() {
    var watch = SpaceWatch()
    _ = watch.take([use("/srv/state", 93)])
    #expect(watch.alerts == ["space: /srv/state: its file system is 93.0 % full: 93 of 100 MiB"])
    #expect(watch.take([]).over.isEmpty)
    #expect(watch.alerts.isEmpty && watch.full.isEmpty)
}

private let times: [(text: String, seconds: Double)] = [
    ("36h", 870_400), ("7d", 395_200), ("0s", 1_000_000), ("1970-01-02T00:00:00Z", 86400),
    ("1970-01-02T00:00:00.250Z", 86400.25),
]

@Test("times and ages", arguments: times)
func pointsInTime(text: String, seconds: Double) { #expect(pointInTime(text, now: 1_000_000) == seconds) }

@Test("what is neither", arguments: ["", "soon", "12", "-1h", "1970-13-02T00:00:00Z", "nand", "infd"])
func noPointsInTime(text: String) { #expect(pointInTime(text, now: 1_000_000) == nil) }
