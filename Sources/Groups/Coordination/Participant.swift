// Participant.swift: a host's part in a point of several hosts; the coordinator's own host has one as well.
//
//   make ready → hold and form → (run) let go → drain → end
//
// The only host of a group lets go by itself when all of its volumes have formed.
//
// Must be prevented:
//   a write is held past the deadline, whatever is lost
//   a host says that it let go because of `run` when it did so by itself
//   a point is formed anew under a number that was used: an old `form` and `run` would send other data for it
//   a point that a crash has left half formed goes on, or what it took from the bitmaps is forgotten: it is given up at the start, as is
//     one that a volume does not hold any more
//   a coordinator's process that has been followed by another is obeyed
//   it is promised that nothing is left of a point (`gaveUp`) before that is so, and so after a crash

package struct ParticipantRecord: Equatable, Sendable, Codable {
    /// The highest that was heard.
    package internal(set) var epoch: UInt64 = 0
    /// The last point that was, or is not to be, formed here.
    package internal(set) var number: UInt64 = 0
    package internal(set) var point = Point.none
    /// What has become of the point `number` here.
    package enum Point: String, Equatable, Sendable, Codable {
        /// Nothing is left of it, or was ever.
        case none
        /// It may be half formed.
        case forming
        /// Every volume has formed it, and this host let go because every host had.
        case held
    }
    package init(epoch: UInt64 = 0, number: UInt64 = 0, point: Point = .none) {
        (self.epoch, self.number, self.point) = (epoch, number, point)
    }

    /// - Throws: when this cannot come after `previous`.
    package func check(after previous: ParticipantRecord) throws(IllegalCoordination) {
        guard epoch >= previous.epoch, number >= previous.number else {
            throw IllegalCoordination(
                "point \(previous.number) of epoch \(previous.epoch) would be forgotten for \(number) of \(epoch)")
        }
        guard number > previous.number || point == .none || point == previous.point || previous.point == .forming else {
            throw IllegalCoordination("point \(number) was \(previous.point) here, and cannot be \(point) next")
        }
    }
}

