// FlashCopies.swift: `farcopy flashcopy create | list | withdraw`.

import Base
import FoundationEssentials
import Glibc
import NBDServer
import Replication
import Ring
import Volumes

package struct FlashCopyRequest: Codable, Sendable {
    package var name: String
    package var volumes: [String]

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
    /// Bytes of old content in the target.
    package var preservedBytes: UInt64
}

extension Site {
    /// Identifiers of FlashCopies begin here, apart from those of recovery points, which are their numbers.
    private static let firstCopyID: CopyID = 1 << 62

    private func members(_ names: [String]) throws -> [VolumeState] {
        guard !names.isEmpty, Set(names).count == names.count else {
            throw SiteError("name each volume once, and at least one", status: 400)
        }
        return try names.map { name in
            guard let volume = volumes[name] else {
                let known = volumes.keys.sorted().joined(separator: ", ")
                throw SiteError("there is no volume '\(name)'; known: \(known)", status: 404)
            }
            return volume
        }
    }

    /// Takes FlashCopies of several volumes at one instant.
    func createFlashCopy(_ request: FlashCopyRequest) async throws -> [FlashCopyReport] {
        await copyTurnstile.enter()
        defer { copyTurnstile.leave() }
        let members = try members(request.volumes)
        try checkCopyName(request.name)
        for volume in members {
            if volume.record.copies.contains(where: { $0.name == request.name }) {
                throw SiteError(
                    "volume '\(volume.name)' has a FlashCopy '\(request.name)' already; withdraw it or choose another name"
                )
            }
            if group(ofVolume: volume.name)?.record.role == .secondary {
                throw SiteError(
                    "volume '\(volume.name)' is a secondary, which is consistent at its recovery points only; "
                        + "use those, or fail over first")
            }
            guard volume.copies.count < Limits.copiesPerVolume - 8 else {
                throw SiteError(
                    "volume '\(volume.name)' has \(volume.copies.count) copies, which is the limit; withdraw some")
            }
        }
        try await establishPatiently(request.name, members)
        return try await listFlashCopies().filter {
            $0.name == request.name && request.volumes.contains($0.volume)
        }
    }

    private func checkCopyName(_ name: String) throws {
        let valid =
            !name.isEmpty && name.utf8.count <= 64 && !name.allSatisfy(\.isNumber) && name != "secondary"
            && name.utf8.allSatisfy { $0 > 0x20 && $0 < 0x7F && $0 != 0x40 && $0 != 0x2F && $0 != 0x3A }
        guard valid else {
            throw SiteError(
                "'\(name)' is no name for a FlashCopy: use 1 to 64 printable characters without '@', '/', ':' and "
                    + "space, not only digits (those are recovery points), and not 'secondary'", status: 400)
        }
    }

    /// A busy machine may let the hold's deadline pass; a few tries later it seldom does.
    private func establishPatiently(_ name: String, _ members: [VolumeState]) async throws {
        var triesLeft = 5
        while true {
            triesLeft -= 1
            do {
                return try await establish(name, members)
            } catch let error as SiteError where error.status == 503 && triesLeft > 0 {
                logger.info("FlashCopy '\(name)': \(error); trying again")
            }
        }
    }

    private func establish(_ name: String, _ members: [VolumeState]) async throws {
        var made: [(VolumeState, CopyID, (target: OpenFile, bitmap: MappedFile))] = []
        for volume in members {
            let id = Self.firstCopyID + volume.record.nextCopy
            volume.record.nextCopy += 1
            try volume.recordFile.save(volume.record)  // an identifier is never used twice
            made.append((volume, id, try volume.openCopy(id, create: true)))
        }
        for (volume, id, files) in made {
            let number = volume.number
            await volume.reactor.run { $0.hold(number) }
            try await addCopy(volume, id, files, durable: false)
        }
        var intact = true
        for (volume, _, _) in made {
            let number = volume.number
            if await !volume.reactor.run({ $0.releaseHold(number) }) { intact = false }
        }
        guard intact || members.count == 1 else {
            for (volume, id, _) in made {
                let number = volume.number
                volume.reactor.perform { $0.hosted(number).volume.withdrawCopy(id) }
            }
            throw SiteError(
                "the volumes could not be held together within \(Limits.holdMilliseconds) ms; nothing was created, try again",
                status: 503)
        }
        for (volume, id, _) in made {
            volume.record.copies.append(
                VolumeRecord.Copy(
                    id: id, name: name, createdAt: realSeconds(), order: volume.takeOrder(), state: .active))
            try volume.recordFile.save(volume.record)
            await publish(volume, group(ofVolume: volume.name))
        }
        note(nil, "FlashCopy '\(name)' of \(members.map(\.name).joined(separator: ", ")) created")
    }

    func listFlashCopies() async throws -> [FlashCopyReport] {
        var reports: [FlashCopyReport] = []
        for volume in volumes.values.sorted(by: { $0.name < $1.name }) {
            for copy in volume.record.copies {
                let (number, id, grain) = (volume.number, copy.id, UInt64(volume.geometry.grain))
                let grains = await volume.reactor.run { reactor in
                    reactor.hosted(number).volume.copy(id)?.preserved.population() ?? 0
                }
                reports.append(
                    FlashCopyReport(
                        volume: volume.name, name: copy.name, export: "\(volume.name)@\(copy.name)",
                        createdAt: timestamp(copy.createdAt), state: copy.state.rawValue,
                        reason: copy.reason, preservedBytes: UInt64(grains) * grain))
            }
        }
        return reports
    }

    /// Takes FlashCopies out of service; readers are disconnected, and what older copies need is handed over first.
    func withdrawFlashCopy(_ request: FlashCopyRequest) async throws {
        await copyTurnstile.enter()
        defer { copyTurnstile.leave() }
        let members = try members(request.volumes)
        for volume in members {
            guard volume.record.copies.contains(where: { $0.name == request.name }) else {
                throw SiteError("volume '\(volume.name)' has no FlashCopy '\(request.name)'", status: 404)
            }
        }
        for volume in members {
            guard let index = volume.record.copies.firstIndex(where: { $0.name == request.name }) else { continue }
            let id = volume.record.copies[index].id
            volume.record.copies[index].state = .withdrawing
            try volume.recordFile.save(volume.record)
            await publish(volume, group(ofVolume: volume.name))
            let number = volume.number
            volume.reactor.perform { reactor in
                reactor.disconnectReaders(number, of: id)
                reactor.hosted(number).volume.withdrawCopy(id)
            }
        }
        note(nil, "FlashCopy '\(request.name)' of \(request.volumes.joined(separator: ", ")) withdrawn")
    }

    func copyFailed(_ volume: VolumeState, _ id: CopyID, _ errno: Int32) {
        let reason = "old content could not be preserved: \(String(cString: strerror(errno)))"
        if let index = volume.record.copies.firstIndex(where: { $0.id == id }) {
            volume.record.copies[index].state = .failed
            volume.record.copies[index].reason = reason
            do { try volume.recordFile.save(volume.record) } catch { fatalError("farcopy: \(error)") }
        }
        note(nil, "volume \(volume.name): copy \(id) has failed: \(reason)")
        Task { await publish(volume, group(ofVolume: volume.name)) }
    }
}
