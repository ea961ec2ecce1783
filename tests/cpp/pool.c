/* The runtime with a network of ours inside, so that a sanitizer sees all of it: parallel loops, sessions coming and going, two threads in one session.
 *
 *     pool LOOPS      (parallel loops in all, for each number of threads)
 *
 * Linked with qc_model.c, qc_runtime.c and qc_threads.c; model.h says one float input "x \"?\\ é" [8], one output "y", one step. Exit 1 at the first wrong value. */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qcompiler/qcompiler.h"

const char qc_constants[64] = "";
const char qc_manifest[1] = "";
const char qc_manifest_end[1] = "";

typedef struct { void* sync; int32_t tasks; } group;
typedef int (*loop_body)(int32_t, group*, void*);
extern int (*__TVMBackendParallelLaunch)(loop_body, void*, int32_t);
typedef struct { int32_t type; uint32_t padding; union { int64_t integer; void* pointer; } value; } argument;

#define CELLS 67
typedef struct { int64_t cells[CELLS]; int64_t add; } sums; /* what one loop works on: plain memory, so that a missing order is a data race */

static int add(int32_t task, group* environment, void* closure) {
  sums* s = closure;
  int32_t chunk = (CELLS + environment->tasks - 1) / environment->tasks;
  for (int32_t i = task * chunk; i < CELLS && i < (task + 1) * chunk; ++i) s->cells[i] += s->add;
  return 0;
}

static _Thread_local int loops = 100;
static atomic_int hold, inside;

static void die(const char* what) {
  fprintf(stderr, "FAILED: %s: %s\n", what, qc_last_error());
  exit(1);
}

/* The entry point of generated code: arguments are workspace, constants, inputs, outputs, begin, end. */
int __tvm_ffi_qc_run(void* self, const argument* a, int32_t count, argument* result) {
  (void)self, (void)result;
  if (count != 6) die("number of arguments");
  const float* x = a[2].value.pointer;
  float* y = a[3].value.pointer;
  sums s;
  memset(&s, 0, sizeof s);
  int64_t total = 0;
  for (int i = 0; i < loops; ++i) {
    s.add = i;
    total += i;
    if (__TVMBackendParallelLaunch(add, &s, 0)) die("a loop's status");
    if (i % 16 == 0) s.cells[i % CELLS] += 0; /* serial work between loops touches the same memory */
    for (int c = 0; c < CELLS; c += 11)
      if (s.cells[c] != total) die("a cell after a loop");
  }
  for (int c = 0; c < CELLS; ++c)
    if (s.cells[c] != total) die("a cell after the last loop");
  for (int i = 0; i < 8; ++i) y[i] = x[i] + 1;
  while (atomic_load(&hold)) atomic_store(&inside, 1), sched_yield();
  return 0;
}

static const char* input;

static void check_run(qc_session* s, float base) {
  void* data;
  if (qc_session_input_buffer(s, input, &data)) die("input buffer");
  for (int i = 0; i < 8; ++i) ((float*)data)[i] = base + (float)i;
  if (qc_session_run(s)) die("run");
  if (qc_session_output_buffer(s, "y", &data)) die("output buffer");
  for (int i = 0; i < 8; ++i)
    if (((float*)data)[i] != base + (float)i + 1) die("an output");
}

static void* sessions_of_a_thread(void* threads) {
  for (int i = 0; i < 40; ++i) {
    qc_session* s;
    if (qc_session_create(1 + (i + *(int*)threads) % 4, &s)) die("create");
    loops = 1 + i;
    for (int j = 0; j < i % 4; ++j) check_run(s, (float)(i * j));
    qc_session_destroy(s);
  }
  return 0;
}

static void* held_run(void* session) {
  loops = 1;
  check_run(session, 5);
  return 0;
}

int main(int count, char** words) {
  long all = count > 1 ? atol(words[1]) : 100000;
  input = qc_input_info(0)->name;
  if (strcmp(input, "x \"?\\ \xc3\xa9") || qc_input_info(0)->scale != 0.5f || qc_input_info(0)->zero_point != -3) die("the description of the input");
  for (int threads = 2; threads <= 4; ++threads) {
    qc_session* s;
    if (qc_session_create(threads, &s)) die("create");
    loops = 500;
    for (long done = 0; done < all; done += loops) check_run(s, (float)done);
    loops = 2; /* runs over before the workers come, or begin to */
    for (int i = 0; i < 1000; ++i) check_run(s, (float)i);
    qc_session_destroy(s);
  }
  pthread_t thread[3];
  int numbers[3] = {0, 1, 2};
  for (int i = 0; i < 3; ++i) pthread_create(&thread[i], 0, sessions_of_a_thread, &numbers[i]);
  for (int i = 0; i < 3; ++i) pthread_join(thread[i], 0);

  /* two threads in one session: the second is refused, whatever it calls, and the first is not disturbed */
  qc_session* s;
  if (qc_session_create(2, &s)) die("create");
  atomic_store(&hold, 1);
  pthread_create(&thread[0], 0, held_run, s);
  while (!atomic_load(&inside)) sched_yield();
  float values[8] = {0};
  void *data, *workspace;
  if (posix_memalign(&workspace, 64, qc_workspace_bytes())) return 3;
  const void* inputs[1] = {values};
  void* outputs[1] = {values};
  if (qc_session_run(s) != QC_ERROR_BUSY) die("run while busy");
  if (qc_session_bind_input(s, input, values, sizeof values) != QC_ERROR_BUSY) die("bind_input while busy");
  if (qc_session_bind_output(s, "y", values, sizeof values) != QC_ERROR_BUSY) die("bind_output while busy");
  if (qc_session_input_buffer(s, input, &data) != QC_ERROR_BUSY) die("input_buffer while busy");
  if (qc_session_output_buffer(s, "y", &data) != QC_ERROR_BUSY) die("output_buffer while busy");
  if (qc_session_execute(s, workspace, 0, inputs, outputs, 0, 1) != QC_ERROR_BUSY) die("execute while busy");
  double seconds[1];
  if (qc_session_profile(s, workspace, 0, inputs, outputs, 0, 1, seconds) != QC_ERROR_BUSY) die("profile while busy");
  if (!strstr(qc_last_error(), "one session per thread")) die("the message");
  atomic_store(&hold, 0);
  pthread_join(thread[0], 0);
  loops = 3;
  check_run(s, 9);
  qc_session_destroy(s);
  free(workspace);
  puts("ok");
  return 0;
}
