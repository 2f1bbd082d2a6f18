/* kill_at_flush.c: preloaded into a site: ends it, as SIGKILL does, at the Nth flush after N was written to the file that
   FARCOPY_KILL_AT names. So a test reaches every step between two records. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static atomic_int count;

static void flush(void) {
    const char *path = getenv("FARCOPY_KILL_AT");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    char text[16] = {0};
    ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    if (length > 0 && atomic_fetch_add(&count, 1) + 1 == atoi(text)) kill(getpid(), SIGKILL);
}

int fdatasync(int file) {
    flush();
    return ((int (*)(int))dlsym(RTLD_NEXT, "fdatasync"))(file);
}

int fsync(int file) {
    flush();
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(file);
}

int msync(void *memory, size_t length, int flags) {
    flush();
    return ((int (*)(void *, size_t, int))dlsym(RTLD_NEXT, "msync"))(memory, length, flags);
}
