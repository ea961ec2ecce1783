/* The shapes that a library was compiled for: which of them fits what a caller has, and arrays padded to it. Part of qc_runtime.c. */
#ifndef QC_SHAPES_H
#define QC_SHAPES_H

#include "qc_model.h"

static size_t element_bytes(qc_dtype dtype) {
  static const size_t bytes[] = {4, 1, 1, 4, 8, 1, 8, 2, 2, 2, 4, 8};
  return bytes[dtype];
}

typedef struct { char text[300]; size_t used; } sentence;

__attribute__((format(printf, 2, 3))) static void say(sentence* s, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int added = vsnprintf(s->text + s->used, sizeof s->text - s->used, format, arguments);
  va_end(arguments);
  s->used += added > 0 ? (size_t)added : 0;
  if (s->used >= sizeof s->text) s->used = sizeof s->text - 1;
}

static void say_shape(sentence* s, const char* name, const int64_t* extents, int32_t rank) {
  say(s, "%s [", name);
  for (int32_t a = 0; a < rank && a < QC_MAX_RANK; ++a) say(s, a ? ", %lld" : "%lld", (long long)extents[a]);
  say(s, "]");
}

/* Write to extents[kind] how long the axes of that kind are (0: nothing says). False where `given` contradicts itself or could never be this library's. */
static int lengths(const qc_shape* given, const int32_t* ports, int32_t count, int64_t* extents) {
  for (int32_t kind = 0; kind <= model.axes; ++kind) extents[kind] = 0;
  for (int32_t g = 0; g < count; ++g) {
    const qc_tensor_info* info = &model.inputs[0][ports[g]];
    if (given[g].rank != info->rank) return 0;
    for (int32_t a = 0; a < info->rank; ++a) {
      int8_t kind = model.input_axes[ports[g]][a];
      int64_t extent = given[g].shape[a];
      if (extent < 1 || (kind == 0 && extent != info->shape[a]) || (kind && extents[kind] && extents[kind] != extent)) return 0;
      if (kind) extents[kind] = extent;
    }
  }
  return 1;
}

/* How long the axes of a kind are at a compiled shape. */
static int64_t compiled_length(int32_t shape, int32_t kind) {
  for (int32_t i = 0; i < model.input_count; ++i)
    for (int32_t a = 0; a < model.inputs[shape][i].rank; ++a)
      if (model.input_axes[i][a] == kind) return model.inputs[shape][i].shape[a];
  return 0;
}

static int may_pad(int32_t kind) {
  for (int32_t i = 0; i < model.input_count; ++i)
    for (int32_t a = 0; a < model.inputs[0][i].rank; ++a)
      if (model.input_axes[i][a] == kind && model.pads[i].kind == PAD_NEVER) return 0;
  return 1;
}

/* The compiled shape that `given` is, else the least that it may be padded to; extents[kind]: how long the axes are in `given`. -1: none. */
static int32_t fitting(const qc_shape* given, const int32_t* ports, int32_t count, int64_t* extents) {
  if (!lengths(given, ports, count, extents)) return -1;
  int32_t best = -1;
  double least = 0;
  for (int32_t shape = 0; shape < model.shapes; ++shape) {
    int fits = 1;
    double size = 1;
    for (int32_t kind = 1; kind <= model.axes && fits; ++kind) {
      int64_t there = compiled_length(shape, kind), wanted = extents[kind];
      fits = wanted == 0 || there == wanted || (there > wanted && may_pad(kind));
      if (wanted && there != wanted) size *= (double)there / (double)wanted;
    }
    if (fits && (best < 0 || size < least)) best = shape, least = size;
  }
  for (int32_t kind = 1; kind <= model.axes && best >= 0; ++kind)
    if (!extents[kind]) extents[kind] = compiled_length(best, kind);
  return best;
}

/* ---- arrays cut and padded ------------------------------------------------------------------------------------------------------- */

/* One element of `dtype` that is `value`. */
static void write_element(qc_dtype dtype, double value, void* to) {
  float f32 = (float)value;
  int64_t i64 = (int64_t)value;
  uint64_t u64 = value < 0 ? (uint64_t)i64 : (uint64_t)value;
  uint8_t bit = value != 0;
  switch (dtype) {
    case QC_FLOAT32: memcpy(to, &f32, 4); break;
    case QC_FLOAT64: memcpy(to, &value, 8); break;
    case QC_BOOL: memcpy(to, &bit, 1); break;
    case QC_UINT64: memcpy(to, &u64, 8); break;
    case QC_FLOAT16: memset(to, 0, 2); break; /* only 0 is taken for float16 */
    default: memcpy(to, &i64, element_bytes(dtype)); /* little-endian */
  }
}

/* The part of a dense array of shape `full` that lies within `valid`, from (`in`) or to a dense array of shape `valid`. What lies beyond is padded. */
static void move(char* full_data, const int64_t* full, char* valid_data, const int64_t* valid, int32_t rank, size_t element, int in, const pad_rule* rule,
                 const void* filling) {
  size_t whole = element, part = element; /* bytes of one slice along the first axis */
  int same = rank == 0 || full[0] == valid[0];
  for (int32_t a = 1; a < rank; ++a) whole *= (size_t)full[a], part *= (size_t)valid[a], same &= full[a] == valid[a];
  if (same) {
    size_t bytes = rank ? whole * (size_t)full[0] : element;
    if (in) memcpy(full_data, valid_data, bytes);
    else memcpy(valid_data, full_data, bytes);
    return;
  }
  for (int64_t i = 0; i < valid[0]; ++i)
    move(full_data + (size_t)i * whole, full + 1, valid_data + (size_t)i * part, valid + 1, rank - 1, element, in, rule, filling);
  for (int64_t i = valid[0]; in && i < full[0]; ++i) {
    char* slice = full_data + (size_t)i * whole;
    if (rule->kind == PAD_REPEAT) memcpy(slice, slice - whole, whole);
    else
      for (size_t at = 0; at < whole; at += element) memcpy(slice + at, filling, element);
  }
}

#endif
