// Adoption.swift: `farcopy adopt`: a volume's file was exchanged, or written to while Farcopy was stopped, on purpose.

import API
import FoundationEssentials
import Glibc
import Groups
import Ring
import SiteConfiguration
import Volumes

package enum Adoption {
    /// Accepts the volume's file as it is, with the site stopped: its FlashCopies are lost, its recovery points void, and a
    /// mirror is compared anew.
    ///
    /// - Returns: what was given up, in words.
    package static func adopt(_ name: String, _ configuration: Configuration) throws -> String {
        guard configuration.volumes.contains(where: { $0.name == name }) else {
            throw Refusal("there is no [volumes.\(name)] in \(configuration.path)")
        }
        let state = try StateDirectory(path: configuration.state)
        let path = "\(state.volume(name))/volume.record"
        guard try exists(path) else { return "volume '\(name)' was never served here; there is nothing to do" }
        var found: VolumeRecord?
        let file = try DurableRecord(path: path, value: &found)
        guard var record = found else {
            throw Refusal("\(path) is empty; remove \(state.volume(name)) to begin anew")
        }
        var lost: [String] = []
        for index in record.copies.indices where record.copies[index].state != .lost {
            lost.append(record.copies[index].name)
            record.copies[index].state = .lost
            record.copies[index].reason =
                "the volume's file was exchanged or changed, and adopted at \(timestamp(realSeconds()))"
            unlink("\(state.volume(name))/copies/\(record.copies[index].id).bitmap")
        }
        // The intermediate of mode `change-volume` is as it was: what could be restored from it, can be.
        record.changeVolume?.adoptedIn = record.clean == nil ? record.bootID : ChangeVolumeRecord.anyBoot
        record.file = nil
        record.clean = nil
        record.bootID = ""
        record.restoring = nil
        record.logIsBroken = true
        record.servedAs = VolumeRecord.anotherFile
        try file.save(record)
        return "volume '\(name)' is adopted as it is; every grain counts as changed"
            + (lost.isEmpty ? "" : "; lost FlashCopies: \(lost.joined(separator: ", "))")
    }
}
