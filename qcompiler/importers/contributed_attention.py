"""Attention as ONNX Runtime's own operators state it, in terms of the standard's (`attention.py`): the projections of Attention are products of their own,
masks are what is added to the logits, and the past of keys and values stands before the new ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax

from qcompiler.importers import attention as standard
from qcompiler.importers.nodes import Node, Refused, Value, real
from qcompiler.passes.graph import const, dtype_of, shape_of

_HEADS_FIRST = [0, 2, 1, 3]


def beyond(node: Node, operands: dict[int, str], attributes: dict[str, float]) -> None:
    """Raises Refused where one of these operands is given, or an attribute has another than this value."""
    for index, what in operands.items():
        if node.has(index):
            raise Refused(f"operand {index} ('{node.proto.input[index]}'), {what}, is not supported; leave it out before export")
    for name, value in attributes.items():
        if node.attrs.get(name, value) != value:
            raise Refused(f"{name} {node.attrs[name]} is not supported; supported: {value}")


def part(node: Node, what: str, x: Value, axis: int, begin: int, end: int) -> Value:
    if isinstance(x, np.ndarray):
        return real(x)[(slice(None),) * axis + (slice(begin, end),)]
    return node.emit(what, relax.op.strided_slice(x, [axis], [begin], [end], [1]))


def attention_of_weights(node: Node) -> list[Value]:
    """x [B, S, C], weights [C, q | k | v], bias; mask; past [2, B, H, P, D]; what is added to the logits. Results: [B, S, v], and present like past."""
    beyond(node, {6: "the length of a shared buffer"}, {"do_rotary": 0, "past_present_share_buffer": 0})
    width = node.shape(1)[1]
    sizes = [int(v) for v in node.attrs.get("qkv_hidden_sizes", [width // 3] * 3)]
    if len(sizes) != 3 or sum(sizes) != width:
        raise Refused(f"its weights are {width} wide, and queries, keys and values {sizes}")
    x, parts, begin = node.tensor(0), [], 0
    for what, size in zip("qkv", sizes, strict=True):
        weights = part(node, f"{what}-weights", node.present(1), 1, begin, begin + size)
        y = node.emit(f"{what}-product", relax.op.matmul(x, const(np.ascontiguousarray(weights)) if isinstance(weights, np.ndarray) else weights))
        if node.has(2):
            shift = node.variable(f"{what}-shift", part(node, f"{what}-shift", node.present(2), 0, begin, begin + size))
            y = node.emit(what, relax.op.add(y, shift))
        parts.append(y)
        begin += size
    past = [None, None]
    if node.has(4):
        shape = node.shape(4)[1:]
        past = [node.variable("", node.reshape(part(node, f"{w}-past", node.present(4), 0, i, i + 1), shape)) for i, w in enumerate("kv")]
    result, presents = _attended(node, parts, past, mask=3, bias=5)
    if len(node.outputs) < 2 or not node.outputs[1]:
        return [result]
    one = [node.emit(f"{w}-one", relax.op.reshape(p, (1, *shape_of(p)))) for w, p in zip("kv", presents(), strict=True)]
    return [result, relax.op.concat(one, 0)]


def multi_head_attention(node: Node) -> list[Value]:
    """q [B, S, H * D], k and v [B, T, H * D] or [B, H, T, D], or packed as [B, T, H, 2 or 3, D]; bias of the projections; mask; what is added to the logits;
    past of k and of v [B, H, P, D]. Results: [B, S, H * D], presents like the past."""
    beyond(node, {8: "the length of a shared buffer", 9: "the origin of beams"}, {})
    unread_logits(node)
    heads = int(node.attrs.get("num_heads", 0))
    parts: list[Any] = [node.tensor(i) if node.has(i) else None for i in range(3)]
    packed = next((i for i, p in enumerate(parts) if p is not None and len(shape_of(p)) == 5), None)
    if packed is not None:
        whole = parts[packed]
        batch, rows, heads, count, depth = shape_of(whole)
        for i in range(count):
            one = part(node, f"{'qkv'[packed + i]}-slice", whole, 3, i, i + 1)
            parts[packed + i] = node.emit(f"{'qkv'[packed + i]}-packed", relax.op.reshape(one, (batch, rows, heads * depth)))
    if any(p is None for p in parts):
        raise Refused("its keys or values are missing")
    if node.has(3):
        begin = 0
        for i, what in enumerate("qkv"):
            if len(shape_of(parts[i])) == 4:  # without bias, says ONNX Runtime
                continue
            size = shape_of(parts[i])[2]
            shift = node.variable(f"{what}-shift", part(node, f"{what}-shift", node.present(3), 0, begin, begin + size))
            parts[i], begin = node.emit(what, relax.op.add(parts[i], shift)), begin + size
    past = [node.tensor(i) if node.has(i) else None for i in (6, 7)]
    result, presents = _attended(replace(node, attrs={**node.attrs, "num_heads": heads}), parts, past, mask=4, bias=5)
    return [result, *presents()][: len(node.outputs)] if any(node.outputs[1:]) else [result]


def rotary_embedding(node: Node) -> list[Value]:
    """x [B, S, H * D] or [B, H, S, D]; places [B, S], or the first place [1]; cosines and sines [places, R / 2] of the first R channels of a head."""
    beyond(node, {}, {"is_packed_batching": 0, "scale": 1.0})
    shape, x = node.shape(), node.tensor(0)
    angles, heads = int(node.attrs.get("rotary_embedding_dim", 0)), int(node.attrs.get("num_heads", 0))
    pair, spelled = bool(node.attrs.get("interleaved", 0)), len(shape) == 4
    depth = shape[3] if spelled else shape[2] // heads if heads else angles or 2 * node.shape(2)[1]
    rows = shape[2] if spelled else shape[1]
    places = node.present(1)
    if node.shape(1) == (1,):
        steps = np.arange(rows, dtype=np.int64)[None]
        places = places + steps if isinstance(places, np.ndarray) else node.emit("places", relax.op.add(places, const(steps.astype(dtype_of(places)))))
    if spelled:
        x = node.emit("rows", relax.op.permute_dims(x, _HEADS_FIRST))
    else:
        x = node.emit("heads", relax.op.reshape(x, (*shape[:2], shape[2] // depth, depth)))
    y = node.emit("turned", turned(node, "x", x, table(node, "cos", 2, places), table(node, "sin", 3, places), pair))
    return [relax.op.permute_dims(y, _HEADS_FIRST) if spelled else relax.op.reshape(y, shape)]


def table(node: Node, what: str, index: int, places: Value) -> Value:
    """Rows of a table, [B or 1, S, 1, R / 2]."""
    table = node.present(index)
    if isinstance(table, np.ndarray) and isinstance(places, np.ndarray):
        return real(table)[places][:, :, None]
    rows = node.emit(f"{what}-rows", relax.op.take(node.tensor(index), const(places) if isinstance(places, np.ndarray) else places, 0, mode="clip"))
    batch, count, half = shape_of(rows)
    return node.emit(what, relax.op.reshape(rows, (batch, count, 1, half)))


def turned(node: Node, what: str, x: Any, cos: Value, sin: Value, interleaved: bool) -> Any:
    """`x * (cos, cos) + (-b, a) * (sin, sin)` of x = (a, b) [B, S, H, D]: halves, or with `interleaved` neighbours; channels behind the tables' are kept."""
    batch, rows, heads, depth = shape_of(x)
    half = np.shape(cos)[-1] if isinstance(cos, np.ndarray) else shape_of(cos)[-1]
    if not 0 < 2 * half <= depth:
        raise Refused(f"its tables are of {half} angles, and a head has {depth} channels")
    rest = None
    if 2 * half < depth:
        x, rest = part(node, f"{what}-first", x, 3, 0, 2 * half), part(node, f"{what}-rest", x, 3, 2 * half, depth)

    def twice(name: str, table: Value) -> Any:
        if isinstance(table, np.ndarray):
            return const(np.ascontiguousarray(np.repeat(table, 2, -1) if interleaved else np.concatenate([table, table], -1)))
        return node.emit(name, relax.op.repeat(table, 2, 3) if interleaved else relax.op.concat([table, table], 3))

    parts, axis = x, 3
    if interleaved:
        parts, axis = node.emit(f"{what}-pairs", relax.op.reshape(x, (batch, rows, heads, half, 2))), 4
    end = shape_of(parts)[axis]
    a, b = part(node, f"{what}-a", parts, axis, 0, end // 2), part(node, f"{what}-b", parts, axis, end // 2, end)
    other = node.emit(f"{what}-other", relax.op.concat([node.emit(f"{what}-minus", relax.op.negative(b)), a], axis))
    if interleaved:
        other = node.emit(f"{what}-others", relax.op.reshape(other, (batch, rows, heads, 2 * half)))
    straight = node.emit(f"{what}-straight", relax.op.multiply(x, twice(f"{what}-cosines", cos)))
    across = node.emit(f"{what}-across", relax.op.multiply(other, twice(f"{what}-sines", sin)))
    y = relax.op.add(straight, across)
    return y if rest is None else relax.op.concat([node.emit(f"{what}-moved", y), rest], 3)


# -- what they share --------------------------------------------------------------------------------------------------------------------


def unread_logits(node: Node) -> None:
    if any(node.outputs[3:]):
        raise Refused(f"its result 3 ('{node.outputs[3]}'), the product of queries and keys, is read; supported: attention alone. Export without it")


def _attended(node: Node, parts: list[Any], past: list[Any], mask: int, bias: int) -> tuple[Value, Any]:
    """(attention of queries, keys and values, each packed [B, S, H * D] or as heads [B, H, T, D], a function that yields all keys and all values as heads).
    mask, bias: operands."""
    heads = int(node.attrs.get("num_heads", 0))
    if heads < 1:
        raise Refused(f"it states {heads} heads; at least one is needed")
    batch, rows = shape_of(parts[0])[:2]

    def as_heads(index: int) -> Any:
        what, x = "qkv"[index], parts[index]
        if len(shape_of(x)) == 3:
            count, width = shape_of(x)[1:]
            if width % heads:
                raise Refused(f"a width of {width} can't be divided into {heads} heads")
            x = node.emit(f"{what}-split4", relax.op.reshape(x, (batch, count, heads, width // heads)))
            x = node.emit(f"{what}-first4", relax.op.permute_dims(x, _HEADS_FIRST))
        if past[index - 1] is None:
            return x
        return node.emit(f"{what}-present", relax.op.concat([past[index - 1], x], 2))

    before = 0 if past[0] is None else shape_of(past[0])[2]
    if past[0] is not None:
        parts[1:] = [as_heads(1), as_heads(2)]
        past = [None, None]
    columns = shape_of(parts[1])[1 if len(shape_of(parts[1])) == 3 else 2]
    added = _added(node, (batch, rows, columns), before, mask, bias)
    attrs = {"q_num_heads": heads, "kv_num_heads": heads, **({"scale": node.attrs["scale"]} if node.attrs.get("scale") else {})}
    inner = replace(node, inputs=[*parts, added], outputs=node.outputs[:1], attrs=attrs)
    return standard.attention(inner)[0], lambda: [as_heads(1), as_heads(2)]


def _added(node: Node, shape: tuple[int, int, int], before: int, mask: int, bias: int) -> Any:
    """What is added to logits [B, H, S, T], or None: the mask operand (how many keys are valid [B]; the ends, then the starts of the valid ones [2 * B]; ones
    where they are [B, T] or [B, S, T]), keys behind a query's place, and the operand `bias`. `before`: keys of the past."""
    _, rows, columns = shape
    low = np.float32(node.attrs.get("mask_filter_value", -10000.0))
    terms: list[Any] = []
    if node.has(mask):
        terms.append(_masked(node, mask, shape, low))
    if node.attrs.get("unidirectional", 0):
        terms.append(const(np.where(np.tri(rows, columns, before, dtype=np.bool_), np.float32(0), np.finfo(np.float32).min)[None, None]))
    if node.has(bias):
        terms.append(node.tensor(bias))
    for i, term in enumerate(terms[1:], 1):
        terms[i] = node.emit(f"mask{i}", relax.op.add(terms[i - 1], term))
    return terms[-1] if terms else None


def _masked(node: Node, index: int, shape: tuple[int, int, int], low: np.float32) -> Any:
    batch, rows, columns = shape
    own, m = node.shape(index), node.tensor(index)
    if len(own) == 1 and own[0] in (batch, 2 * batch):
        places = const(np.arange(columns, dtype=node.dtype(index))[None, None, None])

        def limits(what: str, begin: int) -> Any:
            part = m if own[0] == batch else relax.op.strided_slice(m, [0], [begin], [begin + batch], [1])
            part = part if own[0] == batch else node.emit(what, part)
            return node.emit(f"{what}-limits", relax.op.reshape(part, (batch, 1, 1, 1)))

        valid = node.emit("before-end", relax.op.less(places, limits("ends", 0)))
        if own[0] != batch:
            valid = node.emit("valid", relax.op.logical_and(valid, node.emit("from-start", relax.op.greater_equal(places, limits("starts", batch)))))
    elif own in ((batch, columns), shape):
        m = node.emit("mask-logits", relax.op.reshape(m, (batch, 1, rows if own == shape and len(own) == 3 else 1, columns)))
        valid = node.emit("valid", relax.op.greater(m, const(np.zeros((), node.dtype(index)))))
    else:
        raise Refused(
            f"its mask has shape {list(own)}; supported: [{batch}] (valid keys), [{2 * batch}] (ends, then starts), [{batch}, {columns}] "
            f"and [{batch}, {rows}, {columns}]"
        )
    return node.emit("mask", relax.op.where(valid, const(np.float32(0)), const(low)))
