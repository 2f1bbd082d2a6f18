// Hold.swift: where the old content of a point goes when hosts overwrite what has still to be sent.
//
// Whoever copies and reads asks three things: what is needed of the source, where does a run of the point lie, and what was taken.
//
// Must be prevented:
//   a host write goes ahead before the old content that the point needs is where the hold says that it is

import Base

package struct Hold: BitwiseCopyable {
    package let number: UInt64
    /// Where old content is written to: a FlashCopy target, or `Volume.memory` (`HeldImages`), which is no file.
    let file: StoreFile
    /// The FlashCopy bitmap, inverted: set = the point's data of this grain is there.
    private let preserved: Bitmap

    /// - Parameter preserved: of a target, over memory that outlives a process crash.
    init(point number: UInt64, file: StoreFile, preserved: Bitmap) {
        (self.number, self.file, self.preserved) = (number, file, preserved)
    }

    /// What it holds is gone when the process is.
    var isInMemory: Bool { file == Volume.memory }

    /// Which grains of a word must be taken before a host may overwrite them.
    ///
    /// - Parameter unsent: what has still to be sent.
    @inline(__always)
    func needed(_ word: Int, unsent: Bitmap) -> UInt64 { unsent.word(word) & ~preserved.word(word) }

    /// The file that holds the point's data of the first of these grains, and the end of the run for which that is so.
    func location(of grains: Range<Int>) -> (file: StoreFile, runEnd: Int) {
        if preserved.contains(grains.lowerBound) {
            return (file, preserved.firstClear(in: grains) ?? grains.upperBound)
        }
        return (Volume.source, preserved.firstSet(in: grains) ?? grains.upperBound)
    }

    /// Old content of these grains is where it is to go.
    func took(_ grains: Range<Int>) { preserved.set(grains) }
}

/// Where a volume's part of a point goes when hosts overwrite it.
package enum HoldPlace: @unchecked Sendable {
    // Safe because: the bitmap is the volume's reactor's while a point is held, and between points that of who prepares the next.
    /// A FlashCopy target.
    ///
    /// - Parameter preserved: all clear; over memory that outlives a process crash.
    case target(StoreFile, preserved: Bitmap)
    /// Memory that the volumes of the group share.
    ///
    /// - Parameter marks: `markBytes` of memory for the volume alone, zero before its first point, and there as long as it is.
    case memory(ImageMemory, CollisionRules, marks: UnsafeMutableRawPointer)

    package static func markBytes(_ geometry: Geometry) -> Int { HeldImages.markBytes(geometry) }
}
