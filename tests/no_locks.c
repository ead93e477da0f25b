/* A library to load before others: a file system without locks, and one that cannot sync a folder.
   cc -shared -fPIC -o no_locks.so no_locks.c */
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int fails(const char *name) {
  const char *number = getenv(name);
  if (!number) return 0;
  errno = atoi(number);
  return 1;
}

int flock(int fd, int operation) {
  return fails("FLOCK_ERRNO") ? -1 : (int)syscall(SYS_flock, fd, operation);
}

int fsync(int fd) {
  struct stat status;
  if (!fstat(fd, &status) && S_ISDIR(status.st_mode) && fails("FSYNC_ERRNO")) return -1;
  return (int)syscall(SYS_fsync, fd);
}
