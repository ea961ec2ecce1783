// CUDA C on a CPU, for tests: included in front of a kernel source, it makes plain functions of the kernels, and qc_emulate runs a launch of one.
//
// A block's threads are fibers of one CPU thread; blocks run one after the other, in random order. A fiber runs until it waits for others: at __syncthreads, or at an
// instruction of its warp. Between two waits the fibers run in an order that `qc_emulate_order` seeds, so that a missing barrier shows as a wrong
// result. Shared memory starts as garbage in every block, and asynchronous copies happen as late as they may: when they are waited for.
#pragma once
#if !defined(__x86_64__)
#error "the emulation switches stacks in x86-64 assembly"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define alignas(n) __attribute__((aligned(n)))
#define threadIdx (qc_emulation::here->index)
#define blockIdx (qc_emulation::block_index)

namespace qc_emulation {

struct Index {
  unsigned x, y, z;
};

enum Wait { READY, BLOCK, WARP, DONE };

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Product {
  int* sums;
  const char *left, *right;
  int columns, row;
};

struct Fiber {
  Index index;
  Wait wait;
  void* stack;                           // pointer of the suspended fiber
  char* memory;                          // where its stack lies
  bool fenced, counted, acquired;        // since the last barrier: a fence, then a counter, then a fence again
  bool wrote, hidden;                    // to shared memory since the last qc_show_shared; and a barrier came between
  bool begun;                            // qc_begin_products, and no product committed since
  std::vector<std::vector<Copy>> groups;  // committed asynchronous copies, oldest first
  std::vector<Copy> open;
  std::vector<std::vector<Product>> products;  // committed asynchronous products, oldest first
  std::vector<Product> started;
};

constexpr size_t STACK = 64 << 10;
inline Index block_index;
inline Fiber* here;
inline void* scheduler;
inline std::vector<Fiber> fibers;
inline uint64_t order = 1;
inline void (*entry)(void*, void**);
inline void* entry_function;
inline void** entry_arguments;
inline int vote;                 // of __syncthreads_or
inline unsigned barriers;        // that the block has passed
inline bool ordered;             // all its threads see what blocks that counted before it wrote
inline int exchange[32][32][8];  // what the lanes of each warp show each other

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u, thread %u)\n", what, block_index.x, here ? here->index.x : 0);
  std::abort();
}

