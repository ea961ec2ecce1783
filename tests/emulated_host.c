/* Runs a compiled library for tests: host LIBRARY FOLDER
 *
 * FOLDER/input<i>.bin are the inputs, FOLDER/workspace.bin (optional) what the workspace holds before the run; FOLDER/regions.txt (optional) has a
 * line "offset bytes" per step: that part of the workspace is appended to FOLDER/trace.bin after the step. FOLDER/output<i>.bin and workspace.bin
 * are written. A failing call prints its message and exits with its qc_status.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qcompiler/qcompiler.h"

static const char* folder;

static FILE* open_file(const char* name, const char* mode) {
  char path[4096];
  snprintf(path, sizeof path, "%s/%s", folder, name);
  return fopen(path, mode);
}

static int transfer(const char* name, const char* mode, void* data, size_t bytes) {
  FILE* file = open_file(name, mode);
  if (!file) return 0;
  size_t done = *mode == 'r' ? fread(data, 1, bytes, file) : fwrite(data, 1, bytes, file);
  if (fclose(file) || done != bytes) exit(101);
  return 1;
}

static void* zeroed(size_t bytes) {
  void* memory = aligned_alloc(64, (bytes + 191) / 64 * 64);
  if (!memory) exit(102);
  return memset(memory, 0, (bytes + 191) / 64 * 64);
}

int main(int argc, char** argv) {
  if (argc != 3) return 103;
  folder = argv[2];
  void* library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    fprintf(stderr, "%s\n", dlerror());
    return 104;
  }
#define FUNCTION(name) __typeof__(&name) p_##name = (__typeof__(&name))dlsym(library, #name)
  FUNCTION(qc_session_create);
  FUNCTION(qc_session_execute);
  FUNCTION(qc_session_destroy);
  FUNCTION(qc_last_error);
  FUNCTION(qc_input_count);
  FUNCTION(qc_output_count);
  FUNCTION(qc_input_info);
  FUNCTION(qc_output_info);
  FUNCTION(qc_workspace_bytes);
  FUNCTION(qc_step_count);
  qc_session* session = 0;
  qc_status status = p_qc_session_create(1, &session);
  if (status) {
    fprintf(stderr, "%s\n", p_qc_last_error());
    return (int)status;
  }
  char name[64];
  int inputs = p_qc_input_count(), outputs = p_qc_output_count();
  const void** in = zeroed(sizeof(void*) * (size_t)(inputs + 1));
  void** out = zeroed(sizeof(void*) * (size_t)(outputs + 1));
  for (int i = 0; i < inputs; ++i) {
    void* data = zeroed(p_qc_input_info(i)->bytes);
    snprintf(name, sizeof name, "input%d.bin", i);
    if (!transfer(name, "rb", data, p_qc_input_info(i)->bytes)) return 105;
    in[i] = data;
  }
  for (int i = 0; i < outputs; ++i) out[i] = zeroed(p_qc_output_info(i)->bytes);
  size_t bytes = p_qc_workspace_bytes();
  char* workspace = zeroed(bytes);
  int whole = transfer("workspace.bin", "rb", workspace, bytes);
  FILE* regions = open_file("regions.txt", "r");
  FILE* trace = regions ? open_file("trace.bin", "wb") : 0;
  for (int step = 0; step < p_qc_step_count(); ++step) {
    status = p_qc_session_execute(session, workspace, 0, in, out, step, step + 1);
    if (status) {
      fprintf(stderr, "%s\n", p_qc_last_error());
      return (int)status;
    }
    size_t offset, size;
    if (regions && (fscanf(regions, "%zu %zu", &offset, &size) != 2 || fwrite(workspace + offset, 1, size, trace) != size)) return 106;
  }
  if (trace && fclose(trace)) return 107;
  for (int i = 0; i < outputs; ++i) {
    snprintf(name, sizeof name, "output%d.bin", i);
    transfer(name, "wb", out[i], p_qc_output_info(i)->bytes);
  }
  if (whole) transfer("workspace.bin", "wb", workspace, bytes);
  p_qc_session_destroy(session);
  return 0;
}
