// Bench.swift: drives an engine in the tests.

import Base
import Volumes

/// A volume whose I/O the test answers by hand.
final class Bench {
    let volume: Volume
    private let memory: UnsafeMutableRawPointer
    /// What requests write, or read into.
    var data: UnsafeMutableRawPointer { memory + (512 << 10) }
    private var copies = 0
    var roles: RecordingRoles { (memory + 8192).load(as: RecordingRoles.self) }

    init(grains: Int = 512) {
        memory = .allocate(byteCount: 1 << 20, alignment: 4096)
        memory.initializeMemory(as: UInt8.self, repeating: 0, count: 1 << 20)
        let pool = UnsafeMutableRawPointer.allocate(byteCount: 4 << 20, alignment: 4096)
        volume = Volume(
            geometry: Geometry(size: UInt64(grains) * 4096, grain: 4096)!,
            bitmaps: (Bitmap(memory: memory, count: grains), Bitmap(memory: memory + 4096, count: grains)),
            roles: (memory + 8192).bindMemory(to: RecordingRoles.self, capacity: 1),
            copyBuffers: CopyBuffers(pool: BufferPool(base: pool, size: 4 << 20)))
    }

    /// Adds a FlashCopy with files of its own.
    ///
    /// - Returns: its failure mark.
    @discardableResult
    func addCopy(_ id: CopyID, filled: Bool = false, durable: Bool = false) -> UnsafeMutablePointer<UInt64> {
        let (copy, mark) = makeCopy(id, filled: filled, durable: durable)
        volume.addCopy(copy)
        return mark
    }

    /// A FlashCopy that is not in the chain yet, with a bitmap of its own.
    ///
    /// - Parameter target: nil = a target of its own.
    func makeCopy(
        _ id: CopyID, filled: Bool, durable: Bool, target: StoreFile? = nil
    ) -> (FlashCopy, mark: UnsafeMutablePointer<UInt64>) {
        copies += 1
        let bits = memory + 16384 * copies
        let count = volume.geometry.grainCount
        let mark = (bits + 8192).assumingMemoryBound(to: UInt64.self)
        let copy = FlashCopy(
            id: id, targetFile: target ?? StoreFile(2 * copies), bitmapFile: StoreFile(2 * copies + 1),
            preserved: Bitmap(memory: bits, count: count),
            changes: filled ? Bitmap(memory: bits + 4096, count: count) : nil, failureMark: mark, durable: durable,
            isFilled: filled)
        return (copy, mark)
    }

    /// A durable copy, 1, and above it a background copy, 2, of files 4 and 5, that may be taken anew.
    func addCopyToTakeAnew() {
        addCopy(1, durable: true)
        addCopy(2, filled: true, durable: true)
        _ = settle()
        volume.beginRefresh(2)
        _ = settle()
    }

    @discardableResult
    func submit(
        _ operation: Request.Operation, view: View = .volume, grain: Int, count: Int = 1, owner: UInt64 = 1
    ) -> Int32 {
        let slot = volume.takeRequest()!
        let request = volume.request(slot)
        request.pointee.operation = operation
        request.pointee.view = view
        request.pointee.offset = UInt64(grain) * 4096
        request.pointee.length = UInt64(count) * 4096
        request.pointee.owner = owner
        if operation == .read || operation == .write { request.pointee.buffer = data }
        volume.submit(slot)
        return slot
    }

    /// The volume records changes, and its activity log, which is empty, is file 1; the bitmaps' file is 2.
    func startActivityLog() {
        volume.recording = true
        volume.startActivityLog(file: 1, contents: UnsafeRawBufferPointer(start: nil, count: 0), recordingFile: 2)
    }

    func pending() -> [StoreIO] {
        var found: [StoreIO] = []
        while let io = volume.popIO() { found.append(io) }
        return found
    }

    /// Answers everything until nothing is asked any more; returns the slots that finished.
    func settle() -> [Int32] {
        var finished: [Int32] = []
        while true {
            while let slot = volume.popFinished() { finished.append(slot) }
            if volume.backgroundDue { volume.runBackground() }
            let ios = pending()
            if ios.isEmpty { return finished }
            for io in ios { volume.complete(io, errno: 0) }
        }
    }
}
