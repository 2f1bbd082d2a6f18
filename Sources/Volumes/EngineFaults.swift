// EngineFaults.swift: mistakes that the simulator can switch on, to show that its checker sees them, in a build of its own: others are
// compiled without (`make simulate FAULT=…`, DELIBERATE_FAULTS in Package.swift).

/// Rules of the engine that are left out on purpose.
package struct EngineFaults: OptionSet, Sendable {
    package let rawValue: UInt16
    package init(rawValue: UInt16) { self.rawValue = rawValue }

    /// A write is not marked in CR before it is issued.
    package static let forgetMark = EngineFaults(rawValue: 1 << 0)
    /// A write in flight across the exchange of bitmaps is not marked again.
    package static let forgetInFlightMark = EngineFaults(rawValue: 1 << 1)
    /// What was read from the source is not looked at again.
    package static let skipReadCheck = EngineFaults(rawValue: 1 << 2)
    /// Old content of a durable copy is not flushed before the source is overwritten.
    package static let skipDurability = EngineFaults(rawValue: 1 << 3)
    /// Writes in flight when a copy is taken are not waited for.
    package static let ignoreUnsettled = EngineFaults(rawValue: 1 << 4)
    /// A copy that leaves hands nothing over.
    package static let dropHandover = EngineFaults(rawValue: 1 << 5)
    /// A write does not wait until its region is in the activity log.
    package static let skipActivityLog = EngineFaults(rawValue: 1 << 6)
    /// A write to a copy does not fill the next older one first.
    package static let forgetHeir = EngineFaults(rawValue: 1 << 7)
    /// A write under a copy with background copy is not noted in its changes.
    package static let forgetChanges = EngineFaults(rawValue: 1 << 8)
    /// An old image leaves memory once it was read, not once it was sent.
    package static let discardUnsent = EngineFaults(rawValue: 1 << 9)
    /// A write does not wait for the old image that is to be sent first.
    package static let overwriteUnsent = EngineFaults(rawValue: 1 << 10)
    /// What was given out ahead of its turn is given out again in its turn.
    package static let giveOutTwice = EngineFaults(rawValue: 1 << 11)
    /// What is sent of a point was not copied to the intermediate.
    package static let skipIntermediate = EngineFaults(rawValue: 1 << 12)
    /// A grain of the next point is written to the intermediate, and nothing says so.
    package static let advanceUnmarked = EngineFaults(rawValue: 1 << 13)
}

extension EngineFaults {
    /// This build can make them.
    package static var areBuiltIn: Bool {
        #if DELIBERATE_FAULTS
            true
        #else
            false
        #endif
    }
}

extension Volume {
    /// Whether a rule is left out.
    @inline(__always)
    func omits(_ rule: EngineFaults) -> Bool {
        #if DELIBERATE_FAULTS
            faults.contains(rule)
        #else
            false
        #endif
    }
}
