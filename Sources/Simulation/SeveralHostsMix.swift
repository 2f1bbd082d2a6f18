// SeveralHostsMix.swift: what may happen in the scenario `SeveralHosts`, and how often, which each seed draws for itself.

import Groups

enum SeveralHappening: CaseIterable {
    case write, apply, acknowledge, reactor, thread, arrive, tick, request
    case crash, restart, cut, loseLink, losePoint, busy, suspend, resume, nonsense, failOver, loseDisk
    var weight: Int {
        switch self {
        case .write: 200
        case .apply, .acknowledge: 300
        case .reactor: 900
        case .thread: 1200
        case .arrive: 2400
        case .tick: 300
        case .request: 20
        case .crash: 2
        case .restart: 120
        case .cut: 2
        case .loseLink: 2
        case .losePoint: 1
        case .busy: 1
        case .suspend: 1
        case .resume: 40
        case .nonsense: 4
        case .failOver: 10
        case .loseDisk: 1
        }
    }
    var varies: [Int] {
        switch self {
        case .crash, .cut, .loseLink, .losePoint, .busy, .suspend, .nonsense: [0, 1, 4]
        case .failOver: [0, 0, 1, 3]
        case .loseDisk: [0, 0, 1]
        default: [1, 2]
        }
    }
}

struct SeveralHostsMix {
    let weights: [Int]
    /// Of a hundred calls so many are lost, on either way, come twice, take long, or are not waited for.
    let losing: Int
    let repeating: Int
    let slow: Int
    let impatient: Int
    /// One of so many saves fails; 0 = none.
    let failingSaves: Int
    /// One action in so many is a process's last; 0 = none.
    let dying: Int
    /// Of a thousand steps so many take long.
    let pausing: Int
    /// Of a hundred failovers so many are without the others.
    let alone: Int
    /// To a point that is named.
    let naming: Int
    /// Remotes know from their configuration who else there is.
    let knowsFellows: Bool
    /// The coordinator does not know the remotes of other hosts, and asks these.
    let asksThroughHosts: Bool
    let interval: Interval
    let mode: Mode
    let keep: Retention

    init(_ generator: inout SeededGenerator) {
        weights = SeveralHappening.allCases.map { $0.weight * $0.varies[generator.below($0.varies.count)] }
        losing = [0, 2, 10][generator.below(3)]
        repeating = [0, 5, 30][generator.below(3)]
        slow = [0, 3, 20][generator.below(3)]
        impatient = [0, 2, 10][generator.below(3)]
        failingSaves = [0, 30, 8][generator.below(3)]
        dying = [0, 1500, 200][generator.below(3)]
        pausing = [1, 2, 6][generator.below(3)]
        alone = [0, 0, 0, 20][generator.below(4)]
        naming = [0, 0, 30, 60][generator.below(4)]
        knowsFellows = generator.chance(50)
        asksThroughHosts = generator.chance(30)
        interval = [.continuous, .continuous, .every(80_000_000), .manual][generator.below(4)]
        mode = [.flashcopy, .globalMirror][generator.below(2)]
        keep = Retention(last: [1, 2, 4][generator.below(3)])
    }
}
