"""ARM vector ISAs as facts: registers, costs, and the instructions of a dot step and of the epilogue. Vectors have 128 bits, storage is int8.

Activations are loaded 16 bytes at a time and multiplied by element: lane i of a register with x[k .. k+15] holds dot step i, so a step costs
no instruction for its activations (a broadcasting load, LD1R, would occupy a vector unit as well).

    "mmla"   SMMLA, 2 pixels x 2 channels x 8: an accumulator is [p0 c0, p0 c1, p1 c0, p1 c1]; ZIP1 and ZIP2 tie and untie pixels.
    "dot"    SDOT, 4 channels x 4.
    "mull"   SMULL, SMLAL (int8 products, two of them summed in int16), SADALP. Exact because weights lie in [-127, 127]:
             |x0 w0 + x1 w1| <= 2 * 128 * 127 = 32512 < 2^15.
    "fma"    float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.isa import Isa, call, demand, guessed, load, scalar, shuffle


@dataclass(frozen=True, kw_only=True)
class Arm(Isa):
    """`kind`: see above; `wide`: 64-bit ARM (AArch64), else ARMv7 NEON."""

    kind: str
    wide: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        demand(
            self.name,
            {
                "a vector has 128 bits": self.lanes == 4,
                "AArch64 has 32 registers and ARMv7 16": self.registers == (32 if self.wide else 16),
                "the kind is known and takes that many channels": {"mmla": 8, "dot": 4, "mull": 4, "fma": 1}.get(self.kind) == self.group,
                "only AArch64 has SDOT and SMMLA": self.wide or self.kind in ("mull", "fma"),
            },
        )

    @property
    def is_float(self) -> bool:
        return self.kind == "fma"

    @property
    def input_dtype(self) -> str:
        return "float32" if self.is_float else "int8"

    @property
    def span(self) -> int:
        return 4 if self.is_float else 16 // self.group

    @property
    def pixels(self) -> int:
        return 2 if self.kind == "mmla" else 1

    def fits(self, pixels: int, blocks: int) -> bool:
        """Accumulators, 16 bytes of each pixel, the weights of a step and temporaries. LLVM spreads elements for "mull" early: 8 half registers
        for 16 bytes."""
        pixels += pixels % self.pixels
        if self.kind == "mull":
            return pixels * (blocks + (8 if self.wide else 3)) + self.scratch_registers <= self.registers
        weights = blocks * (2 if self.kind == "mmla" else 1)
        return pixels * (blocks + 1) + weights + self.scratch_registers <= self.registers

    def refuse(self, pixels: int, inputs: int, weight: np.ndarray) -> str | None:
        if self.kind == "mmla" and (pixels < 2 or inputs < 8):
            return f"the matrix instruction works on 2 pixels and 8 channels; this operator has {pixels} and {inputs}."
        if self.kind == "mull" and bool((weight == -128).any()):
            return "a weight is -128, and sums of two products are exact in int16 for weights in [-127, 127] only."
        return None

    def step_cycles(self, pixels: int, blocks: float, streamed: bool) -> float:
        """As `Isa`. "mmla" ties pairs of pixels, and "mull" spreads elements, in the units that multiply."""
        whole = pixels + pixels % self.pixels
        dots = whole * blocks * self.dot_cost
        if self.kind == "mmla":
            dots += whole / 2 * self.dot_cost
        elif self.kind == "mull":
            dots += whole * self.dot_cost / 2
        return max(dots, whole * self.broadcast_cost + blocks * self.weight_cost, self.latency)

    # -- operands -----------------------------------------------------------------------------------------------------------------------

    def pack_weights(self, groups: np.ndarray) -> np.ndarray:
        """As `Isa`: "mull" wants channels 0 and 1 of every lane, then 2 and 3; the others want a lane's group together."""
        outer = groups.shape[:-2]
        if self.kind == "mull":
            groups = np.stack([groups[..., 0:2], groups[..., 2:4]], axis=-3)
        return groups.reshape(*outer, -1)

    def weights(self, buffer: Any, index: Any) -> list[Any]:
        if self.is_float:
            return [T.bind(load(buffer, index, 4))]
        if self.kind == "mull" and self.wide:  # taking the upper half of a register would cost an instruction
            return [T.bind(load(buffer, index + 8 * i, 8)) for i in (0, 1)]
        if self.kind == "mull":
            whole = T.bind(load(buffer, index, 16))
            return [T.bind(shuffle([whole], range(8 * i, 8 * i + 8))) for i in (0, 1)]
        return [T.bind(load(buffer, index + 16 * i, 16)) for i in range(self.lanes * self.group // 16)]

    def activation(self, buffer: Any, index: Any, valid: int) -> list[Any]:
        operands: list[Any] = self.activations(buffer, [index] * self.pixels, valid, 1)[0]
        return operands

    def activations(self, buffer: Any, places: Sequence[Any], valid: int, steps: int) -> list[Any]:
        """Per step [int8x16] ("mull": two int8x8; "fma": [float32x4]), every lane with what its accumulator lane multiplies."""
        if self.is_float:
            x = T.bind(load(buffer, places[0], steps))
            return [[_spread(x, steps, s)] for s in range(steps)]
        size = steps * self.group
        parts = [self._bytes(buffer, place, size if valid == self.group else valid, size) for place in places]
        if self.kind == "mmla":
            words = [T.reinterpret(_vector("int64", steps), part) for part in parts]
            tied = [T.Shuffle(words, [s, steps + s]) for s in range(steps)]
            return [[T.bind(T.reinterpret("int8x16", t))] for t in tied]
        if self.kind == "dot":
            words = T.reinterpret(_vector("int32", steps), parts[0])
            return [[T.reinterpret("int8x16", _spread(words, steps, s))] for s in range(steps)]
        pairs = T.reinterpret(_vector("int16", 2 * steps), parts[0])
        return [[T.bind(T.reinterpret("int8x8", _spread(pairs, 2 * steps, 2 * s + half))) for half in (0, 1)] for s in range(steps)]

    def _bytes(self, buffer: Any, index: Any, valid: int, size: int) -> Any:
        """`size` bytes from `index` on, of which only the first `valid` are read; the others are 0."""
        if valid == size:
            return T.bind(load(buffer, index, size))
        kind = "int64" if size == 8 else "int32"
        word = tirx.const(0, kind)
        for i in range(valid):
            byte = T.Cast(kind, T.reinterpret("uint8", load(buffer, index + i, 1)))
            word = T.bitwise_or(word, T.shift_left(byte, tirx.const(8 * i, kind)))
        return T.bind(T.reinterpret(f"int8x{size}", word))

    # -- dot steps ----------------------------------------------------------------------------------------------------------------------

    def dot(self, acc: Any, x: Any, w: list[Any]) -> Any:
        if self.is_float:
            return call("float32x4", "llvm.fma", x[0], w[0], acc) if self.wide else acc + x[0] * w[0]
        if self.kind == "dot":
            return call("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", acc, w[0], x[0])
        return self.add_pairs(acc, T.bind(self.mull(w[0], x[0]) + self.mull(w[1], x[1])))

    def dots(self, accs: Sequence[Any], x: Any, w: list[Any]) -> list[Any]:
        if self.kind != "mmla":
            return [self.dot(accs[0], x, w)]
        return [call("int32x4", "llvm.aarch64.neon.smmla.v4i32.v16i8", acc, x[0], half) for acc, half in zip(accs, w, strict=True)]

    def tie(self, bias: Any) -> list[Any]:
        if self.pixels == 1:
            return [bias]
        return [T.bind(shuffle([bias], [i, i + 1, i, i + 1])) for i in (0, 2)]

    def untie(self, accs: Sequence[Any]) -> list[Any]:
        if self.pixels == 1:
            return list(accs)
        return [shuffle(accs, [i, i + 1, 4 + i, 4 + i + 1]) for i in (0, 2)]

    def mull(self, a: Any, b: Any) -> Any:
        """int16 products of two int8x8: SMULL."""
        return call("int16x8", "llvm.aarch64.neon.smull.v8i16" if self.wide else "llvm.arm.neon.vmulls.v8i16", a, b)

    def add_pairs(self, acc: Any, words: Any) -> Any:
        """acc + sums of adjacent pairs of int16x8: SADALP."""
        if self.wide:
            return acc + call("int32x4", "llvm.aarch64.neon.saddlp.v4i32.v8i16", words)
        return call("int32x4", "llvm.arm.neon.vpadals.v4i32.v8i16", acc, words)

    # -- the epilogue -------------------------------------------------------------------------------------------------------------------

    def to_int(self, value: Any) -> Any:
        """FCVTNS. ARMv7 converts toward zero only, so there |v| < 2^23 is rounded by adding 2^23, a sum whose unit in the last place is 1: its low
        bits are the integer (2^23 = 0x4B000000; Hauser, "Handling floating-point exceptions in numeric programs", 1996). From 2^23 on, v is an
        integer. The absolute value stands between the multiplication that made v and this addition, so nothing is contracted; NEON's flushing
        of denormal numbers doesn't matter, as those round to 0."""
        if self.wide:
            return call("int32x4", "llvm.aarch64.neon.fcvtns.v4i32.v4f32", value)
        bits, big = T.bind(T.reinterpret("int32x4", value)), scalar(float(2**23), "float32", 4)
        size = T.bind(T.reinterpret("float32x4", T.bitwise_and(bits, scalar(0x7FFFFFFF, "int32", 4))))
        rounded = T.reinterpret("int32x4", size + big) - scalar(0x4B000000, "int32", 4)
        whole = T.bind(T.Select(size < big, rounded, T.Cast("int32x4", size)))
        sign = T.bind(T.shift_right(bits, scalar(31, "int32", 4)))
        return T.bitwise_xor(whole, sign) - sign

    def narrow(self, dtype: str, value: Any) -> Any:
        """Saturated to half the element size: SQXTN. `dtype`: of the result."""
        lanes = int(dtype.split("x")[1])
        element = f"v{lanes}i{dtype.split('x')[0].removeprefix('int')}"
        return call(dtype, f"llvm.aarch64.neon.sqxtn.{element}" if self.wide else f"llvm.arm.neon.vqmovns.{element}", value)

    def pack(self, slots: Sequence[Any], offset: Any, signed: bool) -> Any:
        """As `Isa`. Each of the three saturating steps keeps the sign of an excess, so together they equal one exact saturation."""
        assert signed
        words = [shuffle([self.narrow("int16x4", slots[i]), self.narrow("int16x4", slots[i + 1])], range(8)) for i in (0, 2)]
        if offset is not None:
            words = [call("int16x8", "llvm.sadd.sat", w, offset) for w in words]
        return shuffle([self.narrow("int8x8", w) for w in words], range(16))

    def unpack(self, packed: Any, slot: int) -> Any:
        return T.Cast("int32x4", shuffle([packed], range(4 * slot, 4 * slot + 4)))


def _vector(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def _spread(value: Any, lanes: int, index: int) -> Any:
    """One element of a vector in each of four lanes."""
    return T.broadcast(value, 4) if lanes == 1 else shuffle([value] * max(1, 4 // lanes), [index] * 4)


two_units = guessed("two 128-bit vector units, one of which multiplies without SDOT, and two load units, as Cortex-A76 and Neoverse N1 have them")
four_units = guessed("four 128-bit vector units, three for SMMLA, as Neoverse V1 has them")

I8MM = Arm(
    name="arm64-i8mm",
    kind="mmla",
    wide=True,
    lanes=4,
    registers=32,
    group=8,
    scratch_registers=1,
    dot_cost=four_units(0.25),
    broadcast_cost=four_units(0.17),
    weight_cost=four_units(0.67),
    epilogue_cost=four_units(0.75),
    latency=four_units(3.0),
)
DOTPROD = Arm(
    name="arm64-dotprod",
    kind="dot",
    wide=True,
    lanes=4,
    registers=32,
    group=4,
    scratch_registers=1,
    dot_cost=two_units(0.5),
    broadcast_cost=two_units(0.125),
    weight_cost=two_units(0.5),
    epilogue_cost=two_units(1.5),
    latency=two_units(3.0),
)
NEON = Arm(
    name="arm64-neon",
    kind="mull",
    wide=True,
    lanes=4,
    registers=32,
    group=4,
    scratch_registers=8,
    dot_cost=two_units(2.0),
    broadcast_cost=two_units(0.125),
    weight_cost=two_units(1.0),
    epilogue_cost=two_units(1.5),
    latency=two_units(3.0),
)
NEON32 = Arm(
    name="armv7-neon",
    kind="mull",
    wide=False,
    lanes=4,
    registers=16,
    group=4,
    scratch_registers=6,
    dot_cost=two_units(2.0),
    broadcast_cost=two_units(0.125),
    weight_cost=two_units(1.0),
    epilogue_cost=two_units(4.0),
    latency=two_units(3.0),
)
FLOAT = Arm(
    name="arm64-neon",
    kind="fma",
    wide=True,
    lanes=4,
    registers=32,
    group=1,
    scratch_registers=1,
    dot_cost=two_units(0.5),
    broadcast_cost=two_units(0.125),
    weight_cost=two_units(0.5),
    epilogue_cost=two_units(1.0),
    latency=two_units(4.0),
)
FLOAT32 = Arm(
    name="armv7-neon",
    kind="fma",
    wide=False,
    lanes=4,
    registers=16,
    group=1,
    scratch_registers=2,
    dot_cost=two_units(1.0),
    broadcast_cost=two_units(0.25),
    weight_cost=two_units(0.5),
    epilogue_cost=two_units(1.0),
    latency=two_units(4.0),
)
