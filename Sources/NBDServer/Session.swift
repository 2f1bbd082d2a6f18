// Session.swift: a connection from accept to its end: handshake, hand-over to the volume's reactor, closing.

import Base
import CLibURing
import Glibc
import NBDProtocol
import Ring
import Volumes

extension Reactor {
    // MARK: Opening

    /// Takes an accepted socket; closes it when there are too many connections.
    func open(_ socket: Int32) {
        guard let slot = takeConnection(socket) else { return }
        let connection = connections + Int(slot)
        connection.pointee.phase = .handshake(Handshake())
        connection.pointee.handshakeOutput = Handshake.greeting
        flushHandshake(slot)
    }

    private func takeConnection(_ socket: Int32) -> Int32? {
        guard let slot = freeConnections.popFirst() else {
            close(socket)
            return nil
        }
        var on: Int32 = 1  // fails on unix sockets, which have no delay to switch off
        setsockopt(socket, Int32(IPPROTO_TCP), TCP_NODELAY, &on, socklen_t(MemoryLayout<Int32>.size))
        let connection = connections + Int(slot)
        let generation = connection.pointee.generation &+ 1
        connection.pointee = Connection()
        connection.pointee.generation = generation & 0xFF_FFFF
        connection.pointee.socket = socket
        connection.pointee.openedAt = monotonicNanoseconds()
        connection.pointee.input = .allocate(byteCount: Limits.receiveBuffer, alignment: 4096)
        connection.pointee.output = .allocate(capacity: 1)
        connection.pointee.output!.initialize(to: SendArea())
        openConnections += 1
        return slot
    }

    /// Takes a connection whose handshake another reactor has finished.
    func adopt(_ handoff: Handoff) {
        let entry = handoff.entry
        let hosted = hosted(entry.volume)
        guard let slot = takeConnection(handoff.socket) else { return }
        let connection = connections + Int(slot)
        switch entry.kind {
        case .volume:
            guard hosted.writable || entry.readOnly else { return release(slot) }
        case .copy(let id):
            guard hosted.volume.retainCopy(id) else { return release(slot) }
            connection.pointee.view = .copy(id)
        case .intake(let session):
            guard hosted.intakeSession == session else { return release(slot) }
            connection.pointee.intakeSession = session
        }
        connection.pointee.volume = entry.volume
        connection.pointee.phase = .transmission(
            ExportLimits(
                size: entry.size, readOnly: entry.readOnly,
                maximumPayload: UInt32(Limits.maximumPayload)))
        handoff.unread.withUnsafeBytes { bytes in
            if let base = bytes.baseAddress {
                connection.pointee.input!.copyMemory(from: base, byteCount: bytes.count)
            }
        }
        connection.pointee.inputEnd = handoff.unread.count
        parse(slot)
        startPolling(slot)
    }

    // MARK: Handshake

    private func handshake(_ slot: Int32) {
        let connection = connections + Int(slot)
        guard case .handshake(var machine) = connection.pointee.phase else { return }
        let bytes = UnsafeRawBufferPointer(
            start: connection.pointee.input, count: connection.pointee.inputEnd)
        let actions = machine.receive(bytes, catalog: exports)
        connection.pointee.inputEnd = 0
        connection.pointee.phase = .handshake(machine)
        for action in actions {
            switch action {
            case .send(let bytes): connection.pointee.handshakeOutput += bytes
            case .close: connection.pointee.phase = .farewell
            case .start(let export):
                startTransmission(slot, export.name, Array(machine.unread))
                return
            }
        }
        flushHandshake(slot)
    }

    /// Sends the last handshake bytes, then hands the socket to the reactor of the volume.
    private func startTransmission(_ slot: Int32, _ name: String, _ unread: [UInt8]) {
        let connection = connections + Int(slot)
        let length = connection.pointee.handshakeOutput.count
        guard sendHandshakeNow(connection) == length, let entry = exports.find(name),
            unread.count <= Limits.receiveBuffer
        else { return beginClosing(slot) }
        let socket = connection.pointee.socket
        connection.pointee.socket = -1
        release(slot)
        entry.reactor.leave(.adopt(Handoff(socket: socket, entry: entry, unread: unread)))
    }

