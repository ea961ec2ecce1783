/* The runtime inside every compiled library: sessions, bound buffers, and a thread pool for the kernels' parallel loops.
 *
 * It is compiled together with `model.h`, which the compiler writes: QC_INPUTS, QC_OUTPUTS (initializers of qc_tensor_info), QC_INPUT_COUNT,
 * QC_OUTPUT_COUNT, QC_WORKSPACE, QC_STEPS, QC_TARGET, QC_MISSING_FEATURE (an expression: a string naming the first CPU feature that this machine lacks, or 0).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__aarch64__) || defined(__arm__)
#include <sys/auxv.h>
#endif

#include "qcompiler/qcompiler.h"
#include "model.h"

#define EXPORT __attribute__((visibility("default")))

/* ---- errors ---------------------------------------------------------------------------------------------------------------------- */

static _Thread_local char last_error[512] = "no error";

__attribute__((format(printf, 2, 3))) static qc_status fail(qc_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

EXPORT const char* qc_last_error(void) { return last_error; }

/* ---- what the generated code calls and provides ---------------------------------------------------------------------------------- */

/* The calling convention of generated entry points (TVM FFI): 16-byte tagged values. */
typedef struct { int32_t type; uint32_t padding; union { int64_t integer; void* pointer; } value; } argument;
enum { ARGUMENT_NONE = 0, ARGUMENT_INT = 1, ARGUMENT_POINTER = 4 };
int __tvm_ffi_qc_run(void* self, const argument* arguments, int32_t count, argument* result);

extern const char qc_constants[];
extern const char qc_manifest[];
extern const char qc_manifest_end[];

/* Generated code reports a wrong argument type this way; the types below are always right. */
void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  size_t used = (size_t)snprintf(last_error, sizeof last_error, "%s: ", kind);
  for (int32_t i = 0; i < count && used < sizeof last_error; ++i) used += (size_t)snprintf(last_error + used, sizeof last_error - used, "%s", parts[i]);
}

/* ---- thread pool ----------------------------------------------------------------------------------------------------------------- */

/* A parallel loop arrives as a function of (task, {.., task count}, closure) that runs share `task` of `task count` equal shares. Shares are claimed
 * dynamically: the caller works too, so a worker that is late to wake costs nothing but its help. Workers sleep between runs, are woken by a parallel
 * loop, and spin from then to the end of the run. Waking takes the caller a system call and the worker tens of microseconds to come, so a run that is
 * over by then does without: workers are woken at once when the previous run was long, else when this one has become so. */
#define LONG_NS 100000 /* a run this long wakes the workers at once next time */
#define WAKE_NS 50000  /* after a shorter one, they are woken when the run has lasted this long */

typedef struct { void* sync; int32_t tasks; } group;
typedef int (*loop_body)(int32_t task, group* environment, void* closure);

/* Fields are atomic because a late worker may read them while the next job is written; it then fails to claim a task (see `work`). */
typedef struct {
  _Atomic(loop_body) body;
  _Atomic(void*) closure;
  _Atomic int32_t tasks;
} job;

struct qc_session {
  atomic_flag busy;
  int32_t threads;
  pthread_t* workers;
  int32_t started;
  pid_t owner; /* the process whose threads the workers are: a child made by fork() has none of them */
  /* the caller's alone: whether this run has woken the workers, when it began, and how long the last one took (nanoseconds) */
  int awake;
  int64_t began, lasted;
  /* (epoch << 32 | next unclaimed task): one word, so that a task of an old job can't be claimed for a new one */
  _Alignas(64) _Atomic uint64_t ticket;
  _Alignas(64) _Atomic int32_t finished;
  _Alignas(64) _Atomic uint32_t state; /* futex: odd while a run is on; changes wake the workers */
  _Atomic int32_t quit;
  job current;
  void* workspace;
  const void* inputs[QC_INPUT_COUNT + 1];
  void* outputs[QC_OUTPUT_COUNT + 1];
  void* own_inputs[QC_INPUT_COUNT + 1];
  void* own_outputs[QC_OUTPUT_COUNT + 1];
};

static _Thread_local qc_session* running; /* the session whose loops this thread launches */

static inline void pause_cpu(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || (defined(__arm__) && __ARM_ARCH >= 7)
  __asm__ volatile("yield");
#endif
}

