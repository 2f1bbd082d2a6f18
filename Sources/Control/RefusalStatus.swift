// RefusalStatus.swift: how refusals cross HTTP. Nothing else knows its status codes.

import FoundationEssentials
import HTTPTypes
import Hummingbird
import NIOCore

extension Refusal.Kind {
    var status: HTTPResponse.Status {
        switch self {
        case .passing: .serviceUnavailable
        case .conflict: .conflict
        case .refused: .forbidden
        case .unknown: .notFound
        case .misuse: .badRequest
        case .unconfirmed: .preconditionFailed
        case .failed: .internalServerError
        }
    }

    /// What an answer's status says; whatever is none of ours says that something broke.
    init(status: Int) { self = Self.allCases.first { $0.status.code == status } ?? .failed }
}

/// The body of an answer that refuses.
struct ErrorAnswer: Codable, Sendable { var error: String }

/// - Parameter status: nil = as the refusal's kind says.
func errorResponse(_ refusal: Refusal, _ status: HTTPResponse.Status? = nil) -> Response {
    let bytes = (try? JSONEncoder().encode(ErrorAnswer(error: refusal.description))) ?? Data()
    return Response(
        status: status ?? refusal.kind.status, headers: [.contentType: "application/json"],
        body: ResponseBody(byteBuffer: ByteBuffer(bytes: bytes)))
}
