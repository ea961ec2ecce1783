"""Operators of ONNX Runtime (domain com.microsoft), as its optimizers write them in place of several of the standard: normalizations with the sum before them,
layers with their activation, products with their transpositions, look-ups, weights of few bits. Attention is beside (`contributed_attention.py`,
`contributed_grouped.py`).

What they mean is taken from docs/ContribOperators.md of ONNX Runtime. Each becomes what the operators that it was fused from become.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax

from qcompiler.importers import arithmetic, images
from qcompiler.importers.contributed_attention import attention_of_weights, multi_head_attention, rotary_embedding
from qcompiler.importers.contributed_grouped import group_query_attention
from qcompiler.importers.nodes import Node, Refused, Value, real
from qcompiler.passes.graph import const, shape_of

# -- activations ------------------------------------------------------------------------------------------------------------------------


def _biased(node: Node) -> Any:
    return node.emit("biased", relax.op.add(node.tensor(0), node.tensor(1))) if node.has(1) else node.tensor(0)


def gelu(node: Node) -> list[Value]:
    """Gelu and BiasGelu."""
    return [relax.op.nn.gelu(_biased(node))]


def fast_gelu(node: Node) -> list[Value]:
    return [relax.op.nn.gelu_tanh(_biased(node))]


def quick_gelu(node: Node) -> list[Value]:
    return arithmetic.swish(replace(node, attrs={"alpha": float(node.attrs.get("alpha", 1.702))}))


def bias_add(node: Node) -> list[Value]:
    """`x + bias + skip`."""
    return [relax.op.add(_biased(node), node.tensor(2))]


def bias_split_gelu(node: Node) -> list[Value]:
    """The first half of the channels of `x + bias`, times the GELU of the second."""
    x = _biased(node)
    parts = node.emit("split", relax.op.split(x, 2, len(shape_of(x)) - 1))
    left, right = (node.emit(what, relax.TupleGetItem(parts, i)) for i, what in enumerate(("left", "right")))
    return [relax.op.multiply(left, node.emit("gelu", relax.op.nn.gelu(right)))]


def _activated(node: Node, x: Any, numbers: Sequence[float]) -> Any:
    """`x` under the activation that the node names. numbers: the parameters of that, in the order of ONNX Runtime; defaults where left out."""
    name = node.text("activation", "")

    def number(index: int, default: float) -> float:
        return float(numbers[index]) if index < len(numbers) else default

    plain = {"Relu": relax.op.nn.relu, "Sigmoid": relax.op.sigmoid, "Tanh": relax.op.tanh}
    if name in plain:
        return plain[name](node.emit("linear", x))
    if name == "LeakyRelu":
        return relax.op.nn.leakyrelu(node.emit("linear", x), number(0, 0.01))
    if name == "HardSigmoid":
        other = {"alpha": number(0, 0.2), "beta": number(1, 0.5)}
        return arithmetic.hard_sigmoid(replace(node, inputs=[node.emit("linear", x)], attrs=other))[0]
    if name == "Clip":
        other = {"min": number(0, -np.inf), "max": number(1, np.inf)}
        return arithmetic.clip(replace(node, inputs=[node.emit("linear", x)], attrs=other))[0]
    if name:
        raise Refused(f"its activation is '{name}'; supported: {', '.join([*plain, 'LeakyRelu', 'HardSigmoid', 'Clip'])}")
    return x


# -- layers -----------------------------------------------------------------------------------------------------------------------------


def convolution(channels_last: bool) -> Callable[[Node], list[Value]]:
    """Conv of images that may be NHWC, plus a fourth operand, activated. The weights are as those of Conv."""

    def convert(node: Node) -> list[Value]:
        rank, x = len(node.shape()), node.inputs[0]
        if channels_last:
            x = node.emit("nchw", relax.op.permute_dims(node.tensor(0), [0, rank - 1, *range(1, rank - 1)]))
        (y,) = images.conv(replace(node, inputs=[x, *node.inputs[1:3]]))
        if channels_last:
            y = relax.op.permute_dims(node.emit("conv-nchw", y), [0, *range(2, rank), 1])
        if node.has(3):
            y = relax.op.add(node.emit("own", y), node.tensor(3))
        return [_activated(node, y, node.attrs.get("activation_params", ()))]

    return convert


def fused_gemm(node: Node) -> list[Value]:
    (y,) = arithmetic.gemm(node)
    numbers = [node.attrs[name] for name in ("activation_alpha", "activation_beta", "activation_gamma") if name in node.attrs]
    return [_activated(node, y, numbers)]


def fused_matmul(node: Node) -> list[Value]:
    """`alpha * A' @ B'`. transBatch: the first axis becomes the last but one; trans: the last two change places, then. Constants are moved and scaled here."""
    alpha, operands = float(node.attrs.get("alpha", 1.0)), []
    for index, side in enumerate("AB"):
        rank, value = len(node.shape(index)), node.present(index)
        order = [*range(rank)]
        if node.attrs.get(f"transBatch{side}", 0) and rank > 2:
            order = [*order[1:-1], 0, rank - 1]
        if node.attrs.get(f"trans{side}", 0) and rank > 1:
            order[-2:] = order[:-3:-1]
        if isinstance(value, np.ndarray):
            operands.append(const(np.ascontiguousarray(real(value).transpose(order)) * np.float32(alpha)))
            alpha = 1.0
        else:
            operands.append(value if order == [*range(rank)] else node.emit(side.lower(), relax.op.permute_dims(value, order)))
    product = arithmetic.matrix_product(node, *operands)
    return [product if alpha == 1.0 else relax.op.multiply(node.emit("product", product), const(np.float32(alpha)))]


def matmul_n_bits(node: Node) -> list[Value]:
    """A product with the reals that packed integers stand for: `(q - zero) * scale`, both for every block of columns of a row of B [N, K]."""
    n, k, block, bits = (int(node.attrs.get(name, default)) for name, default in (("N", 0), ("K", 0), ("block_size", 0), ("bits", 4)))
    if bits not in (2, 4, 8) or block < 1:
        raise Refused(f"its weights are of {bits} bits in blocks of {block}; supported: 2, 4 and 8 bits")
    if node.attrs.get("weight_prepacked", 0):
        raise Refused("its weights are in the order of one device (weight_prepacked); supported: weight_prepacked 0. Export the model without packing")
    packed, scale, zero, order = (node.constant(i, what) for i, what in ((1, "weights"), (2, "scales"), (3, "zero points"), (4, "groups")))
    blocks = -(-k // block)
    if packed is None or scale is None or packed.size * 8 != n * blocks * block * bits or scale.size != n * blocks:
        raise Refused(f"its weights or scales don't fit {n} rows of {blocks} blocks of {block} numbers of {bits} bits")
    if zero is None:
        levels: np.ndarray = np.full((n, blocks), 2 ** (bits - 1), np.float32)
    elif zero.dtype == np.uint8:
        levels = _unpacked(zero.reshape(n, -1), bits)[:, :blocks]
    else:
        levels = real(zero).reshape(n, blocks)
    group = np.arange(k) // block if order is None else order.astype(np.int64).reshape(-1)[:k]
    q = _unpacked(packed.reshape(n, -1), bits)[:, :k]
    weights = (q - levels[:, group]) * real(scale).reshape(n, blocks)[:, group]
    product = relax.op.matmul(node.tensor(0), const(np.ascontiguousarray(weights.T, np.float32)))
    return [relax.op.add(node.emit("product", product), node.tensor(5)) if node.has(5) else product]


def _unpacked(rows: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [N, B] -> float32 [N, B * 8 / bits]; the first number of a byte is in its low bits."""
    parts = (rows[..., None] >> np.arange(0, 8, bits, dtype=np.uint8)) & np.uint8(2**bits - 1)
    return parts.reshape(len(rows), -1).astype(np.float32)