// Saves the callee-saved registers on the present stack, leaves its pointer in *from, and goes on where `to` was left.
extern "C" void qc_switch(void** from, void* to);
asm(R"(
.text
.weak qc_switch
qc_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

inline void suspend(Wait why) {
  here->wait = why;
  Fiber* self = here;
  qc_switch(&self->stack, scheduler);
}

inline void run_fiber() {
  entry(entry_function, entry_arguments);
  if (!here->open.empty() || !here->groups.empty()) {
    for (auto& group : here->groups)
      if (!group.empty()) fail("a thread ends with asynchronous copies that it never waited for");
    if (!here->open.empty()) fail("a thread ends with asynchronous copies that it never committed");
  }
  if (!here->products.empty() || !here->started.empty()) fail("a thread ends with asynchronous products that it never waited for");
  suspend(DONE);
  std::abort();
}

inline void start(Fiber& fiber, unsigned number) {
  fiber.index = {number, 0, 0};
  fiber.wait = READY;
  fiber.groups.clear();
  fiber.open.clear();
  fiber.fenced = fiber.counted = fiber.acquired = fiber.wrote = fiber.hidden = fiber.begun = false;
  if (!fiber.memory) fiber.memory = static_cast<char*>(std::aligned_alloc(64, STACK));
  void** top = reinterpret_cast<void**>(fiber.memory + STACK) - 3;
  *--top = reinterpret_cast<void*>(run_fiber);  // the address `ret` goes to; the stack is then as after a call
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack = top;
}

inline void shuffle(std::vector<unsigned>& turn) {
  for (size_t i = turn.size() - 1; i > 0; --i) {
    order = order * 6364136223846793005u + 1442695040888963407u;
    std::swap(turn[i], turn[(order >> 33) % (i + 1)]);
  }
}

inline void run_block(unsigned number, unsigned threads) {
  block_index = {number, 0, 0};
  barriers = 0, ordered = false;
  for (unsigned i = 0; i < threads; ++i) start(fibers[i], i);
  std::vector<unsigned> turn(threads);
  for (unsigned i = 0; i < threads; ++i) turn[i] = i;
  for (;;) {
    shuffle(turn);
    for (unsigned i : turn) {
      if (fibers[i].wait != READY) continue;
      here = &fibers[i];
      qc_switch(&scheduler, here->stack);
    }
    unsigned done = 0, waiting = 0, released = 0;
    for (unsigned w = 0; w < threads; w += 32) {  // a warp goes on when all its lanes wait for each other
      unsigned lanes = std::min(32u, threads - w), in_warp = 0;
      for (unsigned i = w; i < w + lanes; ++i) {
        in_warp += fibers[i].wait == WARP;
        waiting += fibers[i].wait == BLOCK;
        done += fibers[i].wait == DONE;
      }
      if (in_warp == lanes) {
        for (unsigned i = w; i < w + lanes; ++i) fibers[i].wait = READY;
        released += lanes;
      }
    }
    if (done == threads) return;
    if (waiting == threads) {
      ++barriers;
      for (auto& fiber : fibers) {
        ordered |= fiber.acquired;
        fiber.fenced = fiber.counted = fiber.acquired = false;
        fiber.hidden = fiber.wrote;
        fiber.wait = READY;
      }
    } else if (!released) {
      fail("deadlock: some threads wait for others that never come");
    }
  }
}

template <size_t... I>
inline void call(void* function, void** arguments, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(decltype((void)I, (void*)0)...)>(function)(arguments[I]...);
}

template <size_t N>
inline void call_n(void* function, void** arguments) {
  call(function, arguments, std::make_index_sequence<N>());
}

template <size_t... N>
inline auto caller(size_t count, std::index_sequence<N...>) {
  static void (*const table[])(void*, void**) = {call_n<N>...};
  return count < sizeof...(N) ? table[count] : nullptr;
}

// -- what kernels call -------------------------------------------------------------------------------------------------------------------

inline void copy_aligned(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) fail("a word of 8 or 16 bytes is not aligned to its size");
  std::memcpy(to, from, bytes);
}

inline unsigned warp() { return here->index.x / 32; }
inline unsigned lane() { return here->index.x % 32; }

}  // namespace qc_emulation

// One kernel of a source: tables of them are called qc_emulated_kernels and end with a name of nullptr.
struct qc_emulated_kernel {
  const char* name;
  void* function;
  int arguments;  // all of them pointers
};

// Runs `blocks` blocks of `threads` threads; arguments[i] is the i-th pointer.
extern "C" inline __attribute__((used)) void qc_emulate(void* function, int arguments, unsigned blocks, unsigned threads, void** pointers) {
  using namespace qc_emulation;
  if (threads < 1 || threads > 1024) fail("a block must have 1 to 1024 threads");
  entry = caller(arguments, std::make_index_sequence<48>());
  if (!entry) fail("too many kernel arguments");
  entry_function = function;
  entry_arguments = pointers;
  for (auto& fiber : fibers) std::free(fiber.memory);
  fibers.clear();
  fibers.resize(threads);
  std::vector<unsigned> turn(blocks);
  for (unsigned b = 0; b < blocks; ++b) turn[b] = b;
  shuffle(turn);
  for (unsigned b : turn) run_block(b, threads);
}

// Seeds the order in which threads run between barriers.
extern "C" inline __attribute__((used)) void qc_emulate_order(uint64_t seed) { qc_emulation::order = 2 * seed + 1; }

// Words of 8 and 16 bytes must be aligned where they are read and written.
#define QC_COPIES(name)                                                               \
  name() = default;                                                                   \
  name(const name& from) { qc_emulation::copy_aligned(this, &from, sizeof from); }    \
  name& operator=(const name& from) {                                                 \
    qc_emulation::copy_aligned(this, &from, sizeof from);                             \
    return *this;                                                                     \
  }
#define QC_VECTORS(type)                                                              \
  struct type##2 {                                                                    \
    type x, y;                                                                        \
    QC_COPIES(type##2)                                                                \
    type##2(type a, type b) : x(a), y(b) {}                                           \
  } __attribute__((aligned(8)));                                                      \
  struct type##4 {                                                                    \
    type x, y, z, w;                                                                  \
    QC_COPIES(type##4)                                                                \
    type##4(type a, type b, type c, type d) : x(a), y(b), z(c), w(d) {}               \
  } __attribute__((aligned(16)));                                                     \
  inline type##2 make_##type##2(type x, type y) { return {x, y}; }                    \
  inline type##4 make_##type##4(type x, type y, type z, type w) { return {x, y, z, w}; }
