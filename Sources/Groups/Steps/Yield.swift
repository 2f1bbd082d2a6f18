// Yield.swift: a primary gives up its role to its peer: what it was is the first recovery point of the new direction.
//
// Must be prevented:
//   a role is given up before the hosts' last acknowledged write is in what is kept
//   hosts stay shut out, or mirroring stopped, because the role was not given up
//   every try to give it up leaves one more FlashCopy

package struct Yield: StepTable {
    enum State {
        case begins, stops, holdsCopies, shutsOut, settles, givesUp, keeps, surveys
        case makesFiles(Yielding), decides(Yielding), takes(Yielding), serves(Yielding), drops(any Error)
        case closes(any Error), admits(any Error), goesOn(any Error)
    }
    var state = State.begins
    private let peer: String
    private let generations: [String]
    private let highestPoint: UInt64
    private let lineage: String
    private let volumes: [String]
    private let keep: Retention
    private let servesHosts: Bool

    /// - Parameters:
    ///   - peer: identity of the site that takes the role, with its generations and the highest number that it knows of a point.
    ///   - lineage: a new identity, which the peer's bitmaps describe the difference to.
    ///   - keep: which points stay.
    ///   - servesHosts: what is to be so again if the role is not given up.
    package init(
        to peer: String, generations: [String], highestPoint: UInt64, lineage: String, volumes: [String],
        keep: Retention, servesHosts: Bool
    ) {
        (self.peer, self.generations, self.highestPoint) = (peer, generations, highestPoint)
        (self.lineage, self.volumes, self.keep, self.servesHosts) = (lineage, volumes, keep, servesHosts)
    }

    package mutating func next(after answer: Answer, _ record: GroupRecord) -> Next<PointRecord> {
        switch (state, answer) {
        case (.closes(let error), _), (.drops(let error), _): return takeBack(error)
        // Asked again, it is kept again.
        case (.keeps, .failed(let error)), (.surveys, .failed(let error)), (.makesFiles, .failed(let error)):
            return go(.drops(error), .dropUnsent)
        case (.admits(let error), _): return go(.goesOn(error), .startMirroring)
        case (.goesOn(let error), _): return .failed(error)
        // The file may hold the role that was not taken.
        case (.decides, .failed(let error)): return go(.closes(error), .fence(next: 0))
        case (.takes, .failed(let error)), (.serves, .failed(let error)): return .failed(error)
        case (_, .failed(let error)): return takeBack(error)
        case (.begins, .begin): return go(.stops, .stopMirroring)
        case (.stops, .done): return go(.holdsCopies, .holdCopies)
        case (.holdsCopies, .done): return go(.shutsOut, .shutHostsOut)
        case (.shutsOut, .done): return go(.settles, .settleChanges)
        case (.settles, .done): return go(.givesUp, .change(.pointGivenUp))
        case (.givesUp, .done): return go(.keeps, .keepUnsent)
        case (.keeps, .done): return go(.surveys, .survey)
        case (.surveys, .survey(let survey)):
            let yielding = yielding(record, survey)
            return go(.makesFiles(yielding), .makePointFiles(yielding.plan))
        case (.makesFiles(let yielding), .done): return go(.decides(yielding), .change(.yielded(yielding)))
        case (.decides(let yielding), .done): return go(.takes(yielding), .takePoint(yielding.plan))
        case (.takes(let yielding), .done): return go(.serves(yielding), .serveAsSecondary)
        case (.serves(let yielding), .done): return .done(yielding.point)
        default: return .failed(UnexpectedAnswer(answer, state))
        }
    }

    private func yielding(_ record: GroupRecord, _ survey: IntakeSurvey) -> Yielding {
        let point = PointRecord(
            number: max(highestPoint, record.highestPoint) + 1, formedAt: survey.at, committedAt: survey.at,
            order: survey.order, isBase: true)
        return Yielding(
            point: point, peer: peer, generations: generations, lineage: lineage, volumes: volumes,
            dropped: keep.dropped(record.points + [point]))
    }

    private mutating func takeBack(_ error: any Error) -> Next<PointRecord> {
        servesHosts ? go(.admits(error), .admitHosts) : go(.goesOn(error), .startMirroring)
    }
}
