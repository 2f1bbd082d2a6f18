// OpenFile.swift: files, block devices and mappings, closed when their last owner lets go.

import CLibURing
import Glibc
import Synchronization

/// An open descriptor.
package final class OpenFile: Sendable {
    package let descriptor: Int32
    package let path: String
    /// What offsets, lengths and memory must be aligned to, in bytes, when the page cache is passed by; else 0.
    package let directAlignment: UInt32
    /// Its storage is memory: calls do not block, and there is nothing to flush. False for devices.
    package let isOnTmpfs: Bool
    /// A flush that succeeds counts only once `flushProofError` says so: ext2, ext3, ext4.
    package let flushNeedsProof: Bool
    private static let count = Atomic(0)
    /// How many there are in the process.
    package static var openCount: Int { count.load(ordering: .relaxed) }

    package init(descriptor: Int32, path: String) {
        Self.count.add(1, ordering: .relaxed)
        self.descriptor = descriptor
        self.path = path
        let type = farcopy_storage_type(descriptor)
        isOnTmpfs = type == farcopy_type_tmpfs
        flushNeedsProof = type == farcopy_type_ext
        // On tmpfs the page cache is the storage.
        directAlignment = isOnTmpfs ? 0 : farcopy_direct_alignment(descriptor)
    }

    /// Opens with `flags | O_CLOEXEC`; new files get mode 0600.
    package convenience init(path: String, flags: Int32) throws(SystemError) {
        var descriptor: Int32
        repeat {
            descriptor = open(path, flags | O_CLOEXEC, 0o600)
        } while descriptor < 0 && errno == EINTR
        guard descriptor >= 0 else { throw SystemError("open \(path)") }
        self.init(descriptor: descriptor, path: path)
    }

    /// Opens what holds the data of a volume, or takes that of a copy; a file that is not there is made, empty.
    ///
    /// A block device is claimed (`O_EXCL`, open(2)): it cannot be mounted meanwhile, nor taken by another program that claims it.
    ///
    /// - Parameters:
    ///   - flags: added to `O_RDWR`.
    ///   - claim: false leaves a device to whoever else has it.
    ///   - waitMilliseconds: how long a device that is claimed is tried again: the kernel lets go of what the ring of a killed process
    ///     had a little after the process has ended.
    /// - Throws: EBUSY when a device is mounted or claimed by another.
    package static func storage(
        path: String, flags: Int32 = 0, claim: Bool = true, waitMilliseconds: Int = 0
    ) throws(SystemError) -> OpenFile {
        var facts = stat()
        guard stat(path, &facts) == 0, facts.st_mode & S_IFMT == S_IFBLK else {
            return try OpenFile(path: path, flags: O_RDWR | O_CREAT | flags)
        }
        var left = waitMilliseconds
        while true {
            do {
                return try OpenFile(path: path, flags: O_RDWR | flags | (claim ? O_EXCL : 0))
            } catch {
                guard error.errno == EBUSY, left > 0 else { throw error }
                usleep(20_000)
                left -= 20
            }
        }
    }

    deinit {
        close(descriptor)
        Self.count.subtract(1, ordering: .relaxed)
    }

    private func status() throws(SystemError) -> stat {
        var facts = stat()
        guard fstat(descriptor, &facts) == 0 else { throw SystemError("stat \(path)") }
        return facts
    }

    package func isBlockDevice() throws(SystemError) -> Bool {
        try status().st_mode & S_IFMT == S_IFBLK
    }

    package func isRegularFile() throws(SystemError) -> Bool {
        try status().st_mode & S_IFMT == S_IFREG
    }

    /// Bytes of a file or block device.
    package func size() throws(SystemError) -> UInt64 {
        let facts = try status()
        guard facts.st_mode & S_IFMT == S_IFBLK else { return UInt64(facts.st_size) }
        var bytes: UInt64 = 0
        let result = farcopy_block_device_size(descriptor, &bytes)
        guard result == 0 else { throw SystemError("read the size of \(path)", errno: -result) }
        return bytes
    }

    /// What tells one regular file from another at the same path: a file that was put in its place has another identity.
    package struct Identity: Codable, Sendable, Equatable {
        package var inode: UInt64
        /// Nanoseconds since 1970; 0 = the file system does not tell.
        package var bornAt: Int64
    }

    /// Nil for block devices, whose numbers change from boot to boot.
    package func identity() throws(SystemError) -> Identity? {
        let facts = try status()
        guard facts.st_mode & S_IFMT == S_IFREG else { return nil }
        return Identity(inode: UInt64(facts.st_ino), bornAt: farcopy_birth_time(descriptor))
    }

    /// When the contents changed last, in nanoseconds since 1970; nil for block devices.
    package func modifiedAt() throws(SystemError) -> Int64? {
        let facts = try status()
        guard facts.st_mode & S_IFMT == S_IFREG else { return nil }
        return Int64(facts.st_mtim.tv_sec) * 1_000_000_000 + Int64(facts.st_mtim.tv_nsec)
    }

    package func truncate(to size: UInt64) throws(SystemError) {
        guard ftruncate(descriptor, off_t(size)) == 0 else {
            throw SystemError("set the size of \(path)")
        }
    }

    package func synchronize() throws(SystemError) {
        guard fdatasync(descriptor) == 0 else { throw SystemError("flush \(path)") }
        try proveFlush()
    }

    fileprivate func proveFlush() throws(SystemError) {
        guard flushNeedsProof else { return }
        let error = Self.flushProofError(descriptor)
        guard error == 0 else { throw SystemError("flush \(path)", errno: error) }
    }

    /// Why a flush of a file on ext4 that has just succeeded does not count all the same; 0 = it does.
    ///
    /// While its journal is aborted (the disk has failed, or the file system was shut down), ext4 lets a flush succeed although blocks
    /// that were written for the first time are not the file's: `ext4_end_io_end` drops the error of
    /// `ext4_convert_unwritten_extents` (fs/ext4/page-io.c), and `jbd2_complete_transaction` takes a transaction that is gone for a
    /// committed one (fs/jbd2/journal.c). The next transaction that anybody begins finds that out, so one is begun.
    package static func flushProofError(_ descriptor: Int32) -> Int32 {
        flushProofError(descriptor, outcome: farcopy_prove(descriptor))
    }

    /// - Parameter outcome: a negative errno, what `Ring.proveFlush` has brought.
    package static func flushProofError(_ descriptor: Int32, outcome: Int32) -> Int32 {
        switch -outcome {
        case ENODATA: 0
        case EIO, EROFS: -outcome
        // Attributes are switched off, or the kernel's ring has no call for them.
        default: farcopy_file_system_error(descriptor)
        }
    }

    /// Reserves storage for a range, so that writing there does not fail for want of space (fallocate(2)); the size stays. File systems
    /// that cannot are left as they are.
    package func reserve(_ range: Range<Int>) throws(SystemError) {
        var result: Int32
        repeat {
            result = farcopy_reserve(descriptor, off_t(range.lowerBound), off_t(range.count))
        } while result == -EINTR
        guard result == 0 || result == -EOPNOTSUPP || result == -ENOSYS else {
            throw SystemError("reserve \(range.count) bytes for \(path)", errno: -result)
        }
    }

    package func readAll() throws(SystemError) -> [UInt8] { try read(at: 0, count: Int(try size())) }

    /// Fills `buffer`.
    ///
    /// - Throws: EIO when the file ends before.
    package func readAll(_ buffer: UnsafeMutableRawPointer, _ count: Int, at offset: UInt64) throws(SystemError) {
        var done = 0
        while done < count {
            let moved = pread(descriptor, buffer + done, count - done, off_t(offset) + off_t(done))
            if moved < 0, errno == EINTR { continue }
            guard moved > 0 else { throw SystemError("read \(path)", errno: moved == 0 ? EIO : errno) }
            done += moved
        }
    }

    /// As much of the range as there is.
    package func read(at offset: Int, count: Int) throws(SystemError) -> [UInt8] {
        var bytes = [UInt8](repeating: 0, count: count)
        var done = 0
        while done < bytes.count {
            let moved = bytes.withUnsafeMutableBytes {
                pread(descriptor, $0.baseAddress! + done, $0.count - done, off_t(offset + done))
            }
            if moved < 0, errno == EINTR { continue }
            guard moved >= 0 else { throw SystemError("read \(path)") }
            if moved == 0 { break }
            done += moved
        }
        return Array(bytes[..<done])
    }

    package func write(_ bytes: [UInt8], at offset: Int) throws(SystemError) {
        var done = 0
        while done < bytes.count {
            let count = bytes.withUnsafeBytes {
                pwrite(descriptor, $0.baseAddress! + done, $0.count - done, off_t(offset + done))
            }
            if count < 0, errno == EINTR { continue }
            guard count > 0 else { throw SystemError("write \(path)") }
            done += count
        }
    }

    /// An extended attribute (xattr(7)); nil = there is none.
    package func attribute(_ name: String) throws(SystemError) -> [UInt8]? {
        var bytes = [UInt8](repeating: 0, count: Self.attributeBytes)
        let count = fgetxattr(descriptor, name, &bytes, bytes.count)
        if count < 0 {
            guard errno == ENODATA || errno == EOPNOTSUPP else {
                throw SystemError("read the attribute \(name) of \(path)")
            }
            return nil
        }
        return Array(bytes[..<count])
    }

    /// Sets an attribute, durably.
    package func setAttribute(_ name: String, _ bytes: [UInt8]) throws(SystemError) {
        guard fsetxattr(descriptor, name, bytes, bytes.count, 0) == 0 else {
            throw SystemError("set the attribute \(name) of \(path)")
        }
        try synchronizeWhole()
    }

    /// Removes an attribute, durably; one that is not there is removed.
    package func removeAttribute(_ name: String) throws(SystemError) {
        guard fremovexattr(descriptor, name) == 0 else {
            guard errno == ENODATA || errno == EOPNOTSUPP else {
                throw SystemError("remove the attribute \(name) of \(path)")
            }
            return
        }
        try synchronizeWhole()
    }

    /// As `synchronize`, and what fdatasync leaves out: attributes, the entries of a directory.
    fileprivate func synchronizeWhole() throws(SystemError) {
        guard fsync(descriptor) == 0 else { throw SystemError("flush \(path)") }
        try proveFlush()
    }

    /// The longest that there are (XATTR_SIZE_MAX).
    private static let attributeBytes = 65536

    /// Forgets what the page cache has of the file and storage may not have, although it is called clean: after a write-back that failed.
    package func dropCache() { _ = posix_fadvise(descriptor, 0, 0, Int32(POSIX_FADV_DONTNEED)) }

    /// Reads all data of the file into the page cache.
    ///
    /// - Throws: what cannot be read.
    package func readThrough() throws(SystemError) {
        let size = try size()
        var offset: UInt64 = 0
        while let start = nextData(from: offset), start < size {
            let count = try read(at: Int(start), count: Int(min(1 << 20, size - start))).count
            guard count > 0 else { return }
            offset = start + UInt64(count)
        }
    }

    /// Where the next data at or behind an offset lies; nil = only a hole follows.
    package func nextData(from offset: UInt64) -> UInt64? {
        let found = lseek(descriptor, off_t(offset), SEEK_DATA)
        if found >= 0 { return UInt64(found) }
        return errno == ENXIO ? nil : offset
    }

    /// Takes an exclusive lock that lasts as long as the descriptor; false when another process has it.
    package func tryLock() -> Bool { flock(descriptor, LOCK_EX | LOCK_NB) == 0 }
}

