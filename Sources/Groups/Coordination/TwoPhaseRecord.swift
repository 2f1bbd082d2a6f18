// TwoPhaseRecord.swift: what a remote must find again of the points of several remotes, and what each of these states means.
//
//   committed N                 every remote had prepared it, so every one can go there
//   N never prepared            nobody has committed it, and nobody will
//   prepared N, and no more     another may have committed it: the others are asked before a failover
//
// Must be prevented:
//   what was said to the coordinator, or promised to another remote, is forgotten
//   a point counts again that was dropped or refused

package struct TwoPhaseRecord: Equatable, Sendable, Codable {
    package enum Stand: Equatable, Sendable, Codable {
        /// It takes data of the next point.
        case open
        /// Everything of this point is there, flushed, in its files; data of the next is not taken before it is decided.
        case prepared(UInt64)
        /// Hosts may write here. `inDoubt`: a point that was prepared, and of which nobody knows, since the operator did not wait for that.
        case failedOver(at: UInt64, inDoubt: UInt64?)
    }
    /// The highest of a coordinator's process that was heard.
    package internal(set) var epoch: UInt64 = 0
    /// The newest committed point; 0 = none.
    package internal(set) var committed: UInt64 = 0
    package internal(set) var stand = Stand.open
    /// Points up to this one that are not committed here will not be, unless another remote has committed them.
    package internal(set) var refusedThrough: UInt64 = 0
    package init(
        epoch: UInt64 = 0, committed: UInt64 = 0, stand: Stand = .open, refusedThrough: UInt64 = 0
    ) {
        (self.epoch, self.committed, self.stand, self.refusedThrough) = (epoch, committed, stand, refusedThrough)
    }

    /// The point that it does not know of whether others have committed it.
    package var inDoubt: UInt64? {
        switch stand {
        case .open: nil
        case .prepared(let number): number
        case .failedOver(_, let inDoubt): inDoubt
        }
    }

    /// - Throws: when this cannot come after `previous`.
    package func check(after previous: TwoPhaseRecord) throws(IllegalCoordination) {
        guard epoch >= previous.epoch, committed >= previous.committed, refusedThrough >= previous.refusedThrough else {
            throw IllegalCoordination(
                "point \(previous.committed) was committed and \(previous.refusedThrough) refused; "
                    + "\(committed) and \(refusedThrough) cannot come next")
        }
        if case .failedOver = previous.stand, stand != previous.stand {
            throw IllegalCoordination("a remote that has failed over takes no points")
        }
        if case .prepared(let number) = stand, number <= committed {
            throw IllegalCoordination("point \(number) cannot be prepared after \(committed) was committed")
        }
        if case .prepared(let number) = previous.stand, stand != previous.stand, number > committed,
            number > refusedThrough, inDoubt != number
        {
            throw IllegalCoordination("that point \(number) was prepared would be forgotten")
        }
    }
}
