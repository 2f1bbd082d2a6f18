// ControlClient.swift: calls to a control API, the peer's or the local site's, over TCP or a unix socket.

import AsyncHTTPClient
import Base
import FoundationEssentials
import Groups
import NBDProtocol
import NIOCore

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

    package let address: Address

    package init(address: Address) { self.address = address }

    private func url(_ path: String) -> String {
        switch address {
        case .unix(let socket): "http+unix://\(percentEncoded(socket))\(path)"
        case .tcp: "http://\(address)\(path)"
        }
    }

    /// - Parameters:
    ///   - name: what stands for the part in braces of the path.
    ///   - seconds: when to give up, if not at the call's own time.
    /// - Returns: the answer's bytes.
    /// - Throws: `Refusal` with the site's words when it refuses; other errors when it cannot be reached.
    package func send<Body, Answer>(
        _ endpoint: Endpoint<Body, Answer>, _ name: String = "", _ query: [APICall.Query: String] = [:],
        body: Body? = nil,
        seconds: Int64? = nil
    ) async throws -> [UInt8] {
        let call = endpoint.call
        var request = HTTPClientRequest(url: url(call.url(name, query)))
        request.method = .init(rawValue: call.method.rawValue)
        // Also without a body: it tells the call from what a page in a browser can send.
        if call.method != .get { request.headers.add(name: "content-type", value: "application/json") }
        if let body { request.body = .bytes(ByteBuffer(bytes: [UInt8](try JSONEncoder().encode(body)))) }
        let response = try await Self.http.execute(request, timeout: .seconds(seconds ?? call.seconds))
        let bytes = try await response.body.collect(upTo: 16 << 20)
        let answer = [UInt8](buffer: bytes)
        guard (200..<300).contains(Int(response.status.code)) else {
            let words = try? JSONDecoder().decode(ErrorAnswer.self, from: Data(answer))
            throw Refusal(
                words?.error ?? "the control API answered \(response.status)", .init(status: Int(response.status.code)))
        }
        return answer
    }

    package func call<Body, Answer>(
        _ endpoint: Endpoint<Body, Answer>, _ name: String = "", _ query: [APICall.Query: String] = [:],
        body: Body? = nil,
        seconds: Int64? = nil
    ) async throws -> Answer {
        let answer = try await send(endpoint, name, query, body: body, seconds: seconds)
        return try JSONDecoder().decode(Answer.self, from: Data(answer))
    }
}
