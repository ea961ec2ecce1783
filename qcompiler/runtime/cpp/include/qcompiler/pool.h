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
 * Batching: with a `deadline`, of a library for several batches, requests wait for others to run with: until they fill the largest batch, else until the first
 * of them has waited that long; then as many run together as the largest batch takes that they fill. Their arrays, in host memory, are copied side by side.
 *
 * States: a pool keeps none. Each request has buffers for all inputs and outputs, states among them, and whoever asks hands the next values on.
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
#include <time.h>

#include "qcompiler/loader.h"

#ifdef __cplusplus
extern "C" {
#endif

/** How a pool runs. A field of 0 takes its default. */
typedef struct qc_pool_options {
  int32_t streams; /**< sessions that run at the same time, each in a thread of its own (default 1) */
  int32_t threads; /**< threads of each session (default 1) */
  int32_t waiting; /**< requests that may wait (default 2 per stream; with a deadline 2 of the largest batches per stream, and never less than one batch) */
  int32_t pin;     /**< not 0: stream i stays on CPUs i * threads and up, of those that this process may use, in turns */
  double deadline; /**< seconds that a request of the least batch may wait for others to run with, at most 3600 (default 0: every request runs by itself) */
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
  int joins;        /* it may run together with others: it has the shape of the least batch, and nothing is wrong with its buffers */
  int64_t due;      /* when it wants to run, alone if it must: nanoseconds of CLOCK_MONOTONIC */
  qc_pool_done done;
  void* user;
} qc_pool_request;

/* A shape of the library, and how many requests of the least batch run in it together. */
typedef struct qc_pool_batch {
  int32_t shape, requests;
} qc_pool_batch;

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
  qc_pool_batch* batches; /* least first; without a deadline one, of one request */
  int32_t batch_count, most; /* most: requests in the largest */
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
  sched_setaffinity(0, sizeof mine, &mine); /* of this thread alone; bionic has no pthread_setaffinity_np */
}

/* What is padded, and a state, which is in the session's own memory, is copied; nothing else. Null in libraries of the first versions: session_write. */
static inline qc_status qc_pool_give(const qc_library* library, qc_session* session, const qc_tensor_info* info, const void* data) {
  qc_status status = library->session_bind_input(session, info->name, data, info->bytes);
  int copied = status == QC_ERROR_SIZE || status == QC_ERROR_STATE;
  return copied && library->session_write ? library->session_write(session, info->name, data, info->bytes) : status;
}

/* Sets *copied where the run's result has to be fetched by qc_pool_fetch. */
static inline qc_status qc_pool_place(const qc_library* library, qc_session* session, const qc_tensor_info* info, void* data, int* copied) {
  qc_status status = library->session_bind_output(session, info->name, data, info->bytes);
  if (!library->session_read || (status != QC_ERROR_SIZE && status != QC_ERROR_STATE)) return status;
  *copied = 1;
  return QC_OK;
}

static inline qc_status qc_pool_fetch(const qc_library* library, qc_session* session, const qc_tensor_info* info, void* data) {
  void* own = 0;
  qc_status status = library->session_output_buffer(session, info->name, &own);
  if (status == QC_ERROR_STATE || (status == QC_OK && own != data)) return library->session_read(session, info->name, data, info->bytes);
  return status;
}

/* At the shapes of the request. */
static inline qc_status qc_pool_run_at(const qc_library* library, qc_session* session, const qc_pool_request* request) {
  qc_status status = library->session_fit(session, request->shapes, library->input_count());
  for (int32_t i = 0; i < library->input_count() && status == QC_OK; ++i)
    status = qc_pool_give(library, session, library->session_input_info(session, i), request->inputs[i]);
  int copied = 0;
  for (int32_t i = 0; i < library->output_count() && status == QC_OK; ++i)
    status = qc_pool_place(library, session, library->session_output_info(session, i), request->outputs[i], &copied);
  if (status == QC_OK) status = library->session_run(session);
  for (int32_t i = 0; copied && i < library->output_count() && status == QC_OK; ++i)
    status = qc_pool_fetch(library, session, library->session_output_info(session, i), request->outputs[i]);
  return status;
}

static inline qc_status qc_pool_run(const qc_library* library, qc_session* session, const qc_pool_request* request) {
  if (request->shaped) return qc_pool_run_at(library, session, request);
  qc_status status = library->shape_count && library->shape_count() > 1 ? library->session_set_shape(session, 0) : QC_OK;
  for (int32_t i = 0; i < library->input_count() && status == QC_OK; ++i)
    status = qc_pool_give(library, session, library->input_info(i), request->inputs[i]);
  int copied = 0;
  for (int32_t i = 0; i < library->output_count() && status == QC_OK; ++i)
    status = qc_pool_place(library, session, library->output_info(i), request->outputs[i], &copied);
  if (status == QC_OK) status = library->session_run(session);
  for (int32_t i = 0; copied && i < library->output_count() && status == QC_OK; ++i)
    status = qc_pool_fetch(library, session, library->output_info(i), request->outputs[i]);
  return status;
}

