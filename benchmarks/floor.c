/* The floor: what a packer cannot do without, and nothing else. List a folder, take every
 * n-th file, open, fstat, read and close it, and write an empty header and the padded content,
 * 1 MiB at a time, synced at the end. What it writes is as large as a tar and no tar.
 *
 * usage: floor SOURCE OUTPUT PART PARTS    (writes OUTPUT/PART.floor)
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BLOCK = 512, BUFFER = 1 << 20 };

static char buffer[BUFFER];
static size_t used;

static void flush(int output) {
  for (size_t done = 0; done < used;) {
    ssize_t wrote = write(output, buffer + done, used - done);
    if (wrote < 0) err(1, "write");
    done += wrote;
  }
  used = 0;
}

static void pad(int output, size_t count) {
  if (used + count > BUFFER) flush(output);
  memset(buffer + used, 0, count);
  used += count;
}

static void copy(int folder, const char *name, int output) {
  int input = openat(folder, name, O_RDONLY);
  struct stat status;
  if (input < 0 || fstat(input, &status)) err(1, "%s", name);
  pad(output, BLOCK);
  /* A small file is read whole, in one call, as any sensible packer would. */
  if (used + status.st_size > BUFFER) flush(output);
  for (off_t left = status.st_size; left > 0;) {
    if (used == BUFFER) flush(output);
    size_t room = BUFFER - used;
    ssize_t got = read(input, buffer + used, left < (off_t)room ? (size_t)left : room);
    if (got <= 0) err(1, "%s", name);
    used += got;
    left -= got;
  }
  pad(output, (BLOCK - status.st_size % BLOCK) % BLOCK);
  close(input);
}

int main(int argc, char **argv) {
  if (argc != 5) errx(2, "usage: floor SOURCE OUTPUT PART PARTS");
  size_t part = atoi(argv[3]), parts = atoi(argv[4]), count = 0, room = 0, samples = 0;
  char **names = NULL;
  DIR *folder = opendir(argv[1]);
  char path[4096];
  snprintf(path, sizeof path, "%s/%zu.floor", argv[2], part);
  int output = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
  if (!folder || output < 0) err(1, "%s or %s", argv[1], path);
  for (struct dirent *entry; (entry = readdir(folder));) {
    if (entry->d_name[0] == '.') continue;
    if (count == room) names = realloc(names, (room = room * 2 + 1024) * sizeof *names);
    names[count++] = strdup(entry->d_name);
  }
  for (size_t i = part; i < count; i += parts) {
    copy(dirfd(folder), names[i], output);
    size_t length = strlen(names[i]);
    samples += length > 4 && !strcmp(names[i] + length - 4, ".jpg");
  }
  flush(output);
  if (fsync(output)) err(1, "fsync");
  printf("counted %zu\n", samples);
  return 0;
}
