// Sender.swift: what happens between a drain's read and its acknowledgement: buffers, comparison with the peer, rate, the
// commands of the link, the window.
//
// Must be prevented:
//   a buffer is reused while a reactor still reads into it, or libnbd sends from it
//   content counts as alike that the peer did not say it has in this session
//   data is put on the wire faster than the operator allows

import Base
import Glibc
import Groups
import NBDServer
import Ring
import TLS
import Volumes

/// Buffers of one drain. Answers in flight keep them alive.
package final class DrainBuffers: @unchecked Sendable {
    // Safe because: a slot's buffer is used by the reactor between read and answer, by libnbd between send and
    // completion, and by the replicator otherwise; the drain's state machine keeps these apart.
    let slotBytes: Int
    let memory: PoolMemory
    init(window: Int, slotBytes: Int) throws(SystemError) {
        self.slotBytes = slotBytes
        memory = try PoolMemory(byteCount: window * slotBytes)
    }
    func slot(_ index: Int) -> UnsafeMutableRawPointer { memory.memory + index * slotBytes }
}

/// Which buffers a drain may have: those of the one before only once every read for that was answered, since the reactor writes into them
/// until then.
package struct DrainMemory {
    private let window: Int
    private let slotBytes: Int
    package private(set) var buffers: DrainBuffers?
    private var epoch: UInt64 = 0
    private var readsInFlight = 0

    package init(window: Int, slotBytes: Int) {
        self.window = window
        self.slotBytes = slotBytes
    }

    /// A read begins for the drain of this epoch; nil: there is no memory, and nothing has begun.
    package mutating func beginRead(epoch: UInt64) -> DrainBuffers? {
        if buffers == nil || self.epoch != epoch && readsInFlight > 0 {
            buffers = try? DrainBuffers(window: window, slotBytes: slotBytes)
        }
        guard let buffers else { return nil }
        self.epoch = epoch
        readsInFlight += 1
        return buffers
    }

    /// A read was answered, of this drain or an earlier one.
    package mutating func endRead() { readsInFlight -= 1 }
}

/// Whether the peer's checksums are worth asking for.
package struct Comparison {
    let policy: ComparePolicy
    /// The peer has none to give.
    var isUnavailable = false
    private var counter: UInt64 = 0
    /// Share of the bytes compared lately that were alike.
    private var alike = 0.0
    package static let block = 4096
    /// Of the runs that are compared only to see whether it pays.
    private static let sample: UInt64 = 16
    /// A link faster than this is not spared anything that both processors' work would not cost, bytes a second.
    private static let fastLink = 200e6

    init(policy: ComparePolicy) { self.policy = policy }

    /// - Parameter isSeeded: the peer has most of it already.
    mutating func wants(linkRate: Double, isSeeded: Bool) -> Bool {
        guard !isUnavailable else { return false }
        if isSeeded { return true }
        switch policy {
        case .never: return false
        case .always: return true
        case .auto:
            counter &+= 1
            guard linkRate < Self.fastLink else { return false }
            return alike > 0.3 || counter % Self.sample == 0
        }
    }

    mutating func found(alike bytes: Int, of length: Int) {
        alike = 0.75 * alike + 0.25 * Double(bytes) / Double(max(1, length))
    }
}

