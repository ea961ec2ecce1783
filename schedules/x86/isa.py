"""x86 vector ISAs as facts: widths, registers, costs, and the instructions of a dot step and of the epilogue.

An 8-bit step is exact in int32 on every row. VPDPBUSD does not saturate (VPDPBUSDS would). Without VNNI, bytes are multiplied by VPMADDUBSW, an
unsigned one by a signed one, whose int16 sums of two products saturate. So each dot step takes the first form that its weights allow:

    u8 activations by weights, four channels paired in one of three ways (the second and third cost a byte shuffle per activation operand), if
    no pair of weights can saturate, whatever the activations:  255 * (sum of those of one sign) <= 255 * 128 = 32640 < 2^15;
    magnitudes of weights by activations of the right sign, which never saturates:  2 * 127 * 128 = 32512 < 2^15. With u = q + 128,
    w q = |w| q for w >= 0, else |w| (-q - 1) - w;  q is u XOR 0x80 and -q - 1 is u XOR 0x7F, so one VPXOR does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.avx2 import multiply_pairs, rounded
from qcompiler.schedules.isa import Isa, call, demand, guessed, load, measured, save, scalar, shuffle

__all__ = ["AVX2", "AVX2FMA", "AVX512", "AVX512FMA", "AVX512VNNI", "AVXVNNI", "X86", "call", "load", "save", "scalar", "shuffle"]


@dataclass(frozen=True, kw_only=True)
class X86(Isa):
    """`kind`: "vnni" (VPDPBUSD), "bytes" (the forms "pairs" and "signs" of VPMADDUBSW, see above) or "fma" (float32).

    `order`: how "pairs" arranges the channels of a group, two and two.
    """

    kind: str
    order: tuple[int, ...] = (0, 1, 2, 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        demand(
            self.name,
            {
                "a vector has 256 or 512 bits": self.lanes in (8, 16),
                "AVX512 has 32 registers and AVX2 16": self.registers == 2 * self.lanes,
                "the kind is known": self.kind in ("vnni", "bytes", "pairs", "signs", "fma"),
                "an 8-bit step takes four channels": self.is_float or self.group == 4,
                "the order is one of the group": sorted(self.order) == [0, 1, 2, 3],
                "at most two pixels share a vector": self.sharing in (1, 2),
            },
        )

    @property
    def is_float(self) -> bool:
        return self.kind == "fma"

    @property
    def input_dtype(self) -> str:
        return "float32" if self.is_float else "uint8"

    @property
    def forms(self) -> tuple[X86, ...]:
        if self.kind != "bytes":
            return (self,)
        pairs = [replace(self, kind="pairs", order=order) for order in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2))]
        return (*pairs, replace(self, kind="signs", dot_cost=self.dot_cost.times(1.2), weight_cost=self.weight_cost.times(1.8)))

    @property
    def unrolled(self) -> int:
        return 8 if self.kind == "signs" else super().unrolled

    def fits(self, pixels: int, blocks: int) -> bool:
        """As `Isa`. In the unrolled loop of "signs", LLVM keeps magnitudes and signs of weights over all pixels, and accumulators that don't fit
        the registers cost less than fewer pixels."""
        return pixels * blocks <= self.registers if self.kind == "signs" else super().fits(pixels, blocks)

    def takes(self, groups: np.ndarray) -> np.ndarray:
        if self.kind != "pairs":
            return super().takes(groups)
        pairs = groups[..., self.order].astype(np.int16).reshape(*groups.shape[:-1], 2, 2)
        largest = np.maximum(np.maximum(pairs, 0).sum(-1), np.maximum(-pairs, 0).sum(-1))
        return np.asarray((largest <= 128).all(axis=(-1, -2)))

    def missing(self, groups: np.ndarray) -> np.ndarray:
        if self.kind != "signs":
            return super().missing(groups)
        assert groups.min(initial=0) >= -127, "weights lie in [-127, 127]: 2 * 128 * 128 would saturate"
        w = groups.astype(np.int64)  # sum(u w) = sum(q w) + 128 sum(w), and sum(q w) = what is computed - sum(w < 0)
        return np.asarray(128 * w.sum(-1) - np.minimum(w, 0).sum(-1))

    def step_cycles(self, pixels: int, blocks: float, streamed: bool) -> float:
        """As `Isa`; all instructions of "bytes" compete for the same units."""
        if self.kind in ("bytes", "signs"):
            return pixels * blocks * self.dot_cost + pixels * self.broadcast_cost + blocks * self.weight_cost
        return super().step_cycles(pixels, blocks, streamed)

    def pack_weights(self, groups: np.ndarray) -> np.ndarray:
        ordered = groups[..., self.order] if self.kind == "pairs" else groups
        return ordered.reshape(*groups.shape[:-2], -1)

    def weights(self, buffer: Any, index: Any) -> list[Any]:
        w = T.bind(load(buffer, index, self.lanes * self.group))
        if self.kind != "signs":
            return [w]
        n = 4 * self.lanes
        negative = T.shift_right(w, scalar(7, "int8", n))  # 0 or -1
        return [T.bind(call(f"int8x{n}", "llvm.abs", w, tirx.const(False, "bool"))), T.bind(T.bitwise_xor(negative, scalar(-128, "int8", n)))]

    def activation(self, buffer: Any, index: Any, valid: int) -> list[Any]:
        if self.kind == "fma":
            return [T.bind(T.broadcast(load(buffer, index, 1), self.lanes))]
        if valid == self.group:
            word = T.reinterpret("int32", load(buffer, index, 4))
        else:
            word = tirx.const(0, "int32")
            for i in range(valid):
                word = T.bitwise_or(word, T.shift_left(T.Cast("int32", load(buffer, index + i, 1)), tirx.const(8 * i, "int32")))
        spread = T.bind(T.broadcast(word, self.lanes))
        bytes_ = T.reinterpret(f"int8x{4 * self.lanes}", spread)
        if self.order != (0, 1, 2, 3):
            bytes_ = shuffle([bytes_], [4 * lane + i for lane in range(self.lanes) for i in self.order])
        return [T.bind(bytes_)]

    def join(self, activations: Sequence[list[Any]]) -> list[Any]:
        """As `Isa`. VPTERNLOGD by name: of a shuffle LLVM makes VPERMT2D, which competes with dots for a unit."""
        n, dtype = self.lanes, "float32" if self.is_float else "int8"
        first, last = (T.reinterpret(f"int32x{n}", x) for (x,) in (activations[0], activations[-1]))
        if n < 16:
            both = shuffle([first, last], [i + n * (i >= n // 2) for i in range(n)])
        else:
            upper = shuffle([scalar(0, "int32", n), scalar(-1, "int32", n)], [i + n * (i >= n // 2) for i in range(n)])
            both = call("int32x16", "llvm.x86.avx512.pternlog.d.512", upper, last, first, tirx.const(0xCA, "int32"))  # upper ? last : first
        return [T.bind(T.reinterpret(f"{dtype}x{4 * n // (4 if self.is_float else 1)}", both))]

    def dot(self, acc: Any, x: list[Any], w: list[Any]) -> Any:
        if self.kind == "vnni":
            return call(f"int32x{self.lanes}", f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}", acc, x[0], w[0])
        if self.kind == "fma":
            return call(f"float32x{self.lanes}", "llvm.fma", x[0], w[0], acc)
        unsigned, signed = (x[0], w[0]) if self.kind == "pairs" else (w[0], T.bitwise_xor(x[0], w[1]))
        name = {16: "llvm.x86.avx512.pmaddubs.w.512", 8: "llvm.x86.avx2.pmadd.ub.sw"}[self.lanes]
        sums = call(f"int16x{2 * self.lanes}", name, unsigned, signed)
        return acc + multiply_pairs(sums, scalar(1, "int16", 2 * self.lanes), self.lanes)

    def to_int(self, value: Any) -> Any:
        return rounded(value, self.lanes)

    def pack(self, slots: Sequence[Any], offset: Any, signed: bool) -> Any:
        """As `Isa`. Each of the three saturating steps keeps the sign of an excess, so together they equal one exact saturation."""
        n = self.bytes
        prefix, suffix = ("llvm.x86.avx512", ".512") if self.lanes == 16 else ("llvm.x86.avx2", "")
        words = [call(f"int16x{n // 2}", f"{prefix}.packssdw{suffix}", slots[i], slots[i + 1]) for i in (0, 2)]
        if offset is not None:
            words = [call(f"int16x{n // 2}", "llvm.sadd.sat", w, offset) for w in words]
        packed = call(f"int8x{n}", f"{prefix}.pack{'ss' if signed else 'us'}wb{suffix}", *words)
        return packed if signed else T.reinterpret(f"uint8x{n}", packed)

    def unpack(self, packed: Any, slot: int) -> Any:
        n = self.bytes  # one VPSHUFB
        part, i = np.divmod(np.arange(self.lanes), 4)
        indices = np.full((self.lanes, 4), n)
        indices[:, 0] = 16 * part + 4 * slot + i
        return T.reinterpret(f"int32x{self.lanes}", shuffle([packed, scalar(0, "uint8", n)], indices.reshape(-1).tolist()))


zen4 = measured("a Zen 4 core, whose 512-bit units are two 256-bit halves")
# such a core does two dots of 512 bits in a cycle of those that the other costs count: a chain keeps it waiting twice as long, and an operand's load takes
# as long as a dot
zen5 = measured("a Zen 5 core, in times of a dot on a Zen 4 core")
zen3 = measured("a Zen 3 core, which takes about 3.4 of the instructions of these kernels a cycle")
skylake = guessed("two 512-bit units, as Skylake-X has them")

AVX512VNNI = X86(
    name="x86-avx512vnni",
    kind="vnni",
    lanes=16,
    registers=32,
    group=4,
    scratch_registers=1,
    dot_cost=zen4(1.0),
    broadcast_cost=zen5(1.0),
    weight_cost=zen4(1.0),
    epilogue_cost=zen4(2.0),
    latency=zen5(9.6),
    sharing=2,
)
AVX512 = X86(
    name="x86-avx512",
    kind="bytes",
    lanes=16,
    registers=32,
    group=4,
    scratch_registers=4,
    dot_cost=skylake(2.0),
    broadcast_cost=skylake(1.0),
    weight_cost=skylake(1.0),
    epilogue_cost=skylake(2.0),
    latency=skylake(4.0),
)
AVXVNNI = X86(
    name="x86-avxvnni",
    kind="vnni",
    lanes=8,
    registers=16,
    group=4,
    scratch_registers=1,
    dot_cost=zen4(0.5),
    broadcast_cost=zen4(0.55),
    weight_cost=zen4(0.5),
    epilogue_cost=zen4(1.0),
    latency=zen4(4.3),
    sharing=2,
)
AVX2 = X86(
    name="x86-avx2",
    kind="bytes",
    lanes=8,
    registers=16,
    group=4,
    scratch_registers=4,
    dot_cost=zen3(1.0),
    broadcast_cost=zen3(0.3),
    weight_cost=zen3(0.5),
    epilogue_cost=zen3(2.0),
    latency=zen4(4.0),
)
AVX512FMA = X86(
    name="x86-avx512vnni",
    kind="fma",
    lanes=16,
    registers=32,
    group=1,
    scratch_registers=1,
    dot_cost=zen4(1.0),
    broadcast_cost=zen4(0.5),
    weight_cost=zen4(1.0),
    epilogue_cost=zen4(1.0),
    latency=zen4(4.0),
    sharing=2,
)
AVX2FMA = X86(
    name="x86-avx2",
    kind="fma",
    lanes=8,
    registers=16,
    group=1,
    scratch_registers=1,
    dot_cost=zen4(0.5),
    broadcast_cost=zen4(0.65),
    weight_cost=zen4(0.5),
    epilogue_cost=zen4(0.5),
    latency=zen4(4.3),
    sharing=2,
)
