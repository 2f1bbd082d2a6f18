// Store.swift: carries out a volume's I/O on files and block devices.
//
// Small reads and writes that the page cache holds are served by a call that does not block; the rest goes through
// the ring. Short transfers are resumed; operations that a file system does not have are done another way.

import Base
import CLibURing
import Glibc
import Ring
import Volumes

/// One I/O that is on the ring.
struct StoreOperation {
    enum Step: UInt8 {
        case transfer
        /// Hole punching or zeroing by the file system.
        case allocate
        /// Zeroes written from memory, for file systems without the above.
        case zeroFill
        /// The flush that makes zeroes durable.
        case flush
        /// What a flush that has succeeded is worth (`OpenFile.flushProofError`).
        case proof
        /// Whole blocks around an unaligned piece (DirectIO.swift).
        case bounceRead
        case bounceWrite
    }
    var io: StoreIO
    var volume: VolumeNumber
    var step: Step
    var done: UInt64 = 0
    var bounce: Bounce?
}

enum StoreNext {
    case again
    case ended(errno: Int32)
}

/// Slots for I/O on the ring, made at the start.
struct StoreTable {
    static let capacity = 4096
    let slots: UnsafeMutablePointer<StoreOperation?>
    private let free: UnsafeMutablePointer<Int32>
    private var freeCount: Int
    /// Zeroes to write where the file system cannot make them itself.
    let zeroes: UnsafeMutableRawPointer
    static let zeroByteCount = 1 << 20

    init() {
        slots = .allocate(capacity: Self.capacity)
        slots.initialize(repeating: nil, count: Self.capacity)
        free = .allocate(capacity: Self.capacity)
        for slot in 0..<Self.capacity { free[slot] = Int32(slot) }
        freeCount = Self.capacity
        zeroes = .allocate(byteCount: Self.zeroByteCount, alignment: 4096)
        zeroes.initializeMemory(as: UInt8.self, repeating: 0, count: Self.zeroByteCount)
    }

    var hasRoom: Bool { freeCount > 0 }
    var inUse: Int { Self.capacity - freeCount }

    mutating func take(_ operation: StoreOperation) -> Int32 {
        freeCount -= 1
        let slot = free[freeCount]
        slots[Int(slot)] = operation
        return slot
    }

    mutating func give(_ slot: Int32) {
        slots[Int(slot)] = nil
        free[freeCount] = slot
        freeCount += 1
    }
}

extension Reactor {
    /// The largest transfer that is tried without the ring; of files that lie in memory, where it is a copy and no more.
    private static let inlineBytes: UInt64 = 64 << 10
    private static let immediateBytes: UInt64 = 1 << 20

    func startStore(_ io: StoreIO, _ number: VolumeNumber, _ hosted: HostedVolume) {
        let file = hosted.slots + Int(io.file)
        guard file.pointee.descriptor >= 0 else { return openFirst(io, number, hosted) }
        if io.seeksHole, isHole(io, file.pointee.descriptor) {
            hosted.volume.complete(io, errno: StoreIO.hole)
            return
        }
        if file.pointee.isDirect, startDirect(io, number, hosted) { return }
        var done: UInt64 = 0
        switch io.operation {
        case .read, .write:
            let limit = file.pointee.immediate ? Self.immediateBytes : Self.inlineBytes
            if io.length <= limit, let result = transferAtOnce(io, file) {
                if result < 0 || UInt64(result) == io.length {
                    hosted.volume.complete(io, errno: result < 0 ? Int32(-result) : 0)
                    return
                }
                done = UInt64(result)
            }
        case .flush:
            if file.pointee.isMapped, hosted.isLost(io.file) {
                hosted.volume.complete(io, errno: EIO)
                return
            }
            if file.pointee.immediate {
                hosted.volume.complete(io, errno: 0)
                return
            }
        case .zero, .trim: break
        }
        let step: StoreOperation.Step =
            switch io.operation {
            case .read, .write: .transfer
            case .flush: .flush
            case .zero, .trim: .allocate
            }
        let slot = stores.take(
            StoreOperation(io: io, volume: number, step: step, done: done))
        submitStore(slot)
    }

