// StoreIO.swift: what a volume asks of its block store.
//
// The engine makes no system call. It puts StoreIO values into its outbox; whoever drives it (a reactor with io_uring,
// or the simulator) carries them out in any order and answers each once through `Volume.complete`.

/// Names one file of a volume's block store; small, dense, and given out by the driver. The source is always 0.
package typealias StoreFile = Int32

package struct StoreIO: BitwiseCopyable {
    package enum Operation: UInt8, Sendable, BitwiseCopyable { case read, write, zero, trim, flush }

    package var operation: Operation
    /// The data is on stable storage before the completion.
    package var fua: Bool
    /// Zeroes must stay allocated.
    package var noHole: Bool
    package var file: StoreFile
    package var offset: UInt64
    package var length: UInt64
    package var buffer: UnsafeMutableRawPointer?
    package var token: IOToken
    /// Zeroing must fail with EOPNOTSUPP at once where it would be no faster than writing.
    package var fast = false
}

/// Which request or copy job an I/O belongs to; carried through the driver untouched.
package struct IOToken: BitwiseCopyable, Equatable, Sendable {
    package enum Owner: UInt8, Sendable, BitwiseCopyable { case request, copyJob, copyFlush, restoreFlush }
    package var owner: Owner
    package var slot: Int32
    package var generation: UInt16

    package init(owner: Owner, slot: Int32, generation: UInt16) {
        self.owner = owner
        self.slot = slot
        self.generation = generation
    }
}

/// What a volume tells its site, outside the data path.
package enum VolumeEvent: Sendable, Equatable {
    /// The point cannot be held any more; its bits are back in the change-recording bitmap.
    case pointGivenUp(number: UInt64, errno: Int32)
    /// A FlashCopy lost old content; it can only be withdrawn.
    case copyFailed(id: CopyID, errno: Int32)
    /// A withdrawn FlashCopy is out of the chain; nothing reads or writes its files any more.
    case copyWithdrawn(id: CopyID)
    /// Every grain of a restore is back on the source.
    case restoreFinished
    /// A restore cannot go on: this grain could not be read or written.
    case restoreFailed(grain: Int, errno: Int32)
}
