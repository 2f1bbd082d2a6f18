// BufferPool.swift: a buddy allocator over one region, for payloads and for the buffers of copy jobs.
//
// Blocks are powers of two from 4 KiB, aligned to their size within the region, so that O_DIRECT can use them.
// Freed memory is reused as it is: whoever takes a block fills it before anybody else sees it.
// Owner: one reactor.

import Base

package struct BufferPool: ~Copyable {
    private let base: UnsafeMutableRawPointer
    private let size: Int
    private let maximumOrder: Int
    private static let blockShift = 12
    /// For each block: 0 = inside a larger block, else order + 1, negated while the block is free.
    private let tags: UnsafeMutablePointer<Int8>
    /// Doubly linked free lists, one an order; links are block numbers, -1 = none.
    private let next: UnsafeMutablePointer<Int32>
    private let previous: UnsafeMutablePointer<Int32>
    private let heads: UnsafeMutablePointer<Int32>
    private let blockCount: Int
    package private(set) var freeBytes: Int

    /// `size` is a power of two of at least 4 KiB; `base` is aligned to 4 KiB and outlives the pool.
    package init(base: UnsafeMutableRawPointer, size: Int) {
        invariant(size.nonzeroBitCount == 1 && size >= 1 << Self.blockShift, "a pool's size is a power of two")
        self.base = base
        self.size = size
        blockCount = size >> Self.blockShift
        maximumOrder = blockCount.trailingZeroBitCount
        tags = .allocate(capacity: blockCount)
        tags.initialize(repeating: 0, count: blockCount)
        next = .allocate(capacity: blockCount)
        previous = .allocate(capacity: blockCount)
        heads = .allocate(capacity: maximumOrder + 1)
        heads.initialize(repeating: -1, count: maximumOrder + 1)
        freeBytes = size
        push(0, order: maximumOrder)
    }

    deinit {
        tags.deallocate()
        next.deallocate()
        previous.deallocate()
        heads.deallocate()
    }

    private mutating func push(_ block: Int, order: Int) {
        tags[block] = -Int8(order + 1)
        next[block] = heads[order]
        previous[block] = -1
        if heads[order] >= 0 { previous[Int(heads[order])] = Int32(block) }
        heads[order] = Int32(block)
    }

    private mutating func unlink(_ block: Int, order: Int) {
        if previous[block] >= 0 {
            next[Int(previous[block])] = next[block]
        } else {
            heads[order] = next[block]
        }
        if next[block] >= 0 { previous[Int(next[block])] = previous[block] }
        tags[block] = 0
    }

    private static func order(forBytes count: Int) -> Int {
        let blocks = max(1, (count + (1 << blockShift) - 1) >> blockShift)
        return blocks == 1 ? 0 : Int.bitWidth - (blocks - 1).leadingZeroBitCount
    }

    /// At least `count` bytes, or nil when no block is large enough just now.
    package mutating func take(_ count: Int) -> UnsafeMutableRawPointer? {
        let wanted = Self.order(forBytes: count)
        var order = wanted
        while order <= maximumOrder, heads[order] < 0 { order += 1 }
        guard order <= maximumOrder else { return nil }
        let block = Int(heads[order])
        unlink(block, order: order)
        while order > wanted {
            order -= 1
            push(block + (1 << order), order: order)
        }
        tags[block] = Int8(wanted + 1)
        freeBytes -= 1 << (wanted + Self.blockShift)
        return base + (block << Self.blockShift)
    }

    /// Gives back what `take` returned.
    package mutating func give(_ buffer: UnsafeMutableRawPointer) {
        let distance = buffer - base
        invariant(
            distance >= 0 && distance < size && distance & ((1 << Self.blockShift) - 1) == 0,
            "a buffer goes back to its own pool")
        var block = distance >> Self.blockShift
        invariant(tags[block] > 0, "a buffer is given back once")
        var order = Int(tags[block]) - 1
        freeBytes += 1 << (order + Self.blockShift)
        tags[block] = 0
        while order < maximumOrder {
            let buddy = block ^ (1 << order)
            guard tags[buddy] == -Int8(order + 1) else { break }
            unlink(buddy, order: order)
            block = min(block, buddy)
            order += 1
        }
        push(block, order: order)
    }
}
