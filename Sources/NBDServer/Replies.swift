// Replies.swift: finished requests into one send, as simple replies or as chunks.
//
// Must be prevented:
//   a reply is sent twice, or its memory reused before the kernel has taken it
//   the chunks of a READ overlap, or leave a byte of its range out

import Base
import CLibURing
import Glibc
import NBDProtocol
import Ring
import Volumes

/// What a request is beside its operation, in `Request.tag`.
enum RequestTag {
    static let none: UInt8 = 0
    /// READ with DF: one chunk.
    static let unfragmented: UInt8 = 1
    /// The buffer holds `length` bytes of finished BLOCK_STATUS chunks.
    static let blockStatus: UInt8 = 2
}

extension Reactor {
    func replyReady(_ taken: Int32, _ hosted: HostedVolume, _ owner: RequestOwner) {
        let slot = owner.slot
        if case .closing = connections[Int(slot)].phase {
            freeRequest(slot, taken, hosted)
            finishClosing(slot)
            return
        }
        queueReply(slot, taken, hosted)
    }

    func queueReply(_ slot: Int32, _ taken: Int32, _ hosted: HostedVolume) {
        let connection = connections + Int(slot)
        connection.pointee.replies.append(taken, hosted.volume)
        if !connection.pointee.sendDirty, dirtyConnections.tryAppend(slot) {
            connection.pointee.sendDirty = true
        }
    }

    func freeRequest(_ slot: Int32, _ taken: Int32, _ hosted: HostedVolume) {
        let request = hosted.volume.request(taken)
        if let buffer = request.pointee.buffer {
            payloads.give(buffer)
            request.pointee.buffer = nil
            connections[Int(slot)].payloadBytes -= Int(request.pointee.length)
        }
        hosted.volume.releaseRequest(taken)
        connections[Int(slot)].requestsInFlight -= 1
        resourcesFreed = resourcesFreed || !stalledConnections.isEmpty
        if !deferredStores.isEmpty { deferredStoresReady = true }
    }

    func sendReplies() {
        while let slot = dirtyConnections.popFirst() {
            connections[Int(slot)].sendDirty = false
            sendNext(slot)
        }
    }

    /// Gathers waiting replies into one send, as often as the socket takes them at once.
    private func sendNext(_ slot: Int32) {
        let connection = connections + Int(slot)
        guard connection.pointee.isTransmitting else { return }
        let hosted = hosted(connection.pointee.volume)
        let area = connection.pointee.output!
        while !connection.pointee.sendArmed, !connection.pointee.replies.isEmpty {
            area.pointee.reset()
            while area.pointee.hasRoom,
                let taken = connection.pointee.replies.popFirst(hosted.volume)
            {
                connection.pointee.sending.append(taken, hosted.volume)
                encodeReply(taken, hosted, connection.pointee.style, area)
            }
            guard transmit(slot) else { return }
        }
    }

    // MARK: Encoding

    private func encodeReply(
        _ taken: Int32, _ hosted: HostedVolume, _ style: ReplyStyle, _ area: UnsafeMutablePointer<SendArea>
    ) {
        let request = hosted.volume.request(taken)
        let error = request.pointee.error
        if style == .simple {
            SimpleReply.encode(
                error: error == 0 ? 0 : wireError(request).rawValue, cookie: request.pointee.cookie,
                into: area.pointee.nextHeader)
            area.pointee.addHeader(SimpleReply.byteCount)
            if error == 0, request.pointee.operation == .read { addData(request, hosted, area) }
            return
        }
        let chunk = ReplyChunk(style: style, cookie: request.pointee.cookie, offset: request.pointee.offset)
        if error != 0 {
            area.pointee.addHeader(chunk.encodeError(wireError(request), into: area.pointee.nextHeader))
        } else if request.pointee.tag == RequestTag.blockStatus {
            area.pointee.add(request.pointee.buffer!, Int(request.pointee.length))
        } else if request.pointee.operation == .read, request.pointee.length > 0 {
            encodeRead(request, chunk, hosted, area)
        } else if style == .structured, request.pointee.operation != .read {
            // Allowed for replies without payload, and shorter.
            SimpleReply.encode(error: 0, cookie: request.pointee.cookie, into: area.pointee.nextHeader)
            area.pointee.addHeader(SimpleReply.byteCount)
        } else {
            area.pointee.addHeader(chunk.encodeNone(into: area.pointee.nextHeader))
        }
    }

