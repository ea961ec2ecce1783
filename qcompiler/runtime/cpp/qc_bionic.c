/* Thread-local variables for Android before version 10 (API level 29), whose loader has none: clang calls __emutls_get_address for the address of one. The
compiler's own library has that function, which not every clang comes with. Memory is freed by libc's own function, which is there when a thread ends after the
library was closed. */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* What clang makes of a variable (LLVM, CodeGen/LowerEmuTLS.cpp): `object` is ours, zero at first; `initial` is null for zeros. */
typedef struct {
  uintptr_t size, alignment, object;
  const void* initial;
} variable;

enum { MOST = 16 }; /* variables of a library */
static pthread_key_t keys[MOST];
static int count;

static pthread_key_t key_of(variable* v) {
  uintptr_t made = __atomic_load_n(&v->object, __ATOMIC_ACQUIRE); /* 1 + its key */
  if (made) return (pthread_key_t)(made - 1);
  pthread_key_t key;
  if (pthread_key_create(&key, free)) abort(); /* a process has 128 keys: nothing could be reported without one */
  if (!__atomic_compare_exchange_n(&v->object, &made, (uintptr_t)key + 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) { /* another thread was first */
    pthread_key_delete(key);
    return (pthread_key_t)(made - 1);
  }
  int place = __atomic_fetch_add(&count, 1, __ATOMIC_RELAXED);
  if (place >= MOST) abort();
  keys[place] = key;
  return key;
}

void* __emutls_get_address(variable* v) {
  pthread_key_t key = key_of(v);
  void* place = pthread_getspecific(key);
  if (place) return place;
  place = malloc(v->size); /* aligned for any type of C; the runtime's variables ask for no more */
  if (!place || pthread_setspecific(key, place)) abort();
  return v->initial ? memcpy(place, v->initial, v->size) : memset(place, 0, v->size);
}

/* A closed library gives its keys back, and the memory of the thread that closes it. */
__attribute__((destructor)) static void give_back(void) {
  while (count) {
    void* place = pthread_getspecific(keys[--count]);
    pthread_key_delete(keys[count]);
    free(place);
  }
}
