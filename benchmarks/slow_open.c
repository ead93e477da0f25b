/* LD_PRELOAD shim: each open of a file or folder whose path contains "sample-" takes SLOW_OPEN_NS
 * nanoseconds longer, as it may on NFS, Lustre or a cloud disk.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>

static void wait_for(const char *path) {
  static const struct timespec pause = {0, SLOW_OPEN_NS};
  if (path && strstr(path, "sample-")) clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
}

/* Without <fcntl.h>, which declares `...`: a mode that nobody passed is passed on, and does no harm. */
#define SLOW(type, name, parameters, arguments)                         \
  type name parameters {                                                \
    static type(*real) parameters;                                      \
    if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name);      \
    wait_for(path);                                                     \
    return real arguments;                                              \
  }
#define OPEN(name) SLOW(int, name, (const char *path, int flags, mode_t mode), (path, flags, mode))
#define OPENAT(name)                                                       \
  SLOW(int, name, (int folder, const char *path, int flags, mode_t mode),  \
       (folder, path, flags, mode))

SLOW(void *, opendir, (const char *path), (path))
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
/* What a program calls that was compiled with _FORTIFY_SOURCE, as most distributions do. */
OPEN(__open_2)
OPEN(__open64_2)
OPENAT(__openat_2)
OPENAT(__openat64_2)
