// Bitmap.swift: one bit per grain over memory that somebody else owns (a mapped file, or plain memory in tests).
//
// Bit i is bit (i mod 64) of the little-endian 64-bit word i/64. Bits beyond the count stay zero.
// Owner: the reactor of the volume.

import Base

package struct Bitmap: BitwiseCopyable {
    @usableFromInline let words: UnsafeMutablePointer<UInt64>
    /// Number of bits.
    package let count: Int
    @usableFromInline let wordCount: Int

    /// Bytes of memory that `count` bits take, in whole words.
    package static func byteCount(bits count: Int) -> Int { (count + 63) / 64 * 8 }

    /// `memory` holds at least `byteCount(bits:)` bytes and outlives the bitmap.
    package init(memory: UnsafeMutableRawPointer, count: Int) {
        self.count = count
        wordCount = (count + 63) / 64
        words = memory.bindMemory(to: UInt64.self, capacity: wordCount)
    }

    @inlinable
    package func contains(_ index: Int) -> Bool {
        words[index >> 6] & (1 << UInt64(index & 63)) != 0
    }

    /// The bits of word `word` that lie in `range`.
    @inlinable @inline(__always)
    static func mask(_ range: Range<Int>, word: Int) -> UInt64 {
        var mask = ~UInt64(0)
        if word == range.lowerBound >> 6 { mask &= ~0 << UInt64(range.lowerBound & 63) }
        if word == range.upperBound >> 6 { mask &= (1 << UInt64(range.upperBound & 63)) &- 1 }
        return mask
    }

    @inlinable @inline(__always)
    func words(of range: Range<Int>) -> Range<Int> {
        invariant(
            range.lowerBound >= 0 && range.upperBound <= count, "a bitmap range lies in the bitmap")
        return range.isEmpty ? 0..<0 : range.lowerBound >> 6..<((range.upperBound - 1) >> 6) + 1
    }

    /// Sets a run of bits; returns how many were clear before.
    @inlinable @discardableResult
    package func set(_ range: Range<Int>) -> Int {
        var changed = 0
        for word in words(of: range) {
            let mask = Self.mask(range, word: word)
            let added = mask & ~words[word]
            if added != 0 {
                words[word] |= mask
                changed += added.nonzeroBitCount
            }
        }
        return changed
    }

    /// Clears a run of bits; returns how many were set before.
    @inlinable @discardableResult
    package func clear(_ range: Range<Int>) -> Int {
        var changed = 0
        for word in words(of: range) {
            let mask = Self.mask(range, word: word)
            let removed = mask & words[word]
            if removed != 0 {
                words[word] &= ~mask
                changed += removed.nonzeroBitCount
            }
        }
        return changed
    }

    /// The first set bit in `range`.
    package func firstSet(in range: Range<Int>) -> Int? {
        for word in words(of: range) {
            let bits = words[word] & Self.mask(range, word: word)
            if bits != 0 { return word << 6 | bits.trailingZeroBitCount }
        }
        return nil
    }

    /// The first clear bit in `range`.
    package func firstClear(in range: Range<Int>) -> Int? {
        for word in words(of: range) {
            let bits = ~words[word] & Self.mask(range, word: word)
            if bits != 0 { return word << 6 | bits.trailingZeroBitCount }
        }
        return nil
    }

    /// Number of set bits.
    package func population() -> Int {
        var sum = 0
        for word in 0..<wordCount { sum += words[word].nonzeroBitCount }
        return sum
    }

    /// Sets every bit that is set in `other`; returns how many bits were added.
    package func add(_ other: Bitmap) -> Int {
        invariant(other.count == count, "bitmaps of one volume are alike")
        var added = 0
        for word in 0..<wordCount where other.words[word] & ~words[word] != 0 {
            added += (other.words[word] & ~words[word]).nonzeroBitCount
            words[word] |= other.words[word]
        }
        return added
    }

    /// Sets every bit that is set in `other`.
    package func formUnion(_ other: Bitmap) {
        invariant(other.count == count, "bitmaps of one volume are alike")
        for word in 0..<wordCount where other.words[word] != 0 { words[word] |= other.words[word] }
    }

    /// Becomes what is set in `kept` and not in `removed`, touching only the words that need it.
    package func formDifference(_ kept: Bitmap, _ removed: Bitmap) {
        invariant(kept.count == count && removed.count == count, "bitmaps of one volume are alike")
        for word in 0..<wordCount {
            let bits = kept.words[word] & ~removed.words[word]
            if words[word] != bits { words[word] = bits }
        }
    }

    /// Whether every bit of `range` is set.
    @inlinable
    package func containsAll(_ range: Range<Int>) -> Bool {
        for word in words(of: range) {
            let mask = Self.mask(range, word: word)
            if words[word] & mask != mask { return false }
        }
        return true
    }

    /// Clears all bits, touching only the words that need it.
    package func clearAll() {
        for word in 0..<wordCount where words[word] != 0 { words[word] = 0 }
    }

    package func setAll() { set(0..<count) }
}

extension Bitmap {
    /// The 64 bits of word `index`.
    @inlinable @inline(__always)
    package func word(_ index: Int) -> UInt64 { words[index] }
}
