/* A program for a GPU as data: what the compiler writes (qcompiler/backend/cuda.py) and qc_cuda.c interprets. */
#ifndef QC_LAUNCHES_H
#define QC_LAUNCHES_H

#include <stdint.h>

enum { SPACE_WORKSPACE, SPACE_CONSTANTS, SPACE_COUNTERS, SPACE_INPUT, SPACE_OUTPUT };

/* A pointer argument: `offset` bytes into the workspace, the constants or the counters, or port number `offset`. */
typedef struct { int32_t space; uint64_t offset; } launch_argument;

/* A step: `blocks` blocks of `threads` threads of a kernel, on arguments [first, first + count). */
typedef struct { int32_t kernel; uint32_t blocks, threads; int32_t first, count; } launch;

extern const char* const launch_kernels[]; /* symbols in the device code */
extern const int32_t launch_kernel_count;
extern const launch launches[];       /* one per step, shape by shape */
extern const int32_t launch_starts[]; /* the first of each shape, and behind the last */
extern const launch_argument launch_arguments[];
extern const int32_t launch_argument_count;
extern const int32_t launch_counters; /* int32 words that are 0 before and after every step; all steps share them */
extern const int32_t launch_capability; /* 80: the GPU must have compute capability 8.0 or later */
extern const int32_t launch_one_capability; /* 1: that one and no later */
extern const char launch_code[], launch_code_end[]; /* a fat binary */

#endif
