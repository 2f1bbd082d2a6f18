// Space.swift: how full the file systems are that a site writes to, and the alerts about that.
//
// One that becomes full ends FlashCopies, refuses commits and stops mirroring; whoever runs the site is told before.

import API
import Base
import Glibc
import Ring
import SiteConfiguration

/// How full the file systems are that the site writes to.
@SiteThread
final class Space {
    private let home: Holdings
    private var watch = SpaceWatch()
    private var nextLook: UInt64 = 0
    private var reserveProblem: String?

    init(_ home: Holdings) {
        self.home = home
    }

    private static let secondsBetweenLooks: UInt64 = 5

    /// Looks at the file systems, every few seconds, and takes the reserve again when there is room.
    func watchSpace() async {
        let now = monotonicNanoseconds()
        guard now >= nextLook else { return }
        nextLook = now + Self.secondsBetweenLooks * 1_000_000_000
        let (state, candidates) = (home.state.path, candidates())
        guard let found = try? await home.disks.run({ Self.fileSystems(of: [state] + candidates.filter(isSparse)) })
        else {
            return
        }
        let (began, over) = watch.take(found)
        for report in over { home.note(nil, "alert over: space: \(report.words)") }
        for report in began {
            home.note(nil, "alert: space: \(report.words)")
            guard let command = home.configuration.onSpaceLow else { continue }
            let environment = [
                "FARCOPY_EVENT=on_space_low", "FARCOPY_SITE=\(home.configuration.site)", "FARCOPY_PATH=\(report.path)",
                "FARCOPY_REASON=\(report.words)",
            ]
            Task {
                if let failure = await OperatorCommand.run(command, environment, HookCommands.usualTimeout) {
                    home.note(nil, "on_space_low \(failure)")
                }
            }
        }
        keepReserve()
    }

    /// Takes the reserve; tells once when that cannot be.
    func keepReserve() {
        do {
            try home.reserve.restore()
            reserveProblem = nil
        } catch {
            let words = "\(error)"
            if reserveProblem != words { home.note(nil, words) }
            reserveProblem = words
        }
        let (fileSystems, alerts) = (
            watch.fileSystems, watch.alerts + (reserveProblem.map { ["reserve: \($0)"] } ?? [])
        )
        home.board.space.withLock { $0 = (fileSystems, alerts) }
    }

    /// Those that what the site writes may fill: the state directory's, and those of sparse volumes and of targets.
    private nonisolated static func fileSystems(of paths: [String]) -> [FileSystemReport] {
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
        home.volumes.values.sorted { $0.name < $1.name }.flatMap { volume in
            [volume.source.path, volume.record.changeVolume?.path].compactMap { $0 }
                + volume.record.copies.compactMap { $0.state == .lost ? nil : $0.target }
        }
    }
}

/// A file that takes more space as it is written to.
private func isSparse(_ path: String) -> Bool {
    var facts = stat()
    return stat(path, &facts) == 0 && facts.st_mode & S_IFMT == S_IFREG
        && UInt64(facts.st_blocks) * 512 < UInt64(facts.st_size)
}
