/**
 * @file
 * Several sessions on one library, each in a thread of its own, fed from one queue: header only, C11 or C++17, for systems with pthreads.
 *
 *     qc_pool* pool;
 *     char message[256];
 *     qc_pool_options options = {.streams = 2, .threads = 1};
 *     if (qc_pool_create(&model, &options, &pool, message, sizeof message) != QC_OK) ...
 *     const void* inputs[] = {pixels};     // in the order of qc_input_info
 *     void* outputs[] = {logits};
 *     qc_pool_submit(pool, inputs, outputs, when_done, user);
 *     ...
 *     qc_pool_destroy(pool);
 *
 * Sessions share the library's code and weights; nothing is copied: a request's buffers stay the caller's, aligned to their element types, and must live until
 * it is done. Requests begin in the order in which they came.
 *
 * Back-pressure: at most `waiting` requests wait for a stream; qc_pool_submit then waits for room, qc_pool_try_submit says QC_ERROR_BUSY.
 *
 * Closing: from qc_pool_close on, no request is accepted (QC_ERROR_STATE), also from threads that wait for room at that moment; those accepted before are
 * run to their end, and their callbacks called, before it returns. A child made by fork() must not use a pool.
 */
#ifndef QCOMPILER_POOL_H
#define QCOMPILER_POOL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* cpu_set_t */
#endif
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qcompiler/loader.h"

#ifdef __cplusplus
extern "C" {
#endif

/** How a pool runs. A field of 0 takes its default. */
typedef struct qc_pool_options {
  int32_t streams; /**< sessions that run at the same time, each in a thread of its own (default 1) */
  int32_t threads; /**< threads of each session (default 1) */
  int32_t waiting; /**< requests that may wait (default 2 per stream) */
  int32_t pin;     /**< not 0: stream i stays on CPUs i * threads and up, of those that this process may use, in turns */
} qc_pool_options;

/** Called in a stream's thread when a request is done. `message` is a sentence where status is not QC_OK; valid during the call. It may submit requests to the
 * pool with qc_pool_try_submit, and must not close it. */
typedef void (*qc_pool_done)(void* user, qc_status status, const char* message);

typedef struct qc_pool qc_pool;

/* ---- the rest of this file is how it is done --------------------------------------------------------------------------------------- */

typedef struct qc_pool_request {
  const void** inputs;
  void** outputs;
  qc_shape* shapes; /* of the inputs */
  int shaped;       /* 0: at the library's first shape */
  qc_pool_done done;
  void* user;
} qc_pool_request;

typedef struct qc_pool_stream {
  qc_pool* pool;
  int32_t index;
  pthread_t thread;
} qc_pool_stream;

struct qc_pool {
  const qc_library* library;
  qc_pool_options options;
  pthread_mutex_t lock;
  pthread_cond_t filled, drained, ready; /* a request came; a request left the queue; a stream has its session or failed */
  qc_pool_request* queue;                /* a ring of options.waiting requests */
  const void** pointers;                 /* of the requests in the ring: input_count + output_count each */
  qc_shape* shapes;                      /* and input_count each */
  int32_t first, count, closed, begun, started;
  qc_status status; /* of the sessions */
  char message[256];
  qc_pool_stream* streams;
};

static inline void qc_pool_pin(const qc_pool* pool, int32_t index) {
  cpu_set_t allowed, mine;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  CPU_ZERO(&mine);
  int count = CPU_COUNT(&allowed), from = (int)((int64_t)index * pool->options.threads % count);
  for (int cpu = 0, at = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &allowed)) {
      if ((at - from + count) % count < pool->options.threads) CPU_SET(cpu, &mine);
      ++at;
    }
  pthread_setaffinity_np(pthread_self(), sizeof mine, &mine);
}

