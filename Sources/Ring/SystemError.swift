// SystemError.swift: a failed system call with the object that it failed on.

import Glibc

package struct SystemError: Error, CustomStringConvertible {
    /// Positive.
    package let errno: Int32
    /// What was attempted, on what: "open /srv/orders.img".
    package let attempt: String

    package init(_ attempt: String, errno code: Int32 = Glibc.errno) {
        self.errno = code
        self.attempt = attempt
    }

    package var description: String { "\(attempt): \(String(cString: strerror(errno)))" }
}
