import Simulation
import Testing

@Test("seeds of every length break no rule", arguments: [UInt64(1), 7, 198, 306, 413, 624])
func seeds(seed: UInt64) throws {
    let world = World(seed: seed)
    try world.run(steps: 20_000, skipping: [])
    #expect(world.figures.commits > 0 || world.figures.crashes > 0)
}

@Test(
    "seeds of copies that broke a rule break none any more",
    arguments: [UInt64(1687), 10_825, 201_525, 403_785, 404_519])
func copySeeds(seed: UInt64) throws { try CopyWorld(seed: seed).run(steps: 20_000, skipping: []) }

@Test("one seed replays exactly")
func replay() throws {
    let worlds = [World(seed: 5), World(seed: 5)]
    for world in worlds { try world.run(steps: 5_000, skipping: []) }
    #expect(
        worlds[0].trace == worlds[1].trace && worlds[0].steps == worlds[1].steps
            && worlds[0].figures.commits == worlds[1].figures.commits)
}

@Test("coordinated points go every way, and break no rule")
func coordination() throws {
    var happened: [String: Int] = [:]
    for seed in UInt64(1)...1000 {
        let world = Coordination(seed: seed)
        try world.run(steps: 5_000, skipping: [])
        happened.merge(world.happened) { $0 + $1 }
    }
    for what in [
        "coordinator: committing → ending", "coordinator: committing → givingUp", "coordinator: preparing → givingUp",
        "coordinator: holding → givingUp", "coordinator: running → givingUp", "coordinator: givingUp → stopped",
        "host: formed → givingUp", "host: forming → givingUp", "host: drained → givingUp",
        "remote: asking → failedOver",
        "remote: asking → prepared", "remote: prepared → failedOver", "remote: checking → failedOver",
        "takes up: commit",
        "takes up: undecided", "a promise made void", "alone", "committed", "refuses(prepared: true)",
        "refuses(prepared: false)",
    ] { #expect(happened[what] != nil, "\(what) never happens") }
}

@Test("seeds of coordinated points that broke a rule break none any more", arguments: [UInt64(86), 14_478])
func coordinationSeeds(seed: UInt64) throws {
    try Coordination(seed: seed).run(steps: 5_000, skipping: [])
    let worlds = [Coordination(seed: seed), Coordination(seed: seed)]
    for world in worlds { try world.run(steps: 3_000, skipping: []) }
    #expect(worlds[0].trace == worlds[1].trace && worlds[0].steps == worlds[1].steps)
}

@Test("points of several hosts as the production forms them go every way, and break no rule")
func severalHosts() throws {
    var happened: [String: Int] = [:]
    for seed in UInt64(1)...300 {
        let world = SeveralHosts(seed: seed)
        try world.run(steps: 5_000, skipping: [])
        happened.merge(world.happened) { $0 + $1 }
    }
    for what in [
        "a failover succeeds", "a failover is refused", "a doubt is settled, forward", "a doubt is settled, back",
        "a hold expires", "a remote testifies committed", "a remote testifies refuses(prepared: true)",
    ] { #expect(happened[what] != nil, "\(what) never happens") }
}

@Test("seeds of several hosts that broke a rule break none any more", arguments: [UInt64(4), 13, 575, 3016, 22_696])
func severalHostsSeeds(seed: UInt64) throws {
    let worlds = [SeveralHosts(seed: seed), SeveralHosts(seed: seed)]
    for world in worlds { try world.run(steps: 5_000, skipping: []) }
    #expect(worlds[0].trace == worlds[1].trace && worlds[0].steps == worlds[1].steps)
}

@Test("a deliberate fault is seen")
func fault() {
    let caught = (UInt64(1)...20).contains { seed in
        do throws(SimulationFailure) {
            try World(seed: seed, fault: .skipFlushes).run(steps: 20_000, skipping: [])
            return false
        } catch {
            return true
        }
    }
    #expect(caught)
}

@Test("a failing seed becomes a short run that fails in the same way")
func shortest() {
    let (end, skipped) = CopyWorld.shortest(seed: 57, fault: .recordAfterChain, steps: 8_000)
    #expect(end - skipped.count < 1000)
    #expect(throws: SimulationFailure.self) {
        try CopyWorld(seed: 57, fault: .recordAfterChain).run(steps: end, skipping: skipped)
    }
}

@Test("operations on copies end every way")
func copyOperations() throws {
    var happened: [String: Int] = [:]
    for seed in UInt64(1)...150 {
        let world = CopyWorld(seed: seed)
        try world.run(steps: 4_000, skipping: [])
        happened.merge(world.happened) { $0 + $1 }
    }
    for name in ["TakeCopies", "TakeOutOfUse", "RetakeCopies", "RestoreVolumes", "WithdrawCopies"] {
        for volumes in [1, 2] {
            for end in ["done", "failed"] {
                #expect(happened["\(name) \(volumes) \(end)"] != nil, "\(name) of \(volumes) never ends so: \(end)")
            }
        }
    }
}
