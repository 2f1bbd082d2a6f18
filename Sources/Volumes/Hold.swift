// Hold.swift: where the old content of a point goes when hosts overwrite what has still to be sent.
//
// Whoever copies and reads asks three things: what is needed of the source, where does a run of the point lie, and what was taken.
//
// Must be prevented:
//   a host write goes ahead before the old content that the point needs is where the hold says that it is

import Base

package struct Hold {
    package let number: UInt64
    private let place: Place

    /// One case for each mode's way to keep a point still.
    private enum Place {
        /// A FlashCopy target. `preserved` is the FlashCopy bitmap, inverted: set = the point's data of this grain is there.
        case target(StoreFile, preserved: Bitmap)
    }

    /// - Parameter preserved: over memory that outlives a process crash.
    static func target(_ file: StoreFile, preserved: Bitmap, point number: UInt64) -> Hold {
        Hold(number: number, place: .target(file, preserved: preserved))
    }

    /// Where old content is written to.
    var file: StoreFile {
        switch place {
        case .target(let file, _): file
        }
    }

    /// Which grains of a word must be taken before a host may overwrite them.
    ///
    /// - Parameter unsent: what has still to be sent.
    @inline(__always)
    func needed(_ word: Int, unsent: Bitmap) -> UInt64 {
        switch place {
        case .target(_, let preserved): unsent.word(word) & ~preserved.word(word)
        }
    }

    /// The file that holds the point's data of the first of these grains, and the end of the run for which that is so.
    func location(of grains: Range<Int>) -> (file: StoreFile, runEnd: Int) {
        switch place {
        case .target(let file, let preserved):
            if preserved.contains(grains.lowerBound) {
                return (file, preserved.firstClear(in: grains) ?? grains.upperBound)
            }
            return (Volume.source, preserved.firstSet(in: grains) ?? grains.upperBound)
        }
    }

    /// Old content of these grains is where it is to go.
    func took(_ grains: Range<Int>) {
        switch place {
        case .target(_, let preserved): preserved.set(grains)
        }
    }
}
