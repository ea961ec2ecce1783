/* The engine for NVIDIA GPUs, over the CUDA driver, which is looked for when the first session is made.
 *
 * Sessions of one library share code and constants on the device; each has a stream and memory of its own. All steps of a shape are recorded as one graph when a
 * session is made, and a run replays it; a driver that can't record gets one launch after the other. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "qc_engine.h"
#include "qc_launches.h"
#include "qc_model.h"

/* ---- the driver ------------------------------------------------------------------------------------------------------------------ */

typedef uint64_t address; /* of device memory */
typedef struct opaque* handle;

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, NO_DEVICE = 100 };                             /* CUresult */
enum { COMPUTE_MAJOR = 75, COMPUTE_MINOR = 76 };                                      /* CUdevice_attribute */
enum { STREAM_NON_BLOCKING = 1, CAPTURE_THREAD_LOCAL = 1, HOST_MEMORY_PORTABLE = 1 }; /* flags of cuStreamCreate, cuStreamBeginCapture, cuMemHostAlloc */

/* Name here, symbol in libcuda.so.1 (the versions that take 64-bit sizes), arguments. */
#define DRIVER(X)                                                                                                                             \
  X(init, "cuInit", (unsigned))                                                                                                               \
  X(error_name, "cuGetErrorName", (int, const char**))                                                                                        \
  X(error_text, "cuGetErrorString", (int, const char**))                                                                                      \
  X(driver_version, "cuDriverGetVersion", (int*))                                                                                             \
  X(device_get, "cuDeviceGet", (int*, int))                                                                                                   \
  X(device_name, "cuDeviceGetName", (char*, int, int))                                                                                        \
  X(device_attribute, "cuDeviceGetAttribute", (int*, int, int))                                                                               \
  X(context_retain, "cuDevicePrimaryCtxRetain", (handle*, int))                                                                               \
  X(context_release, "cuDevicePrimaryCtxRelease_v2", (int))                                                                                   \
  X(context_push, "cuCtxPushCurrent_v2", (handle))                                                                                            \
  X(context_pop, "cuCtxPopCurrent_v2", (handle*))                                                                                             \
  X(module_load, "cuModuleLoadData", (handle*, const void*))                                                                                  \
  X(module_unload, "cuModuleUnload", (handle))                                                                                                \
  X(module_function, "cuModuleGetFunction", (handle*, handle, const char*))                                                                   \
  X(memory_info, "cuMemGetInfo_v2", (size_t*, size_t*))                                                                                       \
  X(allocate, "cuMemAlloc_v2", (address*, size_t))                                                                                            \
  X(release, "cuMemFree_v2", (address))                                                                                                       \
  X(set_bytes, "cuMemsetD8Async", (address, unsigned char, size_t, handle))                                                                   \
  X(copy, "cuMemcpyAsync", (address, address, size_t, handle)) /* host or device memory, told apart by its address */                          \
  X(host_allocate, "cuMemHostAlloc", (void**, size_t, unsigned))                                                                              \
  X(host_release, "cuMemFreeHost", (void*))                                                                                                   \
  X(stream_create, "cuStreamCreate", (handle*, unsigned))                                                                                     \
  X(stream_destroy, "cuStreamDestroy_v2", (handle))                                                                                           \
  X(stream_wait, "cuStreamSynchronize", (handle))                                                                                             \
  X(launch_kernel, "cuLaunchKernel", (handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, handle, void**, void**))   \
  X(event_create, "cuEventCreate", (handle*, unsigned))                                                                                       \
  X(event_destroy, "cuEventDestroy_v2", (handle))                                                                                             \
  X(event_record, "cuEventRecord", (handle, handle))                                                                                          \
  X(event_wait, "cuEventSynchronize", (handle))                                                                                               \
  X(event_elapsed, "cuEventElapsedTime", (float*, handle, handle))

