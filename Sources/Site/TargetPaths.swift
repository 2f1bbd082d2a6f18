// TargetPaths.swift: where a FlashCopy may have the target that a request names.
//
// Must be prevented:
//   whoever reaches the control API has any file or device of the machine overwritten
//   the site's own metadata becomes a target

import Glibc
import Groups

struct TargetPaths: Sendable {
    /// Files, devices and directories that the configuration names.
    let allowed: [String]
    let state: String

    /// Checks a path with its links and `..` resolved. A link in /dev counts where it lies, since udev makes
    /// /dev/mapper/NAME a link to a device of another name.
    ///
    /// - Throws: `Refusal` naming the target and the key.
    func check(_ target: String) throws {
        guard target.hasPrefix("/") else {
            throw Refusal("the target '\(target)' must be an absolute path", .misuse)
        }
        let parts = target.split(separator: "/")
        guard let last = parts.last, last != ".", last != ".." else {
            throw Refusal("the target '\(target)' is a directory; name a file or device", .misuse)
        }
        let parent = "/" + parts.dropLast().joined(separator: "/")
        guard let directory = resolved(parent) else {
            throw Refusal("the target \(target): the directory \(parent) does not exist", .misuse)
        }
        let place = directory == "/" ? "/\(last)" : "\(directory)/\(last)"
        var facts = stat()
        // A link that leads nowhere would have the file made where it points.
        let real = resolved(place) ?? (lstat(place, &facts) == 0 ? nil : place)
        let isDevice = stat(place, &facts) == 0 && facts.st_mode & S_IFMT == S_IFBLK
        if let real, isAllowed(real) || isDevice && place.hasPrefix("/dev/") && isAllowed(place) { return }
        throw Refusal(
            "the target \(target) does not lie where targets may be: add its directory, or for a device its path, to "
                + "site.targets, which has \(allowed.joined(separator: ", "))", .refused)
    }

    private func resolved(_ path: String) -> String? {
        guard let text = realpath(path, nil) else { return nil }
        defer { free(text) }
        return String(cString: text)
    }

    private func isAllowed(_ path: String) -> Bool {
        let own = resolved(state) ?? state
        let isOwn = ["volumes", "groups", "site.record", "lock"].contains { isWithin(path, "\(own)/\($0)") }
        return !isOwn && allowed.contains { isWithin(path, resolved($0) ?? $0) }
    }

    private func isWithin(_ path: String, _ place: String) -> Bool {
        path == place || path.hasPrefix(place.hasSuffix("/") ? place : "\(place)/")
    }
}
