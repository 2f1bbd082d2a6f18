// Simulate.swift: runs seeds of the simulation.
//
//   simulate [SEED=n | FIRST=n COUNT=n] [STEPS=n] [FAULT=name]     ends with 1 at the first seed that breaks a rule
//   simulate SEED=n WATCH=sector                               tells at each crash what holds that sector (CopyWorld)
//   simulate CATCH=all                                             ends with 1 unless every deliberate fault is caught

import Glibc
import Simulation

@main
struct Simulate {
    /// A deliberate fault counts as caught when one of this many seeds fails.
    static let seedsToCatch: UInt64 = 400

    static func main() {
        var first: UInt64 = 1
        var count: UInt64 = 200
        var steps = 20_000
        var fault: DeliberateFault?
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
            case "WATCH": CopyWorld.watching = Int(number(argument, value))
            case "CATCH": catchAll(steps: steps)
            default: misuse("unknown argument '\(argument)'")
            }
        }
        run(first..<first + count, steps: steps, fault: fault)
    }

    private static func misuse(_ text: String) -> Never {
        print("simulate: \(text)")
        exit(2)
    }

    private static func number(_ argument: String, _ value: String) -> UInt64 {
        guard let number = UInt64(value) else { misuse("'\(argument)' needs a number") }
        return number
    }

    /// Every scenario with every seed.
    private static func run(_ seeds: Range<UInt64>, steps: Int, fault: DeliberateFault?) {
        let scenarios: [any Scenario.Type] = fault.map { [$0.scenario] } ?? [World.self, CopyWorld.self]
        for scenario in scenarios { run(scenario, seeds, steps: steps, fault: fault) }
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
                + "\(sum.commits) points committed, \(sum.checks) reads compared, \(sum.crashes) crashes: no rule broken")
    }

    /// The shortest run of the seed that still fails.
    private static func explain<Kind: Scenario>(_ scenario: Kind.Type, _ seed: UInt64, _ steps: Int, _ fault: DeliberateFault?) {
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

    private static func catchAll(steps: Int) -> Never {
        var missed = false
        for fault in DeliberateFault.allCases {
            let caught = (1...seedsToCatch).first { seed in breaks(fault.scenario, seed, steps, fault) }
            print(
                "\(fault.rawValue): \(caught.map { "caught by seed \($0)" } ?? "NOT caught in \(seedsToCatch) seeds")")
            if caught == nil { missed = true }
        }
        exit(missed ? 1 : 0)
    }

    private static func breaks(_ scenario: any Scenario.Type, _ seed: UInt64, _ steps: Int, _ fault: DeliberateFault) -> Bool {
        do throws(SimulationFailure) {
            try scenario.init(seed: seed, fault: fault).run(steps: steps, skipping: [])
            return false
        } catch {
            return true
        }
    }
}
