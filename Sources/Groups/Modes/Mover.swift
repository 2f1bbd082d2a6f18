// Mover.swift: what moves a point to the remote, whatever holds it: events in, actions out.
//
// Must be prevented:
//   a point counts as moved before all of it is at the remote, on stable storage

/// What is to be moved, and through what.
package struct MoveShape: Sendable {
    /// Volumes of the group that may have something to send, by their indices.
    package var volumes: [Int]
    /// Reads and sends under way at a time, at most.
    package var window: Int
    /// Of the window, so many are for what hosts wait for; less than all.
    package var urgentSlots = 0
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
    /// A read ended: with data, or, without grains, with nothing left in that volume. `urgent`: hosts wait until the remote has it.
    case read(slot: Int, grains: Range<Int>?, offset: UInt64, length: Int, urgent: Bool = false)
    /// The remote acknowledged the slot's data, or has it already. `wire`: bytes that crossed the link for it; `durable`: it is on stable
    /// storage there.
    case sent(slot: Int, wire: Int, durable: Bool = false)
    /// Hosts wait for old images of a volume; its next reads have them.
    case wanted(volume: Int)
    /// The flush ended, of every volume that it was asked of.
    case flushed
}

package enum MoveAction: Sendable, Equatable {
    /// Read the volume's next run into the slot's buffer.
    case read(slot: Int, volume: Int)
    /// Send the slot's buffer; what is urgent ahead of what waits, and to stable storage at once.
    case send(slot: Int, volume: Int, offset: UInt64, length: Int, urgent: Bool = false)
    /// What was to be sent of this volume and is not on its way goes ahead of what waits: hosts wait for some of it.
    case hurry(volume: Int)
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