    private func isHole(_ io: StoreIO, _ descriptor: Int32) -> Bool {
        let data = lseek(descriptor, off_t(io.offset), SEEK_DATA)
        return data < 0 ? errno == ENXIO : UInt64(data) >= io.offset + io.length
    }

    /// Bytes moved or a negative errno; nil when the call would block or cannot be made without blocking.
    private func transferAtOnce(
        _ io: StoreIO, _ file: UnsafeMutablePointer<HostedVolume.FileSlot>
    ) -> Int? {
        let reads = io.operation == .read
        let allowed = reads ? file.pointee.noWaitReads : file.pointee.noWaitWrites
        guard file.pointee.immediate || (allowed && !io.fua) else { return nil }
        let noWait: Int32 = file.pointee.immediate ? 0 : 1
        let result =
            reads
            ? farcopy_pread(
                file.pointee.descriptor, io.buffer, Int(io.length), off_t(io.offset), noWait)
            : farcopy_pwrite(
                file.pointee.descriptor, io.buffer, Int(io.length), off_t(io.offset), noWait)
        switch Int32(-min(result, 0)) {
        case 0: return result > 0 ? result : nil
        case EAGAIN, EINTR: return nil
        case EOPNOTSUPP, EINVAL:
            // The file system does not know RWF_NOWAIT here; do not ask again.
            if noWait == 1 {
                if reads { file.pointee.noWaitReads = false } else { file.pointee.noWaitWrites = false }
                return nil
            }
            return result
        default: return noWait == 1 ? nil : result
        }
    }

    func submitStore(_ slot: Int32) {
        let operation = stores.slots[Int(slot)]!
        let io = operation.io
        guard let hosted = volumes[operation.volume] else { return }
        let descriptor = hosted.slots[Int(io.file)].descriptor
        let userData = UserData(kind: CompletionKind.store, generation: 0, slot: UInt32(slot))
        let offset = io.offset + operation.done
        let left = io.length - operation.done
        switch operation.step {
        case .transfer:
            let buffer = io.buffer! + Int(operation.done)
            // One entry moves at most 1 GiB; what is left is resumed like any short transfer.
            let count = Int(min(left, 1 << 30))
            if io.operation == .read {
                ring.read(descriptor, buffer, count, at: offset, userData)
            } else {
                ring.write(descriptor, buffer, count, at: offset, durable: io.fua, userData)
            }
        case .allocate:
            let mode =
                io.operation == .zero && io.noHole ? farcopy_zero_range : farcopy_punch_hole
            ring.allocate(descriptor, mode: mode, offset: offset, length: left, userData)
        case .zeroFill:
            ring.write(
                descriptor, stores.zeroes, Int(min(left, UInt64(StoreTable.zeroByteCount))),
                at: offset, durable: io.fua, userData)
        case .flush:
            ring.dataSync(descriptor, userData)
        case .proof:
            ring.proveFlush(descriptor, userData)
        case .bounceRead, .bounceWrite:
            submitBounce(operation, descriptor, userData)
        }
    }