QC_VECTORS(int)
QC_VECTORS(float)

inline void __syncthreads() { qc_emulation::suspend(qc_emulation::BLOCK); }
inline int __syncthreads_or(int predicate) {
  using namespace qc_emulation;
  vote |= predicate;
  __syncthreads();
  const int result = vote != 0;
  __syncthreads();
  vote = 0;
  __syncthreads();
  return result;
}
inline void __syncwarp() { qc_emulation::suspend(qc_emulation::WARP); }

// Blocks don't overlap here, so these check the order that makes one block's writes visible to another: barrier, fence, counter; counter, fence, barrier, load;
// the fences by the thread that counts.
inline void __threadfence() {
  auto& fiber = *qc_emulation::here;
  fiber.acquired = fiber.counted;
  fiber.fenced = true;
}
inline unsigned atomicInc(unsigned* counter, unsigned last) {
  auto& fiber = *qc_emulation::here;
  if (!qc_emulation::barriers || !fiber.fenced) qc_emulation::fail("a counter without a barrier and then a fence before it");
  fiber.counted = true;
  const unsigned old = *counter;
  *counter = old >= last ? 0 : old + 1;
  return old;
}
template <typename T>
inline T __ldcg(const T* from) {
  if (!qc_emulation::ordered) qc_emulation::fail("what other blocks wrote is read without a fence and then a barrier behind the counter");
  return *from;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float value) { return std::sqrt(value); }
inline int __float2int_rn(float value) {  // saturates; NaN becomes 0
  if (std::isnan(value)) return 0;
  if (value >= 2147483648.0f) return INT32_MAX;
  if (value <= -2147483648.0f) return INT32_MIN;
  return static_cast<int>(std::nearbyint(value));
}

inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return c;
}

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> 4 * i & 15;
    unsigned byte = static_cast<unsigned>(both >> 8 * (pick & 7)) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

// As in CUDA: of a number and a NaN, the number.
inline float max(float a, float b) { return std::fmax(a, b); }
inline float min(float a, float b) { return std::fmin(a, b); }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline float __expf(float value) { return std::exp(value); }
inline float __logf(float value) { return std::log(value); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

// -- what schedules/cuda/device.cuh has for GPUs ---------------------------------------------------------------------------------------------

template <int bytes>
inline void qc_copy(void* to, const void* from) {
  using namespace qc_emulation;
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes) fail("a copy is not aligned to its size");
  here->open.push_back({to, from, bytes});
}

inline void qc_commit_copies() {
  using namespace qc_emulation;
  here->groups.push_back(std::move(here->open));
  here->open.clear();
}

template <int pending>
inline void qc_wait_copies() {
  auto& groups = qc_emulation::here->groups;
  while (groups.size() > pending) {
    for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    qc_emulation::here->wrote |= !groups.front().empty();
    groups.erase(groups.begin());
  }
}

// The lanes of a warp show each other what they hold: all of them must come here.
template <typename Work>
inline void qc_exchange(const void* mine, size_t bytes, Work work) {
  using namespace qc_emulation;
  if (fibers.size() % 32) fail("a warp instruction in a block with a partial warp");
  std::memcpy(exchange[warp()][lane()], mine, bytes);
  __syncwarp();
  work(exchange[warp()]);
  __syncwarp();
}

inline void qc_load_matrices(int* to, const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) qc_emulation::fail("a matrix row is not aligned to 16 bytes");
  qc_exchange(&row, sizeof row, [&](int (*shown)[8]) {
    for (int i = 0; i < 4; ++i) {
      const char* from;
      std::memcpy(&from, shown[8 * i + qc_emulation::lane() / 4], sizeof from);
      std::memcpy(to + i, from + 4 * (qc_emulation::lane() % 4), 4);
    }
  });
}

