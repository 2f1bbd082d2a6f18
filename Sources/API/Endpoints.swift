// Endpoints.swift: every call of the control API, in one table: its server and its clients follow from it.

import Groups

package enum Endpoints {
    private static let day: Int64 = 86400

    // What is shown.
    package static let status = Endpoint<Nothing, StatusReport>(.get, "/v1/status", .anyone, .group)
    package static let events = Endpoint<Nothing, [EventEntry]>(.get, "/v1/events", .anyone, .group)
    package static let points = Endpoint<Nothing, [StatusReport.PointReport]>(
        .get, "/v1/groups/{group}/points", .anyone)
    package static let flashCopies = Endpoint<Nothing, [FlashCopyReport]>(.get, "/v1/flashcopies", .anyone)
    package static let flashCopy = Endpoint<Nothing, [FlashCopyReport]>(
        .get, "/v1/flashcopies/{name}", .anyone, .volumes)
    package static let previewResync = Endpoint<Nothing, ResyncReport>(
        .get, "/v1/groups/{group}/resync", .operator, .discard, .led)
    package static let previewFailback = Endpoint<Nothing, ResyncReport>(
        .get, "/v1/groups/{group}/failback", .operator, .led)

    // Mirroring.
    package static let cycle = Endpoint<Nothing, CycleAnswer>(
        .post, "/v1/groups/{group}/cycle", .operator, seconds: 7 * day, .wait)
    package static let suspend = Endpoint<Nothing, Done>(.post, "/v1/groups/{group}/suspend", .operator, .led)
    package static let resume = Endpoint<Nothing, Done>(
        .post, "/v1/groups/{group}/resume", .operator, .isolated, .fromImage, .led)
    package static let rate = Endpoint<Nothing, Done>(.post, "/v1/groups/{group}/rate", .operator, .bytes)
    package static let verify = Endpoint<Nothing, VerifyReport>(
        .post, "/v1/groups/{group}/verify", .operator, seconds: 30 * day, .repair, .rate, .led)
    package static let restore = Endpoint<LocalRestoreRequest, LocalRestoreReport>(
        .post, "/v1/groups/{group}/restore", .operator, seconds: 7 * day)
    package static let dropPoints = Endpoint<PointDropRequest, PointDropReport>(
        .post, "/v1/groups/{group}/points/drop", .operator, seconds: 600)
    package static let abort = Endpoint<Nothing, Done>(.post, "/v1/abort", .operator, seconds: 60, .operation)

    // Roles.
    package static let failover = Endpoint<Nothing, FailoverReport>(
        .post, "/v1/groups/{group}/failover", .operator, seconds: 600, .point, .alone)
    package static let switchover = Endpoint<Nothing, StatusReport.PointReport>(
        .post, "/v1/groups/{group}/switchover", .operator, seconds: 7 * day, .led, .alone)
    package static let failback = Endpoint<Nothing, StatusReport.PointReport>(
        .post, "/v1/groups/{group}/failback", .operator, seconds: 365 * day, .led)
    package static let resync = Endpoint<Nothing, ResyncReport>(
        .post, "/v1/groups/{group}/resync", .operator, seconds: 7 * day, .discard, .led)
    package static let practice = Endpoint<Nothing, [FlashCopyReport]>(
        .post, "/v1/groups/{group}/practice", .operator, seconds: 600, .point, .led)
    package static let endPractice = Endpoint<Nothing, Done>(
        .delete, "/v1/groups/{group}/practice", .operator, seconds: 600, .led)

    // FlashCopies. Older ones may have to be given what they need first, so there is time.
    package static let createFlashCopy = Endpoint<FlashCopyRequest, [FlashCopyReport]>(
        .post, "/v1/flashcopies", .operator, seconds: 7 * day)
    package static let setFlashCopy = Endpoint<FlashCopyRequest, [FlashCopyReport]>(
        .post, "/v1/flashcopies/set", .operator, seconds: 7 * day)
    package static let cloneFlashCopy = Endpoint<FlashCopyRequest, [FlashCopyReport]>(
        .post, "/v1/flashcopies/clone", .operator, seconds: 7 * day)
    package static let refreshFlashCopy = Endpoint<FlashCopyRequest, [FlashCopyReport]>(
        .post, "/v1/flashcopies/refresh", .operator, seconds: 7 * day)
    package static let restoreFlashCopy = Endpoint<FlashCopyRequest, [FlashCopyReport]>(
        .post, "/v1/flashcopies/restore", .operator, seconds: 7 * day)
    package static let withdrawFlashCopy = Endpoint<FlashCopyRequest, Done>(
        .post, "/v1/flashcopies/withdraw", .operator)

    // Between the sites of a group.
    package static let standing = Endpoint<Standing, Standing>(
        .post, "/v1/peer/groups/{group}/standing", .peer, whileStarting: true)
    package static let openSession = Endpoint<SessionRequest, SessionAnswer>(
        .post, "/v1/peer/groups/{group}/session", .peer)
    package static let commit = Endpoint<CommitRequest, CommitAnswer>(.post, "/v1/peer/groups/{group}/commit", .peer)
    package static let checksums = Endpoint<ChecksumRequest, ChecksumAnswer>(
        .post, "/v1/peer/groups/{group}/checksums", .peer)
    package static let yield = Endpoint<YieldRequest, YieldAnswer>(
        .post, "/v1/peer/groups/{group}/yield", .peer, seconds: 300)
    package static let changes = Endpoint<Nothing, ChangesAnswer>(
        .get, "/v1/peer/groups/{group}/changes", .peer, .volume, .from)
    package static let promote = Endpoint<PromoteRequest, Done>(.post, "/v1/peer/groups/{group}/promote", .peer)
    package static let untracked = Endpoint<UntrackedRequest, Done>(.post, "/v1/peer/groups/{group}/untracked", .peer)
    package static let pin = Endpoint<PinRequest, Done>(.post, "/v1/peer/groups/{group}/pin", .peer)
    package static let unpin = Endpoint<PinRequest, Done>(.post, "/v1/peer/groups/{group}/unpin", .peer)

    // Between the sites of a group with several hosts or remotes.
    package static let survey = Endpoint<SurveyCall, HostStanding>(.post, "/v1/peer/groups/{group}/survey", .peer)
    package static let askHost = Endpoint<HostCall, HostReply>(.post, "/v1/peer/groups/{group}/host", .peer)
    package static let askRemote = Endpoint<RemoteCall, RemoteReply>(.post, "/v1/peer/groups/{group}/remote", .peer)
    package static let testify = Endpoint<TestimonyCall, RemoteWord>(
        .post, "/v1/peer/groups/{group}/testimony", .peer)
    package static let announceResync = Endpoint<ResyncCall, Done>(
        .post, "/v1/peer/groups/{group}/resync", .peer, seconds: 30)
    package static let meet = Endpoint<MeetCall, Done>(.post, "/v1/peer/groups/{group}/meet", .peer, seconds: 90)
    package static let lead = Endpoint<LeadCall, Done>(.post, "/v1/peer/groups/{group}/lead", .peer, seconds: 30)

    package static let all: [APICall] = [
        status.call, events.call, points.call, flashCopies.call, flashCopy.call, previewResync.call,
        previewFailback.call,
        cycle.call, suspend.call, resume.call, rate.call, verify.call, restore.call, dropPoints.call, abort.call,
        failover.call, switchover.call, failback.call, resync.call, practice.call, endPractice.call,
        createFlashCopy.call, setFlashCopy.call, cloneFlashCopy.call, refreshFlashCopy.call, restoreFlashCopy.call,
        withdrawFlashCopy.call,
        standing.call, openSession.call, commit.call, checksums.call, yield.call, changes.call, promote.call,
        untracked.call,
        pin.call, unpin.call,
        survey.call, askHost.call, askRemote.call, testify.call, announceResync.call, meet.call, lead.call,
    ]
}
