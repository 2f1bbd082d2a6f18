// ControlServer.swift: the HTTP API of a site.

import Base
import FoundationEssentials
import HTTPTypes
import Hummingbird
import Logging
import NBDProtocol
import NIOCore
import Replication

package struct ControlServer: Sendable {
    let site: Site
    let logger: Logger

    package init(site: Site, logger: Logger) {
        self.site = site
        self.logger = logger
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
                    additionalChannelHandlers: [ConnectionBound(site.controlConnections, address)],
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

    private func answer(_ value: some Encodable) throws -> Response {
        let encoder = JSONEncoder()
        encoder.outputFormatting = [.sortedKeys, .prettyPrinted]
        var bytes = [UInt8](try encoder.encode(value))
        bytes.append(0x0A)
        return Response(
            status: .ok, headers: [.contentType: "application/json"],
            body: ResponseBody(byteBuffer: ByteBuffer(bytes: bytes)))
    }

    /// Refusals in words, with their status; anything else is ours and says so.
    private func guarded(early: Bool = false, _ body: () async throws -> Response) async -> Response {
        do {
            if !early, await !site.isStarted { throw Refusal("the site is starting; try again", .passing) }
            return try await body()
        } catch let error as Refusal {
            return errorResponse(error)
        } catch let refusal as PeerRefusal {
            return errorResponse(Refusal("the peer refuses: \(refusal)"))
        } catch {
            return errorResponse(Refusal("\(error)", .failed))
        }
    }

    private func decode<Value: Decodable>(_ type: Value.Type, _ request: Request) async throws -> Value {
        let buffer = try await request.body.collect(upTo: 1 << 20)
        do {
            return try JSONDecoder().decode(type, from: Data([UInt8](buffer: buffer)))
        } catch {
            throw Refusal("the request's body is not what this call takes: \(error)", .misuse)
        }
    }

    private func router(_ address: Address) -> Router<BasicRequestContext> {
        let router = Router()
        router.add(middleware: CrossSiteRequests(address, site.configuration))
        addStatus(router)
        addGroups(router)
        addRoles(router)
        addFlashCopies(router)
        addPeer(router)
        return router
    }

    private func addStatus(_ router: Router<BasicRequestContext>) {
        router.get("/v1/status") { request, _ in
            await guarded {
                try answer(try await site.status(group: request.uri.queryParameters["group"].map(String.init)))
            }
        }
        router.get("/v1/events") { request, _ in
            await guarded {
                let group = request.uri.queryParameters["group"].map(String.init)
                return try answer(site.events.list(group: group))
            }
        }
        router.get("/metrics") { _, _ in
            await guarded {
                let text = Metrics.text(try await site.status())
                return Response(
                    status: .ok, headers: [.contentType: "text/plain; version=0.0.4"],
                    body: ResponseBody(byteBuffer: ByteBuffer(string: text)))
            }
        }
    }

    private func addGroups(_ router: Router<BasicRequestContext>) {
        router.get("/v1/groups/{group}/points") { _, context in
            await guarded { try answer(try await site.points(try context.parameters.require("group"))) }
        }
        router.post("/v1/groups/{group}/points/drop") { request, context in
            await guarded {
                let body = try await decode(PointDropRequest.self, request)
                return try answer(try await site.dropPoints(try context.parameters.require("group"), body))
            }
        }
        router.post("/v1/groups/{group}/cycle") { request, context in
            await guarded {
                let name = try context.parameters.require("group")
                if request.uri.queryParameters["wait"] == "false" {
                    try await site.request(name)
                    return try answer(Done(done: "a point was asked for"))
                }
                return try answer(try await site.cycle(name))
            }
        }
        router.post("/v1/groups/{group}/suspend") { _, context in
            await guarded {
                try await site.suspend(try context.parameters.require("group"))
                return try answer(Done(done: "suspended"))
            }
        }
        router.post("/v1/groups/{group}/resume") { request, context in
            await guarded {
                let name = try context.parameters.require("group")
                let query = request.uri.queryParameters
                if query["isolated"] == "true" {
                    try await site.resumeIsolated(name)
                } else {
                    try await site.resume(name, fromImage: query["from_image"] == "true")
                }
                return try answer(Done(done: "resumed"))
            }
        }
        router.post("/v1/groups/{group}/failover") { request, context in
            await guarded {
                var point: UInt64?
                if let text = request.uri.queryParameters["point"] {
                    guard let number = UInt64(text) else { throw Refusal("'\(text)' is no point", .misuse) }
                    point = number
                }
                return try answer(
                    try await site.failover(try context.parameters.require("group"), point: point))
            }
        }
    }

    private func addRoles(_ router: Router<BasicRequestContext>) {
        @Sendable func loser(_ request: Request) throws -> String {
            guard let text = request.uri.queryParameters["discard"] else {
                throw Refusal("say whose changes are discarded: discard=SITE", .misuse)
            }
            return String(text)
        }
        router.get("/v1/groups/{group}/resync") { request, context in
            await guarded {
                try answer(
                    try await site.previewResync(try context.parameters.require("group"), discard: try loser(request)))
            }
        }
        router.post("/v1/groups/{group}/resync") { request, context in
            await guarded {
                try answer(try await site.resync(try context.parameters.require("group"), discard: try loser(request)))
            }
        }
        router.post("/v1/groups/{group}/switchover") { _, context in
            await guarded { try answer(try await site.switchover(try context.parameters.require("group"))) }
        }
        router.get("/v1/groups/{group}/failback") { _, context in
            await guarded { try answer(try await site.previewFailback(try context.parameters.require("group"))) }
        }
        router.post("/v1/groups/{group}/failback") { _, context in
            await guarded { try answer(try await site.failback(try context.parameters.require("group"))) }
        }
        router.post("/v1/groups/{group}/practice") { request, context in
            await guarded {
                let text = request.uri.queryParameters["point"].map(String.init)
                return try answer(try await site.practice(try context.parameters.require("group"), point: text))
            }
        }
        router.delete("/v1/groups/{group}/practice") { _, context in
            await guarded {
                try await site.endPractice(try context.parameters.require("group"))
                return try answer(Done(done: "the practice copy is gone"))
            }
        }
        router.post("/v1/groups/{group}/rate") { request, context in
            await guarded {
                let text = request.uri.queryParameters["bytes"].map(String.init) ?? ""
                guard let rate: UInt64? = text == "default" ? .some(nil) : UInt64(text) else {
                    throw Refusal(
                        "'\(text)' is no rate: give bytes a second, 0 for unbounded, or default", .misuse)
                }
                try await site.setRate(try context.parameters.require("group"), rate)
                return try answer(Done(done: "the rate is set"))
            }
        }
        router.post("/v1/groups/{group}/verify") { request, context in
            await guarded {
                let query = request.uri.queryParameters
                return try answer(
                    try await site.verify(
                        try context.parameters.require("group"), repair: query["repair"] == "true",
                        rate: query["rate"].flatMap { UInt64($0) } ?? 0))
            }
        }
        router.post("/v1/abort") { request, _ in
            await guarded {
                let text = request.uri.queryParameters["operation"].map(String.init) ?? ""
                return try answer(Done(done: try await site.abort(text)))
            }
        }
    }

    private func addFlashCopies(_ router: Router<BasicRequestContext>) {
        router.get("/v1/flashcopies") { _, _ in
            await guarded { try answer(try await site.listFlashCopies()) }
        }
        router.post("/v1/flashcopies") { request, _ in
            await guarded {
                try answer(try await site.createFlashCopy(try await decode(FlashCopyRequest.self, request)))
            }
        }
        router.post("/v1/flashcopies/withdraw") { request, _ in
            await guarded {
                try await site.withdrawFlashCopy(try await decode(FlashCopyRequest.self, request))
                return try answer(Done(done: "withdrawn"))
            }
        }
        router.get("/v1/flashcopies/{name}") { request, context in
            await guarded {
                let names = request.uri.queryParameters["volumes"].map {
                    String($0).split(separator: ",").map(String.init)
                }
                return try answer(
                    try await site.showFlashCopy(try context.parameters.require("name"), names ?? []))
            }
        }
        change(router, "set") { try await site.setFlashCopy($0) }
        change(router, "clone") { try await site.cloneFlashCopy($0) }
        change(router, "refresh") { try await site.refreshFlashCopy($0) }
        change(router, "restore") { try await site.restoreFlashCopy($0) }
    }

    /// A call that changes FlashCopies and tells how they are afterwards.
    private func change(
        _ router: Router<BasicRequestContext>, _ word: String,
        _ body: @escaping @Sendable (FlashCopyRequest) async throws -> [FlashCopyReport]
    ) {
        router.post("/v1/flashcopies/\(word)") { request, _ in
            await guarded { try answer(try await body(try await decode(FlashCopyRequest.self, request))) }
        }
    }

    private func addPeer(_ router: Router<BasicRequestContext>) {
        router.post("/v1/peer/groups/{group}/standing") { request, context in
            await guarded(early: true) {
                let body = try await decode(Standing.self, request)
                return try answer(try await site.answerStanding(try context.parameters.require("group"), body))
            }
        }
        router.post("/v1/peer/groups/{group}/yield") { request, context in
            await guarded {
                let body = try await decode(YieldRequest.self, request)
                return try answer(try await site.yield(try context.parameters.require("group"), body))
            }
        }
        router.post("/v1/peer/groups/{group}/checksums") { request, context in
            await guarded {
                let body = try await decode(ChecksumRequest.self, request)
                return try answer(try await site.checksums(try context.parameters.require("group"), body))
            }
        }
        router.post("/v1/peer/groups/{group}/pin") { request, context in
            await guarded {
                try await site.pin(try context.parameters.require("group"), try await decode(PinRequest.self, request))
                return try answer(Done(done: "pinned"))
            }
        }
        router.post("/v1/peer/groups/{group}/unpin") { request, context in
            await guarded {
                try await site.unpin(
                    try context.parameters.require("group"), try await decode(PinRequest.self, request))
                return try answer(Done(done: "unpinned"))
            }
        }
        router.get("/v1/peer/groups/{group}/changes") { request, context in
            await guarded {
                let query = request.uri.queryParameters
                return try answer(
                    try await site.changes(
                        try context.parameters.require("group"), volume: query["volume"].map(String.init) ?? "",
                        from: query["from"].flatMap { Int($0) } ?? 0))
            }
        }
        router.post("/v1/peer/groups/{group}/promote") { request, context in
            await guarded {
                let body = try await decode(PromoteRequest.self, request)
                try await site.promote(try context.parameters.require("group"), body)
                return try answer(Done(done: "promoted"))
            }
        }
        router.post("/v1/peer/groups/{group}/untracked") { request, context in
            await guarded {
                let body = try await decode(UntrackedRequest.self, request)
                try await site.noteUntracked(try context.parameters.require("group"), body)
                return try answer(Done(done: "noted"))
            }
        }
        router.post("/v1/peer/groups/{group}/session") { request, context in
            await guarded {
                let body = try await decode(SessionRequest.self, request)
                return try answer(try await site.acceptSession(try context.parameters.require("group"), body))
            }
        }
        router.post("/v1/peer/groups/{group}/commit") { request, context in
            await guarded {
                let body = try await decode(CommitRequest.self, request)
                return try answer(try await site.takeCommit(try context.parameters.require("group"), body))
            }
        }
    }
}

struct Done: Codable, Sendable { var done: String }

/// Prometheus text exposition, from the same figures as the status.
enum Metrics {
    // `Double.init` as a value may also be `init(bitPattern:)`, which makes nonsense of a count.
    static func text(_ status: StatusReport) -> String {
        var lines: [String] = []
        func family(_ name: String, _ help: String, _ values: [(String, Double?)]) {
            lines.append("# HELP farcopy_\(name) \(help)")
            lines.append("# TYPE farcopy_\(name) gauge")
            for case (let labels, let value?) in values { lines.append("farcopy_\(name){\(labels)} \(value)") }
        }
        let groups = status.groups.sorted { $0.key < $1.key }
        let volumes = status.volumes.sorted { $0.key < $1.key }
        func each(_ value: (StatusReport.GroupReport) -> Double?) -> [(String, Double?)] {
            groups.map { ("group=\"\($0.key)\"", value($0.value)) }
        }
        family("lag_seconds", "Age of the newest point that the remote has committed.", each(\.lagSeconds))
        family(
            "pending_bytes", "Bytes that differ from the newest committed point.",
            each { $0.pendingBytes.map { Double($0) } })
        family("point", "Number of the newest committed point.", each { $0.point.map { Double($0.id) } })
        family("rate_bytes_per_second", "Bytes sent to the peer.", each(\.rateBytesPerSecond))
        family("hold_seconds_p99", "Time that acknowledgements were held to form a point.", each(\.holdSecondsP99))
        family(
            "verified_bytes_total", "Bytes compared with the peer since the start.", each { Double($0.verifiedBytes) })
        family(
            "verify_differences_total", "Differences that comparisons have found since the start.",
            each { Double($0.differencesFound) })
        family("spared_bytes_total", "Bytes that the peer had already.", each { $0.sparedBytes.map { Double($0) } })
        family(
            "window_bytes", "Bytes that may be on their way to the peer.", each { $0.windowBytes.map { Double($0) } })
        family("point_bytes", "Bytes sent for the newest committed point.", each { $0.point?.bytes.map { Double($0) } })
        family(
            "point_seconds", "Time from forming to commit of the newest committed point.", each { $0.point?.seconds })
        lines += [
            "# HELP farcopy_hold_seconds Time that acknowledgements were held to form a point.",
            "# TYPE farcopy_hold_seconds histogram",
        ]
        for (name, group) in groups { lines += group.holdHistogram?.lines(name) ?? [] }
        family(
            "group_alert", "1 for each alert that is on.",
            groups.flatMap { name, group -> [(String, Double?)] in
                (group.alerts ?? []).map {
                    ("group=\"\(name)\",alert=\"\($0.split(separator: ":").first.map(String.init) ?? "")\"", 1)
                }
            })
        family(
            "filesystem_used_ratio", "How full a file system is that the site writes to, from 0 to 1.",
            (status.fileSystems ?? []).map { ("path=\"\($0.path)\"", $0.usedRatio) })
        family(
            "group_state", "1 for the state that the group is in.",
            groups.map { ("group=\"\($0.key)\",state=\"\($0.value.state)\",role=\"\($0.value.role)\"", 1) })
        family(
            "volume_size_bytes", "Size of the volume.", volumes.map { ("volume=\"\($0.key)\"", Double($0.value.size)) })
        family(
            "volume_read_bytes", "Bytes read by clients.",
            volumes.map { ("volume=\"\($0.key)\"", Double($0.value.bytesRead)) })
        family(
            "volume_written_bytes", "Bytes written by clients.",
            volumes.map { ("volume=\"\($0.key)\"", Double($0.value.bytesWritten)) })
        return lines.joined(separator: "\n") + "\n"
    }
}
