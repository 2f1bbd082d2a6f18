// HoldBarrier.swift: something is done on volumes of several reactors at one instant, as a group's point and FlashCopies need it.
//
// Must be prevented:
//   an acknowledgement goes while some volume has not taken its part: what one host was told of would be missing elsewhere
//   acknowledgements wait for others than reactors: the one that takes its part last lets all of them go
//   something counts that a deadline let go of

import Base
import Ring
import Synchronization

/// A volume, and the reactor that serves it.
package struct ServedVolume: Sendable {
    package var reactor: ReactorHandle
    package var number: VolumeNumber

    package init(_ reactor: ReactorHandle, _ number: VolumeNumber) { (self.reactor, self.number) = (reactor, number) }
}

/// What has become of a hold.
package struct HoldOutcome: Sendable {
    /// When all volumes had taken their parts, seconds since 1970.
    package var at: Double
    /// Every acknowledgement was held until then, on every volume.
    package var isIntact: Bool
    /// The longest of the holds.
    package var nanoseconds: UInt64
}

/// Holds the acknowledgements of all volumes while each takes its part.
///
/// - Parameters:
///   - take: of the volume of that index, on its reactor, whose acknowledgements are held.
///   - done: is called by the last reactor, on its thread.
package func holdTogether(
    _ volumes: [ServedVolume], take: @escaping @Sendable (Reactor, Int) -> Void,
    done: @escaping @Sendable (HoldOutcome) -> Void
) {
    onEvery(volumes) { reactor, index in
        reactor.hold(volumes[index].number)
        take(reactor, index)
        return true
    } done: { reactor, _ in
        let at = realSeconds()
        let longest = LongestHold()
        onEvery(volumes, from: reactor) { reactor, index in
            longest.note(reactor.heldFor(volumes[index].number))
            return reactor.releaseHold(volumes[index].number)
        } done: { _, isIntact in
            done(HoldOutcome(at: at, isIntact: isIntact, nanoseconds: longest.nanoseconds))
        }
    }
}

/// Holds the acknowledgements of all volumes while each takes its part, and leaves them held: for `releaseTogether`, which must follow.
///
/// - Parameters:
///   - nanoseconds: after this, each volume's go by themselves.
///   - done: when every volume has taken its part; with when that was, in seconds since 1970.
package func holdOn(
    _ volumes: [ServedVolume], nanoseconds: UInt64, take: @escaping @Sendable (Reactor, Int) -> Void,
    done: @escaping @Sendable (Double) -> Void
) {
    onEvery(volumes) { reactor, index in
        reactor.hold(volumes[index].number, nanoseconds: nanoseconds)
        take(reactor, index)
        return true
    } done: { _, _ in
        done(realSeconds())
    }
}

/// Ends what `holdOn` has begun, also before that is done.
package func releaseTogether(_ volumes: [ServedVolume], done: @escaping @Sendable (HoldOutcome) -> Void) {
    let longest = LongestHold()
    onEvery(volumes) { reactor, index in
        longest.note(reactor.heldFor(volumes[index].number))
        return reactor.releaseHold(volumes[index].number)
    } done: { _, isIntact in
        done(HoldOutcome(at: realSeconds(), isIntact: isIntact, nanoseconds: longest.nanoseconds))
    }
}

/// Performs `body` for each volume, by its index, on its reactor, with one message to each reactor; the last one calls `done`, on its
/// thread, with whether `body` was true for all.
///
/// - Parameter own: the reactor that this runs on: the others are told first, then it takes its part at once.
package func onEvery(
    _ volumes: [ServedVolume], from own: Reactor? = nil,
    _ body: @escaping @Sendable (Reactor, Int) -> Bool,
    done: @escaping @Sendable (Reactor, Bool) -> Void
) {
    let parts = Dictionary(grouping: volumes.indices, by: { volumes[$0].reactor.number })
    let gathered = Gathered(count: parts.count, done: done)
    @Sendable func perform(_ part: [Int], _ reactor: Reactor) {
        gathered.answer(reactor, part.reduce(true) { body(reactor, $1) && $0 })
    }
    for (number, part) in parts where number != own?.number {
        volumes[part[0]].reactor.perform { perform(part, $0) }
    }
    if let own, let part = parts[own.number] { perform(part, own) }
}

private final class LongestHold: Sendable {
    private let value = Atomic<UInt64>(0)
    var nanoseconds: UInt64 { value.load(ordering: .relaxed) }
    func note(_ nanoseconds: UInt64) { value.max(nanoseconds, ordering: .relaxed) }
}

/// Counts answers of several reactors; the last one calls `done`.
private final class Gathered: Sendable {
    private let state: Mutex<(left: Int, all: Bool)>
    private let done: @Sendable (Reactor, Bool) -> Void

    init(count: Int, done: @escaping @Sendable (Reactor, Bool) -> Void) {
        state = Mutex((count, true))
        self.done = done
    }

    func answer(_ reactor: Reactor, _ ok: Bool) {
        let outcome: Bool? = state.withLock { state in
            state.left -= 1
            state.all = state.all && ok
            return state.left == 0 ? state.all : nil
        }
        if let outcome { done(reactor, outcome) }
    }
}
