// DirectIO.swift: requests to a volume with `cache = "none"` that are not aligned to what its storage transfers.
//
// They go through a bounce buffer, a piece at a time; a write reads the blocks that it changes in part, and writes them
// back. Must be prevented:
//   two writes that share a block overtake each other between its reading and its writing back
//
// So an unaligned write waits for every modifying I/O that touches its blocks, and those that come later wait for it.

import Base
import CLibURing
import Glibc
import Ring
import Volumes

/// Where the bounce of an unaligned I/O has got to.
struct Bounce {
    let buffer: UnsafeMutableRawPointer
    /// The part of the I/O that is in hand, in bytes of the file.
    var piece: Range<UInt64>
    /// The same, extended to whole blocks.
    var blocks: Range<UInt64>
}

/// An I/O that waits for others, or for memory.
struct DeferredStore {
    var io: StoreIO
    var volume: VolumeNumber
}

extension Reactor {
    private static let bounceBytes: UInt64 = 1 << 20

    private func blocks(_ range: Range<UInt64>, _ alignment: UInt64) -> Range<UInt64> {
        range.lowerBound & ~(alignment - 1)..<(range.upperBound + alignment - 1) & ~(alignment - 1)
    }

    /// Takes an I/O on a direct file that needs more than to be handed to the ring; false when it does not.
    func startDirect(_ io: StoreIO, _ number: VolumeNumber, _ hosted: HostedVolume) -> Bool {
        let alignment = UInt64(hosted.slots[Int(io.file)].alignment)
        let aligned =
            (io.offset | io.length) & (alignment - 1) == 0
            && (io.buffer.map { UInt(bitPattern: $0) } ?? 0) & (UInt(alignment) - 1) == 0
        if io.operation == .flush || (io.operation == .read && aligned) { return false }
        if io.operation == .trim, !aligned { return trimInside(io, number, hosted, alignment) }
        if io.operation != .read, mustWait(io, number, aligned: aligned, alignment) {
            deferredStores.append(DeferredStore(io: io, volume: number))
            return true
        }
        if aligned { return false }
        if io.operation == .zero, io.fast {
            hosted.volume.complete(io, errno: EOPNOTSUPP)  // blocks that change in part must be read and written
            return true
        }
        guard io.length > 0 else {
            hosted.volume.complete(io, errno: 0)
            return true
        }
        guard let buffer = payloads.take(Int(Self.bounceBytes)) else {
            deferredStores.append(DeferredStore(io: io, volume: number))
            return true
        }
        var operation = StoreOperation(io: io, volume: number, step: .bounceRead)
        operation.bounce = Bounce(buffer: buffer, piece: 0..<0, blocks: 0..<0)
        nextPiece(&operation, alignment)
        if io.operation != .read { unalignedWrites += 1 }
        submitStore(stores.take(operation))
        return true
    }

    /// A trim is a hint: what is not a whole block stays.
    private func trimInside(
        _ io: StoreIO, _ number: VolumeNumber, _ hosted: HostedVolume, _ alignment: UInt64
    ) -> Bool {
        var inner = io
        inner.offset = (io.offset + alignment - 1) & ~(alignment - 1)
        let end = (io.offset + io.length) & ~(alignment - 1)
        guard end > inner.offset, !mustWait(io, number, aligned: true, alignment) else {
            hosted.volume.complete(io, errno: 0)
            return true
        }
        var operation = StoreOperation(io: io, volume: number, step: .allocate)
        operation.done = inner.offset - io.offset
        operation.io.length = end - io.offset
        submitStore(stores.take(operation))
        return true
    }

    private func mustWait(_ io: StoreIO, _ number: VolumeNumber, aligned: Bool, _ alignment: UInt64) -> Bool {
        if aligned, unalignedWrites == 0, deferredStores.isEmpty { return false }
        let range = blocks(io.offset..<io.offset + io.length, alignment)
        for other in deferredStores where other.volume == number && conflicts(other.io, io.file, range, alignment) {
            return true
        }
        for slot in 0..<StoreTable.capacity {
            guard let operation = stores.slots[slot], operation.volume == number else { continue }
            if aligned, operation.bounce == nil { continue }
            if conflicts(operation.io, io.file, range, alignment) { return true }
        }
        return false
    }

