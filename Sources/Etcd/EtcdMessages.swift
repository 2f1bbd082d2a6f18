// EtcdMessages.swift: the few messages of etcd's v3 API that an election needs, as its JSON gateway has them: 64-bit numbers as strings, keys
// and values in base64 (etcd's `api/etcdserverpb/rpc.proto`).

import FoundationEssentials

/// A number that may come as a string or, where it is zero, not at all.
struct WireNumber: Codable, Sendable {
    var value: Int64
    init(_ value: Int64) { self.value = value }

    init(from decoder: any Decoder) throws {
        let container = try decoder.singleValueContainer()
        if let text = try? container.decode(String.self), let number = Int64(text) {
            value = number
        } else {
            value = try container.decode(Int64.self)
        }
    }

    func encode(to encoder: any Encoder) throws {
        var container = encoder.singleValueContainer()
        try container.encode(String(value))
    }
}

struct Bytes: Codable, Sendable {
    var bytes: [UInt8]
    init(_ bytes: [UInt8]) { self.bytes = bytes }
    init(_ text: String) { bytes = Array(text.utf8) }

    init(from decoder: any Decoder) throws {
        let text = try decoder.singleValueContainer().decode(String.self)
        guard let data = Data(base64Encoded: text) else {
            throw EtcdFailure("etcd's answer is not in base64", isRefusal: false)
        }
        bytes = [UInt8](data)
    }

    func encode(to encoder: any Encoder) throws {
        var container = encoder.singleValueContainer()
        try container.encode(Data(bytes).base64EncodedString())
    }
}

struct ResponseHeader: Codable, Sendable { var revision: WireNumber? }

struct KeyValue: Codable, Sendable {
    var key: Bytes?
    var value: Bytes?
    var create_revision: WireNumber?
    var mod_revision: WireNumber?
    var lease: WireNumber?
}

struct LeaseGrantRequest: Codable, Sendable { var TTL: WireNumber }
struct LeaseGrantResponse: Codable, Sendable { var ID: WireNumber?; var error: String? }
struct LeaseRequest: Codable, Sendable { var ID: WireNumber }
/// The gateway wraps what is a stream.
struct LeaseKeepAliveResponse: Codable, Sendable {
    struct Result: Codable, Sendable { var TTL: WireNumber? }
    var result: Result?
}
struct LeaseRevokeResponse: Codable, Sendable {}

struct RangeRequest: Codable, Sendable { var key: Bytes }
struct RangeResponse: Codable, Sendable { var header: ResponseHeader?; var kvs: [KeyValue]? }
struct PutRequest: Codable, Sendable { var key: Bytes; var value: Bytes; var lease: WireNumber? }

struct Compare: Codable, Sendable {
    var key: Bytes
    var target: String
    var result = "EQUAL"
    var create_revision: WireNumber?
    var mod_revision: WireNumber?

    static func created(_ key: String, at revision: Int64) -> Compare {
        Compare(key: Bytes(key), target: "CREATE", create_revision: WireNumber(revision))
    }
    static func modified(_ key: String, at revision: Int64) -> Compare {
        Compare(key: Bytes(key), target: "MOD", mod_revision: WireNumber(revision))
    }
}

struct RequestOp: Codable, Sendable {
    var request_put: PutRequest?
    var request_range: RangeRequest?
}

struct TxnRequest: Codable, Sendable {
    var compare: [Compare]
    var success: [RequestOp]
    var failure: [RequestOp]
}

struct ResponseOp: Codable, Sendable { var response_range: RangeResponse? }

struct TxnResponse: Codable, Sendable {
    var header: ResponseHeader?
    var succeeded: Bool?
    var responses: [ResponseOp]?
}

struct AuthenticateRequest: Codable, Sendable { var name: String; var password: String }
struct AuthenticateResponse: Codable, Sendable { var token: String? }
