// A stand-in for libcuda.so.1, for tests: the driver functions that runtime/cpp/qc_cuda.c calls, with the CPU as the device. Never shipped.
//
// QC_FAKE_CUDA_PROGRAM  the library that executes the kernels of every module (tests/cuda_emulated.py makes it); or a folder of folders with a library
//                       emulated.so and the image kernels.fatbin whose modules it executes
// QC_FAKE_CUDA          switches, comma-separated: no-device, capability=75, memory=BYTES, bad-image, no-graphs, fail-launch=N (the N-th fails; graphs'
//                       launches count), fail-kernel=N (all launches of kernels kN_...), fail-init, skip-repeats (of a launch, in a row)
// qc_fake_fail(N, CODE, STICKY), from inside of the process: the N-th call from now on returns CODE and does nothing; STICKY: so do all that follow, as after a
//                       lost GPU. Calls that free what there is fail only then. qc_fake_calls(): those that could have failed since; qc_fake_failed(): which did; qc_fake_left():
//                       objects that weren't freed; qc_fake_contexts(): contexts that weren't; qc_fake_bytes(): of memory that are allocated
// QC_FAKE_CUDA_LOG      a file that gets one line of JSON when the process ends: what was used, and what was never freed
//
// Streams are lazy: copies and kernels happen when they are waited for, so that an order that only luck upholds shows. Every pointer of a launch must lie in
// living device memory. A failed launch breaks the context for good, as on a GPU.
#include <dlfcn.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "emulation.h"

namespace {

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_IMAGE = 200, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, LAUNCH_FAILED = 719, NOT_SUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901 };

using Emulate = void (*)(void*, int, unsigned, unsigned, void**);
struct Kernel {
  void* function;
  int arguments;
  Emulate run;
  int number;  // k12_conv: 12
};
struct Launch {
  const Kernel* kernel;
  unsigned blocks, threads;
  std::vector<void*> pointers;
};
struct Stream {
  std::vector<std::function<int()>> queue;
  std::vector<Launch>* recording = nullptr;
  std::shared_ptr<Launch> last;  // when nothing came after it but events
};
struct Graph {
  std::vector<Launch> launches;
};
struct Module {
  std::map<std::string, Kernel> kernels;
};
struct Event {
  double seconds = 0;
};

// Everything is leaked on purpose: the process's last calls come after static destructors.
std::recursive_mutex& lock = *new std::recursive_mutex;
std::map<char*, size_t>& memory = *new std::map<char*, size_t>;
std::set<void*>&page_locked = *new std::set<void*>, &streams = *new std::set<void*>, &graphs = *new std::set<void*>, &modules = *new std::set<void*>,
               &events = *new std::set<void*>;
Stream& default_stream = *new Stream;
thread_local int current = 0;  // depth of the context stack
int retained = 0, initialized = 0, broken = 0;
long launches = 0, replays = 0, plain = 0;
std::atomic<long> calls{0}, fail_at{0};
std::atomic<int> fail_code{0}, sticky{0};
const char* failed_call = "";

// What the call must return at once; 0: it goes on. A call that frees (`frees`) isn't counted.
int injected(bool frees, const char* function) {
  const long at = fail_at;
  const long now = frees ? calls.load() : ++calls;
  if (!at || (sticky ? now < at : now != at || frees)) return SUCCESS;
  if (now == at && !frees) failed_call = function;
  return fail_code;
}

long number(const char* name, long otherwise) {  // NAME=VALUE among the switches
  const char* text = std::getenv("QC_FAKE_CUDA");
  for (std::string rest = text ? text : ""; !rest.empty();) {
    const size_t comma = rest.find(',');
    const std::string word = rest.substr(0, comma);
    rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
    const size_t equals = word.find('=');
    if (word.substr(0, equals) == name) return equals == std::string::npos ? 1 : std::atol(word.c_str() + equals + 1);
  }
  return otherwise;
}

bool flag(const char* name) { return number(name, 0) != 0; }

// The library that executes the kernels of an image.
void* emulator(const void* image) {
  std::filesystem::path path = std::getenv("QC_FAKE_CUDA_PROGRAM"), library = path;
  if (std::filesystem::is_directory(path)) {
    uint64_t bytes;
    std::memcpy(&bytes, static_cast<const char*>(image) + 8, 8);
    const std::string wanted(static_cast<const char*>(image), bytes + 16);
    for (const auto& entry : std::filesystem::directory_iterator(path)) {
      std::ifstream file(entry.path() / "kernels.fatbin", std::ios::binary);
      if (std::string(std::istreambuf_iterator<char>(file), {}) == wanted) library = entry.path() / "emulated.so";
    }
  }
  void* opened = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!opened) std::fprintf(stderr, "fake driver: %s\n", dlerror()), std::abort();
  return opened;
}

