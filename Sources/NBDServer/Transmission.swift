// Transmission.swift: requests out of the receive buffer and into the volume.
//
// Must be prevented:
//   a refused request's payload is read as requests
//   requests of a client that is gone are carried out late, after it sent them again elsewhere
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
        let wasStalled = connection.pointee.stall != .none
        if wasStalled, wasAbandoned(connection) { return beginClosing(slot) }
        connection.pointee.stall = .none
        while connection.pointee.isTransmitting, !connection.pointee.disconnecting || connection.pointee.peerClosed {
            if connection.pointee.discard > 0, !discardPayload(slot, hosted) { break }
            guard connection.pointee.inputAvailable >= limits.style.requestByteCount else { break }
            guard parseOne(slot, hosted, limits) else { break }
        }
        compact(connection)
        if connection.pointee.stall != .none, !wasStalled { connection.pointee.stalledAt = monotonicNanoseconds() }
        if connection.pointee.stall == .volume || connection.pointee.stall == .memory {
            _ = stalledConnections.tryAppend(slot)
        }
        if connection.pointee.stall != .none { hurryCollisions(hosted, connection.pointee.stall) }
        if connection.pointee.disconnecting { endIfDrained(slot) }
    }

    /// Nobody counts how long a request waits that was not taken; so what takes its room does not wait for a remote.
    private func hurryCollisions(_ hosted: HostedVolume, _ stall: Connection.Stall) {
        guard stall == .memory else { return hosted.volume.hurryCollisions() }
        for number in volumes.indices where volumes[number]?.volume.isWaitingToSend == true {
            self.hosted(number).volume.hurryCollisions()
        }
    }

    /// A client that has been kept waiting for so long may have given the connection up and gone on with another one; the
    /// kernel's waits for a second at least.
    private static let abandonedNanoseconds: UInt64 = 900_000_000

    private func wasAbandoned(_ connection: UnsafeMutablePointer<Connection>) -> Bool {
        guard monotonicNanoseconds() - connection.pointee.stalledAt > Self.abandonedNanoseconds else { return false }
        var entry = pollfd(fd: connection.pointee.socket, events: Int16(farcopy_poll_peer_closed), revents: 0)
        return Glibc.poll(&entry, 1, 0) > 0
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
            let header = RequestHeader(
                connection.pointee.input! + connection.pointee.inputStart, style: limits.style),
            header.payloadLength <= UInt64(Limits.maximumPayload)
        else {
            beginClosing(slot)
            return false
        }
        var validated = header.validate(for: limits)
        if case .success(.disconnect) = validated {
            connection.pointee.disconnecting = true
            return false
        }
        if hosted.intakeIsClosed, connection.pointee.intakeSession != 0, case .success(let command) = validated,
            command.modifies
        {
            validated = .failure(.shutdown)
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
        request.pointee.length = header.length
        switch validated {
        case .failure(let error):
            connection.pointee.inputStart += limits.style.requestByteCount
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
        request.pointee.operation = header.type == Command.read.rawValue ? .read : .flush
        hosted.volume.refuse(taken, errno: Int32(error.rawValue))
        if header.payloadLength > 0 {
            connection.pointee.discard = Int(header.payloadLength)
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

    /// Carries a valid request out, or leaves it in the buffer when something is missing (false).
    private func start(
        _ slot: Int32, _ taken: Int32, _ command: ValidatedRequest, _ header: RequestHeader,
        _ hosted: HostedVolume
    ) -> Bool {
        let connection = connections + Int(slot)
        let request = hosted.volume.request(taken)
        request.pointee.view = connection.pointee.view
        prepare(request, for: command)
        let memory = payloadMemory(for: command, header, connection)
        if memory > Limits.smallPayload, !isArriving(header, connection) {
            hosted.volume.releaseRequest(taken)
            return false
        }
        if memory > 0 {
            guard let buffer = takePayload(connection, memory) else {
                hosted.volume.releaseRequest(taken)
                return false
            }
            request.pointee.buffer = buffer
        }
        connection.pointee.inputStart += connection.pointee.style.requestByteCount
        connection.pointee.requestsInFlight += 1
        connection.pointee.requestsTaken &+= 1
        switch command {
        case .read where header.length > Limits.wideReply && !connection.pointee.isWide:
            widen(connection)
            hosted.volume.submit(taken)
        case .write where header.payloadLength > 0:
            return beginPayload(slot, taken, Int(header.payloadLength), hosted)
        case .blockStatus(let reqOne):
            answerBlockStatus(slot, taken, reqOne: reqOne, hosted)
        case .cache:
            prefetch(connection.pointee.view, header.offset, header.length, hosted)
            hosted.volume.refuse(taken, errno: 0)
            queueReply(slot, taken, hosted)
        default:
            hosted.volume.submit(taken)
        }
        return true
    }

    private func prepare(_ request: UnsafeMutablePointer<Request>, for command: ValidatedRequest) {
        switch command {
        case .read(let df):
            request.pointee.operation = .read
            request.pointee.tag = df ? RequestTag.unfragmented : RequestTag.none
        case .write(let fua):
            request.pointee.operation = .write
            request.pointee.fua = fua
        case .writeZeroes(let fua, let noHole, let fast):
            request.pointee.operation = .writeZeroes
            request.pointee.fua = fua
            request.pointee.noHole = noHole
            request.pointee.fast = fast
        case .trim(let fua):
            request.pointee.operation = .trim
            request.pointee.fua = fua
        case .blockStatus:
            request.pointee.operation = .flush
            request.pointee.tag = RequestTag.blockStatus
        case .flush, .cache, .disconnect:
            request.pointee.operation = .flush
            request.pointee.length = 0
        }
    }

    /// A large payload has memory once a part of it is there, not when it is merely announced.
    private func isArriving(_ header: RequestHeader, _ connection: UnsafeMutablePointer<Connection>) -> Bool {
        let there = connection.pointee.inputAvailable - connection.pointee.style.requestByteCount
        return header.payloadLength == 0 || there >= Limits.payloadShown
    }

    private func payloadMemory(
        for command: ValidatedRequest, _ header: RequestHeader, _ connection: UnsafeMutablePointer<Connection>
    ) -> Int {
        switch command {
        case .read, .write: Int(header.length)
        case .blockStatus: connection.pointee.contexts.count * Self.statusChunkBytes
        default: 0
        }
    }

    /// Memory from the pool, counted as the connection's; nil, with the stall noted, when there is none for it just now.
    private func takePayload(
        _ connection: UnsafeMutablePointer<Connection>, _ count: Int
    ) -> UnsafeMutableRawPointer? {
        let held = connection.pointee.payloadBytes
        guard held == 0 || held + count <= Limits.payloadPerConnection else {
            connection.pointee.stall = .replies
            return nil
        }
        // What everybody needs to make progress is kept from those who want much.
        let small = held + count <= Limits.smallPayload
        guard small || payloads.freeBytes - count >= Limits.payloadReserve, let buffer = payloads.take(count) else {
            connection.pointee.stall = .memory
            return nil
        }
        connection.pointee.payloadBytes += count
        return buffer
    }

    /// Takes what has arrived of a WRITE's payload; false while it is not whole.
    private func beginPayload(_ slot: Int32, _ taken: Int32, _ length: Int, _ hosted: HostedVolume) -> Bool {
        let connection = connections + Int(slot)
        connection.pointee.payloadRequest = taken
        let count = min(length, connection.pointee.inputAvailable)
        hosted.volume.request(taken).pointee.buffer!.copyMemory(
            from: connection.pointee.input! + connection.pointee.inputStart, byteCount: count)
        connection.pointee.inputStart += count
        connection.pointee.payloadFilled = count
        return payloadProgress(slot)
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
}
