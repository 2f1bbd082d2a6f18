// Transmission.swift: requests out of the receive buffer, replies into one send.
//
// Must be prevented:
//   a refused WRITE's payload is read as requests
//   a reply is sent twice, or its memory reused before the kernel has taken it
//   a client that sends without reading the replies makes the server take memory without bound: its requests are
//   counted from arrival to the last byte of the reply, and at the limit its socket is not read any more

import Base
import CLibURing
import Glibc
import NBDProtocol
import Ring
import Volumes

extension Reactor {
    // MARK: Parsing

    /// Carries out every whole request in the receive buffer.
    func parse(_ slot: Int32) {
        let connection = connections + Int(slot)
        guard case .transmission(let limits) = connection.pointee.phase,
            connection.pointee.payloadRequest < 0
        else { return }
        let hosted = hosted(connection.pointee.volume)
        connection.pointee.stall = .none
        while connection.pointee.isTransmitting, !connection.pointee.disconnecting || connection.pointee.peerClosed {
            if connection.pointee.discard > 0, !discardPayload(slot, hosted) { break }
            guard connection.pointee.inputAvailable >= RequestHeader.byteCount else { break }
            guard parseOne(slot, hosted, limits) else { break }
        }
        compact(connection)
        if connection.pointee.stall == .volume || connection.pointee.stall == .memory {
            _ = stalledConnections.tryAppend(slot)
        }
        if connection.pointee.disconnecting { endIfDrained(slot) }
    }

    /// Moves what is left to the front, so that a whole header always fits.
    private func compact(_ connection: UnsafeMutablePointer<Connection>) {
        guard connection.pointee.input != nil else { return }
        let start = connection.pointee.inputStart
        guard start > 0 else { return }
        let count = connection.pointee.inputAvailable
        if count > 0 {
            memmove(connection.pointee.input!, connection.pointee.input! + start, count)
        }
        connection.pointee.inputStart = 0
        connection.pointee.inputEnd = count
    }

    /// One request; false when parsing must stop for now.
    private func parseOne(
        _ slot: Int32, _ hosted: HostedVolume, _ limits: ExportLimits
    ) -> Bool {
        let connection = connections + Int(slot)
        guard
            let header = RequestHeader(connection.pointee.input! + connection.pointee.inputStart),
            header.payloadLength <= Limits.maximumPayload
        else {
            beginClosing(slot)
            return false
        }
        let validated = header.validate(for: limits)
        if case .success(.disconnect) = validated {
            connection.pointee.disconnecting = true
            return false
        }
        guard connection.pointee.requestsInFlight < Limits.requestsPerConnection else {
            connection.pointee.stall = .replies
            return false
        }
        guard let taken = hosted.volume.takeRequest() else {
            connection.pointee.stall = .volume
            return false
        }
        let request = hosted.volume.request(taken)
        request.pointee.cookie = header.cookie
        request.pointee.owner =
            RequestOwner(connection: slot, generation: connection.pointee.generation).rawValue
        request.pointee.offset = header.offset
        request.pointee.length = UInt64(header.length)
        switch validated {
        case .failure(let error):
            connection.pointee.inputStart += RequestHeader.byteCount
            connection.pointee.requestsInFlight += 1
            refuse(slot, taken, header, error, hosted)
            return true
        case .success(let command):
            return start(slot, taken, command, header, hosted)
        }
    }

    /// Answers at once, or after the payload of a refused WRITE has gone by.
    private func refuse(
        _ slot: Int32, _ taken: Int32, _ header: RequestHeader, _ error: NBDError,
        _ hosted: HostedVolume
    ) {
        let connection = connections + Int(slot)
        let request = hosted.volume.request(taken)
        request.pointee.length = 0
        request.pointee.operation = header.payloadLength > 0 ? .write : .flush
        hosted.volume.refuse(taken, errno: Int32(error.rawValue))
        if header.payloadLength > 0 {
            connection.pointee.discard = header.payloadLength
            connection.pointee.refusedRequest = taken
        } else {
            queueReply(slot, taken, hosted)
        }
    }

    /// True when the refused payload has gone by completely.
    private func discardPayload(_ slot: Int32, _ hosted: HostedVolume) -> Bool {
        let connection = connections + Int(slot)
        let count = min(connection.pointee.discard, connection.pointee.inputAvailable)
        connection.pointee.inputStart += count
        connection.pointee.discard -= count
        guard connection.pointee.discard == 0 else { return false }
        let refused = connection.pointee.refusedRequest
        connection.pointee.refusedRequest = -1
        queueReply(slot, refused, hosted)
        return true
    }

