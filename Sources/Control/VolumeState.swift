// VolumeState.swift: one volume of a site as the control plane holds it.

import Base
import CLibURing
import Glibc
import NBDServer
import Replication
import Ring
import Volumes

/// Files of one FlashCopy or recovery point.
struct CopyFiles: Sendable {
    var target: OpenFile
    var bitmap: MappedFile
    var targetFile: StoreFile
    var bitmapFile: StoreFile
}

final class VolumeState {
    let entry: Configuration.VolumeEntry
    let geometry: Geometry
    let source: OpenFile
    let directory: String
    let reactor: ReactorHandle
    var number: VolumeNumber = -1
    var record: VolumeRecord
    let recordFile: DurableRecord<VolumeRecord>
    let recording: (MappedFile, MappedFile)
    let roles: MappedFile
    let pointTarget: OpenFile
    let pointBitmap: MappedFile
    var pointTargetFile: StoreFile = -1
    var copies: [CopyID: CopyFiles] = [:]
    /// Larger than the order of every copy and point in the chain.
    var nextOrder: UInt64 = 1
    var name: String { entry.name }

    /// Opens the volume's file and its metadata, creating what is new.
    init(_ entry: Configuration.VolumeEntry, state: StateDirectory, reactor: ReactorHandle) throws {
        self.entry = entry
        self.reactor = reactor
        directory = state.volume(entry.name)
        try StateDirectory.makeDirectory(directory)
        try StateDirectory.makeDirectory("\(directory)/copies")
        source = try Self.openSource(entry)
        guard source.tryLock() else {
            throw SiteError("volume '\(entry.name)': \(entry.path) is served by another farcopy process")
        }
        if try source.isRegularFile(), try source.size() == 0, let size = entry.size {
            try source.truncate(to: size)
            try source.synchronize()
        }
        let size = try source.size()
        var found: VolumeRecord?
        recordFile = try DurableRecord(path: "\(directory)/volume.record", value: &found)
        let grain = found?.grain ?? entry.grain ?? Geometry.defaultGrain(size: size)
        guard let geometry = Geometry(size: size, grain: grain) else {
            throw SiteError("volume '\(entry.name)': \(entry.path) has \(size) bytes, which is no volume")
        }
        self.geometry = geometry
        guard size % UInt64(max(1, source.directAlignment)) == 0 else {
            throw SiteError(
                "volume '\(entry.name)': its size \(size) is no multiple of \(source.directAlignment) bytes, which "
                    + "direct I/O needs; remove cache = \"none\"")
        }
        record = found ?? VolumeRecord(id: randomIdentity(), size: size, grain: grain)
        let bytes = Bitmap.byteCount(bits: geometry.grainCount)
        recording = (
            try MappedFile(path: "\(directory)/recording-0.bitmap", byteCount: bytes, create: true),
            try MappedFile(path: "\(directory)/recording-1.bitmap", byteCount: bytes, create: true)
        )
        roles = try MappedFile(path: "\(directory)/roles", byteCount: 4096, create: true)
        pointBitmap = try MappedFile(path: "\(directory)/point.bitmap", byteCount: bytes, create: true)
        pointTarget = try OpenFile(path: "\(directory)/point.target", flags: O_RDWR | O_CREAT)
        if try pointTarget.size() != size { try pointTarget.truncate(to: size) }
        if found == nil { try recordFile.save(record) }
    }

    private static func openSource(_ entry: Configuration.VolumeEntry) throws -> OpenFile {
        let direct = entry.cache == .none ? farcopy_open_direct : 0
        do {
            return try OpenFile(path: entry.path, flags: O_RDWR | O_CREAT | direct)
        } catch {
            guard error.errno == EINVAL, direct != 0 else { throw error }
            throw SiteError(
                "volume '\(entry.name)': the storage of \(entry.path) has no direct I/O; remove cache = \"none\"")
        }
    }

