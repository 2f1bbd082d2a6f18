// Commands.swift: the operator's commands that a configuration names.

/// `on_freeze` and `on_thaw` of a volume or group.
package struct HookCommands: Sendable, Equatable {
    package var onFreeze: String?
    package var onThaw: String?
    /// Seconds; a command that takes longer is killed.
    package var timeout = usualTimeout
    package static let usualTimeout: Double = 30
    package var isEmpty: Bool { onFreeze == nil && onThaw == nil }
}

/// Commands of a group that run when something happens (`on_lag_exceeded` …).
package enum GroupEvent: String, CaseIterable, Sendable {
    case lagExceeded = "on_lag_exceeded"
    case suspended = "on_suspended"
    case splitBrain = "on_split_brain"
    case beforeFailover = "before_failover"
    case afterFailover = "after_failover"
}