static inline int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* One turn of a waiting loop. Whoever is waited for may need this very core (a woken worker often starts on its caller's), so give it up soon: with a
 * busy machine's cores taken, 64 turns of pause keep two threads as fast as one, where 4096 made them up to a tenth slower. */
#define PATIENCE 64
static inline void wait_a_little(uint32_t* turns) {
  if (++*turns % PATIENCE) pause_cpu();
  else sched_yield();
}

#define CLOSED ((uint32_t)INT32_MAX) /* in place of a task: the job is over */

/* Claim and run tasks of the current job until none is left. The ticket is read, then the job, then the ticket is exchanged: if the exchange succeeds,
 * the job was open all the while, and so its fields were not being written: the caller writes them only after it has seen every task of the job
 * finished, and this thread's task finishes after this thread's reads. Returns whether it ran any. */
static int work(qc_session* s) {
  for (int ran = 0;; ran = 1) {
    uint64_t ticket = atomic_load_explicit(&s->ticket, memory_order_acquire);
    loop_body body = atomic_load_explicit(&s->current.body, memory_order_relaxed);
    void* closure = atomic_load_explicit(&s->current.closure, memory_order_relaxed);
    int32_t tasks = atomic_load_explicit(&s->current.tasks, memory_order_relaxed);
    uint32_t task = (uint32_t)ticket;
    if (task == CLOSED || (int32_t)task >= tasks) return ran;
    if (!atomic_compare_exchange_strong_explicit(&s->ticket, &ticket, ticket + 1, memory_order_acq_rel, memory_order_relaxed)) continue;
    group environment = {0, tasks};
    body((int32_t)task, &environment, closure);
    atomic_fetch_add_explicit(&s->finished, 1, memory_order_release);
  }
}

static void wake(qc_session* s) {
  atomic_fetch_add_explicit(&s->state, 1, memory_order_acq_rel);
  syscall(SYS_futex, &s->state, FUTEX_WAKE_PRIVATE, INT_MAX, 0, 0, 0);
  s->awake = 1;
}

static int parallel_launch(loop_body body, void* closure, int32_t tasks) {
  qc_session* s = running;
  group alone = {0, 1};
  (void)tasks; /* always 0: as many as there are threads */
  if (s == 0 || s->started == 0) return body(0, &alone, closure);
  if (!s->awake) {
    if (s->lasted < LONG_NS && now_ns() - s->began < WAKE_NS) return body(0, &alone, closure);
    wake(s);
  }
  int32_t shares = 4 * s->threads; /* more shares than threads even out their speeds */
  uint64_t epoch = (atomic_load_explicit(&s->ticket, memory_order_relaxed) >> 32) + 1;
  atomic_store_explicit(&s->current.body, body, memory_order_relaxed);
  atomic_store_explicit(&s->current.closure, closure, memory_order_relaxed);
  atomic_store_explicit(&s->current.tasks, shares, memory_order_relaxed);
  atomic_store_explicit(&s->finished, 0, memory_order_relaxed);
  atomic_store_explicit(&s->ticket, epoch << 32, memory_order_release);
  work(s);
  for (uint32_t turns = 0; atomic_load_explicit(&s->finished, memory_order_acquire) != shares;) wait_a_little(&turns);
  atomic_store_explicit(&s->ticket, epoch << 32 | CLOSED, memory_order_release);
  return 0;
}

/* Generated code launches through this variable. */
int (*__TVMBackendParallelLaunch)(loop_body, void*, int32_t) = parallel_launch;

static void* worker(void* argument_) {
  qc_session* s = argument_;
  for (uint32_t turns = 0;;) {
    uint32_t state = atomic_load_explicit(&s->state, memory_order_acquire);
    if (atomic_load_explicit(&s->quit, memory_order_acquire)) return 0;
    if ((state & 1) == 0) {
      syscall(SYS_futex, &s->state, FUTEX_WAIT_PRIVATE, state, 0, 0, 0);
      continue;
    }
    if (work(s)) turns = 0;
    else wait_a_little(&turns);
  }
}

static void begin_run(qc_session* s) {
  running = s;
  s->awake = 0;
  if (s->started) s->began = now_ns();
}

static void end_run(qc_session* s) {
  if (s->started) s->lasted = now_ns() - s->began;
  if (s->awake) atomic_fetch_add_explicit(&s->state, 1, memory_order_acq_rel);
  running = 0;
}

/* ---- introspection --------------------------------------------------------------------------------------------------------------- */

static const qc_tensor_info input_infos[QC_INPUT_COUNT + 1] = {QC_INPUTS};
static const qc_tensor_info output_infos[QC_OUTPUT_COUNT + 1] = {QC_OUTPUTS};

EXPORT int32_t qc_abi_version(void) { return QC_ABI_VERSION; }
EXPORT const char* qc_target_name(void) { return QC_TARGET; }
EXPORT size_t qc_workspace_bytes(void) { return QC_WORKSPACE + 64; }
EXPORT int32_t qc_step_count(void) { return QC_STEPS; }
EXPORT int32_t qc_input_count(void) { return QC_INPUT_COUNT; }
EXPORT int32_t qc_output_count(void) { return QC_OUTPUT_COUNT; }
EXPORT const qc_tensor_info* qc_input_info(int32_t i) { return i >= 0 && i < QC_INPUT_COUNT ? &input_infos[i] : 0; }
EXPORT const qc_tensor_info* qc_output_info(int32_t i) { return i >= 0 && i < QC_OUTPUT_COUNT ? &output_infos[i] : 0; }

EXPORT const char* qc_manifest_json(size_t* length) {
  if (length) *length = (size_t)(qc_manifest_end - qc_manifest);
  return qc_manifest;
}

/* ---- sessions -------------------------------------------------------------------------------------------------------------------- */

static void* allocate(size_t bytes) {
  void* memory = 0;
  if (posix_memalign(&memory, 64, bytes + 128)) return 0; /* vector loads may read past the end */
  memset(memory, 0, bytes + 128);
  return memory;
}

EXPORT void qc_session_destroy(qc_session* s) {
  if (!s) return;
  if (s->started && s->owner == getpid()) {
    atomic_store_explicit(&s->quit, 1, memory_order_release);
    atomic_fetch_add_explicit(&s->state, 2, memory_order_acq_rel);
    syscall(SYS_futex, &s->state, FUTEX_WAKE_PRIVATE, INT_MAX, 0, 0, 0);
    for (int32_t i = 0; i < s->started; ++i) pthread_join(s->workers[i], 0);
  }
  free(s->workers);
  free(s->workspace);
  for (int32_t i = 0; i < QC_INPUT_COUNT; ++i) free(s->own_inputs[i]);
  for (int32_t i = 0; i < QC_OUTPUT_COUNT; ++i) free(s->own_outputs[i]);
  free(s);
}

EXPORT qc_status qc_session_create(int32_t threads, qc_session** session) {
  if (!session) return fail(QC_ERROR_ARGUMENT, "qc_session_create: the pointer for the new session is null");
  *session = 0;
  if (threads < 1 || threads > 1024) return fail(QC_ERROR_ARGUMENT, "qc_session_create: %d threads asked for; 1 to 1024 are supported", threads);
  const char* missing = QC_MISSING_FEATURE;
  if (missing) return fail(QC_ERROR_DEVICE, "this library was compiled for %s, which needs the CPU feature %s, and this CPU lacks it", QC_TARGET, missing);
  qc_session* s = 0;
  if (posix_memalign((void**)&s, 64, sizeof *s)) return fail(QC_ERROR_MEMORY, "qc_session_create: out of memory");
  memset(s, 0, sizeof *s);
  atomic_flag_clear(&s->busy);
  s->threads = threads;
  s->lasted = LONG_NS; /* unknown yet */
  atomic_init(&s->ticket, CLOSED);
  s->workspace = allocate(QC_WORKSPACE);
  s->workers = calloc((size_t)threads, sizeof *s->workers);
  if (!s->workspace || !s->workers) {
    qc_session_destroy(s);
    return fail(QC_ERROR_MEMORY, "qc_session_create: out of memory (a workspace of %zu bytes)", (size_t)QC_WORKSPACE);
  }
  s->owner = getpid();
  for (int32_t i = 0; i + 1 < threads; ++i) {
    sigset_t all, before; /* signals are the application's: no handler of its runs on a worker */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&s->workers[i], 0, worker, s);
    pthread_sigmask(SIG_SETMASK, &before, 0);
    if (error) {
      qc_session_destroy(s);
      return fail(QC_ERROR_MEMORY, "qc_session_create: could not start worker %d of %d: %s", i + 1, threads - 1, strerror(error));
    }
    s->started = i + 1;
  }
  *session = s;
  return QC_OK;
}

