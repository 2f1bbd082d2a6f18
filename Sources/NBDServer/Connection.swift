// Connection.swift: the state of one client's stream.
//
// Owner: the reactor that it is on; after the handshake it moves to the reactor of its volume.

import Base
import CLibURing
import Glibc
import NBDProtocol
import Ring
import Volumes

struct Connection {
    enum Phase {
        case free
        case handshake(Handshake)
        /// The TLS handshake is under way; afterwards negotiation goes on.
        case securing(Handshake)
        /// What was queued is sent, then the connection moves to the reactor of its volume.
        case departing(Departure)
        /// What was queued is sent, then the connection ends.
        case farewell
        case transmission(ExportLimits)
        /// The socket is shut; requests and ring operations in flight still end.
        case closing
    }

    enum Stall { case none, replies, volume, memory }

    var phase = Phase.free
    var generation: UInt32 = 0
    var socket: Int32 = -1
    var openedAt: UInt64 = 0
    var client = Client(address: .unix)
    var tls: TLSTransport?

    // Where requests go.
    var volume: VolumeNumber = -1
    var view = View.volume
    var intakeSession: UInt64 = 0
    var style = ReplyStyle.simple
    var contexts: [(id: UInt32, context: MetaContext)] = []

    // Receiving.
    var input: UnsafeMutableRawPointer?
    var inputStart = 0
    var inputEnd = 0
    var receiveArmed = false
    var idlePolls = 0
    /// Requests parsed since the beginning, modulo 2^32.
    var requestsTaken: UInt32 = 0
    /// Has a large send buffer.
    var isWide = false
    /// In the list of connections that are polled instead of armed.
    var polled = false
    var peerClosed = false
    var stall = Stall.none
    /// Since when it has been stalled, in nanoseconds of the monotonic clock.
    var stalledAt: UInt64 = 0
    /// A WRITE whose payload has not all arrived; -1 = none.
    var payloadRequest: Int32 = -1
    var payloadFilled = 0
    /// Payload bytes of a refused WRITE still to be thrown away, and the request that carries its error.
    var discard = 0
    var refusedRequest: Int32 = -1

    // Requests.
    var requestsInFlight = 0
    /// Payload memory that its requests hold.
    var payloadBytes = 0
    /// When bytes last went either way, in nanoseconds of the monotonic clock; kept while it holds a part of a payload
    /// or has a send under way.
    var lastProgress: UInt64 = 0
    var disconnecting = false

    // Sending.
    var replies = ReplyList()
    /// Requests whose replies are in the send under way.
    var sending = ReplyList()
    var sendArmed = false
    var sendDirty = false
    var output: UnsafeMutablePointer<SendArea>?
    /// Handshake bytes waiting to be sent.
    var handshakeOutput: [UInt8] = []
    /// Handshake bytes in the send area.
    var handshakeBytes: UnsafeMutableRawPointer?

    var inputAvailable: Int { inputEnd - inputStart }

    var isTransmitting: Bool {
        if case .transmission = phase { return true }
        return false
    }
}

/// A finished handshake.
struct Departure {
    var export: String
    var negotiated: Negotiated
    /// What the client sent behind its last option.
    var unread: [UInt8]
}

/// Slots linked through `Request.next`, which is the owner's once a request has finished.
struct ReplyList {
    var head: Int32 = -1
    var tail: Int32 = -1
    var isEmpty: Bool { head < 0 }

    mutating func append(_ slot: Int32, _ volume: Volume) {
        volume.request(slot).pointee.next = -1
        if tail >= 0 { volume.request(tail).pointee.next = slot } else { head = slot }
        tail = slot
    }

    mutating func popFirst(_ volume: Volume) -> Int32? {
        guard head >= 0 else { return nil }
        let slot = head
        head = volume.request(slot).pointee.next
        if head < 0 { tail = -1 }
        return slot
    }
}

/// Headers, I/O vector and message of the send under way; the kernel reads it until the send completes.
struct SendArea {
    /// Pieces of the longest reply: data and holes by turns, each with a header.
    static let piecesPerReply = 2 * Limits.runsPerReply
    static let vectorCapacity = 2 * Limits.repliesPerSend + piecesPerReply
    static let headersPerReply = Limits.runsPerReply * ReplyChunk.maximumByteCount
    static let headerCapacity = Limits.repliesPerSend * ReplyChunk.maximumErrorByteCount + headersPerReply
    var message = msghdr()
    var headers: UnsafeMutableRawPointer
    var headerBytes = 0
    var vector: UnsafeMutablePointer<iovec>
    var vectorCount = 0
    var vectorStart = 0

    init() {
        headers = .allocate(byteCount: Self.headerCapacity, alignment: 16)
        vector = .allocate(capacity: Self.vectorCapacity)
    }

    func deallocate() {
        headers.deallocate()
        vector.deallocate()
    }

    mutating func reset() {
        headerBytes = 0
        vectorCount = 0
        vectorStart = 0
    }

    var hasRoom: Bool {
        headerBytes + max(Self.headersPerReply, ReplyChunk.maximumErrorByteCount) <= Self.headerCapacity
            && vectorCount + Self.piecesPerReply <= Self.vectorCapacity
    }

    /// Where the next header is written; `addHeader` makes it part of the send.
    var nextHeader: UnsafeMutableRawPointer { headers + headerBytes }

    mutating func addHeader(_ count: Int) {
        add(nextHeader, count)
        headerBytes += count
    }

    /// Adds a piece, joined with the one before where they touch.
    mutating func add(_ base: UnsafeMutableRawPointer, _ count: Int) {
        if vectorCount > 0 {
            let last = vector[vectorCount - 1]
            if last.iov_base + last.iov_len == base {
                vector[vectorCount - 1].iov_len += count
                return
            }
        }
        vector[vectorCount] = iovec(iov_base: base, iov_len: count)
        vectorCount += 1
    }

    /// Drops what was sent; true when nothing is left.
    mutating func advance(_ sent: Int) -> Bool {
        var left = sent
        while vectorStart < vectorCount, left >= vector[vectorStart].iov_len {
            left -= vector[vectorStart].iov_len
            vectorStart += 1
        }
        if left > 0 {
            vector[vectorStart].iov_base += left
            vector[vectorStart].iov_len -= left
        }
        return vectorStart == vectorCount
    }

    mutating func prepareMessage() {
        message = msghdr()
        message.msg_iov = vector + vectorStart
        message.msg_iovlen = vectorCount - vectorStart
    }
}
