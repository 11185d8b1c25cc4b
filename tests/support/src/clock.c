// A wall clock that can be stepped while a program runs: preloaded, it adds to the system's clock what a file says.
//
// libfaketime does the same and more, but never starts beside jemalloc, which Redis is linked with: its own start
// allocates memory, and jemalloc's asks for the time. This needs no start of its own, and reads no file per call.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

// In nanoseconds; the file that TENURE_CLOCK names. Zero until it is mapped.
static const volatile int64_t zero;
static const volatile int64_t *offset = &zero;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("TENURE_CLOCK");
    int file = path ? open(path, O_RDONLY) : -1;
    void *mapped = file < 0 ? MAP_FAILED : mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
    // A server whose clock can't be stepped would make a run that finds nothing.
    if (mapped == MAP_FAILED) _exit(97);
    offset = mapped;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    // A machine's monotonic clock is never stepped.
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) {
        int64_t nanos = now->tv_nsec + *offset % 1000000000;
        now->tv_sec += *offset / 1000000000 + (nanos >= 1000000000) - (nanos < 0);
        now->tv_nsec = (nanos + 1000000000) % 1000000000;
    }
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    struct timespec time;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &time);
    now->tv_sec = time.tv_sec;
    now->tv_usec = time.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *now) {
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    if (now) *now = time.tv_sec;
    return time.tv_sec;
}
