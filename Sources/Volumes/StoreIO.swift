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
    /// Its number in the source's flush gate.
    var flushNumber: UInt64 = 0
    /// A read that may be answered with `hole` instead of data.
    package var seeksHole = false

    /// Whether its success says that something of the volume's own file is on stable storage.
    var makesSourceDurable: Bool { file == Volume.source && (operation == .flush || fua) }

    /// Whether an error of a write with FUA says that it was not begun, and nothing about what was written before: too large (EFBIG), not known
    /// here (EINVAL, EOPNOTSUPP). No room (ENOSPC, EDQUOT) may be that of a device under a file system, which took what it cannot keep.
    static func wasRefused(_ errno: Int32) -> Bool { [22, 27, 95].contains(errno) }

    /// In place of an errno: the whole range is a hole, and the buffer was not filled.
    package static let hole: Int32 = -1
}

/// Which request or copy job an I/O belongs to; carried through the driver untouched.
package struct IOToken: BitwiseCopyable, Equatable, Sendable {
    package enum Owner: UInt8, Sendable, BitwiseCopyable {
        case request, copyJob, copyFlush, restoreFlush, activityWrite, activityFlush, mergeFlush, barrier
    }
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
    /// Writes wait for old images to be sent (`nextUrgent`).
    case imagesWanted
    /// A FlashCopy lost old content; it can only be withdrawn.
    case copyFailed(id: CopyID, errno: Int32)
    /// A withdrawn FlashCopy is out of the chain; nothing reads or writes its files any more.
    case copyWithdrawn(id: CopyID)
    /// A background copy has brought every grain to its target.
    case copyCompleted(id: CopyID)
    /// A copy that is refreshed has nothing left to hand over and no readers; it can be taken anew.
    case copyReady(id: CopyID)
    /// The mark in the bitmap of a durable copy that has failed could not be made durable; hosts wait for `failureIsWritten`.
    case failureUnwritten(id: CopyID, errno: Int32)
    /// The activity log, or bits that it vouches for, could not be written; after power loss every grain has to be compared. Writes wait
    /// for `distrustActivityLog`. Told once.
    case activityLogFailed(errno: Int32)
    /// A flush of the volume's own file has failed: hosts' flushes fail until it is opened anew.
    case sourceLost(errno: Int32)
    /// A secondary did not take a write or flush of its primary: the source failed, or the copy that old content was to go to.
    case writeRefused(copy: CopyID?, errno: Int32)
    /// The intermediate lacks nothing any more.
    case intermediateFilled
    /// The intermediate does not take what it lacks.
    case intermediateFailed(errno: Int32)
    /// Every grain of a restore is back on the source.
    case restoreFinished
    /// A restore cannot go on: this grain could not be read or written.
    case restoreFailed(grain: Int, errno: Int32)
}
