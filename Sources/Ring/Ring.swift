// Ring.swift: one io_uring, used by the one thread that made it (SINGLE_ISSUER, DEFER_TASKRUN).
//
// Everything that an entry points to must live until its completion; the ring copies nothing.
// A completion is matched by its user data: kind, slot and generation, so that a late one is recognised.

import Base
import CLibURing
import Glibc

/// What a completion belongs to, packed into 64 bits: kind (8), generation (24), slot (32).
package struct UserData: BitwiseCopyable, Equatable {
    package var rawValue: UInt64
    package init(kind: UInt8, generation: UInt32, slot: UInt32) {
        rawValue = UInt64(kind) << 56 | UInt64(generation & 0xFF_FFFF) << 32 | UInt64(slot)
    }
    package init(rawValue: UInt64) { self.rawValue = rawValue }
    package var kind: UInt8 { UInt8(rawValue >> 56) }
    package var generation: UInt32 { UInt32(truncatingIfNeeded: rawValue >> 32) & 0xFF_FFFF }
    package var slot: UInt32 { UInt32(truncatingIfNeeded: rawValue) }
}

package struct Completion: BitwiseCopyable {
    package var userData: UserData
    /// Bytes or descriptor, or a negative errno.
    package var result: Int32
    /// A multishot operation stays armed.
    package var more: Bool
}

