"""Operators that stay float: the PrimFunc that TVM's legalization makes, turned into a kernel of our calling convention.

func(x: Buffer, y: Buffer) with allocations  -->  kernel(task, *pointers[, scratch]) without any
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tvm_ffi
from tvm import tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize

from qcompiler.base.memory import round_up
from qcompiler.schedules.table import Kernel, Layout, kernel_key, written


def legalized_kernel(func: Any, constants: list[np.ndarray | None], outputs: list[Layout]) -> Kernel:
    """`func`'s parameters are its operands, then its outputs; `constants[i]` is operand i's array, None when it is computed at run time.

    The kernel takes run-time operands, constants, outputs, scratch: one task. Its temporaries lie in scratch.
    """
    params = list(func.params)
    pointers = [tirx.Var(f"p{i}", "handle") for i in range(len(params))]
    scratch, used = tirx.Var("scratch", "handle"), 0
    root = func.body.block
    declared = [tirx.DeclBuffer(buffer, data=pointer) for buffer, pointer in zip(params, pointers, strict=True)]
    for buffer in root.alloc_buffers:
        declared.append(tirx.DeclBuffer(buffer, data=tirx.handle_add_byte_offset(scratch, used)))
        used += round_up(math.prod(int(d) for d in buffer.shape) * np.dtype(str(buffer.dtype)).itemsize)
    block = SBlock(root.iter_vars, root.reads, root.writes, root.name_hint, root.body, root.init, [], root.match_buffers, root.annotations)
    body = tirx.SeqStmt([*declared, SBlockRealize([], tirx.const(True, "bool"), block)])
    operands = len(constants)
    order = [i for i in range(operands) if constants[i] is None] + [i for i in range(operands) if constants[i] is not None]
    order += list(range(operands, operands + len(outputs)))
    task = tirx.Var("task", "int32")
    kernel = tirx.PrimFunc([task, *[pointers[i] for i in order], *([scratch] if used else [])], body, attrs=func.attrs)
    key = kernel_key("legalized", tvm_ffi.structural_hash(kernel), order)
    packed = [np.ascontiguousarray(c) for c in constants if c is not None]
    return Kernel(written(kernel), 1, packed, key, "any/legalized", scratch=used)
