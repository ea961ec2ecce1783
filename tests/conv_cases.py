"""Convolutions on random data, run by a row of x86 and compared with numerics.py bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from x86_emulation import build

from qcompiler.base.targets import Target
from qcompiler.numerics import operators as numerics
from qcompiler.numerics.spec import LIMITS
from qcompiler.schedules.conv import ConvRow
from qcompiler.schedules.harness import fetch, run_kernel, store
from qcompiler.schedules.table import KERNELS, Kernel, Layout, OpCall


def row_of(name: str, target: Target) -> ConvRow:
    return next(r for isa in target.rows for r in KERNELS[name] if r.isa == isa and type(r) is ConvRow)


@dataclasses.dataclass
class Case:
    """A convolution on random data. `pad` is [t, l, b, r] or one number; `out`: halo and pitch of the output."""

    image: tuple[int, int, int, int]
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pad: Any = 0
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    residual: bool = False
    storage: str = "uint8"
    attrs: dict[str, Any] = dataclasses.field(default_factory=dict)
    out: dict[str, Any] = dataclasses.field(default_factory=dict)
    scale: float = 1.0  # of the multipliers: large ones saturate nearly everything
    spare: tuple[int, int, int, int] = (0, 0, 0, 0)  # halo of the input beyond what the row needs, as another consumer may ask for
    extreme: bool = False  # inputs -128 and 127, weights -127 and 127
    residual_dtype: str = "int8"
    spread: float = 0  # weights have this standard deviation, as trained ones do, instead of being uniform

    def attributes(self) -> dict[str, Any]:
        pad = [self.pad] * 4 if isinstance(self.pad, int) else list(self.pad)
        attrs: dict[str, Any] = {"strides": list(self.stride), "padding": pad, "dilation": list(self.dilation), "groups": self.groups}
        attrs |= {"x_zero_point": -7, "zero_point": 5, "low": -128, "high": 127, "out_dtype": "int8"}
        if self.residual:
            attrs |= {"residual_zero_point": -3, "residual_multiplier": 1400, "residual_shift": 11}
        return attrs | self.attrs

    def convolve(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        a = self.attributes()
        return numerics.convolve(x, w, a["strides"], a["padding"], a["dilation"], a["groups"])

    def shape(self, w: np.ndarray) -> tuple[int, ...]:
        """Of the output."""
        return self.convolve(np.zeros(self.image), w).shape

    def run(self, target: Target, params: dict[str, Any] | None = None, seed: int = 0, row: ConvRow | None = None) -> Kernel:
        """Build and run, by the target's row for vectors if no other is given; the result must equal the reference in every bit."""
        rng, attrs = np.random.default_rng(seed), self.attributes()
        channels = self.image[3]
        shape = (self.outputs, *self.kernel, channels // self.groups)
        if self.extreme:
            x, w = rng.choice(np.array([-128, 127], np.int8), self.image), rng.choice(np.array([-127, 127], np.int8), shape)
        else:
            x, w = rng.integers(-128, 128, self.image).astype(np.int8), rng.integers(-127, 128, shape).astype(np.int8)
        if self.spread:
            w = np.clip(np.rint(rng.normal(0, self.spread, shape)), -127, 127).astype(np.int8)
        bias = rng.integers(-9000, 9000, self.outputs).astype(np.int32)
        typical = 70 * 74 * np.sqrt(w[0].size) * (2.0**-11 if self.residual else 1.0)
        multiplier = (self.scale * rng.uniform(20, 90, self.outputs) / typical).astype(np.float32)
        acc_shape = self.shape(w)
        dtype = self.storage if attrs["out_dtype"] == "int8" else attrs["out_dtype"]
        output = Layout(acc_shape, dtype, **self.out)
        operands: list[Any] = [Layout(self.image, "uint8"), w, bias, multiplier]
        low, high = LIMITS[self.residual_dtype]
        residual = rng.integers(low, high, acc_shape, endpoint=True).astype(self.residual_dtype) if self.residual else None
        if residual is not None:
            operands.append(Layout(acc_shape, "uint8" if self.residual_dtype == "int8" else self.residual_dtype, **self.out))
        op, row = OpCall("qc.conv2d", operands, attrs, output), row or row_of("qc.conv2d", target)
        assert row.refuse(op, target) is None
        need = row.needs(op, target)[0]
        pitch = -(-channels // need.pitch) * need.pitch
        halo = tuple(h + s for h, s in zip(need.halo, self.spare, strict=True))
        op.operands[0] = Layout(self.image, "uint8", halo, pitch if pitch != channels else 0)
        kernel, host = build(row, op, row.default(op, target) | (params or {}), target)
        inputs = [store(x, op.tensors[0], attrs["x_zero_point"])] + ([store(residual, op.tensors[1])] if residual is not None else [])
        got = fetch(run_kernel(kernel, inputs, output, host), output)
        want = numerics.conv2d(x, w, bias, multiplier, residual, **attrs)
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
        assert kernel.macs == acc_shape[0] * acc_shape[1] * acc_shape[2] * w.size
        return kernel


WIDE = {"out_dtype": "int16", "zero_point": 0, "low": -32768, "high": 32767}
STREAM = WIDE | {"residual_zero_point": 0, "residual_multiplier": 9000, "residual_shift": 14}
CASES = {
    "pointwise": Case((1, 8, 8, 32), 32),
    "pointwise-batch": Case((3, 5, 7, 16), 48),
    "one-pixel": Case((1, 1, 1, 64), 100),
    "three-channels": Case((1, 15, 13, 3), 17, (7, 7), (2, 2), 3),
    "one-channel": Case((2, 9, 9, 1), 8, (3, 3), pad=1),
    "ragged-5-24": Case((2, 9, 11, 5), 24, (3, 3), pad=1),
    "one-output": Case((1, 6, 5, 24), 1, (3, 3), pad=1),
    "strided": Case((1, 14, 14, 32), 40, (3, 3), (2, 2), 1),
    "strided-pointwise": Case((1, 14, 13, 16), 33, stride=(2, 2)),
    "asymmetric": Case((1, 12, 11, 8), 16, (2, 5), (1, 2), (0, 3, 1, 1)),
    "dilated": Case((1, 13, 12, 16), 20, (3, 3), pad=2, dilation=(2, 2)),
    "seven": Case((1, 7, 7, 64), 80, (3, 3), pad=1),
    "halo-spare": Case((2, 7, 7, 32), 36, (3, 3), pad=1, spare=(1, 0, 2, 3)),
    "halo-pointwise": Case((2, 7, 7, 32), 64, spare=(1, 1, 1, 1), residual=True),
    "halo-out": Case((2, 6, 9, 16), 20, (3, 3), pad=1, out={"halo": (1, 2, 1, 3), "pitch": 36}),
    "pitch-out": Case((1, 5, 6, 16), 3, out={"pitch": 4}),
    "residual": Case((1, 9, 9, 24), 64, residual=True),
    "residual-ragged": Case((2, 7, 6, 12), 37, (3, 3), pad=1, residual=True, out={"halo": (0, 1, 1, 0), "pitch": 40}),
    "residual-clamped": Case((1, 7, 7, 16), 16, residual=True, attrs={"low": 5, "high": 90}),
    "residual-overflow": Case((1, 4, 7, 16), 32, residual=True, scale=1e10),
    "clamped": Case((1, 7, 9, 16), 48, attrs={"low": -20, "high": 33}),
    "clamped-8": Case((1, 4, 4, 16), 8, attrs={"low": -20, "high": 33}),
    "clamped-2": Case((1, 6, 6, 16), 2, (3, 3), pad=1, attrs={"low": -20, "high": 33}),
    "signed-storage": Case((1, 7, 9, 16), 48, storage="int8", attrs={"low": -100}),
    "overflow": Case((1, 4, 7, 16), 32, scale=1e9),
    "bell": Case((1, 8, 9, 32), 48, (3, 3), pad=1, spread=30),
    "bell-ragged": Case((2, 7, 9, 11), 21, (3, 3), (2, 2), 1, spread=30, residual=True),
    "bell-grouped": Case((1, 9, 8, 64), 96, (3, 3), pad=1, groups=2, spread=30),
    "extreme": Case((1, 8, 8, 128), 48, (3, 3), pad=1, extreme=True, attrs={"x_zero_point": -128}),
    "extreme-zero": Case((1, 6, 8, 64), 17, extreme=True, attrs={"x_zero_point": 127, "zero_point": -128}),
    "no-offset": Case((1, 7, 9, 16), 48, attrs={"zero_point": -128}, scale=3.0),
    "no-offset-residual": Case((1, 7, 9, 16), 24, residual=True, attrs={"zero_point": -128, "high": 90}),
    "no-offset-signed": Case((1, 7, 9, 16), 48, storage="int8", attrs={"zero_point": 0}, scale=1e9),
    "float-out": Case((1, 5, 9, 20), 27, (3, 3), pad=1, attrs={"out_dtype": "float32"}),
    "float-out-clamped": Case((1, 5, 9, 20), 27, attrs={"out_dtype": "float32", "float_low": -3.0, "float_high": 11.5}),
    "int16": Case((1, 7, 9, 32), 48, (3, 3), pad=1, attrs=WIDE, scale=250),
    "int16-clamped": Case((1, 5, 9, 20), 27, attrs=WIDE | {"low": -900, "high": 20000}, scale=1e9),
    "int16-residual": Case((1, 9, 9, 24), 64, residual=True, residual_dtype="int16", attrs=STREAM, scale=2000),
    "int16-ragged": Case(
        (2, 7, 6, 12), 37, (3, 3), pad=1, residual=True, residual_dtype="int16", attrs=STREAM, scale=2000, out={"halo": (0, 1, 1, 0), "pitch": 40}
    ),
    "int16-overflow": Case((1, 4, 7, 16), 32, residual=True, residual_dtype="int16", attrs=STREAM, scale=1e12),
    "int16-bytes": Case((1, 7, 7, 16), 40, residual=True, attrs=WIDE | {"residual_multiplier": 1400000}, scale=250),
    "int16-shared": Case((1, 7, 9, 16), 24, residual=True, residual_dtype="int16", attrs={"residual_zero_point": 0, "residual_multiplier": 9}),
    "grouped": Case((1, 9, 8, 64), 96, (3, 3), pad=1, groups=2),
    "grouped-narrow": Case((1, 9, 8, 24), 36, (3, 3), (2, 2), 1, groups=6),
    "grouped-shared": Case((1, 7, 9, 96), 120, (3, 3), pad=1, groups=3),
    "grouped-ragged": Case((1, 5, 8, 10), 34, pad=0, groups=2),
    "depthwise": Case((1, 6, 8, 20), 20, (3, 3), pad=1, groups=20),
}
