#pragma once
#include <signal.h>
typedef long pthread_t;
typedef int pthread_key_t;
typedef struct { int32_t words[sizeof(long) == 8 ? 10 : 1]; } pthread_mutex_t;
#define PTHREAD_MUTEX_INITIALIZER {{0}}
int pthread_create(pthread_t*, const void*, void* (*)(void*), void*);
int pthread_join(pthread_t, void**);
int pthread_mutex_lock(pthread_mutex_t*);
int pthread_mutex_unlock(pthread_mutex_t*);
int pthread_key_create(pthread_key_t*, void (*)(void*));
int pthread_key_delete(pthread_key_t);
int pthread_setspecific(pthread_key_t, const void*);
void* pthread_getspecific(pthread_key_t);
