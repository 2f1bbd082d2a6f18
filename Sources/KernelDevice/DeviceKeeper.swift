// DeviceKeeper.swift: keeps a /dev/nbdX alive while the server comes and goes.
//
// The kernel makes I/O wait when it has lost its connections, for as long as DEAD_CONN_TIMEOUT says; whoever connected
// the device must bring it new ones. The keeper watches its copies of the sockets and does that.
//
// Must be prevented:
//   a keeper gives sockets to a device that was disconnected, or connected to something else, meanwhile (the kernel compares
//     the backend identifier; a device that has none of ours ends the keeper)
//   what the host has cached of a volume is written to it after it was restored from a FlashCopy: the device is detached

import CNetlink
import Glibc
import Ring

package final class DeviceKeeper {
    private let index: Int32
    private let uri: String
    private let connectionCount: Int
    private let identifier: String
    private let netlink: NBDNetlink
    /// Copies of the sockets that the kernel uses; -1 = dead.
    private var sockets: [Int32] = []
    /// When the volume that the device shows was last restored, as the server said at the first connection.
    private var restoredAt: String??
    private let log: (String) -> Void

    package struct Options: Sendable {
        package var connections: Int
        package var timeoutSeconds: UInt64
        package var deadConnectionSeconds: UInt64
        package init(connections: Int, timeoutSeconds: UInt64, deadConnectionSeconds: UInt64) {
            self.connections = connections
            self.timeoutSeconds = timeoutSeconds
            self.deadConnectionSeconds = deadConnectionSeconds
        }
    }

    /// Connects `device`, or takes up the keeping of one that is connected to the same export already.
    package init(device: String, uri: String, options: Options, log: @escaping (String) -> Void) throws(SystemError) {
        index = try Self.index(of: device)
        self.uri = uri
        self.log = log
        identifier = "farcopy \(uri)"
        netlink = try NBDNetlink()
        connectionCount = options.connections
        if let backend = Self.attribute(index, "backend"), Self.isConnected(index) {
            guard backend == identifier else {
                throw SystemError("attach \(device): it is connected to '\(backend)'; detach that first", errno: EBUSY)
            }
            sockets = Array(repeating: -1, count: connectionCount)
            log("\(device) is attached already; keeping it from here on")
            return
        }
        try attach(device, options)
    }

    private func attach(_ device: String, _ options: Options) throws(SystemError) {
        let first = try KernelConnection(uri: uri)
        let settings = DeviceSettings(
            size: first.size, blockSize: max(512, min(4096, first.minimumBlockSize)), serverFlags: first.flags,
            timeoutSeconds: options.timeoutSeconds, deadConnectionSeconds: options.deadConnectionSeconds,
            identifier: identifier)
        let multiple = first.flags & (1 << 8) != 0
        guard multiple || options.connections == 1 else {
            throw SystemError(
                "attach \(device): the server allows one connection only; use --connections 1", errno: EINVAL)
        }
        restoredAt = .some(first.restoredAt)
        sockets = [dup(first.socket)]
        while sockets.count < options.connections {
            let connection = try KernelConnection(uri: uri)
            sockets.append(dup(connection.socket))
        }
        do {
            try netlink.connect(index, settings, sockets: sockets)
        } catch {
            guard error.errno == EBUSY else { throw error }
            throw SystemError("attach \(device): it is in use; detach it first, or choose another", errno: EBUSY)
        }
        log("\(device) attached to \(uri) with \(sockets.count) connections")
    }

    deinit { for socket in sockets where socket >= 0 { close(socket) } }

    /// Keeps the device until it is disconnected.
    package func run() {
        farcopy_keep_out_of_reclaim()
        while Self.isConnected(index) {
            waitForChange()
            if sockets.contains(-1), !replaceDead() { return }
        }
    }

    /// Waits until a socket has died, at most a second.
    private func waitForChange() {
        let events = Int16(0x2000)  // POLLRDHUP; errors and hang-ups are told unasked
        var entries = sockets.map { pollfd(fd: $0, events: events, revents: 0) }
        let allDead = !sockets.contains { $0 >= 0 }
        poll(&entries, nfds_t(entries.count), allDead ? 200 : 1000)
        var died = 0
        for (position, entry) in entries.enumerated() where entry.fd >= 0 && entry.revents != 0 {
            close(entry.fd)
            sockets[position] = -1
            died += 1
        }
        if died > 0 { log("/dev/nbd\(index): \(died) of \(sockets.count) connections lost; I/O waits") }
    }

    /// Brings new sockets for dead ones as far as the server is there; false when the device is no longer ours.
    private func replaceDead() -> Bool {
        for position in sockets.indices where sockets[position] < 0 {
            guard let connection = try? KernelConnection(uri: uri) else {
                sleepMilliseconds(200)
                return true
            }
            if restoredAt == nil { restoredAt = .some(connection.restoredAt) }
            if let restored = connection.restoredAt, restoredAt != .some(.some(restored)) {
                log(
                    "/dev/nbd\(index): the volume was restored from a FlashCopy at \(restored), so what this host has cached of "
                        + "it is void; the device is detached: unmount it, then attach it anew")
                try? netlink.disconnect(index)
                return false
            }
            do {
                try netlink.reconnect(index, identifier: identifier, socket: connection.socket)
                sockets[position] = dup(connection.socket)
                log("/dev/nbd\(index): connection \(position + 1) is back")
            } catch  where error.errno == EINVAL || error.errno == ENODEV {
                return Self.isConnected(index) && Self.attribute(index, "backend") == identifier
            } catch {
                // The kernel has not noticed the death yet, or has no dead connection for us to replace.
                sleepMilliseconds(500)
                return true
            }
        }
        return true
    }

    private func sleepMilliseconds(_ count: UInt32) { usleep(count * 1000) }

    // MARK: Devices

    /// The number of "/dev/nbd7".
    private static func index(of device: String) throws(SystemError) -> Int32 {
        let prefix = "/dev/nbd"
        guard device.hasPrefix(prefix), let index = Int32(device.dropFirst(prefix.count)), index >= 0 else {
            throw SystemError("use '\(device)'; write /dev/nbd0, /dev/nbd1, …", errno: EINVAL)
        }
        return index
    }

    private static func attribute(_ index: Int32, _ name: String) -> String? {
        guard let file = try? OpenFile(path: "/sys/block/nbd\(index)/\(name)", flags: O_RDONLY) else { return nil }
        var bytes = [UInt8](repeating: 0, count: 4096)
        let count = read(file.descriptor, &bytes, bytes.count)
        guard count > 0 else { return nil }
        return String(decoding: bytes[..<count].prefix { $0 != 0x0A }, as: UTF8.self)
    }

    /// The kernel shows the pid of whoever connected a device while it is connected.
    private static func isConnected(_ index: Int32) -> Bool { attribute(index, "pid") != nil }

    /// Disconnects a device; refuses while it is mounted, unless forced.
    package static func detach(device: String, force: Bool) throws(SystemError) {
        let index = try index(of: device)
        guard isConnected(index) else { throw SystemError("detach \(device): it is not attached", errno: ENODEV) }
        if !force, let place = mountPoint(of: device) {
            throw SystemError("detach \(device): it is mounted on \(place); unmount it first", errno: EBUSY)
        }
        try NBDNetlink().disconnect(index)
    }

    private static func mountPoint(of device: String) -> String? {
        guard let file = fopen("/proc/self/mounts", "r") else { return nil }
        defer { fclose(file) }
        var line = [CChar](repeating: 0, count: 8192)
        while fgets(&line, Int32(line.count), file) != nil {
            let text = String(decoding: line.prefix { $0 != 0 }.map { UInt8(bitPattern: $0) }, as: UTF8.self)
            let fields = text.split(separator: " ")
            if fields.count > 1, fields[0] == device || fields[0].hasPrefix("\(device)p") { return String(fields[1]) }
        }
        return nil
    }
}
