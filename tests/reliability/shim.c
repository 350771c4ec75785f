/* Loaded into test processes by LD_PRELOAD: counts the calls that write, sync or rename below one folder, writes
   them into a journal, and at the n-th kills every process of the test, before, in the middle of or after it, or
   lets it fail.

   Python, Rust (safetensors) and C++ reach the system through these symbols; numpy's tofile comes by fwrite.
   The rename by which safetensors ends a file is a bare system call; the inode in the journal tells of it.  What
   else does not pass here (a write through a mapping) shows when the journal is replayed: the folder that it
   gives is compared with the real one. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, FSYNC = 2, RENAME = 4, OTHER = 8 };
enum { NOTHING, KILL_BEFORE, KILL_HALFWAY, KILL_AFTER, FAIL_ONCE, FAIL_ON, TERMINATE_ON };

struct control {          /* children.py knows this layout */
    long count;           /* calls of the counted kinds so far, over all processes */
    long target;          /* act at this one */
    long acted;           /* it came to that */
    long action, error, kinds, with_data;
    long number;          /* processes that ever joined */
    int pids[256];
    char root[1024], journal[1024];
};

static struct control *control;
static char where[1024];
static int journal = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

static int real_open(const char *path, int flags, int mode) {
    static int (*real)(const char *, int, ...);
    if (!real) real = dlsym(RTLD_NEXT, "open64");
    return real(path, flags, mode);
}
static ssize_t real_write(int fd, const void *data, size_t size) { REAL(write); return real(fd, data, size); }

static void join_test(void) {
    if (!control) return;
    long slot = __atomic_fetch_add(&control->number, 1, __ATOMIC_SEQ_CST);
    if (slot < 256) control->pids[slot] = getpid();
    prctl(PR_SET_PDEATHSIG, SIGKILL);       /* a test that is itself killed leaves nobody behind */
}

int phoenix_arm(const char *path) {
    int fd = real_open(path, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0) return -1;
    void *map = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (map == MAP_FAILED) return -1;
    control = map;
    snprintf(where, sizeof where, "%s", path);
    setenv("PHOENIX_FAULTS", path, 1);      /* for what is started by exec */
    journal = real_open(control->journal, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0644);
    join_test();
    return 0;
}

__attribute__((constructor)) static void begin(void) {
    pthread_atfork(NULL, NULL, join_test);
    const char *path = getenv("PHOENIX_FAULTS");
    if (path && *path) phoenix_arm(path);
}

static int below(const char *path) {
    size_t length = strlen(control->root);
    return !strncmp(path, control->root, length) && (path[length] == '/' || !path[length]);
}

/* The absolute path that a call names; 0 if it does not lie below the folder. */
static int absolute(char *out, int folder, const char *path) {
    char base[PATH_MAX], link[64];
    if (!control || !path) return 0;
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return below(out);
    }
    snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
    ssize_t size = readlink(link, base, sizeof base - 1);
    if (size < 0) return 0;
    base[size] = 0;
    snprintf(out, PATH_MAX, "%.2000s/%.2000s", base, path);
    return below(out);
}

static int of_handle(char *out, int fd) {
    char link[64];
    if (!control || fd < 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, out, PATH_MAX - 1);
    if (size < 0) return 0;
    out[size] = 0;
    return below(out);
}

static void note(const char *kind, const char *path, const char *other, off_t offset, const void *data,
                 size_t size) {
    char head[2 * PATH_MAX + 128];
    int keep = errno;
    struct stat found = {0};
    if (!other || lstat(other, &found)) lstat(path, &found);
    int length = snprintf(head, sizeof head, "%s\t%d\t%s\t%s\t%lu\t%ld\t%zu\n", kind, getpid(), path,
                          other ? other : "", (unsigned long)found.st_ino, (long)offset, control->with_data && data ? size : 0);
    struct iovec parts[2] = {{head, length}, {(void *)data, control->with_data && data ? size : 0}};
    REAL(writev);
    if (journal >= 0) real(journal, parts, 2);
    errno = keep;
}

static int maps_control(int pid) {     /* so that a number used again by a stranger is left alone */
    char name[64], *line = NULL;
    size_t size = 0;
    int found = 0;
    snprintf(name, sizeof name, "/proc/%d/maps", pid);
    FILE *file = fopen(name, "r");
    while (file && !found && getline(&line, &size, file) > 0) found = strstr(line, where) != NULL;
    if (file) fclose(file);
    return found;
}

static void kill_all(const char *path) {
    note("killed", path, NULL, 0, NULL, 0);
    long number = control->number < 256 ? control->number : 256;
    for (long slot = 0; slot < number; slot++)
        if (control->pids[slot] != getpid() && maps_control(control->pids[slot]))
            kill(control->pids[slot], SIGKILL);
    kill(getpid(), SIGKILL);
    pause();
}

/* What shall happen at this call: an action, or NOTHING. */
static long turn(long kind, const char *path) {
    if (!(control->kinds & kind)) return NOTHING;
    long number = __atomic_add_fetch(&control->count, 1, __ATOMIC_SEQ_CST), action = control->action;
    if (!control->target || number < control->target) return NOTHING;
    if (number > control->target && action != FAIL_ON && action != TERMINATE_ON) return NOTHING;
    control->acted = 1;
    if (action == TERMINATE_ON) kill(getpid(), SIGTERM);
    if (action == KILL_BEFORE) kill_all(path);
    if (action == FAIL_ONCE || action == FAIL_ON) note("failed", path, NULL, 0, NULL, 0);
    return action;
}

#define FAILS(action) ((action) == FAIL_ONCE || (action) == FAIL_ON)

