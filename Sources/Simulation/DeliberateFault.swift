// DeliberateFault.swift: mistakes to make on purpose, to show that the checker sees them.

import Volumes

package enum DeliberateFault: String, CaseIterable, Sendable {
    // Two sites (World).
    /// Acknowledgements are let go before every volume has formed: volumes exchange their bitmaps one after the other.
    case releaseEarly
    /// Flushes do nothing, and power is lost.
    case skipFlushes
    /// A commit does not wait for the drain to be acknowledged.
    case commitEarly
    /// Bits are cleared although the point was not flushed, and the secondary loses power.
    case acknowledgeFlushEarly
    /// Bits are cleared when the data is sent, not when it is acknowledged.
    case clearEarly
    /// After power loss bitmaps are trusted without the activity log.
    case trustBitmapsAfterPowerLoss
    /// The next point's bitmaps are cleared while a reactor may still hold the point before.
    case prepareWithoutBarrier
    /// A restarted secondary relies on bits that the killed process had not flushed.
    case trustUnflushedBits
    /// A new session does not wait for the writes of the one before.
    case skipFencing
    case forgetMark
    /// A write in flight when bitmaps change roles is neither waited for nor marked again.
    case forgetInFlightMark
    case skipReadCheck
    case skipDurability
    /// A site does not take the changed grains of the peer that gives up its role into its own bitmaps.
    case forgetPeersChanges
    /// What the secondary lacks at first is not marked: only what hosts write is sent.
    case forgetFirstCopy
    /// The secondary is written down as known before the marks of all that it lacks are on stable storage.
    case relyOnUnflushedMarks
    /// A session begins although the record's file may hold a point whose commit was refused.
    case openUnsaved
    /// A start of the primary says that what it found is this run's before it has taken it up.
    case confirmPrimaryEarly
    /// Writes go on although their regions could not be logged and nothing else says that the log is not to be relied on.
    case goOnUnlogged
    /// The peer, which may have taken over, is not waited for.
    case takeBackUnheard
    /// A failover is decided before it is on stable storage which grains must come back from the point.
    case failOverUnmarked

    /// What a point has to send is counted when acknowledgements go, although a volume may have lost the point by then.
    case countLate
    /// A point is formed while the volumes still have something of the one before.
    case formOverLast
    /// What a link that was closed has still brought counts.
    case hearClosedLinks
    /// What relies on a record begins although that could not be saved; or hosts write although it may say that the role is handed over.
    case goOnUnsaved, admitUnsettled
    /// Hosts that wait since an operation has failed are let in while the next one gives the role up.
    case admitLate
    /// A point counts as committed once that was asked for.
    case countUnheard
    /// A commit of an earlier session is carried out.
    case takeLateCommits
    /// A FlashCopy that a point is compared with is taken a little after it.
    case compareLater

    /// Mode `global-mirror`: an old image is discarded before it is sent, or overwritten; what was sent ahead is sent again when nothing holds it
    /// any more; data counts as on stable storage that was sent without FUA; a start takes up a point that was held in memory.
    case discardUnsent, overwriteUnsent, giveOutTwice, countUnflushed, takeUpImages

    /// A volume has no files of a point although it has changed since the one before.
    case takeForUnchanged
    /// Mode `change-volume`: what is sent is not in the intermediate; a grain of the next point is written there, and nothing says so.
    case skipIntermediate, advanceUnmarked
    /// Bits of OOS are cleared although the intermediate has what was sent in memory alone.
    case clearUnmirrored
    /// After power loss: an intermediate that was being filled counts; so do its marks; one that another primary's time has passed by counts.
    case trustUnfilled, trustMarks, trustOldIntermediates
    /// What fills an intermediate counts as the last committed point's.
    case trustFilled
    /// Files that are missing are made anew.
    case trustMissing
    /// Files leave with their point, although newer points have none of the volume.
    case dropCarriers
    /// Files of points that have failed leave although the record's file may still name these.
    case leaveUnsaid

    // A site's volumes with FlashCopies (CopyWorld).
    /// A copy takes old content before it is written down.
    case recordAfterChain
    case ignoreUnsettled
    case dropHandover
    case skipActivityLog
    case forgetHeir
    case forgetChanges
    /// A start says that what it found is this run's before it has taken it up.
    case confirmEarly
    /// The same as `goOnUnlogged`, and of copies that have failed.
    case goOnUnwritten
    /// A copy leaves although its record may say that it is active; hosts are let in although it may say that the volume is restored.
    case leaveUnsaved
    /// What one of the copies that were taken together says, or one of the volumes that are restored together, holds for it alone.
    case halfSets
    /// Files of a copy that has left go although the record's file may name it; or its target, which another copy has taken over.
    case dropFilesUnsaved, dropSharedTarget
    /// A copy is told of, or a restore is decided, or a background copy is finished, before what that relies on is on stable storage.
    case activateUnflushed, decideUnflushed, completeUnflushed
    /// What a copy that leaves has noted as changed for older ones goes with it.
    case forgetUnflushed
    /// A volume is restored from a copy that has failed.
    case restoreFromFailed
    /// A start does not look at whether a copy had failed.
    case trustFailed

    // Several hosts and remotes (Coordination).
    /// Acknowledgements go while a host forms.
    case holdNothing
    /// A host is held until somebody says run.
    case holdOn
    /// A host that let go at the deadline says that it did because of run.
    case countDeadlineAsRun
    /// A host says that all of a point is at its remote while data is under way, or not flushed.
    case drainEarly, drainUnflushed
    /// A restarted host does not give up the point that a crash has left half formed, or that its volumes do not hold any more.
    case forgetHalfFormed, trustHeldPoint
    /// A restarted host does not know which numbers were used.
    case forgetFormed
    /// A restarted coordinator gives up what was decided, or gives a number to two points.
    case forgetDecision, forgetNumber
    /// Commit is said before the decision is saved.
    case decideUnsaved
    /// A coordinator that was followed by another changes the record; its messages are obeyed.
    case saveOverNewer, obeyOlderEpoch
    /// A remote says that a point is prepared, or promises to refuse it, before that is saved.
    case prepareUnsaved, promiseUnsaved
    /// A restarted remote does not know what it has promised.
    case forgetPromise
    /// A remote takes data of whatever session, whenever it comes.
    case takeLateData
    /// Remotes that do not answer count as if they had promised to refuse; or none is asked.
    case countSilenceAsPromise, failOverUnasked

    // The same, as the production puts it together (SeveralHosts).
    /// A host is told of its deadline late, and says that it ran although some acknowledgements had gone by themselves.
    case countExpiredHold
    /// A link is not closed when the point that is drained over it is given up, and the next point goes over it.
    case keepClosedLink
    /// A remote says that a point is prepared, and what it has got is not flushed; or without writing it down.
    case prepareUnflushed, forgetPrepared
    /// A remote promises, and does not write it down; commits on the coordinator's word what it has promised to refuse.
    case promiseUnwritten, commitRefused
    /// A remote in doubt takes the point for dropped; or does not write down who could be asked.
    case failOverUnsettled, forgetPlaces
    /// What was prepared, or committed, while a failover waited for its turn is passed over.
    case failOverOvertaken
    /// A failover is announced when the others have been asked.
    case announceLate
    /// Files of a point are made after the decision.
    case makeFilesLater
    /// What answers another coordinator's question is said to the present one in its name.
    case answerOtherEpochs
    /// A coordinator begins a point although some host cannot form it.
    case askBlindly

    /// The rule of the engine that is left out.
    var engine: EngineFaults {
        switch self {
        case .forgetMark: .forgetMark
        case .forgetInFlightMark: [.forgetInFlightMark, .ignoreUnsettled]
        case .skipReadCheck: .skipReadCheck
        case .skipDurability: .skipDurability
        case .ignoreUnsettled: .ignoreUnsettled
        case .dropHandover: .dropHandover
        case .skipActivityLog: .skipActivityLog
        case .forgetHeir: .forgetHeir
        case .forgetChanges: .forgetChanges
        case .discardUnsent: .discardUnsent
        case .overwriteUnsent: .overwriteUnsent
        case .giveOutTwice: .giveOutTwice
        case .skipIntermediate: .skipIntermediate
        case .advanceUnmarked: .advanceUnmarked
        default: []
        }
    }

    /// It leaves out a rule of the engine, which other builds cannot.
    package var needsOwnBuild: Bool { !engine.isEmpty }
    package static var areBuiltIn: Bool { EngineFaults.areBuiltIn }
}
