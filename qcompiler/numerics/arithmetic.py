"""What every integer operator ends in: from an int32 number to an 8- or 16-bit one. docs/numerics.md, section 2, is normative."""

from __future__ import annotations

import numpy as np

from qcompiler.numerics.spec import LIMITS

Array = np.ndarray
F32 = np.float32


def limits(dtype: str, low: int | None, high: int | None) -> tuple[int, int]:
    """`low` and `high`, or the ends of what "int8" or "int16" holds where they are None."""
    least, most = LIMITS[dtype]
    return least if low is None else low, most if high is None else high


def to_int(value: Array, low: float, high: float) -> Array:
    """int32: float32 `value` clipped to [low, high], then rounded, ties to even."""
    return np.asarray(np.rint(np.clip(value, F32(low), F32(high))), np.int32)


def requantize(
    acc: Array, multiplier: Array | np.float32 | float, zero_point: int, low: int | None = None, high: int | None = None, dtype: str = "int8"
) -> Array:
    """int8 or int16: `int32(rint(clip(float32(acc) * multiplier, low - z, high - z))) + z`. low, high: the ends of `dtype` when None.

    One conversion, one multiplication, both rounded to nearest even; clipping while still float, because conversion of out-of-range floats differs
    between machines; rint to even. acc: integers in int32; multiplier: float32, broadcast.
    """
    least, most = limits(dtype, low, high)
    scaled = np.asarray(acc).astype(np.int32).astype(F32) * np.asarray(multiplier, F32)
    return (to_int(scaled, least - zero_point, most - zero_point) + np.int32(zero_point)).astype(dtype)
