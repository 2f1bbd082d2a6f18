// Regions.swift: what a volume's activity log says at a start.

import Base
import Volumes

/// The regions of a volume that its activity log says may have changed since the bitmaps were flushed.
final class Regions: @unchecked Sendable {
    // Safe because: filled by init and read afterwards.
    private let memory: UnsafeMutableRawPointer
    let bitmap: Bitmap
    let all: Bitmap
    let damagedSectors: Int

    /// - Parameter log: the bytes of a log behind its header.
    init(size: UInt64, log: UnsafeRawBufferPointer) {
        let count = ActivityLog.layout(size: size).count
        let bytes = Bitmap.byteCount(bits: count)
        memory = .allocate(byteCount: 2 * bytes, alignment: 8)
        memory.initializeMemory(as: UInt8.self, repeating: 0, count: 2 * bytes)
        bitmap = Bitmap(memory: memory, count: count)
        all = Bitmap(memory: memory + bytes, count: count)
        all.setAll()
        damagedSectors = ActivityLog.decode(log, into: bitmap)
    }

    deinit { memory.deallocate() }
}
