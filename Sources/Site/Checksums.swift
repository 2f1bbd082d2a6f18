// Checksums.swift: checksums of what a site holds, for itself and for its peer.

import API
import Base
import FoundationEssentials
import Groups
import NBDServer
import Ring
import TLS
import Volumes

/// Checksums of what a site holds.
@SiteThread
package final class Checksums {
    private let home: Holdings
    private let flashCopies: FlashCopies
    private let turnstile = Turnstile(places: Limits.checksumsAtOnce)

    init(_ home: Holdings, _ flashCopies: FlashCopies) {
        (self.home, self.flashCopies) = (home, flashCopies)
    }

    package func checksums(_ name: String, _ request: ChecksumRequest) async throws -> ChecksumAnswer {
        let group = try home.group(name, askedBy: request.siteID)
        guard let volume = home.members(group).first(where: { $0.name == request.volume }) else {
            throw Refusal("group '\(name)' has no volume '\(request.volume)'", .unknown)
        }
        guard (512...Limits.maximumGrain).contains(request.block), (1...Limits.checksumBytes).contains(request.length)
        else {
            throw Refusal(
                "checksums of \(request.length) bytes in blocks of \(request.block) are too much", .misuse)
        }
        let view: View
        if let copy = request.copy {
            view = .copy(try flashCopies.chainPlace(volume, copy).id)
        } else {
            guard let session = request.session, session == group.session else {
                throw Refusal("the session has ended", .refused)
            }
            view = .volume
        }
        guard turnstile.waitingCount < Limits.checksumsWaiting else {
            throw Refusal("\(Limits.checksumsWaiting) calls wait for checksums already; try again", .passing)
        }
        await turnstile.enter()
        defer { turnstile.leave() }
        let digests = try await digests(volume, view, request.offset, request.length, request.block)
        return ChecksumAnswer(digests: Data(digests).base64EncodedString())
    }

    func digests(_ volume: VolumeState, _ view: View, _ offset: UInt64, _ length: Int, _ block: Int) async throws
        -> [UInt8]
    {
        let buffer = try PoolMemory(byteCount: length)
        let errno = await volume.reactor.read(volume.number, view, offset: offset, length: length, into: buffer)
        guard errno == 0 else { throw SystemError("read volume '\(volume.name)' at \(offset)", errno: errno) }
        return await hash(buffer, length, block)
    }
}

/// Away from the site's thread, since it takes a processor's time.
private nonisolated func hash(_ buffer: PoolMemory, _ length: Int, _ block: Int) async -> [UInt8] {
    await Task.detached {
        withExtendedLifetime(buffer) {
            Digest.blocks(UnsafeRawBufferPointer(start: buffer.memory, count: length), block: block)
        }
    }.value
}
