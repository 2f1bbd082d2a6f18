// EtcdLease.swift: an election by a lease: whoever creates the key first has it, as long as the lease lives. The revision at which the key was
// created is higher at every election.

/// What is there when one wants to be elected.
package enum Candidacy: Sendable, Equatable {
    /// - Parameter epoch: revision at which the key was created.
    case elected(epoch: UInt64)
    case another(String)
}

/// A value, and the revision at which it was written; 0 = never.
package struct Versioned: Sendable, Equatable {
    package var value: [UInt8]?
    package var revision: Int64
    package init(value: [UInt8]?, revision: Int64) { (self.value, self.revision) = (value, revision) }
}

extension EtcdClient {
    /// - Returns: the lease's number.
    package func grantLease(seconds: Int64) async throws -> Int64 {
        let answer: LeaseGrantResponse = try await call(
            "/v3/lease/grant", LeaseGrantRequest(TTL: WireNumber(seconds)))
        guard let id = answer.ID?.value, id != 0 else {
            throw EtcdFailure("etcd grants no lease: \(answer.error ?? "")", isRefusal: true)
        }
        return id
    }

    /// - Throws: also when the lease is over.
    package func keepAlive(_ lease: Int64) async throws {
        let answer: LeaseKeepAliveResponse = try await call(
            "/v3/lease/keepalive", LeaseRequest(ID: WireNumber(lease)))
        guard let left = answer.result?.TTL?.value, left > 0 else {
            throw EtcdFailure("the lease is over", isRefusal: true)
        }
    }

    package func revoke(_ lease: Int64) async throws {
        let _: LeaseRevokeResponse = try await call("/v3/lease/revoke", LeaseRequest(ID: WireNumber(lease)))
    }

    /// Creates the key with the lease, or says whose it is.
    package func stand(for key: String, as name: String, lease: Int64) async throws -> Candidacy {
        let put = PutRequest(key: Bytes(key), value: Bytes(name), lease: WireNumber(lease))
        let range = RequestOp(request_range: RangeRequest(key: Bytes(key)))
        let answer: TxnResponse = try await call(
            "/v3/kv/txn",
            TxnRequest(compare: [.created(key, at: 0)], success: [RequestOp(request_put: put)], failure: [range]))
        if answer.succeeded == true, let revision = answer.header?.revision?.value, revision > 0 {
            return .elected(epoch: UInt64(revision))
        }
        guard let found = answer.responses?.first?.response_range?.kvs?.first else {
            throw EtcdFailure("etcd's answer makes no sense", isRefusal: false)
        }
        // The answer to an earlier try was lost.
        if found.lease?.value == lease, let revision = found.create_revision?.value, revision > 0 {
            return .elected(epoch: UInt64(revision))
        }
        return .another(String(decoding: found.value?.bytes ?? [], as: UTF8.self))
    }

    package func read(_ key: String) async throws -> Versioned {
        let answer: RangeResponse = try await call("/v3/kv/range", RangeRequest(key: Bytes(key)))
        guard let found = answer.kvs?.first else { return Versioned(value: nil, revision: 0) }
        return Versioned(value: found.value?.bytes ?? [], revision: found.mod_revision?.value ?? 0)
    }

    /// Writes a value if the election still stands, and the value is what was read or written last.
    ///
    /// - Returns: the revision of what is there now.
    /// - Throws: a refusal when it does not.
    package func write(
        _ value: [UInt8], to key: String, after revision: Int64, whileElected leader: String, epoch: UInt64
    ) async throws -> Int64 {
        let put = PutRequest(key: Bytes(key), value: Bytes(value), lease: nil)
        let range = RequestOp(request_range: RangeRequest(key: Bytes(key)))
        let compare = [
            Compare.created(leader, at: Int64(clamping: epoch)), .modified(key, at: revision),
        ]
        let answer: TxnResponse = try await call(
            "/v3/kv/txn", TxnRequest(compare: compare, success: [RequestOp(request_put: put)], failure: [range]))
        guard answer.succeeded == true, let now = answer.header?.revision?.value else {
            throw EtcdFailure("another site coordinates the group, by etcd", isRefusal: true)
        }
        return now
    }
}