bool on_device(void* pointer) {
  auto after = memory.upper_bound(static_cast<char*>(pointer));
  if (after == memory.begin()) return false;
  --after;
  return static_cast<char*>(pointer) < after->first + after->second;
}

int execute(const Launch& l) {
  if (broken) return broken;
  if (++launches == number("fail-launch", 0) || l.kernel->number == number("fail-kernel", -1)) return broken = LAUNCH_FAILED;
  for (void* pointer : l.pointers)
    if (!on_device(pointer)) return broken = LAUNCH_FAILED;
  std::vector<void*> pointers = l.pointers;
  l.kernel->run(l.kernel->function, static_cast<int>(pointers.size()), l.blocks, l.threads, pointers.data());
  return SUCCESS;
}

void free_memory(size_t* available, size_t* total) {
  size_t used = 0;
  for (auto& [at, bytes] : memory) used += bytes;
  *total = static_cast<size_t>(number("memory", 1L << 34));
  *available = *total - used;
}

int drain(Stream* s) {
  int result = SUCCESS;
  for (auto& work : s->queue)
    if (const int failed = work()) result = failed;
  s->queue.clear();
  return result ? result : broken;
}

void drain_all() {  // as a call that frees memory does
  drain(&default_stream);
  for (void* stream : streams) drain(static_cast<Stream*>(stream));
}

Stream* stream_of(void* handle) { return handle ? static_cast<Stream*>(handle) : &default_stream; }

[[gnu::destructor]] void report() {
  const char* path = std::getenv("QC_FAKE_CUDA_LOG");
  FILE* file = path ? std::fopen(path, "a") : nullptr;
  if (!file) return;
  std::fprintf(file, "{\"launches\": %ld, \"replays\": %ld, \"plain\": %ld, \"left\": %zu, \"contexts\": %d, \"depth\": %d}\n", launches, replays, plain,
               memory.size() + page_locked.size() + streams.size() + graphs.size() + modules.size() + events.size(), retained, current);
  std::fclose(file);
}

}  // namespace

#define MAY_FAIL(frees) \
  if (const int code = injected(frees, __func__)) return code;
#define NEEDS_CONTEXT_AND(frees)                    \
  std::lock_guard<std::recursive_mutex> hold(lock); \
  MAY_FAIL(frees)                                   \
  if (broken) return broken;                      \
  if (current < 1) return INVALID_CONTEXT;
#define NEEDS_CONTEXT NEEDS_CONTEXT_AND(false)
#define FREES NEEDS_CONTEXT_AND(true)

