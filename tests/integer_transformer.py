"""A BERT of two layers as an integer module, made by hand from a float one in numpy: token ids to logits, nothing in between in float."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm

from qcompiler.numerics import constants, spec
from qcompiler.numerics.spec import QParams
from qcompiler.passes.graph import GraphBuilder, const, make_op, shape_of

WIDTH, HEADS, HIDDEN, WORDS, ROWS, LENGTH, CLASSES = 48, 3, 80, 40, 2, 11, 7
NORM_EPSILON = 1e-6


@dataclass
class Value:
    """An integer tensor of the module, the real numbers it stands for, and their scale (or one per channel)."""

    expr: Any
    real: np.ndarray
    scale: Any
    zero_point: int = 0


@dataclass
class Net:
    """Emits operators and computes their float forms side by side; ranges are those of the sample itself."""

    rng: np.random.Generator
    b: GraphBuilder = field(default_factory=GraphBuilder)

    def emit(self, name: str, op: str, tensors: list[Any], attrs: dict[str, Any], real: np.ndarray, params: QParams | None) -> Value:
        dtype = params.dtype if params else "float32"
        args = [const(t) if isinstance(t, np.ndarray) else t for t in tensors]
        expr = self.b.emit(name, make_op(op, args, attrs, real.shape, dtype))
        return Value(expr, real, params.scale if params else 1.0, params.zero_point if params else 0)

    def embedding(self, name: str, ids: Any, tokens: np.ndarray) -> Value:
        table = self.rng.standard_normal((WORDS, WIDTH)) * self.rng.uniform(0.3, 3, (WORDS, 1))
        scales = np.abs(table).max(axis=1) / 127
        y = symmetric(table, "int16")
        stored = np.rint(table / scales[:, None]).astype(np.int8)
        rows = constants.requantize_multiplier(1.0, y.scale / scales)
        return self.emit(name, "qc.gather", [stored, ids, rows], {"out_dtype": "int16"}, table[tokens], y)

    def narrowed(self, name: str, x: Value) -> Value:
        """8 bits with a scale per channel."""
        scales = np.abs(x.real).reshape(-1, WIDTH).max(axis=0) / 127
        m = constants.requantize_multiplier(x.scale, scales)
        made = self.emit(name, "qc.requantize", [x.expr, m], {"x_zero_point": 0, "zero_point": 0}, x.real, QParams(1.0, 0))
        return Value(made.expr, x.real, scales)

    def dense(self, name: str, x: Value, outputs: int, dtype: str, residual: Value | None = None, scales: np.ndarray | None = None) -> Value:
        """`scales` of the output's channels, in units of the one scale of its value (None: all 1)."""
        w = self.rng.standard_normal((outputs, x.real.shape[-1])) / math.sqrt(x.real.shape[-1])
        bias = self.rng.standard_normal(outputs) * 0.1
        real = x.real @ w.T + bias + (residual.real if residual else 0)
        y = symmetric(real, dtype) if dtype != "float32" else None
        folded = w * x.scale
        units = np.abs(folded).max(axis=1) / 127
        stored = np.rint(folded / units[:, None]).astype(np.int8)
        attrs: dict[str, Any] = {"x_zero_point": x.zero_point, "zero_point": 0, "out_dtype": dtype}
        shift = None
        if residual and y:
            factor, shift = spec.residual_parameters(residual.scale, y.scale, "int16", dtype)
            attrs |= {"residual_zero_point": 0, "residual_multiplier": factor, "residual_shift": shift}
        scale = None if y is None else y.scale
        m = spec.conv_multiplier(1.0, units / (1 if scales is None else scales), scale, shift)
        tensors = [x.expr, stored, np.rint(bias / units).astype(np.int32), m]
        return self.emit(name, "qc.dense", tensors + ([residual.expr] if residual else []), attrs, real, y)

    def attention(self, name: str, x: Value, lengths: Any, counts: np.ndarray) -> Value:
        """q, k and v are one tensor; each head of each has a scale of its own."""
        state = self.rng.bit_generator.state
        packed = self.dense(f"{name}~trial", x, 3 * WIDTH, "int8")  # its real values, for the scales; nothing reads it
        heads = np.abs(packed.real).reshape(-1, 3 * HEADS, WIDTH // HEADS).max(axis=(0, 2)) / np.abs(packed.real).max()
        self.rng.bit_generator.state = state
        channels = heads.repeat(WIDTH // HEADS)
        packed = self.dense(f"{name}~qkv", x, 3 * WIDTH, "int8", scales=channels)
        q, k, v = (p.reshape(ROWS, LENGTH, HEADS, -1) for p in np.split(packed.real, 3, axis=-1))
        scale = 1 / math.sqrt(WIDTH // HEADS)
        logits = np.einsum("bshd,bthd->bhst", q, k) * scale + np.where(np.arange(LENGTH) < counts[:, None], 0.0, -np.inf)[:, None, None]
        e = np.exp(logits - logits.max(-1, keepdims=True))
        real = np.einsum("bhst,bthd->bshd", e / e.sum(-1, keepdims=True), v).reshape(ROWS, LENGTH, WIDTH)
        y = symmetric(real, "int8")
        q_scale, k_scale, v_scale = np.split(heads * packed.scale, 3)
        m, c = constants.attention_multipliers(scale, q_scale, k_scale, v_scale, y.scale, HEADS)
        size = WIDTH // HEADS
        attrs = {"heads": HEADS, "kv_heads": HEADS, "size": size, "value_size": size, "columns": [0, WIDTH, 2 * WIDTH], "zero_points": [0, 0, 0]}
        attrs |= {"extra": ["lengths"], "causal": None, "zero_point": 0, "low": -128, "high": 127, "out_dtype": "int8"}
        return self.emit(name, "qc.attention", [packed.expr] * 3 + [m, c, lengths], attrs, real, y)

    def norm(self, name: str, x: Value) -> Value:
        gamma, beta = self.rng.uniform(0.5, 1.5, WIDTH), self.rng.standard_normal(WIDTH) * 0.2
        centered = x.real - x.real.mean(-1, keepdims=True)
        real = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + NORM_EPSILON) * gamma + beta
        y = symmetric(real, "int16")
        gain, shift, epsilon = constants.layer_norm_parameters(gamma, beta, NORM_EPSILON, x.scale, y.scale)
        return self.emit(name, "qc.layer_norm", [x.expr, gain, shift], {"epsilon": epsilon, "zero_point": 0, "out_dtype": "int16"}, real, y)

    def gelu(self, name: str, x: Value) -> Value:
        real = gelu(x.real)
        y = QParams.from_range(float(real.min()), float(real.max()))
        table, attrs = constants.lut16(gelu, x.scale, y)
        return self.emit(name, "qc.lut16", [x.expr, table], attrs, real, y)


def symmetric(real: np.ndarray, dtype: str) -> QParams:
    return QParams.from_range(float(real.min()), float(real.max()), symmetric=True, dtype=dtype)


def gelu(x: np.ndarray) -> np.ndarray:
    return np.asarray(x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))))


