"""ONNX Runtime's GroupQueryAttention, the attention of decoders: several query heads to a key head, turned by their places, with a cache of keys and values.

The cache holds the past keys, and the new ones at their places: behind the past, or inside of a buffer that is as long from call to call. A place reads
those up to itself, or as many of them as the window has.

    present = past, with k at start .. start + S;    y = softmax(cap(q . present_k) + mask) . present_v
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax

from qcompiler.importers import attention as standard
from qcompiler.importers.contributed_attention import beyond, part, table, turned, unread_logits
from qcompiler.importers.indexing import tensor_scatter
from qcompiler.importers.nodes import Node, Refused, Value
from qcompiler.passes.graph import const, shape_of

_HEADS_FIRST = [0, 2, 1, 3]
_LOW = np.finfo(np.float32).min


def group_query_attention(node: Node) -> list[Value]:
    """q [B, S, H * D], k and v [B, S, G * D], or side by side in the first operand; past keys and values [B, G, P, D]; how many keys each sequence has in all,
    less one [B]; how many there are in all; cosines and sines; places [B, S]; what is added to the logits. Results: [B, S, H * D], presents [B, G, L, D].

    What is computed of places behind a sequence's end, ONNX Runtime leaves open."""
    beyond(
        node,
        {12: "a scale of keys", 13: "a scale of values", 16: "lengths of queries"},
        {"sliding_window_cache": 0, "qk_output": 0},
    )  # fmt: skip
    unread_logits(node)
    counts = [int(node.attrs.get(name, 0)) for name in ("num_heads", "kv_num_heads", "kv_num_heads")]
    if min(counts) < 1:
        raise Refused(f"it states {counts[0]} query heads and {counts[1]} key heads; at least one of each is needed")
    q, k, v = _parts(node, counts)
    batch, rows = shape_of(q)[:2]
    past = node.shape(3)[2] if node.has(3) and node.has(4) else 0
    total = _total(node, rows, past)
    length = max(past, total)
    start = _start(node, batch, rows, past, total)
    if node.has(14) and node.has(15):
        q, k = (node.emit(f"{what}-norm", _normed(node, what, x, index)) for what, x, index in (("q", q, 14), ("k", k, 15)))
    if node.attrs.get("do_rotary", 0):
        q, k = _rotated(node, q, k, start)
    keys, values = (_present(node, what, x, index, past, length, start) for what, x, index in (("k", k, 3), ("v", v, 4)))
    mask = _mask(node, (batch, rows, length), start)
    result = _attended(node, q, keys, values, mask, counts[0])
    return [result, keys, values][: max(i for i, name in enumerate(node.outputs) if name) + 1]


