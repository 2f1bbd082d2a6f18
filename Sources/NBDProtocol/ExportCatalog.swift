// ExportCatalog.swift: what the handshake asks about exports, and what it hands over to the transmission phase.

import Base

/// What INFO, GO and EXPORT_NAME tell about an export.
package struct ExportDescription: Sendable {
    package var name: String
    /// For people.
    package var text: String
    package var size: UInt64
    package var flags: TransmissionFlags
    package var minimumBlockSize: UInt32
    package var preferredBlockSize: UInt32
    package var maximumPayload: UInt32
    /// Names of the metadata contexts that a client may select, in a fixed order.
    package var contexts: [String]

    package init(
        name: String, text: String = "", size: UInt64, flags: TransmissionFlags, minimumBlockSize: UInt32 = 1,
        preferredBlockSize: UInt32 = 4096, maximumPayload: UInt32 = UInt32(Limits.maximumPayload),
        contexts: [String] = []
    ) {
        self.name = name
        self.text = text
        self.size = size
        self.flags = flags
        self.minimumBlockSize = minimumBlockSize
        self.preferredBlockSize = preferredBlockSize
        self.maximumPayload = maximumPayload
        self.contexts = contexts
    }
}

/// Where the handshake looks exports up, on behalf of one client.
package protocol ExportCatalog {
    /// Names to show in answer to LIST.
    func exportNames() -> [String]
    func describe(export name: String) -> ExportLookup
}

package enum ExportLookup: Sendable {
    case found(ExportDescription)
    /// There is no such export, or it is not open to the asker.
    case unknown
    /// The export is for clients that have proved who they are.
    case needsTLS
}

/// Whether a listening site speaks TLS ("TLS", the three modes NOTLS, SELECTIVETLS, FORCEDTLS).
package enum TLSPolicy: String, Sendable { case off, allow, require }

/// A context that the client selected, and the number that stands for it in replies.
package struct SelectedContext: Sendable, Equatable {
    package var id: UInt32
    package var name: String
}

/// What a handshake has settled beside the export.
package struct Negotiated: Sendable {
    package var style = ReplyStyle.simple
    package var contexts: [SelectedContext] = []
    package init() {}
}
