"""Loop nests over strided views: the shape that every elementwise operator and every data movement has.

Dimensions are merged as far as all operands allow, vectors run along the last one, tasks divide the widest other one. A single source that
is contiguous along another dimension than the target is transposed in register tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.builder import Emitter, View, load, loops, prefetch, share, splat, store, tiles, vector, vectors
from qcompiler.schedules.portable import threads

AHEAD = 512
"""Elements. Hardware follows three streams of an image less well than told so: quantizing eight from memory took 0.72 of the time on a Zen 5 core, one from
the level 2 cache 0.95."""

Compute = Callable[[list[Any], int], Any]  # (vectors, lanes) -> vector
Fetch = Callable[[View, Any, int, int], Any]  # (view, flat index, lanes, stride) -> vector


def merged(views: Sequence[View]) -> list[View]:
    """The same elements in the same order with as few dimensions as possible (at least one)."""
    shape = views[0].shape
    dims = [(e, [v.strides[i] for v in views]) for i, e in enumerate(shape) if e != 1]
    result: list[tuple[int, list[int]]] = []
    for extent, strides in dims:
        if result and all(o == s * extent for o, s in zip(result[-1][1], strides, strict=True)):
            result[-1] = (result[-1][0] * extent, strides)
        else:
            result.append((extent, strides))
    result = result or [(1, [1] * len(views))]
    return [replace(v, shape=tuple(e for e, _ in result), strides=tuple(s[i] for _, s in result)) for i, v in enumerate(views)]


def elementwise(
    k: Emitter,
    sources: Sequence[View],
    target: View,
    compute: Compute,
    *,
    spare: int = 0,
    words: Compute | None = None,
    fetch: Fetch | None = None,
) -> None:
    """target[i] = compute(sources[i]) for every index of `target.shape`; all views have that shape. Vectors run along the last dimension.

    The widest outer dimension is divided among the kernel's tasks. A single source whose contiguous dimension is another one is
    transposed in tiles; `spare` elements behind each innermost run of the target may then be overwritten, and `words` (which yields
    int32 vectors with the result in the low byte) replaces `compute` where four 8-bit results are packed into a word.
    `fetch(view, index, lanes, stride)` replaces the loads of the sources, on CPUs: GPU threads load the words that they then compute from.
    """
    if 0 in target.shape:
        return
    views = merged([*sources, target])
    if k.gpu:
        threads.elementwise(k, views, lambda x: compute(x, 1))
        return
    extents = views[-1].shape
    if len(views) == 2:
        axis = _transposed_axis(views[0], views[1])
        if axis is not None:
            _transposing(k, views[0], views[1], axis, compute, spare, words)
            return
    if len(extents) > 1:
        with loops(*shared(k, extents[:-1])) as index:
            _row(k, views, index, compute, fetch)
    elif k.tasks == 1:
        _row(k, views, [], compute, fetch)
    else:
        chunk = extents[0] // k.tasks // 64 * 64
        if chunk:
            _row(k, _chunks(views, chunk), [k.task], compute, fetch)
        if extents[0] > chunk * k.tasks:
            with T.If(k.task == k.tasks - 1), T.Then():
                _row(k, [v.window([chunk * k.tasks], [extents[0] - chunk * k.tasks]) for v in views], [], compute, fetch)


def shared(k: Emitter, extents: Sequence[int]) -> list[Any]:
    """Arguments of `loops` with the widest one divided among the tasks."""
    widest = max(range(len(extents)), key=lambda d: extents[d])
    return [share(k, e) if d == widest else e for d, e in enumerate(extents)]


def _chunks(views: Sequence[View], chunk: int) -> list[View]:
    return [replace(v, shape=(v.shape[0] // chunk, chunk), strides=(v.strides[0] * chunk, v.strides[0])) for v in views]


def _row(k: Emitter, views: Sequence[View], index: list[Any], compute: Compute, fetch: Fetch | None) -> None:
    """The innermost dimension of merged views at `index` of the others."""
    *inputs, out = views
    inner = [v.strides[-1] for v in views]
    starts = [T.bind(T.int32(0) + v.at([*index, 0])) for v in views]
    fetch_ = fetch or (lambda v, at, lanes, stride: load(v.buffer, at, lanes, stride))

    def step(at: Any, lanes: int) -> None:
        loaded = [fetch_(v, s + at * stride, lanes, stride) for v, s, stride in zip(inputs, starts, inner, strict=False)]
        store(out.buffer, starts[-1] + at * inner[-1], compute(loaded, lanes), lanes)

    vectors(out.shape[-1], k.width if inner[-1] == 1 else 1, step)


def _pack_words(words: list[Any], dtype: str, lanes: int) -> Any:
    """The low bytes of four int32 vectors as one vector of 4 * lanes bytes that takes an element of each in turn (little-endian words)."""
    parts = [T.bitwise_and(T.shift_left(w, splat(T.int32(8 * i), lanes)), splat(tirx.const(255 << 8 * i, "int32"), lanes)) for i, w in enumerate(words[:3])]
    packed = T.shift_left(words[3], splat(T.int32(24), lanes))
    for part in parts:
        packed = T.bitwise_or(packed, part)
    return T.reinterpret(vector(dtype, 4 * lanes), packed)


# -- transposition ----------------------------------------------------------------------------------------------------------------------


def _transposed_axis(source: View, target: View) -> int | None:
    """The dimension along which the source is contiguous, when that is not the target's and both are long enough for tiles."""
    if target.strides[-1] != 1 or source.strides[-1] in (0, 1) or source.shape[-1] < 2:
        return None
    return next((i for i, s in enumerate(source.strides[:-1]) if s == 1 and source.shape[i] >= 4), None)