static int32_t find(const qc_tensor_info* infos, int32_t count, const char* name) {
  for (int32_t i = 0; i < count; ++i)
    if (strcmp(infos[i].name, name) == 0) return i;
  return -1;
}

static size_t alignment_of(qc_dtype dtype) {
  static const size_t bytes[] = {4, 1, 1, 4, 8, 1, 8, 2, 2};
  return bytes[dtype];
}

/* Every call that reads or writes a session's state holds it; a second thread is told so instead of waiting. */
static qc_status enter(qc_session* s, const char* what) {
  if (!s) return fail(QC_ERROR_ARGUMENT, "%s: the session is null", what);
  if (atomic_flag_test_and_set_explicit(&s->busy, memory_order_acquire))
    return fail(QC_ERROR_BUSY, "%s: another thread is inside this session; use one session per thread", what);
  return QC_OK;
}

static qc_status leave(qc_session* s, qc_status status) {
  atomic_flag_clear_explicit(&s->busy, memory_order_release);
  return status;
}

/* Find a port by name. */
static qc_status check_port(const char* what, const char* name, const qc_tensor_info* infos, int32_t count, int32_t* index) {
  if (!name) return fail(QC_ERROR_ARGUMENT, "%s: the name is null", what);
  *index = find(infos, count, name);
  if (*index >= 0) return QC_OK;
  char known[256] = "";
  for (int32_t i = 0; i < count; ++i) snprintf(known + strlen(known), sizeof known - strlen(known), "%s'%s'", i ? ", " : "", infos[i].name);
  return fail(QC_ERROR_NAME, "%s: there is no '%s'; known: %s", what, name, known);
}

