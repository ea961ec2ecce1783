/* The engine for CPUs: generated code, and a thread pool for its parallel loops. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "qc_engine.h"
#include "qc_model.h"

/* ---- what the generated code calls and provides ---------------------------------------------------------------------------------- */

enum { ARGUMENT_NONE = 0, ARGUMENT_INT = 1, ARGUMENT_POINTER = 4 };

/* Generated code reports a wrong argument type this way; the types below are always right. */
void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  char text[512] = "";
  size_t used = 0;
  for (int32_t i = 0; i < count && used < sizeof text; ++i) used += (size_t)snprintf(text + used, sizeof text - used, "%s", parts[i]);
  fail(QC_ERROR_LIBRARY, "%s: %s", kind, text);
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

struct engine {
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
};

static _Thread_local engine* running; /* the engine whose loops this thread launches */

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
static int work(engine* e) {
  for (int ran = 0;; ran = 1) {
    uint64_t ticket = atomic_load_explicit(&e->ticket, memory_order_acquire);
    loop_body body = atomic_load_explicit(&e->current.body, memory_order_relaxed);
    void* closure = atomic_load_explicit(&e->current.closure, memory_order_relaxed);
    int32_t tasks = atomic_load_explicit(&e->current.tasks, memory_order_relaxed);
    uint32_t task = (uint32_t)ticket;
    if (task == CLOSED || (int32_t)task >= tasks) return ran;
    if (!atomic_compare_exchange_strong_explicit(&e->ticket, &ticket, ticket + 1, memory_order_acq_rel, memory_order_relaxed)) continue;
    group environment = {0, tasks};
    body((int32_t)task, &environment, closure);
    atomic_fetch_add_explicit(&e->finished, 1, memory_order_release);
  }
}

static void wake(engine* e) {
  atomic_fetch_add_explicit(&e->state, 1, memory_order_acq_rel);
  syscall(SYS_futex, &e->state, FUTEX_WAKE_PRIVATE, INT_MAX, 0, 0, 0);
  e->awake = 1;
}

static int parallel_launch(loop_body body, void* closure, int32_t tasks) {
  engine* e = running;
  group alone = {0, 1};
  (void)tasks; /* always 0: as many as there are threads */
  if (e == 0 || e->started == 0) return body(0, &alone, closure);
  if (!e->awake) {
    if (e->lasted < LONG_NS && now_ns() - e->began < WAKE_NS) return body(0, &alone, closure);
    wake(e);
  }
  int32_t shares = 4 * e->threads; /* more shares than threads even out their speeds */
  uint64_t epoch = (atomic_load_explicit(&e->ticket, memory_order_relaxed) >> 32) + 1;
  atomic_store_explicit(&e->current.body, body, memory_order_relaxed);
  atomic_store_explicit(&e->current.closure, closure, memory_order_relaxed);
  atomic_store_explicit(&e->current.tasks, shares, memory_order_relaxed);
  atomic_store_explicit(&e->finished, 0, memory_order_relaxed);
  atomic_store_explicit(&e->ticket, epoch << 32, memory_order_release);
  work(e);
  for (uint32_t turns = 0; atomic_load_explicit(&e->finished, memory_order_acquire) != shares;) wait_a_little(&turns);
  atomic_store_explicit(&e->ticket, epoch << 32 | CLOSED, memory_order_release);
  return 0;
}

/* Generated code launches through this variable. */
int (*__TVMBackendParallelLaunch)(loop_body, void*, int32_t) = parallel_launch;

static void* worker(void* argument_) {
  engine* e = argument_;
  for (uint32_t turns = 0;;) {
    uint32_t state = atomic_load_explicit(&e->state, memory_order_acquire);
    if (atomic_load_explicit(&e->quit, memory_order_acquire)) return 0;
    if ((state & 1) == 0) {
      syscall(SYS_futex, &e->state, FUTEX_WAIT_PRIVATE, state, 0, 0, 0);
      continue;
    }
    if (work(e)) turns = 0;
    else wait_a_little(&turns);
  }
}

static void begin_run(engine* e) {
  running = e;
  e->awake = 0;
  if (e->started) e->began = now_ns();
}

static void end_run(engine* e) {
  if (e->started) e->lasted = now_ns() - e->began;
  if (e->awake) atomic_fetch_add_explicit(&e->state, 1, memory_order_acq_rel);
  running = 0;
}

/* ---- the engine ------------------------------------------------------------------------------------------------------------------ */

/* Zeroed, aligned to 64 bytes; what malloc gave is noted before it. Not posix_memalign: glibc before 2.38 may not find its freed blocks again, and a
 * process that makes and destroys sessions would grow by a workspace each time. */
static void* allocate(size_t bytes) {
  char* block = malloc(bytes + 64 + sizeof block);
  if (!block) return 0;
  void* memory = (void*)(((uintptr_t)block + sizeof block + 63) & ~(uintptr_t)63);
  ((char**)memory)[-1] = block;
  return memset(memory, 0, bytes);
}

