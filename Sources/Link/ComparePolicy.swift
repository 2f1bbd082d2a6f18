// ComparePolicy.swift: when a primary asks for the peer's checksums before it sends.

/// Whether unchanged content inside changed grains is looked for.
package enum ComparePolicy: String, Sendable, CaseIterable {
    case never
    /// While it finds enough that need not be sent.
    case auto
    case always
}
