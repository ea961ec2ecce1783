/* C interface of a library compiled by qcompiler.
 *
 * The library is self-contained: model, weights, kernels and thread pool; it needs libc, libm and pthread. Open it with dlopen (any number of them
 * may be open at once) or link to one. Every function that can fail returns a qc_status; qc_last_error() then has a sentence about it.
 *
 * Ownership: what qc_*_info returns belongs to the library. Bound buffers stay the caller's and must live until the session is destroyed or
 * another buffer is bound. Threads: one session serves one call at a time (a second one gets QC_ERROR_BUSY); sessions are independent of each other.
 */
#ifndef QCOMPILER_QCOMPILER_H
#define QCOMPILER_QCOMPILER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define QC_ABI_VERSION 1
#define QC_MAX_RANK 8

typedef enum qc_status {
  QC_OK = 0,
  QC_ERROR_ARGUMENT = 1,  /* a null pointer, or a number out of range */
  QC_ERROR_NAME = 2,      /* no input or output of that name */
  QC_ERROR_SIZE = 3,      /* a buffer's size in bytes is not the tensor's */
  QC_ERROR_ALIGNMENT = 4, /* a buffer is not aligned to its element type */
  QC_ERROR_STATE = 5,     /* run before every input was set */
  QC_ERROR_BUSY = 6,      /* another thread is inside this session */
  QC_ERROR_DEVICE = 7,    /* this CPU lacks an instruction set that the library uses */
  QC_ERROR_MEMORY = 8,    /* out of memory, or threads could not be started */
  QC_ERROR_LIBRARY = 9    /* (C++ wrapper) the file is no library of ours, or of another ABI version */
} qc_status;

typedef enum qc_dtype { QC_FLOAT32 = 0, QC_INT8 = 1, QC_UINT8 = 2, QC_INT32 = 3, QC_INT64 = 4, QC_BOOL = 5, QC_FLOAT64 = 6, QC_INT16 = 7, QC_FLOAT16 = 8 } qc_dtype;

/* A network input or output: row-major, dense. */
typedef struct qc_tensor_info {
  const char* name;
  qc_dtype dtype;
  int32_t rank;
  int64_t shape[QC_MAX_RANK];
  size_t bytes;       /* of the whole tensor */
  float scale;        /* quantization of the first (last) 8-bit value behind this port: real = scale * (q - zero_point); 0 when there is none */
  int32_t zero_point;
} qc_tensor_info;

typedef struct qc_session qc_session;

int32_t qc_abi_version(void);
const char* qc_last_error(void); /* of this thread; never null */
const char* qc_manifest_json(size_t* length);
const char* qc_target_name(void);

int32_t qc_input_count(void);
int32_t qc_output_count(void);
const qc_tensor_info* qc_input_info(int32_t index);  /* null when out of range */
const qc_tensor_info* qc_output_info(int32_t index);

/* A session with `threads` threads (the caller's and threads - 1 workers). All memory it will ever use is allocated here. */
qc_status qc_session_create(int32_t threads, qc_session** session);
void qc_session_destroy(qc_session* session); /* null is fine */

/* Zero-copy: use the caller's buffer of exactly `bytes` bytes, aligned to its element type, from the next run on. */
qc_status qc_session_bind_input(qc_session* session, const char* name, const void* data, size_t bytes);
qc_status qc_session_bind_output(qc_session* session, const char* name, void* data, size_t bytes);

/* The session's own buffer for a port (64-byte aligned), allocated on first use and bound: write inputs there, read outputs from there. */
qc_status qc_session_input_buffer(qc_session* session, const char* name, void** data);
qc_status qc_session_output_buffer(qc_session* session, const char* name, void** data);

/* Run the network. Every input must have been bound; unbound outputs get the session's own buffers. */
qc_status qc_session_run(qc_session* session);

/* Run steps [begin, end) of the manifest on memory of the caller's: what tracing and profiling use.
 * workspace: qc_workspace_bytes(), 64-byte aligned. constants: null for the library's own. */
qc_status qc_session_execute(qc_session* session, void* workspace, const void* constants, const void* const* inputs, void* const* outputs, int32_t begin,
                             int32_t end);
size_t qc_workspace_bytes(void);
int32_t qc_step_count(void);

#ifdef __cplusplus
}
#endif
#endif
