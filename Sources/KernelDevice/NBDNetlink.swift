// NBDNetlink.swift: the kernel's generic netlink family "nbd" (linux/nbd-netlink.h, drivers/block/nbd.c).

import CNetlink
import Glibc
import Ring

/// A device that the kernel is to connect.
struct DeviceSettings {
    var size: UInt64
    var blockSize: UInt64
    /// Transmission flags as on the wire.
    var serverFlags: UInt64
    /// A request that is not answered within so many seconds is sent again on another connection.
    var timeoutSeconds: UInt64
    /// How long I/O waits for a new connection when all are lost.
    var deadConnectionSeconds: UInt64
    /// Shown in /sys/block/nbdN/backend; who reconnects must give the same.
    var identifier: String
}

struct NBDNetlink: ~Copyable {
    private let socket: OpaquePointer
    private let family: Int32

    /// - Throws: when the kernel has no nbd module loaded.
    init() throws(SystemError) {
        guard let socket = nl_socket_alloc() else { throw SystemError("open a netlink socket", errno: ENOMEM) }
        guard genl_connect(socket) == 0 else {
            nl_socket_free(socket)
            throw SystemError("open a netlink socket", errno: EPROTO)
        }
        let family = genl_ctrl_resolve(socket, NBD_GENL_FAMILY_NAME)
        guard family >= 0 else {
            nl_socket_free(socket)
            throw SystemError("find the kernel's nbd module; try `modprobe nbd`", errno: ENODEV)
        }
        self.socket = socket
        self.family = family
    }

    deinit { nl_socket_free(socket) }

    /// Connects a device that is not in use.
    func connect(_ index: Int32, _ settings: DeviceSettings, sockets: [Int32]) throws(SystemError) {
        try command(UInt8(NBD_CMD_CONNECT), index, "connect") { message in
            nla_put_u64(message, Int32(NBD_ATTR_SIZE_BYTES), settings.size)
            nla_put_u64(message, Int32(NBD_ATTR_BLOCK_SIZE_BYTES), settings.blockSize)
            nla_put_u64(message, Int32(NBD_ATTR_SERVER_FLAGS), settings.serverFlags)
            nla_put_u64(message, Int32(NBD_ATTR_TIMEOUT), settings.timeoutSeconds)
            nla_put_u64(message, Int32(NBD_ATTR_DEAD_CONN_TIMEOUT), settings.deadConnectionSeconds)
            nla_put_string(message, Int32(NBD_ATTR_BACKEND_IDENTIFIER), settings.identifier)
            Self.put(sockets, in: message)
        }
    }

    /// Gives a device a socket in place of one that is dead.
    func reconnect(_ index: Int32, identifier: String, socket: Int32) throws(SystemError) {
        try command(UInt8(NBD_CMD_RECONFIGURE), index, "reconnect") { message in
            nla_put_string(message, Int32(NBD_ATTR_BACKEND_IDENTIFIER), identifier)
            Self.put([socket], in: message)
        }
    }

    func disconnect(_ index: Int32) throws(SystemError) {
        try command(UInt8(NBD_CMD_DISCONNECT), index, "disconnect") { _ in }
    }

    private static func put(_ sockets: [Int32], in message: OpaquePointer) {
        let list = nla_nest_start(message, Int32(NBD_ATTR_SOCKETS))
        for socket in sockets {
            let item = nla_nest_start(message, Int32(NBD_SOCK_ITEM))
            nla_put_u32(message, Int32(NBD_SOCK_FD), UInt32(socket))
            nla_nest_end(message, item)
        }
        nla_nest_end(message, list)
    }

    private func command(
        _ number: UInt8, _ index: Int32, _ verb: String, _ fill: (OpaquePointer) -> Void
    ) throws(SystemError) {
        guard let message = nlmsg_alloc() else { throw SystemError("\(verb) /dev/nbd\(index)", errno: ENOMEM) }
        genlmsg_put(message, 0, 0, family, 0, 0, number, UInt8(NBD_GENL_VERSION))
        nla_put_u32(message, Int32(NBD_ATTR_INDEX), UInt32(index))
        fill(message)
        // Sends, frees, and waits for the kernel's acknowledgement.
        let result = nl_send_sync(socket, message)
        guard result >= 0 else { throw SystemError("\(verb) /dev/nbd\(index)", errno: Self.errno(result)) }
    }

    /// libnl has error numbers of its own; these are told apart here.
    private static func errno(_ code: Int32) -> Int32 {
        switch -code {
        case Int32(NLE_BUSY): EBUSY
        case Int32(NLE_PERM): EPERM
        case Int32(NLE_INVAL): EINVAL
        case Int32(NLE_NODEV), Int32(NLE_OBJ_NOTFOUND): ENODEV
        case Int32(NLE_NOMEM): ENOMEM
        default: EIO
        }
    }
}