// Fragments of m8n8k16 (PTX manual): a holds row lane / 4, columns 4 * (lane % 4) ..; b column lane / 4, rows 4 * (lane % 4) ..; c[i] row lane / 4, column
// 2 * (lane % 4) + i.
template <typename Left>
inline void qc_multiply_8_as(int* c, int a, int b) {
  const int mine[2] = {a, b};
  qc_exchange(mine, sizeof mine, [&](int (*shown)[8]) {
    const int row = qc_emulation::lane() / 4, quarter = qc_emulation::lane() % 4;
    for (int i = 0; i < 2; ++i)
      for (int k = 0; k < 16; ++k) {
        const int left = shown[4 * row + k / 4][0], right = shown[4 * (2 * quarter + i) + k / 4][1];
        c[i] += static_cast<Left>(left >> 8 * (k % 4)) * static_cast<int8_t>(right >> 8 * (k % 4));
      }
  });
}
inline void qc_multiply_8(int* c, int a, int b) { qc_multiply_8_as<int8_t>(c, a, b); }
inline void qc_multiply_8_unsigned(int* c, int a, int b) { qc_multiply_8_as<uint8_t>(c, a, b); }

// Fragments of m16n8k32 (PTX manual): a[i] holds row lane / 4 + 8 * (i % 2), columns 4 * (lane % 4) + 16 * (i / 2) ..; b[i] column lane / 4,
// rows 4 * (lane % 4) + 16 * i ..; c[i] row lane / 4 + 8 * (i / 2), column 2 * (lane % 4) + i % 2.
template <typename Left>
inline void qc_multiply_16_as(int* c, const int* a, const int* b) {
  const int mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  qc_exchange(mine, sizeof mine, [&](int (*shown)[8]) {
    const int row = qc_emulation::lane() / 4, quarter = qc_emulation::lane() % 4;
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 32; k += 4) {
        const int left = shown[4 * row + k % 16 / 4][i / 2 + 2 * (k / 16)];
        const int right = shown[4 * (2 * quarter + i % 2) + k % 16 / 4][4 + k / 16];
        for (int j = 0; j < 4; ++j) c[i] += static_cast<Left>(left >> 8 * j) * static_cast<int8_t>(right >> 8 * j);
      }
  });
}
inline void qc_multiply_16(int* c, const int* a, const int* b) { qc_multiply_16_as<int8_t>(c, a, b); }
inline void qc_multiply_16_unsigned(int* c, const int* a, const int* b) { qc_multiply_16_as<uint8_t>(c, a, b); }

// Toward 0, to a multiple of 2^exponent.
inline double qc_cut(double value, int exponent) { return std::ldexp(std::trunc(std::ldexp(value, -exponent)), exponent); }

// Fragments of m16n8k16 (PTX manual): a[i] holds row lane / 4 + 8 * (i % 2), columns 2 * (lane % 4) + 8 * (i / 2) and the next; b[i] column lane / 4, rows
// 2 * (lane % 4) + 8 * i and the next. 8 products and a sum are cut off 2 bits below those that a float32 of the largest would have, and their sum as a float32.
inline void qc_multiply_bfloats(float* c, const int* a, const int* b) {
  const int mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto number = [](int word, int half) {
    const uint32_t bits = half ? static_cast<uint32_t>(word) & 0xFFFF0000u : static_cast<uint32_t>(word) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return static_cast<double>(value);
  };
  qc_exchange(mine, sizeof mine, [&](int (*shown)[8]) {
    const int row = qc_emulation::lane() / 4, quarter = qc_emulation::lane() % 4;
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 2; ++k) {
        double addends[9] = {c[i]}, sum = 0, plain = 0;
        int largest = -1022;
        for (int j = 0; j < 8; ++j)
          addends[1 + j] = number(shown[4 * row + j / 2][i / 2 + 2 * k], j % 2) * number(shown[4 * (2 * quarter + i % 2) + j / 2][4 + k], j % 2);
        for (double addend : addends) {
          if (addend != 0 && std::isfinite(addend)) largest = max(largest, std::ilogb(addend));
          plain += addend;
        }
        for (double addend : addends) sum += qc_cut(addend, largest - 25);
        c[i] = static_cast<float>(std::isfinite(plain) ? sum == 0 ? 0 : qc_cut(sum, std::ilogb(sum) - 23) : plain);
      }
  });
}