/* Several requests in one run, their arrays copied side by side. */
static inline qc_status qc_pool_run_together(const qc_library* library, qc_session* session, const qc_pool_request* group, const qc_pool_batch* batch) {
  qc_status status = library->session_set_shape(session, batch->shape);
  for (int32_t i = 0; i < library->input_count() && status == QC_OK; ++i) {
    const qc_tensor_info* info = library->shape_input_info(batch->shape, i);
    size_t part = info->bytes / (size_t)batch->requests;
    void* whole = 0;
    status = library->session_input_buffer(session, info->name, &whole);
    for (int32_t r = 0; r < batch->requests && status == QC_OK; ++r) memcpy((char*)whole + (size_t)r * part, group[r].inputs[i], part);
  }
  if (status == QC_OK) status = library->session_run(session);
  for (int32_t i = 0; i < library->output_count() && status == QC_OK; ++i) {
    const qc_tensor_info* info = library->shape_output_info(batch->shape, i);
    size_t part = info->bytes / (size_t)batch->requests;
    void* whole = 0;
    status = library->session_output_buffer(session, info->name, &whole);
    for (int32_t r = 0; r < batch->requests && status == QC_OK; ++r) memcpy(group[r].outputs[i], (const char*)whole + (size_t)r * part, part);
  }
  return status;
}

/* The largest batch that `requests` requests fill. */
static inline const qc_pool_batch* qc_pool_filled(const qc_pool* pool, int32_t requests) {
  const qc_pool_batch* found = pool->batches;
  for (int32_t b = 1; b < pool->batch_count && pool->batches[b].requests <= requests; ++b) found = &pool->batches[b];
  return found;
}

/* With the lock held: wait until requests are to run, and say in which batch; null: the pool is closed and its queue empty. Every stream waits for the same,
 * so whichever is woken will do. */
static inline const qc_pool_batch* qc_pool_wait(qc_pool* pool) {
  for (;;) {
    while (!pool->count && !pool->closed) pthread_cond_wait(&pool->filled, &pool->lock);
    if (!pool->count) return 0;
    const qc_pool_request* head = &pool->queue[pool->first];
    int32_t alike = 0;
    while (alike < pool->count && alike < pool->most && pool->queue[(pool->first + alike) % pool->options.waiting].joins) ++alike;
    if (alike < pool->count || alike == pool->most || pool->closed) return qc_pool_filled(pool, alike);
    struct timespec now, due = {(time_t)(head->due / 1000000000), (long)(head->due % 1000000000)};
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (now.tv_sec > due.tv_sec || (now.tv_sec == due.tv_sec && now.tv_nsec >= due.tv_nsec)) return qc_pool_filled(pool, alike);
    pthread_cond_timedwait(&pool->filled, &pool->lock, &due);
  }
}

static inline void* qc_pool_work(void* argument) {
  qc_pool_stream* stream = (qc_pool_stream*)argument;
  qc_pool* pool = stream->pool;
  const qc_library* library = pool->library;
  size_t in = (size_t)library->input_count(), ports = in + (size_t)library->output_count();
  qc_pool_request* group = (qc_pool_request*)calloc((size_t)pool->most, sizeof *group);
  const void** own = (const void**)calloc((size_t)pool->most * (ports + 1), sizeof *own);
  qc_shape* shapes = (qc_shape*)calloc(in + 1, sizeof *shapes); /* a request that runs together with others needs none */
  qc_session* session = 0;
  if (pool->options.pin) qc_pool_pin(pool, stream->index); /* the session's workers, made here, inherit it */
  qc_status status = group && own && shapes ? library->session_create(pool->options.threads, &session) : QC_ERROR_MEMORY;
  pthread_mutex_lock(&pool->lock);
  if (status != QC_OK && pool->status == QC_OK) {
    pool->status = status;
    snprintf(pool->message, sizeof pool->message, "stream %d: %s", (int)stream->index, group && own && shapes ? library->last_error() : "out of memory");
  }
  ++pool->begun;
  pthread_cond_broadcast(&pool->ready);
  const qc_pool_batch* batch;
  while (session && (batch = qc_pool_wait(pool)) != 0) {
    for (int32_t r = 0; r < batch->requests; ++r) {
      qc_pool_request* request = &group[r];
      *request = pool->queue[(pool->first + r) % pool->options.waiting];
      const void** pointers = own + (size_t)r * (ports + 1);
      memcpy(pointers, request->inputs, ports * sizeof *pointers);
      if (request->shaped && batch->requests == 1) memcpy(shapes, request->shapes, in * sizeof *shapes);
      request->inputs = pointers, request->outputs = (void**)(pointers + in), request->shapes = shapes;
    }
    pool->first = (pool->first + batch->requests) % pool->options.waiting;
    pool->count -= batch->requests;
    if (batch->requests == 1) pthread_cond_signal(&pool->drained);
    else pthread_cond_broadcast(&pool->drained);
    if (pool->count) pthread_cond_signal(&pool->filled); /* what is left may be due as well */
    pthread_mutex_unlock(&pool->lock);
    status = batch->requests == 1 ? qc_pool_run(library, session, group) : qc_pool_run_together(library, session, group, batch);
    for (int32_t r = 0; r < batch->requests; ++r)
      if (group[r].done) group[r].done(group[r].user, status, status == QC_OK ? "" : library->last_error());
    pthread_mutex_lock(&pool->lock);
  }
  pthread_mutex_unlock(&pool->lock);
  library->session_destroy(session);
  free(group);
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
  free(pool->batches);
  free(pool->streams);
  free(pool);
}