/* Drivers before CUDA 11.4 lack one of these; they get plain launches. */
#define GRAPHS(X)                                                            \
  X(capture_begin, "cuStreamBeginCapture_v2", (handle, int))                 \
  X(capture_end, "cuStreamEndCapture", (handle, handle*))                    \
  X(graph_instantiate, "cuGraphInstantiateWithFlags", (handle*, handle, unsigned long long)) \
  X(graph_destroy, "cuGraphDestroy", (handle))                               \
  X(graph_launch, "cuGraphLaunch", (handle, handle))                         \
  X(executable_destroy, "cuGraphExecDestroy", (handle))

#define FIELD(name, symbol, arguments) int(*name) arguments;
static struct { DRIVER(FIELD) GRAPHS(FIELD) int graphs; } cuda;

/* What all sessions share. */
static struct {
  int32_t sessions;
  pid_t owner; /* a child made by fork() can't use the driver */
  int number;
  char name[128];
  handle context, module;
  handle* kernels;
  address constants;
} device;
static pthread_mutex_t device_lock = PTHREAD_MUTEX_INITIALIZER;

static qc_status load_driver(void) {
  static void* library;
  if (library) return QC_OK;
  void* opened = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!opened)
    return fail(QC_ERROR_DEVICE, "this library was compiled for %s and needs an NVIDIA driver, and there is none here (%s); run it on a machine with one, or compile "
                "the model for this machine's CPU", model.target, dlerror());
  const char* missing = 0;
  cuda.graphs = 1;
#define FIND(name, symbol, arguments)                          \
  {                                                            \
    void* found = dlsym(opened, symbol);                       \
    if (!found) missing = symbol;                              \
    memcpy((void*)&cuda.name, &found, sizeof found);           \
  }
  GRAPHS(FIND)
  if (missing) cuda.graphs = 0;
  missing = 0;
  DRIVER(FIND)
  if (missing) {
    dlclose(opened);
    return fail(QC_ERROR_DEVICE, "the NVIDIA driver here is too old (libcuda.so.1 has no %s); CUDA 11 or later is needed", missing);
  }
  library = opened;
  return QC_OK;
}

/* A driver call's result as a status; `otherwise` is the one for failures other than a lack of memory. */
static qc_status check(int result, const char* what, qc_status otherwise) {
  if (result == SUCCESS) return QC_OK;
  const char *name = 0, *text = 0;
  cuda.error_name(result, &name);
  cuda.error_text(result, &text);
  return fail(result == OUT_OF_MEMORY ? QC_ERROR_MEMORY : otherwise, "the GPU failed %s: %s (%s, CUDA error %d)", what, text ? text : "unknown error",
              name ? name : "no name", result);
}

static qc_status out_of_memory(const char* what, size_t bytes) {
  size_t available = 0, total = 0;
  char rest[80] = "";
  if (cuda.memory_info(&available, &total) == SUCCESS)
    snprintf(rest, sizeof rest, ", %.1f of %.1f MB are free", (double)available / 1e6, (double)total / 1e6);
  return fail(QC_ERROR_MEMORY, "out of memory on GPU %d (%s): %.1f MB are needed for %s%s", device.number, device.name, (double)bytes / 1e6, what, rest);
}

static qc_status allocate(address* memory, size_t bytes, const char* what) {
  int result = cuda.allocate(memory, bytes);
  if (result != SUCCESS) *memory = 0;
  return result == OUT_OF_MEMORY ? out_of_memory(what, bytes) : check(result, "to allocate memory", QC_ERROR_DEVICE);
}

/* ---- code and constants ---------------------------------------------------------------------------------------------------------- */

static void leave_context(void) {
  handle popped;
  cuda.context_pop(&popped);
}

/* Where the context isn't `current` (the driver refused to make it so: the GPU is lost), what lies on the device goes with the context. */
static void close_device(int current) {
  if (current) {
    if (device.constants) cuda.release(device.constants);
    if (device.module) cuda.module_unload(device.module);
    leave_context();
  }
  if (device.context) cuda.context_release(device.number);
  free(device.kernels);
  memset(&device, 0, sizeof device);
}