    /// Sends what the handshake has queued at once: -1, or how many bytes the socket took.
    private func sendHandshakeNow(_ connection: UnsafeMutablePointer<Connection>) -> Int {
        connection.pointee.handshakeOutput.withUnsafeBytes {
            $0.count == 0
                ? 0
                : Glibc.send(
                    connection.pointee.socket, $0.baseAddress, $0.count, Int32(MSG_DONTWAIT) | Int32(MSG_NOSIGNAL))
        }
    }

    /// Sends what the handshake has queued; what the socket does not take (a long list of exports) goes through the ring,
    /// and nothing is received until it has gone.
    private func flushHandshake(_ slot: Int32) {
        let connection = connections + Int(slot)
        let count = sendHandshakeNow(connection)
        guard count >= 0 || errno == EAGAIN else { return beginClosing(slot) }
        let rest = connection.pointee.handshakeOutput.dropFirst(max(0, count))
        connection.pointee.handshakeOutput = []
        guard !rest.isEmpty else { return handshakeFlushed(slot) }
        let buffer = UnsafeMutableRawPointer.allocate(byteCount: rest.count, alignment: 16)
        rest.withUnsafeBytes { buffer.copyMemory(from: $0.baseAddress!, byteCount: $0.count) }
        connection.pointee.handshakeRest = buffer
        connection.pointee.output!.pointee.reset()
        connection.pointee.output!.pointee.add(buffer, rest.count)
        sendHandshakeRest(slot)
    }

    private func sendHandshakeRest(_ slot: Int32) {
        let connection = connections + Int(slot)
        connection.pointee.output!.pointee.prepareMessage()
        connection.pointee.sendArmed = true
        ring.send(
            connection.pointee.socket, &connection.pointee.output!.pointee.message,
            UserData(kind: CompletionKind.send, generation: connection.pointee.generation, slot: UInt32(slot)))
    }

    func handshakeSent(_ slot: Int32, _ result: Int32) {
        let connection = connections + Int(slot)
        guard connection.pointee.output!.pointee.advance(Int(max(0, result))) else { return sendHandshakeRest(slot) }
        connection.pointee.handshakeRest?.deallocate()
        connection.pointee.handshakeRest = nil
        handshakeFlushed(slot)
    }

    private func handshakeFlushed(_ slot: Int32) {
        switch connections[Int(slot)].phase {
        case .farewell: beginClosing(slot)
        case .handshake: armReceive(slot)
        default: break
        }
    }

    // MARK: Receiving

    func armReceive(_ slot: Int32) {
        let connection = connections + Int(slot)
        guard !connection.pointee.receiveArmed, !connection.pointee.peerClosed else { return }
        if case .closing = connection.pointee.phase { return }
        if case .free = connection.pointee.phase { return }
        let (target, room) = receiveTarget(slot)
        guard room > 0 else { return }
        connection.pointee.receiveArmed = true
        ring.receive(
            connection.pointee.socket, target, room,
            UserData(
                kind: CompletionKind.receive, generation: connection.pointee.generation,
                slot: UInt32(slot)))
    }

    /// Where the next bytes go: into a payload that has begun to arrive, or into the receive buffer.
    func receiveTarget(_ slot: Int32) -> (UnsafeMutableRawPointer, Int) {
        let connection = connections + Int(slot)
        if connection.pointee.payloadRequest >= 0 {
            let request = hosted(connection.pointee.volume).volume
                .request(connection.pointee.payloadRequest)
            let filled = connection.pointee.payloadFilled
            return (request.pointee.buffer! + filled, Int(request.pointee.length) - filled)
        }
        let end = connection.pointee.inputEnd
        return (connection.pointee.input! + end, Limits.receiveBuffer - end)
    }

    func received(_ slot: Int32, _ result: Int32) {
        let connection = connections + Int(slot)
        connection.pointee.receiveArmed = false
        if case .closing = connection.pointee.phase { return finishClosing(slot) }
        if result == -EINTR || result == -EAGAIN { return armReceive(slot) }
        guard result > 0 else {
            if result == 0 { peerClosed(slot) } else { beginClosing(slot) }
            return
        }
        switch connection.pointee.phase {
        case .handshake:
            connection.pointee.inputEnd += Int(result)
            handshake(slot)
        case .transmission:
            tookBytes(slot, Int(result))
            startPolling(slot)
        case .farewell, .free, .closing: break
        }
    }