static void release(void* memory) {
  if (memory) free(((char**)memory)[-1]);
}

/* Memory that vector loads may read past the end of. */
static void* allocate_tensor(size_t bytes) { return allocate(bytes + 128); }

qc_status engine_allocate(engine* e, const char* what, const char* name, size_t bytes, void** memory) {
  (void)e;
  *memory = allocate_tensor(bytes);
  return *memory ? QC_OK : fail(QC_ERROR_MEMORY, "%s: out of memory (%zu bytes for '%s')", what, bytes, name);
}

void engine_free(engine* e, void* memory) {
  (void)e;
  release(memory);
}

void engine_destroy(engine* e) {
  if (!e) return;
  if (e->started && e->owner == getpid()) {
    atomic_store_explicit(&e->quit, 1, memory_order_release);
    atomic_fetch_add_explicit(&e->state, 2, memory_order_acq_rel);
    syscall(SYS_futex, &e->state, FUTEX_WAKE_PRIVATE, INT_MAX, 0, 0, 0);
    for (int32_t i = 0; i < e->started; ++i) pthread_join(e->workers[i], 0);
  }
  free(e->workers);
  release(e->workspace);
  release(e);
}

#if defined(__x86_64__)
/* AMX tiles are 8 KB of state per thread, which Linux (5.16 and later) gives to a process on request only; all its threads then have them. */
static qc_status request_tiles(void) {
  enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM of asm/prctl.h and the number of the state component */
  if (syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0) return QC_OK;
  return fail(QC_ERROR_DEVICE,
              "this library was compiled for %s, and Linux refuses it AMX tiles (%s): they need version 5.16 or later and, where a thread has an "
              "alternate signal stack, one large enough for them",
              model.target, strerror(errno));
}
#endif

qc_status engine_create(int32_t threads, engine** made) {
#if defined(__x86_64__)
  qc_status granted = model.tiles ? request_tiles() : QC_OK;
  if (granted) return granted;
#endif
  engine* e = allocate(sizeof *e);
  if (!e) return fail(QC_ERROR_MEMORY, "qc_session_create: out of memory");
  e->threads = threads;
  e->lasted = LONG_NS; /* unknown yet */
  atomic_init(&e->ticket, CLOSED);
  e->workspace = allocate_tensor(model.workspace);
  e->workers = calloc((size_t)threads, sizeof *e->workers);
  if (!e->workspace || !e->workers) {
    engine_destroy(e);
    return fail(QC_ERROR_MEMORY, "qc_session_create: out of memory (a workspace of %zu bytes)", model.workspace);
  }
  e->owner = getpid();
  for (int32_t i = 0; i + 1 < threads; ++i) {
    sigset_t all, before; /* signals are the application's: no handler of its runs on a worker */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&e->workers[i], 0, worker, e);
    pthread_sigmask(SIG_SETMASK, &before, 0);
    if (error) {
      engine_destroy(e);
      return fail(QC_ERROR_MEMORY, "qc_session_create: could not start worker %d of %d: %s", i + 1, threads - 1, strerror(error));
    }
    e->started = i + 1;
  }
  *made = e;
  return QC_OK;
}

static qc_status run_steps(engine* e, entry* run, argument* a, int32_t n, int32_t begin, int32_t end) {
  argument result = {ARGUMENT_NONE, 0, {0}};
  a[n - 2].value.integer = begin;
  a[n - 1].value.integer = end;
  begin_run(e);
  int error = run(0, a, n, &result); /* has called `fail` itself */
  end_run(e);
  return error ? QC_ERROR_LIBRARY : QC_OK;
}

qc_status engine_run(engine* e, const engine_memory* memory, int32_t begin, int32_t end, double* seconds) {
  argument a[4 + model.input_count + model.output_count];
  int32_t n = 0;
  a[n].type = ARGUMENT_POINTER, a[n++].value.pointer = memory->workspace ? memory->workspace : e->workspace;
  a[n].type = ARGUMENT_POINTER, a[n++].value.pointer = (void*)(memory->constants ? memory->constants : qc_constants);
  for (int32_t i = 0; i < model.input_count; ++i) a[n].type = ARGUMENT_POINTER, a[n++].value.pointer = (void*)memory->inputs[i];
  for (int32_t i = 0; i < model.output_count; ++i) a[n].type = ARGUMENT_POINTER, a[n++].value.pointer = memory->outputs[i];
  a[n++].type = ARGUMENT_INT;
  a[n++].type = ARGUMENT_INT;
  if (!seconds) return run_steps(e, model.entries[memory->shape], a, n, begin, end);
  qc_status status = QC_OK;
  for (int32_t i = begin; i < end && !status; ++i) {
    int64_t start = now_ns();
    status = run_steps(e, model.entries[memory->shape], a, n, i, i + 1);
    seconds[i] = (double)(now_ns() - start) * 1e-9;
  }
  return status;
}