static qc_status check_code(void) {
  struct { uint32_t magic; uint16_t version, header; uint64_t bytes; } head;
  uint64_t size = (uint64_t)(launch_code_end - launch_code);
  if (size >= sizeof head) memcpy(&head, launch_code, sizeof head);
  if (size < sizeof head || head.magic != 0xBA55ED50u || head.header + head.bytes > size)
    return fail(QC_ERROR_LIBRARY, "the library's device code is damaged or cut short (%llu bytes); compile the model again", (unsigned long long)size);
  return QC_OK;
}

/* Leaves the context current on success; `*current` says whether it is. */
static qc_status open_device(int* current) {
  qc_status status = check_code();
  if (!status) status = load_driver();
  if (status) return status;
  int result = cuda.init(0), major = 0, minor = 0, version = 0;
  if (result == SUCCESS) result = cuda.device_get(&device.number, 0);
  if (result == NO_DEVICE)
    return fail(QC_ERROR_DEVICE, "this library was compiled for %s, and there is no NVIDIA GPU here that the driver can use (CUDA_VISIBLE_DEVICES may hide one)", model.target);
  if (result != SUCCESS) return check(result, "to start", QC_ERROR_DEVICE);
  result = cuda.device_name(device.name, (int)sizeof device.name, device.number);
  if (result == SUCCESS) result = cuda.device_attribute(&major, COMPUTE_MAJOR, device.number);
  if (result == SUCCESS) result = cuda.device_attribute(&minor, COMPUTE_MINOR, device.number);
  if (result == SUCCESS) result = cuda.driver_version(&version);
  if (result != SUCCESS) return check(result, "to say what it is", QC_ERROR_DEVICE);
  int capability = 10 * major + minor;
  if (launch_one_capability ? capability != launch_capability : capability < launch_capability)
    return fail(QC_ERROR_DEVICE, "this library was compiled for %s, which needs compute capability %d.%d%s, and GPU %d (%s) has %d.%d; compile the model for it",
                model.target, launch_capability / 10, launch_capability % 10, launch_one_capability ? "" : " or later", device.number, device.name, major, minor);
  if ((status = check(cuda.context_retain(&device.context, device.number), "to make a context", QC_ERROR_DEVICE))) return device.context = 0, status;
  if ((status = check(cuda.context_push(device.context), "to use its context", QC_ERROR_DEVICE))) return status;
  *current = 1;
  char what[96];
  snprintf(what, sizeof what, "to load the library's code (its driver supports CUDA %d.%d)", version / 1000, version % 1000 / 10);
  status = check(cuda.module_load(&device.module, launch_code), what, QC_ERROR_DEVICE);
  if (status) device.module = 0;
  device.kernels = calloc((size_t)launch_kernel_count + 1, sizeof *device.kernels);
  if (!status && !device.kernels) status = fail(QC_ERROR_MEMORY, "qc_session_create: out of memory");
  for (int32_t i = 0; i < launch_kernel_count && !status; ++i)
    status = check(cuda.module_function(&device.kernels[i], device.module, launch_kernels[i]), "to find a kernel in the library's code", QC_ERROR_LIBRARY);
  if (!status) status = allocate(&device.constants, model.constants, "the weights");
  if (!status) status = check(cuda.copy(device.constants, (address)(uintptr_t)qc_constants, model.constants, 0), "to copy the weights", QC_ERROR_DEVICE);
  if (!status) status = check(cuda.stream_wait(0), "to copy the weights", QC_ERROR_DEVICE);
  return status;
}

