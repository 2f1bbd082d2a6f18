// Receiving.swift: when a connection is read: polled directly while its client is busy, armed on the ring otherwise.

import Base
import CLibURing
import Glibc
import NBDProtocol
import Ring
import Volumes

extension Reactor {
    func received(_ slot: Int32, _ result: Int32) {
        let connection = connections + Int(slot)
        connection.pointee.receiveArmed = false
        if case .closing = connection.pointee.phase { return finishClosing(slot) }
        if result == -EINTR || result == -EAGAIN { return armReceive(slot) }
        if connection.pointee.tls != nil { return readable(slot) }
        guard result > 0 else {
            if result == 0 { peerClosed(slot) } else { beginClosing(slot) }
            return
        }
        tookBytes(slot, Int(result))
    }

    /// The socket of a TLS connection can be read.
    private func readable(_ slot: Int32) {
        let connection = connections + Int(slot)
        switch connection.pointee.phase {
        case .securing: advanceTLS(slot)
        case .handshake: readHandshake(slot)
        case .transmission: startPolling(slot)
        case .departing, .farewell, .free, .closing: break
        }
    }

    /// Reads options through TLS until there are no more for now.
    func readHandshake(_ slot: Int32) {
        let connection = connections + Int(slot)
        let count = receiveNow(slot)
        if count > 0 {
            tookBytes(slot, count)
        } else if count < 0, errno == EAGAIN || errno == EINTR {
            armReceive(slot)
        } else if count == 0, case .handshake = connection.pointee.phase {
            peerClosed(slot)
        } else {
            beginClosing(slot)
        }
    }

    /// Bytes have arrived at the receive target.
    private func tookBytes(_ slot: Int32, _ count: Int) {
        let connection = connections + Int(slot)
        switch connection.pointee.phase {
        case .handshake:
            connection.pointee.inputEnd += count
            handshake(slot)
        case .transmission:
            tookRequests(slot, count)
            startPolling(slot)
        case .securing, .departing, .farewell, .free, .closing: break
        }
    }

    private func tookRequests(_ slot: Int32, _ count: Int) {
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
            orphanRequests(slot)
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
    private static let idlePollLimit = 200

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
            let count = receiveNow(slot)
            if count > 0 {
                let before = connection.pointee.requestsTaken
                tookRequests(slot, count)
                // A client that has one request under way waits for its answer: there is nothing more to receive.
                if connection.pointee.requestsTaken &- before == 1, connection.pointee.requestsInFlight == 1,
                    connection.pointee.payloadRequest < 0
                {
                    return connection.pointee.isTransmitting
                }
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

    func unpoll(_ slot: Int32) {
        for index in 0..<polledCount where polledConnections[index] == slot {
            polledCount -= 1
            polledConnections[index] = polledConnections[polledCount]
            return
        }
    }
}
