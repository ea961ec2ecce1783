/**
 * @file
 * C interface of a library compiled by qcompiler.
 *
 * The library is self-contained: model, weights, kernels and thread pool in one file that needs libc, libm and pthread. Link to one, or open any
 * number of them at run time (qcompiler/loader.h, or the C++ interface qcompiler/qcompiler.hpp).
 *
 * Errors: every function that can fail returns a qc_status; qc_last_error() then has a sentence about it. Nothing throws, prints or exits.
 *
 * Ownership: what qc_*_info, qc_manifest_json and qc_target_name return belongs to the library. Bound buffers stay the caller's and must live until
 * the session is destroyed or another buffer is bound. A session's own buffers live as long as the session.
 *
 * Threads: one session serves one call at a time; a call made while another thread is inside returns QC_ERROR_BUSY and changes nothing. Sessions are
 * independent of each other. A session may move between threads, with the usual synchronization. After fork() the child may use a session that was
 * idle: it then runs on the child's one thread.
 *
 * Libraries for a GPU: the driver (libcuda.so.1) is looked for when a session is made; CUDA_VISIBLE_DEVICES picks the device. `threads` has no meaning
 * there. Sessions share code and weights on the device. Bound buffers may also be device memory; a session's own are page-locked. A run copies the
 * inputs, replays the network and copies the outputs, and returns when they are there. Sessions don't survive fork().
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
  QC_ERROR_ARGUMENT = 1,  /**< a null pointer, a number out of range, or (C++) another element type than the tensor's */
  QC_ERROR_NAME = 2,      /**< no input or output of that name */
  QC_ERROR_SIZE = 3,      /**< a buffer's size or shape is not the tensor's */
  QC_ERROR_ALIGNMENT = 4, /**< a buffer is not aligned to its element type */
  QC_ERROR_STATE = 5,     /**< run before every input was set, or a caller's buffer for a state that the session keeps */
  QC_ERROR_BUSY = 6,      /**< another thread is inside this session */
  QC_ERROR_DEVICE = 7,    /**< another architecture's, this CPU lacks an instruction set, or there is no driver or no GPU that runs the library */
  QC_ERROR_MEMORY = 8,    /**< out of memory (the GPU's, for a library for one), or threads could not be started */
  QC_ERROR_LIBRARY = 9,   /**< the file is missing, damaged, no library of ours, or of another ABI version */
  QC_ERROR_GPU = 10,      /**< the GPU failed during a run: outputs are undefined, and after most such failures so is every session of this process */
  QC_ERROR_SELFTEST = 11  /**< a test vector's results are wrong: this machine computes wrongly, or the library is damaged */
} qc_status;

typedef enum qc_dtype {
  QC_FLOAT32 = 0, QC_INT8 = 1, QC_UINT8 = 2, QC_INT32 = 3, QC_INT64 = 4, QC_BOOL = 5, QC_FLOAT64 = 6, QC_INT16 = 7, QC_FLOAT16 = 8,
  QC_UINT16 = 9, QC_UINT32 = 10, QC_UINT64 = 11
} qc_dtype;

/** A network input or output: row-major, dense. */
typedef struct qc_tensor_info {
  const char* name; /**< UTF-8, the model's own name */
  qc_dtype dtype;
  int32_t rank;                /**< 0 for a scalar */
  int64_t shape[QC_MAX_RANK];  /**< `rank` extents, in elements */
  size_t bytes;                /**< of the whole tensor */
  float scale;                 /**< of the first (for an output: last) 8-bit value behind this port, real = scale * (q - zero_point); 0 when there is none */
  int32_t zero_point;          /**< of the same value, -128 to 127; 0 to 255 for a port of QC_UINT8 */
} qc_tensor_info;

/** An input's name, and the shape that a caller has for it: `rank` extents. */
typedef struct qc_shape {
  const char* name;
  int32_t rank;
  int64_t shape[QC_MAX_RANK];
} qc_shape;

/** Memory and threads of one caller. Opaque. */
typedef struct qc_session qc_session;

/** QC_ABI_VERSION of the library. */
int32_t qc_abi_version(void);
/** A sentence about the last failure in this thread. Never null; valid until the next failure in this thread. */
const char* qc_last_error(void);
/** The manifest, JSON in UTF-8 (steps, quantization, digests); `length`, unless null, gets its bytes. It is not zero-terminated. */
const char* qc_manifest_json(size_t* length);
/** The row of targets.yaml that the library was compiled for. */
const char* qc_target_name(void);

int32_t qc_input_count(void);
int32_t qc_output_count(void);
/** Port number `index` at the first shape; null when out of range. */
const qc_tensor_info* qc_input_info(int32_t index);
const qc_tensor_info* qc_output_info(int32_t index);

/** The output that is the next value of input number `input`, a state that sessions keep; -1 for every other input. */
int32_t qc_input_state(int32_t input);

/** How many shapes the library was compiled for: 1 for most. Ports have the same names and types at all of them. */
int32_t qc_shape_count(void);
/** Port number `index` at shape number `shape`; null when out of range. */
const qc_tensor_info* qc_shape_input_info(int32_t shape, int32_t index);
const qc_tensor_info* qc_shape_output_info(int32_t shape, int32_t index);
/** Steps at shape number `shape`; 0 when out of range. */
int32_t qc_shape_step_count(int32_t shape);

