// ChangeVolume.swift: mode `change-volume`: cyclic incremental FlashCopies through two intermediates. The first, beside the primary, takes
// every grain of a point before it is sent, or overwritten by a host; the second is the secondary. What is committed is the next cyclic
// FlashCopy there, and the first intermediate holds it, too, until the next cycle writes to it.
//
// It moves by a drain, which reads the first intermediate, and has that flushed before anything counts as sent.

enum ChangeVolumeMode {
    static let hold = HoldKind.intermediate
    static let leg = LegKind.drained
    /// Bitmaps and intermediate outlive the process. After power loss the volumes say that they do not (`GroupRecord.mustGiveUpPoint`).
    static let afterCrash = Recovery.movesOn

    static func mover(_ shape: MoveShape) -> any Mover { Drain(shape) }
}
