/* The runtime inside every compiled library: errors, introspection, sessions, bound buffers. What runs the steps is qc_engine.h's, what it knows of the network
 * qc_model.h's. */
#define _GNU_SOURCE
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qc_engine.h"
#include "qc_model.h"
#include "qc_shapes.h"

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

EXPORT int32_t qc_abi_version(void) { return QC_ABI_VERSION; }
EXPORT const char* qc_target_name(void) { return model.target; }
EXPORT size_t qc_workspace_bytes(void) { return model.workspace + 64; }
EXPORT int32_t qc_step_count(void) { return model.steps[0]; }
EXPORT int32_t qc_input_count(void) { return model.input_count; }
EXPORT int32_t qc_output_count(void) { return model.output_count; }
EXPORT const qc_tensor_info* qc_input_info(int32_t i) { return qc_shape_input_info(0, i); }
EXPORT const qc_tensor_info* qc_output_info(int32_t i) { return qc_shape_output_info(0, i); }

EXPORT int32_t qc_shape_count(void) { return model.shapes; }
EXPORT int32_t qc_shape_step_count(int32_t shape) { return shape >= 0 && shape < model.shapes ? model.steps[shape] : 0; }
EXPORT const qc_tensor_info* qc_shape_input_info(int32_t shape, int32_t i) {
  return shape >= 0 && shape < model.shapes && i >= 0 && i < model.input_count ? &model.inputs[shape][i] : 0;
}
EXPORT const qc_tensor_info* qc_shape_output_info(int32_t shape, int32_t i) {
  return shape >= 0 && shape < model.shapes && i >= 0 && i < model.output_count ? &model.outputs[shape][i] : 0;
}

EXPORT int32_t qc_input_state(int32_t input) {
  for (int32_t i = 0; i < model.state_count; ++i)
    if (model.states[i].input == input) return model.states[i].output;
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
  int32_t shape;           /* the compiled one that runs */
  const void** inputs;     /* of each port, as all that follows */
  void** outputs;
  void** own_inputs;
  void** own_outputs;
  qc_tensor_info* out;     /* the ports as the caller sees them: before padding */
  qc_tensor_info in[];
};

/* A session of zeros, its arrays behind it; null where there is no memory. */
static qc_session* zeroed_session(void) {
  size_t in = (size_t)model.input_count, out = (size_t)model.output_count;
  qc_session* s = calloc(1, sizeof *s + (in + out) * (sizeof *s->in + 2 * sizeof(void*)));
  if (!s) return 0;
  s->out = s->in + in;
  s->inputs = (const void**)(s->out + out);
  s->outputs = (void**)(s->inputs + in);
  s->own_inputs = s->outputs + out;
  s->own_outputs = s->own_inputs + in;
  return s;
}

EXPORT void qc_session_destroy(qc_session* s) {
  if (!s) return;
  for (int32_t i = 0; i < model.input_count; ++i) engine_free(s->engine, s->own_inputs[i]);
  for (int32_t i = 0; i < model.output_count; ++i) engine_free(s->engine, s->own_outputs[i]);
  engine_destroy(s->engine);
  free(s);
}

/* Run at a compiled shape from now on: all buffers have to be bound again. */
static void use_shape(qc_session* s, int32_t shape) {
  s->shape = shape;
  memcpy(s->in, model.inputs[shape], (size_t)model.input_count * sizeof *s->in);
  memcpy(s->out, model.outputs[shape], (size_t)model.output_count * sizeof *s->out);
  memset(s->inputs, 0, (size_t)model.input_count * sizeof *s->inputs);
  memset(s->outputs, 0, (size_t)model.output_count * sizeof *s->outputs);
}