/**
 * Make a session with `threads` threads (1 to 1024): the caller's and threads - 1 workers, which sleep between runs.
 * The workspace is allocated here; a run allocates nothing, save a port's own buffer on its first use.
 * Destroy it with qc_session_destroy. Errors: ARGUMENT, DEVICE, MEMORY, LIBRARY (a GPU refuses the code); `*session` is null then.
 */
qc_status qc_session_create(int32_t threads, qc_session** session);
/** Join the workers and free everything. Null is fine; no other thread may be inside the session. */
void qc_session_destroy(qc_session* session);

/**
 * Zero copy: use the caller's buffer of exactly `bytes` bytes, aligned to its element type, from the next run on.
 * Inputs are only read; nothing outside the buffer is touched. Errors: ARGUMENT, NAME, SIZE, ALIGNMENT, BUSY; the old binding stays then.
 */
qc_status qc_session_bind_input(qc_session* session, const char* name, const void* data, size_t bytes);
qc_status qc_session_bind_output(qc_session* session, const char* name, void* data, size_t bytes);

/**
 * The session's own buffer of an input (64-byte aligned, zeroed at first), allocated on first use, and bound by this call: write the input there.
 * Errors: ARGUMENT, NAME, MEMORY, BUSY.
 */
qc_status qc_session_input_buffer(qc_session* session, const char* name, void** data);
/** The buffer that a run writes this output to: the one bound, else the session's own, allocated on first use. Errors as for inputs. */
qc_status qc_session_output_buffer(qc_session* session, const char* name, void** data);

/**
 * Run at shape number `shape` from now on; a new session has shape 0. Every buffer has to be bound, or asked for, again. The session's workspace and own
 * buffers serve all shapes, so nothing is allocated. Errors: ARGUMENT, BUSY.
 */
qc_status qc_session_set_shape(qc_session* session, int32_t shape);
/**
 * The same, by the shapes that the caller has for `count` inputs (those not named follow): the compiled shape that they are, or, where the library was
 * compiled with rules for padding, the one that they are padded to with least work. Ports are then as long as the caller's arrays: use qc_session_write and
 * qc_session_read, which pad and cut; a padded port has no buffer. Errors: ARGUMENT, NAME, SIZE (listing the compiled shapes), BUSY; nothing changes then.
 */
qc_status qc_session_fit(qc_session* session, const qc_shape* shapes, int32_t count);
/** Port number `index` as long as the session now has it; belongs to the session and follows it. Null when out of range. */
const qc_tensor_info* qc_session_input_info(qc_session* session, int32_t index);
const qc_tensor_info* qc_session_output_info(qc_session* session, int32_t index);
/** Copy a whole input in from `data`, of any alignment, padded as the library's rules say. Errors: ARGUMENT, NAME, SIZE, MEMORY, BUSY. */
qc_status qc_session_write(qc_session* session, const char* name, const void* data, size_t bytes);
/** Copy a whole output out to `data`, cut to what belongs to the caller's input. Errors: ARGUMENT, NAME, SIZE, MEMORY, BUSY. */
qc_status qc_session_read(qc_session* session, const char* name, void* data, size_t bytes);

/**
 * Run the network. Every input must have been bound; unbound outputs get the session's own buffers. Errors: ARGUMENT, STATE, BUSY, MEMORY, GPU.
 * States (compiled with --state INPUT=OUTPUT) need nothing: zeros (or what a TFLite file has) in the first run, what the output became in the next. They have the
 * session's own buffers, which may be read and written between runs; binding a caller's is QC_ERROR_STATE.
 */
qc_status qc_session_run(qc_session* session);
/** Make all states what they were in the first run, as for a new stream. Errors: ARGUMENT, BUSY. */
qc_status qc_session_reset(qc_session* session);

/**
 * Run steps [begin, end) of the manifest, at the session's shape, on memory of the caller's: what tracing and profiling use.
 * workspace: qc_workspace_bytes() bytes, 64-byte aligned, zeroed before its first use. constants: null for the library's own.
 * inputs, outputs: one pointer per port, in order, aligned to the element type.
 * What a run of all steps at once leaves in the workspace is undefined: with a batch it may go image by image, in memory for one.
 * On a GPU a part of the steps starts from the workspace's and outputs' bytes and leaves what they have become; a run of all steps leaves the workspace alone.
 * Errors: ARGUMENT, ALIGNMENT, BUSY, MEMORY, GPU.
 */
qc_status qc_session_execute(qc_session* session, void* workspace, const void* constants, const void* const* inputs, void* const* outputs, int32_t begin,
                             int32_t end);
/**
 * qc_session_execute, step by step: writes how many seconds step i took to seconds[i] (of qc_shape_step_count() elements; those of other steps are left alone). On a
 * GPU that is the mean of some repetitions, by its own clock, without copies.
 */
qc_status qc_session_profile(qc_session* session, void* workspace, const void* constants, const void* const* inputs, void* const* outputs, int32_t begin,
                             int32_t end, double* seconds);
/**
 * Run the library's test vectors (compiled with --selftest) in a session of its own, on one thread, and compare what has the same bits on every CPU.
 * Takes as long as that many runs. Errors: SELFTEST, naming the value; STATE: there are no vectors; and those of qc_session_create and qc_session_execute.
 */
qc_status qc_selftest(void);
/** Of the shape that needs most. */
size_t qc_workspace_bytes(void);
/** Steps at the first shape. */
int32_t qc_step_count(void);

#ifdef __cplusplus
}
#endif
#endif
