import Glibc
import Groups
import Site
import SiteConfiguration
import Testing

private let good = """
    [site]
    name = "east"
    state = "/var/lib/farcopy"
    control = ["unix:/run/farcopy/control.sock", "127.0.0.1:7433"]

    [nbd]
    listen = ["unix:/run/farcopy/nbd.sock", "[::1]:10809"]

    [volumes.orders]
    path = "/srv/orders.img"
    size = "10GiB"

    [volumes.orders-wal]
    path = "/dev/vg/wal"

    [groups.shop]
    volumes = ["orders", "orders-wal"]
    role = "primary"
    peer = "west"
    mode = "flashcopy"
    interval = "0s"
    keep = 3

    [peers.west]
    nbd = "west.example:10809"
    control = "unix:/run/farcopy-west/control.sock"
    """

@Test("a whole file is understood")
func wholeFile() throws {
    let configuration = try Configuration(text: good, path: "site.toml")
    #expect(configuration.site == "east" && configuration.volumes.map(\.name) == ["orders", "orders-wal"])
    #expect(configuration.volumes[0].size == 10 << 30 && configuration.volumes[1].size == nil)
    #expect(configuration.groups[0].interval == .continuous && configuration.groups[0].keep == Retention(last: 3))
    #expect(configuration.peers["west"]?.nbd == .tcp(host: "west.example", port: 10809))
    #expect(configuration.nbd.listen[1] == .tcp(host: "::1", port: 10809))
}

@Test(
    "errors name file, line and key",
    arguments: [
        ("keep = 3", "keeps = 3", "site.toml:22: unknown key 'groups.shop.keeps'"),
        ("size = \"10GiB\"", "size = \"ten\"", "site.toml:11: volumes.orders.size is 'ten'"),
        ("keep = 3", "keep = 3\nallow_clients = [\"db1\"]", "site.toml:23: groups.shop.allow_clients needs nbd.tls"),
        (
            "keep = 3", "keep = 3\nallow_addresses = [\"10.0.0.0/99\"]",
            "site.toml:23: groups.shop.allow_addresses holds"
        ),
        ("interval = \"0s\"", "interval = \"5 parsecs\"", "site.toml:21: groups.shop.interval"),
        ("[nbd]", "targets = [\"backup\"]\n[nbd]", "site.toml:6: site.targets must hold absolute paths"),
        ("[volumes.orders]", "[volumes.\"a/b\"]", "has the name 'a/b'"),
        ("role = \"primary\"", "", "site.toml:16: groups.shop.role is missing"),
        ("nbd = \"west.example:10809\"", "nbd = \"west.example\"", "site.toml:25: peers.west.nbd"),
        ("\"flashcopy\"", "\"metro\"", "groups.shop.mode is 'metro'; it must be one of 'flashcopy', 'global-mirror'"),
        (
            "keep = 3", "keep = 3\ncollision = \"hold-image\"",
            "groups.shop.collision is for groups with mode = \"global-mirror\""
        ),
        (
            "\"flashcopy\"", "\"global-mirror\"\ncollision_memory = \"300MiB\"",
            "groups.shop.collision_memory must be a power of two"
        ),
        (
            "\"flashcopy\"", "\"global-mirror\"\ncollision = \"drop\"",
            "groups.shop.collision is 'drop'; it must be 'hold-image' or 'send-first'"
        ),
        (
            "\"flashcopy\"", "\"global-mirror\"\nmax_collision_wait = \"1min\"",
            "site.toml:21: groups.shop.max_collision_wait"
        ),
    ])
func errors(old: String, new: String, expected: String) {
    #expect {
        _ = try Configuration(text: good.replacing(old, with: new), path: "site.toml")
    } throws: { "\($0)".contains(expected) }
}

@Test("what mode global-mirror does with collisions, and what it does if nothing is said")
func collisionEntries() throws {
    func collisions(_ lines: String) throws -> Configuration.CollisionEntry {
        let group = try Configuration(text: good.replacing("\"flashcopy\"", with: lines), path: "site.toml").groups[0]
        #expect(group.mode == .globalMirror)
        return group.collisions
    }
    let plain = try collisions("\"global-mirror\"")
    #expect(plain.policy == "hold-image" && plain.memory == 256 << 20 && plain.rules.longestWait == 500_000_000)
    let told = try collisions(
        """
        "global-mirror"
        collision = "send-first"
        collision_memory = "1MiB"
        max_collision_wait = "20ms"
        """)
    #expect(told.rules.sendsFirst && told.memory == 1 << 20 && told.rules.longestWait == 20_000_000)
}

