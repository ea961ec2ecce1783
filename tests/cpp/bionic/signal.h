#pragma once
#include <time.h>
typedef struct { unsigned long bits[16 / sizeof(long)]; } sigset_t;
enum { SIG_BLOCK, SIG_UNBLOCK, SIG_SETMASK, SIGKILL = 9, SIGSEGV = 11, SIGTERM = 15, SIGCHLD = 17, SIGALRM = 14 };
int sigfillset(sigset_t*);
int sigemptyset(sigset_t*);
int sigaddset(sigset_t*, int);
int pthread_sigmask(int, const sigset_t*, sigset_t*);
int sigprocmask(int, const sigset_t*, sigset_t*);
int kill(int, int);
int sigtimedwait(const sigset_t*, void*, const struct timespec*);
typedef void (*sighandler_t)(int);
sighandler_t signal(int, sighandler_t);
