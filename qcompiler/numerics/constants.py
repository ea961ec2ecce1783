"""The constants of a transformer's integer operators, made when a network is compiled, and the arithmetic's fixed tables (numpy only).

docs/numerics.md, sections 4 and 8 to 10, is normative. Everything is computed in float64 or integers, so every machine makes the same constants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from qcompiler.numerics.spec import FLOAT32_MAX, INT32_MAX, LIMITS, QParams

NORM_BITS = 8  # of fractions of an output step, between a normalization's products and its sum
NORM_LIMIT = 2**29  # of each addend of that sum
MAX_NORMALIZED = 2**15  # channels: N * q - sum(q) fits int32
MAX_KEYS = 2**15  # of an attention: 255 * 255 * T fits int32
MAX_BIAS = 2.0**29  # of a bias in units of q . k: beyond any logit
MAX_LOGIT = 2**30  # of q . k + bias: a difference of two fits int32
EPSILON_BOUNDS = 2.0**-60, 2.0**100  # keeps 1 / sqrt(V + epsilon) finite and normal
THRESHOLDS = 64  # of the rounding of exponentials, in turn


@dataclass(frozen=True)
class Exponential:
    """`one * exp(-index / steps)` in 15 bits, as the product of two short tables: index = coarse * 2^fine_bits + fine. The last coarse entry is 0."""

    coarse_bits: int
    fine_bits: int
    steps: float
    one: int

    @property
    def last(self) -> int:
        """The greatest index."""
        return (1 << (self.coarse_bits + self.fine_bits)) - 1

    @cached_property
    def coarse(self) -> np.ndarray:
        """int16."""
        entries = np.rint(self.one * np.exp(-(2**self.fine_bits) * np.arange(2**self.coarse_bits) / self.steps))
        entries[-1] = 0
        return np.asarray(entries, np.int16)

    @cached_property
    def fine(self) -> np.ndarray:
        """int16."""
        return np.asarray(np.rint(32767 * np.exp(-np.arange(2**self.fine_bits) / self.steps)), np.int16)

    @cached_property
    def table(self) -> np.ndarray:
        """int32: the exponential of every index."""
        index = np.arange(self.last + 1)
        product = self.coarse.astype(np.int32)[index >> self.fine_bits] * self.fine.astype(np.int32)[index & (2**self.fine_bits - 1)]
        return np.asarray((product + 2**14) >> 15, np.int32)

    def index(self, distance: np.ndarray, multiplier: np.ndarray | np.float32) -> np.ndarray:
        """int32: `rint(clip(float32(distance) * multiplier, 0, last))`, for distances >= 0 in int32."""
        with np.errstate(over="ignore"):
            scaled = distance.astype(np.int32).astype(np.float32) * multiplier
        return np.asarray(np.rint(np.clip(scaled, np.float32(0), np.float32(self.last))), np.int32)


ATTENTION = Exponential(5, 5, 100.0, 32641)  # e(0) = 255 * 128, e = 0 from 9.92 on
SOFTMAX = Exponential(6, 6, 350.0, 32767)  # e = 0 from 11.52 on


def thresholds(keys: int) -> np.ndarray:
    """int32 [keys]: what is added to the exponential of key j before its last 7 bits are dropped, the odd numbers to 127 by the reversed bits of j mod 64."""
    reversed_bits = sum(((np.arange(THRESHOLDS) >> i) & 1) << (5 - i) for i in range(6))
    return np.asarray(2 * reversed_bits + 1, np.int32)[np.arange(keys) % THRESHOLDS]


def _float32(value: np.ndarray | float) -> np.ndarray:
    """The nearest float32, or the greatest where that is infinite."""
    return np.clip(np.asarray(value, np.float64), -FLOAT32_MAX, FLOAT32_MAX).astype(np.float32)


def layer_norm_parameters(
    gamma: np.ndarray, beta: np.ndarray | None, epsilon: float, x_scale: float, y_scale: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray, float]:
    """(gain float32 [N], shift int32 [N], epsilon) of `qc.layer_norm`: real gamma, beta [N], the operator's epsilon; y_scale: one scale, or one per channel.

    Raises ValueError for more than 32768 channels.
    """
    return _norm(gamma, beta, epsilon * np.float64(gamma.size) ** 2 / np.float64(x_scale) ** 2, 1.0, y_scale)


def rms_norm_parameters(
    gamma: np.ndarray, beta: np.ndarray | None, epsilon: float, x_scale: float, y_scale: np.ndarray | float
) -> tuple[np.ndarray, np.ndarray, float]:
    """(gain, shift, epsilon) of `qc.rms_norm`, as `layer_norm_parameters`."""
    return _norm(gamma, beta, epsilon * gamma.size / np.float64(x_scale) ** 2, float(np.sqrt(gamma.size)), y_scale)


def _norm(gamma: np.ndarray, beta: np.ndarray | None, epsilon: float, factor: float, y_scale: np.ndarray | float) -> tuple[np.ndarray, np.ndarray, float]:
    if gamma.size > MAX_NORMALIZED:
        raise ValueError(f"a normalization over {gamma.size} channels; supported: up to {MAX_NORMALIZED}")
    unit = 2.0**NORM_BITS / np.broadcast_to(np.asarray(y_scale, np.float64), gamma.shape)
    shift = np.zeros(gamma.shape) if beta is None else np.asarray(beta, np.float64) * unit
    shift = np.rint(np.clip(shift, -NORM_LIMIT, NORM_LIMIT)).astype(np.int32)
    return _float32(np.asarray(gamma, np.float64) * factor * unit), shift, float(np.float32(np.clip(epsilon, *EPSILON_BOUNDS)))


def softmax_parameters(x_scale: float, y: QParams) -> dict[str, float | int | str]:
    """Attributes of `qc.softmax`: multiplier, steps, zero_point, out_dtype. Outputs are commonly of scale 1/256 and zero point -128, or 1/32768."""
    return {
        "multiplier": float(_float32(np.float64(x_scale) * SOFTMAX.steps)),
        "steps": float(_float32(1 / np.float64(y.scale))),
        "zero_point": y.zero_point,
        "out_dtype": y.dtype,
    }


def attention_multipliers(
    scale: float, q_scale: np.ndarray | float, k_scale: np.ndarray | float, v_scale: np.ndarray | float, y_scale: np.ndarray | float, heads: int
) -> tuple[np.ndarray, np.ndarray]:
    """(multiplier, out_multiplier) float32 [heads] of `qc.attention`: `scale` multiplies q . k; each of the others is one scale, or one per head."""
    logits = np.float64(scale) * np.asarray(q_scale, np.float64) * np.asarray(k_scale, np.float64) * ATTENTION.steps
    outputs = np.asarray(v_scale, np.float64) / np.asarray(y_scale, np.float64)
    made = _float32(np.broadcast_to(logits, (heads,))), _float32(np.broadcast_to(outputs, (heads,)))
    return np.ascontiguousarray(made[0]), np.ascontiguousarray(made[1])


def attention_bias(bias: np.ndarray, multiplier: np.ndarray) -> np.ndarray:
    """int32, of the shape of the real `bias` [B', 1 or heads, 1 or S, T] (1 only where all heads have one multiplier), in units of q . k; to be used with
    bias_multipliers [1].

    Clipped to [-2^29, 2^29]: what a mask adds as -inf, or the least float32, is far beyond any logit there. Raises ValueError where heads differ.
    """
    unit = np.asarray(multiplier, np.float64).reshape(-1, 1, 1) / ATTENTION.steps
    if bias.shape[1] == 1 and (unit != unit[0]).any():
        raise ValueError("a bias for all heads needs one multiplier for all heads; repeat it per head")
    unit = unit[: bias.shape[1]]
    return np.rint(np.clip(np.asarray(bias, np.float64) / unit, -MAX_BIAS, MAX_BIAS)).astype(np.int32)


def attention_bound(size: int, zero_points: Sequence[int], bias: int = 0) -> int:
    """The greatest |q . k + bias| of int8 q and k with `size` channels and these zero points, where no |bias| (times its multiplier) is above `bias`."""
    q, k = (max(127 - z, z + 128) for z in zero_points)
    return size * q * k + bias


def attention_fault(shapes: Sequence[Sequence[int]], attrs: Mapping[str, Any]) -> str | None:
    """Why `qc.attention` with operands of these shapes and these attributes has no meaning, or would leave int32; None where it is sound."""
    (q, k, v, m, c), extras = shapes[:5], dict(zip(attrs.get("extra", ()), shapes[5:], strict=False))
    heads, groups, size, value_size = (int(attrs[name]) for name in ("heads", "kv_heads", "size", "value_size"))
    if not len(q) == len(k) == len(v) == 3 or not q[0] == k[0] == v[0] or k[1] != v[1]:
        return f"queries {list(q)}, keys {list(k)} and values {list(v)} must be [B, S, ...], [B, T, ...] and [B, T, ...]"
    if groups < 1 or heads % groups:
        return f"{heads} heads can't share {groups} heads of keys: the one must be a multiple of the other"
    for what, shape, first, width in zip(
        ("queries", "keys", "values"), (q, k, v), attrs["columns"], (heads * size, groups * size, groups * value_size), strict=True
    ):
        if first < 0 or first + width > shape[2]:
            return f"{what} are columns {first} to {first + width - 1} of a tensor with {shape[2]}"
    if list(m) != [heads] or list(c) != [heads]:
        return f"multipliers have shapes {list(m)} and {list(c)}; there must be one per head, {heads}"
    if not 1 <= k[1] <= MAX_KEYS:
        return f"{k[1]} keys; supported: 1 to {MAX_KEYS}"
    if attention_bound(size, attrs["zero_points"][:2]) > MAX_LOGIT // 2:
        return f"q . k of {size} channels may leave int32; supported: up to {MAX_LOGIT // 2 // 255**2}"
    if len(extras) != len(shapes) - 5 or len(extras) != len(attrs.get("extra", ())) or not set(extras) <= {"bias", "mask", "lengths"}:
        return f"{len(shapes) - 5} operands follow, named {list(attrs.get('extra', ()))}; supported: bias, mask, lengths, each at most once"
    for name, shape in extras.items():
        wanted = [q[0]] if name == "lengths" else ["a divisor of the batch", f"1 or {heads}", f"1 or {q[1]}", k[1]]
        fits = list(shape) == [q[0]] if name == "lengths" else len(shape) == 4 and _broadcast(shape, (q[0], heads, q[1], k[1]))
        if not fits:
            return f"the operand '{name}' is {list(shape)}; wanted: {wanted}"
    if "bias" in extras and len(attrs.get("bias_multipliers", ())) not in (1, heads):
        return f"a bias needs one multiplier, or one per head ({heads}); it has {len(attrs.get('bias_multipliers', ()))}"
    return None


def _broadcast(shape: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether [B', 1 or H, 1 or S, T] fits [B, H, S, T]."""
    return shape[0] > 0 and whole[0] % shape[0] == 0 and all(a in (1, b) for a, b in zip(shape[1:3], whole[1:3], strict=True)) and shape[3] == whole[3]


def lut16(function: Callable[[np.ndarray], np.ndarray], x_scale: float, y: QParams, bits: int = 10) -> tuple[np.ndarray, dict[str, int | str]]:
    """(table int16 [2^bits + 1], attributes) of `qc.lut16` for `function` of int16 numbers with x_scale.

    Entry i is `function(x_scale * (i * 2^(16 - bits) - 32768))` in units of 2^-extra output steps, so that the largest fits; NaN gives real 0, infinities
    saturate. Raises ValueError for bits beyond 1 to 12.
    """
    if not 1 <= bits <= 12:
        raise ValueError(f"a table of 2^{bits} pieces; supported: 2^1 to 2^12")
    with np.errstate(all="ignore"):
        real = np.asarray(function(np.float64(x_scale) * (np.arange(2**bits + 1) * 2.0 ** (16 - bits) - 2**15)), np.float64)
    low, high = LIMITS[y.dtype]
    steps = np.clip(np.where(np.isnan(real), 0.0, real) / y.scale, low - y.zero_point - 0.5, high - y.zero_point + 0.5)
    extra = 0
    while extra < 7 and np.abs(steps).max() * 2 ** (extra + 1) <= 32767:
        extra += 1
    table = np.clip(np.rint(steps * 2**extra), -32768, 32767).astype(np.int16)
    return table, {"shift": 16 - bits + extra, "zero_point": y.zero_point, "out_dtype": y.dtype}


def requantize_multiplier(x_scale: float, y_scale: np.ndarray | float) -> np.ndarray:
    """float32 [1], or [C] for scales per channel of the last axis: the multiplier of `qc.requantize` and (with scales per row) of `qc.gather`."""
    return np.atleast_1d(_float32(np.float64(x_scale) / np.asarray(y_scale, np.float64)))


def bias_multipliers(bias_scale: float, largest: int, multiplier: np.ndarray) -> list[int]:
    """One integer per head: a computed bias of `bias_scale`, no integer of which is beyond `largest`, in units of q . k.

    Raises ValueError where the products leave 2^29, so that the sum could leave int32.
    """
    factors = [round(float(bias_scale) * ATTENTION.steps / float(m)) for m in multiplier]
    if max(factors) * largest > (INT32_MAX + 1) // 4:
        raise ValueError(f"a bias of scale {bias_scale} is too large beside the logits")
    return factors
