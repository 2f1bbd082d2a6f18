// ControlServer.swift: the HTTP API of a site.

import API
import Base
import Groups
import Hummingbird
import Logging
import NBDProtocol
import NIOCore
import Site

package struct ControlServer: Sendable {
    let site: Site
    private let connections: ControlConnections
    let logger: Logger

    package init(site: Site, logger: Logger) {
        self.site = site
        self.logger = logger
        connections = ControlConnections(limit: site.descriptors.control, logger: logger)
    }

    /// Serves one address until the task is cancelled; calls `ready` once it listens.
    package func run(_ address: Address, ready: @escaping @Sendable () -> Void) async throws {
        ListeningSocket.removeStale(address)
        let bind: BindAddress =
            switch address {
            case .unix(let path): .unixDomainSocket(path: path)
            case .tcp(let host, let port): .hostname(host, port: Int(port))
            }
        var quiet = logger
        quiet.logLevel = .critical  // it calls the end of its listener an error
        let application = Application(
            router: router(address),
            server: .http1(
                configuration: .init(
                    additionalChannelHandlers: [ConnectionBound(connections, address)],
                    idleTimeout: .seconds(Int64(Limits.controlIdleSeconds)))),
            configuration: .init(address: bind, serverName: nil),
            onServerRunning: { listener in
                try? await listener.eventLoop.submit {
                    try listener.pipeline.syncOperations.addHandler(AcceptPause(), position: .first)
                }.get()
                ready()
            }, logger: quiet)
        try await application.run()
    }

    private func router(_ address: Address) -> Router<BasicRequestContext> {
        let router = Router()
        router.add(middleware: CrossSiteRequests(address, site.configuration))
        var routes = Routes(router: router, site: site)
        addShown(&routes)
        addGroups(&routes)
        addRoles(&routes)
        addFlashCopies(&routes)
        addPeer(&routes)
        invariant(routes.served == Set(Endpoints.all.map(\.id)), "every call of the table is served, and nothing else")
        return router
    }

    private func addShown(_ routes: inout Routes) {
        routes.serve(Endpoints.status) { try await $0.site.status(group: $0[.group]) }
        routes.serve(Endpoints.events) { $0.site.events.list(group: $0[.group]) }
        routes.serve(Endpoints.points) { try $0.site.points($0.name) }
        routes.serve(Endpoints.flashCopies) { try await $0.site.flashCopies.listFlashCopies() }
        routes.serve(Endpoints.flashCopy) { asked in
            let volumes = asked[.volumes].map { $0.split(separator: ",").map(String.init) }
            return try await asked.site.flashCopies.showFlashCopy(asked.name, volumes ?? [])
        }
        routes.serveText("/metrics", type: "text/plain; version=0.0.4") { Metrics.text(try await $0.status()) }
    }

    private func addGroups(_ routes: inout Routes) {
        @Sendable func said(_ done: String, _ missed: [String]) -> String {
            missed.isEmpty ? done : "\(done) here; not told: \(missed.joined(separator: ", "))"
        }
        routes.serve(Endpoints.dropPoints) { try await $0.site.removal.dropPoints($0.name, $0.body) }
        routes.serve(Endpoints.cycle) { asked in
            if asked[.wait] != "false" { return .committed(try await asked.site.replication.cycle(asked.name)) }
            try await asked.site.replication.request(asked.name)
            return .asked(Done(done: "a point was asked for"))
        }
        routes.serve(Endpoints.suspend) { asked in
            let missed = try await asked.site.everySite.setSuspended(
                asked.name, true, isLed: asked[.led] == "true")
            return Done(done: said("suspended", missed))
        }
        routes.serve(Endpoints.resume) { asked in
            if asked[.isolated] == "true" {
                try await asked.site.standings.resumeIsolated(asked.name)
            } else {
                let missed = try await asked.site.everySite.setSuspended(
                    asked.name, false, fromImage: asked[.fromImage] == "true", isLed: asked[.led] == "true")
                return Done(done: said("resumed", missed))
            }
            return Done(done: "resumed")
        }
        routes.serve(Endpoints.rate) { asked in
            let text = asked[.bytes] ?? ""
            guard let rate: UInt64? = text == "default" ? .some(nil) : UInt64(text) else {
                throw Refusal("'\(text)' is no rate: give bytes a second, 0 for unbounded, or default", .misuse)
            }
            try await asked.site.replication.setRate(asked.name, rate)
            return Done(done: "the rate is set")
        }
        routes.serve(Endpoints.verify) { asked in
            try await asked.site.verifications.verify(
                asked.name, repair: asked[.repair] == "true", rate: asked[.rate].flatMap { UInt64($0) } ?? 0,
                isLed: asked[.led] == "true")
        }
        routes.serve(Endpoints.restore) { try await $0.site.localRestores.restore($0.name, $0.body) }
        routes.serve(Endpoints.abort) { asked in
            let operation = asked[.operation] ?? ""
            if operation.hasPrefix("cycle:"),
                let done = try await asked.site.failovers.decidePrepared(String(operation.dropFirst("cycle:".count)))
            {
                return Done(done: done)
            }
            return Done(done: try await asked.site.roles.abort(operation))
        }
    }

    private func addRoles(_ routes: inout Routes) {
        @Sendable func losers(_ asked: Asked<Nothing>) throws -> [String] {
            guard let losers = asked[.discard]?.split(separator: ","), !losers.isEmpty else {
                throw Refusal("say whose changes are discarded: discard=SITE", .misuse)
            }
            return losers.map(String.init)
        }
        routes.serve(Endpoints.failover) { asked in
            let point = try asked[.point].map { text in
                guard let number = UInt64(text) else { throw Refusal("'\(text)' is no point", .misuse) }
                return number
            }
            return try await asked.site.failovers.failover(
                asked.name, point: point, alone: asked[.alone] == "true")
        }
        routes.serve(Endpoints.previewResync) {
            try await $0.site.roles.previewResync($0.name, discard: try losers($0), isLed: $0[.led] == "true")
        }
        routes.serve(Endpoints.resync) {
            try await $0.site.roles.resync($0.name, discard: try losers($0), isLed: $0[.led] == "true")
        }
        routes.serve(Endpoints.switchover) {
            $0[.alone] == "true"
                ? try await $0.site.roles.switchoverAlone($0.name)
                : try await $0.site.roles.switchover($0.name, isLed: $0[.led] == "true")
        }
        routes.serve(Endpoints.previewFailback) {
            try await $0.site.roles.previewFailback($0.name, isLed: $0[.led] == "true")
        }
        routes.serve(Endpoints.failback) {
            try await $0.site.roles.failback($0.name, isLed: $0[.led] == "true")
        }
        routes.serve(Endpoints.practice) {
            try await $0.site.everySite.practice($0.name, point: $0[.point], isLed: $0[.led] == "true")
        }
        routes.serve(Endpoints.endPractice) { asked in
            try await asked.site.everySite.endPractice(asked.name, isLed: asked[.led] == "true")
            return Done(done: "the practice copy is gone")
        }
    }

    private func addFlashCopies(_ routes: inout Routes) {
        routes.serve(Endpoints.createFlashCopy) { try await $0.site.flashCopies.createFlashCopy($0.body) }
        routes.serve(Endpoints.setFlashCopy) { try await $0.site.flashCopies.setFlashCopy($0.body) }
        routes.serve(Endpoints.cloneFlashCopy) { try await $0.site.flashCopies.cloneFlashCopy($0.body) }
        routes.serve(Endpoints.refreshFlashCopy) { try await $0.site.flashCopies.refreshFlashCopy($0.body) }
        routes.serve(Endpoints.restoreFlashCopy) { try await $0.site.flashCopies.restoreFlashCopy($0.body) }
        routes.serve(Endpoints.withdrawFlashCopy) { asked in
            try await asked.site.flashCopies.withdrawFlashCopy(asked.body)
            return Done(done: "withdrawn")
        }
    }

    private func addPeer(_ routes: inout Routes) {
        routes.serve(Endpoints.standing) { try await $0.site.standings.answerStanding($0.name, $0.body) }
        routes.serve(Endpoints.openSession) { try await $0.site.intake.acceptSession($0.name, $0.body) }
        routes.serve(Endpoints.commit) { try await $0.site.intake.takeCommit($0.name, $0.body) }
        routes.serve(Endpoints.checksums) { try await $0.site.checksums.checksums($0.name, $0.body) }
        routes.serve(Endpoints.yield) { try await $0.site.roles.yield($0.name, $0.body) }
        routes.serve(Endpoints.changes) { asked in
            try await asked.site.roles.changes(
                asked.name, volume: asked[.volume] ?? "", from: asked[.from].flatMap { Int($0) } ?? 0)
        }
        routes.serve(Endpoints.promote) { asked in
            try await asked.site.roles.promote(asked.name, asked.body)
            return Done(done: "promoted")
        }
        routes.serve(Endpoints.untracked) { asked in
            try await asked.site.distrust.noteUntracked(asked.name, asked.body)
            return Done(done: "noted")
        }
        routes.serve(Endpoints.survey) { try await $0.site.coordination.survey($0.name, $0.body) }
        routes.serve(Endpoints.askHost) { try await $0.site.coordination.askHost($0.name, $0.body) }
        routes.serve(Endpoints.askRemote) { try await $0.site.coordination.askRemote($0.name, $0.body) }
        routes.serve(Endpoints.testify) { try await $0.site.failovers.testify($0.name, $0.body) }
        routes.serve(Endpoints.meet) { asked in
            try await asked.site.coordination.meet(asked.name, asked.body)
            return Done(done: "all are there")
        }
        routes.serve(Endpoints.announceResync) { asked in
            try await asked.site.resyncs.hear(asked.name, asked.body)
            return Done(done: "noted")
        }
        routes.serve(Endpoints.lead) { asked in
            try await asked.site.failovers.follow(asked.name, asked.body)
            return Done(done: "failed over")
        }
        routes.serve(Endpoints.pin) { asked in
            try await asked.site.verifications.pin(asked.name, asked.body)
            return Done(done: "pinned")
        }
        routes.serve(Endpoints.unpin) { asked in
            try await asked.site.verifications.unpin(asked.name, asked.body)
            return Done(done: "unpinned")
        }
    }
}
