// Geometry.swift: a volume's size in bytes and in grains.

import Base

/// Size and grain of a volume. The last grain may be shorter than the others.
package struct Geometry: Sendable, Equatable {
    /// Bytes.
    package let size: UInt64
    /// Bytes; a power of two from 4 KiB to 1 MiB.
    package let grain: Int
    package let grainShift: UInt64

    /// Nil when the grain is not a power of two in its range or the size is zero.
    package init?(size: UInt64, grain: Int) {
        guard size > 0, size <= UInt64(Int64.max), grain.nonzeroBitCount == 1,
            (Limits.minimumGrain...Limits.maximumGrain).contains(grain)
        else { return nil }
        self.size = size
        self.grain = grain
        self.grainShift = UInt64(grain.trailingZeroBitCount)
    }

    /// The smallest grain whose bitmaps stay within `Limits.preferredBitmapBits`.
    package static func defaultGrain(size: UInt64) -> Int {
        var grain = Limits.minimumGrain
        while grain < Limits.maximumGrain, size / UInt64(grain) > UInt64(Limits.preferredBitmapBits) {
            grain <<= 1
        }
        return grain
    }

    @inlinable package var grainCount: Int {
        Int((size &+ (1 << grainShift) &- 1) >> grainShift)
    }

    /// Grains touched by a non-empty byte range.
    @inlinable
    package func grains(offset: UInt64, length: UInt64) -> Range<Int> {
        Int(offset >> grainShift)..<Int((offset &+ length &- 1) >> grainShift) + 1
    }

    /// Word `index` of a bitmap that has the bits of all grains set.
    package func wordOfAll(_ index: Int) -> UInt64 {
        let left = grainCount - index * 64
        return left >= 64 ? .max : left > 0 ? (1 << UInt64(left)) - 1 : 0
    }

    @inlinable package func offset(ofGrain index: Int) -> UInt64 { UInt64(index) << grainShift }

    /// Bytes of a run of grains, cut at the end of the volume.
    @inlinable
    package func byteRange(_ grains: Range<Int>) -> Range<UInt64> {
        offset(ofGrain: grains.lowerBound)..<min(size, offset(ofGrain: grains.upperBound))
    }
}
