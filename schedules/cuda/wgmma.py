"""Convolution and dense layers on the asynchronous tensor cores of compute capability 9.0 (`wgmma`): what differs from `gemm.Gemm`.

4 warps multiply 64 pixels by all channels of a block in one instruction, which reads both operands from shared memory by itself. Where a chunk of 16 bytes
lies there, `gemm_plan.swizzle` says as the instruction's descriptors do: with rows of 128, 64 and 32 bytes it is NVIDIA's swizzling of as many bytes.

    each step  wait for its operands, show them to the tensor cores; start its products; start copies into the stage that the last but one step has left
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.cuda.gemm import Gemm, barrier, call, div, mod
from qcompiler.schedules.cuda.gemm_plan import WGMMA, design_space


class AsynchronousGemm(Gemm):
    """One kernel while it is written."""

    alignment = 1024  # the swizzling of 128 bytes is one of addresses: its pattern repeats every 1024 bytes

    def work(self, step: Any, newest: Any) -> None:
        t = self.tile
        self.prepare(mod(step, t.stages))
        call("qc_show_shared")
        barrier()  # the copies of all threads are there, and no product reads the stage that is overwritten next
        self.multiply(mod(step, t.stages))
        self.copy_newest(newest)
        call(f"qc_wait_products<{t.stages - 1 - t.ahead(self.unit)}>")

    def prepare(self, stage: Any) -> None:
        """What a thread does with what it has copied."""

    def multiply(self, stage: Any) -> None:
        """Start this warp group's products of a step."""
        t = self.tile
        base = T.bind(stage * self.stage_bytes)
        a = T.bind(base + div(self.warp_m, WGMMA.warps) * (WGMMA.warps * t.wm * t.bk))
        b = T.bind(base + t.bm * t.bk)
        call("qc_begin_products")
        for at in range(0, t.bk, WGMMA.depth):
            call(f"qc_multiply_group<{t.bn}, {t.bk}>", T.address_of(self.sums[0]), T.address_of(self.shared[a + at]), T.address_of(self.shared[b + at]))
        call("qc_commit_products")

    def add_up(self) -> None:
        call(f"qc_finish_products<{int(self.sums.shape[0])}>", T.address_of(self.sums[0]))


def device_functions() -> str:
    """CUDA C of the device functions that these kernels call, for an architecture with `wgmma`; nothing for others. (On a CPU, somebody else defines them.)"""
    numbers = design_space(WGMMA)["bn"]
    choice = "\n".join(f"  if constexpr (columns == {n}) qc_multiply_{n}(c, qc_describe<row>(a), qc_describe<row>(b));" for n in numbers)
    return _DEVICE.replace("MULTIPLY", "\n".join(map(_multiply, numbers))).replace("CHOICE", choice)


def _multiply(columns: int) -> str:
    """The instruction names every sum of a lane."""
    sums = columns // 2
    names, operands = (", ".join(form.format(i) for i in range(sums)) for form in ("%{}", '"+r"(c[{}])'))
    return f"""static __device__ __forceinline__ void qc_multiply_{columns}(int* c, unsigned long long a, unsigned long long b) {{
  asm volatile("{{\\n.reg .pred add;\\nsetp.eq.u32 add, 0, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n{columns}k32.s32.s8.s8 {{{names}}}, %{sums}, %{sums + 1}, add;\\n}}"
               : {operands} : "l"(a), "l"(b));
}}"""


_DEVICE = """
#if defined(__CUDACC__) && defined(__CUDA_ARCH_FEAT_SM90_ALL)

// What this thread wrote to shared memory, the tensor cores see after the next barrier.
static __device__ __forceinline__ void qc_show_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Sums in registers are the tensor cores' from here on.
static __device__ __forceinline__ void qc_begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

static __device__ __forceinline__ void qc_commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all groups of this warp group's products but the last n.
template <int pending>
static __device__ __forceinline__ void qc_wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// Waits for all, and gives the sums back to the thread.
template <int sums>
static __device__ __forceinline__ void qc_finish_products(int* c) {
  qc_wait_products<0>();
#pragma unroll
  for (int i = 0; i < sums; ++i) asm volatile("" : "+r"(c[i])::"memory");
}

// Where an operand lies, as "Matrix Descriptor Format" of the PTX manual has it: address, distance of 8 rows (both / 16), and how chunks are swizzled
// (1, 2, 3: of 128, 64, 32 bytes). The distance along the reduction is of no account, because a row is one swizzled unit.
template <int row>
static __device__ __forceinline__ unsigned long long qc_describe(const void* operand) {
  const unsigned long long address = static_cast<unsigned>(__cvta_generic_to_shared(operand)), swizzling = row == 128 ? 1 : row == 64 ? 2 : 3;
  return (address & 0x3FFFF) >> 4 | 1ull << 16 | static_cast<unsigned long long>(8 * row >> 4) << 32 | swizzling << 62;
}

MULTIPLY

// c += a * b: int8 [64, 32] times [32, columns], both in shared memory with rows of `row` bytes, by 4 warps. Lane l of warp w holds rows 16 * w + l / 4 and
// 8 further on, of columns 2 * (l % 4) and 1 further on of every 8 ("register fragments for wgmma.mma_async.m64nNk32").
template <int columns, int row>
static __device__ __forceinline__ void qc_multiply_group(int* c, const void* a, const void* b) {
CHOICE
}

#endif
"""
