// ThreadExecutor.swift: runs an actor on a thread of its own, where calls that wait for the disk are allowed.

import Glibc
import Ring
import Synchronization

final class ThreadExecutor: SerialExecutor {
    private let jobs = Mutex<[UnownedJob]>([])
    private let wake: Mailbox<Void>

    init(name: String) throws {
        wake = try Mailbox<Void>()
        startThread(name: name) { [self] in run() }
    }

    func enqueue(_ job: consuming ExecutorJob) {
        let unowned = UnownedJob(job)
        let first = jobs.withLock { jobs in
            jobs.append(unowned)
            return jobs.count == 1
        }
        if first { wake.send(()) }
    }

    /// The thread holds the executor: both live as long as the process.
    private func run() {
        var entry = pollfd(fd: wake.eventDescriptor, events: Int16(POLLIN), revents: 0)
        while true {
            _ = poll(&entry, 1, -1)
            _ = wake.drain()
            while true {
                let batch = jobs.withLock { jobs in
                    let batch = jobs
                    jobs = []
                    return batch
                }
                if batch.isEmpty { break }
                for job in batch { job.runSynchronously(on: asUnownedSerialExecutor()) }
            }
        }
    }
}
