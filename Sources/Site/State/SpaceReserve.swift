// SpaceReserve.swift: a file in the state directory that only takes space, given back where something must not fail for want
// of it: a failover, a record that says what is, dropping recovery points.
//
// Must be prevented:
//   a full disk keeps the site from taking over
//   the reserve is taken anew from what it was given back for

import Glibc
import Groups
import Ring

final class SpaceReserve {
    let path: String
    /// As large as what a failover makes: bitmaps of what flows back, and records.
    private let bytes: UInt64
    private(set) var isHeld = false
    private var releasedAt: UInt64?
    /// Once given back it is not taken again for so long.
    private static let restSeconds: UInt64 = 30
    private static let recordBytes: UInt64 = 1 << 20

    /// - Parameter bitmapBytes: of all bitmaps that a failover of every group makes.
    init(directory: String, bitmapBytes: UInt64) {
        path = "\(directory)/reserve"
        bytes = Self.recordBytes + bitmapBytes
    }

    /// Gives the space back to the file system.
    func release() {
        releasedAt = monotonicNanoseconds()
        isHeld = false
        guard let file = try? OpenFile(path: path, flags: O_RDWR) else { return }
        // Flushed, since some file systems hand freed blocks out only once that is on stable storage.
        try? file.truncate(to: 0)
        try? file.synchronize()
    }

    /// Gives it back if the next record may not find room.
    func releaseIfShort() {
        guard isHeld, let space = FileSystem(holding: path), space.availableBytes < Self.recordBytes else { return }
        release()
    }

    /// Takes the space, again where need be; not while it would be the last.
    ///
    /// - Throws: in words for the operator when it is not there.
    func restore() throws {
        guard !isHeld else { return }
        let file = try OpenFile(path: path, flags: O_RDWR | O_CREAT)
        var facts = stat()
        if fstat(file.descriptor, &facts) == 0, UInt64(facts.st_blocks) * 512 >= bytes {
            isHeld = true  // from the last run
            return
        }
        if let releasedAt, monotonicNanoseconds() - releasedAt < Self.restSeconds * 1_000_000_000 { return }
        guard let space = FileSystem(holding: path), space.availableBytes >= 2 * bytes else {
            throw Refusal(
                "\(bytes) bytes for a failover on a full disk cannot be set aside in \(path): fewer than twice as many are free"
            )
        }
        let result = posix_fallocate(file.descriptor, 0, off_t(bytes))
        guard result == 0 else {
            try? file.truncate(to: 0)
            throw SystemError("set aside \(bytes) bytes in \(path)", errno: result)
        }
        try? file.truncate(to: bytes)  // if the site had set more aside before
        isHeld = true
    }
}
