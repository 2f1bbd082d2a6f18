// OptionData.swift: the data of options, read without trusting any length in it.

import Base

/// A cursor over an option's data; every read says nil where the data ends too early.
struct OptionData {
    private let bytes: [UInt8]
    private var position = 0

    init(_ bytes: [UInt8]) { self.bytes = bytes }

    var isAtEnd: Bool { position == bytes.count }

    mutating func integer<T: FixedWidthInteger & BitwiseCopyable>(_ type: T.Type) -> T? {
        let size = T.bitWidth / 8
        guard bytes.count - position >= size else { return nil }
        let value = bytes.withUnsafeBytes { $0.baseAddress!.loadBigEndian(T.self, at: position) }
        position += size
        return value
    }

    /// A string after its 32-bit length; nil also when it is too long, holds a NUL, or is not UTF-8.
    mutating func string() -> String? {
        guard let length = integer(UInt32.self), Int(length) <= bytes.count - position else { return nil }
        let text = Self.string(bytes[position..<position + Int(length)])
        position += Int(length)
        return text
    }

    static func string(_ bytes: ArraySlice<UInt8>) -> String? {
        guard bytes.count <= Limits.maximumNameLength, !bytes.contains(0) else { return nil }
        return String(validating: bytes, as: UTF8.self)
    }
}

/// The data of INFO and GO: a name and the infos asked for.
struct InfoQuery {
    let name: String
    let asked: Set<UInt16>

    /// Nil unless the lengths agree with each other and with the option's.
    init?(_ bytes: [UInt8]) {
        var data = OptionData(bytes)
        guard let name = data.string(), let count = data.integer(UInt16.self) else { return nil }
        var asked: Set<UInt16> = []
        for _ in 0..<count {
            guard let info = data.integer(UInt16.self) else { return nil }
            asked.insert(info)
        }
        guard data.isAtEnd else { return nil }
        self.name = name
        self.asked = asked
    }
}

/// The data of LIST_META_CONTEXT and SET_META_CONTEXT: a name and queries.
struct MetaContextQuery {
    let name: String
    private let queries: [String]

    /// Nil unless the lengths agree with each other and with the option's.
    init?(_ bytes: [UInt8]) {
        var data = OptionData(bytes)
        guard let name = data.string(), let count = data.integer(UInt32.self) else { return nil }
        var queries: [String] = []
        for _ in 0..<count {
            // Nothing is reserved by the claimed count; the data runs out first.
            guard let query = data.string() else { return nil }
            queries.append(query)
        }
        guard data.isAtEnd else { return nil }
        self.name = name
        self.queries = queries
    }

    /// What LIST shows: everything without a query; a query that ends at a ':' stands for all below it.
    func listed(of available: [String]) -> [String] {
        if queries.isEmpty { return available }
        return available.filter { context in
            queries.contains { $0 == context || ($0.hasSuffix(":") && context.hasPrefix($0)) }
        }
    }

    /// What SET selects: exact names, each once; whatever else is asked for is ignored.
    func selected(of available: [String]) -> [String] { available.filter { queries.contains($0) } }
}
