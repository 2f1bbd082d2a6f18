// Access.swift: who a client is, what it may open, and how many there may be.

import Base
import Glibc
import NBDProtocol
import Synchronization

/// Where a connection comes from.
package enum PeerAddress: Sendable, Hashable, CustomStringConvertible {
    case unix
    /// 4 or 16 bytes in network order; an IPv4 address mapped into IPv6 has 4.
    case internet([UInt8])

    /// The other end of a connected socket.
    init(socket: Int32) {
        var storage = sockaddr_storage()
        var length = socklen_t(MemoryLayout<sockaddr_storage>.size)
        let result = withUnsafeMutablePointer(to: &storage) {
            $0.withMemoryRebound(to: sockaddr.self, capacity: 1) { getpeername(socket, $0, &length) }
        }
        guard result == 0 else {
            self = .unix
            return
        }
        let family = Int32(storage.ss_family)
        self = withUnsafeBytes(of: &storage) { bytes in
            switch family {
            case AF_INET: .internet(Array(bytes[4..<8]))
            case AF_INET6: .internet(Self.unmapped(Array(bytes[8..<24])))
            default: .unix
            }
        }
    }

    static func unmapped(_ bytes: [UInt8]) -> [UInt8] {
        let prefix: [UInt8] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF]
        return bytes.starts(with: prefix) ? Array(bytes[12...]) : bytes
    }

    package var description: String {
        guard case .internet(let bytes) = self else { return "a unix socket" }
        var text = [CChar](repeating: 0, count: Int(INET6_ADDRSTRLEN))
        inet_ntop(bytes.count == 4 ? AF_INET : AF_INET6, bytes, &text, socklen_t(text.count))
        return String(decoding: text.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
    }
}

/// "unix", an address, or an address with a prefix length such as 10.0.0.0/8.
package enum AddressRange: Sendable, Equatable {
    case unix
    case internet([UInt8], prefix: Int)

    package init?(_ text: String) {
        if text == "unix" {
            self = .unix
            return
        }
        let parts = text.split(separator: "/", maxSplits: 1, omittingEmptySubsequences: false)
        var bytes = [UInt8](repeating: 0, count: 16)
        let family = text.contains(":") ? AF_INET6 : AF_INET
        guard inet_pton(family, String(parts[0]), &bytes) == 1 else { return nil }
        let count = family == AF_INET ? 4 : 16
        guard let prefix = parts.count == 1 ? count * 8 : Int(parts[1]), (0...count * 8).contains(prefix) else {
            return nil
        }
        self = .internet(Array(bytes.prefix(count)), prefix: prefix)
    }

    func contains(_ address: PeerAddress) -> Bool {
        switch (self, address) {
        case (.unix, .unix): return true
        case (.internet(let range, let prefix), .internet(let bytes)):
            guard range.count == bytes.count else { return false }
            for bit in 0..<prefix {
                let mask = UInt8(0x80 >> (bit & 7))
                if (range[bit >> 3] ^ bytes[bit >> 3]) & mask != 0 { return false }
            }
            return true
        default: return false
        }
    }
}

/// A client as far as it is known: its address, and after TLS its name.
package struct Client: Sendable {
    package var address: PeerAddress
    package var isSecure = false
    /// Common name of the certificate, or PSK user.
    package var identity: String?

    package init(address: PeerAddress) { self.address = address }

    var text: String { identity.map { "'\($0)' at \(address)" } ?? "\(address)" }
}

/// Who may open an export. Both lists, where given, must have the client.
package struct AccessList: Sendable, Equatable {
    /// Names of certificates and PSK users; nil = anybody.
    package var clients: [String]?
    /// Nil = from anywhere.
    package var addresses: [AddressRange]?

    package init(clients: [String]? = nil, addresses: [AddressRange]? = nil) {
        self.clients = clients
        self.addresses = addresses
    }

    /// These lists, and where there are none those of `other`.
    package func orElse(_ other: AccessList?) -> AccessList {
        AccessList(clients: clients ?? other?.clients, addresses: addresses ?? other?.addresses)
    }

    enum Admission: Equatable {
        case admitted
        /// The client has not yet had a way to say who it is.
        case needsTLS
        case refused(String)
    }

    func admission(of client: Client) -> Admission {
        if let addresses, !addresses.contains(where: { $0.contains(client.address) }) {
            return .refused("its address is not in allow_addresses")
        }
        guard let clients else { return .admitted }
        guard client.isSecure else { return .needsTLS }
        guard let identity = client.identity else {
            return .refused("it showed no certificate or PSK user, and allow_clients asks for one")
        }
        return clients.contains(identity) ? .admitted : .refused("its name is not in allow_clients")
    }
}

/// What a site grants to clients altogether.
package struct ServerLimits: Sendable {
    package var connections = 1024
    package var connectionsPerAddress = 256
    /// Sessions that have not reached transmission.
    package var handshakes = 128
    package var handshakeSeconds = 10

    package init() {}
}

/// The connections of all reactors, counted where they begin and end.
package final class ConnectionBudget: Sendable {
    package let limits: ServerLimits
    private let counts = Mutex<(total: Int, byAddress: [PeerAddress: Int])>((0, [:]))

    package init(limits: ServerLimits) { self.limits = limits }

    /// Counts a connection in; the reason when there is no room for it.
    func admit(_ address: PeerAddress) -> String? {
        counts.withLock { counts in
            if counts.total >= limits.connections { return "all \(limits.connections) connections are in use" }
            // Everything local has the one address of unix sockets.
            if address != .unix, counts.byAddress[address, default: 0] >= limits.connectionsPerAddress {
                return "it has \(limits.connectionsPerAddress) connections already"
            }
            counts.total += 1
            counts.byAddress[address, default: 0] += 1
            return nil
        }
    }

    func leave(_ address: PeerAddress) {
        counts.withLock { counts in
            counts.total -= 1
            let left = counts.byAddress[address, default: 1] - 1
            counts.byAddress[address] = left == 0 ? nil : left
        }
    }
}

/// The directory of exports as one client sees it.
struct ClientCatalog: ExportCatalog {
    let exports: ExportDirectory
    let client: Client
    /// Told who was refused what, and why.
    let refused: (String) -> Void

    func exportNames() -> [String] {
        exports.listed { $0.access.admission(of: client) == .admitted }
    }

    func describe(export name: String) -> ExportLookup {
        guard let entry = exports.find(name) else { return .unknown }
        switch entry.access.admission(of: client) {
        case .admitted: return .found(entry.description(name))
        case .needsTLS:
            refused(
                "refused \(client.text) export '\(name)': it has not shown who it is, and allow_clients asks for that")
            return exports.tlsPolicy == .off ? .unknown : .needsTLS
        case .refused(let reason):
            refused("refused \(client.text) export '\(name)': \(reason)")
            return .unknown
        }
    }
}

/// Keeps a client that is refused a thousand times a second from filling the log.
struct RefusalLog {
    private var windowEnd: UInt64 = 0
    private var written = 0
    private var suppressed = 0
    private static let linesPerWindow = 20
    private static let windowNanoseconds: UInt64 = 10_000_000_000

    /// The lines to write now.
    mutating func lines(for text: String, now: UInt64) -> [String] {
        var lines: [String] = []
        if now >= windowEnd {
            if suppressed > 0 { lines.append("\(suppressed) more refusals were not written down") }
            windowEnd = now + Self.windowNanoseconds
            written = 0
            suppressed = 0
        }
        if written < Self.linesPerWindow {
            written += 1
            lines.append(text)
        } else {
            suppressed += 1
        }
        return lines
    }
}
