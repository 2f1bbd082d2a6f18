// BitmapHeader.swift: the first page of every bitmap file and of the activity log: whose it is.
//
// All little-endian:
//   0  magic "FARCOPYB"     8  format (32), now 1     12  kind (32)
//   16 the volume's identity, 16 bytes                32  copy or point (64), 0 = none
//   40 size of the volume in bytes (64)               48  grain in bytes (32)
//   52 number of bitmaps in the file (32)             56  bytes from one bitmap to the next (64)
//   64 CRC-32C of bytes 0 to 63 (32)
//   128 recording bitmaps: which of the two records changes (64); 136 the point that the other one is of (64), 0 = none.
//       Both change while the file is in use.
//       144: 1 once a flush of the volume's own file has failed (64)
//   152 all: 1 once a flush of this file has failed, until one succeeds (64)
//   128 change: 1 while all that `advanced` says was committed (64)
//   128 copies: 1 once the copy has taken over the target of the one that it refreshes (64); 136: 1 once it has failed (64)
// The bitmaps begin at 4096.
//
// Must be prevented: bits of another volume, of another grain, or of a newer format are taken for this volume's.

import Base

package struct BitmapHeader: Sendable, Equatable {
    package enum Kind: UInt32, Sendable { case recording = 1, point, copy, restore, activityLog, change }

    package static let byteCount = 4096
    package static let rolesOffset = 128
    package static let takenOffset = 128
    package static let committedOffset = 128
    package static let failedOffset = 136
    package static let sourceLostOffset = 144
    package static let flushFailedOffset = 152
    package static let currentFormat: UInt32 = 1
    private static let magic: UInt64 = 0x4259_504F_4352_4146  // "FARCOPYB"

    package var kind: Kind
    package var volume: (UInt64, UInt64)
    package var copy: CopyID = 0
    package var size: UInt64
    package var grain: UInt32
    package var bitmaps: UInt32
    package var bitmapBytes: UInt64

    package init(_ kind: Kind, volume: (UInt64, UInt64), geometry: Geometry, copy: CopyID = 0, bitmaps: Int = 1) {
        self.kind = kind
        self.volume = volume
        self.copy = copy
        size = geometry.size
        grain = UInt32(geometry.grain)
        self.bitmaps = UInt32(bitmaps)
        if kind == .activityLog {
            let sectors = ActivityLog.sectors(of: ActivityLog.layout(size: geometry.size).count)
            bitmapBytes = UInt64(sectors * ActivityLog.sectorBytes)
        } else {
            bitmapBytes = UInt64((Bitmap.byteCount(bits: geometry.grainCount) + 4095) & ~4095)
        }
    }

    /// Bytes of the whole file.
    package var fileBytes: Int { Self.byteCount + Int(bitmaps) * Int(bitmapBytes) }

    package func offset(ofBitmap index: Int) -> Int { Self.byteCount + index * Int(bitmapBytes) }

    package static func == (one: BitmapHeader, other: BitmapHeader) -> Bool { one.encoded == other.encoded }

    package var encoded: [UInt8] {
        var bytes: [UInt8] = []
        func add(_ value: some FixedWidthInteger) { withUnsafeBytes(of: value.littleEndian) { bytes += $0 } }
        add(Self.magic)
        add(Self.currentFormat)
        add(kind.rawValue)
        add(volume.0)
        add(volume.1)
        add(copy)
        add(size)
        add(grain)
        add(bitmaps)
        add(bitmapBytes)
        add(CRC32C.checksum(bytes))
        return bytes
    }

    package enum Fault: Error, Equatable {
        /// No header at all, or one that does not match its checksum.
        case damaged
        case newer(format: UInt32)
    }

    package init(_ bytes: UnsafeRawBufferPointer) throws(Fault) {
        guard bytes.count >= 68 else { throw .damaged }
        func load<Value: FixedWidthInteger>(_ offset: Int, as type: Value.Type) -> Value {
            Value(littleEndian: bytes.loadUnaligned(fromByteOffset: offset, as: Value.self))
        }
        guard load(0, as: UInt64.self) == Self.magic,
            CRC32C.checksum(UnsafeRawBufferPointer(rebasing: bytes[..<64])) == load(64, as: UInt32.self)
        else { throw .damaged }
        let format = load(8, as: UInt32.self)
        guard format == Self.currentFormat else { throw .newer(format: format) }
        guard let kind = Kind(rawValue: load(12, as: UInt32.self)) else { throw .damaged }
        self.kind = kind
        volume = (load(16, as: UInt64.self), load(24, as: UInt64.self))
        copy = load(32, as: CopyID.self)
        size = load(40, as: UInt64.self)
        grain = load(48, as: UInt32.self)
        bitmaps = load(52, as: UInt32.self)
        bitmapBytes = load(56, as: UInt64.self)
    }
}
