// FlashCopyChanges.swift: `farcopy flashcopy clone | refresh`.

import API
import FlashCopies
import Groups
import Volumes

extension FlashCopies {
    // MARK: Clone

    /// Takes FlashCopies of what other FlashCopies, or recovery points, hold.
    ///
    /// - Parameter own: the name is one of the site's own.
    package func cloneFlashCopy(_ request: FlashCopyRequest, own: Bool = false) async throws -> [FlashCopyReport] {
        await home.copyTurnstile.enter()
        defer { home.copyTurnstile.leave() }
        guard let origin = request.of else { throw Refusal("a clone needs 'of', a FlashCopy's name", .misuse) }
        let members = try home.members(request.volumes)
        if !own { try checkCopyName(request.name) }
        try checkTargets(request)
        try requireDescriptors(forCopies: members.count)
        let origins = try members.map { try chainPlace($0, origin) }
        for (volume, found) in zip(members, origins) {
            try checkFree(request.name, volume)
            guard request.durable != true || found.isDurable else {
                throw Refusal(
                    "a clone of '\(origin)' cannot be durable, since it reads through '\(origin)', which is not")
            }
        }
        try await patiently(request.name) {
            try await self.executor.run(TakeCopies(self.drafts(request, members, origins)), on: members)
        }
        home.note(
            nil, "FlashCopy '\(request.name)' of '\(origin)' of \(request.volumes.joined(separator: ", ")) created")
        return try await reports(request.name, members)
    }

    /// A FlashCopy by name, or a recovery point by number.
    func chainPlace(_ volume: VolumeState, _ name: String) throws -> CopyDraft.Origin {
        if let point = UInt64(name),
            let known = home.group(ofVolume: volume.name)?.record,
            known.points.contains(where: { $0.number == point && $0.isFailed != true }),
            let carrier = known.carrier(of: point, volume.name).flatMap(known.pointRecord)
        {
            return CopyDraft.Origin(
                id: CopyID(carrier.number), name: name, order: carrier.chainOrder, isDurable: true)
        }
        let record = try copies(name, [volume])[0].1
        guard record.state == .active else {
            throw Refusal(
                "FlashCopy '\(name)' of volume '\(volume.name)' is \(record.state.rawValue) and cannot be cloned")
        }
        return CopyDraft.Origin(id: record.id, name: name, order: record.order, isDurable: record.isDurable)
    }

    // MARK: Refresh

    /// Takes FlashCopies anew, of this instant; with a background copy, only what changed on either side is copied.
    package func refreshFlashCopy(_ request: FlashCopyRequest) async throws -> [FlashCopyReport] {
        await home.copyTurnstile.enter()
        defer { home.copyTurnstile.leave() }
        let members = try home.members(request.volumes)
        for (volume, record) in try copies(request.name, members) {
            try home.checkNotRestoring(volume)
            guard record.state != .withdrawing else {
                throw Refusal("FlashCopy '\(request.name)' of volume '\(volume.name)' is being withdrawn")
            }
            try checkNotSecondary(volume, "; clone one of its recovery points instead")
        }
        // Before anything is frozen, since it may take a while.
        let ids = try copies(request.name, members).map(\.1.id)
        try await executor.run(TakeOutOfUse(ids, volumes: request.volumes), on: members)
        do {
            try await hooks.frozen(members, request.name) {
                try await self.patiently(request.name) {
                    let ids = try self.copies(request.name, members).map(\.1.id)
                    try await self.executor.run(
                        RetakeCopies(ids, name: request.name, volumes: request.volumes), on: members)
                }
            }
        } catch {
            throw Refusal(
                "\(error); what FlashCopy '\(request.name)' held is not kept any more since its refresh began: refresh it again, or "
                    + "withdraw it", (error as? Refusal)?.kind ?? .failed)
        }
        home.note(nil, "FlashCopy '\(request.name)' of \(request.volumes.joined(separator: ", ")) taken anew")
        return try await reports(request.name, members)
    }
}
