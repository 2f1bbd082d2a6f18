// Simulate.swift: runs seeds of the simulation.
//
//   simulate [SEED=n | FIRST=n COUNT=n] [STEPS=n] [FAULT=name]     ends with 1 at the first seed that breaks a rule
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

    private static func run(_ seeds: Range<UInt64>, steps: Int, fault: DeliberateFault?) {
        var (commits, crashes, total, checks) = (0, 0, 0, 0)
        for seed in seeds {
            let world = World(seed: seed, fault: fault)
            do throws(SimulationFailure) {
                try world.run(steps: steps)
            } catch {
                for line in world.trace.suffix(seeds.count == 1 ? 400 : 30) { print(line) }
                print("seed \(seed) fails at step \(world.steps): \(error)")
                print("replay: make simulate SEED=\(seed) STEPS=\(steps)")
                exit(1)
            }
            commits += world.commits
            crashes += world.crashes
            checks += world.checks
            total += world.steps
        }
        print(
            "\(seeds.count) seeds from \(seeds.lowerBound), \(total) steps, \(commits) points committed, "
                + "\(checks) points read in full, \(crashes) crashes: no rule broken")
    }

    private static func catchAll(steps: Int) -> Never {
        var missed = false
        for fault in DeliberateFault.allCases {
            let caught = (1...seedsToCatch).first { seed in
                do throws(SimulationFailure) {
                    try World(seed: seed, fault: fault).run(steps: steps)
                    return false
                } catch {
                    return true
                }
            }
            print(
                "\(fault.rawValue): \(caught.map { "caught by seed \($0)" } ?? "NOT caught in \(seedsToCatch) seeds")")
            if caught == nil { missed = true }
        }
        exit(missed ? 1 : 0)
    }
}
