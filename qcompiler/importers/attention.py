"""ONNX Attention (operator sets 23 and 24) as `relax.nn.attention`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import relax

from qcompiler.importers.nodes import Node, Refused, Undefined, Value
from qcompiler.passes.graph import const, shape_of

_IN_ROWS = [0, 2, 1, 3]
_KNOWN = {"is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale", "softcap", "softmax_precision"}  # attributes of operator set 24


def attention(node: Node) -> list[Value]:
    """Operands [B, S, heads * D] or [B, heads, S, D]; several query heads may share a key head, and a past of keys and values [B, heads, P, D] stands before
    the new ones; the results 1 and 2 are both. Lengths per sequence, windows, a cap and logits as a result are left to the operator's definition."""
    if set(node.attrs) - _KNOWN or any(node.outputs[3:]) or node.has(4) != node.has(5) or node.has(6) or float(node.attrs.get("softcap", 0.0)):
        raise Undefined
    packed = len(node.shape()) == 3
    counts = [int(node.attrs[name]) if packed else node.shape(i)[1] for i, name in ((0, "q_num_heads"), (1, "kv_num_heads"), (1, "kv_num_heads"))]
    if min(counts) < 1:
        raise Refused(f"it states {counts[0]} query heads and {counts[1]} key heads; at least one of each is needed")
    if counts[0] % counts[1]:
        raise Refused(f"{counts[0]} query heads can't share {counts[1]} key heads")
    parts, cached = [node.tensor(i) for i in range(3)], node.has(4) or any(node.outputs[1:])
    if cached:
        parts[1:] = [_present(node, i, what, count) for i, what, count in ((1, "k", counts[1]), (2, "v", counts[2]))]
    q, k, v = (_rows(node, x, what, count, counts[0]) for x, what, count in zip(parts, "qkv", counts, strict=True))
    (batch, rows, heads, depth), columns = shape_of(q), shape_of(k)[1]
    scale = float(node.attrs.get("scale", 1 / math.sqrt(depth)))
    bias = _bias(node, (batch, heads, rows, columns), node.shape(4)[2] if node.has(4) else 0)
    call = relax.op.nn.attention(q, k, v, bias, scale=scale)
    y = node.emit("rows", call)
    result = relax.op.reshape(y, (batch, rows, heads * shape_of(v)[3])) if packed else relax.op.permute_dims(y, _IN_ROWS)
    return [result, *(parts[1:] if cached else [])]


def _present(node: Node, index: int, what: str, heads: int) -> Any:
    """Keys or values [B, heads, P + T, D], those of the past first."""
    x = node.tensor(index)
    if len(shape_of(x)) == 3:
        x = node.emit(f"{what}-first", relax.op.permute_dims(_split(node, x, what, heads), _IN_ROWS))
    return node.emit(f"{what}-present", relax.op.concat([node.tensor(index + 3), x], 2)) if node.has(index + 3) else x


def _split(node: Node, x: Any, what: str, heads: int) -> Any:
    batch, rows, width = shape_of(x)
    if width % heads:
        raise Refused(f"a width of {width} can't be divided into {heads} heads")
    return node.emit(f"{what}-heads", relax.op.reshape(x, (batch, rows, heads, width // heads)))


def _rows(node: Node, x: Any, what: str, heads: int, wanted: int) -> Any:
    """`x` as [batch, row, head, channel] with `wanted` heads."""
    x = _split(node, x, what, heads) if len(shape_of(x)) == 3 else node.emit(f"{what}-rows", relax.op.permute_dims(x, _IN_ROWS))
    if heads == wanted:
        return x
    batch, rows, _, depth = shape_of(x)
    x = node.emit(f"{what}-group", relax.op.reshape(x, (batch, rows, heads, 1, depth)))
    x = node.emit(f"{what}-shared", relax.op.broadcast_to(x, (batch, rows, heads, wanted // heads, depth)))
    return node.emit(f"{what}-all", relax.op.reshape(x, (batch, rows, wanted, depth)))


def _bias(node: Node, shape: tuple[int, int, int, int], past: int) -> Any:
    """What the mask and `is_causal` add to logits of `shape`, the first `past` columns of which are of the past, or None. A mask may have fewer columns: keys
    behind them are masked."""
    causal = None
    if int(node.attrs.get("is_causal", 0)):
        causal = const(np.where(np.tri(*shape[2:], past, dtype=np.bool_), np.float32(0), np.float32(-np.inf))[None, None])
    if not node.has(3):
        return causal
    mask, own = node.tensor(3), node.shape(3)
    if node.dtype(3) == "bool":
        mask = node.emit("mask", relax.op.where(mask, const(np.float32(0)), const(np.float32(-np.inf))))
    elif node.dtype(3) != "float32":
        raise Refused(f"its mask is {node.dtype(3)}; supported: floating types and bool")
    if len(own) < 4:
        mask = node.emit("mask", relax.op.reshape(mask, (1,) * (4 - len(own)) + own))
    if own[-1] not in (1, shape[3]):
        mask = node.emit("mask", relax.op.nn.pad(mask, [0, 0, 0, 0, 0, 0, 0, shape[3] - own[-1]], "constant", -math.inf))
    elif own[-1] != shape[3]:
        mask = node.emit("mask", relax.op.broadcast_to(mask, (*shape_of(mask)[:3], shape[3])))
    return mask if causal is None else node.emit("mask", relax.op.add(mask, causal))
