// EtcdClient.swift: etcd over the JSON gateway of its v3 API: plain HTTP calls, to whichever of its endpoints answers.
//
// Must be prevented:
//   a call that etcd has perhaps carried out is taken for one that it has not: whoever asks looks again, at what is there (`EtcdFailure`)
//   somebody waits for ever

import AsyncHTTPClient
import FoundationEssentials
import NIOCore
import NIOHTTP1
import NIOSSL

/// Why etcd did not do what was asked.
package struct EtcdFailure: Error, CustomStringConvertible {
    package var description: String
    /// It has answered, and surely not done it; else it may have.
    package var isRefusal: Bool
    package init(_ description: String, isRefusal: Bool) {
        (self.description, self.isRefusal) = (description, isRefusal)
    }
}

package struct EtcdSettings: Sendable, Equatable {
    /// URLs, `http://` or `https://`.
    package var endpoints: [String]
    package var user: String?
    package var password: String?
    /// PEM files: whom to trust instead of the system's, and what this site shows.
    package var authority: String?
    package var certificate: String?
    package var key: String?

    package init(
        endpoints: [String], user: String? = nil, password: String? = nil, authority: String? = nil,
        certificate: String? = nil, key: String? = nil
    ) {
        (self.endpoints, self.user, self.password) = (endpoints, user, password)
        (self.authority, self.certificate, self.key) = (authority, certificate, key)
    }
}

package actor EtcdClient {
    private let settings: EtcdSettings
    private let http: HTTPClient
    private var token: String?
    /// The endpoint that answered last.
    private var current = 0
    private static let seconds: Int64 = 2

    package init(_ settings: EtcdSettings) throws {
        self.settings = settings
        var configuration = HTTPClient.Configuration()
        configuration.connectionPool.retryConnectionEstablishment = false
        configuration.timeout.connect = .seconds(Self.seconds)
        configuration.timeout.read = .seconds(Self.seconds)
        if settings.endpoints.contains(where: { $0.hasPrefix("https:") }) {
            configuration.tlsConfiguration = try Self.tls(settings)
        }
        http = HTTPClient(eventLoopGroupProvider: .singleton, configuration: configuration)
    }

    private static func tls(_ settings: EtcdSettings) throws -> TLSConfiguration {
        var tls = TLSConfiguration.makeClientConfiguration()
        if let authority = settings.authority { tls.trustRoots = .file(authority) }
        if let certificate = settings.certificate, let key = settings.key {
            tls.certificateChain = try NIOSSLCertificate.fromPEMFile(certificate).map { .certificate($0) }
            tls.privateKey = .privateKey(try NIOSSLPrivateKey(file: key, format: .pem))
        }
        return tls
    }

    package func shutdown() async { try? await http.shutdown() }

    // MARK: Calls

    /// Each endpoint is tried once.
    func call<Body: Encodable & Sendable, Answer: Decodable & Sendable>(
        _ path: String, _ body: Body, as type: Answer.Type = Answer.self
    ) async throws -> Answer {
        if settings.user != nil, token == nil { try await authenticate() }
        do {
            return try await tryEach(path, body)
        } catch let failure as EtcdFailure where failure.isRefusal && token != nil && failure.isAboutToken {
            token = nil
            try await authenticate()
            return try await tryEach(path, body)
        }
    }

    private func tryEach<Body: Encodable & Sendable, Answer: Decodable & Sendable>(
        _ path: String, _ body: Body
    ) async throws -> Answer {
        var last: (any Error)?
        for offset in settings.endpoints.indices {
            let index = (current + offset) % settings.endpoints.count
            do {
                let answer: Answer = try await send(settings.endpoints[index], path, body)
                current = index
                return answer
            } catch let failure as EtcdFailure where failure.isRefusal {
                throw failure
            } catch {
                last = error
            }
        }
        throw EtcdFailure("etcd does not answer: \(last.map { "\($0)" } ?? "no endpoint")", isRefusal: false)
    }

    private func send<Body: Encodable & Sendable, Answer: Decodable & Sendable>(
        _ endpoint: String, _ path: String, _ body: Body
    ) async throws -> Answer {
        var request = HTTPClientRequest(url: "\(endpoint)\(path)")
        request.method = .POST
        request.headers.add(name: "content-type", value: "application/json")
        if let token { request.headers.add(name: "authorization", value: token) }
        request.body = .bytes(ByteBuffer(bytes: [UInt8](try JSONEncoder().encode(body))))
        let (status, bytes) = try await answer(to: request, endpoint)
        guard status == .ok else {
            let words = String(decoding: bytes.prefix(500), as: UTF8.self)
            // What is unavailable may be carried out all the same.
            let isRefusal = (400..<500).contains(Int(status.code))
            throw EtcdFailure("etcd at \(endpoint) answers \(status): \(words)", isRefusal: isRefusal)
        }
        return try JSONDecoder().decode(Answer.self, from: Data(bytes))
    }

    /// The whole answer, its body as well, in a time that is bounded.
    private nonisolated func answer(
        to request: HTTPClientRequest, _ endpoint: String
    ) async throws -> (HTTPResponseStatus, [UInt8]) {
        try await withThrowingTaskGroup(of: (HTTPResponseStatus, [UInt8]).self) { tasks in
            tasks.addTask { [http] in
                let response = try await http.execute(request, timeout: .seconds(Self.seconds))
                return (response.status, [UInt8](buffer: try await response.body.collect(upTo: 1 << 20)))
            }
            tasks.addTask {
                try await Task.sleep(for: .seconds(2 * Self.seconds))
                throw EtcdFailure("etcd at \(endpoint) has begun to answer, and not ended", isRefusal: false)
            }
            defer { tasks.cancelAll() }
            return try await tasks.next()!
        }
    }

    private func authenticate() async throws {
        guard let user = settings.user else { return }
        token = nil
        let request = AuthenticateRequest(name: user, password: settings.password ?? "")
        let answer: AuthenticateResponse = try await tryEach("/v3/auth/authenticate", request)
        token = answer.token
    }
}

extension EtcdFailure {
    fileprivate var isAboutToken: Bool { description.contains("auth token") }
}
