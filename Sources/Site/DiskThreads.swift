// DiskThreads.swift: calls that wait for the disk, several at a time, and away from the site's thread, where every other group's work
// would wait with them. What is done there touches no state of the site: values go in, and come out.
//
// Must be prevented:
//   a disk that does not answer takes every thread: one caller has a few at a time

import Base
import Synchronization

/// Threads for such calls, made at the start.
final class DiskThreads: Sendable {
    private struct State {
        var free: [DiskThread]
        var waiting: [CheckedContinuation<DiskThread, Never>] = []
    }
    private let state: Mutex<State>

    init(count: Int) throws {
        let threads = try (0..<count).map { try DiskThread("disk \($0)") }
        state = Mutex(State(free: threads))
    }

    /// Does something on a thread that is free; in turn, when none is.
    func run<Result: Sendable>(_ body: @escaping @Sendable () throws -> Result) async throws -> Result {
        let thread = await take()
        defer { give(thread) }
        return try await thread.outcome(body).get()
    }

    /// Does something for each of some values, a few at a time.
    ///
    /// - Returns: what came of each, in their order.
    /// - Throws: what went wrong with the first for which something did, once all have ended.
    func each<Value: Sendable, Result: Sendable>(
        _ values: [Value], _ body: @escaping @Sendable (Value) throws -> Result
    ) async throws -> [Result] {
        let outcomes = await withTaskGroup(of: (Int, Swift.Result<Result, any Error>).self) { tasks in
            var outcomes = [Swift.Result<Result, any Error>?](repeating: nil, count: values.count)
            for (index, value) in values.enumerated() {
                if index >= Limits.diskThreadsPerCaller, let (done, outcome) = await tasks.next() {
                    outcomes[done] = outcome
                }
                tasks.addTask {
                    do { return (index, .success(try await self.run { try body(value) })) } catch {
                        return (index, .failure(error))
                    }
                }
            }
            for await (index, outcome) in tasks { outcomes[index] = outcome }
            return outcomes
        }
        return try outcomes.map { try $0!.get() }
    }

    private func take() async -> DiskThread {
        await withCheckedContinuation { continuation in
            let thread = state.withLock { state -> DiskThread? in
                guard state.free.isEmpty else { return state.free.removeLast() }
                state.waiting.append(continuation)
                return nil
            }
            if let thread { continuation.resume(returning: thread) }
        }
    }

    private func give(_ thread: DiskThread) {
        let next = state.withLock { state -> CheckedContinuation<DiskThread, Never>? in
            guard state.waiting.isEmpty else { return state.waiting.removeFirst() }
            state.free.append(thread)
            return nil
        }
        next?.resume(returning: thread)
    }
}

private actor DiskThread {
    private let executor: ThreadExecutor
    nonisolated var unownedExecutor: UnownedSerialExecutor { executor.asUnownedSerialExecutor() }

    init(_ name: String) throws { executor = try ThreadExecutor(name: name) }

    func outcome<Value: Sendable>(_ body: @Sendable () throws -> Value) -> Result<Value, any Error> {
        Result { try body() }
    }
}
