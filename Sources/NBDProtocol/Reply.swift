// Reply.swift: the fixed parts of replies, written in place.

/// "Simple reply message": 16 bytes, followed by the data of a successful READ.
package enum SimpleReply {
    package static let byteCount = 16

    @inlinable
    package static func encode(error: UInt32, cookie: UInt64, into bytes: UnsafeMutableRawPointer) {
        bytes.storeBigEndian(NBD_SIMPLE_REPLY_MAGIC, at: 0)
        bytes.storeBigEndian(error, at: 4)
        bytes.storeBigEndian(cookie, at: 8)
    }
}

/// "Structured reply chunk message" (20 bytes) and "Extended reply chunk message" (32 bytes).
package struct ReplyChunk: BitwiseCopyable {
    package let style: ReplyStyle
    package let cookie: UInt64
    /// The request's offset, which extended chunks repeat.
    package let offset: UInt64

    @inlinable
    package init(style: ReplyStyle, cookie: UInt64, offset: UInt64) {
        self.style = style
        self.cookie = cookie
        self.offset = offset
    }

    @inlinable package var byteCount: Int { style == .extended ? 32 : 20 }
    /// The longest chunk header with the fixed part of its payload (a hole).
    package static let maximumByteCount = 32 + 12

    /// Writes a header whose payload has `length` bytes.
    @inlinable
    package func encode(type: UInt16, done: Bool, length: Int, into bytes: UnsafeMutableRawPointer) {
        let extended = style == .extended
        bytes.storeBigEndian(extended ? NBD_EXTENDED_REPLY_MAGIC : NBD_STRUCTURED_REPLY_MAGIC, at: 0)
        bytes.storeBigEndian(done ? NBD_REPLY_FLAG_DONE : 0, at: 4)
        bytes.storeBigEndian(type, at: 6)
        bytes.storeBigEndian(cookie, at: 8)
        if extended {
            bytes.storeBigEndian(offset, at: 16)
            bytes.storeBigEndian(UInt64(length), at: 24)
        } else {
            bytes.storeBigEndian(UInt32(length), at: 16)
        }
    }

    /// OFFSET_DATA's fixed part; `count` bytes of data follow. Returns the bytes written.
    @inlinable
    package func encodeData(at position: UInt64, count: Int, done: Bool, into bytes: UnsafeMutableRawPointer) -> Int {
        encode(type: NBD_REPLY_TYPE_OFFSET_DATA, done: done, length: 8 + count, into: bytes)
        bytes.storeBigEndian(position, at: byteCount)
        return byteCount + 8
    }

    /// A whole OFFSET_HOLE chunk. Returns the bytes written.
    @inlinable
    package func encodeHole(at position: UInt64, count: Int, done: Bool, into bytes: UnsafeMutableRawPointer) -> Int {
        encode(type: NBD_REPLY_TYPE_OFFSET_HOLE, done: done, length: 12, into: bytes)
        bytes.storeBigEndian(position, at: byteCount)
        bytes.storeBigEndian(UInt32(count), at: byteCount + 8)
        return byteCount + 12
    }

    /// A whole NONE chunk, which is always the last. Returns the bytes written.
    @inlinable
    package func encodeNone(into bytes: UnsafeMutableRawPointer) -> Int {
        encode(type: NBD_REPLY_TYPE_NONE, done: true, length: 0, into: bytes)
        return byteCount
    }

    /// The longest ERROR chunk that `encodeError` writes.
    package static let maximumErrorByteCount = 32 + 6 + 128

    /// A whole ERROR chunk with its message. Returns the bytes written.
    package func encodeError(_ error: NBDError, into bytes: UnsafeMutableRawPointer) -> Int {
        let message = error.message
        let count = min(message.utf8CodeUnitCount, 128)
        encode(type: NBD_REPLY_TYPE_ERROR, done: true, length: 6 + count, into: bytes)
        bytes.storeBigEndian(error.rawValue, at: byteCount)
        bytes.storeBigEndian(UInt16(count), at: byteCount + 4)
        (bytes + byteCount + 6).copyMemory(from: message.utf8Start, byteCount: count)
        return byteCount + 6 + count
    }
}