    /// Bytes have arrived at the receive target.
    private func tookBytes(_ slot: Int32, _ count: Int) {
        let connection = connections + Int(slot)
        connection.pointee.idlePolls = 0
        if connection.pointee.payloadRequest >= 0 {
            let request = hosted(connection.pointee.volume).volume.request(connection.pointee.payloadRequest)
            let missing = Int(request.pointee.length) - connection.pointee.payloadFilled
            connection.pointee.payloadFilled += min(missing, count)
            connection.pointee.inputEnd += max(0, count - missing)
            payloadProgress(slot)
        } else {
            connection.pointee.inputEnd += count
        }
        parse(slot)
    }

    /// The client has shut its side: what it sent is carried out and answered, then the connection ends.
    private func peerClosed(_ slot: Int32) {
        let connection = connections + Int(slot)
        connection.pointee.peerClosed = true
        connection.pointee.disconnecting = true
        if case .transmission = connection.pointee.phase {
            endIfDrained(slot)
        } else {
            beginClosing(slot)
        }
    }

    /// After DISC or the client's end: closes once every request is answered.
    func endIfDrained(_ slot: Int32) {
        let connection = connections + Int(slot)
        guard connection.pointee.disconnecting, connection.pointee.isTransmitting else { return }
        let unparsed = connection.pointee.stall != .none
        let partial = connection.pointee.payloadRequest >= 0 || connection.pointee.discard > 0
        let answered =
            connection.pointee.requestsInFlight == (connection.pointee.payloadRequest >= 0 ? 1 : 0)
            + (connection.pointee.refusedRequest >= 0 ? 1 : 0)
        if answered, !unparsed || partial { beginClosing(slot) }
    }

    // MARK: Polling

    /// A direct, non-blocking receive is cheaper than the ring while a client is busy.
    private static let idlePollLimit = 60

    func startPolling(_ slot: Int32) {
        let connection = connections + Int(slot)
        guard connection.pointee.isTransmitting, !connection.pointee.polled,
            !connection.pointee.receiveArmed, !connection.pointee.peerClosed
        else { return }
        connection.pointee.polled = true
        connection.pointee.idlePolls = 0
        polledConnections[polledCount] = slot
        polledCount += 1
    }

    func pollConnections() {
        var index = 0
        while index < polledCount {
            let slot = polledConnections[index]
            if poll(slot) {
                index += 1
            } else if index < polledCount, polledConnections[index] == slot {
                // A connection that was released meanwhile has left the list already.
                connections[Int(slot)].polled = false
                polledCount -= 1
                polledConnections[index] = polledConnections[polledCount]
            }
        }
    }

    /// Receives made for one connection before its requests are carried out and answered together.
    private static let receivesPerTurn = 16

    /// False when the connection is to leave the list.
    private func poll(_ slot: Int32) -> Bool {
        let connection = connections + Int(slot)
        for _ in 0..<Self.receivesPerTurn {
            guard connection.pointee.isTransmitting, !connection.pointee.peerClosed,
                !connection.pointee.disconnecting
            else { return false }
            // Whoever ends the stall starts the polling again.
            guard connection.pointee.stall == .none else { return false }
            let count = receiveNow(connection)
            if count > 0 {
                tookBytes(slot, count)
                continue
            }
            if count < 0, errno == EAGAIN || errno == EINTR { return stillPolled(slot) }
            connection.pointee.polled = false
            if count == 0 { peerClosed(slot) } else { beginClosing(slot) }
            return false
        }
        return true
    }

    /// A client that has been silent for a while is left to the ring.
    private func stillPolled(_ slot: Int32) -> Bool {
        let connection = connections + Int(slot)
        connection.pointee.idlePolls += 1
        if connection.pointee.idlePolls <= Self.idlePollLimit { return true }
        connection.pointee.polled = false
        armReceive(slot)
        return false
    }

