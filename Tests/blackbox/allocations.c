// Counts the calls of malloc and its kin made by threads named "reactor-…"; preloaded into the server by
// test_allocations.py. The counts lie in the file that FARCOPY_ALLOCATIONS names, mapped, as two 64-bit numbers:
// allocations and frees.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static _Atomic uint64_t *counts;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("FARCOPY_ALLOCATIONS");
    int file = path ? open(path, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory != MAP_FAILED) counts = memory;
    close(file);
}

// 0 = not asked yet. A thread is named before it begins its work, so only a reactor's answer is final.
static __thread int is_reactor __attribute__((tls_model("initial-exec")));

static void count(int which) {
    if (!counts) return;
    if (!is_reactor) {
        char name[16] = "";
        prctl(PR_GET_NAME, name);
        if (strncmp(name, "reactor-", 8)) return;
        is_reactor = 1;
    }
    atomic_fetch_add(&counts[which], 1);
}

void *malloc(size_t size) { count(0); return __libc_malloc(size); }
void *calloc(size_t n, size_t size) { count(0); return __libc_calloc(n, size); }
void *realloc(void *old, size_t size) { count(0); return __libc_realloc(old, size); }
void *memalign(size_t alignment, size_t size) { count(0); return __libc_memalign(alignment, size); }
void *aligned_alloc(size_t alignment, size_t size) { count(0); return __libc_memalign(alignment, size); }
int posix_memalign(void **out, size_t alignment, size_t size) {
    count(0);
    *out = __libc_memalign(alignment, size);
    return *out ? 0 : 12;
}
void free(void *old) { if (old) count(1); __libc_free(old); }