static qc_status check_pointer(const char* what, const qc_tensor_info* info, const void* data) {
  if (!data) return fail(QC_ERROR_ARGUMENT, "%s: the buffer for '%s' is null", what, info->name);
  size_t alignment = alignment_of(info->dtype);
  if ((uintptr_t)data % alignment)
    return fail(QC_ERROR_ALIGNMENT, "%s: the buffer for '%s' must be aligned to %zu bytes (its element type)", what, info->name, alignment);
  return QC_OK;
}

static qc_status check_buffer(const char* what, const qc_tensor_info* info, const void* data, size_t bytes) {
  qc_status status = check_pointer(what, info, data);
  if (!status && bytes != info->bytes) return fail(QC_ERROR_SIZE, "%s: '%s' has %zu bytes, the buffer %zu", what, info->name, info->bytes, bytes);
  return status;
}

EXPORT qc_status qc_session_bind_input(qc_session* s, const char* name, const void* data, size_t bytes) {
  int32_t i;
  qc_status status = enter(s, __func__);
  if (status) return status;
  status = check_port(__func__, name, input_infos, QC_INPUT_COUNT, &i);
  if (!status) status = check_buffer(__func__, &input_infos[i], data, bytes);
  if (!status) s->inputs[i] = data;
  return leave(s, status);
}

EXPORT qc_status qc_session_bind_output(qc_session* s, const char* name, void* data, size_t bytes) {
  int32_t i;
  qc_status status = enter(s, __func__);
  if (status) return status;
  status = check_port(__func__, name, output_infos, QC_OUTPUT_COUNT, &i);
  if (!status) status = check_buffer(__func__, &output_infos[i], data, bytes);
  if (!status) s->outputs[i] = data;
  return leave(s, status);
}

/* The session's own buffer of a port, allocated on first use. */
static qc_status own_buffer(const char* what, const qc_tensor_info* info, void** own) {
  if (*own || (*own = allocate(info->bytes))) return QC_OK;
  return fail(QC_ERROR_MEMORY, "%s: out of memory (%zu bytes for '%s')", what, info->bytes, info->name);
}

