// Records, in order, what a site does to the files below a directory and what it answers, and makes calls fail; preloaded into the server by
// test_order.py and test_nth_call.py.
//
// FARCOPY_ORDER_UNDER    the directory: what happens elsewhere is not told
// FARCOPY_ORDER_LOG      a file that gets a line for each event, as "fdatasync PATH"
// FARCOPY_ORDER_FAULT    a file of a page, mapped: which call is to fail next (struct fault)
//
// What goes through io_uring (the reactors' reads, writes and flushes of volumes, targets, bitmaps and the activity log) is not seen here.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

struct fault {
    char call[16];    // the call's name, as "fdatasync"; "*" = any that is told or can fail here
    char suffix[64];  // how the path ends; behind a ~, what is somewhere in it
    int32_t error;    // errno; 0: the process is killed instead of the call; below 0: it takes so many seconds longer
    int32_t skip;     // so many calls are let through first; counts down
    int32_t left;     // so many are to fail; counts down
    int32_t half;     // a pwrite that fails has written half of it
    char failed[256]; // which call of which file failed last
};

static const char *under;
static int log_file = -1;
static struct fault *fault;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

__attribute__((constructor)) static void begin(void) {
    under = getenv("FARCOPY_ORDER_UNDER");
    const char *log = getenv("FARCOPY_ORDER_LOG"), *control = getenv("FARCOPY_ORDER_FAULT");
    if (log) log_file = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    int file = control ? open(control, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *memory = (void *)syscall(SYS_mmap, NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0L);
    if (memory != MAP_FAILED) fault = memory;
    close(file);
}

static void tell(const char *what, const char *path, long a, long b) {
    if (log_file < 0) return;
    char line[600];
    int length = snprintf(line, sizeof line, "%s %s %ld %ld\n", what, path, a, b);
    syscall(SYS_write, log_file, line, length < (int)sizeof line ? length : (int)sizeof line - 1);
}

// The path of a descriptor if it lies below the directory.
static const char *path_of(int fd, char *space, size_t size) {
    char name[40];
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(name, space, size - 1);
    if (length <= 0 || !under) return NULL;
    space[length] = 0;
    return strncmp(space, under, strlen(under)) ? NULL : space + strlen(under);
}

// Whether a call is to fail: 0, or its errno.
static int fails(const char *call, const char *path) {
    if (!fault || !path) return 0;
    int error = 0;
    pthread_mutex_lock(&lock);
    size_t length = strlen(path), end = strlen(fault->suffix);
    int matches = !strcmp(fault->call, "*") || !strcmp(fault->call, call);
    int named = fault->suffix[0] == '~' ? strstr(path, fault->suffix + 1) != NULL
                                        : length >= end && !strcmp(path + length - end, fault->suffix);
    if (fault->left > 0 && matches && named) {
        if (fault->skip > 0) {
            fault->skip--;
        } else {
            fault->left--;
            snprintf(fault->failed, sizeof fault->failed, "%s %s", call, path);
            if (fault->error == 0) kill(getpid(), SIGKILL);
            error = fault->error;
        }
    }
    pthread_mutex_unlock(&lock);
    if (error < 0) return sleep(-error), 0;
    return error;
}

// For calls that name a file.
static int fails_at(const char *call, const char *path) {
    return under && !strncmp(path, under, strlen(under)) ? fails(call, path + strlen(under)) : 0;
}

#define SPACE char space[500]; const char *path = path_of(fd, space, sizeof space)

static ssize_t write_at(int fd, const void *bytes, size_t count, off_t offset) {
    SPACE;
    int error = fails("pwrite", path);
    if (error) {
        if (fault->half) syscall(SYS_pwrite64, fd, bytes, count / 2, offset);
        errno = error;
        return -1;
    }
    ssize_t done = syscall(SYS_pwrite64, fd, bytes, count, offset);
    if (path) tell("pwrite", path, (long)offset, (long)done);
    return done;
}
ssize_t pwrite(int fd, const void *bytes, size_t count, off_t offset) { return write_at(fd, bytes, count, offset); }
ssize_t pwrite64(int fd, const void *bytes, size_t count, off_t offset) { return write_at(fd, bytes, count, offset); }

int fdatasync(int fd) {
    SPACE;
    int error = fails("fdatasync", path);
    if (error) return errno = error, -1;
    int result = syscall(SYS_fdatasync, fd);
    if (path && result == 0) tell("fdatasync", path, 0, 0);
    return result;
}
int fsync(int fd) {
    SPACE;
    int error = fails("fsync", path);
    if (error) return errno = error, -1;
    int result = syscall(SYS_fsync, fd);
    if (path && result == 0) tell("fsync", path, 0, 0);
    return result;
}

// Shared mappings by their address.
static struct { char *start; size_t length; char path[200]; } mappings[4096];
static int mapping_count;

static void *map(void *place, size_t length, int protection, int flags, int fd, off_t offset) {
    if (fd >= 0 && (flags & MAP_TYPE) != MAP_PRIVATE) {
        SPACE;
        int error = fails("mmap", path);
        if (error) return errno = error, MAP_FAILED;
    }
    void *memory = (void *)syscall(SYS_mmap, place, length, protection, flags, fd, offset);
    if (memory == MAP_FAILED || fd < 0 || (flags & MAP_TYPE) == MAP_PRIVATE) return memory;
    SPACE;
    if (!path) return memory;
    pthread_mutex_lock(&lock);
    int slot = 0;
    while (slot < mapping_count && mappings[slot].start != memory) slot++;
    if (slot < 4096) {
        if (slot == mapping_count) mapping_count++;
        mappings[slot].start = memory;
        mappings[slot].length = length;
        snprintf(mappings[slot].path, sizeof mappings[slot].path, "%s", path);
    }
    pthread_mutex_unlock(&lock);
    return memory;
}
void *mmap(void *p, size_t n, int a, int f, int fd, off_t at) { return map(p, n, a, f, fd, at); }
void *mmap64(void *p, size_t n, int a, int f, int fd, off_t at) { return map(p, n, a, f, fd, at); }

int msync(void *start, size_t length, int flags) {
    char path[200] = "";
    pthread_mutex_lock(&lock);
    for (int slot = mapping_count - 1; slot >= 0 && !*path; slot--)
        if ((char *)start >= mappings[slot].start && (char *)start < mappings[slot].start + mappings[slot].length)
            strcpy(path, mappings[slot].path);
    pthread_mutex_unlock(&lock);
    int error = fails("msync", *path ? path : NULL);
    if (error) return errno = error, -1;
    int result = syscall(SYS_msync, start, length, flags);
    if (*path && result == 0) tell("msync", path, 0, 0);
    return result;
}

static int open_file(int directory, const char *name, int flags, mode_t mode) {
    int error = fails_at("open", name);
    if (error) return errno = error, -1;
    int is_new = (flags & O_CREAT) && faccessat(directory, name, F_OK, 0) != 0;
    int fd = syscall(SYS_openat, directory, name, flags, mode);
    if (fd >= 0 && is_new) {
        SPACE;
        if (path) tell("create", path, 0, 0);
    }
    return fd;
}
#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }
int open(const char *name, int flags, ...) { MODE return open_file(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE return open_file(AT_FDCWD, name, flags, mode); }
int openat(int at, const char *name, int flags, ...) { MODE return open_file(at, name, flags, mode); }
int openat64(int at, const char *name, int flags, ...) { MODE return open_file(at, name, flags, mode); }

int ftruncate(int fd, off_t length) {
    SPACE;
    int error = fails("ftruncate", path);
    return error ? errno = error, -1 : syscall(SYS_ftruncate, fd, length);
}
int ftruncate64(int fd, off_t length) { return ftruncate(fd, length); }

int fallocate(int fd, int mode, off_t offset, off_t length) {
    SPACE;
    int error = fails("fallocate", path);
    return error ? errno = error, -1 : syscall(SYS_fallocate, fd, mode, offset, length);
}
int posix_fallocate(int fd, off_t offset, off_t length) {
    SPACE;
    int error = fails("fallocate", path);
    return error ? error : syscall(SYS_fallocate, fd, 0, offset, length) ? errno : 0;
}
int posix_fallocate64(int fd, off_t offset, off_t length) { return posix_fallocate(fd, offset, length); }
int fallocate64(int fd, int mode, off_t offset, off_t length) { return fallocate(fd, mode, offset, length); }

int rename(const char *from, const char *to) {
    int error = fails_at("rename", to);
    if (error) return errno = error, -1;
    int result = syscall(SYS_rename, from, to);
    if (result == 0 && under && !strncmp(from, under, strlen(under))) tell("remove", from + strlen(under), 0, 0);
    if (result == 0 && under && !strncmp(to, under, strlen(under))) tell("rename", to + strlen(under), 0, 0);
    return result;
}
int unlink(const char *path) {
    int error = fails_at("unlink", path);
    if (error) return errno = error, -1;
    int result = syscall(SYS_unlink, path);
    if (result == 0 && under && !strncmp(path, under, strlen(under))) tell("remove", path + strlen(under), 0, 0);
    return result;
}

int mkdir(const char *path, mode_t mode) {
    int error = fails_at("mkdir", path);
    if (error) return errno = error, -1;
    int result = syscall(SYS_mkdir, path, mode);
    if (result == 0 && under && !strncmp(path, under, strlen(under))) tell("create", path + strlen(under), 0, 0);
    return result;
}

// HTTP on sockets: the first line of each request that is read and each answer that is sent.
static void tell_line(const char *what, const void *bytes, size_t count) {
    char line[200];
    size_t length = 0;
    const char *text = bytes;
    while (length < count && length < sizeof line - 1 && text[length] >= ' ') length++;
    memcpy(line, text, length);
    line[length] = 0;
    for (char *c = line; *c; c++) if (*c == ' ') *c = '_';
    tell(what, line, 0, 0);
}
static void sends(const void *bytes, size_t count) {
    if (count > 9 && !memcmp(bytes, "HTTP/1.1 ", 9)) tell_line("answer", bytes, count);
}
static void receives(const void *bytes, ssize_t count) {
    if (count > 8 && (!memcmp(bytes, "POST /", 6) || !memcmp(bytes, "GET /", 5) || !memcmp(bytes, "PUT /", 5) || !memcmp(bytes, "DELETE /", 8)
                      || !memcmp(bytes, "PATCH /", 7)))
        tell_line("request", bytes, count);
}
ssize_t write(int fd, const void *bytes, size_t count) { sends(bytes, count); return syscall(SYS_write, fd, bytes, count); }
ssize_t writev(int fd, const struct iovec *pieces, int count) {
    if (count > 0) sends(pieces[0].iov_base, pieces[0].iov_len);
    return syscall(SYS_writev, fd, pieces, count);
}
ssize_t send(int fd, const void *bytes, size_t count, int flags) {
    sends(bytes, count);
    return syscall(SYS_sendto, fd, bytes, count, flags, NULL, 0);
}
ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    if (message->msg_iovlen > 0) sends(message->msg_iov[0].iov_base, message->msg_iov[0].iov_len);
    return syscall(SYS_sendmsg, fd, message, flags);
}
ssize_t read(int fd, void *bytes, size_t count) {
    ssize_t done = syscall(SYS_read, fd, bytes, count);
    receives(bytes, done);
    return done;
}
ssize_t recv(int fd, void *bytes, size_t count, int flags) {
    ssize_t done = syscall(SYS_recvfrom, fd, bytes, count, flags, NULL, NULL);
    receives(bytes, done);
    return done;
}
ssize_t recvmsg(int fd, struct msghdr *message, int flags) {
    ssize_t done = syscall(SYS_recvmsg, fd, message, flags);
    if (done > 0 && message->msg_iovlen > 0)
        receives(message->msg_iov[0].iov_base, done < (ssize_t)message->msg_iov[0].iov_len ? done : (ssize_t)message->msg_iov[0].iov_len);
    return done;
}
