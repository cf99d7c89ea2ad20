// Counts the calls of a process that change files below one folder, and at one of them kills the
// process or fails the call. LD_PRELOAD it; the environment says what to do (tests/shim.py):
//   SHIM_DIR    the folder that is watched
//   SHIM_ARMED  nothing is counted before this file exists
//   SHIM_LOG    a line per call: number, call, path, and for a rename the new path, tab-separated
//   SHIM_AT     the number of the call that is struck; 0: none
//   SHIM_MODE   kill, fail (that call), failfrom (that call and every later one)
//   SHIM_ERRNO  the error of a call that fails
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_int calls;
static atomic_int armed;
static int log_file = -1;

static void full(char *out, int folder, const char *path) {
  char link[64], base[PATH_MAX];
  ssize_t length = 0;
  if (path && path[0] == '/') {
    snprintf(out, PATH_MAX, "%s", path);
    return;
  }
  if (folder == AT_FDCWD) {
    if (getcwd(base, sizeof base)) length = strlen(base);
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    length = readlink(link, base, sizeof base - 1);
  }
  base[length > 0 ? length : 0] = 0;
  if (path)
    snprintf(out, PATH_MAX, "%s/%s", base, path);
  else
    snprintf(out, PATH_MAX, "%s", base);
}

// Whether the call has to fail; errno says how.
static int struck(const char *call, const char *path, const char *target) {
  const char *folder = getenv("SHIM_DIR");
  size_t length = folder ? strlen(folder) : 0;
  if (!length || strncmp(path, folder, length) || (path[length] && path[length] != '/')) return 0;
  if (!atomic_load(&armed)) {
    if (access(getenv("SHIM_ARMED"), F_OK)) return 0;
    atomic_store(&armed, 1);
    log_file = open(getenv("SHIM_LOG"), O_WRONLY | O_CREAT | O_APPEND, 0644);
  }
  int number = atomic_fetch_add(&calls, 1) + 1, at = atoi(getenv("SHIM_AT"));
  char line[2 * PATH_MAX + 64];
  int size = snprintf(line, sizeof line, "%d\t%s\t%s%s%s\n", number, call, path + length,
                      target ? "\t" : "", target ? target + length : "");
  if (log_file >= 0 && write(log_file, line, size) < 0) _exit(99);
  const char *mode = getenv("SHIM_MODE");
  if (!at || number < at || (number > at && strcmp(mode, "failfrom"))) return 0;
  if (!strcmp(mode, "kill")) {
    kill(getpid(), SIGKILL);
    pause();
  }
  errno = atoi(getenv("SHIM_ERRNO"));
  return 1;
}

#define NEXT(name) \
  static __typeof__(&name) next; \
  if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define PATH(folder, path) \
  char at[PATH_MAX]; \
  full(at, folder, path)
#define CHANGES (O_CREAT | O_TRUNC)

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    NEXT(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    PATH(AT_FDCWD, path); \
    return (flags & CHANGES) && struck("open", at, NULL) ? -1 : next(path, flags, mode); \
  }
#define OPENAT(name) \
  int name(int folder, const char *path, int flags, ...) { \
    NEXT(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = flags & O_CREAT ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    PATH(folder, path); \
    return (flags & CHANGES) && struck("open", at, NULL) ? -1 : next(folder, path, flags, mode); \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

#define ON_FILE(type, name, label, parameters, ...) \
  type name parameters { \
    NEXT(name); \
    PATH(file, NULL); \
    return struck(label, at, NULL) ? -1 : next(__VA_ARGS__); \
  }
ON_FILE(ssize_t, write, "write", (int file, const void *data, size_t size), file, data, size)
ON_FILE(ssize_t, writev, "write", (int file, const struct iovec *parts, int count), file, parts, count)
ON_FILE(ssize_t, pwrite, "write", (int file, const void *data, size_t size, off_t to), file, data, size, to)
ON_FILE(ssize_t, pwrite64, "write", (int file, const void *data, size_t size, off64_t to), file, data, size, to)
ON_FILE(int, fsync, "fsync", (int file), file)
ON_FILE(int, fdatasync, "fsync", (int file), file)
ON_FILE(int, ftruncate, "truncate", (int file, off_t size), file, size)
ON_FILE(int, ftruncate64, "truncate", (int file, off64_t size), file, size)

#define ON_PATH(name, label, folder, parameters, ...) \
  int name parameters { \
    NEXT(name); \
    PATH(folder, path); \
    return struck(label, at, NULL) ? -1 : next(__VA_ARGS__); \
  }
ON_PATH(mkdir, "mkdir", AT_FDCWD, (const char *path, mode_t mode), path, mode)
ON_PATH(mkdirat, "mkdir", folder, (int folder, const char *path, mode_t mode), folder, path, mode)
ON_PATH(unlink, "unlink", AT_FDCWD, (const char *path), path)
ON_PATH(rmdir, "rmdir", AT_FDCWD, (const char *path), path)
ON_PATH(unlinkat, "unlink", folder, (int folder, const char *path, int flags), folder, path, flags)

int renameat2(int from, const char *old, int to, const char *new, unsigned flags) {
  NEXT(renameat2);
  char target[PATH_MAX];
  PATH(from, old);
  full(target, to, new);
  return struck("rename", at, target) ? -1 : next(from, old, to, new, flags);
}
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int from, const char *old, int to, const char *new) {
  return renameat2(from, old, to, new, 0);
}
