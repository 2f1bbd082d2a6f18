// VolumeExports.swift: what a volume can be opened as: itself, its FlashCopies, the recovery points of its group, the intake.
//
// What a name stands for is worked out when somebody asks: a commit tells of its point once, however many volumes the group has.
//
// Must be prevented:
//   a recovery point's name stands for files that hold another point of the volume: whoever tells of a new point has told of its files
//     before, and of files that leave after the points that they hold

import Base
import NBDProtocol
import Synchronization
import Volumes

/// The recovery points of a group that can be read, for the exports of all its volumes.
package final class RecoveryPoints: Sendable {
    package struct Point: Sendable {
        package var number: UInt64
        /// Its place among FlashCopies; larger is newer.
        package var order: UInt64
        /// For people.
        package var text: String
        package init(number: UInt64, order: UInt64, text: String) {
            self.number = number
            self.order = order
            self.text = text
        }
    }

    private let points = Mutex<[Point]>([])

    package init() {}

    /// Oldest first.
    package var all: [Point] {
        get { points.withLock { $0 } }
        set { points.withLock { $0 = newValue } }
    }
}

package struct VolumeExports: Sendable {
    package struct Copy: Sendable {
        package var id: CopyID
        package var name: String
        package var order: UInt64
        package var text: String
        package var readOnly: Bool
        package init(id: CopyID, name: String, order: UInt64, text: String, readOnly: Bool) {
            (self.id, self.name, self.order) = (id, name, order)
            (self.text, self.readOnly) = (text, readOnly)
        }
    }

    /// What the volume's own name stands for. The other exports are as this one, but for what they are of.
    package var own: ExportEntry
    /// Its own name stands for the newest recovery point.
    package var showsNewestPoint = false
    package var copies: [Copy] = []
    package var points: RecoveryPoints?
    /// Points up to this number do not have the volume.
    package var joinedAfter: UInt64 = 0
    /// Points whose files hold those that are kept, oldest first.
    package var carriers: [UInt64] = []
    /// The name behind the volume's, the session, and who may open it.
    package var intake: (name: String, session: UInt64, access: AccessList)?

    package init(own: ExportEntry) { self.own = own }

    /// A FlashCopy or recovery point, as what others can be asked for changes since.
    private struct Kept {
        var name: String
        var order: UInt64
        var id: CopyID
        var text: String
        var readOnly: Bool
    }

    /// Oldest first.
    private var kept: [Kept] {
        var kept = copies.map { Kept(name: $0.name, order: $0.order, id: $0.id, text: $0.text, readOnly: $0.readOnly) }
        for point in points?.all ?? [] where point.number > joinedAfter {
            guard let carrier = carriers.last(where: { $0 <= point.number }) else { continue }
            kept.append(
                Kept(
                    name: String(point.number), order: point.order, id: CopyID(carrier), text: point.text,
                    readOnly: true))
        }
        return kept.sorted { $0.order < $1.order }
    }

    private func entry(_ kept: [Kept], _ index: Int, _ volume: String, _ prefix: String = "") -> ExportEntry {
        var entry = own
        entry.kind = .copy(kept[index].id)
        entry.readOnly = kept[index].readOnly
        entry.text = "\(prefix)\(kept[index].text) of \(volume)"
        entry.bases = bases(kept[..<index])
        return entry
    }

    private func bases(_ kept: ArraySlice<Kept>) -> [ExportEntry.Base] {
        kept.suffix(Limits.changeBasesPerExport).map { ExportEntry.Base(name: $0.name, copy: $0.id) }
    }

    /// - Parameter suffix: behind the '@'; nil = the volume's own name.
    fileprivate func find(_ volume: String, _ suffix: String?) -> ExportEntry? {
        if let intake, suffix == intake.name {
            var entry = own
            entry.kind = .intake(session: intake.session)
            entry.readOnly = false
            entry.text = "intake of \(volume)"
            // Its name is the key: only the peer is told it.
            entry.listed = false
            entry.access = intake.access
            return entry
        }
        let kept = kept
        if let suffix { return kept.firstIndex { $0.name == suffix }.map { entry(kept, $0, volume) } }
        guard showsNewestPoint else {
            var entry = own
            entry.bases = bases(kept[...])
            return entry
        }
        return newestPoint(kept).map { entry(kept, $0, volume, "the newest ") }
    }

    private func newestPoint(_ kept: [Kept]) -> Int? {
        guard let newest = points?.all.last else { return nil }
        return kept.firstIndex { $0.name == String(newest.number) }
    }

    /// Names that are shown.
    fileprivate func names(_ volume: String) -> [String] {
        let kept = kept
        let hasOwn = own.listed && (!showsNewestPoint || newestPoint(kept) != nil)
        return (hasOwn ? [volume] : []) + kept.map { "\(volume)@\($0.name)" }
    }
}

/// What clients may open, as the control plane tells and the handshake asks.
package final class ExportDirectory: Sendable {
    private let volumes = Mutex<[String: VolumeExports]>([:])
    package let tlsPolicy: TLSPolicy

    package init(tlsPolicy: TLSPolicy = .off) { self.tlsPolicy = tlsPolicy }

    /// Exchanges everything that a volume can be opened as, in one step.
    package func set(_ volume: String, _ exports: VolumeExports?) { volumes.withLock { $0[volume] = exports } }

    package func setCarriers(_ volume: String, _ carriers: [UInt64]) {
        volumes.withLock { $0[volume]?.carriers = carriers }
    }

    package func find(_ name: String) -> ExportEntry? {
        let parts = name.split(separator: "@", maxSplits: 1, omittingEmptySubsequences: false).map(String.init)
        let exports = volumes.withLock { $0[parts[0]] }
        return exports?.find(parts[0], parts.count > 1 ? parts[1] : nil)
    }

    /// What a volume can be opened as, if that is shown, in order.
    package func names(of volume: String) -> [String] {
        (volumes.withLock { $0[volume] }?.names(volume) ?? []).sorted()
    }

    /// Names of the exports that are shown to everybody of volumes that satisfy `matching`, in order.
    package func listed(where matching: (ExportEntry) -> Bool = { _ in true }) -> [String] {
        volumes.withLock { $0 }.filter { matching($0.value.own) }.flatMap { $0.value.names($0.key) }.sorted()
    }
}
