// ControlPeer.swift: the peer as a group's replicator asks it, over its control API.

import API
import Base
import FoundationEssentials
import Groups
import Link
import NBDProtocol

struct ControlPeer: PeerClient {
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
    private func ask<Body, Answer>(_ endpoint: Endpoint<Body, Answer>, _ body: Body) async throws -> Answer {
        do {
            return try await client.call(endpoint, group, body: body)
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
        let answer = try await ask(
            Endpoints.openSession,
            SessionRequest(
                site: site, siteID: siteID,
                volumes: volumes.map { SessionRequest.Volume(name: $0.name, size: $0.size) },
                generations: record.generations, lastCommitted: record.lastCommitted?.number))
        guard answer.state.committed?.isPlausible != false else { throw Refusal("the peer's answer makes no sense") }
        return (answer.state, answer.exports)
    }

    func commit(session: UInt64, number: UInt64, previous: UInt64?, formedAt: Double) async throws -> Double {
        let answer = try await ask(
            Endpoints.commit,
            CommitRequest(
                siteID: siteID, session: session, number: number, previous: previous, formedAt: formedAt))
        guard (0...PointRecord.latestTime).contains(answer.committedAt) else {
            throw Refusal("the peer's answer makes no sense")
        }
        return answer.committedAt
    }

    func checksums(session: UInt64, volume: String, offset: UInt64, length: Int, block: Int) async throws
        -> [UInt8]?
    {
        try await checksums(
            ChecksumRequest(
                siteID: siteID, session: session, copy: nil, volume: volume, offset: offset, length: length,
                block: block))
    }

    /// Checksums of a FlashCopy or recovery point.
    func checksums(copy: String, volume: String, offset: UInt64, length: Int, block: Int) async throws
        -> [UInt8]
    {
        try await checksums(
            ChecksumRequest(
                siteID: siteID, session: nil, copy: copy, volume: volume, offset: offset, length: length, block: block))
    }

    private func checksums(_ request: ChecksumRequest) async throws -> [UInt8] {
        let answer = try await ask(Endpoints.checksums, request)
        guard let data = Data(base64Encoded: answer.digests) else {
            throw Refusal("the peer's checksums make no sense")
        }
        return [UInt8](data)
    }

    func pin(point: UInt64, as name: String) async throws {
        _ = try await ask(
            Endpoints.pin, PinRequest(siteID: siteID, point: point, name: name))
    }

    func unpin(_ name: String) async throws {
        _ = try await ask(Endpoints.unpin, PinRequest(siteID: siteID, point: 0, name: name))
    }

    func promote(session: UInt64, point: UInt64) async throws {
        _ = try await ask(
            Endpoints.promote, PromoteRequest(siteID: siteID, session: session, point: point))
    }
}
