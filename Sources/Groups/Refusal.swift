// Refusal.swift: why something is not done, in words for the operator, and what whoever asked can make of it.

/// An error of a site's operation. Its words name the object and the remedy.
package struct Refusal: Error, CustomStringConvertible {
    package enum Kind: CaseIterable, Sendable {
        /// Busy, starting, without room: asked again, it may be done.
        case passing
        /// What is there does not allow it.
        case conflict
        /// Whoever asks must not have it, however often: a foreign or a stale site.
        case refused
        /// There is no such thing.
        case unknown
        /// What was asked makes no sense.
        case misuse
        /// It destroys something, and was not confirmed.
        case unconfirmed
        /// It was tried, and broke.
        case failed
    }

    package var description: String
    package var kind: Kind
    package init(_ description: String, _ kind: Kind = .conflict) {
        self.description = description
        self.kind = kind
    }
}

/// A refusal by the peer that trying again soon does not mend.
package struct PeerRefusal: Error, CustomStringConvertible {
    package var description: String
    package init(_ description: String) { self.description = description }
}