inline int qc_row_max(int value) {
  qc_exchange(&value, sizeof value, [&](int (*shown)[8]) {
    for (unsigned i = 0, first = qc_emulation::lane() / 4 * 4; i < 4; ++i) value = max(value, shown[first + i][0]);
  });
  return value;
}

template <typename T>
inline T qc_other_lane(T value, int distance) {
  T theirs;
  qc_exchange(&value, sizeof value, [&](int (*shown)[8]) { std::memcpy(&theirs, shown[qc_emulation::lane() ^ distance], sizeof theirs); });
  return theirs;
}

template <typename T, typename Join>
inline T qc_fold_warp(T value, Join join) {
  for (unsigned other = 16; other; other /= 2)
    qc_exchange(&value, sizeof value, [&](int (*shown)[8]) {
      T theirs;
      std::memcpy(&theirs, shown[qc_emulation::lane() ^ other], sizeof theirs);
      value = join(value, theirs);
    });
  return value;
}
template <typename T>
inline T qc_warp_sum(T value) {
  return qc_fold_warp(value, [](T a, T b) { return a + b; });
}
template <typename T>
inline T qc_warp_max(T value) {
  return qc_fold_warp(value, [](T a, T b) { return a > b ? a : b; });
}

inline int qc_row_sum(int value) {
  qc_exchange(&value, sizeof value, [&](int (*shown)[8]) {
    value = 0;
    for (unsigned i = 0, first = qc_emulation::lane() / 4 * 4; i < 4; ++i) value += shown[first + i][0];
  });
  return value;
}

// -- what schedules/cuda/wgmma.py has for GPUs ------------------------------------------------------------------------------------------------

inline void qc_show_shared() { qc_emulation::here->wrote = false; }

inline void qc_begin_products() { qc_emulation::here->begun = true; }

// Where the tensor cores look for a byte: 16-byte chunks lie swizzled by bits of their address, as many as rows of 128, 64 or 32 bytes have.
inline const char* qc_swizzled(const char* at, int row) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  return reinterpret_cast<const char*>(address ^ (address >> 7 & (row / 16 - 1)) << 4);
}

// Happens when it is waited for: a stage that was overwritten too early shows, and so do sums that were read too early.
template <int columns, int row>
inline void qc_multiply_group(int* c, const void* a, const void* b) {
  using namespace qc_emulation;
  if (fibers.size() % 128) fail("a warp group's instruction in a block with a partial warp group");
  if (!here->begun) fail("products without qc_begin_products before them");
  for (const auto& fiber : fibers)
    if (fiber.hidden) fail("a product of what was written to shared memory, not shown to the tensor cores, and then a barrier");
  const char *left = static_cast<const char*>(a), *right = static_cast<const char*>(b);
  for (const char* operand : {left, right})
    if (reinterpret_cast<uintptr_t>(operand) % (8 * row) >= row || reinterpret_cast<uintptr_t>(operand) % 32) fail("a product's operand is not aligned to its swizzling");
  const void* mine[] = {left, right};
  qc_exchange(mine, sizeof mine, [&](int (*shown)[8]) {
    for (int l = 0; l < 32; ++l)
      if (std::memcmp(shown[l], mine, sizeof mine)) fail("lanes of a warp name different operands of a product");
  });
  here->started.push_back({c, left, right, columns, row});
}

inline void qc_commit_products() {
  using namespace qc_emulation;
  here->products.push_back(std::move(here->started));
  here->started.clear();
  here->begun = false;
}

template <int pending>
inline void qc_wait_products() {
  using namespace qc_emulation;
  const int pixel = 16 * static_cast<int>(warp() % 4) + static_cast<int>(lane()) / 4, first = 2 * (static_cast<int>(lane()) % 4);
  auto& groups = here->products;
  for (; groups.size() > pending; groups.erase(groups.begin()))
    for (const Product& p : groups.front())
      for (int i = 0; i < p.columns / 2; ++i) {
        const char *left = p.left + (pixel + i / 2 % 2 * 8) * p.row, *right = p.right + (i / 4 * 8 + first + i % 2) * p.row;
        for (int k = 0; k < 32; ++k) p.sums[i] += *qc_swizzled(left + k, p.row) * *qc_swizzled(right + k, p.row);
      }
}

template <int sums>
inline void qc_finish_products(int*) {
  qc_wait_products<0>();
}