/// A file that is closed while nobody needs it, and opened again by whoever does.
package final class ReopenableFile: Sendable {
    package let path: String
    private let held: Mutex<OpenFile?>

    package init(_ file: OpenFile) {
        path = file.path
        held = Mutex(file)
    }

    package var isOpen: Bool { openNow != nil }
    /// Nil while it is closed.
    package var openNow: OpenFile? { held.withLock { $0 } }

    /// It stays open as long as somebody has what this gives.
    package func open() throws(SystemError) -> OpenFile {
        if let file = openNow { return file }
        return try OpenFile(path: path, flags: O_RDWR)
    }

    /// From now on it is open.
    package func hold(_ file: OpenFile) { held.withLock { $0 = file } }
    /// Closes it, unless somebody still has it.
    package func rest() { held.withLock { $0 = nil } }
}

/// A file mapped shared and writable: what is stored survives the process, and the machine once flushed.
package final class MappedFile: @unchecked Sendable {
    // Safe because: the mapping is fixed at init; who may store to which part is the business of the owner
    // (a volume's reactor, once the mapping was handed to it).
    /// The mapping needs it no more; flushes look at it on file systems that want a proof.
    package let file: ReopenableFile
    private let flushNeedsProof: Bool
    package let memory: UnsafeMutableRawPointer
    package let byteCount: Int
    private let markOffset: Int
    private let guarded: Int?

    /// Opens or creates the file with exactly `byteCount` bytes; where new, zeros, with storage for all of them.
    ///
    /// - Throws: when an existing file has another size: it belongs to a volume of another size or grain.
    /// - Parameter markOffset: where a word of the file, of no other use, says that a flush of it has failed (`flushFailed`); 0 = nowhere.
    package init(path: String, byteCount: Int, create: Bool, markOffset: Int = 0) throws(SystemError) {
        let file = try OpenFile(path: path, flags: create ? O_RDWR | O_CREAT : O_RDWR)
        let present = try file.size()
        if present == 0, create {
            try file.truncate(to: UInt64(byteCount))
            try Self.allocate(file, byteCount)
        } else if present != UInt64(byteCount) {
            throw SystemError(
                "map \(path): it has \(present) bytes instead of \(byteCount)", errno: EINVAL)
        }
        let memory = mmap(nil, byteCount, PROT_READ | PROT_WRITE, MAP_SHARED, file.descriptor, 0)
        guard let memory, memory != MAP_FAILED else { throw SystemError("map \(path)") }
        self.file = ReopenableFile(file)
        flushNeedsProof = file.flushNeedsProof
        self.memory = memory
        self.byteCount = byteCount
        self.markOffset = markOffset
        guarded = GuardedMappings.add(memory, byteCount)
        // A process before this one may have ended before it could flush again.
        if isMarked { flushFailed() }
    }

    deinit {
        if let guarded { GuardedMappings.remove(guarded) }
        munmap(memory, byteCount)
    }

    /// The file system did not take a store: what is in memory is in no file any more, and no flush of it succeeds.
    package var isLost: Bool { guarded.map { GuardedMappings.isLost($0) } ?? false }

    /// What the file itself says: a flush of it has failed.
    private var isMarked: Bool {
        get { markOffset > 0 && (memory + markOffset).load(as: UInt64.self) != 0 }
        set { if markOffset > 0 { (memory + markOffset).storeBytes(of: newValue ? 1 : 0, as: UInt64.self) } }
    }

    /// Files up to here are written with zeroes when they are made; in larger ones space is only reserved.
    private static let writtenBytes = 16 << 20

    /// Storage for all of a new file. Blocks that were only reserved become the file's when they are written first, and ext4 forgets to
    /// do that when the first write fails and a second succeeds; so they are written now.
    private static func allocate(_ file: OpenFile, _ byteCount: Int) throws(SystemError) {
        guard byteCount <= writtenBytes else { return try file.reserve(0..<byteCount) }
        let zeroes = [UInt8](repeating: 0, count: min(byteCount, 1 << 20))
        var offset = 0
        while offset < byteCount {
            let count = min(zeroes.count, byteCount - offset)
            try file.write(count == zeroes.count ? zeroes : Array(zeroes[..<count]), at: offset)
            offset += count
        }
    }

    package func synchronize() throws(SystemError) {
        guard !isLost else { throw SystemError("flush \(file.path)", errno: EIO) }
        do throws(SystemError) {
            guard msync(memory, byteCount, MS_SYNC) == 0 else { throw SystemError("flush \(file.path)") }
            if flushNeedsProof { try file.open().proveFlush() }
        } catch {
            flushFailed()
            throw error
        }
        if isMarked { isMarked = false }
    }

    /// A flush of the file has failed. The kernel tells that once and calls the pages clean, so the next flush would succeed and write
    /// nothing: all are made dirty again. Should this process end before that flush, the next one finds the mark.
    package func flushFailed() {
        // Otherwise nothing can be written.
        guard !isLost, let file = try? file.open(), OpenFile.flushProofError(file.descriptor) == 0 else { return }
        isMarked = true
        farcopy_make_dirty(memory, byteCount)
    }
}

