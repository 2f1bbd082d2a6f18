// BlockStatusChunk.swift: one BLOCK_STATUS (or BLOCK_STATUS_EXT) chunk, written descriptor by descriptor.
//
// Must hold: at least one descriptor; no descriptor is empty; neighbours with equal flags are one descriptor.

import Base

package struct BlockStatusChunk {
    private let memory: UnsafeMutableRawPointer
    private let chunk: ReplyChunk
    private let capacity: Int
    private var position: Int
    private var count = 0
    private var lastLength: UInt64 = 0
    private var lastFlags: UInt32 = 0

    /// Bytes that a chunk of `descriptors` may take, whatever the style.
    package static func byteCount(descriptors: Int) -> Int { 32 + 8 + 16 * descriptors }

    /// - Parameters:
    ///   - memory: at least `byteCount(descriptors: capacity)` bytes.
    ///   - capacity: descriptors that may be written, at least one.
    package init(memory: UnsafeMutableRawPointer, capacity: Int, chunk: ReplyChunk, context: UInt32) {
        invariant(capacity > 0, "a status chunk has room for a descriptor")
        self.memory = memory
        self.chunk = chunk
        self.capacity = capacity
        memory.storeBigEndian(context, at: chunk.byteCount)
        position = chunk.byteCount + (chunk.style == .extended ? 8 : 4)
    }

    /// Adds the next extent; false when it does not fit, and what was written is all that there will be.
    package mutating func append(length: UInt64, flags: UInt32) -> Bool {
        if length == 0 { return true }
        if count > 0, flags == lastFlags {
            lastLength += length
            return true
        }
        if count == capacity { return false }
        writeLast()
        count += 1
        lastLength = length
        lastFlags = flags
        return true
    }

    private mutating func writeLast() {
        guard count > 0 else { return }
        if chunk.style == .extended {
            memory.storeBigEndian(lastLength, at: position)
            memory.storeBigEndian(UInt64(lastFlags), at: position + 8)
            position += 16
        } else {
            memory.storeBigEndian(UInt32(lastLength), at: position)
            memory.storeBigEndian(lastFlags, at: position + 4)
            position += 8
        }
    }

    /// Completes the chunk and returns its bytes.
    package mutating func finish(done: Bool) -> Int {
        invariant(count > 0, "a status chunk has a descriptor")
        writeLast()
        let extended = chunk.style == .extended
        if extended { memory.storeBigEndian(UInt32(count), at: chunk.byteCount + 4) }
        chunk.encode(
            type: extended ? NBD_REPLY_TYPE_BLOCK_STATUS_EXT : NBD_REPLY_TYPE_BLOCK_STATUS, done: done,
            length: position - chunk.byteCount, into: memory)
        return position
    }
}
