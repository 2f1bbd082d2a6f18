// Endpoint.swift: one call of the control API, as its server and its clients both know it.

import Base

/// Method, path, what goes in and what comes out.
package struct Endpoint<Body: Codable & Sendable, Answer: Codable & Sendable>: Sendable {
    package let call: APICall

    init(
        _ method: APICall.Method, _ path: String, _ caller: APICall.Caller, seconds: Int64 = 30,
        whileStarting: Bool = false,
        _ query: APICall.Query...
    ) {
        call = APICall(
            method: method, path: path, caller: caller, query: query, seconds: seconds,
            servedWhileStarting: whileStarting)
    }
}

/// What there is to know of a call without its types.
package struct APICall: Sendable, Equatable {
    package enum Method: String, Sendable { case get = "GET", post = "POST", delete = "DELETE" }

    package enum Caller: Sendable {
        /// It shows something, and changes nothing.
        case anyone
        case `operator`
        /// The site at the other end of a group.
        case peer
    }

    /// Words behind the `?` of a URL.
    package enum Query: String, Sendable {
        case group, wait, isolated, point, alone, led, discard, bytes, repair, rate, operation, volumes, volume, from
        case fromImage = "from_image"
    }

    package let method: Method
    /// `{group}` and `{name}` stand for what the caller names.
    package let path: String
    package let caller: Caller
    package let query: [Query]
    /// When whoever calls gives up, in seconds.
    package let seconds: Int64
    /// Also before the site has started.
    package let servedWhileStarting: Bool

    package var id: String { "\(method.rawValue) \(path)" }

    /// The word in the path's braces.
    package var placeholder: String? {
        guard let open = path.firstIndex(of: "{"), let close = path.firstIndex(of: "}") else { return nil }
        return String(path[path.index(after: open)..<close])
    }

    /// Path and query of a URL.
    ///
    /// - Parameter name: what stands for the part in braces, if there is one.
    package func url(_ name: String = "", _ values: [Query: String] = [:]) -> String {
        invariant(values.keys.allSatisfy(query.contains), "a call takes the words of its table only")
        var url = path
        if let placeholder { url.replace("{\(placeholder)}", with: percentEncoded(name)) }
        let words = query.compactMap { word in values[word].map { "\(word.rawValue)=\(percentEncoded($0))" } }
        return words.isEmpty ? url : "\(url)?\(words.joined(separator: "&"))"
    }
}

/// A name as a part of a URL.
package func percentEncoded(_ name: String) -> String {
    name.utf8.map { byte in
        let plain =
            (0x30...0x39).contains(byte) || (0x41...0x5A).contains(byte)
            || (0x61...0x7A).contains(byte) || byte == 0x2D || byte == 0x2E || byte == 0x5F
        return plain ? String(UnicodeScalar(byte)) : "%" + (byte < 16 ? "0" : "") + String(byte, radix: 16)
    }.joined()
}

/// The body of a call that has none.
package struct Nothing: Codable, Sendable {
    package init() {}
}

/// The answer of a call that has nothing else to say.
package struct Done: Codable, Sendable {
    package var done: String
    package init(done: String) { self.done = done }
}

/// The body of an answer that refuses.
package struct ErrorAnswer: Codable, Sendable {
    package var error: String
    package init(error: String) { self.error = error }
}
