// FaultScenarios.swift: where each deliberate fault shows.

extension DeliberateFault {
    /// The scenario that shows it.
    package var scenario: any Scenario.Type {
        switch self {
        case .recordAfterChain, .ignoreUnsettled, .dropHandover, .skipActivityLog, .forgetHeir, .forgetChanges,
            .confirmEarly, .goOnUnwritten, .leaveUnsaved, .halfSets, .dropFilesUnsaved, .dropSharedTarget,
            .activateUnflushed, .decideUnflushed, .completeUnflushed, .forgetUnflushed,
            .restoreFromFailed, .trustFailed:
            CopyWorld.self
        case .holdNothing, .holdOn, .countDeadlineAsRun, .drainEarly, .drainUnflushed, .forgetHalfFormed, .forgetFormed,
            .forgetDecision, .forgetNumber, .decideUnsaved, .saveOverNewer, .obeyOlderEpoch, .prepareUnsaved,
            .promiseUnsaved, .forgetPromise, .takeLateData, .countSilenceAsPromise, .failOverUnasked, .trustHeldPoint:
            Coordination.self
        case .countExpiredHold, .keepClosedLink, .prepareUnflushed, .forgetPrepared, .promiseUnwritten, .commitRefused,
            .failOverUnsettled, .failOverOvertaken, .forgetPlaces, .announceLate,
            .makeFilesLater, .answerOtherEpochs, .askBlindly:
            SeveralHosts.self
        default: World.self
        }
    }

    /// What seeds of `World` have now and then, and every seed has that is to show this one.
    var showsWhere: Rarities {
        switch self {
        case .admitUnsettled: [.savesFail, .rolesChange]
        case .leaveUnsaid: .savesFail
        case .prepareWithoutBarrier: .preservesAreSlow
        case .takeLateCommits: .linkIsSlow
        case .countLate: .targetsFail
        default: []
        }
    }
}

struct Rarities: OptionSet {
    let rawValue: Int

    /// One save of a record in five fails, and is not tried again in time.
    static let savesFail = Rarities(rawValue: 1)
    /// Messages come when the link has long been closed.
    static let linkIsSlow = Rarities(rawValue: 2)
    /// Targets are full, or fail, and sectors cannot be read.
    static let targetsFail = Rarities(rawValue: 4)
    /// The run ends with a switchover.
    static let rolesChange = Rarities(rawValue: 8)
    /// The primary has targets, and its disks are slower than all else.
    static let preservesAreSlow = Rarities(rawValue: 16)
}
