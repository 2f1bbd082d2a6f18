// Place.swift: what each state of a machine makes of each event, as tables say it.
//
// Must be prevented:
//   an event is swallowed because nobody has thought of it: each has its place, and what is impossible is reported

import Base

/// What a state makes of what comes to it.
package enum Place: Sendable {
    case handled
    /// It has been overtaken: nothing is changed, and nobody need know.
    case late
    /// Whoever asks has not looked: nothing is changed, and it is an error.
    case impossible

    /// - Parameter row: of an event; it has a letter for each state: H = handled, l = late, x = impossible. Spaces are for the eye.
    init(_ row: StaticString, _ column: Int) {
        let letters = row.withUTF8Buffer { bytes in bytes.filter { $0 != UInt8(ascii: " ") } }
        invariant(column < letters.count, "a table of places has a letter for each state")
        self =
            switch letters[column] {
            case UInt8(ascii: "H"): .handled
            case UInt8(ascii: "l"): .late
            default: .impossible
            }
    }
}
