// SiteThread.swift: the thread of the control plane, where calls that wait for the disk are allowed. What a site decides about its volumes and
// groups is decided there, one thing at a time between two waits.

@globalActor
package actor SiteThread {
    package static let shared = SiteThread()
    private static let made = Result { try ThreadExecutor(name: "site") }
    private let executor: ThreadExecutor
    package nonisolated var unownedExecutor: UnownedSerialExecutor { executor.asUnownedSerialExecutor() }

    private init() { executor = try! Self.made.get() }

    /// Before anything runs there.
    ///
    /// - Throws: when the system has no descriptor for it.
    package static func begin() throws { _ = try made.get() }
}
