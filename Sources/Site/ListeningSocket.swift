// ListeningSocket.swift: sockets that the site listens on, checked before anything is touched.

import CLibURing
import Glibc
import Groups
import NBDProtocol
import Ring

package enum ListeningSocket {
    /// Whether the address can be taken.
    ///
    /// - Throws: when another process serves it, or its directory is missing. A socket file that nobody serves is fine.
    static func check(_ address: Address) throws {
        guard case .unix(let path) = address else { return }
        var facts = stat()
        guard lstat(path, &facts) == 0 else {
            let directory = parentDirectory(path)
            guard stat(directory, &facts) == 0, facts.st_mode & S_IFMT == S_IFDIR
            else { throw Refusal("socket \(path): the directory \(directory) does not exist") }
            return
        }
        guard facts.st_mode & S_IFMT == S_IFSOCK else {
            throw Refusal("socket \(path): there is a file of that name that is no socket; move it away")
        }
        // The kernel lets go of what the ring of a killed process had, such as this socket, a little after the process has ended.
        var tries = 100
        while isServed(path), tries > 0 {
            usleep(20_000)
            tries -= 1
        }
        if tries == 0 {
            throw Refusal(
                "socket \(path) is in use by another process; stop it or choose another path")
        }
    }

    private static func isServed(_ path: String) -> Bool {
        let probe = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
        guard probe >= 0 else { return false }
        defer { close(probe) }
        return withUnixAddress(path) { connect(probe, $0, $1) } == 0
    }

    private static func withUnixAddress(
        _ path: String, _ body: (UnsafePointer<sockaddr>, socklen_t) -> Int32
    ) -> Int32 {
        var address = sockaddr_un()
        address.sun_family = sa_family_t(AF_UNIX)
        withUnsafeMutableBytes(of: &address.sun_path) { target in
            for (index, byte) in path.utf8.prefix(target.count - 1).enumerated() { target[index] = byte }
        }
        return withUnsafePointer(to: &address) { pointer in
            pointer.withMemoryRebound(to: sockaddr.self, capacity: 1) {
                body($0, socklen_t(MemoryLayout<sockaddr_un>.size))
            }
        }
    }

    /// Removes the socket file that this process has served. It may still answer until the kernel has cleared the ring.
    static func remove(_ address: Address) {
        if case .unix(let path) = address { unlink(path) }
    }

    /// Removes a socket file that nobody serves.
    package static func removeStale(_ address: Address) {
        if case .unix(let path) = address, !isServed(path) { unlink(path) }
    }

    /// Sockets that listen on the address: one, or one for each address that a host name has.
    static func open(_ address: Address) throws -> [OpenFile] {
        switch address {
        case .unix(let path):
            removeStale(address)
            let descriptor = socket(AF_UNIX, Int32(SOCK_STREAM.rawValue) | Int32(SOCK_CLOEXEC.rawValue), 0)
            guard descriptor >= 0 else { throw SystemError("create a socket for \(address)") }
            let file = OpenFile(descriptor: descriptor, path: path)
            guard withUnixAddress(path, { bind(descriptor, $0, $1) }) == 0 else {
                throw SystemError("listen on \(address)")
            }
            guard listen(descriptor, 4096) == 0 else { throw SystemError("listen on \(address)") }
            return [file]
        case .tcp(let host, let port):
            return try openTCP(host, port, address)
        }
    }

    private static func openTCP(_ host: String, _ port: UInt16, _ address: Address) throws
        -> [OpenFile]
    {
        var hints = addrinfo()
        hints.ai_flags = AI_PASSIVE
        hints.ai_socktype = Int32(SOCK_STREAM.rawValue)
        var list: UnsafeMutablePointer<addrinfo>?
        let result = getaddrinfo(host, String(port), &hints, &list)
        guard result == 0, let first = list else {
            throw Refusal("listen on \(address): \(String(cString: gai_strerror(result)))")
        }
        defer { freeaddrinfo(first) }
        var files: [OpenFile] = []
        var entry: UnsafeMutablePointer<addrinfo>? = first
        while let info = entry?.pointee {
            let descriptor = socket(info.ai_family, info.ai_socktype | Int32(SOCK_CLOEXEC.rawValue), 0)
            guard descriptor >= 0 else { throw SystemError("create a socket for \(address)") }
            let file = OpenFile(descriptor: descriptor, path: address.description)
            var on: Int32 = 1
            setsockopt(descriptor, SOL_SOCKET, SO_REUSEADDR, &on, socklen_t(MemoryLayout<Int32>.size))
            if info.ai_family == AF_INET6 {
                setsockopt(
                    descriptor, Int32(IPPROTO_IPV6), IPV6_V6ONLY, &on, socklen_t(MemoryLayout<Int32>.size))
            }
            var tries = 100  // as in `check`
            while bind(descriptor, info.ai_addr, info.ai_addrlen) != 0 {
                guard errno == EADDRINUSE, tries > 0 else { throw SystemError("listen on \(address)") }
                usleep(20_000)
                tries -= 1
            }
            guard listen(descriptor, 4096) == 0 else { throw SystemError("listen on \(address)") }
            files.append(file)
            entry = info.ai_next
        }
        return files
    }
}
