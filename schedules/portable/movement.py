"""Data movement: copy, halo fill, reshape, transpose, slice, pad, select, concat. Values are never changed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from tvm.script.ir_builder import tirx as T

from qcompiler.base.selection import boxes
from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, View, dense_strides, loops, make_kernel, offset_of, recode, splat, store, task_count, vector, view
from qcompiler.schedules.portable.base import portable
from qcompiler.schedules.portable.elementwise import constants_of, tasks_of
from qcompiler.schedules.portable.nest import elementwise, merged, shared
from qcompiler.schedules.table import Kernel, Layout, OpCall

GRAIN = 100_000


def move(k: Emitter, source: View, target: View) -> None:
    """target = source, of equal shape."""
    elementwise(k, [source], target, lambda x, n: recode(x[0], source.dtype, target.dtype, n))


def fill(k: Emitter, target: View, value: int) -> None:
    """Every element of an 8-bit or float view becomes the canonical `value` (storage offset added here)."""
    scalar = k.f32(value) if target.dtype == "float32" else T.bind(T.Cast(target.dtype, k.i32(value + offset_of(target.dtype))))
    (target,) = merged([target])
    *outer, length = target.shape
    if k.gpu or target.strides[-1] != 1:
        elementwise(k, [], target, lambda x, n: splat(scalar, n))
        return
    # Whole vectors, the last of which overlaps the one before. LLVM does not see how many: unrolled, borders would be most of a network's code.
    lanes = 1 << min(length, k.width // np.dtype(target.dtype).itemsize).bit_length() - 1
    extents = [k.i32(e) if isinstance(e, int) and e > 1 else e for e in shared(k, [*outer, -(-length // lanes)])]
    with loops(*extents) as (*index, i):
        store(target.buffer, target.at([*index, T.min(i * lanes, length - lanes)]), splat(scalar, lanes), lanes)


def around(shape: Sequence[int], begin: Sequence[int], inner: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """(begin, shape) of disjoint boxes that cover `shape` without the box `inner` at `begin`."""
    for axis in range(len(shape)):
        after = begin[axis] + inner[axis]
        for start, extent in ((0, begin[axis]), (after, shape[axis] - after)):
            if extent:
                yield (
                    [*begin[:axis], start, *[0] * (len(shape) - axis - 1)],
                    [*inner[:axis], extent, *shape[axis + 1 :]],
                )


def copy(op: OpCall, target: Target, row: str) -> Kernel:
    """From one layout to another of equal shape; any element type. Booleans are moved as bytes."""
    if op.output.dtype == "bool":
        op = replace(
            op,
            operands=[replace(o, dtype="int8") if isinstance(o, Layout) else o.astype("int8") for o in op.operands],
            output=replace(op.output, dtype="int8"),
        )

    def emit(k: Emitter) -> None:
        move(k, k.operands()[0], view(k.output, op.output))

    return make_kernel(row, op, target, emit, tasks=tasks_of(op, GRAIN), arrays=constants_of(op))


def fill_halo(op: OpCall, target: Target, row: str) -> Kernel:
    """Writes `value` (canonical) around the image, channel padding included; the image itself is not touched."""
    layout = op.output
    images, height, width, _ = layout.shape
    (top, left, bottom, right), pitch = layout.halo, layout.channel_pitch
    line = layout.rows[1] * pitch
    # what lies outside is contiguous from the end of a line of the image to the beginning of the next: (first element, how often, length)
    before = (0, 1, top * line + left * pitch)
    between = (before[2] + width * pitch, height - 1, (left + right) * pitch)
    behind = (before[2] + (height - 1) * line + width * pitch, 1, right * pitch + bottom * line)

    def emit(k: Emitter) -> None:
        for first, count, length in (before, between, behind):
            if count and length:
                fill(k, View(k.output, layout.dtype, (images, count, length), (layout.rows[0] * line, line, 1), first), op.attrs["value"])

    return make_kernel(row, op, target, emit)


def reshape(op: OpCall, target: Target, row: str) -> Kernel:
    """A dense input read in the output's shape."""

    def emit(k: Emitter) -> None:
        source = replace(k.operands()[0], shape=op.output.shape, strides=dense_strides(op.output.shape))
        move(k, source, view(k.output, op.output))

    return make_kernel(row, op, target, emit, tasks=tasks_of(op, GRAIN), arrays=constants_of(op))


