// BlockStatus.swift: BLOCK_STATUS and CACHE: where data lies, what changed, and reading ahead.
//
// Everything is looked at in one go on the reactor's thread, so that no write comes between. What is told covers at least
// one descriptor of each context and never more than was asked for; the queries made for one request are bounded.

import Base
import CLibURing
import Glibc
import NBDProtocol
import Ring
import Volumes

extension Reactor {
    /// Reply memory of one context.
    static let statusChunkBytes = BlockStatusChunk.byteCount(descriptors: Limits.statusDescriptors)

    func answerBlockStatus(_ slot: Int32, _ taken: Int32, reqOne: Bool, _ hosted: HostedVolume) {
        let connection = connections + Int(slot)
        let request = hosted.volume.request(taken)
        let range = (offset: request.pointee.offset, length: request.pointee.length)
        let chunk = ReplyChunk(
            style: connection.pointee.style, cookie: request.pointee.cookie, offset: range.offset)
        let count = connection.pointee.contexts.count
        var bytes = 0
        var failed = false
        for index in 0..<count {
            let (id, context) = connection.pointee.contexts[index]
            var status = BlockStatusChunk(
                memory: request.pointee.buffer! + bytes, capacity: reqOne ? 1 : Limits.statusDescriptors,
                chunk: chunk, context: id)
            guard describe(context, connection.pointee.view, range, hosted, into: &status) else {
                failed = true
                break
            }
            bytes += status.finish(done: index == count - 1)
        }
        // From here on the length is that of the reply, which is what the connection is charged for.
        request.pointee.length = UInt64(failed ? 0 : bytes)
        connection.pointee.payloadBytes -= count * Self.statusChunkBytes - Int(request.pointee.length)
        hosted.volume.refuse(taken, errno: failed ? EIO : 0)
        queueReply(slot, taken, hosted)
    }

    /// False when the view cannot be read any more.
    private func describe(
        _ context: MetaContext, _ view: View, _ range: (offset: UInt64, length: UInt64), _ hosted: HostedVolume,
        into status: inout BlockStatusChunk
    ) -> Bool {
        let end = range.offset + range.length
        var cursor = range.offset
        for _ in 0..<Limits.statusQueries where cursor < end {
            let next: (end: UInt64, flags: UInt32)?
            switch context {
            case .allocation: next = allocation(view, cursor, end, hosted, depth: false)
            case .depth: next = allocation(view, cursor, end, hosted, depth: true)
            case .changed(let base):
                let run = hosted.volume.changedRun(since: base, in: view, offset: cursor, length: end - cursor)
                next = (run.end, run.changed ? NBD_STATE_DIRTY : 0)
            }
            guard let next else { return false }
            if !status.append(length: next.end - cursor, flags: next.flags) { return true }
            cursor = next.end
        }
        return true
    }

    /// The run at `cursor` that is all data or all hole in the file where the view's data lies.
    private func allocation(
        _ view: View, _ cursor: UInt64, _ end: UInt64, _ hosted: HostedVolume, depth: Bool
    ) -> (end: UInt64, flags: UInt32)? {
        guard let location = hosted.volume.location(view, offset: cursor, length: end - cursor) else { return nil }
        let data = depth ? location.depth : 0
        if location.unsettled { return (location.end, data) }
        let (runEnd, isHole) = hosted.run(in: location.file, cursor, location.end)
        let hole = depth ? 0 : NBD_STATE_HOLE | NBD_STATE_ZERO
        return (runEnd, isHole ? hole : data)
    }

    /// Pieces of a CACHE request that are read ahead.
    private static let prefetchedRuns = 16

    /// Asks the kernel to read ahead; a hint, whose outcome nobody waits for.
    func prefetch(_ view: View, _ offset: UInt64, _ length: UInt64, _ hosted: HostedVolume) {
        var cursor = offset
        for _ in 0..<Self.prefetchedRuns where cursor < offset + length {
            guard let location = hosted.volume.location(view, offset: cursor, length: offset + length - cursor)
            else { return }
            let file = hosted.slots[Int(location.file)]
            // Memory has nothing to read ahead, and direct I/O nowhere to put it.
            if !file.immediate, !file.isDirect, file.descriptor >= 0 {
                ring.readAhead(
                    file.descriptor, offset: cursor, length: location.end - cursor,
                    UserData(kind: CompletionKind.ignored, generation: 0, slot: 0))
            }
            cursor = location.end
        }
    }
}

extension HostedVolume {
    /// The end of the run at `start` of a file that is all data or all hole, cut at `end`.
    func run(in file: StoreFile, _ start: UInt64, _ end: UInt64) -> (end: UInt64, isHole: Bool) {
        guard let descriptor = descriptor(file) else { return (end, false) }
        let data = lseek(descriptor, off_t(start), SEEK_DATA)
        if data < 0 {
            // No data up to the end of the file; a device that does not know counts as data.
            return (end, errno == ENXIO)
        }
        if UInt64(data) > start { return (min(end, UInt64(data)), true) }
        let hole = lseek(descriptor, off_t(start), SEEK_HOLE)
        return (hole < 0 ? end : min(end, max(start + 1, UInt64(hole))), false)
    }
}