package struct Participant: Sendable {
    package enum Event: Equatable, Sendable {
        case tick
        case request(Stamped<HostRequest>)
        // What became of actions.
        case madeReady(UInt64)
        /// A volume cannot form a point now.
        case notReady(UInt64, String)
        /// Every volume has formed; of one that forms at once, all let go together then.
        case formed(UInt64)
        /// All of it is at the remote, flushed.
        case drained(UInt64)
        /// A volume could not hold it, or its data could not be read.
        case lost(UInt64, String)
        /// Its bits are merged back.
        case gaveUp(UInt64)
    }

    package enum Action: Equatable, Sendable {
        case answer(Stamped<HostAnswer>)
        /// Make the targets and bitmaps of the point.
        case makeReady(UInt64)
        /// Hold acknowledgements and form on every volume, at once.
        case holdAndForm(UInt64)
        /// The same, and let go when all have formed; whoever does it keeps to the deadline (`lost`).
        case formAtOnce(UInt64)
        /// Acknowledgements go.
        case letGo(UInt64)
        /// Send what it has to send, as the bitmaps say: some of it may be at the remote already. Where that is all, nobody is asked: a remote
        /// that has prepared the point lets nothing in.
        case drain(UInt64)
        /// Merge its bits back, however far it is; nothing of it is sent any more.
        case giveUp(UInt64)
        case end(UInt64)
        /// The coordinator said what cannot be: nothing has changed.
        case contradiction(String)
    }

    package enum State: Equatable, Sendable {
        case idle
        case makingReady(UInt64)
        case ready(UInt64)
        /// Hosts are held until that time at the latest; nil = it forms at once.
        case forming(UInt64, until: UInt64?)
        case formed(UInt64, until: UInt64)
        case draining(UInt64)
        case drained(UInt64)
        case givingUp(UInt64)
    }

    package private(set) var record: ParticipantRecord
    package private(set) var state = State.idle
    /// The file may hold another record than this: no answer goes before it is saved.
    package private(set) var isUnsaved = false
    private let maxHold: UInt64

    /// - Parameter record: as the last process left it.
    package init(_ settings: Coordinator.Settings, record: ParticipantRecord) {
        maxHold = settings.maxCoordination
        self.record = record
    }

    /// - Parameter isHeld: every volume holds the point that the record says is held.
    package mutating func start(isHeld: Bool) -> Turn<Action> {
        switch record.point {
        case .none: return Turn()
        case .held where isHeld:
            state = .draining(record.number)
            return Turn([.drain(record.number)])
        case .forming, .held:
            state = .givingUp(record.number)
            return Turn([.giveUp(record.number)])
        }
    }

    package mutating func wasSaved() { isUnsaved = false }

    package mutating func saveFailed() -> Turn<Action> {
        switch state {
        case .makingReady:
            // Nothing of the point was begun, and its number is not used again.
            state = .idle
            return Turn()
        case .draining(let number):
            // That it let go was not said.
            state = .givingUp(number)
            return Turn([.giveUp(number)])
        case .idle, .ready, .forming, .formed, .drained, .givingUp: return Turn()
        }
    }

    /// When `tick` must come at the latest, since hosts are held; nil = no need.
    package var wakeAt: UInt64? {
        switch state {
        case .forming(_, let until): until
        case .formed(_, let until): until
        case .idle, .makingReady, .ready, .draining, .drained, .givingUp: nil
        }
    }

    // MARK: Events

    package mutating func handle(_ event: Event, now: UInt64) -> Turn<Action> {
        let release = letGoInTime(now)
        switch event {
        case .tick: return release
        case .request(let request):
            guard request.epoch >= record.epoch else {
                let answer = Stamped(epoch: request.epoch, HostAnswer.superseded(by: record.epoch))
                return release + Turn([.answer(answer)])
            }
            if request.epoch > record.epoch { (record.epoch, isUnsaved) = (request.epoch, true) }
            return release + carryOut(request.body, now)
        case .madeReady(let number), .notReady(let number, _), .formed(let number), .drained(let number),
            .lost(let number, _), .gaveUp(let number):
            return release + own(event, number)
        }
    }

    /// A host's write is never held past the deadline.
    private mutating func letGoInTime(_ now: UInt64) -> Turn<Action> {
        switch state {
        case .forming(let number, let until?), .formed(let number, let until):
            guard now >= until else { return Turn() }
            return fail(number, "it let go by itself")
        case .forming(_, nil), .idle, .makingReady, .ready, .draining, .drained, .givingUp: return Turn()
        }
    }

    private mutating func carryOut(_ request: HostRequest, _ now: UInt64) -> Turn<Action> {
        if request.number < record.number { return older(request) }
        if request.number > record.number { return begin(request) }
        if let turn = unhandled(Self.place(of: request, in: state), request) { return turn }
        switch (state, request) {
        case (.idle, .end(let number)): return answer(.ended(number))
        case (.idle, .makeReady(let number)), (.idle, .form(let number)), (.idle, .formAtOnce(let number)),
            (.idle, .run(let number)), (.idle, .giveUp(let number)):
            return answer(.gaveUp(number))
        case (.ready(let number), .makeReady): return answer(.ready(number))
        case (.ready(let number), .form):
            state = .forming(number, until: now + maxHold)
            return Turn([.holdAndForm(number)])
        case (.ready(let number), .formAtOnce):
            state = .forming(number, until: nil)
            return Turn([.formAtOnce(number)])
        case (.formed(let number, _), .form): return answer(.formed(number))
        case (.formed(let number, _), .run): return Turn([.letGo(number)]) + hold(number)
        case (.draining(let number), .run), (.draining(let number), .formAtOnce): return answer(.ran(number))
        case (.drained(let number), .run), (.drained(let number), .formAtOnce): return answer(.drained(number))
        case (.drained(let number), .end):
            state = .idle
            record.point = .none
            return Turn([.end(number)]) + answer(.ended(number))
        case (_, .giveUp(let number)): return giveUp(number)
        default: return contradiction(request)
        }
    }

    /// Nothing is left here of a point before the last: a coordinator that takes up long after may still have to hear it.
    private func older(_ request: HostRequest) -> Turn<Action> {
        if case .end(let number) = request { return answer(.ended(number)) }
        return answer(.gaveUp(request.number))
    }

    /// Of a point that was not heard of before.
    private mutating func begin(_ request: HostRequest) -> Turn<Action> {
        if let turn = unhandled(Self.place(ofNewer: request, in: state), request) { return turn }
        // The others have gone on without this host: whatever became of its point, to send it once more is safe.
        if state != .idle { return giveUp(record.number) }
        switch request {
        case .makeReady(let number):
            (record.number, record.point, isUnsaved) = (number, .forming, true)
            state = .makingReady(number)
            return .saved(then: [.makeReady(number)])
        case .giveUp(let number):
            // A `makeReady` of it may still be under way.
            (record.number, record.point, isUnsaved) = (number, .none, true)
            return answer(.gaveUp(number))
        case .form, .formAtOnce, .run, .end: return contradiction(request)
        }
    }

    private mutating func own(_ event: Event, _ number: UInt64) -> Turn<Action> {
        guard number == record.number else { return contradiction(event) }
        if let turn = unhandled(Self.place(of: event, in: state), event) { return turn }
        switch (state, event) {
        case (.makingReady, .madeReady):
            state = .ready(number)
            return answer(.ready(number))
        case (.makingReady, .notReady(_, let reason)): return fail(number, reason)
        case (.forming(_, let until?), .formed):
            state = .formed(number, until: until)
            return answer(.formed(number))
        case (.forming(_, nil), .formed): return hold(number)
        case (.draining, .drained):
            state = .drained(number)
            return answer(.drained(number))
        case (_, .lost(_, let reason)): return fail(number, reason)
        case (.givingUp, .gaveUp):
            state = .idle
            record.point = .none
            return answer(.gaveUp(number))
        default: return contradiction(event)
        }
    }

    // MARK: What is said

    private mutating func fail(_ number: UInt64, _ reason: String) -> Turn<Action> {
        giveUp(number) + answer(.failed(number, reason))
    }

    /// It waits for nobody's save: more is sent than must be, never less.
    private mutating func giveUp(_ number: UInt64) -> Turn<Action> {
        let isHeld = wakeAt != nil
        state = .givingUp(number)
        return Turn((isHeld ? [.letGo(number)] : []) + [.giveUp(number)])
    }

    /// Every host has formed it, and this one lets go, or has.
    private mutating func hold(_ number: UInt64) -> Turn<Action> {
        state = .draining(number)
        (record.point, isUnsaved) = (.held, true)
        return .saved(then: [.answer(Stamped(epoch: record.epoch, .ran(number))), .drain(number)])
    }

    private func answer(_ body: HostAnswer) -> Turn<Action> {
        let action = Action.answer(Stamped(epoch: record.epoch, body))
        return isUnsaved ? .saved(then: [action]) : Turn([action])
    }

    /// - Returns: nil where it is handled.
    private func unhandled(_ place: Place, _ event: some Any) -> Turn<Action>? {
        switch place {
        case .handled: nil
        case .late: Turn()
        case .impossible: contradiction(event)
        }
    }

    private func contradiction(_ event: some Any) -> Turn<Action> {
        Turn([.contradiction("'\(event)' cannot come while '\(state.kind)'")])
    }
}

