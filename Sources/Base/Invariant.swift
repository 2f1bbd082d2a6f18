// Invariant.swift: checks that stay in release builds and say which rule broke.
//
// A broken invariant means that going on could write wrong data, so the process stops. The mapped bitmaps and
// the page cache outlive it, and a restart goes on from them.

/// Stops the process when `condition` is false, naming the rule that did not hold.
@inlinable @inline(__always)
package func invariant(
    _ condition: Bool, _ rule: StaticString, file: StaticString = #fileID, line: UInt = #line
) {
    if !condition { invariantFailed(rule, file, line) }
}

@usableFromInline @inline(never)
package func invariantFailed(_ rule: StaticString, _ file: StaticString, _ line: UInt) -> Never {
    fatalError("invariant broken: \(rule) (\(file):\(line))")
}
