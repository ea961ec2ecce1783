#pragma once
#include <stddef.h>
#include <stdint.h>
typedef int pid_t;
typedef long ssize_t;
typedef long off_t;
typedef int clockid_t;
