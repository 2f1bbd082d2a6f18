// SeveralRemote.swift: a remote of the scenario `SeveralHosts`: one host's secondary volumes with what of them is flushed, recovery points in a
// chain, and the intake's session.
//
// A point has files of the volumes that had changed, and takes there what is overwritten after it; it is read through newer points' files, as
// the production's FlashCopies are. What a process has made of a chain is gone with it; a start makes it from the record.

import Groups

final class SeveralRemote: SeveralSite {
    let index: Int
    static let names = (0..<SeveralHost.volumes).map { "\($0)" }

    // On disk. What was there at first is no host's.
    private(set) var contents: [[Int]]
    private(set) var flushed: [[Int]]
    /// By point and volume: what was overwritten since.
    private(set) var files: [UInt64: [String: [Int: Int]]] = [:]

    // The process.
    private(set) var chain: [UInt64] = []
    private var made: (point: UInt64, volumes: [String])?
    private(set) var session: UInt64 = 0
    private(set) var writesUnderWay = 0
    /// Sessions, questions and failovers come one after the other.
    private var isEntered = false
    private var waiting: [() -> Void] = []
    private var sessions: UInt64 = 0
    private var order: UInt64 = 0

    /// Points up to this one were on a disk that is lost.
    private(set) var lostThrough: UInt64 = 0

    /// It leads a failover.
    var isLeading = false
    var failovers = FailoversUnderWay()
    /// By mistake, the one that is announced later.
    var unannounced: FailoverFlag?
    /// What the others have said to its failover.
    var lastHeard: [String: Heard] = [:]

    init(_ world: SeveralHosts, _ index: Int) {
        self.index = index
        contents = (0..<SeveralHost.volumes).map { _ in Array(repeating: -1, count: SeveralVolume.grainCount) }
        flushed = contents
        super.init(world, "remote \(index)", .secondary)
    }

    // MARK: Processes

    func start() {
        guard begin() else { return }
        (chain, made) = ([], nil)
        let named = record.points + (record.retired ?? [])
        for number in files.keys.sorted() {
            // Files that no record names go.
            guard let point = named.first(where: { $0.number == number }) else {
                files[number] = nil
                continue
            }
            files[number] = files[number]?.filter { point.hasFiles(of: $0.key) }
        }
        for point in named {
            for name in Self.names where point.hasFiles(of: name) && files[point.number]?[name] == nil {
                if record.points.contains(point) {
                    world.fail("\(name) of point \(point.number) has no files at a start")
                }
            }
        }
        chain = named.map(\.number).filter { files[$0] != nil }.sorted()
        leave()
    }

    func crash(powerLoss: Bool) {
        world.note("\(name) dies\(powerLoss ? ", with its power" : "")")
        world.figures.crashes += 1
        (session, writesUnderWay, isEntered, waiting, made, isLeading) = (0, 0, false, [], nil, false)
        if world.remotes.contains(where: { failovers.last(of: $0.name, now: world.now) != nil }) {
            world.forgetsFailover()
        }
        (failovers, unannounced) = (FailoversUnderWay(), nil)
        end()
        world.hosts[index].peerClosed()
        guard powerLoss else { return }
        for volume in contents.indices {
            for grain in contents[volume].indices where world.random.chance(50) {
                contents[volume][grain] = flushed[volume][grain]
            }
        }
        // What is there at the start is what stable storage holds.
        flushed = contents
    }

    /// Its process has ended; the next one finds an empty disk.
    func loseDisk() {
        lostThrough = world.hosts.map(\.saved.highestPoint).max()!
        world.note("\(name) loses its disk, and what it had up to point \(lostThrough)")
        exchange("\(name), anew after \(world.steps)")
        contents = contents.map { $0.map { _ in -1 } }
        (flushed, files) = (contents, [:])
    }

    /// It has the point, as far as the others must know.
    func has(_ point: UInt64) -> Bool {
        let newest = saved.points.last?.number ?? 0
        return newest >= point || saved.coordination?.prepared?.number == point || point <= lostThrough
    }

    /// What it is at, in words.
    var standing: String {
        let point = record.coordination?.prepared?.number ?? 0
        return
            "newest \(record.newestCommitted), prepared \(point), \(isEntered ? "busy" : "at rest"), \(waiting.count) wait"
    }

    // MARK: One after the other

    /// - Parameter body: is given what lets the next in.
    func enter(_ body: @escaping (@escaping () -> Void) -> Void) {
        let process = life
        waiting.append { [unowned self] in
            body { [unowned self] in
                guard process == life else { return }
                isEntered = false
                enterNext()
            }
        }
        enterNext()
    }

    private func enterNext() {
        guard !isEntered, !waiting.isEmpty else { return }
        isEntered = true
        waiting.removeFirst()()
    }

    /// An operation, in its turn.
    func run<Operation: Steps>(
        _ operation: Operation, done: @escaping (Result<Operation.Outcome, any Error>) -> Void
    ) {
        enter { [unowned self] leave in
            carryOut(operation) { result in
                leave()
                done(result)
            }
        }
    }

    // MARK: The intake

    func acceptSession(_ host: String, _ generations: [String], _ answer: @escaping (SessionReply?) -> Void) {
        if let refusal { return answer(refusal) }
        enter { [unowned self] leave in
            if let refusal {
                leave()
                return answer(refusal)
            }
            sessions += 1
            let number = UInt64(life) << 32 | sessions
            carryOut(IntakeSession(site: host, generations: generations, session: number)) { [unowned self] result in
                let reply = reply(to: result)
                leave()
                answer(reply)
            }
        }
    }

