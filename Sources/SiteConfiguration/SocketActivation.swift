// SocketActivation.swift: listening sockets that systemd has opened (sd_listen_fds(3)).
//
// With them clients that connect while the site restarts wait instead of being refused.

import CLibURing
import Glibc
import Groups
import Ring

package enum SocketActivation {
    /// The first descriptor that is passed, by systemd's convention.
    private static let firstDescriptor: Int32 = 3

    private static func number(_ name: String) -> Int32? {
        getenv(name).flatMap { Int32(String(cString: $0)) }
    }

    /// How many sockets the environment offers to this very process.
    private static var offered: Int32 {
        guard number("LISTEN_PID") == getpid(), let count = number("LISTEN_FDS"), (1...64).contains(count) else {
            return 0
        }
        return count
    }

    package static var isOffered: Bool { offered > 0 }

    /// The sockets, each to be used once.
    ///
    /// - Throws: when a descriptor is no listening stream socket.
    package static func take() throws -> [OpenFile] {
        var files: [OpenFile] = []
        for descriptor in firstDescriptor..<firstDescriptor + offered {
            var listens: Int32 = 0
            var type: Int32 = 0
            var length = socklen_t(MemoryLayout<Int32>.size)
            guard getsockopt(descriptor, SOL_SOCKET, SO_ACCEPTCONN, &listens, &length) == 0, listens == 1,
                getsockopt(descriptor, SOL_SOCKET, SO_TYPE, &type, &length) == 0,
                type == Int32(SOCK_STREAM.rawValue)
            else {
                throw Refusal(
                    "descriptor \(descriptor) of LISTEN_FDS is no listening stream socket; use ListenStream= in the unit"
                )
            }
            _ = fcntl(descriptor, F_SETFD, FD_CLOEXEC)
            files.append(OpenFile(descriptor: descriptor, path: "LISTEN_FDS \(descriptor)"))
        }
        return files
    }
}
