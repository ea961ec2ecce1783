/* A plain C client: every error of the C interface with its code, zero copy between guard pages, fork, and a run whose outputs go to a file.
 *
 *     client MODEL.so INPUT.raw OUTPUT.raw BROKEN.so...     (the model has one input and one output)
 *
 * Each BROKEN.so must be refused. Prints one line per check; exit 1 when one fails. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "qcompiler/loader.h"

static int failures = 0;

static void expect(int condition, const char* what, const char* detail) {
  printf("%s: %s: %s\n", condition ? "ok" : "FAILED", what, detail);
  failures += !condition;
}

#define EXPECT_STATUS(call, wanted, fragment)                                                                    \
  do {                                                                                                           \
    qc_status status_ = (call);                                                                                  \
    expect(status_ == (wanted) && strstr(model.last_error(), fragment), #call " gives " #wanted, model.last_error()); \
  } while (0)
#define EXPECT_OK(call) expect((call) == QC_OK, #call, model.last_error())

static size_t page(void) { return (size_t)sysconf(_SC_PAGESIZE); }

/* `bytes` writable bytes that end at a page nobody may touch, or begin behind one. */
static unsigned char* guarded(size_t bytes, int at_end) {
  size_t pages = (bytes + page() - 1) / page();
  unsigned char* base = mmap(0, (pages + 2) * page(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (base == MAP_FAILED || mprotect(base + page(), pages * page(), PROT_READ | PROT_WRITE)) exit(3);
  return base + page() + (at_end ? pages * page() - bytes : 0);
}

static void release(unsigned char* data, size_t bytes) {
  size_t pages = (bytes + page() - 1) / page();
  munmap((void*)((uintptr_t)data / page() * page() - page()), (pages + 2) * page());
}

int main(int count, char** words) {
  qc_library model;
  char message[512] = "";
  if (count < 4) return 2;
  for (int i = 4; i < count; ++i) {
    message[0] = 0;
    qc_status status = qc_library_open(words[i], &model, message, sizeof message);
    expect((status == QC_ERROR_LIBRARY || status == QC_ERROR_DEVICE) && message[0], words[i], message);
  }
  expect(qc_library_open(0, &model, message, sizeof message) == QC_ERROR_ARGUMENT, "a null path", "");
  expect(qc_library_open(words[1], &model, message, sizeof message) == QC_OK, "open", message);
  if (!model.handle) return 1;
  expect(model.input_info(-1) == 0 && model.input_info(model.input_count()) == 0 && model.output_info(99) == 0, "ports out of range are null", "");
  const qc_tensor_info *in = model.input_info(0), *out = model.output_info(0);

  qc_session* s = 0;
  EXPECT_STATUS(model.session_create(0, &s), QC_ERROR_ARGUMENT, "1 to 1024");
  EXPECT_STATUS(model.session_create(1, 0), QC_ERROR_ARGUMENT, "null");
  if (model.session_create(2, &s) != QC_OK) {
    printf("%s\n", model.last_error());
    qc_library_close(&model);
    return 7; /* this CPU lacks an instruction set */
  }
  EXPECT_STATUS(model.session_run(0), QC_ERROR_ARGUMENT, "null");
  EXPECT_STATUS(model.session_run(s), QC_ERROR_STATE, in->name);

  /* aligned memory of this program's */
  unsigned char *x = guarded(in->bytes, 1), *y = guarded(out->bytes, 1), *pattern = malloc(out->bytes);
  FILE* file = fopen(words[2], "rb");
  if (!file || fread(x, 1, in->bytes, file) != in->bytes) return 2;
  fclose(file);

  EXPECT_STATUS(model.session_bind_input(s, "nobody", x, in->bytes), QC_ERROR_NAME, in->name);
  EXPECT_STATUS(model.session_bind_output(s, "", y, out->bytes), QC_ERROR_NAME, out->name);
  EXPECT_STATUS(model.session_bind_input(s, 0, x, in->bytes), QC_ERROR_ARGUMENT, "name is null");
  EXPECT_STATUS(model.session_bind_input(0, in->name, x, in->bytes), QC_ERROR_ARGUMENT, "session is null");
  EXPECT_STATUS(model.session_bind_input(s, in->name, x, in->bytes - 1), QC_ERROR_SIZE, in->name);
  EXPECT_STATUS(model.session_bind_output(s, out->name, y, out->bytes + 4), QC_ERROR_SIZE, out->name);
  EXPECT_STATUS(model.session_bind_input(s, in->name, 0, in->bytes), QC_ERROR_ARGUMENT, "null");
  EXPECT_STATUS(model.session_bind_input(s, in->name, x - 1, in->bytes), QC_ERROR_ALIGNMENT, "aligned to 4");
  EXPECT_STATUS(model.session_bind_output(s, out->name, y - 2, out->bytes), QC_ERROR_ALIGNMENT, "aligned to 4");
  EXPECT_STATUS(model.session_input_buffer(s, in->name, 0), QC_ERROR_ARGUMENT, "null");
  void* own = 0;
  EXPECT_STATUS(model.session_output_buffer(s, "nobody", &own), QC_ERROR_NAME, out->name);
  EXPECT_STATUS(model.session_run(s), QC_ERROR_STATE, "has not been set"); /* a refused bind binds nothing */

  /* steps by hand */
  unsigned char* workspace = 0;
  if (posix_memalign((void**)&workspace, 64, model.workspace_bytes())) return 3;
  memset(workspace, 0, model.workspace_bytes());
  const void* inputs[1] = {x};
  void* outputs[1] = {y};
  EXPECT_STATUS(model.session_execute(s, workspace, 0, inputs, outputs, 0, model.step_count() + 1), QC_ERROR_ARGUMENT, "steps");
  EXPECT_STATUS(model.session_execute(s, workspace, 0, inputs, outputs, -1, 1), QC_ERROR_ARGUMENT, "steps");
  EXPECT_STATUS(model.session_execute(s, workspace + 4, 0, inputs, outputs, 0, 1), QC_ERROR_ALIGNMENT, "64");
  EXPECT_STATUS(model.session_execute(s, workspace, (char*)workspace + 8, inputs, outputs, 0, 1), QC_ERROR_ALIGNMENT, "64");
  EXPECT_STATUS(model.session_execute(s, 0, 0, inputs, outputs, 0, 1), QC_ERROR_ARGUMENT, "null");
  inputs[0] = 0;
  EXPECT_STATUS(model.session_execute(s, workspace, 0, inputs, outputs, 0, 1), QC_ERROR_ARGUMENT, in->name);
  inputs[0] = x - 1;
  EXPECT_STATUS(model.session_execute(s, workspace, 0, inputs, outputs, 0, 1), QC_ERROR_ALIGNMENT, in->name);
  inputs[0] = x;

  /* own buffers first: the answer to compare with */
  EXPECT_OK(model.session_input_buffer(s, in->name, &own));
  expect((uintptr_t)own % 64 == 0, "own buffers are aligned to 64 bytes", "");
  memcpy(own, x, in->bytes);
  EXPECT_OK(model.session_run(s));
  EXPECT_OK(model.session_output_buffer(s, out->name, &own));
  memcpy(pattern, own, out->bytes);

  for (int i = 0; i < model.step_count(); ++i)
    if (model.session_execute(s, workspace, 0, inputs, outputs, i, i + 1)) expect(0, "a step", model.last_error());
  expect(memcmp(y, pattern, out->bytes) == 0, "step by step gives the same bytes", "");

  double* seconds = malloc(sizeof(double) * (size_t)model.step_count());
  EXPECT_STATUS(model.session_profile(s, workspace, 0, inputs, outputs, 0, model.step_count(), 0), QC_ERROR_ARGUMENT, "null");
  memset(y, 0x55, out->bytes);
  EXPECT_OK(model.session_profile(s, workspace, 0, inputs, outputs, 0, model.step_count(), seconds));
  expect(memcmp(y, pattern, out->bytes) == 0, "profiling gives the same bytes", "");
  for (int i = 0; i < model.step_count(); ++i) expect(seconds[i] > 0 && seconds[i] < 100, "the time of a step", "");
  free(seconds);

  /* zero copy: a caller's buffers between pages that nobody may touch, at every alignment its elements allow */
  for (int at_end = 0; at_end < 2; ++at_end)
    for (size_t shift = 0; shift < 64; shift += 4) {
      unsigned char *gx = guarded(in->bytes + shift, at_end), *gy = guarded(out->bytes + shift, at_end);
      unsigned char *px = gx + (at_end ? 0 : shift), *py = gy + (at_end ? 0 : shift);
      memcpy(px, x, in->bytes);
      memset(py, 0x55, out->bytes);
      if (model.session_bind_input(s, in->name, px, in->bytes) || model.session_bind_output(s, out->name, py, out->bytes) || model.session_run(s))
        expect(0, "zero copy", model.last_error());
      if (memcmp(py, pattern, out->bytes) || memcmp(px, x, in->bytes)) expect(0, "zero copy gives the same bytes and leaves its input", "");
      release(gx, in->bytes + shift);
      release(gy, out->bytes + shift);
    }
  EXPECT_OK(model.session_bind_input(s, in->name, x, in->bytes));
  EXPECT_OK(model.session_bind_output(s, out->name, y, out->bytes));

  /* a child of fork() has no worker threads: it runs on its one thread, and destroys without waiting for them */
  fflush(stdout);
  pid_t child = fork();
  if (child == 0) {
    int good = model.session_run(s) == QC_OK && memcmp(y, pattern, out->bytes) == 0;
    model.session_destroy(s);
    _exit(good ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child runs and destroys", "");

  memset(y, 0, out->bytes);
  EXPECT_OK(model.session_run(s));
  expect(memcmp(y, pattern, out->bytes) == 0, "the parent runs on", "");
  file = fopen(words[3], "wb");
  if (!file || fwrite(y, 1, out->bytes, file) != out->bytes || fclose(file)) return 3;
  model.session_destroy(s);
  model.session_destroy(0);
  for (int threads = 1; threads <= 4; ++threads) { /* destroyed before they ever ran */
    EXPECT_OK(model.session_create(threads, &s));
    model.session_destroy(s);
  }
  release(x, in->bytes);
  release(y, out->bytes);
  free(workspace);
  free(pattern);
  qc_library_close(&model);
  qc_library_close(&model);
  return failures != 0;
}
