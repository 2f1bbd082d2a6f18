// FileSystem.swift: the figures of a file system, and which ones are too full.

import API
import Glibc

/// The figures of a file system, as `df` has them.
struct FileSystem {
    var device: UInt64
    var usedBytes: UInt64
    /// What may still be written by anybody.
    var availableBytes: UInt64

    /// - Returns: nil when it cannot be asked, or has no size.
    init?(holding path: String) {
        var facts = stat()
        var figures = statvfs()
        guard stat(path, &facts) == 0, statvfs(path, &figures) == 0, figures.f_blocks > 0 else { return nil }
        device = UInt64(facts.st_dev)
        let unit = UInt64(figures.f_frsize)
        usedBytes = (UInt64(figures.f_blocks) - min(UInt64(figures.f_bfree), UInt64(figures.f_blocks))) * unit
        availableBytes = UInt64(figures.f_bavail) * unit
    }
}

/// Which file systems are too full. One that is stays so until it is clearly not.
package struct SpaceWatch: Sendable {
    package static let high = 0.80
    package static let low = 0.78
    package private(set) var fileSystems: [FileSystemReport] = []
    /// Paths of those that are too full.
    package private(set) var full: Set<String> = []
    package init() {}

    package mutating func take(_ found: [FileSystemReport]) -> (began: [FileSystemReport], over: [FileSystemReport]) {
        let before = full
        fileSystems = found
        full = Set(found.filter { $0.usedRatio >= (before.contains($0.path) ? Self.low : Self.high) }.map(\.path))
        return (
            found.filter { full.contains($0.path) && !before.contains($0.path) },
            found.filter { !full.contains($0.path) && before.contains($0.path) }
        )
    }

    package var alerts: [String] { fileSystems.filter { full.contains($0.path) }.map { "space: \($0.words)" } }
}
