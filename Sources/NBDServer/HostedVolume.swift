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
        var descriptor: Int32 = -1
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
    private var files: [OpenFile?]
    /// Mappings under the engine's bitmaps, kept alive as long as the engine.
    private var mappings: [StoreFile: MappedFile] = [:]
    /// The file of the recording bitmaps.
    package private(set) var recordingFile: StoreFile = -1

    init(_ setup: VolumeSetup, volume: Volume) {
        name = setup.name
        self.volume = volume
        slots = .allocate(capacity: Volume.fileCapacity)
        files = []
        let slot = addFile(setup.source)
        invariant(slot == Volume.source, "the source is the first file")
        recordingFile = addFile(setup.recording.file, mapping: setup.recording)
    }

    deinit { slots.deallocate() }

    /// Gives a file its number in the block store.
    package func addFile(_ file: OpenFile, mapping: MappedFile? = nil) -> StoreFile {
        let slot = files.firstIndex { $0 == nil } ?? files.count
        invariant(slot < Volume.fileCapacity, "a volume has room for the files of its copies")
        if slot == files.count { files.append(file) } else { files[slot] = file }
        let immediate = file.isOnTmpfs
        (slots + slot).initialize(
            to: FileSlot(
                descriptor: file.descriptor, immediate: immediate, flushNeedsProof: file.flushNeedsProof,
                isMapped: mapping != nil, alignment: file.directAlignment,
                noWaitReads: !immediate && file.directAlignment == 0,
                noWaitWrites: !immediate && file.directAlignment == 0))
        mappings[StoreFile(slot)] = mapping
        return StoreFile(slot)
    }

    func isLost(_ slot: StoreFile) -> Bool { mappings[slot]?.isLost == true }

    /// A flush of a file has failed: what a mapping has of it is written again by the next.
    func flushFailed(_ slot: StoreFile) { mappings[slot]?.flushFailed() }

    package func removeFile(_ slot: StoreFile) {
        files[Int(slot)] = nil
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
