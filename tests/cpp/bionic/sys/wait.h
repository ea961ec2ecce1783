#pragma once
#include <sys/types.h>
enum { WNOHANG = 1 };
pid_t waitpid(pid_t, int*, int);
#define WIFSIGNALED(s) (((s) & 0x7f) + 1 >= 2)
#define WTERMSIG(s) ((s) & 0x7f)
#define WIFEXITED(s) (((s) & 0x7f) == 0)
#define WEXITSTATUS(s) (((s) & 0xff00) >> 8)
