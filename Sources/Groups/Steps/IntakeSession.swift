// IntakeSession.swift: a primary opens a session at its secondary: every earlier one ends, and nothing of it is under way any more.
//
// Must be prevented:
//   something of the peer's is let in while the record's file may hold what was taken back: a start would take that for true
//   a write of an earlier session arrives after the new one has begun

package struct IntakeSession: StepTable {
    enum State {
        case begins, settles, pairs, forgets, isKnown, fences
    }
    var state = State.begins
    private let site: String
    private let generations: [String]
    private let session: UInt64

    /// - Parameters:
    ///   - site: identity of the primary.
    ///   - generations: the primary's.
    ///   - session: the new session's, which nobody can guess.
    package init(site: String, generations: [String], session: UInt64) {
        (self.site, self.generations, self.session) = (site, generations, session)
    }

    package mutating func next(after answer: Answer, _ record: GroupRecord) -> Next<UInt64> {
        if case .failed(let error) = answer { return .failed(error) }
        switch state {
        case .begins:
            return go(.settles, .settle)
        case .settles where record.peerSite == nil || record.generations != generations:
            return go(.pairs, .change(.paired(site: site, generations: generations)))
        case .settles, .pairs:
            guard record.yielded != nil else { return fence() }
            return go(.forgets, .forgetChanges)
        case .forgets:
            // The primary has taken what this site had changed into its own bitmaps, or it would not open a session.
            return go(.isKnown, .change(.yieldIsKnown))
        case .isKnown: return fence()
        case .fences: return .done(session)
        }
    }

    private mutating func fence() -> Next<UInt64> {
        return go(.fences, .fence(next: session))
    }
}
