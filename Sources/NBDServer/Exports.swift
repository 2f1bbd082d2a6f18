// Exports.swift: what clients may open, as a directory that the control plane writes and the handshake reads.

import Base
import NBDProtocol
import Synchronization
import Volumes

/// One export and where it lives.
package struct ExportEntry: Sendable {
    package enum Kind: Sendable, Equatable {
        /// The volume itself, for hosts.
        case volume
        /// A FlashCopy or recovery point, by its identifier in the volume's chain.
        case copy(CopyID)
        /// The replicator's way into a secondary, for one session.
        case intake(session: UInt64)
    }

    package var size: UInt64
    package var kind: Kind
    package var readOnly: Bool
    package var reactor: ReactorHandle
    package var volume: VolumeNumber
    /// Shown in answer to LIST.
    package var listed: Bool

    package init(
        size: UInt64, kind: Kind, readOnly: Bool, reactor: ReactorHandle, volume: VolumeNumber,
        listed: Bool = true
    ) {
        self.size = size
        self.kind = kind
        self.readOnly = readOnly
        self.reactor = reactor
        self.volume = volume
        self.listed = listed
    }

    var flags: TransmissionFlags {
        var flags: TransmissionFlags = [.hasFlags, .sendFlush, .sendFUA, .canMultiConn]
        if readOnly {
            flags.insert(.readOnly)
        } else {
            flags.formUnion([.sendTrim, .sendWriteZeroes])
        }
        return flags
    }
}

/// Index of a volume on its reactor.
package typealias VolumeNumber = Int

package final class ExportDirectory: ExportCatalog, Sendable {
    private let entries = Mutex<[String: ExportEntry]>([:])

    package init() {}

    package func set(_ name: String, _ entry: ExportEntry?) {
        entries.withLock { $0[name] = entry }
    }

    /// Replaces every export of a volume whose name satisfies `matching`, in one step.
    package func replace(
        where matching: @Sendable (String) -> Bool, with replacements: [String: ExportEntry]
    ) {
        entries.withLock { entries in
            for name in entries.keys where matching(name) { entries[name] = nil }
            entries.merge(replacements) { _, new in new }
        }
    }

    package func find(_ name: String) -> ExportEntry? { entries.withLock { $0[name] } }

    package func exportNames() -> [String] {
        entries.withLock { $0.filter { $0.value.listed }.keys.sorted() }
    }

    package func describe(export name: String) -> ExportDescription? {
        find(name).map { ExportDescription(name: name, size: $0.size, flags: $0.flags) }
    }
}
