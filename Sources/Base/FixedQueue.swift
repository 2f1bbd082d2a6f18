// FixedQueue.swift: a first-in first-out queue whose memory is allocated once.

/// A bounded queue of trivial values. Appending beyond the capacity is a programming error, except through `tryAppend`.
package struct FixedQueue<Element: BitwiseCopyable>: ~Copyable {
    @usableFromInline let slots: UnsafeMutablePointer<Element>
    @usableFromInline let mask: Int
    @usableFromInline var head = 0
    @usableFromInline var tail = 0

    /// `capacity` is rounded up to a power of two.
    @inlinable
    package init(capacity: Int) {
        var size = 1
        while size < capacity { size <<= 1 }
        slots = .allocate(capacity: size)
        mask = size - 1
    }

    @inlinable deinit { slots.deallocate() }

    @inlinable package var count: Int { tail &- head }
    @inlinable package var isEmpty: Bool { head == tail }
    @inlinable package var isFull: Bool { count > mask }

    @inlinable
    package mutating func append(_ element: Element) {
        invariant(!isFull, "a fixed queue is never overfilled")
        slots[tail & mask] = element
        tail &+= 1
    }

    @inlinable
    package mutating func tryAppend(_ element: Element) -> Bool {
        if isFull { return false }
        append(element)
        return true
    }

    @inlinable
    package mutating func popFirst() -> Element? {
        if isEmpty { return nil }
        let element = slots[head & mask]
        head &+= 1
        return element
    }
}
