// Peers.swift: how a group stands here, and what its peer is asked.

import API
import Base
import Groups
import Link
import NBDServer
import Volumes

/// How a group stands here, and what its peer is asked.
@SiteThread
final class Peers {
    private let home: Holdings

    init(_ home: Holdings) {
        self.home = home
    }

    func standing(_ group: GroupState) async -> Standing {
        var (grains, written) = (UInt64(0), UInt64(0))
        for volume in home.members(group) {
            let number = volume.number
            guard number >= 0 else {
                grains += volume.changesLeft
                continue
            }
            let figures = await volume.reactor.run { reactor in
                let hosted = reactor.hosted(number)
                return (hosted.volume.changedGrains + hosted.volume.outOfSyncGrains, hosted.bytesWritten)
            }
            grains += UInt64(figures.0) * UInt64(volume.geometry.grain)
            written += figures.1
        }
        let record = group.record
        let wrote = record.failedOver == nil || group.writtenAtFailover != written
        return Standing(
            site: home.configuration.site, siteID: home.siteRecord.id, record: record, wrote: wrote,
            changedBytes: grains,
            joining: group.isJoining)
    }

    func peerClient(_ group: GroupState) -> ControlClient? {
        home.configuration.peers[group.entry.peer]?.control.map { ControlClient(address: $0) }
    }

    /// Calls the peer about a group.
    ///
    /// - Throws: `Refusal` in its words when it refuses, or as one that passes when it cannot be reached.
    func callPeer<Body, Answer>(
        _ group: GroupState, _ endpoint: Endpoint<Body, Answer>, _ query: [APICall.Query: String] = [:],
        body: Body? = nil,
        seconds: Int64? = nil
    ) async throws -> Answer {
        guard let client = peerClient(group) else {
            throw Refusal("the peer '\(group.entry.peer)' is no Farcopy site")
        }
        do {
            return try await client.call(endpoint, group.entry.group, query, body: body, seconds: seconds)
        } catch let error as Refusal {
            throw error
        } catch {
            throw Refusal("'\(group.entry.peer)' cannot be reached at \(client.address): \(error)", .passing)
        }
    }

    /// Asks the peer how the group stands there.
    func peerStanding(_ group: GroupState, seconds: Int64 = 10) async throws -> Standing {
        try await callPeer(
            group, Endpoints.standing, body: await standing(group), seconds: seconds)
    }

    func sessionVolumes(_ group: GroupState) -> [SessionRequest.Volume] {
        home.members(group).map { SessionRequest.Volume(name: $0.name, size: $0.geometry.size) }
    }

    /// Asks for all that the peer has changed, a part at a time; `each` gets words of a bitmap, the index of the first, and the
    /// geometry that the peer counts in.
    func eachPeerChange(
        _ group: GroupState, _ volume: VolumeState, each: ([UInt64], Int, Geometry) async -> Void
    ) async throws {
        var first = 0
        while true {
            let answer = try await callPeer(
                group, Endpoints.changes, [.volume: volume.name, .from: String(first)])
            guard !answer.words.isEmpty else { return }
            guard let geometry = Geometry(size: answer.size, grain: answer.grain), answer.size == volume.geometry.size,
                answer.words.count <= Limits.changedWordsPerAnswer,
                first + answer.words.count <= Bitmap.byteCount(bits: geometry.grainCount) / 8
            else { throw Refusal("the peer's answer about volume '\(volume.name)' makes no sense") }
            var words = answer.words
            if group.record.untracked?[volume.name] != nil {
                for index in words.indices { words[index] = geometry.wordOfAll(first + index) }
            }
            await each(words, first, geometry)
            first += answer.words.count
        }
    }

    /// Every earlier request of this site's has come to its end at the peer.
    func openPeersSession(_ group: GroupState) async throws -> (peer: ControlPeer, session: UInt64) {
        guard let peer = home.peer(group) else { throw Refusal("the peer '\(group.entry.peer)' is no Farcopy site") }
        let opened = try await peer.openSession(
            volumes: home.members(group).map { ($0.name, $0.geometry.size) }, record: group.record)
        return (peer, opened.state.session)
    }

    /// Asks the peer to become primary at the point, in a session that ends every earlier request of this kind.
    func promotePeer(_ group: GroupState, _ point: UInt64) async throws {
        let (peer, session) = try await openPeersSession(group)
        // Whether the point is the newest there, the peer looks itself: nothing is committed in this session.
        try await peer.promote(session: session, point: point)
    }
}