package struct Ring: ~Copyable {
    private let ring: UnsafeMutablePointer<io_uring>
    private let entries: UnsafeMutablePointer<UnsafeMutablePointer<io_uring_cqe>?>
    private static let batch: UInt32 = 128
    package private(set) var inFlight = 0

    package init(entryCount: Int = Limits.ringEntries) throws(SystemError) {
        let ring = UnsafeMutablePointer<io_uring>.allocate(capacity: 1)
        ring.initialize(to: io_uring())
        var parameters = io_uring_params()
        parameters.flags =
            UInt32(IORING_SETUP_SINGLE_ISSUER) | UInt32(IORING_SETUP_DEFER_TASKRUN)
            | UInt32(IORING_SETUP_SUBMIT_ALL) | UInt32(IORING_SETUP_CQSIZE)
        parameters.cq_entries = UInt32(entryCount * 8)
        let result = io_uring_queue_init_params(UInt32(entryCount), ring, &parameters)
        guard result == 0 else {
            ring.deallocate()
            throw SystemError(
                "set up io_uring (needs Linux 6.1, and sysctl kernel.io_uring_disabled=0)",
                errno: -result)
        }
        self.ring = ring
        entries = .allocate(capacity: Int(Self.batch))
    }

    deinit {
        io_uring_queue_exit(ring)
        ring.deallocate()
        entries.deallocate()
    }

    /// A submission entry; what was queued is submitted first when the queue is full.
    private mutating func entry() -> UnsafeMutablePointer<io_uring_sqe> {
        if let entry = io_uring_get_sqe(ring) {
            inFlight += 1
            return entry
        }
        submit()
        guard let entry = io_uring_get_sqe(ring) else {
            invariantFailed("the submission queue has room after a submit", #fileID, #line)
        }
        inFlight += 1
        return entry
    }

    package mutating func read(
        _ descriptor: Int32, _ buffer: UnsafeMutableRawPointer, _ length: Int, at offset: UInt64,
        _ userData: UserData
    ) {
        let entry = entry()
        io_uring_prep_read(entry, descriptor, buffer, UInt32(length), offset)
        entry.pointee.user_data = userData.rawValue
    }

    package mutating func write(
        _ descriptor: Int32, _ buffer: UnsafeRawPointer, _ length: Int, at offset: UInt64,
        durable: Bool, _ userData: UserData
    ) {
        let entry = entry()
        io_uring_prep_write(entry, descriptor, buffer, UInt32(length), offset)
        if durable { farcopy_make_durable(entry) }
        entry.pointee.user_data = userData.rawValue
    }

    package mutating func dataSync(_ descriptor: Int32, _ userData: UserData) {
        let entry = entry()
        io_uring_prep_fsync(entry, descriptor, UInt32(IORING_FSYNC_DATASYNC))
        entry.pointee.user_data = userData.rawValue
    }

    /// Asks ext4 whether a flush that has succeeded counts; `OpenFile.flushProofError(_:outcome:)` knows what the answer says.
    package mutating func proveFlush(_ descriptor: Int32, _ userData: UserData) {
        let entry = entry()
        farcopy_prepare_proof(entry, descriptor)
        entry.pointee.user_data = userData.rawValue
    }

    package mutating func allocate(
        _ descriptor: Int32, mode: Int32, offset: UInt64, length: UInt64, _ userData: UserData
    ) {
        let entry = entry()
        io_uring_prep_fallocate(entry, descriptor, mode, off_t(offset), off_t(length))
        entry.pointee.user_data = userData.rawValue
    }

    package mutating func receive(
        _ socket: Int32, _ buffer: UnsafeMutableRawPointer, _ length: Int, _ userData: UserData
    ) {
        let entry = entry()
        io_uring_prep_recv(entry, socket, buffer, length, 0)
        entry.pointee.user_data = userData.rawValue
    }

    package mutating func send(
        _ socket: Int32, _ message: UnsafePointer<msghdr>, _ userData: UserData
    ) {
        let entry = entry()
        // The kernel goes on by itself after a part, as long as the message is not through.
        io_uring_prep_sendmsg(entry, socket, message, UInt32(MSG_NOSIGNAL) | UInt32(MSG_WAITALL))
        entry.pointee.user_data = userData.rawValue
    }

    /// Accepts until cancelled. Sockets stay blocking: the ring waits for them, direct calls say MSG_DONTWAIT.
    package mutating func accept(_ socket: Int32, _ userData: UserData) {
        let entry = entry()
        io_uring_prep_multishot_accept(
            entry, socket, nil, nil, Int32(SOCK_CLOEXEC.rawValue))
        entry.pointee.user_data = userData.rawValue
    }

    /// Completes each time the descriptor becomes readable.
    package mutating func pollReadable(_ descriptor: Int32, _ userData: UserData) {
        let entry = entry()
        io_uring_prep_poll_multishot(entry, descriptor, UInt32(POLLIN))
        entry.pointee.user_data = userData.rawValue
    }

    /// Completes once, with the events that have come about.
    package mutating func pollOnce(_ descriptor: Int32, _ events: Int16, _ userData: UserData) {
        let entry = entry()
        io_uring_prep_poll_add(entry, descriptor, UInt32(UInt16(bitPattern: events)))
        entry.pointee.user_data = userData.rawValue
    }

    /// Reads a range of a file into the page cache.
    package mutating func readAhead(_ descriptor: Int32, offset: UInt64, length: UInt64, _ userData: UserData) {
        let entry = entry()
        io_uring_prep_fadvise(entry, descriptor, offset, Int(min(length, 1 << 30)), Int32(POSIX_FADV_WILLNEED))
        entry.pointee.user_data = userData.rawValue
    }

    /// Opens a file for reading and writing; `path` is there until this has ended. The result is its descriptor.
    package mutating func open(_ path: UnsafePointer<CChar>, _ userData: UserData) {
        let entry = entry()
        io_uring_prep_openat(entry, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0)
        entry.pointee.user_data = userData.rawValue
    }

    package mutating func cancel(_ target: UserData, _ userData: UserData) {
        let entry = entry()
        io_uring_prep_cancel64(entry, target.rawValue, 0)
        entry.pointee.user_data = userData.rawValue
    }

    /// Hands queued entries to the kernel. A full completion queue is the caller's to empty; entries stay queued.
    package mutating func submit() {
        while io_uring_sq_ready(ring) > 0 {
            let result = io_uring_submit(ring)
            if result == -EINTR { continue }
            if result == -EAGAIN || result == -EBUSY { return }
            invariant(result >= 0, "io_uring takes well-formed entries")
        }
    }

    /// Whether entries wait to be handed to the kernel.
    package var hasQueued: Bool { io_uring_sq_ready(ring) > 0 }

    /// Submits, then waits for a completion, at most `milliseconds` (0: only looks).
    package mutating func submitAndWait(milliseconds: Int) {
        if milliseconds == 0 {
            let result = io_uring_submit_and_get_events(ring)
            invariant(
                result >= 0 || result == -EINTR || result == -EAGAIN || result == -EBUSY,
                "io_uring takes well-formed entries")
            return
        }
        var timeout = __kernel_timespec(
            tv_sec: Int64(milliseconds / 1000), tv_nsec: Int64(milliseconds % 1000) * 1_000_000)
        var first: UnsafeMutablePointer<io_uring_cqe>?
        let result = io_uring_submit_and_wait_timeout(ring, &first, 1, &timeout, nil)
        invariant(
            result >= 0 || result == -ETIME || result == -EINTR || result == -EAGAIN
                || result == -EBUSY, "io_uring can be waited on")
    }

    /// Takes up to `capacity` completions that have arrived.
    package mutating func reap(
        into completions: UnsafeMutablePointer<Completion>, capacity: Int
    ) -> Int {
        let count = Int(io_uring_peek_batch_cqe(ring, entries, min(Self.batch, UInt32(capacity))))
        for index in 0..<count {
            let entry = entries[index]!.pointee
            let more = entry.flags & UInt32(IORING_CQE_F_MORE) != 0
            completions[index] = Completion(
                userData: UserData(rawValue: entry.user_data), result: entry.res, more: more)
            if !more { inFlight -= 1 }
        }
        io_uring_cq_advance(ring, UInt32(count))
        return count
    }
}
