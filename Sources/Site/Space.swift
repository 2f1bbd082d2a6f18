// Space.swift: how full the file systems are that a site writes to, and the alerts about that.
//
// One that becomes full ends FlashCopies, refuses commits and stops mirroring; whoever runs the site is told before.

import API
import Base
import Glibc
import Ring
import SiteConfiguration

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

extension Site {
    private static let secondsBetweenLooks: UInt64 = 5

    /// Looks at the file systems, every few seconds, and takes the reserve again when there is room.
    func watchSpace() async {
        let now = monotonicNanoseconds()
        guard now >= nextSpaceLook else { return }
        nextSpaceLook = now + Self.secondsBetweenLooks * 1_000_000_000
        let (state, candidates) = (state.path, candidates())
        guard let found = try? await disks.run({ Self.fileSystems(of: [state] + candidates.filter(isSparse)) }) else {
            return
        }
        let (began, over) = space.take(found)
        for report in over { note(nil, "alert over: space: \(report.words)") }
        for report in began {
            note(nil, "alert: space: \(report.words)")
            guard let command = configuration.onSpaceLow else { continue }
            let environment = [
                "FARCOPY_EVENT=on_space_low", "FARCOPY_SITE=\(configuration.site)", "FARCOPY_PATH=\(report.path)",
                "FARCOPY_REASON=\(report.words)",
            ]
            Task {
                if let failure = await Self.run(command, environment, HookCommands.usualTimeout) {
                    note(nil, "on_space_low \(failure)")
                }
            }
        }
        keepReserve()
    }

    /// Takes the reserve; tells once when that cannot be.
    func keepReserve() {
        do {
            try reserve.restore()
            reserveProblem = nil
        } catch {
            let words = "\(error)"
            if reserveProblem != words { note(nil, words) }
            reserveProblem = words
        }
        let (fileSystems, alerts) = (
            space.fileSystems, space.alerts + (reserveProblem.map { ["reserve: \($0)"] } ?? [])
        )
        board.space.withLock { $0 = (fileSystems, alerts) }
    }

    /// Those that what the site writes may fill: the state directory's, and those of sparse volumes and of targets.
    private static func fileSystems(of paths: [String]) -> [FileSystemReport] {
        var found: [FileSystemReport] = []
        var devices: Set<UInt64> = []
        for path in paths {
            guard let fileSystem = FileSystem(holding: path), devices.insert(fileSystem.device).inserted else {
                continue
            }
            found.append(
                FileSystemReport(
                    path: path, usedBytes: fileSystem.usedBytes,
                    sizeBytes: fileSystem.usedBytes + fileSystem.availableBytes))
        }
        return found
    }

    private func candidates() -> [String] {
        volumes.values.sorted { $0.name < $1.name }.flatMap { volume in
            [volume.source.path] + volume.record.copies.compactMap { $0.state == .lost ? nil : $0.target }
        }
    }
}

/// A file that takes more space as it is written to.
private func isSparse(_ path: String) -> Bool {
    var facts = stat()
    return stat(path, &facts) == 0 && facts.st_mode & S_IFMT == S_IFREG
        && UInt64(facts.st_blocks) * 512 < UInt64(facts.st_size)
}