/* Count one session more, and make the context current. */
static qc_status acquire_device(void) {
  pthread_mutex_lock(&device_lock);
  qc_status status = QC_OK;
  if (!device.sessions) {
    int current = 0;
    status = open_device(&current);
    if (status) close_device(current);
    else device.owner = getpid();
  } else if (device.owner != getpid()) {
    status = fail(QC_ERROR_DEVICE, "qc_session_create: this process was forked after a session had been made, and CUDA doesn't survive fork()");
  } else {
    status = check(cuda.context_push(device.context), "to use its context", QC_ERROR_DEVICE);
  }
  if (!status) ++device.sessions;
  pthread_mutex_unlock(&device_lock);
  return status;
}

/* Count one session less. The context, if it was `current`, is not any more afterwards. */
static void release_device(int current) {
  pthread_mutex_lock(&device_lock);
  if (--device.sessions == 0) close_device(current);
  else if (current) leave_context();
  pthread_mutex_unlock(&device_lock);
}

/* ---- sessions -------------------------------------------------------------------------------------------------------------------- */

#define SPARE 256 /* bytes behind every buffer, which loads may touch; also their alignment */

struct engine {
  handle stream, *graphs;    /* of each shape: null where the driver can't record one */
  address memory, constants; /* one allocation; constants of the caller's, when there were any */
  address workspace, counters, *inputs, *outputs;
  address* pointers; /* every launch argument, resolved */
  void** arguments;  /* the address of each, as launches want it */
};

static int32_t steps_of(int32_t shape) { return launch_starts[shape + 1] - launch_starts[shape]; }

static size_t padded(size_t bytes) { return (bytes + 2 * SPARE - 1) / SPARE * SPARE; }

static void resolve_pointers(engine* e, address constants) {
  for (int32_t i = 0; i < launch_argument_count; ++i) {
    launch_argument a = launch_arguments[i];
    e->arguments[i] = &e->pointers[i];
    e->pointers[i] = a.space == SPACE_INPUT ? e->inputs[a.offset] : a.space == SPACE_OUTPUT ? e->outputs[a.offset]
                   : (a.space == SPACE_CONSTANTS ? constants : a.space == SPACE_COUNTERS ? e->counters : e->workspace) + a.offset;
  }
}

static qc_status launch_steps(engine* e, int32_t shape, int32_t begin, int32_t end) {
  for (int32_t i = begin; i < end; ++i) {
    const launch* l = &launches[launch_starts[shape] + i];
    int result = cuda.launch_kernel(device.kernels[l->kernel], l->blocks, 1, 1, l->threads, 1, 1, 0, e->stream, e->arguments + l->first, 0);
    char what[160];
    if (result != SUCCESS) {
      snprintf(what, sizeof what, "to launch step %d (kernel %.80s)", i, launch_kernels[l->kernel]);
      return check(result, what, QC_ERROR_GPU);
    }
  }
  return QC_OK;
}

/* The whole network at a shape as a graph, which stays null when the driver can't make one. */
static void record(engine* e, int32_t shape) {
  handle graph = 0;
  if (!cuda.graphs || cuda.capture_begin(e->stream, CAPTURE_THREAD_LOCAL) != SUCCESS) return;
  qc_status status = launch_steps(e, shape, 0, steps_of(shape));
  if (cuda.capture_end(e->stream, &graph) != SUCCESS) graph = 0;
  if (status || !graph || cuda.graph_instantiate(&e->graphs[shape], graph, 0) != SUCCESS) e->graphs[shape] = 0;
  if (graph) cuda.graph_destroy(graph);
}

void engine_destroy(engine* e) {
  if (!e) return;
  if (device.owner == getpid()) {
    int current = cuda.context_push(device.context) == SUCCESS;
    if (current) {
      if (e->stream) cuda.stream_wait(e->stream);
      for (int32_t shape = 0; e->graphs && shape < model.shapes; ++shape)
        if (e->graphs[shape]) cuda.executable_destroy(e->graphs[shape]);
      if (e->constants) cuda.release(e->constants);
      if (e->memory) cuda.release(e->memory);
      if (e->stream) cuda.stream_destroy(e->stream);
    }
    release_device(current);
  }
  free(e->graphs);
  free(e->inputs);
  free(e->outputs);
  free(e->pointers);
  free(e->arguments);
  free(e);
}

