// Mailbox.swift: how threads meet: a bounded queue and an eventfd that wakes the one thread that reads it.

import Base
import CLibURing
import Glibc
import Synchronization

package final class Mailbox<Message: Sendable>: Sendable {
    private let queue = Mutex<[Message]>([])
    /// Readable while messages wait.
    package let eventDescriptor: Int32
    private let capacity: Int

    package init(capacity: Int = Limits.mailboxCapacity) throws(SystemError) {
        eventDescriptor = eventfd(0, Int32(EFD_CLOEXEC) | Int32(EFD_NONBLOCK))
        guard eventDescriptor >= 0 else { throw SystemError("create an eventfd") }
        self.capacity = capacity
    }

    deinit { close(eventDescriptor) }

    /// Leaves a message; false when the mailbox is full, which the sender must treat as a failure of what it asked.
    @discardableResult
    package func send(_ message: sending Message) -> Bool {
        let accepted: (Bool, wake: Bool) = queue.withLock { messages in
            guard messages.count < capacity else { return (false, false) }
            messages.append(message)
            return (true, messages.count == 1)
        }
        if accepted.wake { eventfd_write(eventDescriptor, 1) }
        return accepted.0
    }

    /// Takes every waiting message. Called by the one reader, after the eventfd became readable.
    package func drain() -> [Message] {
        var value: eventfd_t = 0
        eventfd_read(eventDescriptor, &value)
        return queue.withLock { messages in
            let taken = messages
            messages.removeAll(keepingCapacity: true)
            return taken
        }
    }
}

/// Starts a detached thread. `body` must not be isolated to an actor.
package func startThread(name: String, _ body: @escaping @Sendable () -> Void) {
    final class Entry: Sendable {
        let name: String
        let body: @Sendable () -> Void
        init(name: String, body: @escaping @Sendable () -> Void) {
            self.name = name
            self.body = body
        }
    }
    var thread = pthread_t()
    let argument = Unmanaged.passRetained(Entry(name: name, body: body)).toOpaque()
    let result = pthread_create(
        &thread, nil,
        { argument in
            let entry = Unmanaged<Entry>.fromOpaque(argument!).takeRetainedValue()
            farcopy_name_thread(entry.name)
            entry.body()
            return nil
        }, argument)
    invariant(result == 0, "a thread can be started")
    pthread_detach(thread)
}

/// Nanoseconds of the monotonic clock.
package func monotonicNanoseconds() -> UInt64 {
    var time = timespec()
    clock_gettime(CLOCK_MONOTONIC, &time)
    return UInt64(time.tv_sec) * 1_000_000_000 + UInt64(time.tv_nsec)
}