static ssize_t guarded_write(int fd, const void *data, size_t size, off_t at, int (*flush)(FILE *), FILE *file) {
    char path[PATH_MAX];
    REAL(pwrite);
    static size_t (*put)(const void *, size_t, size_t, FILE *);
    if (!put) put = dlsym(RTLD_NEXT, "fwrite");
    int ours = of_handle(path, fd);
    if (ours) pthread_mutex_lock(&lock);
    long action = ours ? turn(WRITE, path) : NOTHING;
    if (FAILS(action)) {
        pthread_mutex_unlock(&lock);
        errno = control->error;
        return -1;
    }
    size_t part = action == KILL_HALFWAY ? size / 2 : size;
    ssize_t done = file ? (ssize_t)put(data, 1, part, file) : at >= 0 ? real(fd, data, part, at)
                                                                       : real_write(fd, data, part);
    if (ours) {
        if (file) flush(file);
        off_t end = at >= 0 ? at + done : lseek(fd, 0, SEEK_CUR);
        if (done > 0) note("write", path, NULL, end - done, data, done);
        if (action == KILL_HALFWAY || action == KILL_AFTER) kill_all(path);
        pthread_mutex_unlock(&lock);
    }
    return done;
}

ssize_t write(int fd, const void *data, size_t size) { return guarded_write(fd, data, size, -1, NULL, NULL); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    return guarded_write(fd, data, size, at, NULL, NULL);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) {
    return guarded_write(fd, data, size, at, NULL, NULL);
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    char path[PATH_MAX];
    REAL(writev);
    if (!of_handle(path, fd)) return real(fd, parts, count);
    ssize_t total = 0;                  /* one part at a time: a short writev is as allowed as a short write */
    for (int i = 0; i < count; i++) {
        ssize_t done = write(fd, parts[i].iov_base, parts[i].iov_len);
        if (done < 0) return total ? total : done;
        total += done;
        if ((size_t)done < parts[i].iov_len) break;
    }
    return total;
}
size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
    char path[PATH_MAX];
    static size_t (*real)(const void *, size_t, size_t, FILE *);
    if (!real) real = dlsym(RTLD_NEXT, "fwrite");
    if (!of_handle(path, fileno(file))) return real(data, size, count, file);
    fflush(file);
    ssize_t done = guarded_write(fileno(file), data, size * count, -1, fflush, file);
    return done < 0 ? 0 : done / (size ? size : 1);
}

/* A call on a path or a handle that either happens or does not. */
#define SIMPLE(kind, word, known, first, second, call) \
    do { \
        if (!(known)) return call; \
        pthread_mutex_lock(&lock); \
        long action = turn(kind, first); \
        if (FAILS(action)) { pthread_mutex_unlock(&lock); errno = control->error; return -1; } \
        if (action == KILL_HALFWAY) kill_all(first); \
        int result = call; \
        if (result >= 0) note(word, first, second, 0, NULL, 0); \
        if (action == KILL_AFTER) kill_all(first); \
        pthread_mutex_unlock(&lock); \
        return result; \
    } while (0)

int fsync(int fd) {
    char path[PATH_MAX];
    REAL(fsync);
    SIMPLE(FSYNC, "fsync", of_handle(path, fd), path, NULL, real(fd));
}
int fdatasync(int fd) {
    char path[PATH_MAX];
    REAL(fdatasync);
    SIMPLE(FSYNC, "fsync", of_handle(path, fd), path, NULL, real(fd));
}
int renameat2(int from, const char *old, int to, const char *new, unsigned int flags) {
    char path[PATH_MAX], other[PATH_MAX];
    REAL(renameat2);
    int known = absolute(path, from, old);
    known &= absolute(other, to, new);
    SIMPLE(RENAME, flags & RENAME_EXCHANGE ? "exchange" : "rename", known, path, other,
           real(from, old, to, new, flags));
}
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

int unlinkat(int folder, const char *name, int flags) {
    char path[PATH_MAX];
    REAL(unlinkat);
    SIMPLE(OTHER, "unlink", absolute(path, folder, name), path, NULL, real(folder, name, flags));
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }
int mkdirat(int folder, const char *name, mode_t mode) {
    char path[PATH_MAX];
    REAL(mkdirat);
    SIMPLE(OTHER, "mkdir", absolute(path, folder, name), path, NULL, real(folder, name, mode));
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }
int ftruncate(int fd, off_t size) {
    char path[PATH_MAX], text[32];
    REAL(ftruncate);
    snprintf(text, sizeof text, "%ld", (long)size);
    SIMPLE(OTHER, "truncate", of_handle(path, fd), path, text, real(fd, size));
}
int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }

static int guarded_open(int folder, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    static int (*real)(int, const char *, int, ...);
    if (!real) real = dlsym(RTLD_NEXT, "openat64");
    if (!(flags & (O_CREAT | O_TRUNC)) || !absolute(path, folder, name)) return real(folder, name, flags, mode);
    struct stat found;
    int there = !stat(path, &found);
    SIMPLE(OTHER, !there ? "create" : flags & O_TRUNC ? "truncate" : "open", 1, path, "0",
           real(folder, name, flags, mode));
}
#define WITH_MODE(last) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, last); mode = va_arg(rest, int); va_end(rest); }

int open(const char *name, int flags, ...) { WITH_MODE(flags) return guarded_open(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { WITH_MODE(flags) return guarded_open(AT_FDCWD, name, flags, mode); }
int openat(int folder, const char *name, int flags, ...) {
    WITH_MODE(flags) return guarded_open(folder, name, flags, mode);
}
int openat64(int folder, const char *name, int flags, ...) {
    WITH_MODE(flags) return guarded_open(folder, name, flags, mode);
}
