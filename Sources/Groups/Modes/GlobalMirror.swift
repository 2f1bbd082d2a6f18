// GlobalMirror.swift: mode `global-mirror`: no target. Of a grain that a host is about to overwrite, the old image goes to memory, or is sent
// first. It moves by a drain, what hosts wait for ahead of the rest.

enum GlobalMirrorMode {
    static let hold = HoldKind.memory
    static let leg = LegKind.drained
    /// What memory held is gone.
    static let afterCrash = Recovery.givesUp
    private static let urgentSlots = 4

    static func mover(_ shape: MoveShape) -> any Mover {
        var shape = shape
        shape.urgentSlots = min(urgentSlots, shape.window / 2)
        return Drain(shape)
    }
}
