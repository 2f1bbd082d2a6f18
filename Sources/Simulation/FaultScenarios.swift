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
}
