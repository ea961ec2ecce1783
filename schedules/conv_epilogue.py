"""What follows the accumulators of a convolution: as a description that decides the code, and as the constants that the code reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.builder import splat
from qcompiler.schedules.isa import Isa, load

FLOAT_MAX = 3.4028234663852886e38


def by_sign(number: Any, positive: Any, negative: Any, lanes: int) -> Any:
    """`positive`, or `negative` where an int32 vector is below 0."""
    return T.Select(number < splat(T.int32(0), lanes), negative, positive)


@dataclass(frozen=True)
class Epilogue:
    """What follows the accumulator. `output`: "uint8", "int8", "int16" or "float32" storage; `exact_range`: |acc * multiplier| < 2^30 is proven; `offset`:
    an 8-bit output is stored with one (0 is that of most rectified values in uint8); `bends`: what has a multiplier of its own where it is negative, the
    "accumulator" or the "sum" with the residual, or nothing.

    A clamp is emitted only where flagged: without one, 8-bit outputs still saturate when they are packed; those of 16 bits are always clamped.
    """

    output: str
    residual: bool
    clamp_low: bool
    clamp_high: bool
    exact_range: bool
    offset: bool = False
    bends: str = ""

    @property
    def packed(self) -> bool:
        return self.output in ("uint8", "int8")


class Parameters:
    """The constant with what layers of equal code differ in, as int32 words: vectors, which serve as memory operands, then scalars.

    Vectors: the offset added before the 8-bit saturation (int16 lanes), the clamp's low and high in storage (byte lanes). Scalars: the
    residual's multiplier and constant (int32), its 2^-shift, and the bounds of a float or 16-bit output (float32); then two zeros.
    """

    def __init__(self, isa: Isa) -> None:
        self.isa, self.zero = isa, 3 * isa.lanes + 5

    def array(
        self,
        clamp: tuple[int, int, int] = (0, 0, 0),  # offset, low, high
        residual: tuple[int, int, float] = (0, 0, 0.0),  # multiplier, constant, scale
        bounds: tuple[float, float] = (-FLOAT_MAX, FLOAT_MAX),
    ) -> np.ndarray:
        n, (offset, low, high), (multiplier, constant, scale) = self.isa.bytes, clamp, residual
        vectors: list[np.ndarray] = [np.full(n // 2, offset, np.int16), np.full(n, low & 255, np.uint8), np.full(n, high & 255, np.uint8)]
        scalars: list[np.ndarray] = [np.array([multiplier, constant], np.int32), np.array([scale, *bounds], np.float32), np.zeros(2, np.int32)]
        return np.concatenate([v.view(np.int32) for v in vectors + scalars])

    def declare(self, pointer: Any) -> None:
        size = 4 * (self.zero + 2)
        types = ("int32", "float32", "int16", "uint8", "int8")
        self.views = {t: T.decl_buffer((size // np.dtype(t).itemsize,), t, data=pointer) for t in types}

    def offset(self) -> Any:
        return load(self.views["int16"], 0, self.isa.bytes // 2)

    def bound(self, which: str, dtype: str) -> Any:
        return load(self.views[dtype], self.isa.bytes * (1 if which == "low" else 2), self.isa.bytes)

    def word(self, name: str) -> Any:
        index = 3 * self.isa.lanes + ["multiplier", "constant", "scale", "low", "high"].index(name)
        return T.broadcast(self.views["int32" if name in ("multiplier", "constant") else "float32"][index], self.isa.lanes)
