// FlashCopyMessages.swift: what is asked and told about FlashCopies.

package struct FlashCopyRequest: Codable, Sendable {
    package var name: String
    package var volumes: [String]
    /// `clone`: the FlashCopy, or the number of the recovery point, that is cloned.
    package var of: String?
    /// Copy everything in the background.
    package var copy: Bool?
    /// Bytes a second of the background copy; 0 = as fast as it goes.
    package var rate: UInt64?
    /// Files or devices that take the data, one for each volume.
    package var targets: [String]?
    package var writable: Bool?
    /// Survive power loss.
    package var durable: Bool?
    /// `restore`: hosts that have the volumes open for writing are disconnected instead of the restore being refused.
    package var disconnect: Bool?

    package init(name: String, volumes: [String]) {
        self.name = name
        self.volumes = volumes
    }
}

package struct FlashCopyReport: Codable, Sendable {
    package var volume: String
    package var name: String
    package var export: String
    package var createdAt: String
    package var state: String
    package var reason: String?
    package var writable: Bool
    /// Says whether it survives power loss of the site.
    package var survivesPowerLoss: Bool
    package var target: String
    /// Bytes whose data is in the target.
    package var preservedBytes: UInt64
    package var size: UInt64
    /// Of the background copy, if there is one.
    package var backgroundCopy: BackgroundReport?
    /// Of a restore: the FlashCopy of the same volume that keeps what was discarded, and how many clients were disconnected.
    package var keptAs: String?
    package var disconnected: Int?

    package struct BackgroundReport: Codable, Sendable {
        package var complete: Bool
        /// The bound; 0 = as fast as it goes.
        package var rateBytesPerSecond: UInt64
        package var measuredBytesPerSecond: Double
        package var etaSeconds: Double?
        enum CodingKeys: String, CodingKey {
            case complete
            case rateBytesPerSecond = "rate_bytes_per_second"
            case measuredBytesPerSecond = "measured_bytes_per_second"
            case etaSeconds = "eta_seconds"
        }

        package init(
            complete: Bool, rateBytesPerSecond: UInt64, measuredBytesPerSecond: Double, etaSeconds: Double? = nil
        ) {
            self.complete = complete
            self.rateBytesPerSecond = rateBytesPerSecond
            self.measuredBytesPerSecond = measuredBytesPerSecond
            self.etaSeconds = etaSeconds
        }
    }

    enum CodingKeys: String, CodingKey {
        case volume, name, export, state, reason, writable, target, size, disconnected
        case keptAs = "kept_as"
        case createdAt = "created_at"
        case survivesPowerLoss = "survives_power_loss"
        case preservedBytes = "preserved_bytes"
        case backgroundCopy = "background_copy"
    }

    package init(
        volume: String, name: String, export: String, createdAt: String, state: String, reason: String? = nil,
        writable: Bool, survivesPowerLoss: Bool, target: String, preservedBytes: UInt64, size: UInt64,
        backgroundCopy: BackgroundReport? = nil, keptAs: String? = nil, disconnected: Int? = nil
    ) {
        self.volume = volume
        self.name = name
        self.export = export
        self.createdAt = createdAt
        self.state = state
        self.reason = reason
        self.writable = writable
        self.survivesPowerLoss = survivesPowerLoss
        self.target = target
        self.preservedBytes = preservedBytes
        self.size = size
        self.backgroundCopy = backgroundCopy
        self.keptAs = keptAs
        self.disconnected = disconnected
    }
}
