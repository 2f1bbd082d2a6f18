// CoordinatorTable.swift: what a coordinator makes of each answer in each state. What is about an older point, or answers another process,
// is late before anybody looks here; what is about a newer point is impossible.
//
// Must be prevented:
//   an answer counts that belongs to a step before: it may have been under way for long, and come twice

extension Coordinator.State {
    package enum Kind: Int, CaseIterable, Sendable {
        case idle, makingReady, holding, running, draining, preparing, committing, ending, givingUp, stopped
    }

    package var kind: Kind {
        switch self {
        case .idle: .idle
        case .makingReady: .makingReady
        case .holding: .holding
        case .running: .running
        case .draining: .draining
        case .preparing: .preparing
        case .committing: .committing
        case .ending: .ending
        case .givingUp: .givingUp
        case .stopped: .stopped
        }
    }
}

extension Coordinator {
    package static func place(of answer: HostAnswer, in state: State) -> Place {
        let row: StaticString =
            switch answer {
            //               idle ready hold run drain prepare commit end giveUp stopped
            case .ready: "    l    H    l    l   l     l       l      l   l      l"
            case .formed: "   l    x    H    l   l     l       l      l   l      l"
            case .ran: "      l    x    x    H   H     l       l      l   l      l"
            case .drained: "  l    x    x    H   H     l       l      l   l      l"
            // From `prepare` on all of it is at the remotes, whatever becomes of a host.
            case .failed: "   l    H    H    H   H     l       l      l   l      l"
            case .gaveUp: "   l    H    H    H   H     l       l      l   H      l"
            case .ended: "    l    x    x    x   x     x       x      H   x      l"
            case .superseded: "H   H    H    H   H     H       H      H   H      H"
            }
        return Place(row, state.kind.rawValue)
    }

    package static func place(of answer: RemoteAnswer, in state: State) -> Place {
        let row: StaticString =
            switch answer {
            //               idle ready hold run drain prepare commit end giveUp stopped
            case .checking: " l    x    x    x   x     H       l      l   l      l"
            case .prepared: " l    x    x    x   x     H       l      l   l      l"
            case .committed: "l    x    x    x   x     x       H      l   H      l"
            case .refuses, .outOfOrder:
                "l    x    x    x   x     H       H      l   l      l"
            case .gone: "     l    x    x    x   x     x       H      l   l      l"
            case .dropped: "  l    x    x    x   x     x       x      x   H      l"
            // About no point: it may answer what was asked long ago.
            case .failedOver: "l   l    l    l   l     H       H      l   H      l"
            case .superseded: "H   H    H    H   H     H       H      H   H      H"
            }
        return Place(row, state.kind.rawValue)
    }
}

extension HostAnswer {
    /// The point that it is about.
    package var number: UInt64? {
        switch self {
        case .ready(let number), .formed(let number), .ran(let number), .drained(let number, _), .failed(let number, _),
            .gaveUp(let number), .ended(let number):
            number
        case .superseded: nil
        }
    }
}

extension RemoteAnswer {
    /// The point that it is about.
    package var number: UInt64? {
        switch self {
        case .checking(let number), .prepared(let number), .committed(let number), .refuses(let number, _),
            .outOfOrder(let number, _), .gone(let number), .dropped(let number):
            number
        case .failedOver, .superseded: nil
        }
    }
}
