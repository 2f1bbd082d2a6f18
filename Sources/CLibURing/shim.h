// What Swift cannot import from liburing and glibc: macros that mention enumerators, variadic functions, and
// functions that glibc shows only with _GNU_SOURCE.
#pragma once
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/magic.h>
// The kernel's header before liburing's copy of it: other packages import the kernel's, and the two must agree.
#include <linux/io_uring.h>
#include <liburing.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <sys/xattr.h>
#include <unistd.h>

ssize_t preadv2(int, const struct iovec *, int, off_t, int);
ssize_t pwritev2(int, const struct iovec *, int, off_t, int);

// One buffer at an offset; RWF_NOWAIT when `nowait`. The negative errno on failure, as io_uring gives it.
static inline long farcopy_pread(int fd, void *buffer, size_t length, off_t offset, int nowait) {
    struct iovec piece = {buffer, length};
    ssize_t done = nowait ? preadv2(fd, &piece, 1, offset, RWF_NOWAIT) : pread(fd, buffer, length, offset);
    return done < 0 ? -errno : done;
}
static inline long farcopy_pwrite(int fd, const void *buffer, size_t length, off_t offset, int nowait) {
    struct iovec piece = {(void *)buffer, length};
    ssize_t done = nowait ? pwritev2(fd, &piece, 1, offset, RWF_NOWAIT) : pwrite(fd, buffer, length, offset);
    return done < 0 ? -errno : done;
}
static inline int farcopy_block_device_size(int fd, unsigned long long *size) {
    return ioctl(fd, BLKGETSIZE64, size) < 0 ? -errno : 0;
}
// The type of the file system that a regular file or a directory lies on; 0 for what is none. Asked of a device node, statfs tells of the file system of the
// node (devtmpfs, whose magic is that of tmpfs), and nothing of the device.
static inline long farcopy_storage_type(int fd) {
    struct stat facts;
    struct statfs system;
    return fstat(fd, &facts) == 0 && (S_ISREG(facts.st_mode) || S_ISDIR(facts.st_mode)) && fstatfs(fd, &system) == 0 ? (long)system.f_type : 0;
}
// The field's type differs between versions of the kernel's header.
static inline void farcopy_make_durable(struct io_uring_sqe *entry) { entry->rw_flags = RWF_DSYNC; }
// 0 unless the file is open with O_DIRECT. The kernel tells since 6.1; else the sector of a device, or a page.
static inline unsigned int farcopy_direct_alignment(int fd) {
    if (!(fcntl(fd, F_GETFL) & __O_DIRECT)) return 0;
    // struct statx as words: the mask is the first, stx_dio_mem_align and stx_dio_offset_align stand at 0x98.
    unsigned int facts[64] = {0};
    int sector = 0;
    if (syscall(SYS_statx, fd, "", 0x1000 /* AT_EMPTY_PATH */, 0x2000 /* STATX_DIOALIGN */, facts) == 0 &&
        (facts[0] & 0x2000) && facts[39])
        return facts[38] > facts[39] ? facts[38] : facts[39];
    return ioctl(fd, BLKSSZGET, &sector) == 0 && sector > 0 ? sector : 4096;
}
// Nanoseconds since 1970 at which a file was made; 0 where the file system does not tell.
static inline long long farcopy_birth_time(int fd) {
    // struct statx as words: stx_btime stands at 0x50.
    unsigned int facts[64] = {0};
    if (syscall(SYS_statx, fd, "", 0x1000 /* AT_EMPTY_PATH */, 0x800 /* STATX_BTIME */, facts) != 0 || !(facts[0] & 0x800))
        return 0;
    return ((long long)facts[21] << 32 | facts[20]) * 1000000000LL + facts[22];
}
// Whether the file system of an open file still takes changes, asked by a change that is none: an attribute that is not there is to be
// replaced. ext4 begins a transaction before it finds that out (fs/ext4/xattr.c, `ext4_xattr_set`), so ENODATA says that its journal is well,
// EIO or EROFS that it is not; what else it says (no such attributes on this mount) tells nothing.
#define FARCOPY_ABSENT "user.farcopy.absent"
static inline void farcopy_prepare_proof(struct io_uring_sqe *entry, int fd) {
    io_uring_prep_fsetxattr(entry, fd, FARCOPY_ABSENT, "", XATTR_REPLACE, 0);
}
// The same at once, by a negative errno.
static inline int farcopy_prove(int fd) { return fsetxattr(fd, FARCOPY_ABSENT, "", 0, XATTR_REPLACE) == 0 ? 0 : -errno; }
// EIO or EROFS when the file system of an open file is known to take no writes any more, which opening the file again tells on every
// kernel, and mapping it, when there is no descriptor, on newer ones; else 0.
static inline int farcopy_file_system_error(int fd) {
    char name[32];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    int again = open(name, O_RDWR | O_CLOEXEC);
    if (again >= 0) {
        close(again);
        return 0;
    }
    if (errno == EIO || errno == EROFS) return errno;
    void *memory = mmap(NULL, 1, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) return errno == EIO || errno == EROFS ? errno : 0;
    munmap(memory, 1);
    return 0;
}
// For a handler of signals: where memory could not be reached; what lies there, read by the kernel, which gives an error (fewer bytes) where a
// load would fault; and other memory in its place.
static inline unsigned long farcopy_fault_address(siginfo_t *info) { return (unsigned long)info->si_addr; }
static inline long farcopy_read_memory(void *to, unsigned long from, size_t length) {
    struct iovec local = {to, length}, remote = {(void *)from, length};
    return syscall(SYS_process_vm_readv, getpid(), &local, 1UL, &remote, 1UL, 0UL);
}
static inline int farcopy_move_memory(void *from, size_t length, unsigned long to) {
    return (void *)syscall(SYS_mremap, from, length, length, 3 /* MREMAP_MAYMOVE | MREMAP_FIXED */, to) == (void *)to ? 0 : -errno;
}
// Makes every page of a shared mapping dirty without changing it, whoever else stores to it meanwhile: each is written to with what it holds,
// in one indivisible step.
static inline void farcopy_make_dirty(void *memory, size_t length) {
    for (size_t offset = 0; offset < length; offset += 4096) {
        unsigned long *word = (unsigned long *)((char *)memory + offset);
        unsigned long held = __atomic_load_n(word, __ATOMIC_RELAXED);
        while (!__atomic_compare_exchange_n(word, &held, held, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    }
}
int fallocate(int, int, off_t, off_t);
// Storage for a range, without a change of the file's size.
static inline int farcopy_reserve(int fd, off_t offset, off_t length) {
    return fallocate(fd, FALLOC_FL_KEEP_SIZE, offset, length) < 0 ? -errno : 0;
}
static inline long farcopy_file_system_type(int fd) {
    struct statfs system;
    return fstatfs(fd, &system) == 0 ? (long)system.f_type : 0;
}
static const long farcopy_type_tmpfs = TMPFS_MAGIC, farcopy_type_ext = EXT4_SUPER_MAGIC, farcopy_type_xfs = XFS_SUPER_MAGIC,
                  farcopy_type_btrfs = BTRFS_SUPER_MAGIC, farcopy_type_f2fs = F2FS_SUPER_MAGIC;
// The identity of a btrfs file system, 16 bytes.
static inline int farcopy_btrfs_identity(int fd, unsigned char identity[16]) {
    // struct btrfs_ioctl_fs_info_args: two 64-bit words, then the identity; 1024 bytes in all.
    unsigned char facts[1024] = {0};
    if (ioctl(fd, _IOR(0x94, 31, unsigned char[1024]), facts) < 0) return -errno;
    memcpy(identity, facts + 16, 16);
    return 0;
}
// Changes whenever a device gets another medium, such as another file under a loop device (BLKGETDISKSEQ, Linux 5.15); 0 = unknown.
static inline unsigned long long farcopy_medium_sequence(int fd) {
    unsigned long long sequence = 0;
    return ioctl(fd, _IOR(0x12, 128, unsigned long long), &sequence) == 0 ? sequence : 0;
}
// Of the mount that a file was opened through: never used twice in a boot (Linux 6.8); 0 = unknown.
static inline unsigned long long farcopy_mount_identity(int fd) {
    // struct statx as words: stx_mnt_id stands at 0x90.
    unsigned int facts[64] = {0};
    if (syscall(SYS_statx, fd, "", 0x1000 /* AT_EMPTY_PATH */, 0x4000 /* STATX_MNT_ID_UNIQUE */, facts) != 0 || !(facts[0] & 0x4000))
        return 0;
    return (unsigned long long)facts[37] << 32 | facts[36];
}
static const int farcopy_open_direct = __O_DIRECT;
static inline int farcopy_is_zero(const void *bytes, size_t count) {
    return *(const char *)bytes == 0 && memcmp(bytes, (const char *)bytes + 1, count - 1) == 0;
}
static const int farcopy_poll_peer_closed = 0x2000; // POLLRDHUP
static const int farcopy_punch_hole = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
static const int farcopy_zero_range = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE;
static inline void farcopy_name_thread(const char *name) { prctl(PR_SET_NAME, name); }
