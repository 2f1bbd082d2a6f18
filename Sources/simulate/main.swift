// simulate: runs seeds of the simulation. Usage: simulate [SEED=n] [COUNT=n] [STEPS=n] [FAULT=name]

import Glibc
import Simulation

var first: UInt64 = 1
var count: UInt64 = 200
var steps = 4000
var fault: DeliberateFault?
for argument in CommandLine.arguments.dropFirst() {
    let parts = argument.split(separator: "=", maxSplits: 1).map(String.init)
    switch parts.count == 2 ? parts[0] : "" {
    case "SEED":
        first = UInt64(parts[1]) ?? 1
        count = 1
    case "FIRST": first = UInt64(parts[1]) ?? 1
    case "COUNT": count = UInt64(parts[1]) ?? 200
    case "STEPS": steps = Int(parts[1]) ?? 4000
    case "FAULT": fault = DeliberateFault(rawValue: parts[1])
    default: fatalError("unknown argument '\(argument)'; known: SEED, FIRST, COUNT, STEPS, FAULT")
    }
}
var commits = 0
var crashes = 0
var total = 0
for seed in first..<first + count {
    let world = World(seed: seed, fault: fault)
    do throws(SimulationFailure) {
        try world.run(steps: steps)
    } catch {
        for line in world.trace.suffix(count == 1 ? 400 : 30) { print(line) }
        print("seed \(seed) fails at step \(world.steps): \(error)")
        print("replay: make simulate SEED=\(seed) STEPS=\(steps)")
        exit(1)
    }
    commits += world.commits
    crashes += world.crashes
    total += world.steps
}
print("\(count) seeds from \(first), \(total) steps, \(commits) points committed, \(crashes) crashes: no rule broken")
