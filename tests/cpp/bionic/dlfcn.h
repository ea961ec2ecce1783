#pragma once
void* dlopen(const char*, int);
int dlclose(void*);
void* dlsym(void*, const char*);
char* dlerror(void);
#if defined(__LP64__)
enum { RTLD_LOCAL = 0, RTLD_NOW = 2, RTLD_NOLOAD = 4 };
#else
enum { RTLD_LOCAL = 0, RTLD_NOW = 0, RTLD_NOLOAD = 4 };
#endif
