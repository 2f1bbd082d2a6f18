// Serve.swift: `farcopy serve`.

import APIServer
import ArgumentParser
import Dispatch
import Glibc
import Groups
import Logging
import Site
import SiteConfiguration

struct Serve: AsyncParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "Serve a site's volumes in the foreground; prints \"ready\" once its exports are up.")

    @Option(help: "The site's TOML file.")
    var config: String

    @Option(help: "How much to log on stderr: error, warning, info, debug.")
    var logLevel: String = "info"

    @Flag(help: "Serve block devices that are mounted, or claimed by another program, all the same.")
    var force = false

    func run() async throws {
        guard let level = Logger.Level(rawValue: logLevel) else {
            throw ValidationError("'\(logLevel)' is no log level; use error, warning, info or debug")
        }
        signal(SIGPIPE, SIG_IGN)
        raiseDescriptorLimit()
        LoggingSystem.bootstrap(StreamLogHandler.standardError)
        var logger = Logger(label: "farcopy")
        logger.logLevel = level
        let configuration = try Self.configuration(at: config)
        do {
            try await serve(configuration, logger)
        } catch let error as Refusal {
            throw error
        } catch {
            throw Refusal("\(error)")
        }
    }

    private func serve(_ configuration: Configuration, _ logger: Logger) async throws {
        try SiteThread.begin()
        let site = try await Site(configuration: configuration, logger: logger, force: force)
        let stopped = stopSignal()
        try await withThrowingTaskGroup(of: Bool.self) { tasks in
            let (running, announce) = AsyncStream.makeStream(of: Void.self)
            let server = ControlServer(site: site, logger: logger)
            // Before the volumes are up, so that peers that start at the same time can ask each other who is primary.
            for address in configuration.control {
                tasks.addTask {
                    try await server.run(address) { announce.yield(()) }
                    return true
                }
            }
            tasks.addTask {
                try await site.start()
                announce.yield(())
                return false
            }
            tasks.addTask {
                var up = 0
                for await _ in running {
                    up += 1
                    if up == configuration.control.count + 1 { Output.line("ready") }
                }
                return false
            }
            tasks.addTask {
                for await _ in stopped { break }
                return true
            }
            // The first to end is the signal, or what could not be started or listened on.
            while let ends = try await tasks.next(), !ends {}
            await site.endWaits()
            tasks.cancelAll()
            while let result = await tasks.nextResult() { _ = result }
        }
        logger.info("stopping")
        await site.stop()
    }

    static func configuration(at path: String) throws -> Configuration {
        try Configuration(text: try read(path), path: path)
    }

    private static func read(_ path: String) throws -> String {
        guard let file = fopen(path, "r") else {
            throw Refusal("open \(path): \(String(cString: strerror(errno)))")
        }
        defer { fclose(file) }
        var bytes: [UInt8] = []
        var chunk = [UInt8](repeating: 0, count: 65536)
        while true {
            let count = fread(&chunk, 1, chunk.count, file)
            if count == 0 { break }
            bytes += chunk[..<count]
            guard bytes.count < 16 << 20 else { throw Refusal("\(path) is too large for a configuration") }
        }
        guard let text = String(validating: bytes, as: UTF8.self) else { throw Refusal("\(path) is not UTF-8") }
        return text
    }

    /// Each copy holds two descriptors and each client one.
    private func raiseDescriptorLimit() {
        var limit = rlimit()
        getrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
        limit.rlim_cur = limit.rlim_max
        setrlimit(__rlimit_resource_t(RLIMIT_NOFILE.rawValue), &limit)
    }
}

/// Kept for the life of the process.
// Safe because: written once, before any handler can run, and never read.
nonisolated(unsafe) private var signalSources: [any DispatchSourceSignal] = []

/// Yields when SIGTERM or SIGINT arrives.
private func stopSignal() -> AsyncStream<Void> {
    let (stream, continuation) = AsyncStream.makeStream(of: Void.self)
    for number in [SIGTERM, SIGINT] {
        signal(number, SIG_IGN)
        let source = DispatchSource.makeSignalSource(signal: number, queue: .global())
        source.setEventHandler { continuation.yield(()) }
        source.activate()
        signalSources.append(source)
    }
    return stream
}