extern "C" {

void qc_fake_fail(long nth, int code, int stays) { calls = 0, fail_at = nth, fail_code = code, sticky = stays; }
long qc_fake_calls() { return calls; }
const char* qc_fake_failed() { return failed_call; }
long qc_fake_left() {
  std::lock_guard<std::recursive_mutex> hold(lock);
  return static_cast<long>(memory.size() + page_locked.size() + streams.size() + graphs.size() + modules.size() + events.size());
}
long qc_fake_contexts() { return retained; }
long qc_fake_bytes() {
  std::lock_guard<std::recursive_mutex> hold(lock);
  size_t available, total;
  free_memory(&available, &total);
  return static_cast<long>(total - available);
}

int cuInit(unsigned) {
  MAY_FAIL(false)
  if (flag("fail-init")) return 999;
  if (flag("no-device")) return NO_DEVICE;
  initialized = 1;
  return SUCCESS;
}

int cuGetErrorName(int error, const char** name) {
  *name = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : error == LAUNCH_FAILED ? "CUDA_ERROR_LAUNCH_FAILED" : error == INVALID_IMAGE ? "CUDA_ERROR_INVALID_IMAGE" : error == 999 ? "CUDA_ERROR_UNKNOWN" : "CUDA_ERROR_OTHER";
  return SUCCESS;
}
int cuGetErrorString(int error, const char** text) {
  *text = error == OUT_OF_MEMORY ? "out of memory" : error == LAUNCH_FAILED ? "unspecified launch failure" : error == INVALID_IMAGE ? "device kernel image is invalid" : "unknown error";
  return SUCCESS;
}
int cuDriverGetVersion(int* version) {
  MAY_FAIL(false)
  return *version = 13000, SUCCESS;
}
int cuDeviceGet(int* device, int ordinal) {
  MAY_FAIL(false)
  if (!initialized) return NOT_INITIALIZED;
  return *device = 0, ordinal == 0 ? SUCCESS : INVALID_VALUE;
}
int cuDeviceGetName(char* name, int size, int) {
  MAY_FAIL(false)
  return std::snprintf(name, static_cast<size_t>(size), "Fake GPU"), SUCCESS;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  MAY_FAIL(false)
  const long capability = number("capability", 90);
  if (attribute == 13) return *value = 1000000, SUCCESS;  // kHz
  if (attribute == 16) return *value = 10, SUCCESS;       // multiprocessors
  if (attribute != 75 && attribute != 76) return INVALID_VALUE;
  return *value = static_cast<int>(attribute == 75 ? capability / 10 : capability % 10), SUCCESS;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
  MAY_FAIL(false)
  return ++retained, *context = &retained, SUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(int) { return --retained, SUCCESS; }
int cuCtxPushCurrent_v2(void* context) {
  MAY_FAIL(false)
  return context == &retained && retained > 0 ? (++current, SUCCESS) : INVALID_CONTEXT;
}
int cuCtxPopCurrent_v2(void** context) { return current > 0 ? (--current, *context = &retained, SUCCESS) : INVALID_CONTEXT; }

int cuModuleLoadData(void** module, const void* image) {
  NEEDS_CONTEXT
  uint32_t magic;
  std::memcpy(&magic, image, 4);
  if (magic != 0xBA55ED50u || flag("bad-image")) return INVALID_IMAGE;
  auto* made = new Module;
  void* library = emulator(image);
  const auto run = reinterpret_cast<Emulate>(dlsym(library, "qc_emulate"));
  for (auto* row = static_cast<const qc_emulated_kernel*>(dlsym(library, "qc_emulated_kernels")); row->name; ++row)
    made->kernels[row->name] = {row->function, row->arguments, run, std::atoi(row->name + 1)};
  modules.insert(*module = made);
  return SUCCESS;
}
int cuModuleUnload(void* module) {
  FREES
  if (!modules.erase(module)) return INVALID_HANDLE;
  delete static_cast<Module*>(module);
  return SUCCESS;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  NEEDS_CONTEXT
  auto& kernels = static_cast<Module*>(module)->kernels;
  const auto found = kernels.find(name);
  if (found == kernels.end()) return NOT_FOUND;
  return *function = &found->second, SUCCESS;
}

int cuMemGetInfo_v2(size_t* available, size_t* total) {
  NEEDS_CONTEXT
  return free_memory(available, total), SUCCESS;
}
int cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  NEEDS_CONTEXT
  size_t available, total;
  free_memory(&available, &total);
  if (bytes == 0) return INVALID_VALUE;
  if (bytes > available) return OUT_OF_MEMORY;
  char* made = static_cast<char*>(std::aligned_alloc(512, (bytes + 511) / 512 * 512));
  std::memset(made, 0x5A, bytes);
  memory[made] = bytes;
  return *address = reinterpret_cast<uint64_t>(made), SUCCESS;
}
int cuMemFree_v2(uint64_t address) {
  FREES
  drain_all();
  if (!memory.erase(reinterpret_cast<char*>(address))) return INVALID_VALUE;
  std::free(reinterpret_cast<void*>(address));
  return SUCCESS;
}
int cuMemHostAlloc(void** made, size_t bytes, unsigned) {
  NEEDS_CONTEXT
  page_locked.insert(*made = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096));
  return SUCCESS;
}
int cuMemFreeHost(void* pointer) {
  FREES
  drain_all();
  if (!page_locked.erase(pointer)) return INVALID_VALUE;
  std::free(pointer);
  return SUCCESS;
}

int cuStreamCreate(void** stream, unsigned) {
  NEEDS_CONTEXT
  streams.insert(*stream = new Stream);
  return SUCCESS;
}
int cuStreamDestroy_v2(void* stream) {
  FREES
  if (!streams.erase(stream)) return INVALID_HANDLE;
  drain(static_cast<Stream*>(stream));
  delete static_cast<Stream*>(stream)->recording;
  delete static_cast<Stream*>(stream);
  return SUCCESS;
}
int cuStreamSynchronize(void* stream) {
  NEEDS_CONTEXT
  if (stream_of(stream)->recording) return CAPTURE_UNSUPPORTED;
  return drain(stream_of(stream));
}

