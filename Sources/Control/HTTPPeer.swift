// HTTPPeer.swift: calls to a control API, the peer's or the local site's, over TCP or a unix socket.

import AsyncHTTPClient
import Base
import FoundationEssentials
import NBDProtocol
import NIOCore
import Replication

package struct ControlClient: Sendable {
    /// Lives as long as the process. A site that is down is told at once instead of being called until the answer is due,
    /// which for calls that wait for a copy may be days.
    private static let http: HTTPClient = {
        var configuration = HTTPClient.Configuration()
        configuration.connectionPool.retryConnectionEstablishment = false
        // Checksums are asked for many at a time, so that a long way does not hold them up.
        configuration.connectionPool.concurrentHTTP1ConnectionsPerHostSoftLimit = 32
        configuration.timeout.connect = .seconds(10)
        // Before the server ends an idle connection, or a call could go into one that is just being closed.
        configuration.connectionPool.idleTimeout = .seconds(Int64(Limits.controlIdleSeconds / 2))
        return HTTPClient(eventLoopGroupProvider: .singleton, configuration: configuration)
    }()

    let address: Address

    package init(address: Address) { self.address = address }

    private func url(_ path: String) -> String {
        switch address {
        case .unix(let socket):
            let encoded = socket.utf8.map { byte in
                let plain = (0x30...0x39).contains(byte) || (0x41...0x5A).contains(byte) || (0x61...0x7A).contains(byte)
                return plain ? String(UnicodeScalar(byte)) : "%" + (byte < 16 ? "0" : "") + String(byte, radix: 16)
            }.joined()
            return "http+unix://\(encoded)\(path)"
        case .tcp: return "http://\(address)\(path)"
        }
    }

    /// - Throws: `Refusal` with the peer's words when it refuses; other errors when it cannot be reached.
    package func call(
        _ method: String, _ path: String, body: [UInt8]? = nil, seconds: Int64 = 30
    ) async throws -> [UInt8] {
        var request = HTTPClientRequest(url: url(path))
        request.method = .init(rawValue: method)
        // Also without a body: it tells the call from what a page in a browser can send.
        if method != "GET" { request.headers.add(name: "content-type", value: "application/json") }
        if let body { request.body = .bytes(ByteBuffer(bytes: body)) }
        let response = try await Self.http.execute(request, timeout: .seconds(seconds))
        let bytes = try await response.body.collect(upTo: 16 << 20)
        let answer = [UInt8](buffer: bytes)
        guard (200..<300).contains(Int(response.status.code)) else {
            let words = try? JSONDecoder().decode(ErrorAnswer.self, from: Data(answer))
            throw Refusal(
                words?.error ?? "the control API answered \(response.status)", .init(status: Int(response.status.code)))
        }
        return answer
    }

    package func call<Answer: Decodable>(
        _ method: String, _ path: String, _ body: (some Encodable & Sendable)?, seconds: Int64 = 30
    ) async throws -> Answer {
        let answer = try await call(
            method, path, body: try body.map { [UInt8](try JSONEncoder().encode($0)) }, seconds: seconds)
        return try JSONDecoder().decode(Answer.self, from: Data(answer))
    }
}

/// The body of a call that has none.
struct Nothing: Codable, Sendable {}

struct HTTPPeer: PeerClient {
    let client: ControlClient
    let group: String
    let site: String
    let siteID: String

    init(address: Address, group: String, site: String, siteID: String) {
        client = ControlClient(address: address)
        self.group = group
        self.site = site
        self.siteID = siteID
    }

    /// A refusal in the peer's words; whatever else went wrong may mend itself.
    private func ask<Answer: Decodable>(
        _ path: String, _ body: some Encodable & Sendable
    ) async throws -> Answer {
        do {
            return try await client.call("POST", path, body)
        } catch let error as Refusal where error.kind == .refused || error.kind == .unknown {
            throw PeerRefusal(error.description)
        } catch let error as Refusal {
            throw error
        } catch {
            throw Refusal("the peer's control API at \(client.address) cannot be reached (\(error))")
        }
    }

    func openSession(volumes: [(name: String, size: UInt64)], record: GroupRecord) async throws
        -> (state: PeerState, exports: [String])
    {
        let answer: SessionAnswer = try await ask(
            "/v1/peer/groups/\(group)/session",
            SessionRequest(
                site: site, siteID: siteID,
                volumes: volumes.map { SessionRequest.Volume(name: $0.name, size: $0.size) },
                generations: record.generations, lastCommitted: record.lastCommitted?.number))
        guard answer.state.committed?.isPlausible != false else { throw Refusal("the peer's answer makes no sense") }
        return (answer.state, answer.exports)
    }

    func commit(session: UInt64, number: UInt64, previous: UInt64?, formedAt: Double) async throws -> Double {
        let answer: CommitAnswer = try await ask(
            "/v1/peer/groups/\(group)/commit",
            CommitRequest(
                siteID: siteID, session: session, number: number, previous: previous, formedAt: formedAt))
        guard (0...PointRecord.latestTime).contains(answer.committedAt) else {
            throw Refusal("the peer's answer makes no sense")
        }
        return answer.committedAt
    }

    func checksums(session: UInt64, volume: String, offset: UInt64, length: Int, block: Int) async throws -> [UInt8]? {
        try await checksums(
            ChecksumRequest(
                siteID: siteID, session: session, copy: nil, volume: volume, offset: offset, length: length,
                block: block))
    }

    /// Checksums of a FlashCopy or recovery point.
    func checksums(copy: String, volume: String, offset: UInt64, length: Int, block: Int) async throws -> [UInt8] {
        try await checksums(
            ChecksumRequest(
                siteID: siteID, session: nil, copy: copy, volume: volume, offset: offset, length: length, block: block))
    }

    private func checksums(_ request: ChecksumRequest) async throws -> [UInt8] {
        let answer: ChecksumAnswer = try await ask("/v1/peer/groups/\(group)/checksums", request)
        guard let data = Data(base64Encoded: answer.digests) else {
            throw Refusal("the peer's checksums make no sense")
        }
        return [UInt8](data)
    }

    func pin(point: UInt64, as name: String) async throws {
        let _: Done = try await ask(
            "/v1/peer/groups/\(group)/pin", PinRequest(siteID: siteID, point: point, name: name))
    }

    func unpin(_ name: String) async throws {
        let _: Done = try await ask("/v1/peer/groups/\(group)/unpin", PinRequest(siteID: siteID, point: 0, name: name))
    }

    func promote(session: UInt64, point: UInt64) async throws {
        let _: Done = try await ask(
            "/v1/peer/groups/\(group)/promote", PromoteRequest(siteID: siteID, session: session, point: point))
    }
}