def interleave(rows: list[Any], lanes: int) -> list[Any]:
    """R vectors of L lanes (R <= L, powers of two) as R vectors that hold element [l][r], in order: the transposed matrix.

    Each stage merges vectors i and i + R/2 element by element: one punpckl/punpckh (zip1/zip2) per vector for 16 bytes.
    """
    half = lanes // 2
    low = [x for i in range(half) for x in (i, lanes + i)]
    high = [x + half for x in low]
    for _ in range(len(rows).bit_length() - 1):
        n = len(rows) // 2
        rows = [T.bind(T.Shuffle([rows[i], rows[i + n]], order)) for i in range(n) for order in (low, high)]
    return rows


def _transposing(k: Emitter, source: View, target: View, axis: int, compute: Compute, spare: int, words: Compute | None) -> None:
    """Tiles of `lanes` elements along `axis` (contiguous in the source) by `count` along the last dimension (contiguous in the target)."""
    columns, rows = target.shape[axis], target.shape[-1]
    lanes = min(16, 1 << (columns.bit_length() - 1))
    count = 1 << (rows - 1).bit_length()
    if count > min(rows + spare, lanes):
        count = min(lanes, 1 << (rows.bit_length() - 1))
    before = np.dtype(source.dtype).itemsize > np.dtype(target.dtype).itemsize  # convert where vectors are wide, move bytes
    outer = [e for i, e in enumerate(target.shape[:-1]) if i != axis]
    along = tiles(k, columns, lanes) if axis == 0 else -(-columns // lanes)
    extents = [*shared(k, outer), along] if axis else [*outer, along]
    with loops(*extents, -(-rows // count)) as (*index, tile, block):
        first = T.bind(T.min(tile * lanes, columns - lanes))
        row = T.bind(T.max(T.min(block * count, rows - count), 0))
        index.insert(axis, first)
        start = T.bind(T.int32(0) + source.at([*index, row]))
        out = T.bind(T.int32(0) + target.at([*index, row]))
        loaded = [load(source.buffer, start + min(r, rows - 1) * source.strides[-1], lanes) for r in range(count)]
        if words is not None and count == 4 and target.strides[axis] == 4:
            if k.avx2:
                for r in range(rows):
                    prefetch(source.buffer, start + (r * source.strides[-1] + AHEAD))
            store(target.buffer, out, _pack_words([T.bind(words([x], lanes)) for x in loaded], target.dtype, lanes), 4 * lanes)
            return
        loaded = [T.bind(compute([x], lanes) if before else x) for x in loaded]
        for i, merged_vector in enumerate(interleave(loaded, lanes)):
            value = merged_vector if before else T.bind(compute([merged_vector], lanes))
            per = lanes // count  # columns in one vector
            if target.strides[axis] == count or per == 1:
                store(target.buffer, out + i * per * target.strides[axis], value, lanes)
                continue
            for j in range(per):
                part = T.Shuffle([value], list(range(j * count, (j + 1) * count)))
                store(target.buffer, out + (i * per + j) * target.strides[axis], part, count)