def transformer(seed: int = 0) -> tuple[tvm.IRModule, dict[str, np.ndarray], np.ndarray]:
    """(module, inputs, the logits in float64)."""
    net = Net(np.random.default_rng(seed))
    tokens, counts = net.rng.integers(0, WORDS, (ROWS, LENGTH)), np.array([LENGTH, 6])
    ids, lengths = net.b.input("ids", tokens.shape, "int64"), net.b.input("lengths", counts.shape, "int32")
    x = net.norm("embedded", net.embedding("words", ids, tokens))
    for i in range(2):
        x8 = net.narrowed(f"x8_{i}", x)
        mixed = net.attention(f"attention_{i}", x8, lengths, counts)
        h = net.norm(f"h_{i}", net.dense(f"projected_{i}", mixed, WIDTH, "int16", residual=x))
        up = net.dense(f"up_{i}", net.narrowed(f"h8_{i}", h), HIDDEN, "int16")
        x = net.norm(f"x_{i}", net.dense(f"down_{i}", net.gelu(f"gelu_{i}", up), WIDTH, "int16", residual=h))
    y = symmetric(x.real.mean(1), "int8")
    ratio = {"axes": [1], "keepdims": False, "x_zero_point": 0, "ratio": float(np.float64(x.scale) / y.scale), "zero_point": 0, "low": -128, "high": 127}
    pooled = net.emit("pooled", "qc.mean", [x.expr], ratio, x.real.mean(1), y)
    logits = net.dense("logits", pooled, CLASSES, "float32")
    assert shape_of(logits.expr) == logits.real.shape
    return net.b.finish([("logits", logits.expr), ("hidden", x.expr)]), {"ids": tokens, "lengths": counts.astype(np.int32)}, logits.real
