"""Weights in 8 or 4 bits beside float32 activations: for layers whose time goes into reading weights.

A row of a weight [N, K] is cut into groups of `group_size` along K (the last one may be shorter); each group has a scale and a zero point:

    w = f32(f32(q - z) * s)

q and z lie in [-2^(bits-1), 2^(bits-1) - 1]; symmetric schemes have z = 0. Of a few scales that clip the largest weights more or less, each group takes the
one with the least squared error (docs/numerics.md, "Weights alone").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler.base.errors import ModelError, PlanError

BITS = {"int8": 8, "int4": 4}
GROUP_SIZE = 64
UNIT = 8  # group sizes are multiples of it
_SHRUNK = {8: (1.0,), 4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}  # fractions of a group's range that compete


@dataclass(frozen=True)
class WeightScheme:
    """How weights are stored: 8 or 4 bits, weights per scale, and whether a zero point goes with the scale."""

    bits: int
    group_size: int = GROUP_SIZE
    symmetric: bool = True

    @staticmethod
    def of(weights: str, group_size: int | None = None, asymmetric: bool = False) -> WeightScheme:
        """From the options of `compile`. Raises PlanError for what no kernel computes."""
        if weights not in BITS:
            raise PlanError(f"weights can't be stored as '{weights}'; supported: {', '.join(BITS)}")
        size = GROUP_SIZE if group_size is None else group_size
        if isinstance(size, bool) or not isinstance(size, int) or size < UNIT or size % UNIT:
            raise PlanError(f"a group of {size} weights is not supported; a group size is a multiple of {UNIT}, {UNIT} or larger (32, 64 and 128 are usual)")
        return WeightScheme(BITS[weights], size, not asymmetric)

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return -self.lowest - 1

    def groups(self, inputs: int) -> int:
        """Groups in a row of `inputs` weights."""
        return -(-inputs // self.group_size)

    def size(self, outputs: int, inputs: int) -> int:
        """Bytes of a weight with its scales and zero points, before kernels pad it."""
        return outputs * (-(-inputs * self.bits // 8) + self.groups(inputs) * (4 if self.symmetric else 5))


@dataclass(frozen=True)
class GroupedWeight:
    """q: int8 [N, K]. zero_point: int8 [N, G]. scale: float32 [N, G], positive."""

    scheme: WeightScheme
    q: np.ndarray
    zero_point: np.ndarray
    scale: np.ndarray

    def real(self) -> np.ndarray:
        """The float32 weights [N, K] that the network computes with."""
        inputs = self.q.shape[1]
        size = min(self.scheme.group_size, inputs)  # of the only group, where it is shorter
        zero, scale = (np.repeat(a, size, axis=1)[:, :inputs] for a in (self.zero_point, self.scale))
        return np.asarray((self.q.astype(np.float32) - zero.astype(np.float32)) * scale, np.float32)


def quantize_weight(weight: np.ndarray, scheme: WeightScheme, name: str = "") -> GroupedWeight:
    """Quantize float weights [N, K]; `name` is for messages. Raises ModelError for weights that are not finite."""
    if not np.isfinite(weight).all():
        raise ModelError(f"dense '{name}': its weights are not finite; export the model again")
    outputs, inputs = weight.shape
    groups, size = scheme.groups(inputs), min(scheme.group_size, max(inputs, 1))
    padded = np.zeros((outputs, groups * size))
    padded[:, :inputs] = weight
    w = padded.reshape(outputs, groups, size)
    best: tuple[np.ndarray, ...] | None = None
    for fraction in _SHRUNK[scheme.bits]:
        scale, zero = _parameters(w, scheme, fraction)
        lowest = -scheme.highest if scheme.symmetric and scheme.bits == 8 else scheme.lowest
        q = np.clip(np.rint(w / scale[..., None]) + zero[..., None], lowest, scheme.highest)
        error = np.square((q - zero[..., None]) * scale[..., None] - w).sum(axis=-1)
        if best is None:
            best = (error, q, zero, scale)
        else:
            better = error < best[0]
            best = tuple(np.where(better[..., None] if new.ndim == 3 else better, new, old) for new, old in zip((error, q, zero, scale), best, strict=True))
    assert best is not None
    _, q, zero, scale = best
    return GroupedWeight(scheme, q.reshape(outputs, -1)[:, :inputs].astype(np.int8), zero.astype(np.int8), scale.astype(np.float32))


def _parameters(w: np.ndarray, scheme: WeightScheme, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(scale, zero point) of every group, when `fraction` of its range is represented. Scales are normal float32 numbers, and no weight overflows."""
    low, high = fraction * np.minimum(w.min(axis=-1), 0), fraction * np.maximum(w.max(axis=-1), 0)
    steps = scheme.highest if scheme.symmetric else scheme.highest - scheme.lowest
    scale = (np.maximum(-low, high) if scheme.symmetric else high - low) / steps
    limits = np.finfo(np.float32)
    largest = np.nextafter(np.float32(float(limits.max) / (steps + 1)), np.float32(0))  # |q - z| is at most steps + 1
    scale = np.where(scale > 0, np.clip(scale, limits.tiny, largest), 1.0).astype(np.float32).astype(np.float64)
    if scheme.symmetric:
        return scale, np.zeros(scale.shape)
    return scale, np.clip(np.rint(scheme.lowest - low / scale), scheme.lowest, scheme.highest)


def weight_row(name: str, weight: np.ndarray, grouped: GroupedWeight) -> dict[str, Any]:
    """What the manifest says of one layer: shape, bytes in float32 and as stored, and the weights' signal-to-noise ratio in dB (null: exact)."""
    outputs, inputs = weight.shape
    noise, signal = float(np.square(grouped.real() - np.float64(weight)).sum()), float(np.square(np.float64(weight)).sum())
    sqnr = round(10 * float(np.log10(signal / noise)), 2) if noise > 0 and signal > 0 else None
    return {"id": name, "shape": [outputs, inputs], "float_bytes": 4 * outputs * inputs, "bytes": grouped.scheme.size(outputs, inputs), "sqnr_db": sqnr}


def weight_account(scheme: WeightScheme, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's entry `weights`."""
    return {"dtype": scheme.name, "group_size": scheme.group_size, "symmetric": scheme.symmetric, "layers": rows}


def heading(account: Mapping[str, Any]) -> str:
    rows = account["layers"]
    stored, real = sum(r["bytes"] for r in rows), sum(r["float_bytes"] for r in rows)
    kind = "symmetric" if account["symmetric"] else "asymmetric"
    return f"weights as {account['dtype']}, {kind}, groups of {account['group_size']}: {len(rows)} layers, {stored} bytes of {real} in float32"
