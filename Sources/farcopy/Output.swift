// Output.swift: standard output and standard error, unbuffered.

import API
import Glibc
import Groups

enum Output {
    static func write(_ bytes: [UInt8], to descriptor: Int32 = 1) {
        var done = 0
        while done < bytes.count {
            let count = bytes.withUnsafeBytes { Glibc.write(descriptor, $0.baseAddress! + done, $0.count - done) }
            if count < 0, errno == EINTR { continue }
            guard count > 0 else { return }
            done += count
        }
    }

    /// The exit code of a command that is done at this site, and not at all others that it is for.
    static let notEverywhere: Int32 = 3

    static func line(_ text: String) { write(Array("\(text)\n".utf8)) }

    static func complain(_ text: String) { write(Array("farcopy: \(text)\n".utf8), to: 2) }

    /// Asks whoever sits there.
    ///
    /// - Throws: unless the answer is yes.
    static func confirm(_ words: String, _ question: String) throws {
        line(words)
        write(Array("\(question) [y/N] ".utf8))
        guard let answer = readLine(), ["y", "yes"].contains(answer.lowercased()) else {
            throw Refusal("nothing was done")
        }
    }

    /// Ends the command as failed.
    static func fail(_ text: String) -> Never {
        complain(text)
        Glibc.exit(1)
    }
}

extension Output {
    /// Of a command for all sites of a group: those that it did not come to.
    static func missed(_ done: Done) {
        if done.done.contains("not told") { write(Array("farcopy: \(done.done)\n".utf8), to: 2) }
    }
}
