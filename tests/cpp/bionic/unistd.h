#pragma once
#include <sys/types.h>
pid_t getpid(void);
pid_t fork(void);
void _exit(int) __attribute__((noreturn));
long sysconf(int);
long syscall(long, ...);
int usleep(unsigned);
int gethostname(char*, size_t);
unsigned alarm(unsigned);
#define _SC_NPROCESSORS_ONLN 0x0061
