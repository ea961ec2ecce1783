/* call_overhead MODEL.so THREADS ROUNDS: nanoseconds of a call without steps, of a run, and of all steps called one by one, each the least of ROUNDS. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <time.h>

#include "qcompiler/loader.h"

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static double least(double a, double b) { return a < b ? a : b; }

int main(int count, char** words) {
  qc_library model;
  qc_session* s;
  char message[512];
  if (count != 4) return 2;
  if (qc_library_open(words[1], &model, message, sizeof message)) return fprintf(stderr, "%s\n", message), 2;
  if (model.session_create(atoi(words[2]), &s)) return fprintf(stderr, "%s\n", model.last_error()), 2;
  const int rounds = atoi(words[3]), steps = model.step_count(), calls = 200;
  const void* inputs[64];
  void *outputs[64], *workspace;
  if (model.input_count() > 64 || model.output_count() > 64 || posix_memalign(&workspace, 64, model.workspace_bytes())) return 2;
  memset(workspace, 0, model.workspace_bytes());
  for (int i = 0; i < model.input_count(); ++i) {
    void* data;
    if (model.session_input_buffer(s, model.input_info(i)->name, &data)) return 2;
    inputs[i] = data;
  }
  for (int i = 0; i < model.output_count(); ++i)
    if (model.session_output_buffer(s, model.output_info(i)->name, &outputs[i])) return 2;

  double call = 1e18, run = 1e18, *step = malloc(sizeof(double) * (size_t)(steps + 1));
  for (int i = 0; i < steps; ++i) step[i] = 1e18;
  for (int round = 0; round < rounds; ++round) {
    double start = now();
    for (int i = 0; i < calls; ++i) model.session_execute(s, workspace, 0, inputs, outputs, 0, 0);
    call = least(call, (now() - start) / calls);
    start = now();
    model.session_run(s);
    model.session_run(s);
    run = least(run, (now() - start) / 2);
    for (int i = 0; i < steps; ++i) { /* a step again and again has its data in cache, as it has within a run of a small network */
      start = now();
      for (int j = 0; j < 4; ++j) model.session_execute(s, workspace, 0, inputs, outputs, i, i + 1);
      step[i] = least(step[i], (now() - start) / 4);
    }
  }
  double all = 0;
  for (int i = 0; i < steps; ++i) all += step[i];
  printf("{\"steps\": %d, \"call\": %.1f, \"run\": %.1f, \"step_calls\": %.1f}\n", steps, call, run, all);
  model.session_destroy(s);
  qc_library_close(&model);
  return 0;
}
