// Rarities.swift: what must come together before some deliberate faults show, of which every seed that looks for them has much.

/// What seeds of `World` have now and then.
struct Rarities: OptionSet {
    let rawValue: Int

    /// One save of a record in five fails, and is not tried again in time.
    static let savesFail = Rarities(rawValue: 1)
    /// Messages come when the link has long been closed.
    static let linkIsSlow = Rarities(rawValue: 2)
    /// Targets are full, or fail, and sectors cannot be read.
    static let targetsFail = Rarities(rawValue: 4)
    /// The run ends with a switchover, which nothing else that fails keeps from its end.
    static let rolesChange = Rarities(rawValue: 8)
    /// The primary has targets, and its disks are slower than all else.
    static let preservesAreSlow = Rarities(rawValue: 16)
    /// The secondary is killed, and loses power, again and again.
    static let secondaryDies = Rarities(rawValue: 32)
}

extension DeliberateFault {
    /// Mode `change-volume` has nothing to do with it.
    var isOfOtherModes: Bool {
        switch self {
        case .skipIntermediate, .advanceUnmarked, .clearUnmirrored, .trustUnfilled, .trustMarks, .trustOldIntermediates,
            .trustFilled:
            false
        default: true
        }
    }

    /// What every seed has that is to show it.
    var showsWhere: Rarities {
        switch self {
        case .admitUnsettled: [.savesFail, .rolesChange]
        case .admitLate: [.savesFail, .rolesChange]
        case .leaveUnsaid: [.savesFail, .targetsFail, .secondaryDies]
        case .prepareWithoutBarrier: .preservesAreSlow
        case .takeLateCommits: .linkIsSlow
        case .countLate: .targetsFail
        default: []
        }
    }
}
