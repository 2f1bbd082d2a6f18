// PlainPeer.swift: a remote that is any NBD server: an array's gateway, nbdkit, qemu-nbd.
//
// It has no recovery points of its own: a commit is the operator's command that takes a snapshot there. Without one the remote
// is consistent only while nothing is sent. Nobody but this site may write to it.

import API
import Groups
import Link
import Ring

struct PlainPeer: PeerClient {
    let name: String
    let address: String
    let group: String
    let volumes: [String]
    let command: String?
    let timeout: Double

    /// The exports have the volumes' names.
    func openSession(volumes: [(name: String, size: UInt64)], record: GroupRecord) async throws
        -> (state: PeerState, exports: [String])
    {
        let state = PeerState(session: 1, site: name, lineage: "plain \(address)", committed: record.lastCommitted)
        return (state, volumes.map(\.name))
    }

    /// The data is flushed; what it makes of that is the command's.
    func commit(session: UInt64, number: UInt64, previous: UInt64?, formedAt: Double) async throws -> Double {
        guard let command else { return realSeconds() }
        let variables = [
            "FARCOPY_EVENT=commit", "FARCOPY_GROUP=\(group)", "FARCOPY_POINT=\(number)",
            "FARCOPY_FORMED_AT=\(timestamp(formedAt))",
            "FARCOPY_VOLUMES=\(volumes.joined(separator: " "))",
        ]
        if let failure = await OperatorCommand.run(command, variables, timeout) {
            throw Refusal("commit_command \(failure)")
        }
        return realSeconds()
    }

    func checksums(session: UInt64, volume: String, offset: UInt64, length: Int, block: Int) async throws
        -> [UInt8]?
    {
        nil
    }
}
