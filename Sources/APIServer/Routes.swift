// Routes.swift: from a call of the table to the answer of a request, refusals included.

import API
import Base
import FoundationEssentials
import Groups
import HTTPTypes
import Hummingbird
import NIOCore
import Site

/// A request that has come in.
struct Asked<Body: Sendable>: Sendable {
    let site: Site
    /// What stands for the part in braces of the path.
    let name: String
    let body: Body
    fileprivate let query: [Substring: Substring]

    subscript(_ word: APICall.Query) -> String? { query[Substring(word.rawValue)].map(String.init) }
}

struct Routes {
    let router: Router<BasicRequestContext>
    let site: Site
    private(set) var served: Set<String> = []

    init(router: Router<BasicRequestContext>, site: Site) {
        self.router = router
        self.site = site
    }

    mutating func serve<Body, Answer>(
        _ endpoint: Endpoint<Body, Answer>, _ answer: @escaping @Sendable (Asked<Body>) async throws -> Answer
    ) {
        let (call, site) = (endpoint.call, site)
        invariant(served.insert(call.id).inserted, "a call is served once")
        router.on(RouterPath(call.path), method: HTTPRequest.Method(rawValue: call.method.rawValue)!) {
            request, context in
            await respond(site, early: call.servedWhileStarting) {
                let name = call.placeholder.flatMap { context.parameters.get($0)?.removingPercentEncoding } ?? ""
                var query: [Substring: Substring] = [:]
                for (word, value) in request.uri.queryParameters { query[word] = value }
                let asked = Asked(site: site, name: name, body: try await decode(Body.self, request), query: query)
                return try json(try await answer(asked))
            }
        }
    }

    func serveText(_ path: String, type: String, _ text: @escaping @Sendable (Site) async throws -> String) {
        let site = site
        router.get(RouterPath(path)) { _, _ in
            await respond(site, early: false) {
                Response(
                    status: .ok, headers: [.contentType: type],
                    body: ResponseBody(byteBuffer: ByteBuffer(string: try await text(site))))
            }
        }
    }
}

/// Refusals in words, with their status; anything else is ours and says so.
private func respond(_ site: Site, early: Bool, _ body: () async throws -> Response) async -> Response {
    do {
        if !early, !site.isStarted { throw Refusal("the site is starting; try again", .passing) }
        return try await body()
    } catch let error as Refusal {
        return errorResponse(error)
    } catch let refusal as PeerRefusal {
        return errorResponse(Refusal("the peer refuses: \(refusal)"))
    } catch {
        return errorResponse(Refusal("\(error)", .failed))
    }
}

private func decode<Body: Decodable>(_ type: Body.Type, _ request: Request) async throws -> Body {
    if let nothing = Nothing() as? Body { return nothing }
    let buffer = try await request.body.collect(upTo: 1 << 20)
    do {
        return try JSONDecoder().decode(type, from: Data([UInt8](buffer: buffer)))
    } catch {
        throw Refusal("the request's body is not what this call takes: \(error)", .misuse)
    }
}

private func json(_ value: some Encodable) throws -> Response {
    let encoder = JSONEncoder()
    encoder.outputFormatting = [.sortedKeys, .prettyPrinted]
    var bytes = [UInt8](try encoder.encode(value))
    bytes.append(0x0A)
    return Response(
        status: .ok, headers: [.contentType: "application/json"],
        body: ResponseBody(byteBuffer: ByteBuffer(bytes: bytes)))
}

/// - Parameter status: nil = as the refusal's kind says.
func errorResponse(_ refusal: Refusal, _ status: HTTPResponse.Status? = nil) -> Response {
    let bytes = (try? JSONEncoder().encode(ErrorAnswer(error: refusal.description))) ?? Data()
    return Response(
        status: status ?? HTTPResponse.Status(code: refusal.kind.status), headers: [.contentType: "application/json"],
        body: ResponseBody(byteBuffer: ByteBuffer(bytes: bytes)))
}
