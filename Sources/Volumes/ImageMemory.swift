// ImageMemory.swift: the memory for old images of a group's volumes, one bound for all of them.
//
// Volumes take it in chunks, so that what is shared between reactors is touched once in many grains; what lies in a chunk is the business of
// the volume that took it (HeldImages.swift).
//
// Must be prevented:
//   the volumes of a group hold more than the group may

import Base
import Synchronization

package final class ImageMemory: @unchecked Sendable {
    // Safe because: the pool is behind a lock; a chunk's memory, and its entry in `chunks`, belong to the volume that took it.
    let base: UnsafeMutableRawPointer
    /// Of the chunk that begins at so many times `chunkBytes`.
    let chunks: UnsafeMutablePointer<Chunk>
    /// Of volumes whose grain is not larger.
    let chunkBytes: Int
    private let owner: AnyObject?
    private let pool: Mutex<Pool>
    /// Bytes that it has at most: a power of two.
    package let byteCount: Int
    private let used = Atomic<Int>(0)
    private let most = Atomic<Int>(0)

    private struct Pool: ~Copyable, @unchecked Sendable {
        // Safe because: it is behind the lock.
        var pool: BufferPool
        init(_ pool: consuming BufferPool) { self.pool = pool }
    }

    struct Chunk: BitwiseCopyable {
        /// Set = the image of that number is in use.
        var images: UInt64 = 0
        /// Neighbours among its volume's chunks with room; -1 = none.
        var next: Int32 = -1
        var previous: Int32 = -1
    }

    /// - Parameters:
    ///   - base: aligned to 4 KiB.
    ///   - owner: of that memory, which lives as long as this does.
    ///   - chunkBytes: a power of two, not more than 64 of the smallest grains.
    package init(
        base: UnsafeMutableRawPointer, byteCount: Int, chunkBytes: Int = Limits.imageChunkBytes, owner: AnyObject? = nil
    ) {
        invariant(byteCount >= chunkBytes, "image memory holds a chunk")
        (self.base, self.byteCount, self.chunkBytes, self.owner) = (base, byteCount, chunkBytes, owner)
        chunks = .allocate(capacity: byteCount / chunkBytes)
        chunks.initialize(repeating: Chunk(), count: byteCount / chunkBytes)
        pool = Mutex(Pool(BufferPool(base: base, size: byteCount)))
    }

    deinit { chunks.deallocate() }

    /// Bytes that are in use, and the most that ever were.
    package var bytesInUse: Int { used.load(ordering: .relaxed) }
    package var peakBytes: Int { most.load(ordering: .relaxed) }

    func chunkBytes(grain: Int) -> Int { max(chunkBytes, grain) }

    /// The first `chunkBytes` of a free chunk, by its number; nil = all memory is in use.
    func take(grain: Int) -> Int32? {
        let bytes = chunkBytes(grain: grain)
        guard bytes <= byteCount, let memory = pool.withLock({ $0.pool.take(bytes) }) else { return nil }
        most.max(used.add(bytes, ordering: .relaxed).newValue, ordering: .relaxed)
        return Int32((memory - base) / chunkBytes)
    }

    func give(_ chunk: Int32, grain: Int) {
        pool.withLock { $0.pool.give(base + Int(chunk) * chunkBytes) }
        used.subtract(chunkBytes(grain: grain), ordering: .relaxed)
    }
}