# -- normalizations ---------------------------------------------------------------------------------------------------------------------


def _unread(node: Node, *places: int) -> None:
    for place in places:
        if place < len(node.outputs) and node.outputs[place]:
            raise Refused(f"its result {place} ('{node.outputs[place]}'), of training, is read; supported: inference")


def simplified_layer_norm(node: Node) -> list[Value]:
    """`x / sqrt(mean(x^2) + epsilon) * gamma`, over the axes from `axis` on."""
    _unread(node, 1)
    rank = len(node.shape())
    axes = [*range(node.axis(int(node.attrs.get("axis", -1)), rank), rank)]
    return [relax.op.nn.rms_norm(node.tensor(0), node.tensor(1), axes, float(node.attrs.get("epsilon", 1e-5)))]


def skip_layer_norm(simplified: bool) -> Callable[[Node], list[Value]]:
    """The normalization of `x + skip + bias` over the last axis; the fourth result is that sum. Without mean (simplified) there is no beta either."""

    def convert(node: Node) -> list[Value]:
        _unread(node, 1, 2)
        total, bias = relax.op.add(node.tensor(0), node.tensor(1)), 3 if simplified else 4
        if node.has(bias):
            total = relax.op.add(node.emit("skip", total), node.tensor(bias))
        name = next(iter(node.outputs[3:]), "")
        total = node.builder.emit(name, total) if name else node.emit("sum", total)
        result = _normalized(node, total, 2, 0 if simplified else 3, simplified)
        return [result, total, total, total][: len(node.outputs)]

    return convert


