/* litert libLiteRt.so MODEL.tflite: two runs by XNNPACK, with a marker (plugin.c) before and after each. The model has one input and one output.
 * Declares the functions of LiteRT's C interface that it needs, as of version 2.3; exits with 1 and a message where one is missing or fails. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef void* handle;
enum { CPU = 1, TYPE_BYTES = 256 };

#define FUNCTION(name, ...)                                      \
  int (*name)(__VA_ARGS__) = (int (*)(__VA_ARGS__))dlsym(library, "LiteRt" #name); \
  if (!name) return fprintf(stderr, "%s has no LiteRt" #name "\n", word[1]), 1
#define TRY(call)                                                                       \
  do {                                                                                  \
    int status = (call);                                                                \
    if (status) return fprintf(stderr, "%s: status %d\n", #call, status), 1;            \
  } while (0)

static void mark(void) { syscall(SYS_getppid); }

int main(int words, char** word) {
  if (words != 3) return 2;
  handle library = dlopen(word[1], RTLD_NOW);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
  FUNCTION(CreateEnvironment, int, const void*, handle*);
  FUNCTION(CreateModelFromFile, handle, const char*, handle*);
  FUNCTION(CreateOptions, handle*);
  FUNCTION(SetOptionsHardwareAccelerators, handle, int);
  FUNCTION(CreateCompiledModel, handle, handle, handle, handle*);
  FUNCTION(CompiledModelIsFullyAccelerated, handle, bool*);
  FUNCTION(GetModelSubgraph, handle, size_t, handle*);
  FUNCTION(GetSubgraphInput, handle, size_t, handle*);
  FUNCTION(GetSubgraphOutput, handle, size_t, handle*);
  FUNCTION(GetRankedTensorType, handle, void*);
  FUNCTION(GetCompiledModelInputBufferRequirements, handle, size_t, size_t, handle*);
  FUNCTION(GetCompiledModelOutputBufferRequirements, handle, size_t, size_t, handle*);
  FUNCTION(CreateManagedTensorBufferFromRequirements, handle, const void*, handle, handle*);
  FUNCTION(RunCompiledModel, handle, size_t, size_t, handle*, size_t, handle*);

  handle environment, model, options, compiled, graph, tensor, requirements, input, output;
  char type[TYPE_BYTES];
  bool whole = false;
  TRY(CreateEnvironment(0, NULL, &environment));
  TRY(CreateModelFromFile(environment, word[2], &model));
  TRY(CreateOptions(&options));
  TRY(SetOptionsHardwareAccelerators(options, CPU));
  TRY(CreateCompiledModel(environment, model, options, &compiled));
  TRY(CompiledModelIsFullyAccelerated(compiled, &whole));
  if (!whole) return fprintf(stderr, "%s: XNNPACK does not take the whole network\n", word[2]), 1;
  TRY(GetModelSubgraph(model, 0, &graph));
  TRY(GetSubgraphInput(graph, 0, &tensor));
  TRY(GetRankedTensorType(tensor, type));
  TRY(GetCompiledModelInputBufferRequirements(compiled, 0, 0, &requirements));
  TRY(CreateManagedTensorBufferFromRequirements(environment, type, requirements, &input));
  TRY(GetSubgraphOutput(graph, 0, &tensor));
  TRY(GetRankedTensorType(tensor, type));
  TRY(GetCompiledModelOutputBufferRequirements(compiled, 0, 0, &requirements));
  TRY(CreateManagedTensorBufferFromRequirements(environment, type, requirements, &output));
  for (int i = 0; i < 2; ++i) {
    mark();
    TRY(RunCompiledModel(compiled, 0, 1, &input, 1, &output));
    mark();
  }
  _exit(0); /* what is left to tear down is not measured */
}
