#pragma once
#include <sys/types.h>
typedef long time_t;
struct timespec { time_t tv_sec;
long tv_nsec; };
enum { CLOCK_REALTIME, CLOCK_MONOTONIC };
int clock_gettime(clockid_t, struct timespec*);
int nanosleep(const struct timespec*, struct timespec*);
