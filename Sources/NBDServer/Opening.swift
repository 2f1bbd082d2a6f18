// Opening.swift: files of old recovery points are closed until somebody reads them; the I/O that needs one waits until the ring has opened it.
//
// Must be prevented:
//   old content is lost, or a reader fails, because the process had no descriptor left for a moment

import Base
import Glibc
import Ring
import Volumes

struct Opening {
    var volume: VolumeNumber
    var file: StoreFile
    /// For the kernel, until it has answered.
    var path: UnsafeMutablePointer<CChar>
    var waiting: [StoreIO]
    /// While there are no descriptors: when it is tried again, and when it is given up.
    var retryAt: UInt64 = 0
    var deadline: UInt64 = 0
}

extension Reactor {
    private static let retryNanoseconds: UInt64 = 100_000_000
    private static let patienceNanoseconds: UInt64 = 10_000_000_000

    func openFirst(_ io: StoreIO, _ number: VolumeNumber, _ hosted: HostedVolume) {
        if let index = openings.firstIndex(where: { $0?.volume == number && $0?.file == io.file }) {
            openings[index]!.waiting.append(io)
            return
        }
        guard let path = strdup(hosted.path(io.file)) else { return hosted.volume.complete(io, errno: ENOMEM) }
        let opening = Opening(volume: number, file: io.file, path: path, waiting: [io])
        let index = openings.firstIndex { $0 == nil } ?? openings.count
        if index == openings.count { openings.append(opening) } else { openings[index] = opening }
        submitOpening(index)
    }

    private func submitOpening(_ index: Int) {
        openings[index]!.retryAt = 0
        ring.open(
            openings[index]!.path, UserData(kind: CompletionKind.opened, generation: 0, slot: UInt32(index)))
    }

    func fileOpened(_ index: Int, _ result: Int32) {
        guard let opening = openings[index] else { return }
        let now = monotonicNanoseconds()
        if [EMFILE, ENFILE, EINTR].contains(-result), opening.deadline == 0 || now < opening.deadline {
            if opening.deadline == 0 { openings[index]!.deadline = now + Self.patienceNanoseconds }
            openings[index]!.retryAt = now + Self.retryNanoseconds
            return
        }
        openings[index] = nil
        free(opening.path)
        while case .some(.none) = openings.last { openings.removeLast() }
        let hosted = hosted(opening.volume)
        if result >= 0 {
            hosted.wasOpened(opening.file, OpenFile(descriptor: result, path: hosted.path(opening.file)))
        }
        for io in opening.waiting {
            if result >= 0 {
                startStore(io, opening.volume, hosted)
            } else {
                hosted.volume.complete(io, errno: -result)
            }
        }
    }

    func retryOpenings(_ now: UInt64) {
        for index in openings.indices {
            if let opening = openings[index], opening.retryAt > 0, now >= opening.retryAt { submitOpening(index) }
        }
    }
}