/* Port number `index` of the inputs and outputs together, at a shape; null behind the last. */
static inline const qc_tensor_info* qc_pool_port(const qc_library* library, int32_t shape, int32_t index) {
  int32_t in = library->input_count();
  return index < in ? library->shape_input_info(shape, index) : library->shape_output_info(shape, index - in);
}

/* Rows that all ports of a shape have, and shape number 0 in all else; 0: it is no batch. */
static inline int64_t qc_pool_rows(const qc_library* library, int32_t shape) {
  int64_t rows = 0;
  const qc_tensor_info* port;
  for (int32_t i = 0; (port = qc_pool_port(library, shape, i)) != 0; ++i) {
    const qc_tensor_info* first = qc_pool_port(library, 0, i);
    if (port->rank < 1 || (i && port->shape[0] != rows)) return 0;
    rows = port->shape[0];
    for (int32_t a = 1; a < port->rank; ++a)
      if (port->shape[a] != first->shape[a]) return 0;
  }
  return rows;
}

/* Find the batches that a pool with a deadline makes: all shapes of the library, multiples of the least. */
static inline qc_status qc_pool_find_batches(qc_pool* pool) {
  const qc_library* library = pool->library;
  int32_t shapes = pool->options.deadline > 0 && library->shape_count ? library->shape_count() : 1;
  pool->batches = (qc_pool_batch*)calloc((size_t)shapes, sizeof *pool->batches);
  if (!pool->batches) return QC_ERROR_MEMORY;
  pool->batch_count = shapes, pool->most = 1;
  pool->batches[0].requests = 1;
  if (!(pool->options.deadline > 0)) return QC_OK;
  if (shapes == 1) return QC_ERROR_ARGUMENT;
  int64_t least = qc_pool_rows(library, 0);
  for (int32_t s = 1; s < shapes; ++s) least = qc_pool_rows(library, s) < least ? qc_pool_rows(library, s) : least;
  for (int32_t s = 0; s < shapes; ++s) {
    int64_t rows = qc_pool_rows(library, s);
    if (least == 0 || rows % least || rows / least > 1 << 20) return QC_ERROR_ARGUMENT;
    qc_pool_batch made = {s, (int32_t)(rows / least)};
    int32_t place = s; /* insertion sort */
    for (; place > 0 && pool->batches[place - 1].requests > made.requests; --place) pool->batches[place] = pool->batches[place - 1];
    pool->batches[place] = made;
  }
  for (int32_t i = 0; i < library->input_count(); ++i)
    if (library->input_state && library->input_state(i) >= 0) return QC_ERROR_ARGUMENT;
  pool->most = pool->batches[shapes - 1].requests;
  return QC_OK;
}

/**
 * A pool of sessions on `library`, which must stay open until the pool is destroyed. options: null for the defaults.
 * On failure `*pool` is null and `message` (of `size` bytes) gets a sentence. Errors: ARGUMENT, MEMORY, and those of qc_session_create.
 */
