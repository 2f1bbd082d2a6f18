// RemoteCommit.swift: a secondary commits a point.
//
// Must be prevented:
//   a point is committed out of order, twice, or while writes to the intake are under way
//   a commit is half done after a crash: the record alone decides, files come before it and chains after
//   what a volume has changed since the point before is not in the point (`IntakeSurvey.changed`)
//   something is let in while the record's file may hold a point whose commit has failed

package struct RemoteCommit: StepTable {
    enum State {
        case begins, surveys, flushes(CommitPlan), makesFiles(CommitPlan), decides(CommitPlan), takes(CommitPlan)
        case isSentAnew(CommitPlan), closes(any Error)
    }
    var state = State.begins
    private let number: UInt64
    private let previous: UInt64?
    private let formedAt: Double
    private let keep: Retention
    private let session: UInt64

    /// - Parameters:
    ///   - previous: the newest point that the primary knows to be committed.
    ///   - keep: which points stay.
    ///   - session: of the primary that asks.
    package init(
        number: UInt64, after previous: UInt64?, formedAt: Double, keep: Retention, session: UInt64
    ) {
        (self.number, self.previous, self.formedAt) = (number, previous, formedAt)
        (self.keep, self.session) = (keep, session)
    }

    package mutating func next(after answer: Answer, _ record: GroupRecord) -> Next<PointRecord> {
        switch (state, answer) {
        case (.begins, .begin):
            // Asked again: the answer was lost.
            if let done = record.hasCommitted(number) { return .done(done) }
            return go(.surveys, .survey)
        case (.surveys, .survey(let survey)):
            do {
                let plan = try record.planCommit(
                    number, after: previous, formedAt: formedAt, keep: keep, survey)
                return go(.flushes(plan), .flushVolumes(survey.changed))
            } catch { return .failed(error) }
        case (.flushes(let plan), .done):
            return go(.makesFiles(plan), .makePointFiles(plan))
        case (.makesFiles(let plan), .done):
            return go(.decides(plan), .change(.committed(plan)))
        case (.decides, .failed(let error)):
            // The file may hold the point all the same, and a start would take it then as the volumes are.
            return go(.closes(error), .fence(next: 0))
        case (.closes(let error), _): return .failed(error)
        case (.decides(let plan), .done):
            return go(.takes(plan), .takePoint(plan))
        case (.takes(let plan), .done):
            guard record.untracked != nil else { return .done(plan.point) }
            return go(.isSentAnew(plan), .change(.sentAnew(session: session)))
        case (.isSentAnew(let plan), _): return .done(plan.point)
        case (_, .failed(let error)): return .failed(error)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }
}