int cuMemsetD8Async(uint64_t address, unsigned char value, size_t bytes, void* stream) {
  NEEDS_CONTEXT
  auto* to = reinterpret_cast<char*>(address);
  if (!on_device(to) || !on_device(to + bytes - 1)) return INVALID_VALUE;
  stream_of(stream)->queue.push_back([=] { return std::memset(to, value, bytes), SUCCESS; });
  return SUCCESS;
}
int cuMemcpyAsync(uint64_t to, uint64_t from, size_t bytes, void* stream) {
  NEEDS_CONTEXT
  for (uint64_t at : {to, from})
    if (on_device(reinterpret_cast<char*>(at)) && !on_device(reinterpret_cast<char*>(at) + bytes - 1)) return INVALID_VALUE;
  stream_of(stream)->last.reset();
  stream_of(stream)->queue.push_back([=] { return std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes), SUCCESS; });
  return SUCCESS;
}

int cuLaunchKernel(void* function, unsigned blocks, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz, unsigned shared, void* stream,
                   void** arguments, void** extra) {
  NEEDS_CONTEXT
  if (!function || !blocks || y != 1 || z != 1 || !threads || threads > 1024 || ty != 1 || tz != 1 || shared || extra) return INVALID_VALUE;
  const auto* kernel = static_cast<const Kernel*>(function);
  Launch l{kernel, blocks, threads, {}};
  for (int i = 0; i < kernel->arguments; ++i) l.pointers.push_back(*static_cast<void**>(arguments[i]));
  Stream* s = stream_of(stream);
  if (s->recording) return s->recording->push_back(l), SUCCESS;
  ++plain;
  const auto is_same = [&](const Launch& o) { return o.kernel == kernel && o.pointers == l.pointers; };
  if (flag("skip-repeats") && s->last && is_same(*s->last)) return SUCCESS;
  s->last = std::make_shared<Launch>(l);
  s->queue.push_back([l] { return execute(l); });
  return SUCCESS;
}

int cuStreamBeginCapture_v2(void* stream, int) {
  NEEDS_CONTEXT
  if (flag("no-graphs")) return NOT_SUPPORTED;
  static_cast<Stream*>(stream)->recording = new std::vector<Launch>;
  return SUCCESS;
}
int cuStreamEndCapture(void* stream, void** graph) {
  NEEDS_CONTEXT
  auto* s = static_cast<Stream*>(stream);
  if (!s->recording) return CAPTURE_INVALIDATED;
  graphs.insert(*graph = new Graph{*s->recording});
  delete s->recording;
  s->recording = nullptr;
  return SUCCESS;
}
int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  NEEDS_CONTEXT
  graphs.insert(*executable = new Graph(*static_cast<Graph*>(graph)));
  return SUCCESS;
}
int cuGraphDestroy(void* graph) {
  FREES
  if (!graphs.erase(graph)) return INVALID_HANDLE;
  delete static_cast<Graph*>(graph);
  return SUCCESS;
}
int cuGraphExecDestroy(void* graph) { return cuGraphDestroy(graph); }
int cuGraphLaunch(void* graph, void* stream) {
  NEEDS_CONTEXT
  auto* g = static_cast<Graph*>(graph);
  ++replays;
  for (const Launch& l : g->launches) stream_of(stream)->queue.push_back([l] { return execute(l); });
  return SUCCESS;
}

int cuEventCreate(void** event, unsigned) {
  NEEDS_CONTEXT
  events.insert(*event = new Event);
  return SUCCESS;
}
int cuEventDestroy_v2(void* event) {
  FREES
  if (!events.erase(event)) return INVALID_HANDLE;
  delete static_cast<Event*>(event);
  return SUCCESS;
}
int cuEventRecord(void* event, void* stream) {
  NEEDS_CONTEXT
  const int result = drain(stream_of(stream));
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  static_cast<Event*>(event)->seconds = static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
  return result;
}
int cuEventSynchronize(void*) {
  NEEDS_CONTEXT
  return SUCCESS;
}
int cuEventElapsedTime(float* milliseconds, void* start, void* stop) {
  NEEDS_CONTEXT
  *milliseconds = static_cast<float>((static_cast<Event*>(stop)->seconds - static_cast<Event*>(start)->seconds) * 1e3);
  return SUCCESS;
}

}  // extern "C"