EXPORT qc_status qc_session_create(int32_t threads, qc_session** session) {
  if (!session) return fail(QC_ERROR_ARGUMENT, "qc_session_create: the pointer for the new session is null");
  *session = 0;
  if (threads < 1 || threads > 1024) return fail(QC_ERROR_ARGUMENT, "qc_session_create: %d threads asked for; 1 to 1024 are supported", threads);
  const char* missing = model.missing_feature();
  if (missing) return fail(QC_ERROR_DEVICE, "this library was compiled for %s, which needs the CPU feature %s, and this CPU lacks it", model.target, missing);
  qc_session* s = zeroed_session();
  if (!s) return fail(QC_ERROR_MEMORY, "qc_session_create: out of memory");
  atomic_flag_clear(&s->busy);
  use_shape(s, 0);
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
  size_t alignment = element_bytes(info->dtype);
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
  for (int32_t i = 0; i < model.state_count; ++i)
    if (model.states[i].input == input || model.states[i].output == output)
      return fail(QC_ERROR_STATE, "%s: '%s' is a state that the session keeps; read and write the session's own buffer", what, name);
  return QC_OK;
}

EXPORT qc_status qc_session_bind_input(qc_session* s, const char* name, const void* data, size_t bytes) {
  int32_t i;
  qc_status status = enter(s, __func__);
  if (status) return status;
  status = check_port(__func__, name, model.inputs[0], model.input_count, &i);
  if (!status) status = check_free(__func__, name, i, -1);
  if (!status) status = check_buffer(__func__, &model.inputs[s->shape][i], data, bytes);
  if (!status) s->inputs[i] = data;
  return leave(s, status);
}

EXPORT qc_status qc_session_bind_output(qc_session* s, const char* name, void* data, size_t bytes) {
  int32_t i;
  qc_status status = enter(s, __func__);
  if (status) return status;
  status = check_port(__func__, name, model.outputs[0], model.output_count, &i);
  if (!status) status = check_free(__func__, name, -1, i);
  if (!status) status = check_buffer(__func__, &model.outputs[s->shape][i], data, bytes);
  if (!status) s->outputs[i] = data;
  return leave(s, status);
}

/* The session's own buffer of a port, allocated on first use, large enough for every shape. */
static qc_status own_buffer(const char* what, qc_session* s, const qc_tensor_info* info, size_t most, void** own) {
  return *own ? QC_OK : engine_allocate(s->engine, what, info->name, most, own);
}

/* State number i as in the first run. */
static void begin_state(qc_session* s, int32_t i) {
  size_t bytes = model.inputs[s->shape][model.states[i].input].bytes, period = model.states[i].period;
  char* data = s->own_inputs[model.states[i].input];
  if (period == 1) memset(data, model.states[i].first[0], bytes);
  for (size_t at = 0; period > 1 && at < bytes; at += period) memcpy(data + at, model.states[i].first, period);
}

static qc_status own_input(const char* what, qc_session* s, int32_t i) {
  int fresh = !s->own_inputs[i];
  qc_status status = own_buffer(what, s, &model.inputs[0][i], model.most_input[i], &s->own_inputs[i]);
  for (int32_t state = 0; state < model.state_count && fresh && !status; ++state)
    if (model.states[state].input == i) begin_state(s, state);
  if (!status) s->inputs[i] = s->own_inputs[i];
  return status;
}

/* Where a run writes an output: what is bound, else the session's own buffer. */
static qc_status any_output(const char* what, qc_session* s, int32_t i) {
  if (s->outputs[i]) return QC_OK;
  qc_status status = own_buffer(what, s, &model.outputs[0][i], model.most_output[i], &s->own_outputs[i]);
  if (!status) s->outputs[i] = s->own_outputs[i];
  return status;
}

/* A padded port has no buffer that a caller could use as it is. */
static qc_status check_whole(const char* what, const qc_tensor_info* seen, const qc_tensor_info* run) {
  if (seen->bytes == run->bytes) return QC_OK;
  sentence s = {"", 0};
  say_shape(&s, "from", seen->shape, seen->rank);
  say_shape(&s, " to", run->shape, run->rank);
  return fail(QC_ERROR_STATE, "%s: '%s' is padded %s; use qc_session_write and qc_session_read", what, seen->name, s.text);
}

EXPORT qc_status qc_session_input_buffer(qc_session* s, const char* name, void** data) {
  int32_t i;
  if (!data) return fail(QC_ERROR_ARGUMENT, "%s: the pointer for the result is null", __func__);
  qc_status status = enter(s, __func__);
  if (status) return status;
  status = check_port(__func__, name, model.inputs[0], model.input_count, &i);
  if (!status) status = check_whole(__func__, &s->in[i], &model.inputs[s->shape][i]);
  if (!status) status = own_input(__func__, s, i);
  if (!status) *data = s->own_inputs[i];
  return leave(s, status);
}

