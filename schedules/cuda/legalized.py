"""Operators that stay float, on a GPU: every loop nest of TVM's legalization becomes a kernel, a thread per element of what it computes.

func(x: Buffer, y: Buffer) with allocations, nests  -->  a kernel(*pointers[, scratch]) per nest
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from qcompiler.base.memory import round_up
from qcompiler.schedules.builder import BLOCK
from qcompiler.schedules.table import Kernel, kernel_key, written

SPATIAL, REDUCTION = 0, 2  # TVM's kinds of block iterators


def legalized_kernels(func: Any, constants: list[np.ndarray | None]) -> tuple[list[Kernel], int]:
    """`func`'s parameters are its operands, then its outputs; `constants[i]` is operand i's array, None when it is computed at run time.

    Each kernel takes run-time operands, the constants that it reads, outputs, and scratch when the bytes returned are not 0. They run in order.
    """
    scheduled = _bind_threads(func)
    params, root = list(scheduled.params), scheduled.body.block
    offsets, scratch_bytes = [], 0
    for buffer in root.alloc_buffers:
        offsets.append(scratch_bytes)
        scratch_bytes += round_up(math.prod(int(d) for d in buffer.shape) * np.dtype(str(buffer.dtype)).itemsize)
    stages = list(root.body.seq) if isinstance(root.body, tirx.SeqStmt) else [root.body]
    operands, kernels = len(constants), []
    for stage in stages:
        touched = _buffers(stage)

        def used(buffer: Any, touched: list[Any] = touched) -> bool:
            return any(buffer.same_as(b) for b in touched)

        pointers = [tirx.Var(f"p{i}", "handle") for i in range(len(params))]
        scratch = tirx.Var("scratch", "handle")
        declared = [tirx.DeclBuffer(b, data=p) for b, p in zip(params, pointers, strict=True) if used(b)]
        for buffer, offset in zip(root.alloc_buffers, offsets, strict=True):
            if used(buffer):
                declared.append(tirx.DeclBuffer(buffer, data=tirx.handle_add_byte_offset(scratch, offset)))
        block = SBlock(root.iter_vars, root.reads, root.writes, root.name_hint, stage, root.init, [], root.match_buffers, root.annotations)
        body = tirx.SeqStmt([*declared, SBlockRealize([], tirx.const(True, "bool"), block)])
        packed = [i for i in range(operands) if constants[i] is not None and used(params[i])]
        order = [i for i in range(operands) if constants[i] is None] + packed + list(range(operands, len(params)))
        arguments = [pointers[i] for i in order] + ([scratch] if scratch_bytes else [])
        lowered, launch = _lower(tirx.PrimFunc(arguments, body, attrs=func.attrs))
        key = kernel_key("cuda/legalized", tvm_ffi.structural_hash(lowered), order)
        arrays = [np.ascontiguousarray(constants[i]) for i in packed]
        kernels.append(Kernel(written(lowered), 0, arrays, key, "cuda/legalized", launch=launch))
    return kernels, scratch_bytes


def _bind_threads(func: Any) -> Any:
    """Elementwise nests are inlined where TVM can; the loops over results of what remains are divided among threads."""
    schedule = s_tir.Schedule(tvm.IRModule({"main": func}))
    root = schedule.get_sblock("root")
    for block in schedule.get_child_blocks(root):
        try:
            schedule.compute_inline(block)
        except s_tir.schedule.ScheduleError:
            continue
    for block in schedule.get_child_blocks(root):
        loops, kinds = schedule.get_loops(block), [int(v.iter_type) for v in schedule.get(block).iter_vars]
        whole = len(loops) == len(kinds) and set(kinds) <= {SPATIAL, REDUCTION}
        spatial = [loop for loop, kind in zip(loops, kinds, strict=False) if kind == SPATIAL] if whole else []
        if spatial:
            schedule.reorder(*spatial, *(loop for loop, kind in zip(loops, kinds, strict=True) if kind == REDUCTION))
            fused = schedule.fuse(*spatial)
        else:
            fused = schedule.add_unit_loop(loops[0] if loops else block)
        outer, inner = schedule.split(fused, factors=[None, BLOCK])
        schedule.bind(outer, "blockIdx.x")
        schedule.bind(inner, "threadIdx.x")
    return schedule.mod["main"]


def _buffers(statement: Any) -> list[Any]:
    """The buffers that the blocks of a statement read or write."""
    found: list[Any] = []

    def visit(block: Any) -> None:
        found.extend(region.source for region in [*block.reads, *block.writes])

    tvm_ffi.structural_walk(statement, [(SBlock, visit)], order="post")
    return found


def _lower(func: Any) -> tuple[Any, tuple[int, int]]:
    """The function without blocks, and how many threads it binds."""
    passes = [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.LiftThreadBinding(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.UnifyThreadBinding(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.NarrowDataType(32),
    ]
    lowered = tvm.ir.transform.Sequential(passes)(tvm.IRModule({"main": func}))["main"]
    extents = {"blockIdx.x": 1, "threadIdx.x": 1}

    def visit(node: Any) -> None:
        if str(node.attr_key) == "thread_extent":
            extents[str(node.node.thread_tag)] = int(node.value)

    tvm_ffi.structural_walk(lowered.body, [(tirx.AttrStmt, visit)], order="post")
    return lowered, (extents["blockIdx.x"], extents["threadIdx.x"])
