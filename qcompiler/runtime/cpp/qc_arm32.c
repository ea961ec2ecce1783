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

#if defined(__ANDROID__)
/* The rest of the run-time ABI (sections 4.1.2, 4.3.1) and of LLVM's own names, for code of Android: there they are in the compiler's own library, which not every
clang comes with. ARMv7-A need not have an instruction that divides. A division by zero gives 0, as that instruction does; quotients round towards zero. */
typedef struct { uint32_t quotient, remainder; } parts;
typedef struct { uint64_t quotient, remainder; } wide_parts;

static wide_parts divide(uint64_t n, uint64_t d) {
  wide_parts made = {0, n};
  if (d == 0 || d > n) return made;
  for (int shift = __builtin_clzll(d) - __builtin_clzll(n); shift >= 0; --shift) {
    if (made.remainder < d << shift) continue;
    made.remainder -= d << shift;
    made.quotient |= (uint64_t)1 << shift;
  }
  return made;
}

static uint64_t magnitude(int64_t value) { return value < 0 ? -(uint64_t)value : (uint64_t)value; }

uint64_t __udivdi3(uint64_t n, uint64_t d) { return divide(n, d).quotient; }
uint64_t __umoddi3(uint64_t n, uint64_t d) { return divide(n, d).remainder; }
int64_t __divdi3(int64_t n, int64_t d) { return (int64_t)((n ^ d) < 0 ? -divide(magnitude(n), magnitude(d)).quotient : divide(magnitude(n), magnitude(d)).quotient); }
int64_t __moddi3(int64_t n, int64_t d) { return (int64_t)(n < 0 ? -divide(magnitude(n), magnitude(d)).remainder : divide(magnitude(n), magnitude(d)).remainder); }

static parts divide_short(uint32_t n, uint32_t d) {
  parts made = {0, n};
  if (d == 0 || d > n) return made;
  for (int shift = __builtin_clz(d) - __builtin_clz(n); shift >= 0; --shift) {
    if (made.remainder < d << shift) continue;
    made.remainder -= d << shift;
    made.quotient |= 1u << shift;
  }
  return made;
}

static uint32_t short_magnitude(int32_t value) { return value < 0 ? -(uint32_t)value : (uint32_t)value; }

uint32_t __udivsi3(uint32_t n, uint32_t d) { return divide_short(n, d).quotient; }
uint32_t __umodsi3(uint32_t n, uint32_t d) { return divide_short(n, d).remainder; }
int32_t __divsi3(int32_t n, int32_t d) {
  uint32_t q = divide_short(short_magnitude(n), short_magnitude(d)).quotient;
  return (int32_t)((n ^ d) < 0 ? -q : q);
}
int32_t __modsi3(int32_t n, int32_t d) {
  uint32_t r = divide_short(short_magnitude(n), short_magnitude(d)).remainder;
  return (int32_t)(n < 0 ? -r : r);
}

/* Quotient and remainder in r0 and r1, as a 64-bit result is returned. */
uint64_t __aeabi_uidivmod(uint32_t n, uint32_t d) {
  parts made = divide_short(n, d);
  return (uint64_t)made.remainder << 32 | made.quotient;
}
uint64_t __aeabi_idivmod(int32_t n, int32_t d) { return (uint64_t)(uint32_t)__modsi3(n, d) << 32 | (uint32_t)__divsi3(n, d); }
uint32_t __aeabi_uidiv(uint32_t n, uint32_t d) { return __udivsi3(n, d); }
int32_t __aeabi_idiv(int32_t n, int32_t d) { return __divsi3(n, d); }

/* Those of 64 bits in r0 to r3, which no type of C is returned in: through memory, then. */
__attribute__((used)) static void divide_into(uint64_t n, uint64_t d, wide_parts* made) { *made = divide(n, d); }
__attribute__((used)) static void divide_signed_into(int64_t n, int64_t d, wide_parts* made) {
  made->quotient = (uint64_t)__divdi3(n, d);
  made->remainder = (uint64_t)__moddi3(n, d);
}
#define IN_FOUR_REGISTERS(name, function)                                                                                                     \
  __attribute__((naked)) void name(void) {                                                                                                    \
    __asm__("push {r11, lr}\n sub sp, sp, #24\n add r12, sp, #8\n str r12, [sp]\n bl " #function "\n ldrd r0, r1, [sp, #8]\n ldrd r2, r3, [sp, #16]\n" \
            " add sp, sp, #24\n pop {r11, pc}\n");                                                                                            \
  }
IN_FOUR_REGISTERS(__aeabi_uldivmod, divide_into)
IN_FOUR_REGISTERS(__aeabi_ldivmod, divide_signed_into)

float __aeabi_ul2f(uint64_t value) { return __floatundisf(value); }
float __aeabi_l2f(int64_t value) { return __floatdisf(value); }
double __aeabi_ul2d(uint64_t value) { return __floatundidf(value); }
double __aeabi_l2d(int64_t value) { return __floatdidf(value); }
uint64_t __aeabi_f2ulz(float value) { return __fixunssfdi(value); }
int64_t __aeabi_f2lz(float value) { return __fixsfdi(value); }
uint64_t __aeabi_d2ulz(double value) { return __fixunsdfdi(value); }
int64_t __aeabi_d2lz(double value) { return __fixdfdi(value); }

/* What tables of unwinding name. Nothing is thrown through our code, and whoever unwinds has these functions, and calls its own. */
void __aeabi_unwind_cpp_pr0(void) {}
void __aeabi_unwind_cpp_pr1(void) {}
#endif
