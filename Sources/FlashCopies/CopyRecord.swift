// CopyRecord.swift: what is written down about a FlashCopy, and what that means after a restart.
//
// Must be prevented:
//   a copy that is not written down takes old content that older copies need: the record comes before the engine, and
//     what a copy has taken before it was finished is handed over
//   a copy whose bits or data power loss may have taken is read, or serves an older one
//   a copy that survived power loss takes the changes that it shows for all there were

import Volumes

package struct CopyRecord: Codable, Sendable, Equatable {
    package enum State: String, Codable, Sendable {
        /// Being established; found at a start, nobody was told of it, and it leaves.
        case creating
        case active
        /// Being taken anew.
        case refreshing
        case withdrawing
        /// Old content could not be preserved; what it has still serves older copies.
        case failed
        /// Nothing of it is left but this record.
        case lost

        /// Which states may follow which. What comes too late changes nothing: a copy that leaves does not come back, and of one that is
        /// lost there is nothing left to say.
        package func mayBecome(_ next: State) -> Bool {
            switch (self, next) {
            case (.creating, .active), (.creating, .withdrawing), (.creating, .failed), (_, .lost): true
            case (.active, .refreshing), (.active, .withdrawing), (.active, .failed): true
            case (.refreshing, .refreshing), (.refreshing, .withdrawing), (.refreshing, .failed): true
            case (.failed, .refreshing), (.failed, .withdrawing), (.failed, .failed): true
            case (.withdrawing, .withdrawing): true
            case (.creating, _), (.active, _), (.refreshing, _), (.failed, _), (.withdrawing, _), (.lost, _): false
            }
        }
    }

    package var id: CopyID
    package var name: String
    /// Seconds since 1970.
    package var createdAt: Double
    /// Its place in the chain; larger is newer.
    package var order: UInt64
    package var state: State
    package var reason: String?
    /// The operator's file or device; nil = a sparse file in the state directory, named by `targetOwner`.
    package var target: String?
    package var targetOwner: CopyID
    /// The target read as zeroes when it was taken.
    package var targetIsZero = true
    /// Has a background copy, at this many bytes a second (0 = as fast as it goes).
    package var isFilled = false
    package var rate: UInt64 = 0
    /// The background copy is finished, and its data on stable storage.
    package var isComplete = false
    /// The volume has grown since the background copy was finished, and no start has come to its end: up to here it was.
    package var completeBytes: UInt64?
    package var isWritable = false
    /// Clients could write to it once; nil = never, unless they may now.
    package var wasWritable: Bool?
    /// Survives power loss: old content is made durable before it is overwritten.
    package var isDurable = false
    /// The same for copies of several volumes that were taken together: once the record of one of them says that it is active, all are in
    /// their chains, and on stable storage if they are durable.
    package var set: String?
    /// Lost, and nobody is to be told of it: it was being established or withdrawn.
    package var isForgotten: Bool?

    package init(id: CopyID, name: String, createdAt: Double, order: UInt64, state: State) {
        self.id = id
        self.name = name
        self.createdAt = createdAt
        self.order = order
        self.state = state
        targetOwner = id
    }

    /// What a copy does in the chain after a restart.
    package enum Resumption: Equatable, Sendable {
        /// Not there; only listed.
        case absent
        /// Not there, and nobody is to be told of it: the record goes once the changes of older copies, which this one may
        /// have noted for them, are on stable storage (`mayLackChanges`).
        case forgotten
        case serves
        /// Read by older copies only.
        case servesOlder
        /// Hands over what older copies need, and leaves.
        case leaves
    }

    /// Brings the record up to date with a restart and tells what the copy does from now on.
    ///
    /// - Parameters:
    ///   - trusted: mapped files are as the last process left them: it was the process that ended, not the machine.
    ///   - overtaken: the copy that was to take its place has its target already.
    package mutating func resume(trusted: Bool, overtaken: Bool) -> Resumption {
        if overtaken {
            state = .lost
            reason = "its refresh was interrupted; refresh it again, or withdraw it"
            return .absent
        }
        guard trusted || isDurable || ((isComplete || completeBytes != nil) && state == .active) else {
            // Kept in the record, since a start may end before what is `forgotten` is gone.
            if state == .creating || state == .withdrawing { isForgotten = true }
            if state != .lost {
                reason = "lost when the machine went down"
                state = .lost
            }
            return isForgotten == true ? .forgotten : .absent
        }
        switch state {
        case .creating: return .leaves
        case .active: return .serves
        case .refreshing:
            // It stays in the record until it has handed over, and longer (`CopyChange.left`).
            reason = "its refresh was interrupted; refresh it again, or withdraw it"
            return .leaves
        case .withdrawing: return .leaves
        case .failed: return .servesOlder
        case .lost: return isForgotten == true ? .forgotten : .absent
        }
    }

    /// - Returns: whether it is so now.
    @discardableResult
    package mutating func become(_ next: State, reason: String? = nil) -> Bool {
        guard state.mayBecome(next) else { return false }
        state = next
        if let reason { self.reason = reason }
        return true
    }

    /// Somebody was told of it, and may ask for it.
    package var isListed: Bool { state != .creating && isForgotten != true }

    /// Lets clients write to the copy, or no longer.
    package mutating func allowWrites(_ allowed: Bool) {
        if isWritable { wasWritable = true }
        isWritable = allowed
    }

    /// Whether after power loss the copy's changes may lack some that the activity log does not tell either.
    ///
    /// The log is of writes to the source. What a client writes to a copy is noted there and in the next older one, whose
    /// readers must not find it; and what the source changed while a newer copy was there, that one had noted.
    ///
    /// - Parameter chain: the records of all copies of the volume, this one among them.
    package func mayLackChanges(in chain: [CopyRecord]) -> Bool {
        chain.contains { other in
            let takesWrites = other.isWritable || other.wasWritable == true
            return other.order >= order && takesWrites || other.order > order && other.state == .lost
        }
    }

    /// The space between the orders of copies that are taken one after the other, so that clones fit in between.
    package static let orderStep: UInt64 = 1 << 20

    /// The order of what is taken next.
    package static func order(after newest: UInt64) -> UInt64 { (newest / orderStep + 1) * orderStep }
}
