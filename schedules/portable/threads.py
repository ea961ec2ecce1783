"""The same loop nests on a GPU: a thread computes one word, or 16 bytes, of the result; neighbouring threads compute neighbouring ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
    with T.serial(0, rounds) if rounds > 1 else nullcontext(0) as i:
        flat = T.bind(k.task + i * k.tasks) if rounds > 1 else k.task
        with T.If(flat < total), T.Then():
            yield unravel(flat, extents)


def unravel(flat: Any, extents: Sequence[int]) -> list[Any]:
    """The multi-index of a row-major position."""
    index: list[Any] = []
    for extent in reversed(extents[1:]):
        index.insert(0, T.bind(tirx.truncmod(flat, extent)) if extent > 1 else T.int32(0))
        flat = T.bind(tirx.truncdiv(flat, extent)) if extent > 1 else flat
    return [flat, *index] if extents else []


def words(buffer: Any) -> Any:
    """The same memory as int32."""
    size = -(-int(buffer.shape[0]) * np.dtype(str(buffer.dtype)).itemsize // 4)
    return T.decl_buffer((size,), "int32", data=buffer.data)


def alignment(view: View) -> int:
    """Bytes, at most 16, by which every row of the last dimension of an 8-bit view is aligned."""
    return math.gcd(16, view.offset, *view.strides[:-1])


def load_words(memory: Any, index: Any, count: int, step: int) -> list[Any]:
    """`count` words of an int32 buffer from byte `index` on, which is a multiple of `step` bytes (4, 8, 16): as many at once as that allows."""
    lanes = math.gcd(count, step // 4, 4)
    if lanes == 1:
        return [T.bind(memory[quarter(index) + i]) for i in range(count)]
    first = T.bind(T.shift_right(index, T.int32(lanes.bit_length() + 1)))  # the code generator must see that its place is a multiple of `lanes`
    loaded = [T.bind(memory[T.ramp((first + i) * lanes, 1, lanes)]) for i in range(count // lanes)]
    return [T.Shuffle([vector], [i]) for vector in loaded for i in range(lanes)]


def store_words(memory: Any, index: Any, values: Sequence[Any], step: int) -> None:
    """The other way."""
    lanes = math.gcd(len(values), step // 4, 4)
    for i in range(0, len(values), lanes):
        place = quarter(index) + i
        value = values[i] if lanes == 1 else T.Shuffle(list(values[i : i + lanes]), list(range(lanes)))
        T.buffer_store(memory, value, [place if lanes == 1 else T.ramp(place, 1, lanes)])


def quarter(index: Any) -> Any:
    """The word of a byte index that is a multiple of 4."""
    return T.shift_right(index, T.int32(2))


def unpack(word: Any, byte: int, dtype: str) -> Any:
    """An 8-bit element of an int32 word."""
    return T.Cast(dtype, T.shift_right(word, T.int32(8 * byte)) if byte else word)


def pack(values: Sequence[Any]) -> Any:
    """The low bytes of four int32 values as a word, the first lowest: three byte permutations."""
    a, b, c, d = values

    def permute(x: Any, y: Any, selector: int) -> Any:
        return T.call_pure_extern("int32", "__byte_perm", x, y, T.int32(selector))

    return permute(permute(a, b, 0x0040), permute(c, d, 0x0040), 0x5410)


def elementwise(k: Emitter, views: Sequence[View], compute: Callable[[list[Any]], Any]) -> None:
    """views[-1][i] = compute(views[:-1][i]), element by element; 8-bit operands are read and written in words where they may be."""
    *sources, target = views
    *outer, inner = target.shape
    packed = np.dtype(target.dtype).itemsize == 1 and all(in_words(v) for v in views) and inner % 4 == 0
    run = 1 if not packed else 16 if inner % 16 == 0 and math.prod(target.shape) >= 16 * MANY else 4
    memory = [words(v.buffer) if packed and np.dtype(v.dtype).itemsize == 1 and v.strides[-1] else v.buffer for v in views]
    with each(k, *outer, inner // run) as (*index, part):
        starts = [T.bind(T.int32(0) + v.at([*index, part * run])) for v in views]
        whole = [[] if m is v.buffer else load_words(m, s, run // 4, alignment(v)) for v, m, s in zip(sources, memory, starts, strict=False)]
        results: list[Any] = []
        for first in range(0, run, 4):
            loaded: list[list[Any]] = []  # per source, its elements
            for source, buffer, start in zip(sources, memory, starts, strict=False):
                stride = source.strides[-1]
                if buffer is source.buffer:
                    shared = T.bind(buffer[start]) if stride == 0 else None
                    loaded.append([shared if stride == 0 else buffer[start + (first + i) * stride] for i in range(min(run, 4))])
                else:
                    loaded.append([unpack(whole[len(loaded)][first // 4], i, source.dtype) for i in range(4)])
            values = [T.bind(compute([x[i] for x in loaded])) for i in range(min(run, 4))]
            if packed:
                results.append(T.bind(pack([T.Cast("int32", v) for v in values])))
            else:
                T.buffer_store(target.buffer, values[0], [starts[-1]])
        if packed:
            store_words(memory[-1], starts[-1], results, alignment(target))


def in_words(view: View) -> bool:
    """Whether runs of four elements of the last dimension are aligned words (or not 8-bit, or one element repeated)."""
    if view.strides[-1] == 0 or np.dtype(view.dtype).itemsize != 1:
        return True
    return view.strides[-1] == 1 and view.offset % 4 == 0 and all(s % 4 == 0 for s in view.strides[:-1])
