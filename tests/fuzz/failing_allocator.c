/* To be loaded with LD_PRELOAD: one allocation, or all from one on, fail while counting is on. Threads that a process
   makes can be made to fail likewise. operator new calls malloc, so it fails too.

   What the C library and its loader allocate for themselves does not fail: thread-local memory of a loaded library, for
   one, is allocated when a thread first uses it, and glibc ends the process where it cannot be. No library can answer. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

static atomic_int counting, every_later, threads_fail;
static atomic_long seen, fails_at = -1;

/* Allocation number n, from 0, fails; with later, all behind it too. n < 0: none fails. Counting starts paused. */
void failing_start(long n, int later) {
  atomic_store(&counting, 0);
  atomic_store(&seen, 0);
  atomic_store(&fails_at, n);
  atomic_store(&every_later, later);
}
void failing_count(int on) { atomic_store(&counting, on); }
long failing_seen(void) { return atomic_load(&seen); }
void failing_threads(int on) { atomic_store(&threads_fail, on); }

/* Code of the C library and of the loader. */
static struct { const char *begin, *end; } own[16];
static int n_own;
static int note_own(struct dl_phdr_info* library, size_t size, void* unused) {
  (void)size, (void)unused;
  if (!strstr(library->dlpi_name, "/ld-") && !strstr(library->dlpi_name, "/libc.so")) return 0;
  for (int i = 0; i < library->dlpi_phnum && n_own < 16; ++i) {
    const ElfW(Phdr)* part = library->dlpi_phdr + i;
    if (part->p_type != PT_LOAD || !(part->p_flags & PF_X)) continue;
    own[n_own].begin = (const char*)library->dlpi_addr + part->p_vaddr;
    own[n_own].end = own[n_own].begin + part->p_memsz;
    ++n_own;
  }
  return 0;
}
__attribute__((constructor)) static void find_own(void) { dl_iterate_phdr(note_own, NULL); }

static int fails(const char* caller) {
  if (!atomic_load(&counting)) return 0;
  for (int i = 0; i < n_own; ++i)
    if (caller >= own[i].begin && caller < own[i].end) return 0;
  const long n = atomic_fetch_add(&seen, 1), at = atomic_load(&fails_at);
  if (at < 0 || (atomic_load(&every_later) ? n < at : n != at)) return 0;
  errno = ENOMEM;
  return 1;
}

/* The next library's functions. dlsym itself may allocate before they are known: from this array, which is never freed. */
static char early[1 << 16];
static size_t early_used;
static void* take_early(size_t bytes) {
  void* p = early + early_used;
  early_used += (bytes + 63) / 64 * 64;
  return early_used <= sizeof early ? p : NULL;
}
static int is_early(const void* p) { return (const char*)p >= early && (const char*)p < early + sizeof early; }

#define NEXT(name, ...)                                              \
  static __typeof__(&name) next;                                     \
  static _Thread_local int looking;                                  \
  if (!next) {                                                       \
    if (looking) return __VA_ARGS__;                                 \
    looking = 1;                                                     \
    next = (__typeof__(&name))dlsym(RTLD_NEXT, #name);               \
    looking = 0;                                                     \
  }

void* malloc(size_t bytes) {
  NEXT(malloc, take_early(bytes))
  return fails(__builtin_return_address(0)) ? NULL : next(bytes);
}
void* calloc(size_t n, size_t bytes) {
  NEXT(calloc, take_early(n * bytes))
  return fails(__builtin_return_address(0)) ? NULL : next(n, bytes);
}
void* realloc(void* p, size_t bytes) {
  NEXT(realloc, NULL)
  if (is_early(p)) {
    void* copy = malloc(bytes);
    return copy ? memcpy(copy, p, bytes) : NULL;
  }
  return fails(__builtin_return_address(0)) ? NULL : next(p, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) {
  NEXT(aligned_alloc, NULL)
  return fails(__builtin_return_address(0)) ? NULL : next(alignment, bytes);
}
int posix_memalign(void** p, size_t alignment, size_t bytes) {
  NEXT(posix_memalign, ENOMEM)
  return fails(__builtin_return_address(0)) ? ENOMEM : next(p, alignment, bytes);
}
void free(void* p) {
  if (is_early(p)) return;
  NEXT(free, (void)0)
  next(p);
}
int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*), void* argument) {
  NEXT(pthread_create, EAGAIN)
  return atomic_load(&counting) && atomic_load(&threads_fail) ? EAGAIN : next(thread, attributes, run, argument);
}