qc_status engine_create(int32_t threads, engine** made) {
  (void)threads; /* the number of threads is the launches' */
  qc_status status = acquire_device();
  if (status) return status;
  engine* e = calloc(1, sizeof *e);
  if (!e) {
    release_device(1);
    return fail(QC_ERROR_MEMORY, "qc_session_create: out of memory");
  }
  e->graphs = calloc((size_t)model.shapes, sizeof *e->graphs);
  e->inputs = calloc((size_t)model.input_count + 1, sizeof *e->inputs);
  e->outputs = calloc((size_t)model.output_count + 1, sizeof *e->outputs);
  e->pointers = calloc((size_t)launch_argument_count + 1, sizeof *e->pointers);
  e->arguments = calloc((size_t)launch_argument_count + 1, sizeof *e->arguments);
  if (!e->graphs || !e->inputs || !e->outputs || !e->pointers || !e->arguments) status = fail(QC_ERROR_MEMORY, "qc_session_create: out of memory");
  size_t bytes = padded(model.workspace) + padded((size_t)launch_counters * 4);
  for (int32_t i = 0; i < model.input_count; ++i) bytes += padded(model.most_input[i]);
  for (int32_t i = 0; i < model.output_count; ++i) bytes += padded(model.most_output[i]);
  if (!status) status = allocate(&e->memory, bytes, "a session's tensors");
  if (!status) status = check(cuda.stream_create(&e->stream, STREAM_NON_BLOCKING), "to make a stream", QC_ERROR_DEVICE);
  if (!status) status = check(cuda.set_bytes(e->memory, 0, bytes, e->stream), "to clear memory", QC_ERROR_DEVICE);
  if (!status) {
    address at = e->workspace = e->memory;
    at += padded(model.workspace);
    e->counters = at, at += padded((size_t)launch_counters * 4);
    for (int32_t i = 0; i < model.input_count; ++i) e->inputs[i] = at, at += padded(model.most_input[i]);
    for (int32_t i = 0; i < model.output_count; ++i) e->outputs[i] = at, at += padded(model.most_output[i]);
    resolve_pointers(e, device.constants);
    for (int32_t shape = 0; shape < model.shapes; ++shape) record(e, shape);
    status = check(cuda.stream_wait(e->stream), "to set up a session", QC_ERROR_DEVICE);
  }
  leave_context();
  if (status) engine_destroy(e);
  else *made = e;
  return status;
}

/* For a session that exists. */
static qc_status enter_context(void) {
  if (device.owner != getpid()) return fail(QC_ERROR_DEVICE, "this session was made before fork(), which CUDA doesn't survive; make sessions in the child alone");
  return check(cuda.context_push(device.context), "to use its context", QC_ERROR_GPU);
}

/* Page-locked, so that copies to and from the device run at the bus's speed. */
qc_status engine_allocate(engine* e, const char* what, const char* name, size_t bytes, void** memory) {
  (void)e;
  qc_status status = enter_context();
  if (status) return status;
  int result = cuda.host_allocate(memory, bytes + 128, HOST_MEMORY_PORTABLE);
  leave_context();
  if (result == SUCCESS) return memset(*memory, 0, bytes + 128), QC_OK;
  *memory = 0;
  if (result != OUT_OF_MEMORY) return check(result, "to allocate page-locked memory", QC_ERROR_GPU);
  return fail(QC_ERROR_MEMORY, "%s: out of memory (%zu bytes, page-locked, for '%s')", what, bytes, name);
}

void engine_free(engine* e, void* memory) {
  (void)e;
  if (!memory || device.owner != getpid() || cuda.context_push(device.context) != SUCCESS) return;
  cuda.host_release(memory);
  leave_context();
}

/* ---- runs ------------------------------------------------------------------------------------------------------------------------ */

static qc_status copy(engine* e, address to, address from, size_t bytes) {
  return bytes ? check(cuda.copy(to, from, bytes, e->stream), "to copy", QC_ERROR_GPU) : QC_OK;
}

