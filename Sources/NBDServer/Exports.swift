// Exports.swift: one thing that clients may open.

import Base
import NBDProtocol
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

    /// An older FlashCopy or recovery point; clients may ask what changed since it.
    package struct Base: Sendable {
        package var name: String
        package var copy: CopyID
        package init(name: String, copy: CopyID) {
            self.name = name
            self.copy = copy
        }
    }

    package var size: UInt64
    package var kind: Kind
    package var readOnly: Bool
    package var reactor: ReactorHandle
    package var volume: VolumeNumber
    /// Shown in answer to LIST.
    package var listed = true
    /// For people.
    package var text = ""
    package var minimumBlockSize: UInt32 = 1
    package var bases: [Base] = []
    package var access = AccessList()

    package init(
        size: UInt64, kind: Kind, readOnly: Bool, reactor: ReactorHandle, volume: VolumeNumber
    ) {
        self.size = size
        self.kind = kind
        self.readOnly = readOnly
        self.reactor = reactor
        self.volume = volume
    }

    private var flags: TransmissionFlags {
        var flags: TransmissionFlags = [.hasFlags, .sendFlush, .sendFUA, .sendCache, .canMultiConn]
        if readOnly {
            flags.insert(.readOnly)
        } else {
            flags.formUnion([.sendTrim, .sendWriteZeroes, .sendFastZero])
        }
        return flags
    }

    func description(_ name: String) -> ExportDescription {
        ExportDescription(
            name: name, text: text, size: size, flags: flags, minimumBlockSize: minimumBlockSize,
            contexts: contexts.map(\.name))
    }

    private static let changePrefix = "qemu:dirty-bitmap:"

    /// The metadata contexts that a client may select.
    private var contexts: [(name: String, context: MetaContext)] {
        var contexts: [(String, MetaContext)] = [("base:allocation", .allocation)]
        if case .copy = kind { contexts.append(("qemu:allocation-depth", .depth)) }
        return contexts + bases.map { (Self.changePrefix + $0.name, .changed(since: $0.copy)) }
    }

    func context(_ selected: SelectedContext) -> (UInt32, MetaContext)? {
        contexts.first { $0.name == selected.name }.map { (selected.id, $0.context) }
    }
}

/// What a metadata context tells ("Metadata querying"; QEMU's docs/interop/nbd.txt).
enum MetaContext: Sendable, BitwiseCopyable {
    case allocation
    case depth
    case changed(since: CopyID)
}

/// Index of a volume on its reactor.
package typealias VolumeNumber = Int
