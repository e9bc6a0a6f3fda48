/* Checks that name what failed; a test's main returns `failures`. */
#ifndef TSTITCH_CHECK_H
#define TSTITCH_CHECK_H

#include <stdio.h>

static int failures = 0;

#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
            ++failures;                                                               \
        }                                                                             \
    } while (0)

#define CHECK_CLOSE(got, want, tolerance)                                                            \
    do {                                                                                             \
        const double got_ = (got), want_ = (want);                                                   \
        if (!(got_ - want_ <= (tolerance) && want_ - got_ <= (tolerance))) {                         \
            fprintf(stderr, "%s:%d: %s is %.9g, not %.9g\n", __FILE__, __LINE__, #got, got_, want_); \
            ++failures;                                                                              \
        }                                                                                            \
    } while (0)

#define CHECK_OK(call)                                                                           \
    do {                                                                                         \
        const tstitch_status status_ = (call);                                                   \
        if (status_ != TSTITCH_OK) {                                                             \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, tstitch_last_error()); \
            ++failures;                                                                          \
        }                                                                                        \
    } while (0)

#endif