static inline qc_status qc_pool_create(const qc_library* library, const qc_pool_options* options, qc_pool** made, char* message, size_t size) {
  if (!made || !message || !size) return QC_ERROR_ARGUMENT;
  *made = 0;
  qc_pool_options o = {0, 0, 0, 0, 0};
  if (options) o = *options;
  if (!o.streams) o.streams = 1;
  if (!o.threads) o.threads = 1;
  if (!library || o.streams < 1 || o.streams > 1024 || o.threads < 1 || o.threads > 1024 || o.waiting < 0 || o.waiting > 1 << 20) {
    snprintf(message, size, "qc_pool_create: %d streams of %d threads, %d waiting; 1 to 1024 of both and at most %d waiting are supported", (int)o.streams,
             (int)o.threads, (int)o.waiting, 1 << 20);
    return QC_ERROR_ARGUMENT;
  }
  if (!(o.deadline >= 0 && o.deadline <= 3600)) {
    snprintf(message, size, "qc_pool_create: a deadline of %g seconds; above 0 and up to 3600 is supported, and 0 for requests that run one by one", o.deadline);
    return QC_ERROR_ARGUMENT;
  }
  size_t ports = (size_t)library->input_count() + (size_t)library->output_count();
  qc_pool* pool = (qc_pool*)calloc(1, sizeof *pool);
  snprintf(message, size, "qc_pool_create: out of memory");
  if (!pool) return QC_ERROR_MEMORY;
  pool->library = library;
  pool->options = o;
  qc_status status = qc_pool_find_batches(pool);
  if (status == QC_ERROR_ARGUMENT)
    snprintf(message, size, "qc_pool_create: a deadline is for a library without states for several batches, multiples of the least, and alike in all else; compile "
             "one with --input-shape NAME={1,8},... or leave the deadline out");
  if (status != QC_OK) {
    free(pool->batches);
    free(pool);
    return status;
  }
  if (!o.waiting) o.waiting = (int64_t)2 * o.streams * pool->most <= 1 << 20 ? 2 * o.streams * pool->most : 1 << 20;
  if (o.waiting < pool->most) o.waiting = pool->most;
  pool->options = o;
  pthread_condattr_t monotonic;
  pthread_condattr_init(&monotonic);
  pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
  pthread_mutex_init(&pool->lock, 0);
  pthread_cond_init(&pool->filled, &monotonic);
  pthread_condattr_destroy(&monotonic);
  pthread_cond_init(&pool->drained, 0);
  pthread_cond_init(&pool->ready, 0);
  pool->queue = (qc_pool_request*)calloc((size_t)o.waiting, sizeof *pool->queue);
  pool->pointers = (const void**)calloc((size_t)o.waiting * (ports + 1), sizeof *pool->pointers);
  pool->shapes = (qc_shape*)calloc((size_t)o.waiting * ((size_t)library->input_count() + 1), sizeof *pool->shapes);
  pool->streams = (qc_pool_stream*)calloc((size_t)o.streams, sizeof *pool->streams);
  status = pool->queue && pool->pointers && pool->shapes && pool->streams ? QC_OK : QC_ERROR_MEMORY;
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

/* Whether a request may run together with others. */
static inline int qc_pool_joins(const qc_pool* pool, const qc_shape* shapes, const void* const* inputs, void* const* outputs) {
  const qc_library* library = pool->library;
  int32_t in = library->input_count(), least = pool->batches[0].shape;
  const qc_tensor_info* port;
  if (pool->most == 1 || (!shapes && least != 0)) return 0;
  for (int32_t i = 0; (port = qc_pool_port(library, least, i)) != 0; ++i) {
    const void* data = i < in ? inputs[i] : outputs[i - in];
    size_t elements = 1;
    for (int32_t a = 0; a < port->rank; ++a) elements *= (size_t)port->shape[a];
    if (!data || (uintptr_t)data % (port->bytes / elements)) return 0;
    for (int32_t a = 0; shapes && i < in && a < port->rank; ++a)
      if (shapes[i].rank != port->rank || shapes[i].shape[a] != port->shape[a]) return 0;
  }
  return 1;
}

static inline qc_status qc_pool_enter(qc_pool* pool, const qc_shape* shapes, const void* const* inputs, void* const* outputs, qc_pool_done done, void* user,
                                      int wait) {
  if (!pool || !inputs || !outputs || (shapes && !pool->library->session_fit)) return QC_ERROR_ARGUMENT;
  size_t in = (size_t)pool->library->input_count(), out = (size_t)pool->library->output_count();
  for (size_t i = 0; shapes && i < in; ++i)
    if (!shapes[i].name || strcmp(shapes[i].name, pool->library->input_info((int32_t)i)->name) != 0) return QC_ERROR_NAME;
  int joins = qc_pool_joins(pool, shapes, inputs, outputs);
  struct timespec now = {0, 0};
  if (joins) clock_gettime(CLOCK_MONOTONIC, &now);
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
    pool->queue[place].joins = joins;
    pool->queue[place].due = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec + (int64_t)(1e9 * pool->options.deadline);
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
