// CrossSiteRequests.swift: which requests to the control API are refused because a page in a browser may have made them.
//
// Must be prevented:
//   a page of any site in an operator's browser changes something here (cross-site request forgery)
//   the same by a name that leads to this machine but is somebody else's (DNS rebinding)
//
// What a page may send anywhere unasked is never `application/json`; for that the browser asks first, and gets no leave.
// Reading is not refused: a page cannot see the answer. A name is told by the Host header; over a unix socket, which no
// browser reaches by itself, any will do.

import FoundationEssentials
import Glibc
import Groups
import HTTPTypes
import Hummingbird
import NBDProtocol
import NIOCore
import SiteConfiguration

struct CrossSiteRequests: RouterMiddleware {
    typealias Context = BasicRequestContext
    /// Names that lead to this site, in small letters, besides `localhost` and addresses; nil = any.
    let names: Set<String>?

    init(_ address: Address, _ configuration: Configuration) {
        guard case .tcp = address else {
            names = nil
            return
        }
        var names = Set(configuration.controlNames + [configuration.site])
        for case .tcp(let host, _) in configuration.control { names.insert(host) }
        var buffer = [CChar](repeating: 0, count: 256)
        if gethostname(&buffer, buffer.count - 1) == 0 {
            let name = String(decoding: buffer.prefix { $0 != 0 }.map(UInt8.init(bitPattern:)), as: UTF8.self)
            names.insert(name)
            names.insert(String(name.prefix { $0 != "." }))
        }
        self.names = Set(names.map { $0.lowercased() })
    }

    func handle(
        _ request: Request, context: Context, next: (Request, Context) async throws -> Response
    ) async throws -> Response {
        if request.method == .get || request.method == .head { return try await next(request, context) }
        if let refusal = refusal(request) { return errorResponse(refusal) }
        let type = (request.headers[.contentType] ?? "").prefix { $0 != ";" }.filter { $0 != " " }
        guard type.lowercased() == "application/json" else {
            let words =
                "a request that changes something must have the header Content-Type: application/json, also without a body"
            return errorResponse(Refusal(words, .misuse), .unsupportedMediaType)
        }
        return try await next(request, context)
    }

    private func refusal(_ request: Request) -> Refusal? {
        let authority = (request.head.authority ?? "").lowercased()
        if let names, !isOwn(host(of: authority), names) {
            return Refusal(
                "the name '\(authority)' in the request's Host header is none of this site's; use an address, or add it to "
                    + "site.control_names", .refused)
        }
        if let origin = request.headers[.origin], origin.lowercased() != "http://\(authority)",
            origin.lowercased() != "https://\(authority)"
        {
            return Refusal("a page of '\(origin)' asks for this, which is another site", .refused)
        }
        return nil
    }

    /// Without the port and the brackets of an IPv6 address.
    private func host(of authority: String) -> String {
        if authority.hasPrefix("[") { return String(authority.dropFirst().prefix { $0 != "]" }) }
        return String(authority.prefix { $0 != ":" })
    }

    private func isOwn(_ host: String, _ names: Set<String>) -> Bool {
        var bytes = in6_addr()
        return names.contains(host) || host == "localhost" || host.hasSuffix(".localhost")
            || inet_pton(AF_INET, host, &bytes) == 1 || inet_pton(AF_INET6, host, &bytes) == 1
    }
}