EXPORT qc_status qc_session_output_buffer(qc_session* s, const char* name, void** data) {
  int32_t i;
  if (!data) return fail(QC_ERROR_ARGUMENT, "%s: the pointer for the result is null", __func__);
  qc_status status = enter(s, __func__);
  if (status) return status;
  status = check_port(__func__, name, model.outputs[0], model.output_count, &i);
  if (!status) status = check_whole(__func__, &s->out[i], &model.outputs[s->shape][i]);
  if (!status) status = any_output(__func__, s, i);
  if (!status) *data = s->outputs[i];
  return leave(s, status);
}

static qc_status execute(const char* what, qc_session* s, void* workspace, const void* constants, const void* const* inputs, void* const* outputs,
                         int32_t begin, int32_t end, double* seconds) {
  if (!s || !workspace || !inputs || !outputs) return fail(QC_ERROR_ARGUMENT, "%s: a null pointer", what);
  int32_t steps = model.steps[s->shape];
  if (begin < 0 || end > steps || begin > end) return fail(QC_ERROR_ARGUMENT, "%s: steps [%d, %d) asked for; there are %d", what, begin, end, steps);
  if ((uintptr_t)workspace % 64 || (uintptr_t)constants % 64)
    return fail(QC_ERROR_ALIGNMENT, "%s: the workspace and the constants must be aligned to 64 bytes", what);
  qc_status status = QC_OK;
  for (int32_t i = 0; i < model.input_count && !status; ++i) status = check_pointer(what, &model.inputs[s->shape][i], inputs[i]);
  for (int32_t i = 0; i < model.output_count && !status; ++i) status = check_pointer(what, &model.outputs[s->shape][i], outputs[i]);
  if (!status) status = enter(s, what);
  engine_memory memory = {workspace, constants, inputs, outputs, s->shape};
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
  for (int32_t i = 0; i < model.state_count; ++i)
    if (s->own_inputs[model.states[i].input]) begin_state(s, i);
  return leave(s, QC_OK);
}

EXPORT qc_status qc_session_run(qc_session* s) {
  qc_status status = enter(s, __func__);
  if (status) return status;
  for (int32_t i = 0; i < model.state_count && !status; ++i) status = own_input(__func__, s, model.states[i].input);
  for (int32_t i = 0; i < model.input_count && !status; ++i)
    if (!s->inputs[i]) status = fail(QC_ERROR_STATE, "%s: input '%s' has not been set", __func__, s->in[i].name);
  for (int32_t i = 0; i < model.output_count && !status; ++i) status = any_output(__func__, s, i);
  engine_memory memory = {0, 0, s->inputs, s->outputs, s->shape};
  if (!status) status = engine_run(s->engine, &memory, 0, model.steps[s->shape], 0);
  for (int32_t i = 0; i < model.state_count && !status; ++i)
    memcpy(s->own_inputs[model.states[i].input], s->outputs[model.states[i].output], model.inputs[s->shape][model.states[i].input].bytes);
  return leave(s, status);
}

/* ---- shapes ---------------------------------------------------------------------------------------------------------------------- */

EXPORT qc_status qc_session_set_shape(qc_session* s, int32_t shape) {
  if (shape < 0 || shape >= model.shapes) return fail(QC_ERROR_ARGUMENT, "%s: shape %d asked for; there are %d, counted from 0", __func__, shape, model.shapes);
  qc_status status = enter(s, __func__);
  if (status) return status;
  use_shape(s, shape);
  return leave(s, QC_OK);
}

/* Fill in a port as the caller sees it: as long as `extents` says where it varies. */
static void see(qc_tensor_info* info, const int8_t* axes, const int64_t* extents) {
  info->bytes = element_bytes(info->dtype);
  for (int32_t a = 0; a < info->rank; ++a) {
    if (axes[a]) info->shape[a] = extents[axes[a]];
    info->bytes *= (size_t)info->shape[a];
  }
}

