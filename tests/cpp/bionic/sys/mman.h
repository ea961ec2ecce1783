#pragma once
#include <sys/types.h>
enum { PROT_READ = 1, PROT_WRITE = 2, MAP_SHARED = 1, MAP_PRIVATE = 2, MAP_ANONYMOUS = 32 };
#define MAP_FAILED ((void*)-1)
void* mmap(void*, size_t, int, int, int, off_t);
int munmap(void*, size_t);
