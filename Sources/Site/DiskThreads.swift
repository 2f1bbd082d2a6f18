// DiskThreads.swift: calls that wait for the disk, several at a time, and away from the site's thread, where every other group's work
// would wait with them. What is done there touches no state of the site: values go in, and come out.

/// Threads for such calls, made at the start.
struct DiskThreads {
    private let threads: [DiskThread]

    init(count: Int) throws { threads = try (0..<count).map { try DiskThread("disk \($0)") } }

    /// Does something for each of some values at once.
    ///
    /// - Returns: what came of each, in their order.
    /// - Throws: what went wrong with the first for which something did, once all have ended.
    func each<Value: Sendable, Result: Sendable>(
        _ values: [Value], _ body: @escaping @Sendable (Value) throws -> Result
    ) async throws -> [Result] {
        let threads = threads
        let outcomes = await withTaskGroup(of: (Int, Swift.Result<Result, any Error>).self) { tasks in
            for (index, value) in values.enumerated() {
                tasks.addTask { (index, await threads[index % threads.count].outcome { try body(value) }) }
            }
            var outcomes = [Swift.Result<Result, any Error>?](repeating: nil, count: values.count)
            for await (index, outcome) in tasks { outcomes[index] = outcome }
            return outcomes
        }
        return try outcomes.map { try $0!.get() }
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
