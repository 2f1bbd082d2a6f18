// RefusalStatus.swift: how refusals cross HTTP. Nothing else knows its status codes.

import Groups

extension Refusal.Kind {
    package var status: Int {
        switch self {
        case .passing: 503
        case .conflict: 409
        case .refused: 403
        case .unknown: 404
        case .misuse: 400
        case .unconfirmed: 412
        case .failed: 500
        }
    }

    /// What an answer's status says; whatever is none of ours says that something broke.
    package init(status: Int) { self = Self.allCases.first { $0.status == status } ?? .failed }
}