def _parts(node: Node, counts: list[int]) -> list[Any]:
    """Queries, keys and values, each [B, S, heads, D]."""
    if node.has(1) and node.has(2):
        parts = [node.tensor(i) for i in range(3)]
    else:
        depth, begin, parts = node.shape()[2] // sum(counts), 0, []
        for what, count in zip("qkv", counts, strict=True):
            parts.append(node.variable(what, part(node, what, node.tensor(0), 2, begin, begin + count * depth)))
            begin += count * depth
    split = []
    for what, x, count in zip("qkv", parts, counts, strict=True):
        batch, rows, width = shape_of(x)
        if width % count:
            raise Refused(f"a width of {width} can't be divided into {count} heads")
        split.append(node.emit(f"{what}-split", relax.op.reshape(x, (batch, rows, count, width // count))))
    return split


def _total(node: Node, rows: int, past: int) -> int:
    """Keys in all. Raises Refused where that is computed at run time, or contradicts the past."""
    if not past:
        return rows
    known = node.constant(6, "count of all keys, which the length of its present follows from,")
    total = past + rows if known is None else int(known.reshape(-1)[0])
    if not rows <= total <= past + rows:
        raise Refused(f"it has {total} keys in all, and {past} places of the past beside {rows} new ones")
    return total


def _start(node: Node, batch: int, rows: int, past: int, total: int) -> Value:
    """int64 [B]: the place of the first new key, inside of the present. The keys of a prompt, which are all there are, stand at its begin."""
    if total == rows:
        return np.zeros(batch, np.int64)
    if not node.has(5):
        return np.full(batch, past, np.int64)
    ends, last = node.present(5), max(past, total) - rows
    if isinstance(ends, np.ndarray):
        return np.broadcast_to(np.clip(ends.astype(np.int64).reshape(-1) + (1 - rows), 0, last), (batch,))
    begin = node.emit("begin", relax.op.add(node.emit("ends", relax.op.astype(ends, "int64")), const(np.int64(1 - rows))))
    limited = relax.op.minimum(node.emit("limited", relax.op.maximum(begin, const(np.int64(0)))), const(np.int64(last)))
    return node.emit("start", relax.op.reshape(node.emit("start", limited), (batch,)))


def _normed(node: Node, what: str, x: Any, index: int) -> Any:
    epsilon = node.attrs.get(f"{what}_norm_epsilon", node.attrs.get("qk_norm_epsilon", 1e-6))
    return relax.op.nn.rms_norm(x, node.tensor(index), [-1], float(epsilon))


def _rotated(node: Node, q: Any, k: Any, start: Value) -> list[Any]:
    if not (node.has(7) and node.has(8)):
        raise Refused("it turns queries and keys (do_rotary) without tables of cosines and sines")
    places = node.present(9) if node.has(9) else _from(node, "places", start, (shape_of(q)[0], 1), np.arange(shape_of(q)[1], dtype=np.int64)[None])
    cos, sin = (table(node, what, index, places) for what, index in (("cos", 7), ("sin", 8)))
    pair = bool(node.attrs.get("rotary_interleaved", 0))
    return [node.emit(f"{what}-turned", turned(node, what, x, cos, sin, pair)) for what, x in (("q", q), ("k", k))]


def _from(node: Node, what: str, start: Value, shape: tuple[int, ...], steps: np.ndarray) -> Value:
    """`start` in another shape, plus `steps`."""
    if isinstance(start, np.ndarray):
        return start.reshape(shape) + steps
    return node.emit(what, relax.op.add(node.emit(f"{what}-from", relax.op.reshape(start, shape)), const(steps)))


def _present(node: Node, what: str, x: Any, index: int, past: int, length: int, start: Value) -> Any:
    """All keys, or all values, [B, G, L, D]."""
    new = node.emit(f"{what}-heads", relax.op.permute_dims(x, _HEADS_FIRST))
    _, _, rows, depth = shape_of(new)
    if not past:
        return new
    if node.shape(index) != (*shape_of(new)[:2], past, depth):
        raise Refused(f"its past has shape {list(node.shape(index))}, and its new {'keys' if what == 'k' else 'values'} {list(shape_of(new))}")
    buffer = node.tensor(index)
    if isinstance(start, np.ndarray) and length == past + rows and (start == past).all():
        return node.emit(f"{what}-present", relax.op.concat([buffer, new], 2))
    if length > past:
        more = const(np.zeros((*shape_of(new)[:2], length - past, depth), np.float32))
        buffer = node.emit(f"{what}-longer", relax.op.concat([buffer, more], 2))
    scatter = replace(node, op="TensorScatter", inputs=[buffer, new, start], attrs={"axis": 2})
    return node.emit(f"{what}-present", tensor_scatter(scatter)[0])


def _mask(node: Node, shape: tuple[int, int, int], start: Value) -> Any:
    """What is added to logits [B, H, S, L]: for keys behind a place, or before its window, what leaves nothing of them."""
    batch, rows, length = shape
    window = int(node.attrs.get("local_window_size", -1))
    causal = int(node.attrs.get("causal", 1))
    if window == 0 or (window > 0 and not causal):
        raise Refused(f"it has a window of {window} keys and causal {causal}; supported: windows of at least one key, of causal attention")
    keys = np.arange(length, dtype=np.int64)[None, None, None]
    own = np.arange(rows, dtype=np.int64)[None, None, :, None] if causal else np.full((1, 1, 1, 1), rows - 1, np.int64)
    last = _from(node, "last", start, (batch, 1, 1, 1), own)
    if isinstance(last, np.ndarray):
        valid = keys <= last
        if window > 0:
            valid &= keys > last - window
        valid = valid[:1] if (valid == valid[:1]).all() else valid
        mask = const(np.where(valid, np.float32(0), _LOW))
    else:
        seen = node.emit("seen", relax.op.less_equal(const(keys), last))
        if window > 0:
            first = node.emit("before", relax.op.subtract(last, const(np.int64(window))))
            seen = node.emit("near", relax.op.logical_and(seen, node.emit("inside", relax.op.greater(const(keys), first))))
        mask = node.emit("mask", relax.op.where(seen, const(np.float32(0)), const(_LOW)))
    if node.has(10):
        added, missing = node.tensor(10), length - node.shape(10)[3]
        if missing > 0:
            added = node.emit("added", relax.op.nn.pad(added, [0, 0, 0, 0, 0, 0, 0, missing]))
        mask = node.emit("mask", relax.op.add(mask, added))
    return mask


def _attended(node: Node, q: Any, keys: Any, values: Any, mask: Any, heads: int) -> Any:
    """A smooth softmax has one number more below its fraction, exp(0) or of its head (a sink): so has attention to a key of zeros, whose value is zero."""
    batch, rows, _, depth = shape_of(q)
    groups, length = shape_of(keys)[1:3]
    if node.has(11) or int(node.attrs.get("smooth_softmax", -1)) > 0:
        zeros = const(np.zeros((batch, groups, 1, depth), np.float32))
        keys, values = (node.emit(f"{what}-smooth", relax.op.concat([x, zeros], 2)) for what, x in (("k", keys), ("v", values)))
        sink = relax.op.reshape(node.tensor(11), (1, heads, 1, 1)) if node.has(11) else const(np.zeros((1, 1, 1, 1), np.float32))
        lead = [max(a, b) for a, b in zip(shape_of(mask)[:2], (1, heads if node.has(11) else 1), strict=True)]
        sides = [
            node.emit("wide", relax.op.broadcast_to(x, (*lead, rows, n))) for x, n in ((mask, length), (node.emit("sink", sink) if node.has(11) else sink, 1))
        ]
        mask = node.emit("smooth", relax.op.concat(sides, 3))
    scale, cap = float(node.attrs.get("scale", 0)) or 1 / math.sqrt(depth), float(node.attrs.get("softcap", 0))
    queries = node.emit("q-heads", relax.op.permute_dims(q, _HEADS_FIRST))
    if cap:
        rest = _capped(node, queries, keys, values, mask, scale, cap)
    else:
        inner = replace(node, inputs=[queries, keys, values, mask], outputs=node.outputs[:1], attrs={"scale": scale})
        rest = standard.attention(inner)[0]
    return relax.op.reshape(node.emit("rows", relax.op.permute_dims(node.emit("heads", rest), _HEADS_FIRST)), (batch, rows, heads * depth))


def _capped(node: Node, q: Any, keys: Any, values: Any, mask: Any, scale: float, cap: float) -> Any:
    share = shape_of(q)[1] // shape_of(keys)[1]
    if share > 1:
        keys, values = (node.emit(f"{what}-shared", relax.op.repeat(x, share, 1)) for what, x in (("k", keys), ("v", values)))
    turned_keys = node.emit("k-columns", relax.op.permute_dims(keys, [0, 1, 3, 2]))
    logits = node.emit("logits", relax.op.multiply(node.emit("product", relax.op.matmul(q, turned_keys)), const(np.float32(scale / cap))))
    capped = node.emit("capped", relax.op.multiply(node.emit("tanh", relax.op.tanh(logits)), const(np.float32(cap))))
    weights = node.emit("weights", relax.op.nn.softmax(node.emit("masked", relax.op.add(capped, mask)), -1))
    return relax.op.matmul(weights, values)