    private func conflicts(_ io: StoreIO, _ file: StoreFile, _ range: Range<UInt64>, _ alignment: UInt64) -> Bool {
        io.file == file && (io.operation == .write || io.operation == .zero || io.operation == .trim)
            && blocks(io.offset..<io.offset + io.length, alignment).overlaps(range)
    }

    /// Chooses the next piece and whether its blocks must be read first.
    private func nextPiece(_ operation: inout StoreOperation, _ alignment: UInt64) {
        let start = operation.io.offset + operation.done
        let first = start & ~(alignment - 1)
        let end = min(operation.io.offset + operation.io.length, first + Self.bounceBytes)
        operation.bounce!.piece = start..<end
        operation.bounce!.blocks = blocks(start..<end, alignment)
        let whole = operation.bounce!.piece == operation.bounce!.blocks
        if operation.io.operation != .read, whole {
            fill(&operation)
            operation.step = .bounceWrite
        } else {
            operation.step = .bounceRead
        }
    }

    /// Puts the new data over what the blocks held.
    private func fill(_ operation: inout StoreOperation) {
        let bounce = operation.bounce!
        let target = bounce.buffer + Int(bounce.piece.lowerBound - bounce.blocks.lowerBound)
        if operation.io.operation == .write {
            target.copyMemory(from: operation.io.buffer! + Int(operation.done), byteCount: bounce.piece.count)
        } else {
            target.initializeMemory(as: UInt8.self, repeating: 0, count: bounce.piece.count)
        }
    }

    func submitBounce(_ operation: StoreOperation, _ descriptor: Int32, _ userData: UserData) {
        let bounce = operation.bounce!
        if operation.step == .bounceRead {
            ring.read(descriptor, bounce.buffer, bounce.blocks.count, at: bounce.blocks.lowerBound, userData)
        } else {
            ring.write(
                descriptor, bounce.buffer, bounce.blocks.count, at: bounce.blocks.lowerBound,
                durable: operation.io.fua, userData)
        }
    }

    /// What follows a transfer between bounce buffer and file.
    func bounced(_ operation: inout StoreOperation, _ result: Int32) -> StoreNext {
        guard result >= 0 else { return .ended(errno: -result) }
        let bounce = operation.bounce!
        // The volume ends at a block, so nothing but an error makes a transfer short.
        guard Int(result) == bounce.blocks.count else { return .ended(errno: EIO) }
        if operation.step == .bounceRead, operation.io.operation != .read {
            fill(&operation)
            operation.step = .bounceWrite
            return .again
        }
        if operation.io.operation == .read {
            let source = bounce.buffer + Int(bounce.piece.lowerBound - bounce.blocks.lowerBound)
            (operation.io.buffer! + Int(operation.done)).copyMemory(from: source, byteCount: bounce.piece.count)
        }
        operation.done += UInt64(bounce.piece.count)
        if operation.done == operation.io.length { return .ended(errno: 0) }
        let file = hosted(operation.volume).slots[Int(operation.io.file)]
        nextPiece(&operation, UInt64(file.alignment))
        return .again
    }

    func endBounce(_ operation: StoreOperation) {
        guard let bounce = operation.bounce else { return }
        payloads.give(bounce.buffer)
        if operation.io.operation != .read { unalignedWrites -= 1 }
        resourcesFreed = true
    }

    /// Tries again what waited for other I/O or for memory; what still must, waits in the same order.
    func retryDeferredStores() {
        let deferred = deferredStores
        deferredStores = []
        for store in deferred {
            guard let hosted = volumes[store.volume] else { continue }
            guard stores.hasRoom else {
                deferredStores.append(store)  // each completion that frees a slot asks again
                continue
            }
            startStore(store.io, store.volume, hosted)
        }
    }
}
