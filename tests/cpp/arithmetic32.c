/* Divides and converts with what qc_arm32.c has for Android; the exit status is a line that is wrong, or 0. */
#include "qc_arm32.c"
#define CHECK(condition) if (!(condition)) leave(__LINE__)
static void leave(int status) {
  register int r0 __asm__("r0") = status & 255 ? status & 255 : 1;
  if (!status) r0 = 0;
  register int r7 __asm__("r7") = 1;
  __asm__ volatile("svc 0" ::"r"(r0), "r"(r7));
}
void __aeabi_memcpy(void* to, const void* from, unsigned n) { for (unsigned i = 0; i < n; ++i) ((volatile char*)to)[i] = ((const char*)from)[i]; }
void* memcpy(void* to, const void* from, size_t n) { return __aeabi_memcpy(to, from, n), to; }
static volatile int64_t numbers[] = {0, 1, -1, 2, 3, 7, -10, 1000003, -1000003, 0x7fffffff, -0x80000000ll, 0x80000000ll, 0xffffffffll, 0x100000000ll, -0x123456789abll,
                                     0x7fffffffffffffffll, -0x7fffffffffffffffll - 1};
enum { COUNT = sizeof numbers / sizeof *numbers };
void _start(void) {
  for (int i = 0; i < COUNT; ++i) {
    int64_t n = numbers[i];
    CHECK((int64_t)(double)(n >> 11) == n >> 11);
    CHECK((int64_t)(float)(n >> 40) == n >> 40);
    CHECK((uint64_t)(double)((uint64_t)n >> 11) == (uint64_t)n >> 11);
    CHECK((uint64_t)(float)((uint64_t)n >> 40) == (uint64_t)n >> 40);
    for (int k = 0; k < COUNT; ++k) {
      int64_t d = numbers[k];
      uint64_t un = (uint64_t)n, ud = (uint64_t)d;
      if (!d) continue;
      CHECK(un / ud * ud + un % ud == un && un % ud < ud);
      CHECK(__udivdi3(un, ud) == un / ud && __umoddi3(un, ud) == un % ud);
      int64_t q = n / d, r = n % d;
      CHECK((int64_t)((uint64_t)q * ud + (uint64_t)r) == n && magnitude(r) < magnitude(d) && (!r || (r < 0) == (n < 0)));
      CHECK(__divdi3(n, d) == q && __moddi3(n, d) == r);
      int32_t a = (int32_t)n, b = (int32_t)d;
      uint32_t ua = (uint32_t)a, ub = (uint32_t)b;
      if (!b) continue;
      CHECK(ua / ub * ub + ua % ub == ua && ua % ub < ub && __udivsi3(ua, ub) == ua / ub && __umodsi3(ua, ub) == ua % ub);
      if (a != INT32_MIN || b != -1) CHECK(__divsi3(a, b) == (int32_t)((int64_t)a / b) && __modsi3(a, b) == (int32_t)((int64_t)a % b) && a / b * b + a % b == a);
    }
  }
  CHECK((double)numbers[15] == 9223372036854775808.0 && (float)numbers[7] == 1000003.0f && (double)(uint64_t)numbers[2] == 18446744073709551616.0);
  leave(0);
}
