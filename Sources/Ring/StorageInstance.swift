// StorageInstance.swift: which instance of a file system or device holds a file.
//
// Pages that were never flushed live as long as the file system stays mounted, or the device attached. When it goes and comes back,
// in the same boot of the kernel, they are gone as after power loss. The path, the device number and the identity of the file system
// are the same then; what the kernel makes anew is another.
//
// Must be prevented:
//   a file system that was shut down and mounted again is taken for the one before
//   a restart in another mount namespace, of a file system that stayed, is taken for power loss

import CLibURing
import Glibc

package enum StorageInstance {
    /// A text that stays the same while the storage stays where it is; empty when the kernel does not tell.
    ///
    /// - For ext4, XFS, f2fs and btrfs: the file system's directory in sysfs, which is made when it is mounted, by its inode number,
    ///   which sysfs uses once a boot (kernfs: `kernfs_id_ino`).
    /// - For other file systems the mount's number (`STATX_MNT_ID_UNIQUE`). For memory: there is nothing left when it goes.
    /// - For devices: the device's directory in sysfs, and the sequence number of its medium.
    package static func text(of file: OpenFile) -> String {
        var facts = stat()
        guard fstat(file.descriptor, &facts) == 0 else { return "" }
        if facts.st_mode & S_IFMT == S_IFBLK {
            let name = "/sys/dev/block/\(number(facts.st_rdev))"
            guard let inode = inode(name) else { return "" }
            return "device \(inode) \(farcopy_medium_sequence(file.descriptor))"
        }
        let type = farcopy_file_system_type(file.descriptor)
        if type == farcopy_type_tmpfs { return "memory" }
        if let directory = directory(type, file.descriptor, facts.st_dev), let inode = inode(directory) {
            return "mounted \(inode)"
        }
        let mount = farcopy_mount_identity(file.descriptor)
        return mount == 0 ? "" : "mount \(mount)"
    }

    /// Where sysfs describes a file system that is mounted.
    private static func directory(_ type: Int, _ descriptor: Int32, _ device: dev_t) -> String? {
        switch type {
        case farcopy_type_ext: return blockName(device).map { "/sys/fs/ext4/\($0)" }
        case farcopy_type_xfs: return blockName(device).map { "/sys/fs/xfs/\($0)" }
        case farcopy_type_f2fs: return blockName(device).map { "/sys/fs/f2fs/\($0)" }
        case farcopy_type_btrfs:
            var identity = [UInt8](repeating: 0, count: 16)
            guard farcopy_btrfs_identity(descriptor, &identity) == 0 else { return nil }
            let digits = identity.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }
            let parts = [0..<4, 4..<6, 6..<8, 8..<10, 10..<16].map { digits[$0].joined() }
            return "/sys/fs/btrfs/\(parts.joined(separator: "-"))"
        default: return nil
        }
    }

    private static func blockName(_ device: dev_t) -> String? {
        var target = [CChar](repeating: 0, count: Int(PATH_MAX))
        let count = readlink("/sys/dev/block/\(number(device))", &target, target.count - 1)
        guard count > 0 else { return nil }
        let text = String(decoding: target[..<count].map { UInt8(bitPattern: $0) }, as: UTF8.self)
        return text.split(separator: "/").last.map(String.init)
    }

    private static func number(_ device: dev_t) -> String {
        let (major, minor) = (device >> 8 & 0xFFF | device >> 32 & ~0xFFF, device & 0xFF | device >> 12 & ~0xFF)
        return "\(major):\(minor)"
    }

    private static func inode(_ path: String) -> UInt64? {
        var facts = stat()
        return stat(path, &facts) == 0 ? UInt64(facts.st_ino) : nil
    }
}
