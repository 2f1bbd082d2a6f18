// CoordinatorRecord.swift: what a coordinator must find again after a crash.
//
// Must be prevented:
//   a number is given to two points
//   a decision is forgotten, or taken back while a remote may have carried it out
//   a process that has been followed by another changes the record, or one that takes up goes by what it read before the other's last
//     save: whoever keeps the record refuses a save unless the file is what this process has read or saved last (`Event.superseded`)

package struct CoordinatorRecord: Equatable, Sendable, Codable {
    /// What has become of the point `lastNumber`.
    package enum Point: String, Equatable, Sendable, Codable {
        /// Every remote has committed it, or it was given up everywhere.
        case none
        /// It may be half formed: a new process gives it up.
        case undecided
        /// Every host let go because of `run`, and holds it: a new process goes on with it.
        case formed
        /// Every remote had prepared it: a new process commits it everywhere.
        case commit
    }
    /// Of the process that takes up last; each is higher.
    package internal(set) var epoch: UInt64 = 0
    /// The highest number that was ever given to a point.
    package internal(set) var lastNumber: UInt64 = 0
    package internal(set) var point = Point.none
    /// The newest point that every remote is known to have committed; 0 = none.
    package internal(set) var committed: UInt64 = 0
    /// Pairs that have no part in the point `lastNumber`, since their hosts were lost.
    package internal(set) var absent: [Int]?
    /// Pairs that are behind `committed`, with the newest point that each has.
    package internal(set) var left: [Int: UInt64]?
    /// `committed` is what the coordinator's own host knows, since no record was found: remotes may have other points as their newest, and are
    /// believed, until all have committed one from here.
    package internal(set) var isGuessed: Bool?
    /// What the pairs were called, in their order, when this was written; nil = there was one.
    package internal(set) var names: [String]?
    package init(
        epoch: UInt64 = 0, lastNumber: UInt64 = 0, point: Point = .none, committed: UInt64 = 0, isGuessed: Bool = false
    ) {
        (self.epoch, self.lastNumber, self.point, self.committed) = (epoch, lastNumber, point, committed)
        self.isGuessed = isGuessed ? true : nil
    }

    /// The same for pairs of these names: they may be others, or in another order, after a change of the configuration. Who is new has no part
    /// in the point at hand.
    func counted(by present: [String]) -> CoordinatorRecord {
        guard let names, names != present else { return self }
        var record = self
        record.names = present
        let known = absent.map { Set($0.filter(names.indices.contains).map { names[$0] }) } ?? []
        let absent = present.indices.filter { !names.contains(present[$0]) || known.contains(present[$0]) }
        record.absent = absent.isEmpty ? nil : absent
        let left = present.indices.compactMap { index in
            names.firstIndex(of: present[index]).flatMap { self.left?[$0] }.map { (index, $0) }
        }
        record.left = left.isEmpty ? nil : Dictionary(uniqueKeysWithValues: left)
        // It may have been one of them before.
        if !present.allSatisfy(names.contains) { record.isGuessed = true }
        return record
    }

    /// - Throws: when this cannot come after `previous`.
    package func check(after previous: CoordinatorRecord) throws(IllegalCoordination) {
        guard epoch >= previous.epoch else {
            throw IllegalCoordination("epoch \(previous.epoch) has taken up, and \(epoch) is older")
        }
        guard lastNumber >= previous.lastNumber, committed >= previous.committed, committed <= lastNumber else {
            throw IllegalCoordination(
                "point \(previous.lastNumber) was counted and \(previous.committed) committed; "
                    + "\(lastNumber) and \(committed) cannot come next")
        }
        guard previous.point != .none, point == .none || lastNumber > previous.lastNumber else { return }
        guard committed == previous.lastNumber || previous.point != .commit else {
            throw IllegalCoordination("the decision to commit point \(previous.lastNumber) would be forgotten")
        }
    }
}

/// A setting, or a change of a record, that cannot be.
package struct IllegalCoordination: Error, Equatable, CustomStringConvertible {
    package var description: String
    init(_ description: String) { self.description = description }
}
