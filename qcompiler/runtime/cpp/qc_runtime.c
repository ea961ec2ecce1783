/* The runtime inside every compiled library: errors, introspection, sessions, bound buffers. What runs the steps is qc_engine.h's.
 *
 * It is compiled together with `model.h`, which the compiler writes: QC_INPUTS, QC_OUTPUTS (initializers of qc_tensor_info), QC_INPUT_COUNT,
 * QC_OUTPUT_COUNT, QC_STATE_COUNT, QC_STATES (pairs: number of the input, of the output that is its next value), QC_WORKSPACE, QC_STEPS, QC_TARGET, QC_MISSING_FEATURE (an expression: a string naming the first CPU feature that this machine lacks, or 0),
 * QC_TILES (whether the code uses AMX tiles).
 */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__aarch64__) || defined(__arm__)
#include <sys/auxv.h>
#endif

#include "qc_engine.h"
#include "model.h"

#define EXPORT __attribute__((visibility("default")))

/* ---- errors ---------------------------------------------------------------------------------------------------------------------- */

static _Thread_local char last_error[512] = "no error";

qc_status fail(qc_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

EXPORT const char* qc_last_error(void) { return last_error; }

extern const char qc_manifest[];
extern const char qc_manifest_end[];

/* ---- introspection --------------------------------------------------------------------------------------------------------------- */

static const qc_tensor_info input_infos[QC_INPUT_COUNT + 1] = {QC_INPUTS};
static const qc_tensor_info output_infos[QC_OUTPUT_COUNT + 1] = {QC_OUTPUTS};
static const struct { int32_t input, output; } states[QC_STATE_COUNT + 1] = {QC_STATES};

EXPORT int32_t qc_abi_version(void) { return QC_ABI_VERSION; }
EXPORT const char* qc_target_name(void) { return QC_TARGET; }
EXPORT size_t qc_workspace_bytes(void) { return QC_WORKSPACE + 64; }
EXPORT int32_t qc_step_count(void) { return QC_STEPS; }
EXPORT int32_t qc_input_count(void) { return QC_INPUT_COUNT; }
EXPORT int32_t qc_output_count(void) { return QC_OUTPUT_COUNT; }
EXPORT const qc_tensor_info* qc_input_info(int32_t i) { return i >= 0 && i < QC_INPUT_COUNT ? &input_infos[i] : 0; }
EXPORT const qc_tensor_info* qc_output_info(int32_t i) { return i >= 0 && i < QC_OUTPUT_COUNT ? &output_infos[i] : 0; }

EXPORT int32_t qc_input_state(int32_t input) {
  for (int32_t i = 0; i < QC_STATE_COUNT; ++i)
    if (states[i].input == input) return states[i].output;
  return -1;
}

EXPORT const char* qc_manifest_json(size_t* length) {
  if (length) *length = (size_t)(qc_manifest_end - qc_manifest);
  return qc_manifest;
}

/* ---- sessions -------------------------------------------------------------------------------------------------------------------- */

struct qc_session {
  atomic_flag busy;
  engine* engine;
  const void* inputs[QC_INPUT_COUNT + 1];
  void* outputs[QC_OUTPUT_COUNT + 1];
  void* own_inputs[QC_INPUT_COUNT + 1];
  void* own_outputs[QC_OUTPUT_COUNT + 1];
};

EXPORT void qc_session_destroy(qc_session* s) {
  if (!s) return;
  for (int32_t i = 0; i < QC_INPUT_COUNT; ++i) engine_free(s->engine, s->own_inputs[i]);
  for (int32_t i = 0; i < QC_OUTPUT_COUNT; ++i) engine_free(s->engine, s->own_outputs[i]);
  engine_destroy(s->engine);
  free(s);
}

EXPORT qc_status qc_session_create(int32_t threads, qc_session** session) {
  if (!session) return fail(QC_ERROR_ARGUMENT, "qc_session_create: the pointer for the new session is null");
  *session = 0;
  if (threads < 1 || threads > 1024) return fail(QC_ERROR_ARGUMENT, "qc_session_create: %d threads asked for; 1 to 1024 are supported", threads);
  const char* missing = QC_MISSING_FEATURE;
  if (missing) return fail(QC_ERROR_DEVICE, "this library was compiled for %s, which needs the CPU feature %s, and this CPU lacks it", QC_TARGET, missing);
  qc_session* s = calloc(1, sizeof *s);
  if (!s) return fail(QC_ERROR_MEMORY, "qc_session_create: out of memory");
  atomic_flag_clear(&s->busy);
  qc_status status = engine_create(threads, &s->engine);
  if (status) free(s);
  else *session = s;
  return status;
}

static int32_t find(const qc_tensor_info* infos, int32_t count, const char* name) {
  for (int32_t i = 0; i < count; ++i)
    if (strcmp(infos[i].name, name) == 0) return i;
  return -1;
}

static size_t alignment_of(qc_dtype dtype) {
  static const size_t bytes[] = {4, 1, 1, 4, 8, 1, 8, 2, 2, 2, 4, 8};
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

/* A state's memory is the session's own: the next run reads what this one writes. */
static qc_status check_free(const char* what, const char* name, int32_t input, int32_t output) {
  for (int32_t i = 0; i < QC_STATE_COUNT; ++i)
    if (states[i].input == input || states[i].output == output)
      return fail(QC_ERROR_STATE, "%s: '%s' is a state that the session keeps; read and write the session's own buffer", what, name);
  return QC_OK;
}

EXPORT qc_status qc_session_bind_input(qc_session* s, const char* name, const void* data, size_t bytes) {
  int32_t i;
  qc_status status = enter(s, __func__);
  if (status) return status;
  status = check_port(__func__, name, input_infos, QC_INPUT_COUNT, &i);
  if (!status) status = check_free(__func__, name, i, -1);
  if (!status) status = check_buffer(__func__, &input_infos[i], data, bytes);
  if (!status) s->inputs[i] = data;
  return leave(s, status);
}

EXPORT qc_status qc_session_bind_output(qc_session* s, const char* name, void* data, size_t bytes) {
  int32_t i;
  qc_status status = enter(s, __func__);
  if (status) return status;
  status = check_port(__func__, name, output_infos, QC_OUTPUT_COUNT, &i);
  if (!status) status = check_free(__func__, name, -1, i);
  if (!status) status = check_buffer(__func__, &output_infos[i], data, bytes);
  if (!status) s->outputs[i] = data;
  return leave(s, status);
}

/* The session's own buffer of a port, allocated on first use. */
static qc_status own_buffer(const char* what, qc_session* s, const qc_tensor_info* info, void** own) {
  if (*own || (*own = engine_allocate(s->engine, info->bytes))) return QC_OK;
  return fail(QC_ERROR_MEMORY, "%s: out of memory (%zu bytes for '%s')", what, info->bytes, info->name);
}

EXPORT qc_status qc_session_input_buffer(qc_session* s, const char* name, void** data) {
  int32_t i;
  if (!data) return fail(QC_ERROR_ARGUMENT, "%s: the pointer for the result is null", __func__);
  qc_status status = enter(s, __func__);
  if (status) return status;
  status = check_port(__func__, name, input_infos, QC_INPUT_COUNT, &i);
  if (!status) status = own_buffer(__func__, s, &input_infos[i], &s->own_inputs[i]);
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
    status = own_buffer(__func__, s, &output_infos[i], &s->own_outputs[i]);
    if (!status) s->outputs[i] = s->own_outputs[i];
  }
  if (!status) *data = s->outputs[i];
  return leave(s, status);
}

static qc_status execute(const char* what, qc_session* s, void* workspace, const void* constants, const void* const* inputs, void* const* outputs,
                         int32_t begin, int32_t end, double* seconds) {
  if (!s || !workspace || !inputs || !outputs) return fail(QC_ERROR_ARGUMENT, "%s: a null pointer", what);
  if (begin < 0 || end > QC_STEPS || begin > end) return fail(QC_ERROR_ARGUMENT, "%s: steps [%d, %d) asked for; there are %d", what, begin, end, QC_STEPS);
  if ((uintptr_t)workspace % 64 || (uintptr_t)constants % 64)
    return fail(QC_ERROR_ALIGNMENT, "%s: the workspace and the constants must be aligned to 64 bytes", what);
  qc_status status = QC_OK;
  for (int32_t i = 0; i < QC_INPUT_COUNT && !status; ++i) status = check_pointer(what, &input_infos[i], inputs[i]);
  for (int32_t i = 0; i < QC_OUTPUT_COUNT && !status; ++i) status = check_pointer(what, &output_infos[i], outputs[i]);
  if (!status) status = enter(s, what);
  engine_memory memory = {workspace, constants, inputs, outputs};
  return status ? status : leave(s, engine_run(s->engine, &memory, begin, end, seconds));
}

EXPORT qc_status qc_session_execute(qc_session* s, void* workspace, const void* constants, const void* const* inputs, void* const* outputs, int32_t begin,
                                    int32_t end) {
  return execute(__func__, s, workspace, constants, inputs, outputs, begin, end, 0);
}

EXPORT qc_status qc_session_profile(qc_session* s, void* workspace, const void* constants, const void* const* inputs, void* const* outputs, int32_t begin,
                                    int32_t end, double* seconds) {
  if (!seconds) return fail(QC_ERROR_ARGUMENT, "%s: a null pointer", __func__);
  return execute(__func__, s, workspace, constants, inputs, outputs, begin, end, seconds);
}

EXPORT qc_status qc_session_reset(qc_session* s) {
  qc_status status = enter(s, __func__);
  if (status) return status;
  for (int32_t i = 0; i < QC_STATE_COUNT; ++i) {
    int32_t in = states[i].input;
    if (s->own_inputs[in]) memset(s->own_inputs[in], 0, input_infos[in].bytes);
  }
  return leave(s, QC_OK);
}

EXPORT qc_status qc_session_run(qc_session* s) {
  qc_status status = enter(s, __func__);
  if (status) return status;
  for (int32_t i = 0; i < QC_STATE_COUNT && !status; ++i) {
    int32_t in = states[i].input;
    status = own_buffer(__func__, s, &input_infos[in], &s->own_inputs[in]);
    s->inputs[in] = s->own_inputs[in];
  }
  for (int32_t i = 0; i < QC_INPUT_COUNT && !status; ++i)
    if (!s->inputs[i]) status = fail(QC_ERROR_STATE, "%s: input '%s' has not been set", __func__, input_infos[i].name);
  for (int32_t i = 0; i < QC_OUTPUT_COUNT && !status; ++i)
    if (!s->outputs[i]) {
      status = own_buffer(__func__, s, &output_infos[i], &s->own_outputs[i]);
      s->outputs[i] = s->own_outputs[i];
    }
  engine_memory memory = {0, 0, s->inputs, s->outputs};
  if (!status) status = engine_run(s->engine, &memory, 0, QC_STEPS, 0);
  for (int32_t i = 0; i < QC_STATE_COUNT && !status; ++i)
    memcpy(s->own_inputs[states[i].input], s->outputs[states[i].output], input_infos[states[i].input].bytes);
  return leave(s, status);
}
