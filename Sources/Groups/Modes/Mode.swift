// Mode.swift: what differs between ways to form points: how a point is held still at the primary, and how it is moved to the remote.
//
// A closed enum, whose switches are exhaustive: whoever adds a case is told of every place where a mode matters, and there are few. What a
// mode does is in a file of its own beside this one.

package enum Mode: String, Codable, Sendable, CaseIterable {
    case flashcopy

    /// Where the old content of a point goes when hosts overwrite it.
    package var hold: HoldKind {
        switch self {
        case .flashcopy: FlashCopyMode.hold
        }
    }

    /// How data goes to a remote.
    package var leg: LegKind {
        switch self {
        case .flashcopy: FlashCopyMode.leg
        }
    }

    /// What a primary makes, at a start, of a point that is written down as held.
    package var afterCrash: Recovery {
        switch self {
        case .flashcopy: FlashCopyMode.afterCrash
        }
    }

    /// Moves a point to the remote.
    package func mover(_ shape: MoveShape) -> any Mover {
        switch self {
        case .flashcopy: FlashCopyMode.mover(shape)
        }
    }
}

package enum HoldKind: Sendable { case target }
package enum LegKind: Sendable { case drained }
package enum Recovery: Sendable { case movesOn }

/// What is to be moved, and through what.
package struct MoveShape: Sendable {
    /// Volumes of the group that may have something to send, by their indices.
    package var volumes: [Int]
    /// Reads and sends under way at a time, at most.
    package var window: Int
    package var pace: MovePace

    package init(volumes: [Int], window: Int, pace: MovePace) {
        (self.volumes, self.window, self.pace) = (volumes, window, pace)
    }
}

/// What the driver learns of the link meanwhile.
package struct MovePace: Sendable, Equatable {
    /// How many slots of the window may be busy.
    package var limit: Int
    /// A flush is asked for after this much, so that a lost link costs no more than that.
    package var checkpointBytes: Int

    package init(limit: Int, checkpointBytes: Int) {
        (self.limit, self.checkpointBytes) = (limit, checkpointBytes)
    }
}

/// A run of grains of one volume of the group, by the volume's index in the group.
package struct VolumeRun: Sendable, Equatable {
    package var volume: Int
    package var grains: Range<Int>
    package init(volume: Int, grains: Range<Int>) {
        self.volume = volume
        self.grains = grains
    }
}

package enum MoveEvent: Sendable, Equatable {
    case begin
    /// A read ended: with data, or, without grains, with nothing left in that volume.
    case read(slot: Int, grains: Range<Int>?, offset: UInt64, length: Int)
    /// The remote acknowledged the slot's data, or has it already. `wire`: bytes that crossed the link for it.
    case sent(slot: Int, wire: Int)
    /// The flush ended, of every volume that it was asked of.
    case flushed
}

package enum MoveAction: Sendable, Equatable {
    /// Read the volume's next run into the slot's buffer.
    case read(slot: Int, volume: Int)
    /// Send the slot's buffer.
    case send(slot: Int, volume: Int, offset: UInt64, length: Int)
    /// Everything that these volumes have acknowledged.
    case flush(volumes: [Int])
    /// The remote has these on stable storage.
    case clear([VolumeRun])
}

package protocol Mover: Sendable {
    mutating func handle(_ event: MoveEvent) -> [MoveAction]
    /// Everything of the point is at the remote, on stable storage.
    var isDone: Bool { get }
    /// Bytes that crossed the link; zeroes count as nothing.
    var bytesSent: UInt64 { get }
    var pace: MovePace { get set }
}
