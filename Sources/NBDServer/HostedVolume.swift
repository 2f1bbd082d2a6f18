// HostedVolume.swift: a volume's engine together with the files that its I/O goes to.
//
// Owner: the reactor that hosts it.

import Base
import Ring
import Volumes

package final class HostedVolume {
    package let name: String
    package let volume: Volume
    /// Number of the intake session whose connections may write (role secondary); 0 = none.
    package var intakeSession: UInt64 = 0
    /// What the intake has is a point that is prepared, or is being looked at for that: nothing is written there before it is decided.
    package var intakeIsClosed = false
    /// Whether hosts may write (role primary, or after failover).
    package var writable = false
    /// The reactor drives it in this turn.
    var isAwake = false
    /// Points and FlashCopies that hold acknowledgements just now; the last to release lets them go.
    var holders = 0
    var holdDeadline: UInt64 = 0
    var heldSince: UInt64 = 0
    /// The deadline let go before the holders did: what they take is no closed cut.
    var holdExpired = false

    /// Acknowledged bytes since the start.
    package internal(set) var bytesRead: UInt64 = 0
    package internal(set) var bytesWritten: UInt64 = 0

    struct FileSlot {
        /// -1 = it is closed, and opened again for the next I/O.
        var descriptor: Int32 = -1
        /// It may be closed while nothing uses it.
        var mayRest = false
        /// Memory-backed: calls cannot block, flushes have nothing to do.
        var immediate = false
        /// A flush counts only after another look (`OpenFile.flushProofError`).
        var flushNeedsProof = false
        /// It is mapped, and a flush fails once the mapping is lost.
        var isMapped = false
        /// What transfers must be aligned to when the file is opened with O_DIRECT; 0 = it is not.
        var alignment: UInt32 = 0
        var isDirect: Bool { alignment > 0 }
        var noWaitReads = false
        var noWaitWrites = false
    }
    let slots: UnsafeMutablePointer<FileSlot>
    private var files: [ReopenableFile?]
    /// The same, while they are open here.
    private var opened: [OpenFile?]
    /// Mappings under the engine's bitmaps, kept alive as long as the engine.
    private var mappings: [StoreFile: MappedFile] = [:]
    /// The file of the recording bitmaps.
    package private(set) var recordingFile: StoreFile = -1

    init(_ setup: VolumeSetup, volume: Volume) {
        name = setup.name
        self.volume = volume
        slots = .allocate(capacity: Volume.fileCapacity)
        (files, opened) = ([], [])
        let slot = addFile(setup.source)
        invariant(slot == Volume.source, "the source is the first file")
        recordingFile = addFile(setup.recording.file, mapping: setup.recording)
    }

    deinit { slots.deallocate() }

    /// Gives a file that stays open its number in the block store.
    package func addFile(_ file: OpenFile) -> StoreFile { addFile(ReopenableFile(file)) }

    /// - Parameter mayRest: it is closed while only old copies need it and nobody reads those.
    package func addFile(_ file: ReopenableFile, mapping: MappedFile? = nil, mayRest: Bool = false) -> StoreFile {
        let slot = files.firstIndex { $0 == nil } ?? files.count
        invariant(slot < Volume.fileCapacity, "a volume has room for the files of its copies")
        if slot == files.count {
            files.append(file)
            opened.append(nil)
        } else {
            files[slot] = file
        }
        mappings[StoreFile(slot)] = mapping
        (slots + slot).initialize(to: FileSlot())
        slots[slot].mayRest = mayRest
        if let open = file.openNow { wasOpened(StoreFile(slot), open) }
        return StoreFile(slot)
    }

    /// The file is open from now on.
    func wasOpened(_ slot: StoreFile, _ file: OpenFile) {
        let immediate = file.isOnTmpfs
        opened[Int(slot)] = file
        files[Int(slot)]?.hold(file)
        slots[Int(slot)] = FileSlot(
            descriptor: file.descriptor, mayRest: slots[Int(slot)].mayRest, immediate: immediate,
            flushNeedsProof: file.flushNeedsProof, isMapped: mappings[slot] != nil, alignment: file.directAlignment,
            noWaitReads: !immediate && file.directAlignment == 0,
            noWaitWrites: !immediate && file.directAlignment == 0)
    }

    func path(_ slot: StoreFile) -> String { files[Int(slot)]?.path ?? "" }

    /// Closes the files of old recovery points: all that they have is on stable storage, and nothing uses them just now.
    package func restFiles() {
        volume.forEachIdleOldCopy { copy in
            rest(copy.targetFile)
            rest(copy.bitmapFile)
        }
    }

    /// Of a file that is looked at for holes, which waits for the disk as an opening does; nil = it cannot be opened.
    func descriptor(_ slot: StoreFile) -> Int32? {
        if slots[Int(slot)].descriptor < 0, let file = try? files[Int(slot)]?.open() { wasOpened(slot, file) }
        return slots[Int(slot)].descriptor >= 0 ? slots[Int(slot)].descriptor : nil
    }

    private func rest(_ slot: StoreFile) {
        guard slots[Int(slot)].mayRest, slots[Int(slot)].descriptor >= 0 else { return }
        slots[Int(slot)].descriptor = -1
        opened[Int(slot)] = nil
        files[Int(slot)]?.rest()
    }

    func isLost(_ slot: StoreFile) -> Bool { mappings[slot]?.isLost == true }

    /// A flush of a file has failed: what a mapping has of it is written again by the next.
    func flushFailed(_ slot: StoreFile) { mappings[slot]?.flushFailed() }

    package func removeFile(_ slot: StoreFile) {
        files[Int(slot)] = nil
        opened[Int(slot)] = nil
        slots[Int(slot)] = FileSlot()
        mappings[slot] = nil
    }
}

/// What a reactor needs to host a volume; prepared by the control plane.
package struct VolumeSetup: Sendable {
    package var name: String
    package var geometry: Geometry
    package var source: OpenFile
    /// The two recording bitmaps behind a page that says which is which (`BitmapHeader`).
    package var recording: MappedFile

    package init(name: String, geometry: Geometry, source: OpenFile, recording: MappedFile) {
        self.name = name
        self.geometry = geometry
        self.source = source
        self.recording = recording
    }
}