// MARK: Places

extension Participant.State {
    package enum Kind: Int, CaseIterable, Sendable {
        case idle, makingReady, ready, forming, formed, draining, drained, givingUp
    }

    package var kind: Kind {
        switch self {
        case .idle: .idle
        case .makingReady: .makingReady
        case .ready: .ready
        case .forming: .forming
        case .formed: .formed
        case .draining: .draining
        case .drained: .drained
        case .givingUp: .givingUp
        }
    }
}

extension Participant {
    /// Of the point that the record names last. What is about an older one is late; about a newer one see `begin`.
    package static func place(of request: HostRequest, in state: State) -> Place {
        let row: StaticString =
            switch request {
            //              idle making ready forming formed draining drained givingUp
            case .makeReady: "H   l      H     l       l      l        l       l"
            case .form: "     H   x      H     l       H      l        l       l"
            case .formAtOnce: "H  x      H     l       x      H        H       l"
            case .run: "      H   x      x     x       H      H        H       l"
            case .giveUp: "   H   H      H     H       H      H        H       l"
            // Asked again, since it has given up after a crash: `idle`, or will be; or it drains again, and has nothing left to send.
            case .end: "      H   x      x     x       x      l        H       l"
            }
        return Place(row, state.kind.rawValue)
    }

    /// Of a point that was not heard of before. The coordinator goes on to it when all have answered what became of the last one, or
    /// without those who are out of reach.
    package static func place(ofNewer request: HostRequest, in state: State) -> Place {
        let row: StaticString =
            switch request {
            //                        idle making ready forming formed draining drained givingUp
            case .makeReady, .giveUp: "H   H      H     H       H      H        H       l"
            case .form, .formAtOnce, .run, .end: "x x    x     x       x      x        x       l"
            }
        return Place(row, state.kind.rawValue)
    }

    package static func place(of event: Event, in state: State) -> Place {
        let row: StaticString =
            switch event {
            //              idle making ready forming formed draining drained givingUp
            case .madeReady: "x   H      x     x       x      x        x       l"
            case .notReady: " x   H      x     x       x      x        x       l"
            case .formed: "   x   x      x     H       x      x        x       l"
            case .drained: "  x   x      x     x       x      H        x       l"
            case .lost: "     l   l      l     H       H      H        l       l"
            case .gaveUp: "   x   x      x     x       x      x        x       H"
            // Of any state; `request` has a table of its own.
            case .tick, .request: "H H H H H H H H"
            }
        return Place(row, state.kind.rawValue)
    }
}
