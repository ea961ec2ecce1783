/**
 * @file
 * Opens libraries compiled by qcompiler at run time: header only, C11 or C++17, for systems with dlopen and ELF.
 *
 *     qc_library model;
 *     char message[256];
 *     if (qc_library_open("model.so", &model, message, sizeof message) != QC_OK) { fprintf(stderr, "%s\n", message); return 1; }
 *     qc_session* session;
 *     model.session_create(2, &session);
 *     ...
 *     model.session_destroy(session);
 *     qc_library_close(&model);
 *
 * The file is checked before any of it is executed: its architecture, its completeness, and the checksum that the compiler put behind it.
 */
#ifndef QCOMPILER_LOADER_H
#define QCOMPILER_LOADER_H

#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "qcompiler/qcompiler.h"

#ifdef __cplusplus
extern "C" {
#endif

/** The functions of qcompiler.h in one open library. `handle` is dlopen's, null for a library linked to the program. */
typedef struct qc_library {
  void* handle;
  int32_t (*abi_version)(void);
  const char* (*last_error)(void);
  const char* (*manifest_json)(size_t*);
  const char* (*target_name)(void);
  int32_t (*input_count)(void);
  int32_t (*output_count)(void);
  const qc_tensor_info* (*input_info)(int32_t);
  const qc_tensor_info* (*output_info)(int32_t);
  qc_status (*session_create)(int32_t, qc_session**);
  void (*session_destroy)(qc_session*);
  qc_status (*session_bind_input)(qc_session*, const char*, const void*, size_t);
  qc_status (*session_bind_output)(qc_session*, const char*, void*, size_t);
  qc_status (*session_input_buffer)(qc_session*, const char*, void**);
  qc_status (*session_output_buffer)(qc_session*, const char*, void**);
  qc_status (*session_run)(qc_session*);
  qc_status (*session_execute)(qc_session*, void*, const void*, const void* const*, void* const*, int32_t, int32_t);
  qc_status (*session_profile)(qc_session*, void*, const void*, const void* const*, void* const*, int32_t, int32_t, double*);
  size_t (*workspace_bytes)(void);
  int32_t (*step_count)(void);
  /* Null in libraries of the first versions, which have one shape, and neither states nor test vectors: */
  int32_t (*input_state)(int32_t);
  qc_status (*session_reset)(qc_session*);
  qc_status (*selftest)(void);
  int32_t (*shape_count)(void);
  const qc_tensor_info* (*shape_input_info)(int32_t, int32_t);
  const qc_tensor_info* (*shape_output_info)(int32_t, int32_t);
  int32_t (*shape_step_count)(int32_t);
  qc_status (*session_set_shape)(qc_session*, int32_t);
  qc_status (*session_fit)(qc_session*, const qc_shape*, int32_t);
  const qc_tensor_info* (*session_input_info)(qc_session*, int32_t);
  const qc_tensor_info* (*session_output_info)(qc_session*, int32_t);
  qc_status (*session_write)(qc_session*, const char*, const void*, size_t);
  qc_status (*session_read)(qc_session*, const char*, void*, size_t);
} qc_library;

/** Check the file at `path` without executing it. On failure `message` (of `size` bytes) gets a sentence. Errors: LIBRARY, DEVICE. */
static inline qc_status qc_library_check(const char* path, char* message, size_t size) {
  FILE* file = fopen(path, "rb");
  if (!file) {
    snprintf(message, size, "%s: can't be opened: %s", path, strerror(errno));
    return QC_ERROR_LIBRARY;
  }
  /* The checksum is two sums over the file's little-endian 32-bit words, a of the words and b of a's values; trailer: 8 bytes of magic, a, b. */
  static const char magic[8] = {'q', 'c', '.', 's', 'u', 'm', '1', '\n'};
  unsigned char block[24 + 65536];
  unsigned char ident[20] = {0};
  uint64_t a = 0, b = 0, total = 0;
  size_t held = 0, got;
  while ((got = fread(block + held, 1, sizeof block - held, file)) > 0) {
    if (total == 0) memcpy(ident, block, got < sizeof ident ? got : sizeof ident);
    total += got;
    held += got;
    size_t whole = held > 24 ? (held - 24) & ~(size_t)3 : 0; /* the last 24 bytes are the trailer */
    for (size_t i = 0; i < whole; i += 4) {
      uint32_t word;
      memcpy(&word, block + i, 4); /* all supported machines are little-endian */
      a += word;
      b += a;
    }
    memmove(block, block + whole, held - whole);
    held -= whole;
  }
  int failed = ferror(file) ? errno : 0;
  fclose(file);
  if (failed) {
    snprintf(message, size, "%s: can't be read: %s", path, strerror(failed));
    return QC_ERROR_LIBRARY;
  }
  if (memcmp(ident, ELFMAG, SELFMAG) != 0) {
    snprintf(message, size, "%s: not a library that qcompiler made (no ELF header)", path);
    return QC_ERROR_LIBRARY;
  }
#if defined(__x86_64__)
  const int wanted = EM_X86_64;
  const char* here = "x86_64";
#elif defined(__aarch64__)
  const int wanted = EM_AARCH64;
  const char* here = "aarch64";
#elif defined(__arm__)
  const int wanted = EM_ARM;
  const char* here = "armv7";
#else
#error "qcompiler makes libraries for x86_64, aarch64 and armv7"
#endif
  int machine = ident[18] | ident[19] << 8; /* e_machine */
  if (machine != wanted) {
    const char* made = machine == EM_X86_64 ? "x86_64" : machine == EM_AARCH64 ? "aarch64" : machine == EM_ARM ? "armv7" : "another machine";
    snprintf(message, size, "%s: compiled for %s, this machine is %s; compile the model for a target of this machine", path, made, here);
    return QC_ERROR_DEVICE;
  }
  if (held != 24 || memcmp(block, magic, 8) != 0) {
    snprintf(message, size, "%s: cut short, stripped, or not a library that qcompiler made (no checksum at its end); copy it again", path);
    return QC_ERROR_LIBRARY;
  }
  uint64_t expected[2];
  memcpy(expected, block + 8, 16);
  if (expected[0] != a || expected[1] != b) {
    snprintf(message, size, "%s: damaged (its checksum does not match its %llu bytes); copy it again", path, (unsigned long long)total);
    return QC_ERROR_LIBRARY;
  }
  return QC_OK;
}

/** Close a library; every session on it must have been destroyed. Closing twice, or a linked library, is fine. */
static inline void qc_library_close(qc_library* library) {
  if (library && library->handle) dlclose(library->handle);
  if (library) library->handle = 0;
}

/**
 * Check and open the library at `path` and fill in `*library`; close it with qc_library_close. Opening one file twice shares code and weights.
 * On failure `message` (of `size` bytes) gets a sentence and nothing stays open. Errors: ARGUMENT, LIBRARY, DEVICE.
 */
static inline qc_status qc_library_open(const char* path, qc_library* library, char* message, size_t size) {
  if (!path || !library || !message || !size) return QC_ERROR_ARGUMENT;
  memset(library, 0, sizeof *library);
  qc_status status = qc_library_check(path, message, size);
  if (status != QC_OK) return status;
  char place[4096]; /* without a slash dlopen would search the system's folders */
  snprintf(place, sizeof place, "%s%s", strchr(path, '/') ? "" : "./", path);
  library->handle = dlopen(place, RTLD_NOW | RTLD_LOCAL);
  if (!library->handle) {
    snprintf(message, size, "%s: can't be loaded: %s", path, dlerror());
    return QC_ERROR_LIBRARY;
  }
  const char* missing = 0;
/* ISO C has no conversion from dlsym's object pointer to a function pointer; POSIX guarantees that the bits are the same. */
#define QC_LOAD_IF_THERE(name)                                          \
  void* symbol = dlsym(library->handle, "qc_" #name);                   \
  memcpy((void*)&library->name, &symbol, sizeof symbol)
#define QC_LOAD(name)                                                   \
  do {                                                                  \
    QC_LOAD_IF_THERE(name);                                             \
    if (!symbol && !missing) missing = "qc_" #name;                     \
  } while (0)
#define QC_LOAD_LATER(name)                                             \
  do {                                                                  \
    QC_LOAD_IF_THERE(name);                                             \
  } while (0)
  QC_LOAD(abi_version);
  QC_LOAD(last_error);
  QC_LOAD(manifest_json);
  QC_LOAD(target_name);
  QC_LOAD(input_count);
  QC_LOAD(output_count);
  QC_LOAD(input_info);
  QC_LOAD(output_info);
  QC_LOAD(session_create);
  QC_LOAD(session_destroy);
  QC_LOAD(session_bind_input);
  QC_LOAD(session_bind_output);
  QC_LOAD(session_input_buffer);
  QC_LOAD(session_output_buffer);
  QC_LOAD(session_run);
  QC_LOAD(session_execute);
  QC_LOAD(session_profile);
  QC_LOAD(workspace_bytes);
  QC_LOAD(step_count);
  QC_LOAD_LATER(session_reset);
  QC_LOAD_LATER(input_state);
  QC_LOAD_LATER(shape_count);
  QC_LOAD_LATER(shape_input_info);
  QC_LOAD_LATER(shape_output_info);
  QC_LOAD_LATER(shape_step_count);
  QC_LOAD_LATER(session_set_shape);
  QC_LOAD_LATER(session_fit);
  QC_LOAD_LATER(session_input_info);
  QC_LOAD_LATER(session_output_info);
  QC_LOAD_LATER(session_write);
  QC_LOAD_LATER(session_read);
  QC_LOAD_LATER(selftest);
#undef QC_LOAD
#undef QC_LOAD_LATER
#undef QC_LOAD_IF_THERE
  if (library->abi_version && library->abi_version() != QC_ABI_VERSION) /* first: another version may have other functions */
    snprintf(message, size, "%s: has ABI version %d, this header is version %d; compile the model again", path, (int)library->abi_version(), QC_ABI_VERSION);
  else if (missing)
    snprintf(message, size, "%s: not a library that qcompiler made (no symbol %s)", path, missing);
  else
    return QC_OK;
  qc_library_close(library);
  return QC_ERROR_LIBRARY;
}

/** The library that is linked to this program. Call it only in a program that links one. */
static inline qc_library qc_library_linked(void) {
  qc_library library;
  library.handle = 0;
  library.abi_version = qc_abi_version;
  library.last_error = qc_last_error;
  library.manifest_json = qc_manifest_json;
  library.target_name = qc_target_name;
  library.input_count = qc_input_count;
  library.output_count = qc_output_count;
  library.input_info = qc_input_info;
  library.output_info = qc_output_info;
  library.session_create = qc_session_create;
  library.session_destroy = qc_session_destroy;
  library.session_bind_input = qc_session_bind_input;
  library.session_bind_output = qc_session_bind_output;
  library.session_input_buffer = qc_session_input_buffer;
  library.session_output_buffer = qc_session_output_buffer;
  library.session_run = qc_session_run;
  library.session_execute = qc_session_execute;
  library.session_reset = qc_session_reset;
  library.selftest = qc_selftest;
  library.input_state = qc_input_state;
  library.session_profile = qc_session_profile;
  library.workspace_bytes = qc_workspace_bytes;
  library.step_count = qc_step_count;
  library.shape_count = qc_shape_count;
  library.shape_input_info = qc_shape_input_info;
  library.shape_output_info = qc_shape_output_info;
  library.shape_step_count = qc_shape_step_count;
  library.session_set_shape = qc_session_set_shape;
  library.session_fit = qc_session_fit;
  library.session_input_info = qc_session_input_info;
  library.session_output_info = qc_session_output_info;
  library.session_write = qc_session_write;
  library.session_read = qc_session_read;
  return library;
}

#ifdef __cplusplus
}
#endif
#endif