    /// Checks what can be known without touching anything.
    static func check(_ entry: Configuration.VolumeEntry, state: String) throws {
        let what = "volume '\(entry.name)'"
        var facts = stat()
        if stat(entry.path, &facts) == 0 {
            let kind = facts.st_mode & S_IFMT
            guard kind == S_IFREG || kind == S_IFBLK else {
                throw SiteError("\(what): \(entry.path) is neither a file nor a block device")
            }
            guard access(entry.path, R_OK | W_OK) == 0 else {
                throw SiteError("\(what): \(entry.path) cannot be read and written by this user")
            }
            let size = try OpenFile(path: entry.path, flags: O_RDONLY).size()
            if let wanted = entry.size, wanted != size, size != 0 || kind == S_IFBLK {
                throw SiteError(
                    "\(what): \(entry.path) has \(size) bytes, the configuration says \(wanted); correct 'size'")
            }
            if size == 0, entry.size == nil {
                throw SiteError("\(what): \(entry.path) is empty; give 'size'")
            }
            try checkRecorded(entry, size: size == 0 ? entry.size! : size, state: state)
        } else {
            guard entry.size != nil else {
                throw SiteError("\(what): \(entry.path) does not exist; give 'size' to have it created")
            }
            if access("\(state)/volumes/\(entry.name)/volume.record", F_OK) == 0 {
                throw SiteError(
                    "\(what): \(entry.path) is missing, but this site has served it before; bring the file back, "
                        + "or remove \(state)/volumes/\(entry.name) to begin with an empty volume")
            }
            let directory = entry.path.split(separator: "/").dropLast().reduce("") { $0 + "/" + $1 }
            guard access(directory.isEmpty ? "/" : directory, W_OK) == 0 else {
                throw SiteError("\(what): the directory \(directory) does not exist or cannot be written")
            }
        }
    }

    private static func checkRecorded(_ entry: Configuration.VolumeEntry, size: UInt64, state: String) throws {
        let path = "\(state)/volumes/\(entry.name)/volume.record"
        guard access(path, F_OK) == 0 else { return }
        var found: VolumeRecord?
        _ = try DurableRecord(path: path, value: &found)
        guard let found else { return }
        if found.size != size {
            throw SiteError(
                "volume '\(entry.name)': \(entry.path) has \(size) bytes, but had \(found.size) when it was served last; "
                    + "is it another file?")
        }
        if let grain = entry.grain, grain != found.grain {
            throw SiteError(
                "volume '\(entry.name)': the grain is \(found.grain) and cannot be changed to \(grain) without a new "
                    + "first copy; remove 'grain', or the directory \(state)/volumes/\(entry.name)")
        }
    }

    /// Opens, or makes, the files of a copy.
    func openCopy(_ id: CopyID, create: Bool) throws -> (target: OpenFile, bitmap: MappedFile) {
        let base = "\(directory)/copies/\(id)"
        if create {
            // Left over from an attempt that was not recorded.
            unlink("\(base).target")
            unlink("\(base).bitmap")
        }
        let target = try OpenFile(path: "\(base).target", flags: create ? O_RDWR | O_CREAT : O_RDWR)
        if create { try target.truncate(to: geometry.size) }
        let bitmap = try MappedFile(
            path: "\(base).bitmap", byteCount: Bitmap.byteCount(bits: geometry.grainCount), create: create)
        return (target, bitmap)
    }

    func removeCopyFiles(_ id: CopyID) {
        copies[id] = nil
        unlink("\(directory)/copies/\(id).target")
        unlink("\(directory)/copies/\(id).bitmap")
    }

    func takeOrder() -> UInt64 {
        nextOrder += 1
        return nextOrder - 1
    }

    func synchronize() throws {
        try source.synchronize()
        for mapping in [recording.0, recording.1, roles, pointBitmap] { try mapping.synchronize() }
        try pointTarget.synchronize()
        for files in copies.values {
            try files.target.synchronize()
            try files.bitmap.synchronize()
        }
    }

    var setup: VolumeSetup {
        VolumeSetup(
            name: name, geometry: geometry, source: source, recordingMappings: recording,
            rolesMapping: roles)
    }
}
