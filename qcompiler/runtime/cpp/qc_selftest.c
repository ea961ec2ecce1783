/* The self-test of a library: inputs from a recipe, and sums of values that have the same bits on every CPU.
 * qcompiler/runtime/selftest.py makes the same inputs, and the sums. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "qc_engine.h"
#include "qc_model.h"

#define EXPORT __attribute__((visibility("default")))

enum { STREAMS = 64 };

/* Number `counter` of stream `seed` (splitmix64: Steele, Lea, Flood 2014). */
static uint64_t mixed(uint64_t seed, uint64_t counter) {
  uint64_t z = (seed << 32) + (counter + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

/* IEEE half of the number k / 8192, which it may round: to nearest, ties to even. */
static uint16_t half_of(int32_t k) {
  uint32_t sign = k < 0 ? 0x8000u : 0, m = (uint32_t)(k < 0 ? -k : k);
  if (!m) return 0;
  int top = 31 - __builtin_clz(m), exponent = top - 13 + 15;
  uint32_t wide = m << (31 - top), kept = wide >> 21, rest = wide << 11; /* 11 bits with the leading one */
  kept += rest > 0x80000000u || (rest == 0x80000000u && (kept & 1));
  if (exponent <= 0) { /* subnormal: k / 8192 is a multiple of 2^-24 */
    return (uint16_t)(sign | (m << 11));
  }
  return (uint16_t)(sign + ((uint32_t)exponent << 10) + (kept - 1024));
}

static void fill(unsigned char* at, const qc_tensor_info* port, uint64_t seed, int odd) {
  static const size_t sizes[] = {4, 1, 1, 4, 8, 1, 8, 2, 2, 2, 4, 8};
  const size_t size = sizes[port->dtype], count = port->bytes / size;
  for (size_t i = 0; i < count; ++i, at += size) {
    const uint64_t r = mixed(seed, i);
    const unsigned char byte = odd ? (r >> 63 ? 127 : 128) : (unsigned char)(r >> 56);
    const int16_t k = (int16_t)(r >> 48);
    if (port->dtype == QC_INT8 || port->dtype == QC_UINT8) {
      *at = byte;
    } else if (port->dtype == QC_FLOAT32) {
      const float value = port->scale > 0 ? (float)((int8_t)byte - port->zero_point) * port->scale : (float)k / 8192.0f;
      memcpy(at, &value, 4);
    } else if (port->dtype == QC_FLOAT64) {
      const double value = (double)((float)k / 8192.0f);
      memcpy(at, &value, 8);
    } else if (port->dtype == QC_FLOAT16) {
      const uint16_t value = half_of(k);
      memcpy(at, &value, 2);
    } else { /* little-endian, as every target is */
      memset(at, 0, size);
      *at = (unsigned char)(r >> 63);
    }
  }
}

/* Whether the canonical bytes of a value have the sums that they should. */
static int right(const model_probe* p, const unsigned char* base, int vector) {
  uint64_t a = 0, b = 0;
  uint32_t word = 0, held = 0;
  for (size_t n = 0; n < p->n; ++n)
    for (size_t h = 0; h < p->height; ++h)
      for (size_t w = 0; w < p->width; ++w) {
        const unsigned char* row = base + (((n * p->rows + p->top + h) * p->columns + p->left + w) * p->pitch) * p->size;
        for (size_t i = 0; i < p->channels * p->size; ++i) {
          word |= (uint32_t)(unsigned char)(row[i] ^ p->flip) << 8 * held;
          if (++held < 4) continue;
          a += word, b += a;
          word = 0, held = 0;
        }
      }
  if (held) a += word, b += a;
  return a == p->sums[vector][0] && b == p->sums[vector][1];
}

EXPORT qc_status qc_selftest(void) {
  if (!model.vectors) return fail(QC_ERROR_STATE, "%s: this library has no test vectors; compile it with --selftest 2", __func__);
  qc_session* session;
  qc_status status = qc_session_create(1, &session);
  if (status) return status;
  unsigned char *raw = calloc(1, qc_workspace_bytes() + 64), *workspace = raw ? raw + (64 - (uintptr_t)raw % 64) % 64 : 0;
  const int32_t inputs = model.input_count, count = inputs + model.output_count;
  void *ports[count + 1], *held[count + 1]; /* not the session's own: those of states can't be had */
  memset(held, 0, sizeof held);
  if (!raw) status = fail(QC_ERROR_MEMORY, "%s: out of memory", __func__);
  for (int32_t i = 0; i < count && !status; ++i) {
    const size_t bytes = (i < inputs ? qc_input_info(i) : qc_output_info(i - inputs))->bytes;
    held[i] = calloc(1, bytes + 192); /* vector loads may read past the end */
    if (!held[i]) status = fail(QC_ERROR_MEMORY, "%s: out of memory", __func__);
    else ports[i] = (unsigned char*)held[i] + (64 - (uintptr_t)held[i] % 64) % 64;
  }
  for (int vector = 0; vector < model.vectors && !status; ++vector) {
    int32_t done = 0;
    for (int32_t i = 0; i < inputs; ++i) fill(ports[i], qc_input_info(i), (uint64_t)(vector * STREAMS + i), vector % 2);
    for (int32_t i = 0; i < model.probe_count && !status; ++i) {
      const model_probe* p = &model.probes[i];
      status = qc_session_execute(session, workspace, 0, (const void* const*)ports, ports + inputs, done, p->step + 1);
      done = p->step + 1;
      const unsigned char* base = p->output ? ports[inputs + (int32_t)p->place] : workspace + p->place;
      if (!status && !right(p, base, vector))
        status = fail(QC_ERROR_SELFTEST, "self-test: value '%s' of test vector %d is wrong: this machine computes wrongly, or the library is damaged", p->name, vector);
    }
    if (!status) status = qc_session_execute(session, workspace, 0, (const void* const*)ports, ports + inputs, done, model.steps[0]);
  }
  for (int32_t i = 0; i < count; ++i) free(held[i]);
  free(raw);
  qc_session_destroy(session);
  return status;
}