/* At the shapes of the request. What is padded is copied, nothing else. */
static inline qc_status qc_pool_run_at(const qc_library* library, qc_session* session, const qc_pool_request* request) {
  qc_status status = library->session_fit(session, request->shapes, library->input_count());
  for (int32_t i = 0; i < library->input_count() && status == QC_OK; ++i) {
    const qc_tensor_info* info = library->session_input_info(session, i);
    status = library->session_bind_input(session, info->name, request->inputs[i], info->bytes);
    if (status == QC_ERROR_SIZE) status = library->session_write(session, info->name, request->inputs[i], info->bytes);
  }
  for (int32_t i = 0; i < library->output_count() && status == QC_OK; ++i) {
    const qc_tensor_info* info = library->session_output_info(session, i);
    status = library->session_bind_output(session, info->name, request->outputs[i], info->bytes);
    if (status == QC_ERROR_SIZE) status = QC_OK; /* padded, and read below */
  }
  if (status == QC_OK) status = library->session_run(session);
  for (int32_t i = 0; i < library->output_count() && status == QC_OK; ++i) {
    const qc_tensor_info* info = library->session_output_info(session, i);
    void* own = 0;
    status = library->session_output_buffer(session, info->name, &own);
    if (status == QC_ERROR_STATE || (status == QC_OK && own != request->outputs[i]))
      status = library->session_read(session, info->name, request->outputs[i], info->bytes);
  }
  return status;
}

static inline qc_status qc_pool_run(const qc_library* library, qc_session* session, const qc_pool_request* request) {
  if (request->shaped) return qc_pool_run_at(library, session, request);
  qc_status status = library->shape_count && library->shape_count() > 1 ? library->session_set_shape(session, 0) : QC_OK;
  for (int32_t i = 0; i < library->input_count() && status == QC_OK; ++i)
    status = library->session_bind_input(session, library->input_info(i)->name, request->inputs[i], library->input_info(i)->bytes);
  for (int32_t i = 0; i < library->output_count() && status == QC_OK; ++i)
    status = library->session_bind_output(session, library->output_info(i)->name, request->outputs[i], library->output_info(i)->bytes);
  return status == QC_OK ? library->session_run(session) : status;
}

static inline void* qc_pool_work(void* argument) {
  qc_pool_stream* stream = (qc_pool_stream*)argument;
  qc_pool* pool = stream->pool;
  const qc_library* library = pool->library;
  size_t ports = (size_t)library->input_count() + (size_t)library->output_count();
  const void** own = (const void**)calloc(ports + 1, sizeof *own);
  qc_shape* shapes = (qc_shape*)calloc((size_t)library->input_count() + 1, sizeof *shapes);
  qc_session* session = 0;
  if (pool->options.pin) qc_pool_pin(pool, stream->index); /* the session's workers, made here, inherit it */
  qc_status status = own && shapes ? library->session_create(pool->options.threads, &session) : QC_ERROR_MEMORY;
  pthread_mutex_lock(&pool->lock);
  if (status != QC_OK && pool->status == QC_OK) {
    pool->status = status;
    snprintf(pool->message, sizeof pool->message, "stream %d: %s", (int)stream->index, own && shapes ? library->last_error() : "out of memory");
  }
  ++pool->begun;
  pthread_cond_broadcast(&pool->ready);
  while (session) {
    while (!pool->count && !pool->closed) pthread_cond_wait(&pool->filled, &pool->lock);
    if (!pool->count) break;
    qc_pool_request request = pool->queue[pool->first];
    memcpy(own, request.inputs, ports * sizeof *own);
    if (request.shaped) memcpy(shapes, request.shapes, (size_t)library->input_count() * sizeof *shapes);
    request.inputs = own, request.outputs = (void**)(own + library->input_count()), request.shapes = shapes;
    pool->first = (pool->first + 1) % pool->options.waiting;
    --pool->count;
    pthread_cond_signal(&pool->drained);
    pthread_mutex_unlock(&pool->lock);
    status = qc_pool_run(library, session, &request);
    if (request.done) request.done(request.user, status, status == QC_OK ? "" : library->last_error());
    pthread_mutex_lock(&pool->lock);
  }
  pthread_mutex_unlock(&pool->lock);
  library->session_destroy(session);
  free(own);
  free(shapes);
  return 0;
}

