/* A library to load before others: file systems that lack a call, or do it in their own way.
   cc -shared -fPIC -o no_locks.so no_locks.c

   FLOCK_ERRNO, FSYNC_ERRNO (of folders)      the call fails so
   RENAME_ERRNO (of folders), UNLINK_ERRNO, RMDIR_ERRNO, STAT_ERRNO
                                              the same, of paths with what ..._PATH says in them
   NEW_INODES                                 each look at a file gives it another inode number */
#define _GNU_SOURCE
#undef _FILE_OFFSET_BITS /* else stat64 would be another name of stat */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int fails(const char *name) {
  const char *number = getenv(name);
  if (!number) return 0;
  errno = atoi(number);
  return 1;
}

static int fails_at(const char *name, int folder, const char *path) {
  char other[64], whole[9000] = "", link[64];
  const char *part;
  snprintf(other, sizeof other, "%.*s_PATH", (int)strcspn(name, "_"), name);
  part = getenv(other);
  if (folder != AT_FDCWD && path[0] != '/') {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    syscall(SYS_readlinkat, AT_FDCWD, link, whole, 4096);
    strcat(whole, "/");
  }
  strncat(whole, path, 4096);
  return (!part || strstr(whole, part)) && fails(name);
}

int flock(int fd, int operation) {
  return fails("FLOCK_ERRNO") ? -1 : (int)syscall(SYS_flock, fd, operation);
}

int fsync(int fd) {
  struct stat status;
  if (!fstat(fd, &status) && S_ISDIR(status.st_mode) && fails("FSYNC_ERRNO")) return -1;
  return (int)syscall(SYS_fsync, fd);
}

int rename(const char *from, const char *to) {
  struct stat status;
  if (!lstat(from, &status) && S_ISDIR(status.st_mode) && fails_at("RENAME_ERRNO", AT_FDCWD, from))
    return -1;
  return (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

int unlinkat(int folder, const char *path, int flags) {
  const char *name = flags & AT_REMOVEDIR ? "RMDIR_ERRNO" : "UNLINK_ERRNO";
  return fails_at(name, folder, path) ? -1 : (int)syscall(SYS_unlinkat, folder, path, flags);
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

static int look(int folder, const char *path, void *found, int flags) {
  struct stat *status = found; /* which on 64 bits is what stat64 gives, too */
  static ino_t looks = 1000000;
  if (!(flags & (AT_SYMLINK_NOFOLLOW | AT_EMPTY_PATH)) && fails_at("STAT_ERRNO", folder, path)) return -1;
  if (syscall(SYS_newfstatat, folder, path, status, flags)) return -1;
  if (getenv("NEW_INODES")) status->st_ino = ++looks;
  return 0;
}

#define LOOKS(stat, fstat, lstat, fstatat, type)                                            \
  int stat(const char *path, struct type *status) {                                         \
    return look(AT_FDCWD, path, status, 0);                                                 \
  }                                                                                         \
  int lstat(const char *path, struct type *status) {                                        \
    return look(AT_FDCWD, path, status, AT_SYMLINK_NOFOLLOW);                               \
  }                                                                                         \
  int fstat(int fd, struct type *status) {                                                  \
    return look(fd, "", status, AT_EMPTY_PATH);                                             \
  }                                                                                         \
  int fstatat(int fd, const char *path, struct type *status, int flags) {                   \
    return look(fd, path, status, flags);                                                   \
  }
LOOKS(stat, fstat, lstat, fstatat, stat)
LOOKS(stat64, fstat64, lstat64, fstatat64, stat64)
