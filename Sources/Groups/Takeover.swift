// Takeover.swift: what a secondary decides: whether a point may be committed, and which one a failover goes to.
//
// Must be prevented:
//   a point is committed while writes to the intake are under way
//   a failover goes to a point that cannot be read

/// Why something was not done, in words for the operator.
package struct TakeoverRefusal: Error, CustomStringConvertible {
    package var description: String
    package init(_ description: String) { self.description = description }
}

/// A secondary's volumes before a commit.
package struct IntakeSurvey: Sendable {
    /// Writes to the intake that have not ended.
    package var writesUnderWay: Int
    /// A place in the chains of all volumes that nothing has taken.
    package var order: UInt64
    /// Volumes that have changed since the newest point, or may have.
    package var changed: [String]
    /// Of each retired point, the volumes that still have files.
    package var retired: [UInt64: [String]]
    /// The time of day, in seconds since 1970.
    package var at: Double

    package init(
        writesUnderWay: Int, order: UInt64, changed: [String], retired: [UInt64: [String]] = [:], at: Double
    ) {
        self.writesUnderWay = writesUnderWay
        self.order = order
        self.changed = changed
        self.retired = retired
        self.at = at
    }
}

package struct CommitPlan: Sendable, Equatable {
    package var point: PointRecord
    /// Points past their retention.
    package var dropped: [PointRecord]
    /// Of each retired point, the volumes that still have files.
    package var retired: [UInt64: [String]]

    package init(point: PointRecord, dropped: [PointRecord], retired: [UInt64: [String]] = [:]) {
        self.point = point
        self.dropped = dropped
        self.retired = retired
    }
}

extension GroupRecord {
    /// Whether the point was committed already: its answer was lost, and it is asked for again.
    package func hasCommitted(_ number: UInt64) -> PointRecord? {
        points.last.flatMap { $0.number == number ? $0 : nil }
    }

    /// The commit of the next point.
    ///
    /// - Parameter keep: which points stay.
    package func planCommit(
        _ number: UInt64, formedAt: Double, keep: Retention, _ survey: IntakeSurvey
    ) throws(TakeoverRefusal) -> CommitPlan {
        guard survey.writesUnderWay == 0 else {
            throw TakeoverRefusal("\(survey.writesUnderWay) writes to the intake are under way")
        }
        let point = PointRecord(
            number: number, formedAt: formedAt, committedAt: survey.at, order: survey.order, changed: survey.changed)
        return CommitPlan(point: point, dropped: keep.dropped(points + [point]), retired: survey.retired)
    }

    /// The point that a failover goes to.
    package func failoverPoint(_ wanted: UInt64?) throws(TakeoverRefusal) -> PointRecord {
        guard role == .secondary else {
            throw TakeoverRefusal("the group is primary here already; fail over at its peer")
        }
        guard let newest = newestReadable else {
            throw TakeoverRefusal(
                points.isEmpty
                    ? "the group has no recovery point yet: its first copy is not complete"
                    : "every recovery point of the group has failed; `farcopy events` says why")
        }
        guard let wanted else { return newest }
        guard let point = points.first(where: { $0.number == wanted && $0.isFailed != true }) else {
            let known = readablePoints.map { String($0.number) }.joined(separator: ", ")
            throw TakeoverRefusal("the group has no point \(wanted); it has \(known)")
        }
        return point
    }
}
