/* A C program and a library for a GPU: own buffers, the caller's buffers in host and device memory, steps, fork.
 *
 *     gpu MODEL.so INPUTS.raw WANTED.raw      (inputs x and y of equal size one after the other; the wanted bytes of output "real") */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "qcompiler/loader.h"

static qc_library model;

static void want(int true_, const char* what) {
  if (true_) return;
  printf("FAILED: %s: %s\n", what, model.last_error ? model.last_error() : "");
  exit(1);
}

static void read_file(const char* path, void* data, size_t bytes) {
  FILE* file = fopen(path, "rb");
  want(file && fread(data, 1, bytes, file) == bytes, path);
  fclose(file);
}

int main(int count, char** words) {
  char message[256];
  want(count == 4, "arguments");
  if (qc_library_open(words[1], &model, message, sizeof message) != QC_OK) return puts(message), 1;
  size_t in = model.input_info(0)->bytes, out = model.output_info(1)->bytes;
  unsigned char *x = malloc(2 * in), *wanted = malloc(out), *y = malloc(out);
  read_file(words[2], x, 2 * in);
  read_file(words[3], wanted, out);

  qc_session *s, *second;
  want(model.session_create(4, &s) == QC_OK, "a session; its number of threads means nothing");
  want(model.session_create(1, &second) == QC_OK, "a second session");
  want(model.session_run(s) == QC_ERROR_STATE, "a run before the inputs");
  for (int i = 0; i < 2; ++i) {
    void* own;
    want(model.session_input_buffer(s, model.input_info(i)->name, &own) == QC_OK && (uintptr_t)own % 64 == 0, "own input buffers");
    memcpy(own, x + (size_t)i * in, in);
  }
  void* own;
  want(model.session_run(s) == QC_OK && model.session_output_buffer(s, "real", &own) == QC_OK, "a run on own buffers");
  want(memcmp(own, wanted, out) == 0, "the bytes in own buffers");
  model.session_destroy(s);

  /* x in device memory, as an application that computes on the GPU has it */
  void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  int (*allocate)(uint64_t*, size_t), (*release)(uint64_t), (*push)(void*), (*pop)(void**), (*retain)(void**, int), (*drop)(int);
#define DRIVER(variable, name) { void* found = dlsym(driver, name); memcpy((void*)&variable, &found, sizeof found); }
  DRIVER(allocate, "cuMemAlloc_v2") DRIVER(release, "cuMemFree_v2") DRIVER(push, "cuCtxPushCurrent_v2") DRIVER(pop, "cuCtxPopCurrent_v2")
  DRIVER(retain, "cuDevicePrimaryCtxRetain") DRIVER(drop, "cuDevicePrimaryCtxRelease_v2")
  uint64_t device = 0;
  void* context;
  want(!retain(&context, 0) && !push(context) && !allocate(&device, in), "device memory");
  memcpy((void*)(uintptr_t)device, x, in); /* this device is the CPU */
  want(model.session_bind_input(second, "x", (void*)(uintptr_t)device, in) == QC_OK, "bind device memory");
  want(model.session_bind_input(second, "y", x + in, in) == QC_OK && model.session_bind_output(second, "real", y, out) == QC_OK, "bind host memory");
  want(model.session_run(second) == QC_OK && memcmp(y, wanted, out) == 0, "a run on the caller's buffers");
  want(!release(device) && !pop(&context) && !drop(0), "the context is as it was");

  fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    qc_session* third;
    int fine = model.session_run(second) == QC_ERROR_DEVICE && strstr(model.last_error(), "fork") && model.session_create(1, &third) == QC_ERROR_DEVICE;
    model.session_destroy(second);
    _exit(fine ? 0 : 3);
  }
  int status;
  want(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0, "sessions don't survive fork");
  model.session_destroy(second);
  qc_library_close(&model);
  free(x), free(y), free(wanted);
  return 0;
}
