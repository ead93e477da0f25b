/* A library to load before others: folders on mounts that have died, break, or know no inode numbers.
   cc -shared -fPIC -ldl -o odd_folders.so odd_folders.c */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* Tell whether a call fails, with the number in a variable: for paths that end in ODD_NAME. */
static int fails(const char *variable, const char *path) {
  const char *number = getenv(variable), *name = getenv("ODD_NAME");
  if (!number) return 0;
  if (path && name) {
    size_t length = strlen(path), end = strlen(name);
    if (length < end || strcmp(path + length - end, name)) return 0;
  }
  errno = atoi(number);
  return 1;
}

static int looked(int result, struct stat64 *status) {
  static ino_t last = 1;
  const char *inodes = getenv("ODD_INODES");
  if (!result && inodes && S_ISDIR(status->st_mode)) status->st_ino = *inodes == '0' ? 0 : ++last;
  return result;
}

int stat64(const char *path, struct stat64 *status) {
  int (*real)(const char *, struct stat64 *) = dlsym(RTLD_NEXT, "stat64");
  if (fails("STAT_ERRNO", path) || fails("LSTAT_ERRNO", path)) return -1;
  return looked(real(path, status), status);
}

int lstat64(const char *path, struct stat64 *status) {
  int (*real)(const char *, struct stat64 *) = dlsym(RTLD_NEXT, "lstat64");
  if (fails("LSTAT_ERRNO", path)) return -1;
  return looked(real(path, status), status);
}

static DIR *breaking; /* after its first five names */
static int names;

DIR *opendir(const char *path) {
  DIR *(*real)(const char *) = dlsym(RTLD_NEXT, "opendir"), *folder;
  if (fails("OPENDIR_ERRNO", path)) return NULL;
  folder = real(path);
  if (fails("READDIR_ERRNO", path)) breaking = folder;
  return folder;
}

struct dirent64 *readdir64(DIR *folder) {
  struct dirent64 *(*real)(DIR *) = dlsym(RTLD_NEXT, "readdir64"), *found;
  if (folder == breaking && ++names > 5 && fails("READDIR_ERRNO", NULL)) return NULL;
  found = real(folder);
  if (found && getenv("NO_TYPES")) found->d_type = DT_UNKNOWN;
  return found;
}
