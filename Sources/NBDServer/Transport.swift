// Transport.swift: bytes between a connection and its client, in the clear or through TLS, without blocking.
//
// Direct, non-blocking calls come first; only when the socket has nothing, or takes nothing, is the ring asked: to move
// plain bytes, or, under TLS, to say when to try again.

import Base
import CLibURing
import Glibc
import Ring
import TLS
import Volumes

/// TLS of one connection.
struct TLSTransport {
    let session: TLSSession
    /// Pieces of the send area, gathered into one record.
    let record: UnsafeMutableRawPointer
    /// Bytes of a record that the socket has not taken whole; the same bytes must be offered again.
    var pending = 0

    init(_ session: TLSSession) {
        self.session = session
        record = .allocate(byteCount: TLSSession.recordByteCount, alignment: 64)
    }

    func free() {
        session.free()
        record.deallocate()
    }

    /// Fills the record from the front of the send area, which keeps it until it is sent.
    mutating func gather(_ area: UnsafeMutablePointer<SendArea>) {
        guard pending == 0 else { return }
        for index in area.pointee.vectorStart..<area.pointee.vectorCount {
            let piece = area.pointee.vector[index]
            let count = min(piece.iov_len, TLSSession.recordByteCount - pending)
            (record + pending).copyMemory(from: piece.iov_base, byteCount: count)
            pending += count
            if pending == TLSSession.recordByteCount { break }
        }
    }
}

/// What became of a send.
enum Pushed { case all, blocked, failed }

extension Reactor {
    /// Sends what is in the send area as far as the socket takes it at once.
    func push(_ connection: UnsafeMutablePointer<Connection>) -> Pushed {
        let area = connection.pointee.output!
        while true {
            let count = connection.pointee.tls == nil ? sendPlain(connection) : sendRecord(connection)
            if count >= 0 {
                if area.pointee.advance(count) { return .all }
                continue
            }
            if errno == EINTR { continue }
            return errno == EAGAIN ? .blocked : .failed
        }
    }

    private func sendPlain(_ connection: UnsafeMutablePointer<Connection>) -> Int {
        let area = connection.pointee.output!
        area.pointee.prepareMessage()
        return sendmsg(connection.pointee.socket, &area.pointee.message, Int32(MSG_DONTWAIT) | Int32(MSG_NOSIGNAL))
    }

    private func sendRecord(_ connection: UnsafeMutablePointer<Connection>) -> Int {
        connection.pointee.tls!.gather(connection.pointee.output!)
        let tls = connection.pointee.tls!
        let count = tls.session.send(tls.record, tls.pending)
        // A record goes as a whole or not at all.
        if count >= 0 { connection.pointee.tls!.pending = 0 }
        return count
    }

    /// Lets the ring send what the socket did not take, or tell when it takes more.
    func armSend(_ slot: Int32) {
        let connection = connections + Int(slot)
        connection.pointee.sendArmed = true
        connection.pointee.lastProgress = monotonicNanoseconds()
        let userData = UserData(
            kind: CompletionKind.send, generation: connection.pointee.generation, slot: UInt32(slot))
        if connection.pointee.tls == nil {
            connection.pointee.output!.pointee.prepareMessage()
            ring.send(connection.pointee.socket, &connection.pointee.output!.pointee.message, userData)
        } else {
            ring.pollOnce(connection.pointee.socket, Int16(POLLOUT), userData)
        }
    }

    /// Gives a client of large reads a large send buffer. TCP sizes its own.
    func widen(_ connection: UnsafeMutablePointer<Connection>) {
        guard wideConnections < Limits.wideConnectionsPerReactor, connection.pointee.client.address == .unix else {
            return
        }
        connection.pointee.isWide = true
        wideConnections += 1
        var bytes = Int32(Limits.wideSendBuffer)
        let size = socklen_t(MemoryLayout<Int32>.size)
        // The privileged option goes beyond what net.core.wmem_max allows.
        if setsockopt(connection.pointee.socket, SOL_SOCKET, SO_SNDBUFFORCE, &bytes, size) != 0 {
            setsockopt(connection.pointee.socket, SOL_SOCKET, SO_SNDBUF, &bytes, size)
        }
    }

    func armReceive(_ slot: Int32) {
        let connection = connections + Int(slot)
        guard !connection.pointee.receiveArmed, !connection.pointee.peerClosed else { return }
        if case .closing = connection.pointee.phase { return }
        if case .free = connection.pointee.phase { return }
        let userData = UserData(
            kind: CompletionKind.receive, generation: connection.pointee.generation, slot: UInt32(slot))
        if connection.pointee.tls != nil {
            connection.pointee.receiveArmed = true
            ring.pollOnce(connection.pointee.socket, Int16(POLLIN), userData)
            return
        }
        let (target, room) = receiveTarget(slot)
        guard room > 0 else { return }
        connection.pointee.receiveArmed = true
        ring.receive(connection.pointee.socket, target, room, userData)
    }

    /// Where the next bytes go: into a payload that has begun to arrive, or into the receive buffer.
    private func receiveTarget(_ slot: Int32) -> (UnsafeMutableRawPointer, Int) {
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

    /// Takes what has arrived: the rest of a payload straight to its place, and what follows it into the receive buffer.
    /// As `recv`: bytes, 0 at the client's end, or -1 and `errno`.
    func receiveNow(_ slot: Int32) -> Int {
        let connection = connections + Int(slot)
        if let tls = connection.pointee.tls {
            let (target, room) = receiveTarget(slot)
            return tls.session.receive(target, room)
        }
        let end = connection.pointee.inputEnd
        let buffer = iovec(iov_base: connection.pointee.input! + end, iov_len: Limits.receiveBuffer - end)
        guard connection.pointee.payloadRequest >= 0 else {
            return recv(connection.pointee.socket, buffer.iov_base, buffer.iov_len, Int32(MSG_DONTWAIT))
        }
        let (target, room) = receiveTarget(slot)
        var pieces = (iovec(iov_base: target, iov_len: room), buffer)
        return withUnsafeMutablePointer(to: &pieces) { pieces in
            pieces.withMemoryRebound(to: iovec.self, capacity: 2) { pieces in
                var message = msghdr()
                message.msg_iov = pieces
                message.msg_iovlen = 2
                return recvmsg(connection.pointee.socket, &message, Int32(MSG_DONTWAIT))
            }
        }
    }
}
