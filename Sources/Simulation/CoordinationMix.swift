// CoordinationMix.swift: what may happen in the scenario `Coordination`, and how often, which each seed draws for itself.

enum CoordinationHappening: CaseIterable {
    case write, apply, acknowledge, form, task, deliver, data, tick, request, tell, crash, restart, cut, failOver
    var weight: Int {
        switch self {
        case .write: 120
        case .apply, .acknowledge: 150
        case .form, .task: 600
        case .deliver: 1800
        case .data: 600
        case .tick: 200
        case .request: 120
        case .tell: 6
        case .crash: 3
        case .restart: 60
        case .cut: 6
        case .failOver: 30
        }
    }
    var varies: [Int] { [.tell, .crash, .cut, .failOver].contains(self) ? [0, 1, 4] : [1, 2] }
}

struct CoordinationMix {
    /// Remotes, and to which of them each host's data goes.
    static let layouts: [(remotes: Int, ofHosts: [Int])] = [
        (3, [0, 1, 2]), (3, [0, 1, 2]), (3, [0, 1, 2]), (2, [0, 0, 1]), (2, [0, 1]), (1, [0, 0, 0]), (1, [0]),
    ]
    let weights: [Int]
    /// Of a hundred messages so many are lost, come twice, take long.
    let losing: Int
    let repeating: Int
    let slow: Int
    /// One of so many saves fails; 0 = none.
    let failingSaves: Int
    /// One action in so many is a process's last; 0 = none.
    let dying: Int
    let failovers: Int
    /// Of a thousand steps so many take long.
    let pausing: Int

    init(_ generator: inout SeededGenerator) {
        weights = CoordinationHappening.allCases.map { $0.weight * $0.varies[generator.below($0.varies.count)] }
        losing = [0, 3, 15][generator.below(3)]
        repeating = [0, 10, 40][generator.below(3)]
        slow = [0, 5, 30][generator.below(3)]
        failingSaves = [0, 30, 6][generator.below(3)]
        dying = [0, 1500, 200][generator.below(3)]
        failovers = [0, 0, 1, 3][generator.below(4)]
        pausing = [1, 10, 30][generator.below(3)]
    }
}
