/* What the runtime knows of a network: `model`, which qc_model.c makes of `model.h`, which the compiler writes. No other source depends on a network, so that their
 * object code is made once for a target. */
#ifndef QC_MODEL_H
#define QC_MODEL_H

#include "qcompiler/qcompiler.h"

/* How an input may be padded. */
typedef struct { int32_t kind; double value; } pad_rule;
enum { PAD_NEVER, PAD_VALUE, PAD_REPEAT }; /* PAD_REPEAT: with its last slice */

/* Output number `output` is the next value of input number `input`; in the first run that is filled with the `period` bytes of `first`, again and again. */
typedef struct { int32_t input, output; const char* first; size_t period; } model_state;

/* A value of the self-test, behind step `step`: in the workspace, or in output `place`. Element (n, h, w, c) is at
 * ((n * rows + top + h) * columns + left + w) * pitch + c; flip: what its bytes differ by from the canonical ones. sums: of each test vector. */
typedef struct {
  const char* name;
  int32_t step, output;
  size_t place, n, rows, columns, pitch, top, left, height, width, channels, size;
  unsigned char flip;
  const uint64_t (*sums)[2];
} model_probe;

/* The calling convention of generated entry points (TVM FFI): 16-byte tagged values. */
typedef struct { int32_t type; uint32_t padding; union { int64_t integer; void* pointer; } value; } argument;
typedef int entry(void* self, const argument* arguments, int32_t count, argument* result);

typedef struct {
  const char* target;
  const char* (*missing_feature)(void); /* the first CPU feature that this machine lacks, or null */
  int32_t tiles;                        /* whether the code uses AMX tiles */
  int32_t shapes;                       /* that the library was compiled for */
  int32_t input_count, output_count, state_count;
  const qc_tensor_info* const* inputs;          /* of each shape: its ports */
  const qc_tensor_info* const* outputs;
  const size_t *most_input, *most_output;       /* of each port: bytes at the shape that needs most */
  int32_t axes;                                 /* kinds of axes that vary from shape to shape; those of one kind are as long as each other at every shape */
  const int8_t (*input_axes)[QC_MAX_RANK];      /* of each port's axes: its kind, from 1 on; 0: it does not vary */
  const int8_t (*output_axes)[QC_MAX_RANK];
  int32_t padded;                               /* whether any input may be padded */
  const pad_rule* pads;                         /* of each input */
  const model_state* states;
  const int32_t* steps;                         /* of each shape: how many */
  entry* const* entries;                        /* of each shape; none for a GPU */
  size_t workspace, constants;                  /* bytes; workspace: of the shape that needs most */
  int32_t vectors, probe_count;                 /* of the self-test */
  const model_probe* probes;                    /* by step */
} qc_model;

extern const qc_model model;

#endif