    /// Takes what has arrived: the rest of a payload straight to its place, and what follows it into the receive buffer.
    private func receiveNow(_ connection: UnsafeMutablePointer<Connection>) -> Int {
        let end = connection.pointee.inputEnd
        let buffer = iovec(iov_base: connection.pointee.input! + end, iov_len: Limits.receiveBuffer - end)
        guard connection.pointee.payloadRequest >= 0 else {
            return recv(connection.pointee.socket, buffer.iov_base, buffer.iov_len, Int32(MSG_DONTWAIT))
        }
        let request = hosted(connection.pointee.volume).volume.request(connection.pointee.payloadRequest)
        let filled = connection.pointee.payloadFilled
        let payload = iovec(
            iov_base: request.pointee.buffer! + filled, iov_len: Int(request.pointee.length) - filled)
        var pieces = (payload, buffer)
        return withUnsafeMutablePointer(to: &pieces) { pieces in
            pieces.withMemoryRebound(to: iovec.self, capacity: 2) { pieces in
                var message = msghdr()
                message.msg_iov = pieces
                message.msg_iovlen = 2
                return recvmsg(connection.pointee.socket, &message, Int32(MSG_DONTWAIT))
            }
        }
    }

    // MARK: Closing

    /// Shuts the socket; the slot is free once the ring and the volume have let go of it.
    func beginClosing(_ slot: Int32) {
        let connection = connections + Int(slot)
        switch connection.pointee.phase {
        case .free, .closing: return
        default: break
        }
        connection.pointee.phase = .closing
        if connection.pointee.socket >= 0 { shutdown(connection.pointee.socket, Int32(SHUT_RDWR)) }
        dropUnsubmitted(slot)
        finishClosing(slot)
    }

    /// A WRITE whose payload has not arrived whole is never carried out.
    private func dropUnsubmitted(_ slot: Int32) {
        let connection = connections + Int(slot)
        guard connection.pointee.volume >= 0 else { return }
        let hosted = hosted(connection.pointee.volume)
        if connection.pointee.payloadRequest >= 0, !connection.pointee.receiveArmed {
            freeRequest(slot, connection.pointee.payloadRequest, hosted)
            connection.pointee.payloadRequest = -1
        }
        if connection.pointee.refusedRequest >= 0 {
            freeRequest(slot, connection.pointee.refusedRequest, hosted)
            connection.pointee.refusedRequest = -1
        }
        while let request = connection.pointee.replies.popFirst(hosted.volume) {
            freeRequest(slot, request, hosted)
        }
    }

    func finishClosing(_ slot: Int32) {
        let connection = connections + Int(slot)
        guard case .closing = connection.pointee.phase, !connection.pointee.receiveArmed,
            !connection.pointee.sendArmed
        else { return }
        dropUnsubmitted(slot)
        if connection.pointee.volume >= 0 {
            let hosted = hosted(connection.pointee.volume)
            while let request = connection.pointee.sending.popFirst(hosted.volume) {
                freeRequest(slot, request, hosted)
            }
        }
        guard connection.pointee.requestsInFlight == 0 else { return }
        release(slot)
    }

    private func release(_ slot: Int32) {
        let connection = connections + Int(slot)
        if connection.pointee.volume >= 0, connection.pointee.view.rawValue >= 0 {
            hosted(connection.pointee.volume).volume.releaseCopy(connection.pointee.view.rawValue)
        }
        if connection.pointee.polled { unpoll(slot) }
        if connection.pointee.socket >= 0 { close(connection.pointee.socket) }
        connection.pointee.input?.deallocate()
        connection.pointee.handshakeRest?.deallocate()
        connection.pointee.output?.pointee.deallocate()
        connection.pointee.output?.deallocate()
        let generation = connection.pointee.generation
        connection.pointee = Connection()
        connection.pointee.generation = generation
        freeConnections.append(slot)
        openConnections -= 1
        resourcesFreed = true
    }

    private func unpoll(_ slot: Int32) {
        for index in 0..<polledCount where polledConnections[index] == slot {
            polledCount -= 1
            polledConnections[index] = polledConnections[polledCount]
            return
        }
    }
}
