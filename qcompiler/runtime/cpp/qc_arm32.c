/* Conversions between 64-bit integers and floating point for 32-bit Arm, which has no instructions for them.

LLVM calls these functions with floating-point numbers in VFP registers, as the rest of the code passes them; libgcc's functions of the same names take and
return them in core registers (Run-time ABI for the Arm Architecture, section 4.1.2). Those below are found first, by the linker, in a library of ours.
Each is exact or rounded once, to nearest, ties to even; out of range it saturates, as the instructions for 32 bits do; NaN gives 0. */
#include <stdint.h>
#include <string.h>

float __floatundisf(uint64_t value) {
  int bits = value >> 31 ? 33 - __builtin_clzll(value) : 0; /* what does not fit 31 bits; the last of those says whether any bit was lost */
  uint32_t kept = (uint32_t)(value >> bits), lost = ((uint64_t)kept << bits) != value;
  uint32_t power = (uint32_t)(bits + 127) << 23;
  float scale;
  memcpy(&scale, &power, sizeof scale);
  return (float)(int32_t)(kept | lost) * scale; /* one rounding: the product with a power of two is exact */
}

float __floatdisf(int64_t value) { return value < 0 ? -__floatundisf(-(uint64_t)value) : __floatundisf((uint64_t)value); }

double __floatundidf(uint64_t value) { /* both products and the high part are exact, so the sum is the one rounding */
  return (double)(uint32_t)(value >> 32) * 4294967296.0 + (double)(uint32_t)value;
}

double __floatdidf(int64_t value) { return (double)(int32_t)(value >> 32) * 4294967296.0 + (double)(uint32_t)value; }

uint64_t __fixunsdfdi(double value) {
  if (!(value > 0)) return 0;
  if (value >= 18446744073709551616.0) return UINT64_MAX;
  uint32_t high = (uint32_t)(value / 4294967296.0);
  return (uint64_t)high << 32 | (uint32_t)(value - (double)high * 4294967296.0);
}

int64_t __fixdfdi(double value) {
  if (value >= 9223372036854775808.0) return INT64_MAX;
  if (value <= -9223372036854775808.0) return INT64_MIN;
  return value < 0 ? -(int64_t)__fixunsdfdi(-value) : (int64_t)__fixunsdfdi(value);
}

uint64_t __fixunssfdi(float value) { return __fixunsdfdi((double)value); }

int64_t __fixsfdi(float value) { return __fixdfdi((double)value); }
