// FlashCopy.swift: mode `flashcopy`: a FlashCopy primary → target without copying holds the point; a colliding write copies the old grain to
// the target first. It moves by a drain: each grain from primary or target, as the FlashCopy bitmap says.

enum FlashCopyMode {
    static let hold = HoldKind.target
    static let leg = LegKind.drained
    /// Bitmaps and target outlive the process. After power loss they do not, and the volumes say so (`GroupRecord.mustGiveUpPoint`).
    static let afterCrash = Recovery.movesOn

    static func mover(_ shape: MoveShape) -> any Mover { Drain(shape) }
}