    private func start(
        _ slot: Int32, _ taken: Int32, _ command: ValidatedRequest, _ header: RequestHeader,
        _ hosted: HostedVolume
    ) -> Bool {
        let connection = connections + Int(slot)
        let request = hosted.volume.request(taken)
        request.pointee.view = connection.pointee.view
        var needsMemory = false
        switch command {
        case .read:
            request.pointee.operation = .read
            needsMemory = true
        case .write(let fua):
            request.pointee.operation = .write
            request.pointee.fua = fua
            needsMemory = true
        case .writeZeroes(let fua, let noHole):
            request.pointee.operation = .writeZeroes
            request.pointee.fua = fua
            request.pointee.noHole = noHole
        case .trim(let fua):
            request.pointee.operation = .trim
            request.pointee.fua = fua
        case .flush, .disconnect:
            request.pointee.operation = .flush
            request.pointee.offset = 0
            request.pointee.length = 0
        }
        if needsMemory, header.length > 0 {
            let held = connection.pointee.payloadBytes
            guard held == 0 || held + Int(header.length) <= Limits.payloadPerConnection else {
                hosted.volume.releaseRequest(taken)
                connection.pointee.stall = .replies
                return false
            }
            guard let buffer = payloads.take(Int(header.length)) else {
                hosted.volume.releaseRequest(taken)
                connection.pointee.stall = .memory
                return false
            }
            request.pointee.buffer = buffer
            connection.pointee.payloadBytes += Int(header.length)
        }
        connection.pointee.inputStart += RequestHeader.byteCount
        connection.pointee.requestsInFlight += 1
        if header.payloadLength > 0 {
            connection.pointee.payloadRequest = taken
            connection.pointee.payloadFilled = 0
            let count = min(header.payloadLength, connection.pointee.inputAvailable)
            request.pointee.buffer!.copyMemory(
                from: connection.pointee.input! + connection.pointee.inputStart, byteCount: count)
            connection.pointee.inputStart += count
            connection.pointee.payloadFilled = count
            return payloadProgress(slot)
        }
        hosted.volume.submit(taken)
        return true
    }

    /// Submits the WRITE once its payload is whole; false while it is not.
    @discardableResult
    func payloadProgress(_ slot: Int32) -> Bool {
        let connection = connections + Int(slot)
        let hosted = hosted(connection.pointee.volume)
        let taken = connection.pointee.payloadRequest
        let request = hosted.volume.request(taken)
        guard connection.pointee.payloadFilled == Int(request.pointee.length) else {
            connection.pointee.lastProgress = monotonicNanoseconds()
            return false
        }
        connection.pointee.payloadRequest = -1
        hosted.bytesWritten += request.pointee.length
        hosted.volume.submit(taken)
        return true
    }

    /// Tries connections again that waited for request slots or memory.
    func retryStalled() {
        resourcesFreed = false
        for _ in 0..<stalledConnections.count {
            guard let slot = stalledConnections.popFirst() else { return }
            let stall = connections[Int(slot)].stall
            if connections[Int(slot)].isTransmitting, stall == .volume || stall == .memory {
                parse(slot)
                startPolling(slot)
            }
        }
    }

    // MARK: Replying

    func replyReady(_ taken: Int32, _ hosted: HostedVolume, _ owner: RequestOwner) {
        let slot = owner.slot
        if case .closing = connections[Int(slot)].phase {
            freeRequest(slot, taken, hosted)
            finishClosing(slot)
            return
        }
        queueReply(slot, taken, hosted)
    }

    private func queueReply(_ slot: Int32, _ taken: Int32, _ hosted: HostedVolume) {
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
                encodeReply(taken, hosted, area)
            }
            guard transmit(slot) else { return }
        }
    }

    private func encodeReply(
        _ taken: Int32, _ hosted: HostedVolume, _ area: UnsafeMutablePointer<SendArea>
    ) {
        let request = hosted.volume.request(taken)
        let header = area.pointee.headers + area.pointee.headerBytes
        area.pointee.headerBytes += SimpleReply.byteCount
        let error = request.pointee.error
        SimpleReply.encode(
            error: error == 0 ? 0 : NBDError(errno: error).rawValue,
            cookie: request.pointee.cookie, into: header)
        area.pointee.add(header, SimpleReply.byteCount)
        if request.pointee.operation == .read, error == 0, request.pointee.length > 0 {
            area.pointee.add(request.pointee.buffer!, Int(request.pointee.length))
            hosted.bytesRead += request.pointee.length
        }
    }

    /// Sends directly what the socket takes, the rest through the ring; false when the ring has it or it failed.
    private func transmit(_ slot: Int32) -> Bool {
        let connection = connections + Int(slot)
        let area = connection.pointee.output!
        while true {
            area.pointee.prepareMessage()
            let count = sendmsg(
                connection.pointee.socket, &area.pointee.message,
                Int32(MSG_DONTWAIT) | Int32(MSG_NOSIGNAL))
            if count >= 0 {
                if area.pointee.advance(count) {
                    sendFinished(slot)
                    return true
                }
                continue
            }
            if errno == EINTR { continue }
            guard errno == EAGAIN else {
                beginClosing(slot)
                return false
            }
            connection.pointee.sendArmed = true
            connection.pointee.lastProgress = monotonicNanoseconds()
            ring.send(
                connection.pointee.socket, &area.pointee.message,
                UserData(
                    kind: CompletionKind.send, generation: connection.pointee.generation,
                    slot: UInt32(slot)))
            return false
        }
    }

    func sent(_ slot: Int32, _ result: Int32) {
        let connection = connections + Int(slot)
        connection.pointee.sendArmed = false
        if case .closing = connection.pointee.phase { return finishClosing(slot) }
        if result < 0, result != -EINTR, result != -EAGAIN { return beginClosing(slot) }
        if !connection.pointee.isTransmitting { return handshakeSent(slot, result) }
        if connection.pointee.output!.pointee.advance(Int(max(0, result))) {
            sendFinished(slot)
            sendNext(slot)
        } else if transmit(slot) {
            sendNext(slot)
        }
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
