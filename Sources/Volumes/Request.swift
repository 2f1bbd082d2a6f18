// Request.swift: one slot of a volume's request slab.

/// Names a FlashCopy within its volume's chain; never reused. Recovery points carry their point's number.
package typealias CopyID = Int64

/// What a request reads: the volume itself, the point being drained, or a FlashCopy by its identifier (>= 0).
package struct View: BitwiseCopyable, Equatable, Sendable {
    package var rawValue: Int64
    package static let volume = View(rawValue: -1)
    package static let point = View(rawValue: -2)
    package static func copy(_ id: CopyID) -> View { View(rawValue: id) }
    package init(rawValue: Int64) { self.rawValue = rawValue }
}

/// A request between arrival and reply. The owner fills operation, view, range, buffer and flags, then submits it;
/// from then on the engine owns the slot until the request comes out of `Volume.popFinished`.
package struct Request: BitwiseCopyable {
    package enum Operation: UInt8, Sendable, BitwiseCopyable { case read, write, writeZeroes, trim, flush }
    /// free → taken → (waiting ⇄ issued)* → finished → free
    package enum State: UInt8, Sendable, BitwiseCopyable { case free, taken, waiting, issued, finished }

    package var operation = Operation.read
    package internal(set) var state = State.free
    package var fua = false
    package var noHole = false
    /// WRITE_ZEROES that must fail rather than be slow.
    package var fast = false
    package var view = View.volume
    package var offset: UInt64 = 0
    package var length: UInt64 = 0
    package var buffer: UnsafeMutableRawPointer?
    /// A positive errno, 0 = success. Valid once finished.
    package var error: Int32 = 0
    /// The owner's own values, untouched by the engine.
    package var owner: UInt64 = 0
    package var cookie: UInt64 = 0
    package var tag: UInt8 = 0
    /// Links the slot into one list at a time: free, waiting, or the owner's once finished.
    package var next: Int32 = -1

    var generation: UInt16 = 0
    /// Bytes before it are done.
    var cursor: UInt64 = 0
    /// End of the part that is issued.
    var segmentEnd: UInt64 = 0
    /// File of the part that is issued (reads of points and copies).
    var segmentFile: StoreFile = 0
    /// Epoch in which its grains were marked.
    var epoch: UInt32 = 0
    /// Was in flight when a point or FlashCopy was taken; until it ends, its range of the copy is not settled.
    var unsettled = false
    /// Its client is gone and may have sent it again elsewhere; later writes to its range wait for its end.
    var orphaned = false
    /// The old images that it waits for, or waited for last, to be sent; none = it has not.
    var awaitedGrain = 0
    var awaitedCount = 0
    /// Since when, in the driver's nanoseconds; 0 = that is not known yet. `waitIsOver`: for too long. `isHurried`: others wait for its room.
    var waitsSince: UInt64 = 0
    var waitIsOver = false
    var isHurried = false
    /// A flush has two parts while a restore is under way.
    var flushesLeft: Int8 = 0

    var isModifying: Bool { operation != .read && operation != .flush }
    var end: UInt64 { offset + length }
}

/// A list of slots linked through `next`, in order of arrival.
struct SlotList: BitwiseCopyable {
    var head: Int32 = -1
    var tail: Int32 = -1
    var isEmpty: Bool { head < 0 }

    /// Hands the whole list over, and is empty.
    mutating func takeAll() -> SlotList {
        defer { self = SlotList() }
        return self
    }

    mutating func append(_ slot: Int32, in slots: UnsafeMutablePointer<Request>) {
        slots[Int(slot)].next = -1
        if tail >= 0 { slots[Int(tail)].next = slot } else { head = slot }
        tail = slot
    }

    mutating func popFirst(in slots: UnsafeMutablePointer<Request>) -> Int32? {
        guard head >= 0 else { return nil }
        let slot = head
        head = slots[Int(slot)].next
        if head < 0 { tail = -1 }
        slots[Int(slot)].next = -1
        return slot
    }
}
