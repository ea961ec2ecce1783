"""Masks that are computed, in integers: what only hides keys is no bias, and finite values beside hidden keys keep their precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx_nets import OnnxNet
from transformer_nets import HEADS, TOKENS, WIDTH, Transformer

from qcompiler.numerics.metrics import sqnr_db
from qcompiler.passes.graph import Graph, match_op
from qcompiler.pipeline.compile import quantize
from qcompiler.verification import interpreter

LOWEST = float(np.finfo(np.float32).min)
NEARER = -np.abs(np.subtract.outer(np.arange(TOKENS), np.arange(TOKENS))) * (2.0 ** -np.arange(1, HEADS + 1)).reshape(1, HEADS, 1, 1)
"""ALiBi: the further away a key is, the less it counts, differently in each head."""


def kept(net: OnnxNet, to: int) -> str:
    """The input `mask` int64 [1, TOKENS], 1 where a token counts, as [1, 1, 1, TOKENS] of another type."""
    mask = net.input("mask", 1, TOKENS, dtype=onnx.TensorProto.INT64)
    return str(net.op("Cast", net.op("Unsqueeze", mask, net.ints(1, 2)), to=to))


def chosen(inside: float | np.ndarray, outside: float) -> Callable[[OnnxNet], str]:
    return lambda net: str(net.op("Where", kept(net, onnx.TensorProto.BOOL), net.const(inside), net.const(outside)))


def causal(net: OnnxNet) -> str:
    return str(net.op("Add", chosen(0.0, -math.inf)(net), net.const(np.where(np.tri(TOKENS) > 0, 0.0, -1e9))))


def product(lowest: float, through: int | None = None) -> Callable[[OnnxNet], str]:
    """(1 - mask) * lowest; through: a type that the mask has in between."""

    def make(net: OnnxNet) -> str:
        mask = kept(net, through or onnx.TensorProto.FLOAT)
        mask = mask if through is None else net.op("Cast", mask, to=onnx.TensorProto.FLOAT)
        return str(net.op("Mul", net.op("Sub", net.const(1.0), mask), net.const(lowest)))

    return make


def summed(lowest: float) -> Callable[[OnnxNet], str]:
    return lambda net: str(net.op("Add", product(lowest)(net), net.const(NEARER)))


@pytest.mark.parametrize(
    ("make", "extra"),
    [
        pytest.param(chosen(0.0, LOWEST), ["mask"], id="selected"),
        pytest.param(causal, ["mask"], id="two masks"),
        pytest.param(product(-1e4, onnx.TensorProto.BOOL), ["mask"], id="product of truth"),
        pytest.param(product(-1e4), ["mask", "bias"], id="product of integers"),
        pytest.param(chosen(0.0, -100.0), ["mask", "bias"], id="weak"),
        pytest.param(chosen(NEARER, -math.inf), ["mask", "bias"], id="finite and infinite"),
        pytest.param(summed(-1e4), ["mask", "bias"], id="finite and -10000"),
        pytest.param(summed(LOWEST), ["mask", "bias"], id="finite and lowest"),
    ],
)
def test_computed_masks(make: Callable[[OnnxNet], str], extra: list[str], tmp_path: Path) -> None:
    """An integer mask may hold more than 0 and 1, so its product is a bias; a selection is none."""
    net = Transformer(3)
    x = net.norm(net.input("x", 1, TOKENS, WIDTH))
    path = net.save(tmp_path / "net.onnx", [net.norm(net.op("Add", net.attention(x, make(net)), x))])
    samples = [sample(i) for i in range(8)]
    integer = quantize(path, "native", samples, preset="fast").integer
    (found,) = [call[2]["extra"] for _, e in Graph.of(integer).bindings if (call := match_op(e)) and call[0] == "qc.attention"]
    assert found == extra
    reference, pairs = onnxruntime.InferenceSession(str(path)), []
    for s in (sample(i) for i in range(50, 56)):
        counts = int(s["mask"].sum())
        pairs.append([y[:, :counts] for y in (next(iter(interpreter.run(integer, s).values())), reference.run(None, s)[0])])
    assert sqnr_db(*(np.concatenate(side, axis=1) for side in zip(*pairs, strict=True))) > 25


def sample(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = (np.arange(TOKENS) < rng.integers(3, TOKENS + 1)).astype(np.int64)[None]
    return {"x": 3 * rng.standard_normal((1, TOKENS, WIDTH)).astype(np.float32), "mask": mask}