/** Accept no more requests, run those accepted, and end the streams. Closing twice is fine; not from a callback, nor from two threads at once. */
static inline void qc_pool_close(qc_pool* pool) {
  if (!pool) return;
  pthread_mutex_lock(&pool->lock);
  pool->closed = 1;
  pthread_cond_broadcast(&pool->filled);
  pthread_cond_broadcast(&pool->drained);
  pthread_mutex_unlock(&pool->lock);
  for (; pool->started > 0; --pool->started) pthread_join(pool->streams[pool->started - 1].thread, 0);
}

/** Close it and free everything. Null is fine; no other thread may be inside the pool. */
static inline void qc_pool_destroy(qc_pool* pool) {
  if (!pool) return;
  qc_pool_close(pool);
  pthread_mutex_destroy(&pool->lock);
  pthread_cond_destroy(&pool->filled);
  pthread_cond_destroy(&pool->drained);
  pthread_cond_destroy(&pool->ready);
  free(pool->queue);
  free(pool->pointers);
  free(pool->shapes);
  free(pool->streams);
  free(pool);
}

/**
 * A pool of sessions on `library`, which must stay open until the pool is destroyed. options: null for the defaults.
 * On failure `*pool` is null and `message` (of `size` bytes) gets a sentence. Errors: ARGUMENT, MEMORY, and those of qc_session_create.
 */
static inline qc_status qc_pool_create(const qc_library* library, const qc_pool_options* options, qc_pool** made, char* message, size_t size) {
  if (!made || !message || !size) return QC_ERROR_ARGUMENT;
  *made = 0;
  qc_pool_options o = {0, 0, 0, 0};
  if (options) o = *options;
  if (!o.streams) o.streams = 1;
  if (!o.threads) o.threads = 1;
  if (!library || o.streams < 1 || o.streams > 1024 || o.threads < 1 || o.threads > 1024 || o.waiting < 0 || o.waiting > 1 << 20) {
    snprintf(message, size, "qc_pool_create: %d streams of %d threads, %d waiting; 1 to 1024 of both and at most %d waiting are supported", (int)o.streams,
             (int)o.threads, (int)o.waiting, 1 << 20);
    return QC_ERROR_ARGUMENT;
  }
  if (!o.waiting) o.waiting = 2 * o.streams;
  size_t ports = (size_t)library->input_count() + (size_t)library->output_count();
  qc_pool* pool = (qc_pool*)calloc(1, sizeof *pool);
  snprintf(message, size, "qc_pool_create: out of memory");
  if (!pool) return QC_ERROR_MEMORY;
  pool->library = library;
  pool->options = o;
  pthread_mutex_init(&pool->lock, 0);
  pthread_cond_init(&pool->filled, 0);
  pthread_cond_init(&pool->drained, 0);
  pthread_cond_init(&pool->ready, 0);
  pool->queue = (qc_pool_request*)calloc((size_t)o.waiting, sizeof *pool->queue);
  pool->pointers = (const void**)calloc((size_t)o.waiting * (ports + 1), sizeof *pool->pointers);
  pool->shapes = (qc_shape*)calloc((size_t)o.waiting * ((size_t)library->input_count() + 1), sizeof *pool->shapes);
  pool->streams = (qc_pool_stream*)calloc((size_t)o.streams, sizeof *pool->streams);
  qc_status status = pool->queue && pool->pointers && pool->shapes && pool->streams ? QC_OK : QC_ERROR_MEMORY;
  for (int32_t i = 0; i < o.streams && status == QC_OK; ++i) {
    qc_pool_stream* stream = &pool->streams[i];
    stream->pool = pool, stream->index = i;
    if (pthread_create(&stream->thread, 0, qc_pool_work, stream) != 0) {
      status = QC_ERROR_MEMORY;
      snprintf(message, size, "qc_pool_create: could not start stream %d of %d", (int)i + 1, (int)o.streams);
    } else {
      ++pool->started;
    }
  }
  pthread_mutex_lock(&pool->lock);
  while (pool->begun < pool->started) pthread_cond_wait(&pool->ready, &pool->lock);
  if (status == QC_OK && pool->status != QC_OK) {
    status = pool->status;
    snprintf(message, size, "%s", pool->message);
  }
  pthread_mutex_unlock(&pool->lock);
  if (status != QC_OK) {
    qc_pool_destroy(pool);
    return status;
  }
  message[0] = 0;
  *made = pool;
  return QC_OK;
}