static qc_status upload(engine* e, address to, const void* from, size_t bytes) { return copy(e, to, (address)(uintptr_t)from, bytes); }

static qc_status download(engine* e, void* to, address from, size_t bytes) { return copy(e, (address)(uintptr_t)to, from, bytes); }

/* A step alone would take as long as its launch; so many in a row take as long as they compute. They may be repeated: no step overwrites what it reads. */
#define REPEATS 16

static qc_status time_steps(engine* e, int32_t shape, int32_t begin, int32_t end, double* seconds) {
  handle start = 0, stop = 0;
  qc_status status = check(cuda.event_create(&start, 0), "to make an event", QC_ERROR_GPU);
  if (!status) status = check(cuda.event_create(&stop, 0), "to make an event", QC_ERROR_GPU);
  for (int32_t i = begin; i < end && !status; ++i) {
    float milliseconds = 0;
    status = launch_steps(e, shape, i, i + 1);
    if (!status) status = check(cuda.event_record(start, e->stream), "to record an event", QC_ERROR_GPU);
    for (int r = 0; r < REPEATS && !status; ++r) status = launch_steps(e, shape, i, i + 1);
    if (!status) status = check(cuda.event_record(stop, e->stream), "to record an event", QC_ERROR_GPU);
    if (!status) status = check(cuda.event_wait(stop), "to run a step", QC_ERROR_GPU);
    if (!status) status = check(cuda.event_elapsed(&milliseconds, start, stop), "to measure", QC_ERROR_GPU);
    seconds[i] = milliseconds * 1e-3 / REPEATS;
  }
  if (start) cuda.event_destroy(start);
  if (stop) cuda.event_destroy(stop);
  return status;
}

static qc_status run(engine* e, const engine_memory* m, int32_t begin, int32_t end, double* seconds) {
  /* A part of the steps goes on from the caller's memory, and leaves all it did there; so does a library without ports (of kernels for a test). */
  int whole = model.output_count && begin == 0 && end == steps_of(m->shape);
  const qc_tensor_info *in = model.inputs[m->shape], *out = model.outputs[m->shape];
  qc_status status = QC_OK;
  for (int32_t i = 0; i < model.input_count && !status; ++i) status = upload(e, e->inputs[i], m->inputs[i], in[i].bytes);
  if (!whole && !status) status = upload(e, e->workspace, m->workspace, model.workspace);
  for (int32_t i = 0; i < model.output_count && !whole && !status; ++i) status = upload(e, e->outputs[i], m->outputs[i], out[i].bytes);
  if (m->constants && !status) {
    if (!e->constants) status = allocate(&e->constants, model.constants, "other weights");
    if (!status) status = upload(e, e->constants, m->constants, model.constants);
    if (!status) resolve_pointers(e, e->constants);
  }
  if (!status) {
    if (seconds) status = time_steps(e, m->shape, begin, end, seconds);
    else if (whole && e->graphs[m->shape] && !m->constants) status = check(cuda.graph_launch(e->graphs[m->shape], e->stream), "to start the network", QC_ERROR_GPU);
    else status = launch_steps(e, m->shape, begin, end);
  }
  if (m->constants) resolve_pointers(e, device.constants);
  if (!whole && !status) status = download(e, m->workspace, e->workspace, model.workspace);
  for (int32_t i = 0; i < model.output_count && !status; ++i) status = download(e, m->outputs[i], e->outputs[i], out[i].bytes);
  int finished = cuda.stream_wait(e->stream); /* even after a failure: nothing may touch the caller's memory later */
  return status ? status : check(finished, "during a run", QC_ERROR_GPU);
}

qc_status engine_run(engine* e, const engine_memory* memory, int32_t begin, int32_t end, double* seconds) {
  qc_status status = enter_context();
  if (status) return status;
  status = run(e, memory, begin, end, seconds);
  leave_context();
  return status;
}