EXPORT qc_status qc_session_fit(qc_session* s, const qc_shape* shapes, int32_t count) {
  if (!shapes || count < 1 || count > model.input_count) return fail(QC_ERROR_ARGUMENT, "%s: 1 to %d shapes are needed", __func__, model.input_count);
  qc_status status = enter(s, __func__);
  if (status) return status;
  int32_t ports[model.input_count + 1];
  sentence asked = {"", 0}, known = {"", 0};
  for (int32_t g = 0; g < count && !status; ++g) {
    status = check_port(__func__, shapes[g].name, model.inputs[0], model.input_count, &ports[g]);
    if (!status) say(&asked, "%s", g ? ", " : ""), say_shape(&asked, shapes[g].name, shapes[g].shape, shapes[g].rank);
  }
  int64_t extents[model.axes + 1];
  int32_t shape = status ? -1 : fitting(shapes, ports, count, extents);
  if (shape >= 0) {
    use_shape(s, shape);
    for (int32_t i = 0; i < model.input_count; ++i) see(&s->in[i], model.input_axes[i], extents);
    for (int32_t i = 0; i < model.output_count; ++i) see(&s->out[i], model.output_axes[i], extents);
  } else if (!status) {
    for (int32_t i = 0; i < model.shapes; ++i)
      for (int32_t p = 0; p < model.input_count; ++p) {
        say(&known, "%s", p ? ", " : i ? "; " : "");
        say_shape(&known, model.inputs[i][p].name, model.inputs[i][p].shape, model.inputs[i][p].rank);
      }
    status = fail(QC_ERROR_SIZE, "%s: %s is no shape that this library was compiled for%s: %s", __func__, asked.text,
                  model.padded ? ", nor can it be padded to one" : "", known.text);
  }
  return leave(s, status);
}

EXPORT const qc_tensor_info* qc_session_input_info(qc_session* s, int32_t i) { return s && i >= 0 && i < model.input_count ? &s->in[i] : 0; }
EXPORT const qc_tensor_info* qc_session_output_info(qc_session* s, int32_t i) { return s && i >= 0 && i < model.output_count ? &s->out[i] : 0; }

EXPORT qc_status qc_session_write(qc_session* s, const char* name, const void* data, size_t bytes) {
  int32_t i;
  qc_status status = enter(s, __func__);
  if (status) return status;
  status = check_port(__func__, name, model.inputs[0], model.input_count, &i);
  if (!status && !data) status = fail(QC_ERROR_ARGUMENT, "%s: the array for '%s' is null", __func__, name);
  if (!status && bytes != s->in[i].bytes) status = fail(QC_ERROR_SIZE, "%s: '%s' has %zu bytes, the array %zu", __func__, name, s->in[i].bytes, bytes);
  if (!status) status = own_input(__func__, s, i);
  if (!status) {
    const qc_tensor_info* run = &model.inputs[s->shape][i];
    char filling[8] = {0};
    write_element(run->dtype, model.pads[i].value, filling);
    move(s->own_inputs[i], run->shape, (char*)data, s->in[i].shape, run->rank, element_bytes(run->dtype), 1, &model.pads[i], filling);
  }
  return leave(s, status);
}

EXPORT qc_status qc_session_read(qc_session* s, const char* name, void* data, size_t bytes) {
  int32_t i;
  qc_status status = enter(s, __func__);
  if (status) return status;
  status = check_port(__func__, name, model.outputs[0], model.output_count, &i);
  if (!status && !data) status = fail(QC_ERROR_ARGUMENT, "%s: the array for '%s' is null", __func__, name);
  if (!status && bytes != s->out[i].bytes) status = fail(QC_ERROR_SIZE, "%s: '%s' has %zu bytes, the array %zu", __func__, name, s->out[i].bytes, bytes);
  if (!status) status = any_output(__func__, s, i);
  if (!status) {
    const qc_tensor_info* run = &model.outputs[s->shape][i];
    move(s->outputs[i], run->shape, data, s->out[i].shape, run->rank, element_bytes(run->dtype), 0, 0, 0);
  }
  return leave(s, status);
}
