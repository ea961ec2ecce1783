"""Candidates for a device that can't be reached: a library with one step per candidate of a task, the recipe of its inputs, and the sums of its output.

`qcompiler/runtime/cpp/qc_measure.c` is the other half: it makes the same inputs from the recipe, and compares the same sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler.backend.lowering import Place, Program, Step, Value
from qcompiler.base.memory import round_up
from qcompiler.base.targets import Target
from qcompiler.runtime.selftest import splitmix, sums_of
from qcompiler.schedules.table import Layout, OpCall, Row

GUARD, MAX_INPUTS = 4096, 8  # bytes around the output, and streams per case, as in qc_measure.c
CASES = 2  # random, extremes
KINDS = {"int8": "i", "uint8": "u", "float32": "f"}


def measurable(op: OpCall) -> bool:
    """Whether a device can check the operator: exact results (float kernels may sum in any order), of types the recipe has."""
    return not op.name.startswith("qc.f32.") and all(layout.dtype in KINDS for layout in [*op.tensors, op.output]) and len(op.tensors) <= MAX_INPUTS


# -- the library ----------------------------------------------------------------------------------------------------------------------------


def _places(op: OpCall, scratch: int) -> tuple[list[int], int, int, int]:
    """Offsets in the workspace: of the inputs, the output (with guards), the scratch memory, and the end."""
    offsets, at = [], 0
    for layout in op.tensors:
        offsets.append(at)
        at += round_up(layout.bytes + 64)
    output = at + GUARD
    scratch_at = output + round_up(op.output.bytes) + GUARD
    return offsets, output, scratch_at, scratch_at + round_up(scratch)


def candidate_program(row: Row, op: OpCall, target: Target, points: Sequence[Mapping[str, Any]]) -> Program:
    """Step i runs the kernel of points[i]. All read the same inputs and write the same output; equal packed constants are held once."""
    kernels = [row.build(op, point, target) for point in points]
    inputs, output, scratch, size = _places(op, max(k.scratch for k in kernels))
    values = {f"x{i}": Value(f"x{i}", layout, f"x{i}", Place("workspace", at)) for i, (layout, at) in enumerate(zip(op.tensors, inputs, strict=True))}
    reads, held, offsets, steps = list(values), bytearray(), {}, []
    for i, (kernel, point) in enumerate(zip(kernels, points, strict=True)):
        values[f"y{i}"] = Value(f"y{i}", op.output, f"y{i}", Place("workspace", output))
        step = Step(f"y{i}", op, op.name, kernel, reads, row, dict(point), scratch=scratch)
        for array in kernel.constants:
            raw = np.ascontiguousarray(array).tobytes()
            if raw not in offsets:
                offsets[raw] = len(held)
                held += raw + bytes(round_up(len(raw)) - len(raw))
            step.constants.append(offsets[raw])
        steps.append(step)
    return Program(target, steps, values, [], [], size, np.frombuffer(bytes(held) + bytes(64), np.uint8))


def candidate_library(row: Row, op: OpCall, target: Target, points: Sequence[Mapping[str, Any]]) -> bytes:
    """The shared library of `candidate_program`."""
    from qcompiler.backend.build import Built
    from qcompiler.backend.codegen import object_code

    program = candidate_program(row, op, target, points)
    return Built(program, object_code(program)).link().library


# -- inputs and sums ------------------------------------------------------------------------------------------------------------------------


def recipe_input(layout: Layout, case: int, number: int) -> np.ndarray:
    """Input `number` of case 0 (random) or 1 (extremes only), canonical: int8 or float32 of `layout.shape`."""
    count = int(np.prod(layout.shape, dtype=np.int64))
    random = splitmix(case * MAX_INPUTS + number, count)
    if layout.dtype == "float32":
        short = (random >> np.uint64(48)).astype(np.uint16).view(np.int16)
        values = np.where(short < 0, np.float32(-8), np.float32(8)) if case else short.astype(np.float32) / np.float32(4096)
    elif case:
        values = np.where(random >> np.uint64(63), np.int8(127), np.int8(-128))
    else:
        values = (random >> np.uint64(56)).astype(np.uint8).view(np.int8)
    return np.asarray(values).reshape(layout.shape)


def output_sums(op: OpCall, case: int) -> tuple[int, int]:
    """What the valid elements of the right output sum up to, as stored, in the order of their indices: see `artifact.checksum`."""
    from qcompiler.numerics.operators import OPERATORS

    numbers = iter(range(MAX_INPUTS))
    arrays = [recipe_input(o, case, next(numbers)) if isinstance(o, Layout) else o for o in op.operands]
    result = np.ascontiguousarray(OPERATORS[op.name](*arrays, **op.attrs))
    stored = result.view(np.uint8) ^ np.uint8(128) if op.output.dtype == "uint8" else result
    return sums_of(stored)


# -- the plan that qc_measure reads ---------------------------------------------------------------------------------------------------------


def _tensor_line(layout: Layout, offset: int, zero: int) -> str:
    numbers = [1, 1, 1, layout.elements, 0, 0, 1, 1, layout.elements]
    if len(layout.shape) == 4:
        n, height, width, channels = layout.shape
        numbers = [n, *layout.rows, layout.channel_pitch, *layout.halo[:2], height, width, channels]
    return " ".join(map(str, [KINDS[layout.dtype], offset, layout.bytes, *numbers, zero]))


def plan_lines(library: str, op: OpCall, steps: int, sums: Sequence[tuple[int, int]]) -> list[str]:
    """A task's part of candidates.txt: name, counts, inputs, output, and the `output_sums` of every case."""
    offsets, output, _, _ = _places(op, 0)
    lines = [f"{library} {steps} {len(op.tensors)} {len(sums)}"]
    for i, (layout, at) in enumerate(zip(op.tensors, offsets, strict=True)):
        zero = int(op.attrs.get("x_zero_point", 0)) if i == 0 and layout.dtype != "float32" else 0
        lines.append(_tensor_line(layout, at, (zero + 128 * (layout.dtype == "uint8")) & 255))
    lines.append(_tensor_line(op.output, output, 0))
    return lines + ["{:x} {:x}".format(*pair) for pair in sums]
