// Device functions that kernels call by name; QC_CAPABILITY is the target's (80: 8.0). For an emulation on a CPU, somebody else defines those of __CUDACC__.
#ifdef __CUDACC__

// Copies 4, 8 or 16 bytes from global to shared memory, both aligned so; asynchronously from sm_80 on. qc_wait_copies<n> waits for all groups
// of this thread's copies but the last n that qc_commit_copies closed; other threads see them after a barrier.
template <int bytes>
static __device__ __forceinline__ void qc_copy(void* to, const void* from) {
#if __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if (bytes == 16) {  // past the level 1 cache: shared memory is the cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(bytes) : "memory");
  }
#else
  if (bytes == 16) *static_cast<int4*>(to) = *static_cast<const int4*>(from);
  if (bytes == 8) *static_cast<int2*>(to) = *static_cast<const int2*>(from);
  if (bytes == 4) *static_cast<int*>(to) = *static_cast<const int*>(from);
#endif
}

static __device__ __forceinline__ void qc_commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int pending>
static __device__ __forceinline__ void qc_wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements, here 8 rows of 16 bytes: lane 8 * i + r names row r of matrix i in shared memory; lane l receives bytes
// 4 * (l % 4) .. of row l / 4 of each.
static __device__ __forceinline__ void qc_load_matrices(int* to, const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

#if QC_CAPABILITY >= 80
// c += a * b: int8 [16, 32] times [32, 8], int32 sums. PTX names the lane that holds each element ("matrix fragments for mma.m16n8k32").
static __device__ __forceinline__ void qc_multiply_16(int* c, const int* a, const int* b) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same with unsigned bytes in a.
static __device__ __forceinline__ void qc_multiply_16_unsigned(int* c, const int* a, const int* b) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += a * b: bfloat16 [16, 16] times [16, 8], float32 sums ("matrix fragments for mma.m16n8k16").
static __device__ __forceinline__ void qc_multiply_bfloats(float* c, const int* a, const int* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
// c += a * b: int8 [8, 16] times [16, 8] ("matrix fragments for mma.m8n8k16").
static __device__ __forceinline__ void qc_multiply_8(int* c, int a, int b) {
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};" : "+r"(c[0]), "+r"(c[1]) : "r"(a), "r"(b));
}

static __device__ __forceinline__ void qc_multiply_8_unsigned(int* c, int a, int b) {
  asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};" : "+r"(c[0]), "+r"(c[1]) : "r"(a), "r"(b));
}
#endif

// Of the 4 lanes 4 * i .. 4 * i + 3, which hold sums of the same rows: all of a warp's lanes must come here.
static __device__ __forceinline__ int qc_row_max(int value) {
  value = max(value, __shfl_xor_sync(0xFFFFFFFFu, value, 1));
  return max(value, __shfl_xor_sync(0xFFFFFFFFu, value, 2));
}

// Of all lanes of a warp, which must all come here.
template <typename T>
static __device__ __forceinline__ T qc_warp_sum(T value) {
  for (int other = 16; other; other /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, other);
  return value;
}

template <typename T>
static __device__ __forceinline__ T qc_warp_max(T value) {
  for (int other = 16; other; other /= 2) value = max(value, __shfl_xor_sync(0xFFFFFFFFu, value, other));
  return value;
}

// What the lane holds whose number differs in the bits of `distance`; all lanes of a warp must come here.
template <typename T>
static __device__ __forceinline__ T qc_other_lane(T value, int distance) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, distance);
}

static __device__ __forceinline__ int qc_row_sum(int value) {
  value += __shfl_xor_sync(0xFFFFFFFFu, value, 1);
  return value + __shfl_xor_sync(0xFFFFFFFFu, value, 2);
}

#endif  // __CUDACC__

// c += a * b: int8 [16, 32] times [32, 8], int32 sums, by the largest products that all GPUs of the target have. What a lane holds of two halves of the rows and of
// the reduction, by m8n8k16, is what it holds of the whole, by m16n8k32.
#if QC_CAPABILITY >= 80
static __device__ __forceinline__ void qc_multiply_matrices(int* c, const int* a, const int* b) { qc_multiply_16(c, a, b); }
static __device__ __forceinline__ void qc_multiply_unsigned(int* c, const int* a, const int* b) { qc_multiply_16_unsigned(c, a, b); }
#else
static __device__ __forceinline__ void qc_multiply_matrices(int* c, const int* a, const int* b) {
  for (int i = 0; i < 4; ++i) qc_multiply_8(c + 2 * (i % 2), a[i], b[i / 2]);
}
static __device__ __forceinline__ void qc_multiply_unsigned(int* c, const int* a, const int* b) {
  for (int i = 0; i < 4; ++i) qc_multiply_8_unsigned(c + 2 * (i % 2), a[i], b[i / 2]);
}
#endif

// Partial sums of a thread, n of them, to and from other blocks: words of 16 bytes, `stride` ints apart, so that neighbouring threads' words adjoin.
template <int n, int stride>
static __device__ __forceinline__ void qc_store_sums(int* to, const int* sums) {
  for (int i = 0; i < n / 4; ++i) *reinterpret_cast<int4*>(to + i * stride) = make_int4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
}

// Past the level 1 cache, which doesn't see what other multiprocessors write.
template <int n, int stride>
static __device__ __forceinline__ void qc_add_sums(int* sums, const int* from) {
  for (int i = 0; i < n / 4; ++i) {
    const int4 word = __ldcg(reinterpret_cast<const int4*>(from + i * stride));
    sums[4 * i] += word.x;
    sums[4 * i + 1] += word.y;
    sums[4 * i + 2] += word.z;
    sums[4 * i + 3] += word.w;
  }
}

// Whether this block is the last of `blocks` to come here; it then sees all that the others wrote before. The counter is 0 again afterwards.
// The thread that counts speaks for its block, because a fence orders only its own thread's atomic (PTX manual, "release and acquire patterns"): barrier,
// fence, counter show other blocks what any thread wrote; counter, fence, barrier show every thread what they wrote.
static __device__ __forceinline__ int qc_last_of(int* counter, int blocks) {
  const unsigned last = static_cast<unsigned>(blocks - 1);  // atomicInc: 0, 1, ..., last, 0
  int is_last = 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicInc(reinterpret_cast<unsigned*>(counter), last) == last;
    __threadfence();
  }
  return __syncthreads_or(is_last);
}

// As qc_copy, or `fill` in every word where there is nothing to copy.
template <int bytes>
static __device__ __forceinline__ void qc_copy_or_fill(void* to, const void* from, bool copy, int fill) {
  if (copy) {
    qc_copy<bytes>(to, from);
  } else {
    for (int i = 0; i < bytes / 4; ++i) static_cast<int*>(to)[i] = fill;
  }
}
