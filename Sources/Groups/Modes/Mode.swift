// Mode.swift: what differs between ways to form points: how a point is held still at the primary, and how it is moved to the remote.
//
// A closed enum, whose switches are exhaustive: whoever adds a case is told of every place where a mode matters, and there are few. What a
// mode does is in a file of its own beside this one.

package enum Mode: String, Codable, Sendable, CaseIterable {
    case flashcopy
    case globalMirror = "global-mirror"
    case changeVolume = "change-volume"

    /// Where the old content of a point goes when hosts overwrite it.
    package var hold: HoldKind {
        switch self {
        case .flashcopy: FlashCopyMode.hold
        case .globalMirror: GlobalMirrorMode.hold
        case .changeVolume: ChangeVolumeMode.hold
        }
    }

    /// How data goes to a remote.
    package var leg: LegKind {
        switch self {
        case .flashcopy: FlashCopyMode.leg
        case .globalMirror: GlobalMirrorMode.leg
        case .changeVolume: ChangeVolumeMode.leg
        }
    }

    /// What a primary makes, at a start, of a point that is written down as held.
    package var afterCrash: Recovery {
        switch self {
        case .flashcopy: FlashCopyMode.afterCrash
        case .globalMirror: GlobalMirrorMode.afterCrash
        case .changeVolume: ChangeVolumeMode.afterCrash
        }
    }

    /// Moves a point to the remote.
    package func mover(_ shape: MoveShape) -> any Mover {
        switch self {
        case .flashcopy: FlashCopyMode.mover(shape)
        case .globalMirror: GlobalMirrorMode.mover(shape)
        case .changeVolume: ChangeVolumeMode.mover(shape)
        }
    }
}

package enum HoldKind: Sendable { case target, memory, intermediate }
package enum LegKind: Sendable { case drained }
package enum Recovery: Sendable { case movesOn, givesUp }
