// ControlConnections.swift: how many connections the control API has, and what it does when there are no descriptors.
//
// Must be prevented:
//   idle connections take the descriptors that volumes, clients and the peer need
//   whoever fills the TCP addresses keeps the operator out of the unix socket
//   a listening socket that cannot accept takes a whole processor

import Base
import HTTPTypes
import Logging
import NBDProtocol
import NIOCore
import NIOHTTPTypes
import Synchronization

/// Connections to all control addresses of a site. TCP addresses leave a quarter to unix sockets.
final class ControlConnections: Sendable {
    private let limit: Int
    private let logger: Logger
    private let open = Atomic(0)
    private let told = Atomic(false)

    init(limit: Int, logger: Logger) {
        self.limit = limit
        self.logger = logger
    }

    /// Counts a connection in; false when there are as many as may be.
    func enter(_ address: Address) -> Bool {
        var most = limit
        if case .tcp = address { most -= limit / 4 }
        if open.add(1, ordering: .relaxed).newValue <= most { return true }
        leave()
        if !told.exchange(true, ordering: .relaxed) {
            logger.warning("refused a connection to \(address): the control API has \(most) already")
        }
        return false
    }

    /// Once half of the connections have ended a refusal is news again.
    func leave() {
        if open.subtract(1, ordering: .relaxed).newValue <= limit / 2 { told.store(false, ordering: .relaxed) }
    }
}

/// Closes a connection that is one too many.
final class ConnectionBound: ChannelInboundHandler, RemovableChannelHandler {
    typealias InboundIn = HTTPRequestPart
    private let connections: ControlConnections
    private let address: Address
    private var isCounted = false

    init(_ connections: ControlConnections, _ address: Address) {
        self.connections = connections
        self.address = address
    }

    func channelActive(context: ChannelHandlerContext) {
        isCounted = connections.enter(address)
        if isCounted { context.fireChannelActive() } else { context.close(promise: nil) }
    }

    func channelInactive(context: ChannelHandlerContext) {
        if isCounted { connections.leave() }
        isCounted = false
        context.fireChannelInactive()
    }
}

/// Beside a listening socket: after a failed accept the next waits, since the client that could not be taken is still there.
final class AcceptPause: ChannelInboundHandler {
    typealias InboundIn = Channel
    private var isPaused = false

    func errorCaught(context: ChannelHandlerContext, error: any Error) {
        guard !isPaused else { return }
        isPaused = true
        let own = NIOLoopBound((self, context.channel), eventLoop: context.eventLoop)
        _ = context.channel.setOption(.autoRead, value: false)
        context.eventLoop.scheduleTask(in: .milliseconds(Int64(Limits.acceptPauseMilliseconds))) {
            let (handler, channel) = own.value
            handler.isPaused = false
            _ = channel.setOption(.autoRead, value: true)
        }
    }
}