EXPORT qc_status qc_session_input_buffer(qc_session* s, const char* name, void** data) {
  int32_t i;
  if (!data) return fail(QC_ERROR_ARGUMENT, "%s: the pointer for the result is null", __func__);
  qc_status status = enter(s, __func__);
  if (status) return status;
  status = check_port(__func__, name, input_infos, QC_INPUT_COUNT, &i);
  if (!status) status = own_buffer(__func__, &input_infos[i], &s->own_inputs[i]);
  if (!status) s->inputs[i] = *data = s->own_inputs[i];
  return leave(s, status);
}

EXPORT qc_status qc_session_output_buffer(qc_session* s, const char* name, void** data) {
  int32_t i;
  if (!data) return fail(QC_ERROR_ARGUMENT, "%s: the pointer for the result is null", __func__);
  qc_status status = enter(s, __func__);
  if (status) return status;
  status = check_port(__func__, name, output_infos, QC_OUTPUT_COUNT, &i);
  if (!status && !s->outputs[i]) {
    status = own_buffer(__func__, &output_infos[i], &s->own_outputs[i]);
    if (!status) s->outputs[i] = s->own_outputs[i];
  }
  if (!status) *data = s->outputs[i];
  return leave(s, status);
}

static qc_status execute(qc_session* s, void* workspace, const void* constants, const void* const* inputs, void* const* outputs, int32_t begin, int32_t end) {
  argument a[4 + QC_INPUT_COUNT + QC_OUTPUT_COUNT], result = {ARGUMENT_NONE, 0, {0}};
  int32_t n = 0;
  a[n].type = ARGUMENT_POINTER, a[n++].value.pointer = workspace;
  a[n].type = ARGUMENT_POINTER, a[n++].value.pointer = (void*)constants;
  for (int32_t i = 0; i < QC_INPUT_COUNT; ++i) a[n].type = ARGUMENT_POINTER, a[n++].value.pointer = (void*)inputs[i];
  for (int32_t i = 0; i < QC_OUTPUT_COUNT; ++i) a[n].type = ARGUMENT_POINTER, a[n++].value.pointer = outputs[i];
  a[n].type = ARGUMENT_INT, a[n++].value.integer = begin;
  a[n].type = ARGUMENT_INT, a[n++].value.integer = end;
  begin_run(s);
  int error = __tvm_ffi_qc_run(0, a, n, &result); /* sets last_error itself */
  end_run(s);
  return error ? QC_ERROR_LIBRARY : QC_OK;
}

EXPORT qc_status qc_session_execute(qc_session* s, void* workspace, const void* constants, const void* const* inputs, void* const* outputs, int32_t begin,
                                    int32_t end) {
  if (!s || !workspace || !inputs || !outputs) return fail(QC_ERROR_ARGUMENT, "%s: a null pointer", __func__);
  if (begin < 0 || end > QC_STEPS || begin > end)
    return fail(QC_ERROR_ARGUMENT, "%s: steps [%d, %d) asked for; there are %d", __func__, begin, end, QC_STEPS);
  if ((uintptr_t)workspace % 64 || (uintptr_t)constants % 64)
    return fail(QC_ERROR_ALIGNMENT, "%s: the workspace and the constants must be aligned to 64 bytes", __func__);
  qc_status status = QC_OK;
  for (int32_t i = 0; i < QC_INPUT_COUNT && !status; ++i) status = check_pointer(__func__, &input_infos[i], inputs[i]);
  for (int32_t i = 0; i < QC_OUTPUT_COUNT && !status; ++i) status = check_pointer(__func__, &output_infos[i], outputs[i]);
  if (!status) status = enter(s, __func__);
  return status ? status : leave(s, execute(s, workspace, constants ? constants : qc_constants, inputs, outputs, begin, end));
}

EXPORT qc_status qc_session_run(qc_session* s) {
  qc_status status = enter(s, __func__);
  if (status) return status;
  for (int32_t i = 0; i < QC_INPUT_COUNT && !status; ++i)
    if (!s->inputs[i]) status = fail(QC_ERROR_STATE, "%s: input '%s' has not been set", __func__, input_infos[i].name);
  for (int32_t i = 0; i < QC_OUTPUT_COUNT && !status; ++i)
    if (!s->outputs[i]) {
      status = own_buffer(__func__, &output_infos[i], &s->own_outputs[i]);
      s->outputs[i] = s->own_outputs[i];
    }
  if (!status) status = execute(s, s->workspace, qc_constants, s->inputs, s->outputs, 0, QC_STEPS);
  return leave(s, status);
}