def _normalized(node: Node, x: Any, gamma: int, beta: int, simplified: bool = False) -> Any:
    """gamma, beta: operands; beta may be left out."""
    epsilon = float(node.attrs.get("epsilon", 1e-12))
    if simplified:
        return relax.op.nn.rms_norm(x, node.tensor(gamma), [-1], epsilon)
    shift = node.tensor(beta) if node.has(beta) else const(np.zeros(shape_of(x)[-1], np.float32))
    return relax.op.nn.layer_norm(x, node.tensor(gamma), shift, [-1], epsilon)


def embed_layer_norm(node: Node) -> list[Value]:
    """The normalized sum of what three tables hold of words, their places and their segments; then how many words the mask leaves, and the sum itself."""
    rows, columns = node.shape()
    places = node.inputs[8] if node.has(8) else np.arange(columns, dtype=np.int64)[None]

    def looked_up(what: str, index: int, ids: Any) -> Any:
        table = node.present(index)
        if isinstance(table, np.ndarray) and isinstance(ids, np.ndarray):
            return const(real(table)[ids])
        return node.emit(what, relax.op.take(node.tensor(index), const(ids) if isinstance(ids, np.ndarray) else ids, 0, mode="clip"))

    total = relax.op.add(looked_up("words", 2, node.inputs[0]), looked_up("places", 3, places))
    if node.has(1) and node.has(4):
        total = relax.op.add(node.emit("placed", total), looked_up("segments", 4, node.inputs[1]))
    name = next(iter(node.outputs[2:]), "")
    total = node.builder.emit(name, total) if name else node.emit("sum", total)
    count: Any = np.zeros(rows, np.int32)
    if node.has(7):
        ones = node.emit("ones", relax.op.equal(node.tensor(7), const(np.ones((), node.dtype(7)))))
        count = relax.op.sum(node.emit("counted", relax.op.astype(ones, "int32")), [1])
    return [_normalized(node, total, 5, 6), count, total][: len(node.outputs)]


CONTRIBUTED: dict[str, Callable[[Node], list[Value]]] = {
    "Attention": attention_of_weights,
    "BiasAdd": bias_add,
    "BiasGelu": gelu,
    "BiasSplitGelu": bias_split_gelu,
    "EmbedLayerNormalization": embed_layer_norm,
    "FastGelu": fast_gelu,
    "FusedConv": convolution(False),
    "FusedGemm": fused_gemm,
    "FusedMatMul": fused_matmul,
    "Gelu": gelu,
    "GroupQueryAttention": group_query_attention,
    "MatMulNBits": matmul_n_bits,
    "MultiHeadAttention": multi_head_attention,
    "NhwcConv": convolution(True),
    "NhwcFusedConv": convolution(True),
    "QuickGelu": quick_gelu,
    "RotaryEmbedding": rotary_embedding,
    "SkipLayerNormalization": skip_layer_norm(False),
    "SkipSimplifiedLayerNormalization": skip_layer_norm(True),
}