    private var refusal: SessionReply? {
        if let failover = record.failedOver {
            return .refused("it has failed over at \(failover.point)", passing: false)
        }
        if let point = record.undecided {
            return .refused("point \(point) is prepared, and not decided", passing: true)
        }
        return nil
    }

    private func reply(to result: Result<UInt64, any Error>) -> SessionReply {
        switch result {
        case .failure: .refused("its record cannot be written", passing: true)
        case .success(let session):
            .opened(
                PeerState(
                    session: session, site: name, lineage: record.lineage ?? "", volumeLineages: record.volumeLineages,
                    committed: record.points.last))
        }
    }

    /// Ends the session; what has begun of it comes to its end first.
    func fence(next: UInt64, done: @escaping () -> Void) {
        if session != 0 { world.hosts[index].peerClosed() }
        (session, made) = (0, nil)
        waitForWrites { [unowned self] in
            session = next
            done()
        }
    }

    private func waitForWrites(_ done: @escaping () -> Void) {
        guard writesUnderWay > 0 else { return done() }
        let process = life
        world.later { [unowned self] in if process == life { waitForWrites(done) } }
    }

    /// It has arrived; it is done a little later.
    /// What is prepared is what the volumes are when it is committed.
    var letsDataIn: Bool { record.undecided == nil }

    func write(_ volume: Int, _ grain: Int, _ content: Int, done: @escaping () -> Void) {
        writesUnderWay += 1
        let process = life
        world.later { [unowned self] in
            guard process == life else { return }
            writesUnderWay -= 1
            preserve(volume, grain)
            contents[volume][grain] = content
            done()
        }
    }

    private func preserve(_ volume: Int, _ grain: Int) {
        let name = Self.names[volume]
        guard let newest = chain.last(where: { files[$0]?[name] != nil }) else { return }
        if files[newest]?[name]?[grain] == nil { files[newest]?[name]?[grain] = contents[volume][grain] }
    }

    func flush(_ volume: Int) { if fault != .prepareUnflushed { flushed[volume] = contents[volume] } }

    // MARK: Points

    var survey: IntakeSurvey {
        let retired = (record.retired ?? []).map { point in
            (point.number, Self.names.filter { files[point.number]?[$0] != nil })
        }
        order += 1
        return IntakeSurvey(
            writesUnderWay: writesUnderWay, order: (record.points.last?.chainOrder ?? 0) + order,
            changed: Self.names.filter(hasChanged), retired: Dictionary(uniqueKeysWithValues: retired),
            at: Double(world.now) / 1e9)
    }

    private func hasChanged(_ name: String) -> Bool {
        guard let carrier = record.points.last.flatMap({ record.carrier(of: $0.number, name) }) else { return true }
        return files[carrier]?[name]?.isEmpty != true
    }

    func makePointFiles(_ plan: CommitPlan) {
        let names = Self.names.filter { plan.point.hasFiles(of: $0) }
        if let made, made.point == plan.point.number, made.volumes == names { return }
        made = (plan.point.number, names)
        guard fault != .makeFilesLater else { return }
        files[plan.point.number] = Dictionary(uniqueKeysWithValues: names.map { ($0, [:]) })
    }

    func dropPointFiles(_ number: UInt64) {
        guard made?.point == number else { return }
        made = nil
        if !chain.contains(number) { files[number] = nil }
    }

    func takePoint(_ plan: CommitPlan) {
        guard let made, made.point == plan.point.number else {
            return world.fail("the files of point \(plan.point.number) are not made before it is taken")
        }
        if fault == .makeFilesLater {
            files[made.point] = Dictionary(uniqueKeysWithValues: made.volumes.map { ($0, [:]) })
        }
        self.made = nil
        chain = (chain.filter { $0 != plan.point.number } + [plan.point.number]).sorted()
        leave()
    }

    /// What carries no point that is kept leaves; what it has taken, older ones may need.
    private func leave() {
        guard !group.isUnsaved else { return }
        let kept = record.carriers(of: Self.names)
        for number in chain {
            for name in Self.names where files[number]?[name] != nil && kept[name]?.contains(number) != true {
                let taken = files[number]![name]!
                files[number]![name] = nil
                guard let older = chain.last(where: { $0 < number && files[$0]?[name] != nil }) else { continue }
                files[older]![name]!.merge(taken) { own, _ in own }
            }
            if files[number]?.isEmpty == true { files[number] = nil }
        }
        chain.removeAll { files[$0] == nil }
    }

    /// What a recovery point is; nil when this remote has not got it.
    func read(_ point: UInt64) -> [[Int]]? {
        guard record.points.contains(where: { $0.number == point }) else { return nil }
        return contents.indices.map { volume in
            let name = Self.names[volume]
            guard let carrier = record.carrier(of: point, name) else { return [] }
            let readThrough = chain.filter { $0 >= carrier }.compactMap { files[$0]?[name] }
            return contents[volume].indices.map { grain in
                readThrough.lazy.compactMap { $0[grain] }.first ?? contents[volume][grain]
            }
        }
    }

    /// Whether a power loss now would leave what is there.
    var isFlushed: Bool { flushed == contents }
}
