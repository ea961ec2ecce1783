/* What a session needs of the machinery that runs its steps. qc_threads.c has it for CPUs and qc_cuda.c for GPUs; a library contains one of them.
 *
 * Every function that can fail returns a status and has called `fail`. */
#ifndef QC_ENGINE_H
#define QC_ENGINE_H

#include "qcompiler/qcompiler.h"

/* Memory and threads, or a stream of a device. */
typedef struct engine engine;

/* The memory of one run, and the compiled shape that it is for. workspace: null for the engine's own. constants: null for the library's own. One pointer per
 * port, in order. */
typedef struct {
  void* workspace;
  const void* constants;
  const void* const* inputs;
  void* const* outputs;
  int32_t shape;
} engine_memory;

qc_status engine_create(int32_t threads, engine** made);
/* Null is fine. */
void engine_destroy(engine* e);

/* Run steps [begin, end). seconds: null, or one element per step: how long each took. */
qc_status engine_run(engine* e, const engine_memory* memory, int32_t begin, int32_t end, double* seconds);

/* A zeroed buffer for the port `name`, 64-byte aligned, that vector loads may read past the end of. `what`: the function that the caller called. */
qc_status engine_allocate(engine* e, const char* what, const char* name, size_t bytes, void** memory);
void engine_free(engine* e, void* memory);

/* Set this thread's qc_last_error; returns `status`. */
__attribute__((format(printf, 2, 3))) qc_status fail(qc_status status, const char* format, ...);

extern const char qc_constants[];

#endif