static inline qc_status qc_pool_enter(qc_pool* pool, const qc_shape* shapes, const void* const* inputs, void* const* outputs, qc_pool_done done, void* user,
                                      int wait) {
  if (!pool || !inputs || !outputs || (shapes && !pool->library->session_fit)) return QC_ERROR_ARGUMENT;
  size_t in = (size_t)pool->library->input_count(), out = (size_t)pool->library->output_count();
  for (size_t i = 0; shapes && i < in; ++i)
    if (!shapes[i].name || strcmp(shapes[i].name, pool->library->input_info((int32_t)i)->name) != 0) return QC_ERROR_NAME;
  pthread_mutex_lock(&pool->lock);
  while (wait && pool->count == pool->options.waiting && !pool->closed) pthread_cond_wait(&pool->drained, &pool->lock);
  qc_status status = pool->closed ? QC_ERROR_STATE : pool->count == pool->options.waiting ? QC_ERROR_BUSY : QC_OK;
  if (status == QC_OK) {
    int32_t place = (pool->first + pool->count++) % pool->options.waiting;
    const void** own = pool->pointers + (size_t)place * (in + out + 1);
    memcpy(own, inputs, in * sizeof *own);
    memcpy(own + in, outputs, out * sizeof *own);
    pool->queue[place].inputs = own;
    pool->queue[place].shapes = pool->shapes + (size_t)place * (in + 1);
    pool->queue[place].shaped = shapes != 0;
    for (size_t i = 0; shapes && i < in; ++i) {
      pool->queue[place].shapes[i] = shapes[i];
      pool->queue[place].shapes[i].name = pool->library->input_info((int32_t)i)->name;
    }
    pool->queue[place].done = done;
    pool->queue[place].user = user;
    pthread_cond_signal(&pool->filled);
  }
  pthread_mutex_unlock(&pool->lock);
  return status;
}

/**
 * Ask for one run: a pointer per input and per output, in order. Waits for room in the queue. `done` (may be null) is called when outputs are there, or with
 * what was wrong with a buffer. Errors: ARGUMENT (a null pointer; of a single buffer `done` hears), STATE (the pool is closed).
 */
static inline qc_status qc_pool_submit(qc_pool* pool, const void* const* inputs, void* const* outputs, qc_pool_done done, void* user) {
  return qc_pool_enter(pool, 0, inputs, outputs, done, user, 1);
}

/** The same without waiting: QC_ERROR_BUSY where the queue is full. */
static inline qc_status qc_pool_try_submit(qc_pool* pool, const void* const* inputs, void* const* outputs, qc_pool_done done, void* user) {
  return qc_pool_enter(pool, 0, inputs, outputs, done, user, 0);
}

/**
 * As qc_pool_submit, of a library for several shapes: at the shapes that the caller's inputs have, one for each, by name and in order (they are copied). Buffers
 * are as long as those say; what is padded is copied, nothing else. `done` hears of a shape that the library was not compiled for (QC_ERROR_SIZE). Errors:
 * NAME (a shape is not that of the input in its place), ARGUMENT (the library is of a version that has one shape), and those of qc_pool_submit.
 */
static inline qc_status qc_pool_submit_at(qc_pool* pool, const qc_shape* shapes, const void* const* inputs, void* const* outputs, qc_pool_done done, void* user) {
  return shapes ? qc_pool_enter(pool, shapes, inputs, outputs, done, user, 1) : QC_ERROR_ARGUMENT;
}

#ifdef __cplusplus
}
#endif
#endif
