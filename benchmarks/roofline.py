"""What this machine can do at most: int8 and float multiply-accumulates, and bytes read and written, per second.

    python benchmarks/roofline.py [--isa x86-avx512vnni] [--threads 1 2]

The int8 peak is that of the dot instructions that the ISA's kernels use, in a loop over registers: VPDPBUSD, or VPMADDUBSW, VPMADDWD and VPADDD where
there is none (steps whose weights could saturate that form take a slower one). Bandwidths are those of plain vector loops over buffers of several sizes,
which live in different caches.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import tvm
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from qcompiler import schedules
from qcompiler.base.targets import Target, find_target
from qcompiler.schedules.conv import ConvRow
from qcompiler.schedules.harness import aligned
from qcompiler.schedules.isa import Isa, load, save
from qcompiler.schedules.table import KERNELS

Call = Callable[[], object]
os.environ.setdefault("TVM_NUM_THREADS", str(len(os.sched_getaffinity(0))))  # else TVM's pool has half as many threads
STEPS = 100_000  # of the peak loop: a few tenths of a millisecond, so that starting threads does not count


def unit_of(target: Target, operator: str = "qc.conv2d") -> Isa:
    """The dot unit of the best convolution row of a target, in its fastest form."""
    schedules.load(target)
    unit = next(r.unit for isa in target.rows for r in KERNELS[operator] if r.isa == isa and isinstance(r, ConvRow))
    return unit.forms[0]


def seconds_of(call: Call, rounds: int = 20) -> float:
    """Least seconds of a call."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def bound(module: tvm.IRModule, target: Target, arrays: list[np.ndarray]) -> Call:
    """`run` of a module, built, on fixed arrays (which live as long as the call does)."""
    function = tvm.tirx.build(module, target=tvm.target.Target(target.tvm))["run"]
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in arrays]
    return lambda held=arrays: function(*pointers)  # type: ignore[misc]


def peak_call(isa: Isa, target: Target, threads: int = 1) -> tuple[Call, int]:
    """A loop of dot steps on each of `threads` threads, 2 activations that stay by up to 6 weights, and its multiply-accumulates in all.

    Every product is of other operands and weights change from step to step, lest LLVM compute one product for all.
    """
    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    pixels, vectors = 2, 32
    blocks = next(b for b in (6, 5, 4, 3, 2) if isa.fits(pixels, b))
    size, chains = isa.lanes * isa.group, pixels * blocks
    lengths = [(pixels * isa.group, isa.input_dtype), ((vectors + blocks) * size, isa.weight_dtype), (threads * chains * isa.lanes, isa.accumulator)]
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"global_symbol": "run", "tirx.noalias": True})
        pointers = [T.arg(n, T.handle()) for n in ("x", "w", "out")]
        x, w, out = (T.decl_buffer((n,), dtype, data=p) for (n, dtype), p in zip(lengths, pointers, strict=True))
        with (T.parallel if threads > 1 else T.serial)(0, threads) as task:
            accs = [T.alloc_buffer((isa.lanes,), isa.accumulator) for _ in range(chains)]
            for i, acc in enumerate(accs):
                save(acc, 0, load(out, (task * chains + i) * isa.lanes, isa.lanes), isa.lanes)
            activations = [isa.activation(x, p * isa.group, isa.group) for p in range(pixels)]
            with T.serial(0, STEPS) as i:
                for block in range(blocks):
                    b = isa.weights(w, (i % vectors + block) * size)
                    for a, acc in zip(activations, accs[block * pixels :], strict=False):
                        save(acc, 0, isa.dot(load(acc, 0, isa.lanes), a, b), isa.lanes)
            for i, acc in enumerate(accs):
                save(out, (task * chains + i) * isa.lanes, load(acc, 0, isa.lanes), isa.lanes)
    arrays = [aligned(n, dtype) for n, dtype in lengths]
    for array in arrays:
        array[:] = 0
    return bound(tvm.IRModule({"run": builder.get()}), target, arrays), threads * STEPS * chains * size


@cache
def _stream(target_name: str, size: int, write: bool, threads: int) -> tuple[Call, int]:
    """A call that passes several times over a buffer of `size` bytes, each thread over its share, and the bytes it moves."""
    target = find_target(target_name)
    lanes, unroll = unit_of(target).lanes, 8
    steps, repeats = size // (4 * lanes * unroll * threads), max(1, (1 << 22) // size)
    tvm.get_global_func("runtime.config_threadpool")(1, threads)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_attr({"global_symbol": "run", "tirx.noalias": True})
        pointers = [T.arg(n, T.handle()) for n in ("data", "out")]
        data, out = T.decl_buffer((size // 4,), "int32", data=pointers[0]), T.decl_buffer((threads * lanes * unroll,), "int32", data=pointers[1])
        with (T.parallel if threads > 1 else T.serial)(0, threads) as task:
            accs = [T.alloc_buffer((lanes,), "int32") for _ in range(unroll)]
            for k, acc in enumerate(accs):
                save(acc, 0, load(out, (task * unroll + k) * lanes, lanes), lanes)
            with T.serial(0, repeats), T.serial(0, steps) as i:
                for k, acc in enumerate(accs):
                    at = ((task * steps + i) * unroll + k) * lanes
                    if write:
                        save(data, at, load(acc, 0, lanes), lanes)
                    else:
                        save(acc, 0, load(acc, 0, lanes) + load(data, at, lanes), lanes)
            for k, acc in enumerate(accs):
                save(out, (task * unroll + k) * lanes, load(acc, 0, lanes), lanes)
    arrays = [aligned(size // 4, "int32"), aligned(threads * lanes * unroll, "int32")]
    for array in arrays:
        array[:] = 1
    return bound(tvm.IRModule({"run": builder.get()}), target, arrays), size * repeats


@cache
def bandwidth(target_name: str, size: int, write: bool = False, threads: int = 1) -> float:
    """Bytes per second of reading (or writing) a buffer of about `size` bytes, again and again: as fast as the cache that holds it."""
    call, moved = _stream(target_name, max(1 << 14, 1 << (size - 1).bit_length()), write, threads)
    return moved / seconds_of(call)


def describe(target: Target, threads: list[int]) -> str:
    """The table that this script prints."""
    from qcompiler.base.text import size, table

    rows: list[list[str]] = []
    for count in threads:
        for name, operator in (("int8", "qc.conv2d"), ("float32", "qc.f32.conv2d")):
            call, macs = peak_call(unit_of(target, operator), target, count)
            rows.append([f"{name} multiply-accumulates", str(count), f"{macs / seconds_of(call, 50) / 1e9:.1f} G/s"])
        for bytes_ in (1 << 14, 1 << 18, 1 << 22, 1 << 26):
            for write in (False, True):
                speed = bandwidth(target.name, bytes_, write, count)
                rows.append([f"{'write' if write else 'read'} {size(bytes_)}", str(count), f"{speed / 1e9:.1f} GB/s"])
    return table(f"At most, {target.name}", ("what", "threads|", "rate|"), rows)


def add_isa(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--isa", default=find_target("native").rows[0], help="kernel row; default: the best of this machine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_isa(parser)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, len(os.sched_getaffinity(0))}))
    options: Any = parser.parse_args()
    print(describe(find_target(options.isa), options.threads))


if __name__ == "__main__":
    main()
