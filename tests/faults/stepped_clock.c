/* Preloaded into a process: its clocks are off by as many seconds as the file named by
 * MESH_TEST_CLOCK says (two little-endian int64, mapped, so that a change shows at once). The first
 * is for the wall clock alone, as when somebody sets it. The second is for all but the steady clock,
 * as when the machine has slept. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *offsets_s;

__attribute__((constructor)) static void open_clock(void) {
    const char *path = getenv("MESH_TEST_CLOCK");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) return;
    void *page = mmap(NULL, 2 * sizeof *offsets_s, PROT_READ, MAP_SHARED, fd, 0);
    if (page != MAP_FAILED) offsets_s = page;
    close(fd);
}

static int64_t offset(clockid_t clock) {
    if (!offsets_s) return 0;
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) return offsets_s[0] + offsets_s[1];
    return clock == CLOCK_BOOTTIME ? offsets_s[1] : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(clock, now);
    if (!failed) now->tv_sec += offset(clock);
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec time;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &time);
    now->tv_sec = time.tv_sec;
    now->tv_usec = time.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}
