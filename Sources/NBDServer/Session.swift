// Session.swift: a connection from accept to its end: handshake, TLS, hand-over to the volume's reactor, closing.

import Base
import CLibURing
import Glibc
import NBDProtocol
import Ring
import TLS
import Volumes

extension Reactor {
    // MARK: Opening

    /// Takes an accepted socket; closes it when there are too many connections.
    package func open(_ socket: Int32) {
        let client = Client(address: PeerAddress(socket: socket))
        if openConnections >= settings.budget.limits.handshakes {
            refuse("refused \(client.text): \(openConnections) clients are in their handshake already")
            close(socket)
            return
        }
        if let reason = settings.budget.admit(client.address) {
            refuse("refused \(client.text): \(reason)")
            close(socket)
            return
        }
        guard let slot = takeConnection(socket, client) else { return }
        let connection = connections + Int(slot)
        connection.pointee.phase = .handshake(Handshake(tls: exports.tlsPolicy))
        connection.pointee.handshakeOutput = Handshake.greeting
        flushHandshake(slot)
    }

    func refuse(_ text: String) {
        for line in refusalLog.lines(for: text, now: monotonicNanoseconds()) { settings.onRefusal?(line) }
    }

    /// A slot for a connection that was counted in; a socket that finds none is closed.
    private func takeConnection(_ socket: Int32, _ client: Client) -> Int32? {
        guard let slot = freeConnections.popFirst() else {
            refuse("refused \(client.text): reactor \(number) has \(Limits.connectionsPerReactor) connections")
            close(socket)
            settings.budget.leave(client.address)
            return nil
        }
        var on: Int32 = 1  // fails on unix sockets, which have no delay to switch off
        setsockopt(socket, Int32(IPPROTO_TCP), TCP_NODELAY, &on, socklen_t(MemoryLayout<Int32>.size))
        let connection = connections + Int(slot)
        let generation = connection.pointee.generation &+ 1
        connection.pointee = Connection()
        connection.pointee.generation = generation & 0xFF_FFFF
        connection.pointee.socket = socket
        connection.pointee.client = client
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
        guard let slot = takeConnection(handoff.socket, handoff.client) else {
            handoff.tls?.free()
            return
        }
        let connection = connections + Int(slot)
        connection.pointee.tls = handoff.tls
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
        connection.pointee.style = handoff.negotiated.style
        connection.pointee.contexts = handoff.negotiated.contexts.compactMap { entry.context($0) }
        connection.pointee.phase = .transmission(
            ExportLimits(
                size: entry.size, readOnly: entry.readOnly, maximumPayload: UInt32(Limits.maximumPayload),
                style: connection.pointee.style, hasContexts: !connection.pointee.contexts.isEmpty))
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

    func handshake(_ slot: Int32) {
        let connection = connections + Int(slot)
        guard case .handshake(var machine) = connection.pointee.phase else { return }
        let bytes = UnsafeRawBufferPointer(
            start: connection.pointee.input, count: connection.pointee.inputEnd)
        let catalog = ClientCatalog(exports: exports, client: connection.pointee.client, refused: refuse)
        let actions = machine.receive(bytes, catalog: catalog)
        connection.pointee.inputEnd = 0
        connection.pointee.phase = .handshake(machine)
        for action in actions {
            switch action {
            case .send(let bytes): connection.pointee.handshakeOutput += bytes
            case .close: connection.pointee.phase = .farewell
            case .startTLS: connection.pointee.phase = .securing(machine)
            case .start(let export, let negotiated):
                connection.pointee.phase = .departing(
                    Departure(export: export.name, negotiated: negotiated, unread: Array(machine.unread)))
            }
        }
        flushHandshake(slot)
    }

    /// Sends what the handshake has queued; nothing is received until it has gone.
    private func flushHandshake(_ slot: Int32) {
        let connection = connections + Int(slot)
        let bytes = connection.pointee.handshakeOutput
        connection.pointee.handshakeOutput = []
        guard !bytes.isEmpty else { return handshakeFlushed(slot) }
        let buffer = UnsafeMutableRawPointer.allocate(byteCount: bytes.count, alignment: 16)
        bytes.withUnsafeBytes { buffer.copyMemory(from: $0.baseAddress!, byteCount: $0.count) }
        connection.pointee.handshakeBytes = buffer
        connection.pointee.output!.pointee.reset()
        connection.pointee.output!.pointee.add(buffer, bytes.count)
        pushHandshake(slot)
    }

    private func pushHandshake(_ slot: Int32) {
        let connection = connections + Int(slot)
        switch push(connection) {
        case .blocked: armSend(slot)
        case .failed: beginClosing(slot)
        case .all:
            connection.pointee.handshakeBytes?.deallocate()
            connection.pointee.handshakeBytes = nil
            handshakeFlushed(slot)
        }
    }

    /// The ring has sent a part of what the handshake queued, or says that more can be sent.
    func handshakeSent(_ slot: Int32, _ result: Int32) {
        let connection = connections + Int(slot)
        if case .securing = connection.pointee.phase, connection.pointee.handshakeBytes == nil {
            return advanceTLS(slot)
        }
        if connection.pointee.tls == nil, connection.pointee.output!.pointee.advance(Int(max(0, result))) {
            connection.pointee.output!.pointee.reset()
        }
        pushHandshake(slot)
    }

    private func handshakeFlushed(_ slot: Int32) {
        let connection = connections + Int(slot)
        switch connection.pointee.phase {
        case .farewell: beginClosing(slot)
        case .departing(let departure): depart(slot, departure)
        case .securing: beginTLS(slot)
        case .handshake: armReceive(slot)
        case .transmission, .closing, .free: break
        }
    }

    /// Hands the socket to the reactor of the volume.
    private func depart(_ slot: Int32, _ departure: Departure) {
        let connection = connections + Int(slot)
        guard let entry = exports.find(departure.export), departure.unread.count <= Limits.receiveBuffer else {
            return beginClosing(slot)
        }
        let handoff = Handoff(
            socket: connection.pointee.socket, client: connection.pointee.client, tls: connection.pointee.tls,
            entry: entry, negotiated: departure.negotiated, unread: departure.unread)
        connection.pointee.socket = -1
        connection.pointee.tls = nil
        release(slot)
        entry.reactor.leave(.adopt(handoff))
    }

    // MARK: TLS

    /// The acknowledgement of STARTTLS has gone: from here on every byte is TLS.
    private func beginTLS(_ slot: Int32) {
        let connection = connections + Int(slot)
        let socket = connection.pointee.socket
        guard let credentials = settings.credentials, fcntl(socket, F_SETFL, O_NONBLOCK) == 0,
            let session = try? TLSSession(credentials, socket: socket)
        else { return beginClosing(slot) }
        connection.pointee.tls = TLSTransport(session)
        advanceTLS(slot)
    }

    func advanceTLS(_ slot: Int32) {
        let connection = connections + Int(slot)
        guard case .securing(var machine) = connection.pointee.phase, let tls = connection.pointee.tls else { return }
        switch tls.session.handshake() {
        case .wantsRead: armReceive(slot)
        case .wantsWrite: armSend(slot)
        case .failed(let reason):
            refuse("refused \(connection.pointee.client.text): TLS handshake: \(reason)")
            beginClosing(slot)
        case .done:
            connection.pointee.client.isSecure = true
            connection.pointee.client.identity = tls.session.identity
            machine.secured()
            connection.pointee.phase = .handshake(machine)
            readHandshake(slot)
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
        if let tls = connection.pointee.tls, !connection.pointee.sendArmed, tls.pending == 0 { tls.session.farewell() }
        if connection.pointee.socket >= 0 { shutdown(connection.pointee.socket, Int32(SHUT_RDWR)) }
        dropUnsubmitted(slot)
        orphanRequests(slot)
        finishClosing(slot)
    }

    /// What the client will not hear of any more, and may send again on another connection.
    func orphanRequests(_ slot: Int32) {
        let connection = connections + Int(slot)
        guard connection.pointee.volume >= 0, connection.pointee.requestsInFlight > 0 else { return }
        let owner = RequestOwner(connection: slot, generation: connection.pointee.generation)
        hosted(connection.pointee.volume).volume.orphanRequests(of: owner.rawValue)
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
            let hosted = hosted(connection.pointee.volume)
            hosted.volume.releaseCopy(connection.pointee.view.rawValue)
            hosted.restFiles()
        }
        if connection.pointee.polled { unpoll(slot) }
        if connection.pointee.isWide { wideConnections -= 1 }
        connection.pointee.tls?.free()
        if connection.pointee.socket >= 0 {
            close(connection.pointee.socket)
            settings.budget.leave(connection.pointee.client.address)
        }
        connection.pointee.input?.deallocate()
        connection.pointee.handshakeBytes?.deallocate()
        connection.pointee.output?.pointee.deallocate()
        connection.pointee.output?.deallocate()
        let generation = connection.pointee.generation
        connection.pointee = Connection()
        connection.pointee.generation = generation
        freeConnections.append(slot)
        openConnections -= 1
        resourcesFreed = true
    }
}
