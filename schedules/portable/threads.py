"""The same loop nests on a GPU: a thread computes one word, or 16 bytes, of the result; neighbouring threads compute neighbouring ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.builder import Emitter, View

MANY = 1 << 16  # threads that fill a large GPU: from there on a thread computes more


@contextmanager
def each(k: Emitter, *extents: int) -> Iterator[list[Any]]:
    """This thread's part of all multi-indices below `extents`, one after the other: neighbouring threads differ in the last one."""
    total = math.prod(extents)
    rounds = -(-total // k.tasks)
    with T.serial(0, rounds) as i:
        flat = T.bind(k.task + i * k.tasks if rounds > 1 else k.task + 0)
        with T.If(flat < total), T.Then():
            yield unravel(flat, extents)


def unravel(flat: Any, extents: Sequence[int]) -> list[Any]:
    """The multi-index of a row-major position."""
    index: list[Any] = []
    for extent in reversed(extents[1:]):
        index.insert(0, T.bind(tirx.truncmod(flat, extent)))
        flat = T.bind(tirx.truncdiv(flat, extent))
    return [flat, *index] if extents else []


def words(buffer: Any) -> Any:
    """The same memory as int32."""
    size = -(-int(buffer.shape[0]) * np.dtype(str(buffer.dtype)).itemsize // 4)
    return T.decl_buffer((size,), "int32", data=buffer.data)


def unpack(word: Any, byte: int, dtype: str) -> Any:
    """An 8-bit element of an int32 word."""
    return T.Cast(dtype, T.shift_right(word, T.int32(8 * byte)) if byte else word)


def pack(values: Sequence[Any]) -> Any:
    """Four 8-bit values as an int32 word, the first in the low byte."""
    parts = [T.Cast("int32", T.Cast("uint8", v)) for v in values]
    word = parts[0]
    for i, part in enumerate(parts[1:], 1):
        word = T.bitwise_or(word, T.shift_left(part, T.int32(8 * i)))
    return word


def elementwise(k: Emitter, views: Sequence[View], compute: Callable[[list[Any]], Any]) -> None:
    """views[-1][i] = compute(views[:-1][i]), element by element; 8-bit operands are read and written in words where they may be."""
    *sources, target = views
    *outer, inner = target.shape
    packed = np.dtype(target.dtype).itemsize == 1 and all(_in_words(v) for v in views) and inner % 4 == 0
    run = 1 if not packed else 16 if inner % 16 == 0 and math.prod(target.shape) >= 16 * MANY else 4
    memory = [words(v.buffer) if packed and np.dtype(v.dtype).itemsize == 1 and v.strides[-1] else v.buffer for v in views]
    with each(k, *outer, inner // run) as (*index, part):
        starts = [T.bind(T.int32(0) + v.at([*index, part * run])) for v in views]
        for first in range(0, run, 4):
            loaded: list[list[Any]] = []  # per source, its elements
            for source, buffer, start in zip(sources, memory, starts, strict=False):
                stride = source.strides[-1]
                if buffer is source.buffer:
                    shared = T.bind(buffer[start]) if stride == 0 else None
                    loaded.append([shared if stride == 0 else buffer[start + (first + i) * stride] for i in range(min(run, 4))])
                else:
                    word = T.bind(buffer[tirx.truncdiv(start, 4) + first // 4])
                    loaded.append([unpack(word, i, source.dtype) for i in range(4)])
            values = [T.bind(compute([x[i] for x in loaded])) for i in range(min(run, 4))]
            if packed:
                T.buffer_store(memory[-1], pack(values), [tirx.truncdiv(starts[-1], 4) + first // 4])
            else:
                T.buffer_store(target.buffer, values[0], [starts[-1]])


def _in_words(view: View) -> bool:
    """Whether runs of four elements of the last dimension are aligned words (or not 8-bit, or one element repeated)."""
    if view.strides[-1] == 0 or np.dtype(view.dtype).itemsize != 1:
        return True
    return view.strides[-1] == 1 and view.offset % 4 == 0 and all(s % 4 == 0 for s in view.strides[:-1])
