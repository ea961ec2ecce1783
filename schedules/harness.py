"""Builds kernels into callable code: the one place that wraps kernels for a test, a benchmark or the tuner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target, permit
from qcompiler.schedules.table import KERNELS, Kernel, Layout


def entry_function(kernel: Kernel, callee: Any, arity: int, symbol: str = "run") -> Any:
    """A public PrimFunc `symbol(pointers...)` that runs all tasks of `kernel`, in parallel when there are several."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_attr({"global_symbol": symbol})
            pointers = [T.arg(f"p{i}", T.handle()) for i in range(arity)]
            if kernel.tasks == 1:
                T.evaluate(tvm.ir.Call(callee, [tirx.const(0, "int32"), *pointers]))
            else:
                with T.parallel(0, kernel.tasks) as task:
                    T.evaluate(tvm.ir.Call(callee, [task, *pointers]))
    return builder.get()


def module_of(kernel: Kernel, arity: int) -> tvm.IRModule:
    """The kernel and its entry function `run` as one module. `arity`: pointers in all (inputs, constants, output, scratch)."""
    module = tvm.IRModule({"kernel": kernel.func})
    module["run"] = entry_function(kernel, module.get_global_var("kernel"), arity)
    return module


def compile_kernel(kernel: Kernel, inputs: int, target: Target) -> Any:
    """A callable `f(pointers...)`; pass `numpy_array.ctypes.data_as(ctypes.c_void_p)` for each pointer."""
    permit(target)
    arity = inputs + len(kernel.constants) + 1 + (kernel.scratch > 0)
    return tvm.tirx.build(module_of(kernel, arity), target=tvm.target.Target(target.tvm))["run"]


def aligned(elements: int, dtype: str, alignment: int = 64) -> np.ndarray:
    """An uninitialized flat array whose first byte is a multiple of `alignment`, with 64 spare bytes behind it."""
    size = elements * np.dtype(dtype).itemsize
    raw = np.empty(size + alignment + 64, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(dtype)


def store(array: np.ndarray, layout: Layout, zero_point: int = 0, garbage: int = 77) -> np.ndarray:
    """A canonical array as `layout` stores it (flat). The halo gets `zero_point`; channel padding gets `garbage`."""
    offset = 128 if layout.dtype == "uint8" else 0
    values = (array.astype(np.int32) + offset).astype(layout.dtype) if layout.dtype in ("uint8", "int8") else array.astype(layout.dtype)
    flat = aligned(layout.elements, layout.dtype)
    if layout.dense:
        flat[:] = values.reshape(-1)
        return flat
    n, h, w, c = layout.shape
    top, left, _, _ = layout.halo
    image = flat.reshape(n, *layout.rows, layout.channel_pitch)
    image[...] = garbage
    image[..., :c] = zero_point + offset
    image[:, top : top + h, left : left + w, :c] = values
    return flat


def fetch(flat: np.ndarray, layout: Layout) -> np.ndarray:
    """The canonical array (int8 for 8-bit storage) that `flat` holds in `layout`: the inverse of `store`."""
    if layout.dense:
        values = flat[: layout.elements].reshape(layout.shape)
    else:
        n, h, w, c = layout.shape
        top, left, _, _ = layout.halo
        values = flat[: layout.elements].reshape(n, *layout.rows, layout.channel_pitch)[:, top : top + h, left : left + w, :c]
    return (values ^ 128).view(np.int8) if layout.dtype == "uint8" else values.copy()


def run_kernel(kernel: Kernel, inputs: Sequence[np.ndarray], output: Layout, target: Target, canary: int = 0xA5) -> np.ndarray:
    """Run a kernel on stored inputs (see `store`) and return the flat stored output.

    Raises AssertionError when the kernel writes outside its output: around it, or into the channels behind a pixel's own where its row says that it
    doesn't.
    """
    import ctypes

    function = compile_kernel(kernel, len(inputs), target)
    guard = 4096
    raw = aligned(output.bytes + 2 * guard, "uint8")
    raw[:] = canary
    flat = raw[guard : guard + output.bytes].view(output.dtype)
    scratch = aligned(max(kernel.scratch, 1), "uint8")
    arrays = [*inputs, *[_aligned_copy(c) for c in kernel.constants], flat, *([scratch] if kernel.scratch else [])]
    function(*[ctypes.c_void_p(a.ctypes.data) for a in arrays])
    assert (raw[:guard] == canary).all() and (raw[guard + output.bytes :] == canary).all(), "kernel wrote outside its output"
    check_padding(flat, output, kernel, canary)
    return flat.copy()


def check_padding(flat: np.ndarray, output: Layout, kernel: Kernel, canary: int) -> None:
    """Raises AssertionError when a kernel whose row has `own_channels` has written into the channels behind a pixel's own, which held bytes `canary`."""
    if output.dense or not any(row.own_channels for rows in KERNELS.values() for row in rows if row.name == kernel.row):
        return
    top, left, _, _ = output.halo
    n, height, width, channels = output.shape
    image = flat.view("uint8").reshape(n, *output.rows, -1)[:, top : top + height, left : left + width]
    assert (image[..., channels * flat.itemsize :] == canary).all(), f"{kernel.row} wrote into the channels behind its own"


def _aligned_copy(array: np.ndarray) -> np.ndarray:
    flat = aligned(array.size, str(array.dtype))
    flat[:] = array.reshape(-1)
    return flat