    func storeCompleted(_ slot: Int32, _ result: Int32) {
        guard var operation = stores.slots[Int(slot)] else {
            invariantFailed("a store completion has its operation", #fileID, #line)
        }
        switch next(&operation, result) {
        case .again:
            stores.slots[Int(slot)] = operation
            submitStore(slot)
        case .ended(0) where mustBeProved(operation):
            operation.step = .proof
            stores.slots[Int(slot)] = operation
            submitStore(slot)
        case .ended(let errno):
            stores.give(slot)
            endBounce(operation)
            if !deferredStores.isEmpty { deferredStoresReady = true }
            if errno != 0, operation.io.operation == .flush {
                volumes[operation.volume]?.flushFailed(operation.io.file)
            }
            hosted(operation.volume).volume.complete(operation.io, errno: errno)
        }
    }

    private func fileSlot(_ operation: StoreOperation) -> UnsafeMutablePointer<HostedVolume.FileSlot>? {
        volumes[operation.volume].map { $0.slots + Int(operation.io.file) }
    }

    private func mustBeProved(_ operation: StoreOperation) -> Bool {
        guard operation.step != .proof, operation.io.operation == .flush || operation.io.fua else { return false }
        return fileSlot(operation)?.pointee.flushNeedsProof == true
    }

    private func next(_ operation: inout StoreOperation, _ result: Int32) -> StoreNext {
        if result == -EINTR || result == -EAGAIN { return .again }
        switch operation.step {
        case .transfer, .zeroFill:
            if result < 0 { return .ended(errno: -result) }
            // A read behind the end of a file that became shorter, or a write that moves nothing.
            if result == 0 { return .ended(errno: EIO) }
            operation.done += UInt64(result)
            return operation.done < operation.io.length ? .again : .ended(errno: 0)
        case .allocate:
            if result == 0 {
                guard operation.io.fua else { return .ended(errno: 0) }
                operation.step = .flush
                return .again
            }
            if result == -EOPNOTSUPP || result == -ENOSYS || result == -EINVAL {
                if operation.io.operation == .trim { return .ended(errno: 0) }  // a hint
                if operation.io.fast { return .ended(errno: EOPNOTSUPP) }
                operation.step = .zeroFill
                return .again
            }
            return .ended(errno: -result)
        case .flush:
            return .ended(errno: -result)
        case .proof:
            return .ended(
                errno: fileSlot(operation).map { OpenFile.flushProofError($0.pointee.descriptor, outcome: result) } ?? 0
            )
        case .bounceRead, .bounceWrite:
            return bounced(&operation, result)
        }
    }

    // MARK: Draining

    /// Starts some of the drain's reads: many at once would hold hosts up.
    func startDrains() {
        var left = Self.drainsPerTurn
        var started = 0
        while left > 0, started < waitingDrains.count, startDrain(waitingDrains[started]) {
            started += 1
            left -= 1
        }
        waitingDrains.removeFirst(started)
        drainsDue = left == 0 && !waitingDrains.isEmpty
    }
    private static let drainsPerTurn = 8

    /// Begins a volume's drain from its first grain again. Reads that were asked for before do not take part.
    package func rewindDrain(_ number: VolumeNumber) {
        for drain in waitingDrains where drain.volume == number { drain.answer(.gone) }
        waitingDrains.removeAll { $0.volume == number }
        hosted(number).volume.rewindDrain()
    }

    /// False when hosts have every slot.
    private func startDrain(_ drain: DrainRead) -> Bool {
        let hosted = hosted(drain.volume)
        let volume = hosted.volume
        guard volume.heldPoint == drain.point else {
            drain.answer(gone(drain.point, volume))
            return true
        }
        guard let slot = volume.takeRequest(ofClient: false) else { return false }
        let limit = max(1, drain.capacity / volume.geometry.grain)
        var drain = drain
        let urgent = volume.nextUrgent(limit: limit)
        drain.isUrgent = urgent != nil
        guard
            var grains = urgent
                ?? volume.nextOutOfSync(limit: max(limit, Self.holeBytes / volume.geometry.grain))
        else {
            volume.releaseRequest(slot)
            drain.answer(.nothing)
            return true
        }
        if grains.count > limit {
            if let zeroes = hole(at: grains, hosted) {
                volume.returnOutOfSync(from: zeroes.upperBound)
                volume.releaseRequest(slot)
                let range = volume.geometry.byteRange(zeroes)
                drain.answer(
                    .zeroes(
                        grains: zeroes, offset: range.lowerBound,
                        length: Int(range.upperBound - range.lowerBound)))
                return true
            }
            grains = grains.prefix(limit)
            volume.returnOutOfSync(from: grains.upperBound)
        }
        let range = volume.geometry.byteRange(grains)
        let request = volume.request(slot)
        request.pointee.operation = .read
        request.pointee.view = .point
        request.pointee.offset = range.lowerBound
        request.pointee.length = range.upperBound - range.lowerBound
        request.pointee.buffer = drain.buffer
        var index = 0
        while index < drains.count, drains[index] != nil { index += 1 }
        if index == drains.count { drains.append(drain) } else { drains[index] = drain }
        request.pointee.owner = RequestOwner(drain: index).rawValue
        volume.submit(slot)
        return true
    }

    private func gone(_ point: UInt64, _ volume: Volume) -> DrainRead.Answer {
        volume.lostPoint.number == point ? .lost(errno: volume.lostPoint.errno) : .gone
    }

    /// The longest hole that is answered at once.
    private static let holeBytes = 1 << 30

    /// The grains at the start of the run that are a hole of the source file, so that an empty volume of any size is
    /// copied without reading it. Everything is looked at in one go on this thread, so no write comes between.
    private func hole(at grains: Range<Int>, _ hosted: HostedVolume) -> Range<Int>? {
        let volume = hosted.volume
        guard volume.pointLiesOnSource(grains) else { return nil }
        guard var zeroes = hole(grains, of: Volume.source, hosted) else { return nil }
        if let intermediate = volume.takingIntermediate {
            guard let both = hole(zeroes, of: intermediate, hosted), volume.tookHole(both) else { return nil }
            zeroes = both
        }
        return zeroes
    }

    private func hole(_ grains: Range<Int>, of file: StoreFile, _ hosted: HostedVolume) -> Range<Int>? {
        let geometry = hosted.volume.geometry
        let range = geometry.byteRange(grains)
        let data = lseek(hosted.slots[Int(file)].descriptor, off_t(range.lowerBound), SEEK_DATA)
        guard data >= 0 || errno == ENXIO else { return nil }
        let end = data < 0 ? range.upperBound : min(range.upperBound, UInt64(data))
        let lastGrain = end == range.upperBound ? grains.upperBound : Int(end >> geometry.grainShift)
        return lastGrain > grains.lowerBound ? grains.lowerBound..<lastGrain : nil
    }

    func retryDeferredRanges() {
        let ranges = deferredRanges
        deferredRanges = []
        for range in ranges { startRange(range) }
    }

    // MARK: For the control plane

    func startRange(_ range: RangeRequest) {
        let volume = hosted(range.volume).volume
        guard range.offset <= volume.geometry.size, UInt64(range.length) <= volume.geometry.size - range.offset,
            range.length <= range.buffer?.byteCount ?? 0
        else { return range.answer(EINVAL) }
        guard let slot = volume.takeRequest() else {
            deferredRanges.append(range)
            return
        }
        guard range.view == .volume || volume.retainCopy(range.view.rawValue) else {
            volume.releaseRequest(slot)
            return range.answer(ENOENT)
        }
        let request = volume.request(slot)
        request.pointee.operation = range.operation
        request.pointee.view = range.view
        request.pointee.offset = range.offset
        request.pointee.length = UInt64(range.length)
        request.pointee.buffer = range.buffer?.memory
        var index = 0
        while index < ranges.count, ranges[index] != nil { index += 1 }
        if index == ranges.count { ranges.append(range) } else { ranges[index] = range }
        request.pointee.owner = RequestOwner(range: index).rawValue
        volume.submit(slot)
    }

    func finishRange(_ index: Int, _ slot: Int32, _ hosted: HostedVolume) {
        let error = hosted.volume.request(slot).pointee.error
        let range = ranges[index]!
        ranges[index] = nil
        hosted.volume.releaseRequest(slot)
        if range.view != .volume { hosted.volume.releaseCopy(range.view.rawValue) }
        resourcesFreed = true
        range.answer(error)
    }

    func finishDrain(_ index: Int, _ slot: Int32, _ hosted: HostedVolume) {
        let request = hosted.volume.request(slot).pointee
        let drain = drains[index]!
        drains[index] = nil
        hosted.volume.releaseRequest(slot)
        resourcesFreed = true
        if hosted.volume.heldPoint != drain.point {
            drain.answer(gone(drain.point, hosted.volume))
        } else if request.error != 0 {
            drain.answer(.failed(errno: request.error))
        } else {
            drain.answer(
                .data(
                    grains: hosted.volume.geometry.grains(
                        offset: request.offset, length: request.length),
                    offset: request.offset, length: Int(request.length), urgent: drain.isUrgent))
        }
    }
}
