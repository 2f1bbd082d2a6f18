// Simulate.swift: runs seeds of the simulation.
//
//   simulate [SEED=n | FIRST=n COUNT=n | HOURS=h] [STEPS=n] [SCENARIO=name] [FAULT=name]
//                                                              ends with 1 at the first seed that breaks a rule
//   simulate SEED=n WATCH=sector                               tells at each crash what holds that sector (CopyWorld)
//   simulate CATCH=all                                             ends with 1 unless every deliberate fault is caught

import Glibc
import Simulation

@main
struct Simulate {
    /// A deliberate fault counts as caught when one of this many seeds fails.
    static let seedsToCatch: UInt64 = 2000

    static func main() {
        var first: UInt64 = 1
        var count: UInt64 = 200
        var steps = 20_000
        var fault: DeliberateFault?
        var probed: DeliberateFault?
        var catches = false
        var hours: Double?
        var scenarios: [any Scenario.Type] = [World.self, CopyWorld.self, Coordination.self, SeveralHosts.self]
        for argument in CommandLine.arguments.dropFirst() {
            let parts = argument.split(separator: "=", maxSplits: 1).map(String.init)
            let value = parts.count == 2 ? parts[1] : ""
            switch parts[0] {
            case "SEED":
                first = number(argument, value)
                count = 1
            case "FIRST": first = number(argument, value)
            case "COUNT": count = number(argument, value)
            case "STEPS": steps = Int(number(argument, value))
            case "FAULT":
                fault = DeliberateFault(rawValue: value)
                if fault == nil { misuse("no fault '\(value)'; known: \(DeliberateFault.allCases.map(\.rawValue))") }
            case "HOURS":
                guard let value = Double(value), value > 0 else { misuse("'\(argument)' needs a number of hours") }
                hours = value
            case "SCENARIO":
                scenarios = scenarios.filter { "\($0)" == value }
                if scenarios.isEmpty {
                    misuse("no scenario '\(value)'; there are World, CopyWorld, Coordination and SeveralHosts")
                }
            case "WATCH": CopyWorld.watching = Int(number(argument, value))
            case "CATCH": catches = true
            case "PROBE": probed = DeliberateFault(rawValue: value)
            default: misuse("unknown argument '\(argument)'")
            }
        }
        if catches || fault?.needsOwnBuild == true || probed?.needsOwnBuild == true, !DeliberateFault.areBuiltIn {
            misuse(
                "this build makes no faults of the engine; `make simulate FAULT=…` or `make simulate CATCH=all` makes one that does"
            )
        }
        if let probed { probe(probed, steps: steps) }
        if catches { catchAll(steps: steps) }
        if let fault { scenarios = [fault.scenario] }
        if let hours {
            // Other seeds each time.
            first = UInt64(time(nil)) << 16
            let end = time(nil) + Int((hours * 3600).rounded())
            while time(nil) < end {
                for scenario in scenarios { run(scenario, first..<first + 100, steps: steps, fault: fault) }
                first += 100
            }
            return
        }
        for scenario in scenarios { run(scenario, first..<first + count, steps: steps, fault: fault) }
    }

    private static func misuse(_ text: String) -> Never {
        print("simulate: \(text)")
        exit(2)
    }

    private static func number(_ argument: String, _ value: String) -> UInt64 {
        guard let number = UInt64(value) else { misuse("'\(argument)' needs a number") }
        return number
    }

    private static func run<Kind: Scenario>(
        _ scenario: Kind.Type, _ seeds: Range<UInt64>, steps: Int, fault: DeliberateFault?
    ) {
        var sum = SimulationFigures()
        for seed in seeds {
            let world = Kind(seed: seed, fault: fault)
            do throws(SimulationFailure) {
                try world.run(steps: steps, skipping: [])
            } catch {
                print("\(scenario) seed \(seed) fails at step \(world.steps): \(error)")
                explain(scenario, seed, steps, fault)
                exit(1)
            }
            sum += world.figures
        }
        print(
            "\(scenario): \(seeds.count) seeds from \(seeds.lowerBound), \(sum.steps) steps, \(sum.operations) requests, "
                + "\(sum.commits) points committed (\(sum.unchanged) volumes unchanged), \(sum.checks) reads and \(sum.comparisons) points of both sites compared, \(sum.crashes) crashes: no rule broken"
        )
    }

    /// The shortest run of the seed that still fails.
    private static func explain<Kind: Scenario>(
        _ scenario: Kind.Type, _ seed: UInt64, _ steps: Int, _ fault: DeliberateFault?
    ) {
        let (end, skipped) = Kind.shortest(seed: seed, fault: fault, steps: steps)
        let world = Kind(seed: seed, fault: fault)
        do throws(SimulationFailure) {
            try world.run(steps: end, skipping: skipped)
        } catch {
            for line in world.trace { print(line) }
            print("\(end - skipped.count) of \(end) steps are enough: \(error)")
        }
        print("replay: make simulate SEED=\(seed) STEPS=\(steps)\(fault.map { " FAULT=\($0.rawValue)" } ?? "")")
    }

    /// Each fault in a process of its own: some are caught by an invariant of the engine, which ends the process.
    private static func catchAll(steps: Int) -> Never {
        var missed = false
        for fault in DeliberateFault.allCases {
            let caught = firstFailure(fault, steps)
            print(
                "\(fault.rawValue): \(caught.map { "caught by seed \($0)" } ?? "NOT caught in \(seedsToCatch) seeds")")
            if caught == nil { missed = true }
        }
        exit(missed ? 1 : 0)
    }

    private static func firstFailure(_ fault: DeliberateFault, _ steps: Int) -> UInt64? {
        let command = "'\(CommandLine.arguments[0])' PROBE=\(fault.rawValue) STEPS=\(steps) 2>/dev/null"
        guard let child = popen(command, "r") else { misuse("cannot start \(command)") }
        var seed: UInt64?
        var line = [CChar](repeating: 0, count: 64)
        while fgets(&line, Int32(line.count), child) != nil {
            seed =
                UInt64(
                    String(decoding: line.prefix { $0 != 0 && $0 != 10 }.map { UInt8(bitPattern: $0) }, as: UTF8.self))
                ?? seed
        }
        return pclose(child) == 0 ? nil : seed
    }

    /// Prints each seed before it runs; ends with 1 at the first that breaks a rule.
    private static func probe(_ fault: DeliberateFault, steps: Int) -> Never {
        for seed in 1...seedsToCatch {
            print(seed)
            fflush(nil)
            do throws(SimulationFailure) {
                try fault.scenario.init(seed: seed, fault: fault).run(steps: steps, skipping: [])
            } catch {
                exit(1)
            }
        }
        exit(0)
    }
}