    /// ENOTSUP may answer a fast WRITE_ZEROES only.
    private func wireError(_ request: UnsafeMutablePointer<Request>) -> NBDError {
        let error = NBDError(errno: request.pointee.error)
        return error == .notSupported && !request.pointee.fast ? .inputOutput : error
    }

    private func addData(
        _ request: UnsafeMutablePointer<Request>, _ hosted: HostedVolume, _ area: UnsafeMutablePointer<SendArea>
    ) {
        guard request.pointee.length > 0 else { return }
        area.pointee.add(request.pointee.buffer!, Int(request.pointee.length))
        hosted.bytesRead += request.pointee.length
    }

    /// A READ in chunks: what is zero goes as holes.
    private func encodeRead(
        _ request: UnsafeMutablePointer<Request>, _ chunk: ReplyChunk, _ hosted: HostedVolume,
        _ area: UnsafeMutablePointer<SendArea>
    ) {
        let (start, length) = (request.pointee.offset, Int(request.pointee.length))
        let buffer = request.pointee.buffer!
        hosted.bytesRead += request.pointee.length
        var position = 0
        var runs = 1
        while position < length {
            var end = length
            var isHole = false
            if request.pointee.tag != RequestTag.unfragmented {
                (isHole, end) = zeroRun(buffer, position, length, start)
                // The last run that is allowed takes the rest, spelled out.
                if runs == Limits.runsPerReply, end < length { (isHole, end) = (false, length) }
            }
            let header = area.pointee.nextHeader
            if isHole {
                area.pointee.addHeader(
                    chunk.encodeHole(
                        at: start + UInt64(position), count: end - position, done: end == length, into: header))
            } else {
                area.pointee.addHeader(
                    chunk.encodeData(
                        at: start + UInt64(position), count: end - position, done: end == length, into: header))
                area.pointee.add(buffer + position, end - position)
            }
            position = end
            runs += 1
        }
    }

    /// Whether the run at `position` is zeroes, in whole units of the volume, and where it ends.
    private func zeroRun(
        _ buffer: UnsafeMutableRawPointer, _ position: Int, _ length: Int, _ start: UInt64
    ) -> (isHole: Bool, end: Int) {
        let unit = Limits.holeUnit
        var end = position
        var isHole: Bool?
        while end < length {
            let next = min(length, end + unit - Int(start &+ UInt64(end)) & (unit - 1))
            let zero = next - end == unit && farcopy_is_zero(buffer + end, unit) != 0
            if zero != (isHole ?? zero) { break }
            isHole = zero
            end = next
        }
        return (isHole ?? false, end)
    }

    // MARK: Sending

    func sent(_ slot: Int32, _ result: Int32) {
        let connection = connections + Int(slot)
        connection.pointee.sendArmed = false
        if case .closing = connection.pointee.phase { return finishClosing(slot) }
        if result < 0, result != -EINTR, result != -EAGAIN { return beginClosing(slot) }
        if !connection.pointee.isTransmitting { return handshakeSent(slot, result) }
        if connection.pointee.tls == nil, connection.pointee.output!.pointee.advance(Int(max(0, result))) {
            sendFinished(slot)
        } else if !transmit(slot) {
            return
        }
        sendNext(slot)
    }

    /// Sends what the socket takes at once, the rest through the ring; false when the ring has it or it failed.
    private func transmit(_ slot: Int32) -> Bool {
        switch push(connections + Int(slot)) {
        case .all:
            sendFinished(slot)
            return true
        case .blocked: armSend(slot)
        case .failed: beginClosing(slot)
        }
        return false
    }

    /// Every reply of the send has left: its requests are over.
    private func sendFinished(_ slot: Int32) {
        let connection = connections + Int(slot)
        let hosted = hosted(connection.pointee.volume)
        while let taken = connection.pointee.sending.popFirst(hosted.volume) {
            freeRequest(slot, taken, hosted)
        }
        if connection.pointee.stall == .replies {
            parse(slot)
            startPolling(slot)
        }
        if connection.pointee.disconnecting { endIfDrained(slot) }
    }
}
