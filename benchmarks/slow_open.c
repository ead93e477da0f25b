/* LD_PRELOAD shim: each open of a path that contains "sample-" takes SLOW_OPEN_US (default 1000)
 * microseconds longer, as it may on NFS, Lustre or a cloud disk.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void wait_for(const char *path) {
  static long microseconds = -1;
  if (microseconds < 0) {
    const char *text = getenv("SLOW_OPEN_US");
    microseconds = text ? atol(text) : 1000;
  }
  if (path && strstr(path, "sample-")) {
    struct timespec pause = {microseconds / 1000000, microseconds % 1000000 * 1000};
    clock_nanosleep(CLOCK_MONOTONIC, 0, &pause, NULL);
  }
}

/* The mode is there only when a file may be created; passing on what is no mode does no harm. */
#define MODE(last)                     \
  va_list rest;                        \
  va_start(rest, last);                \
  mode_t mode = va_arg(rest, mode_t);  \
  va_end(rest)

#define REAL(name, ...)                                            \
  static int (*real)(__VA_ARGS__);                                 \
  if (!real) real = (int (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define OPEN(name)                              \
  int name(const char *path, int flags, ...) {  \
    MODE(flags);                                \
    REAL(#name, const char *, int, ...);        \
    wait_for(path);                             \
    return real(path, flags, mode);             \
  }

#define OPENAT(name)                                        \
  int name(int folder, const char *path, int flags, ...) {  \
    MODE(flags);                                            \
    REAL(#name, int, const char *, int, ...);               \
    wait_for(path);                                         \
    return real(folder, path, flags, mode);                 \
  }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

/* What a program calls that was compiled with _FORTIFY_SOURCE, as most distributions do. */
#define OPEN_2(name)                          \
  int name(const char *path, int flags) {     \
    REAL(#name, const char *, int);           \
    wait_for(path);                           \
    return real(path, flags);                 \
  }

#define OPENAT_2(name)                                  \
  int name(int folder, const char *path, int flags) {   \
    REAL(#name, int, const char *, int);                \
    wait_for(path);                                     \
    return real(folder, path, flags);                   \
  }

OPEN_2(__open_2)
OPEN_2(__open64_2)
OPENAT_2(__openat_2)
OPENAT_2(__openat64_2)
