#pragma once
#include <sys/types.h>
void* malloc(size_t);
void* calloc(size_t, size_t);
void* realloc(void*, size_t);
void free(void*);
void abort(void) __attribute__((noreturn));
void exit(int) __attribute__((noreturn));
long strtol(const char*, char**, int);
double strtod(const char*, char**);
int atoi(const char*);
double atof(const char*);
void qsort(void*, size_t, size_t, int (*)(const void*, const void*));
char* getenv(const char*);
int posix_memalign(void**, size_t, size_t);