def transpose(op: OpCall, target: Target, row: str) -> Kernel:
    def emit(k: Emitter) -> None:
        move(k, k.operands()[0].permuted(op.attrs["axes"]), view(k.output, op.output))

    return make_kernel(row, op, target, emit, tasks=tasks_of(op), arrays=constants_of(op))


def border(op: OpCall, target: Target, row: str) -> Kernel:
    """Integers of the user's: 8-bit numbers from one storage into another, transposed by `axes` when given."""

    def emit(k: Emitter) -> None:
        source = k.operands()[0]
        move(k, source.permuted(op.attrs["axes"]) if op.attrs.get("axes") else source, view(k.output, op.output))

    return make_kernel(row, op, target, emit, tasks=tasks_of(op), arrays=constants_of(op))


def slice_(op: OpCall, target: Target, row: str) -> Kernel:
    """begin, end and strides of full rank, positive strides."""

    def emit(k: Emitter) -> None:
        source = k.operands()[0].window(op.attrs["begin"], op.output.shape)
        steps = tuple(s * t for s, t in zip(source.strides, op.attrs["strides"], strict=True))
        move(k, replace(source, strides=steps), view(k.output, op.output))

    return make_kernel(row, op, target, emit, tasks=tasks_of(op, GRAIN), arrays=constants_of(op))


def pad(op: OpCall, target: Target, row: str) -> Kernel:
    """pads [[before, after]...] per dimension; the border holds the canonical `value`."""
    before = [p[0] for p in op.attrs["pads"]]

    def emit(k: Emitter) -> None:
        source, whole = k.operands()[0], view(k.output, op.output)
        for begin, shape in around(op.output.shape, before, source.shape):
            fill(k, whole.window(begin, shape), op.attrs["value"])
        move(k, source, whole.window(before, source.shape))

    return make_kernel(row, op, target, emit, tasks=tasks_of(op, GRAIN), arrays=constants_of(op))


def select(op: OpCall, target: Target, row: str) -> Kernel:
    """Box by box, each in steps of its own through the operand."""

    def emit(k: Emitter) -> None:
        source, whole = k.operands()[0], view(k.output, op.output)
        for box in boxes(op.attrs["indices"], source.shape):
            part = source.window(box.start, box.shape)
            move(k, replace(part, strides=tuple(s * t for s, t in zip(part.strides, box.step, strict=True))), whole.window(box.begin, box.shape))

    return make_kernel(row, op, target, emit, tasks=tasks_of(op, GRAIN), arrays=constants_of(op))


def concat(op: OpCall, target: Target, row: str) -> Kernel:
    """Each operand is copied to its part of the output, but for those that attribute `in_place` lists, which lie there; tasks divide every operand."""
    axis = op.attrs["axis"] % len(op.output.shape)
    extents = [o.shape[axis] for o in op.operands]
    begins = [0, *itertools.accumulate(extents)]
    copied = [i for i in range(len(extents)) if i not in op.attrs.get("in_place", ())]

    def emit(k: Emitter) -> None:
        whole = view(k.output, op.output)
        for index in copied:
            source, window = k.operands()[index], [0] * len(op.output.shape)
            window[axis] = begins[index]
            move(k, source, whole.window(window, source.shape))

    smallest = min((math.prod(op.operands[i].shape) for i in copied), default=0)
    tasks = min(tasks_of(op, GRAIN), task_count(smallest, 64, 64))
    return make_kernel(row, op, target, emit, tasks=tasks, arrays=constants_of(op))


def bitcast(op: OpCall, target: Target, row: str) -> Kernel:
    """The bits of each element, as the output's type."""

    def emit(k: Emitter) -> None:
        elementwise(k, k.operands(), view(k.output, op.output), lambda x, n: T.reinterpret(vector(op.output.dtype, n), x[0]))

    return make_kernel(row, op, target, emit, tasks=tasks_of(op, GRAIN), arrays=constants_of(op))


portable("qc.bitcast", bitcast)
portable("qc.copy", copy, own_channels=True)
portable("qc.enter", border, own_channels=True)
portable("qc.leave", border, own_channels=True)
portable("qc.fill_halo", fill_halo)
portable("qc.reshape", reshape, dense=True)
portable("qc.transpose", transpose, own_channels=True)
portable("qc.slice", slice_, own_channels=True)
portable("qc.pad", pad, own_channels=True)
portable("qc.select", select, own_channels=True)
portable("qc.concat", concat, own_channels=True)