package final class Sender {
    private let configuration: Replicator.Configuration
    private let mailbox: Mailbox<GroupHandle.Message>
    let slotBytes: Int
    private let window: Int

    private struct Slot {
        var volume = 0
        var isZero = false
        var offset: UInt64 = 0
        var length = 0
        /// Commands of the link that are not answered.
        var parts = 0
        var wire = 0
        /// It goes to stable storage at once.
        var fua = false
        /// Hosts may wait for it.
        var isHurried = false
        /// Bytes given to the link that are not answered.
        var onTheWay = 0
        var sending = Window.Sending()
    }
    private struct Part {
        var slot: Int
        var index: Int
        var range: Range<Int>
    }
    private var slots: [Slot]
    private var outgoing: [Part] = []
    private var outgoingStart = 0
    private var memory: DrainMemory
    private var comparing = 0
    /// Of all slots.
    private var onTheWay = 0
    private(set) var flow: Window
    var bucket: TokenBucket
    private var spread = Spread()
    var comparison: Comparison
    /// Bytes on the wire, and bytes that were alike, since the start.
    private(set) var bytesSent: UInt64 = 0
    private(set) var bytesSpared: UInt64 = 0
    private var runLength = Double(256 << 10)
    private var lastProgress: UInt64 = 0

    init(_ configuration: Replicator.Configuration, _ mailbox: Mailbox<GroupHandle.Message>) {
        self.configuration = configuration
        self.mailbox = mailbox
        window = configuration.settings.window
        slotBytes = max(Limits.linkSlotBytes, configuration.volumes.map(\.geometry.grain).max() ?? 0)
        slots = Array(repeating: Slot(), count: window)
        memory = DrainMemory(window: window, slotBytes: slotBytes)
        flow = Window(ceiling: window * slotBytes)
        bucket = TokenBucket(rate: configuration.rate)
        comparison = Comparison(policy: configuration.compare)
    }

    var pace: MovePace { MovePace(limit: windowLimit, checkpointBytes: checkpointBytes) }

    /// Slots that may be busy: as many as hold what should be on its way.
    private var windowLimit: Int {
        let slots = Int((flow.bytes / max(4096, runLength)).rounded(.up))
        return min(window, max(Limits.linkSmallestWindow, slots))
    }

    /// Two seconds' worth: what a lost link costs at most.
    private var checkpointBytes: Int {
        let bounded = bucket.rate > 0 ? min(flow.bytesPerSecond, Double(bucket.rate)) : flow.bytesPerSecond
        return Int(min(Double(configuration.settings.checkpointBytes), max(1_048_576, 2 * bounded)))
    }

    /// A new link: nothing of the last one is on its way any more.
    func begin() {
        outgoing = []
        outgoingStart = 0
        comparing = 0
        onTheWay = 0
        for slot in slots.indices { (slots[slot].parts, slots[slot].onTheWay) = (0, 0) }
        lastProgress = monotonicNanoseconds()
    }

    // MARK: Reading

    /// - Returns: an event if there is no memory.
    func read(_ slot: Int, _ index: Int, point: UInt64, epoch: UInt64) -> Cycle.Event? {
        spread.sends(point: point, now: monotonicNanoseconds())
        guard let buffers = memory.beginRead(epoch: epoch) else {
            return .pointLost("no memory for the drain's buffers", number: point)
        }
        let volume = configuration.volumes[index]
        let mailbox = mailbox
        slots[slot] = Slot(volume: index)
        volume.reactor.read(
            DrainRead(volume: volume.number, point: point, capacity: slotBytes, buffer: buffers.slot(slot)) { answer in
                withExtendedLifetime(buffers) {
                    _ = mailbox.send(.drained(slot: slot, answer, epoch: epoch))
                }
            })
        return nil
    }

    /// A read was answered, of this drain or an earlier one.
    func readEnded() { memory.endRead() }

    /// What a slot of the present drain holds.
    private func contents(_ slot: Int) -> UnsafeMutableRawPointer { memory.buffers!.slot(slot) }

    func drained(_ slot: Int, _ answer: DrainRead.Answer) -> Cycle.Event? {
        switch answer {
        case .data(let grains, let offset, let length, let urgent):
            slots[slot].isZero = isZero(contents(slot), length)
            runLength = 0.98 * runLength + 0.02 * Double(length)
            return .move(.read(slot: slot, grains: grains, offset: offset, length: length, urgent: urgent))
        case .zeroes(let grains, let offset, let length):
            slots[slot].isZero = true
            return .move(.read(slot: slot, grains: grains, offset: offset, length: length))
        case .nothing: return .move(.read(slot: slot, grains: nil, offset: 0, length: 0))
        case .gone:
            // Whoever ended the point has told; but that may be lost, or late.
            return .pointLost(
                "volume \(configuration.volumes[slots[slot].volume].name) does not hold it any more",
                number: spread.point)
        case .lost(let errno):
            let volume = configuration.volumes[slots[slot].volume].name
            return .pointLost(
                "volume \(volume) could not hold it: \(String(cString: strerror(errno)))", number: spread.point)
        case .failed(let errno):
            let volume = configuration.volumes[slots[slot].volume].name
            return .pointLost("read \(volume): \(String(cString: strerror(errno)))", number: spread.point)
        }
    }

    // MARK: Sending

    /// Sends what a slot holds, after asking the peer for its checksums if that is likely to spare something.
    ///
    /// - Parameter urgent: it goes at once, ahead of what waits, and to stable storage.
    func send(
        _ slot: Int, _ offset: UInt64, _ length: Int, urgent: Bool, session: UInt64, epoch: UInt64, isSeeded: Bool
    ) {
        slots[slot].offset = offset
        slots[slot].length = length
        slots[slot].wire = 0
        if urgent {
            (slots[slot].parts, slots[slot].fua) = (1, true)
            return outgoing.insert(Part(slot: slot, index: 0, range: 0..<length), at: outgoingStart)
        }
        if !slots[slot].isZero, comparison.wants(linkRate: flow.bytesPerSecond, isSeeded: isSeeded) {
            return compare(slot, session, epoch)
        }
        slots[slot].parts = 1
        outgoing.append(Part(slot: slot, index: 0, range: 0..<length))
    }

    private func compare(_ slot: Int, _ session: UInt64, _ epoch: UInt64) {
        comparing += 1
        lastProgress = max(lastProgress, monotonicNanoseconds())
        let (peer, mailbox) = (configuration.peer, mailbox)
        let name = configuration.volumes[slots[slot].volume].name
        let (offset, length) = (slots[slot].offset, slots[slot].length)
        Task {
            do {
                let digests = try await peer.checksums(
                    session: session, volume: name, offset: offset, length: length, block: Comparison.block)
                mailbox.send(.compared(slot: slot, digests ?? [], epoch: epoch))
            } catch {
                mailbox.send(.event(.linkLost("checksums: \(error)"), epoch: epoch))
            }
        }
    }

    /// - Returns: an event if nothing of the slot must be sent.
    func compared(_ slot: Int, _ theirs: [UInt8]) -> Cycle.Event? {
        comparing -= 1
        lastProgress = monotonicNanoseconds()
        let length = slots[slot].length
        let ours = Digest.blocks(
            UnsafeRawBufferPointer(start: contents(slot), count: length), block: Comparison.block)
        guard theirs.count == ours.count else {
            comparison.isUnavailable = true
            slots[slot].parts = 1
            enqueue([Part(slot: slot, index: 0, range: 0..<length)])
            return nil
        }
        let runs = Self.differing(ours, theirs, length, runs: NBDLink.partsPerSlot)
        let spared = length - runs.reduce(0) { $0 + $1.count }
        bytesSpared += UInt64(spared)
        comparison.found(alike: spared, of: length)
        guard !runs.isEmpty else { return .move(.sent(slot: slot, wire: 0)) }
        slots[slot].parts = runs.count
        enqueue(runs.enumerated().map { Part(slot: slot, index: $0.offset, range: $0.element) })
        return nil
    }

    /// Byte ranges whose checksums differ; at most so many, joined across the smallest gaps.
    package static func differing(_ ours: [UInt8], _ theirs: [UInt8], _ length: Int, runs most: Int) -> [Range<Int>] {
        let (size, block) = (Digest.byteCount, Comparison.block)
        var runs: [Range<Int>] = []
        for index in 0..<ours.count / size
        where ours[index * size..<index * size + size] != theirs[index * size..<index * size + size] {
            let range = index * block..<min(length, (index + 1) * block)
            if let last = runs.last, last.upperBound == range.lowerBound {
                runs[runs.count - 1] = last.lowerBound..<range.upperBound
            } else {
                runs.append(range)
            }
        }
        while runs.count > most {
            let gaps = zip(runs, runs.dropFirst()).map { $1.lowerBound - $0.upperBound }
            let narrowest = gaps.indices.min { gaps[$0] < gaps[$1] }!
            runs[narrowest] = runs[narrowest].lowerBound..<runs[narrowest + 1].upperBound
            runs.remove(at: narrowest + 1)
        }
        return runs
    }

    /// Gives the link what may go now.
    ///
    /// - Returns: false when the link takes nothing any more.
    func pump(_ link: NBDLink) -> Bool {
        while outgoingStart < outgoing.count {
            let now = monotonicNanoseconds()
            let part = outgoing[outgoingStart]
            guard mayBeOnTheWay, bucket.mayPass(now: now), isAwaited(part) || spread.mayPass(now: now) else { break }
            outgoingStart += 1
            guard put(part, link, now) else { return false }
        }
        if outgoingStart == outgoing.count {
            outgoing.removeAll(keepingCapacity: true)
            outgoingStart = 0
        }
        return true
    }

    /// While a rate is set, what waits in the link's own queues is bounded as well.
    private var mayBeOnTheWay: Bool {
        bucket.rate == 0 || onTheWay == 0 || Double(onTheWay) < flow.bytes(at: bucket.rate)
    }

    private func put(_ part: Part, _ link: NBDLink, _ now: UInt64) -> Bool {
        let slot = slots[part.slot]
        let offset = slot.offset + UInt64(part.range.lowerBound)
        let connection = link.connection(forVolume: slot.volume)
        let completion = link.completions.slots + (part.slot * NBDLink.partsPerSlot + part.index)
        slots[part.slot].sending = flow.sending(at: now)
        if link.completions.pending == 0 { lastProgress = now }
        let wire = slot.isZero ? 64 : part.range.count + 28
        bucket.pass(wire)
        spread.pass(wire)
        bytesSent += UInt64(wire)
        onTheWay += wire
        slots[part.slot].onTheWay += wire
        let fua = slot.fua && connection.takesFUA
        slots[part.slot].fua = fua
        if slot.isZero { return connection.zero(part.range.count, at: offset, fua: fua, completion) }
        slots[part.slot].wire += part.range.count
        return connection.write(
            contents(part.slot) + part.range.lowerBound, part.range.count, at: offset, fua: fua, completion)
    }

    private func isAwaited(_ part: Part) -> Bool { slots[part.slot].fua || slots[part.slot].isHurried }

    /// What has been compared.
    private func enqueue(_ parts: [Part]) {
        outgoing.insert(contentsOf: parts, at: parts.allSatisfy(isAwaited) ? outgoingStart : outgoing.count)
    }

    /// What waits of a volume goes ahead of the rest.
    func hurry(_ volume: Int) {
        let waiting = outgoing[outgoingStart...]
        // Also what is being compared, and comes later.
        for slot in slots.indices where slots[slot].volume == volume { slots[slot].isHurried = true }
        outgoing = waiting.filter(isAwaited) + waiting.filter { !isAwaited($0) }
        outgoingStart = 0
    }

    /// Nanoseconds until more may go, or nil when nothing waits for that.
    var wait: UInt64? {
        guard outgoingStart < outgoing.count, mayBeOnTheWay else { return nil }
        let spreads = isAwaited(outgoing[outgoingStart]) ? 0 : spread.wait(now: monotonicNanoseconds())
        return max(1, bucket.wait, spreads)
    }

    /// A write was acknowledged.
    ///
    /// - Returns: an event when it was the slot's last.
    func acknowledged(_ completion: Int) -> Cycle.Event? {
        let slot = completion / NBDLink.partsPerSlot
        lastProgress = monotonicNanoseconds()
        slots[slot].parts -= 1
        guard slots[slot].parts == 0 else { return nil }
        onTheWay -= slots[slot].onTheWay
        slots[slot].onTheWay = 0
        if !slots[slot].isZero { flow.acknowledged(slots[slot].sending, bytes: slots[slot].wire, now: lastProgress) }
        return .move(.sent(slot: slot, wire: slots[slot].wire, durable: slots[slot].fua))
    }

    func noteProgress() { lastProgress = monotonicNanoseconds() }

    /// For how long the peer has let wait what it was sent or asked, in nanoseconds.
    func silence(_ link: NBDLink) -> UInt64 {
        link.completions.pending > 0 || comparing > 0 ? monotonicNanoseconds() - lastProgress : 0
    }

    /// Whether the peer has let something wait for too long.
    func hasStalled(_ link: NBDLink) -> Bool {
        guard link.completions.pending > 0 || comparing > 0 else {
            lastProgress = monotonicNanoseconds()
            return false
        }
        return monotonicNanoseconds() - lastProgress > UInt64(configuration.stallTimeout * 1e9)
    }
}

/// Whether `count` bytes are all zero: the first sixteen, then the buffer against itself shifted by sixteen.
func isZero(_ buffer: UnsafeRawPointer, _ count: Int) -> Bool {
    guard count >= 16 else { return !UnsafeRawBufferPointer(start: buffer, count: count).contains { $0 != 0 } }
    guard buffer.loadUnaligned(as: UInt64.self) == 0, buffer.loadUnaligned(fromByteOffset: 8, as: UInt64.self) == 0
    else { return false }
    return memcmp(buffer, buffer + 16, count - 16) == 0
}
