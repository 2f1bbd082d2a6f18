// GuardedMappings.swift: a store to a mapped file that its file system does not take does not end the process.
//
// Metadata is mapped. When the file system under it fails, or has no room, the kernel answers the first store to a clean page with SIGBUS
// (XFS and btrfs once they are shut down; ext4 mostly goes on in memory). The volumes may lie elsewhere and be well, and their hosts come
// first: the handler puts anonymous memory with the same contents in the mapping's place, and the store is made there. From then on the
// mapping is lost: every flush of it fails, which is what its owner acts upon.
//
// Must be prevented:
//   a flush of memory that has no file any more succeeds
//   a signal that is nobody's is swallowed
//   the handler allocates, locks, or faults itself (it reads the pages through the kernel, which gives an error instead)

import CLibURing
import Glibc
import Synchronization

enum GuardedMappings {
    /// Whoever comes later is not guarded.
    private static let capacity = 1 << 16
    private static let page = 4096

    struct Entry: ~Copyable {
        let start = Atomic<UInt>(0)
        let length = Atomic<Int>(0)
        let fate = Atomic<Int32>(0)
    }

    private enum Fate {
        static let mapped: Int32 = 0
        static let moving: Int32 = 1
        static let lost: Int32 = 2
    }

    // Safe because: the memory is there from the first use to the end of the process, and its entries are atomics.
    nonisolated(unsafe) private static let entries: UnsafeMutablePointer<Entry> = {
        // Zeroes, which is what they begin with, and pages that nobody has touched cost nothing.
        guard let memory = calloc(capacity, MemoryLayout<Entry>.stride) else { fatalError("no memory") }
        return memory.bindMemory(to: Entry.self, capacity: capacity)
    }()
    private static let highest = Atomic<Int>(0)
    private static let free = Mutex<[Int]>([])
    // Safe because: written once, before the handler is there.
    nonisolated(unsafe) private static var before = sigaction()

    private static let isInstalled: Bool = {
        _ = entries
        var action = sigaction()
        action.__sigaction_handler.sa_sigaction = { _, info, _ in GuardedMappings.fault(at: farcopy_fault_address(info))
        }
        action.sa_flags = SA_SIGINFO
        return sigaction(SIGBUS, &action, &before) == 0
    }()

    /// - Returns: the entry; nil = it is not guarded.
    static func add(_ memory: UnsafeMutableRawPointer, _ byteCount: Int) -> Int? {
        guard isInstalled else { return nil }
        let index = free.withLock { $0.popLast() } ?? highest.add(1, ordering: .relaxed).oldValue
        guard index < capacity else { return nil }
        entries[index].fate.store(Fate.mapped, ordering: .relaxed)
        entries[index].length.store(byteCount, ordering: .relaxed)
        entries[index].start.store(UInt(bitPattern: memory), ordering: .releasing)
        return index
    }

    static func remove(_ index: Int) {
        entries[index].start.store(0, ordering: .releasing)
        free.withLock { $0.append(index) }
    }

    static func isLost(_ index: Int) -> Bool { entries[index].fate.load(ordering: .acquiring) != Fate.mapped }

    private static func fault(at address: UInt) {
        for index in 0..<min(capacity, highest.load(ordering: .relaxed)) {
            let start = entries[index].start.load(ordering: .acquiring)
            let length = entries[index].length.load(ordering: .relaxed)
            guard start != 0, address >= start, address &- start < UInt(length) else { continue }
            if rescue(index, start, length) { return }
        }
        // Nobody's: it comes again, and ends the process as it would have.
        sigaction(SIGBUS, &before, nil)
    }

    private static func rescue(_ index: Int, _ start: UInt, _ length: Int) -> Bool {
        let (isFirst, _) = entries[index].fate.compareExchange(
            expected: Fate.mapped, desired: Fate.moving, ordering: .acquiringAndReleasing)
        guard isFirst else {
            while entries[index].fate.load(ordering: .acquiring) == Fate.moving { sched_yield() }
            return true
        }
        defer { entries[index].fate.store(Fate.lost, ordering: .releasing) }
        let flags = MAP_PRIVATE | MAP_ANONYMOUS
        guard let copy = mmap(nil, length, PROT_READ | PROT_WRITE, flags, -1, 0), copy != MAP_FAILED else {
            return false
        }
        for offset in stride(from: 0, to: length, by: page) {
            let count = min(page, length - offset)
            guard farcopy_read_memory(copy + offset, start + UInt(offset), count) != count else { continue }
            // Nobody knows what it held: the header is needed, of bits the worst is assumed.
            guard offset > 0 else { return false }
            memset(copy + offset, 0xFF, count)
        }
        return farcopy_move_memory(copy, length, start) == 0
    }
}