/// Anonymous memory for a pool, aligned to pages; pages cost nothing until they are touched.
package final class PoolMemory: @unchecked Sendable {
    // Safe because: the region is fixed at init and used by the one thread that owns the pool over it.
    package let memory: UnsafeMutableRawPointer
    package let byteCount: Int

    package init(byteCount: Int) throws(SystemError) {
        let memory = mmap(
            nil, byteCount, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
            -1, 0)
        guard let memory, memory != MAP_FAILED else {
            throw SystemError("reserve \(byteCount) bytes for buffers")
        }
        self.memory = memory
        self.byteCount = byteCount
    }

    deinit { munmap(memory, byteCount) }
}

/// Whether there is something at a path.
///
/// - Throws: when that cannot be told: what cannot be looked at is not missing.
package func exists(_ path: String) throws(SystemError) -> Bool {
    if access(path, F_OK) == 0 { return true }
    guard errno == ENOENT || errno == ENOTDIR else { throw SystemError("look for \(path)") }
    return false
}

/// The directory that an absolute path lies in.
package func parentDirectory(_ path: String) -> String {
    let directory = path.split(separator: "/").dropLast().reduce("") { $0 + "/" + $1 }
    return directory.isEmpty ? "/" : directory
}

/// Makes the entries of a directory durable.
package func synchronizeDirectory(_ path: String) throws(SystemError) {
    try OpenFile(path: path, flags: O_RDONLY | O_DIRECTORY).synchronizeWhole()
}
