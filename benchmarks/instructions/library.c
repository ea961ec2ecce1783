/* library MODEL.so: two runs and then every step alone, on zeros, with a marker (plugin.c) before and after each. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "qcompiler/loader.h"

enum { PORTS = 64 };

static void mark(void) { syscall(SYS_getppid); }

int main(int words, char** word) {
  qc_library model;
  qc_session* session;
  char message[512];
  if (words != 2) return 2;
  if (qc_library_open(word[1], &model, message, sizeof message)) return fprintf(stderr, "%s\n", message), 2;
  if (model.session_create(1, &session)) return fprintf(stderr, "%s\n", model.last_error()), 2;
  const void* inputs[PORTS];
  void *outputs[PORTS], *data;
  if (model.input_count() > PORTS || model.output_count() > PORTS) return fprintf(stderr, "more than %d ports\n", PORTS), 2;
  for (int i = 0; i < model.input_count(); ++i) {
    if (model.session_input_buffer(session, model.input_info(i)->name, &data)) return fprintf(stderr, "%s\n", model.last_error()), 2;
    inputs[i] = data;
  }
  for (int i = 0; i < model.output_count(); ++i)
    if (model.session_output_buffer(session, model.output_info(i)->name, &outputs[i])) return fprintf(stderr, "%s\n", model.last_error()), 2;
  for (int i = 0; i < 2; ++i) {
    mark();
    if (model.session_run(session)) return fprintf(stderr, "%s\n", model.last_error()), 2;
    mark();
  }
  void* workspace;
  if (posix_memalign(&workspace, 64, model.workspace_bytes())) return 2;
  memset(workspace, 0, model.workspace_bytes());
  for (int i = 0; i < model.step_count(); ++i) {
    mark();
    if (model.session_execute(session, workspace, 0, inputs, outputs, i, i + 1)) return fprintf(stderr, "%s\n", model.last_error()), 2;
    mark();
  }
  return 0;
}