@Test("sizes")
func sizes() {
    #expect(parseSize("4096") == 4096 && parseSize("1.5KiB") == 1536 && parseSize("2TiB") == 2 << 40)
    for wrong in ["", "x", "-1KiB", "99999999999PiB", "1kb", "nanKiB"] { #expect(parseSize(wrong) == nil) }
}

private struct Sample: VersionedRecord {
    static let currentFormat = 3
    var format = currentFormat
    var words: [String]
}

@Test("a record of a newer version is refused, and named")
func newerRecord() throws {
    let path = "/tmp/farcopy-newer-\(getpid())"
    defer { unlink(path) }
    var none: Sample?
    try DurableRecord<Sample>(path: path, value: &none).save(Sample(format: 4, words: []))
    #expect {
        var found: Sample?
        _ = try DurableRecord<Sample>(path: path, value: &found)
    } throws: { "\($0)".contains("written by a newer farcopy (format 4") }
}

@Test("a record survives a torn write of either copy, and says so when both are broken")
func durableRecord() throws {
    let path = "/tmp/farcopy-record-\(getpid())"
    defer { unlink(path) }
    var value: Sample?
    let record = try DurableRecord<Sample>(path: path, value: &value)
    #expect(value == nil)
    for number in 1...4 { try record.save(Sample(words: ["value", "\(number)"])) }
    func broken(_ offsets: [Int]) throws -> [String]? {
        let file = fopen(path, "r+")!
        for offset in offsets {
            fseek(file, offset, SEEK_SET)
            fputc(0x7F, file)
        }
        fclose(file)
        var found: Sample?
        _ = try DurableRecord<Sample>(path: path, value: &found)
        return found?.words
    }
    #expect(try broken([]) == ["value", "4"])
    #expect(try broken([36]) == ["value", "3"], "the newest copy is torn, the one before counts")
    #expect(throws: Refusal.self) { _ = try broken([(256 << 10) + 36]) }
}

private struct DiskFull: Error {}

/// A disk that is full, or slow: saves end when they are told to.
private actor Disk {
    var stored = ["one"]
    var isFull = false
    var isSlow = false
    private var waiting: [CheckedContinuation<Void, Never>] = []
    let kept: KeptRecord<Sample>

    init() {
        let box = Box()
        kept = KeptRecord(Sample(words: ["one"])) { value in try await box.disk!.write(value.words) }
        self.box = box
        box.disk = self
    }

    private let box: Box
    private final class Box: @unchecked Sendable {
        // Safe because: set once, before the first save.
        weak var disk: Disk?
    }

    func write(_ words: [String]) async throws {
        if isSlow { await withCheckedContinuation { waiting.append($0) } }
        if isFull { throw DiskFull() }
        stored = words
    }

    func set(full: Bool = false, slow: Bool = false) { (isFull, isSlow) = (full, slow) }
    var writes: Int { waiting.count }
    func endWrite() { waiting.removeFirst().resume() }

    var words: [String] { kept.value.words }
    var isUnsaved: Bool { kept.isUnsaved }
    func add(_ word: String) async throws { try await kept.amend { $0.words.append(word) } }
    func happen(_ word: String) { kept.acknowledge { $0.words.append(word) } }
    func settle() async throws { try await kept.settle() }
}

@Test("a record in memory never says what the disk does not; what happened counts, and is saved later")
func keptRecord() async throws {
    let disk = Disk()
    try await disk.add("two")
    #expect(await disk.words == ["one", "two"])
    #expect(await disk.stored == ["one", "two"])
    #expect(await !disk.isUnsaved)
    await disk.set(full: true)
    await #expect(throws: DiskFull.self) { try await disk.add("three") }
    #expect(await disk.words == ["one", "two"], "nothing has changed")
    #expect(await disk.isUnsaved, "the file may say otherwise")
    await #expect(throws: DiskFull.self) { try await disk.settle() }
    await disk.happen("happened")
    #expect(await disk.words == ["one", "two", "happened"])
    #expect(await disk.isUnsaved)
    await disk.set()
    try await disk.settle()
    #expect(await disk.stored == ["one", "two", "happened"])
    #expect(await !disk.isUnsaved)
}

@Test("what happens during a save is not lost with it, and saves come one after the other")
func keptRecordOnASlowDisk() async throws {
    let disk = Disk()
    await disk.set(slow: true)
    let adds = Task { try await disk.add("two") }
    while await disk.writes == 0 { await Task.yield() }
    await disk.happen("happened")
    let settles = Task { try await disk.settle() }
    let addsMore = Task { try await disk.add("three") }
    for _ in 0..<100 { await Task.yield() }
    #expect(await disk.writes == 1, "a save waits for the one before")
    #expect(await disk.words == ["one", "happened"], "what is not saved is not there")
    await disk.endWrite()
    try await adds.value
    #expect(await disk.words == ["one", "happened", "two"])
    #expect(await disk.stored == ["one", "two"])
    #expect(await disk.isUnsaved, "the file does not say what has happened")
    for _ in 0..<2 {
        while await disk.writes == 0 { await Task.yield() }
        await disk.endWrite()
        for _ in 0..<100 { await Task.yield() }
    }
    try await settles.value
    try await addsMore.value
    #expect(await disk.stored == disk.words)
    #expect(await disk.words.sorted() == ["happened", "one", "three", "two"])
    #expect(await !disk.isUnsaved)
}
