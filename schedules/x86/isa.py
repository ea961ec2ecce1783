"""x86 vector ISAs as facts: widths, registers, costs, and the instructions of a dot step and of the epilogue.

An 8-bit step is exact in int32 on every row. VPDPBUSD does not saturate (VPDPBUSDS would). Without VNNI there are two forms. VPMADDWD multiplies
operands widened to int16. VPMADDUBSW multiplies bytes, in three instructions in all against four and the widening, but saturates its int16 pair
sums: it serves the steps whose weights can't bring a pair there, whatever the activations (`X86.takes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.isa import Isa, call, load, save, scalar, shuffle

__all__ = ["AVX2", "AVX2FMA", "AVX512", "AVX512FMA", "AVX512VNNI", "AVXVNNI", "X86", "call", "load", "multiply_add", "save", "scalar", "shuffle"]


def multiply_add(a: Any, b: Any, lanes: int) -> Any:
    """VPMADDWD: int32 lanes, each the exact sum of two products of int16."""
    return call(f"int32x{lanes}", {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}[lanes], a, b)


@dataclass(frozen=True)
class X86(Isa):
    """`kind`: "vnni" (VPDPBUSD), "words" (VPMADDWD and VPADDD), its short form "pairs" (VPMADDUBSW, VPMADDWD and VPADDD) or "fma" (float32)."""

    kind: str

    @property
    def input_dtype(self) -> str:
        return "float32" if self.is_float else "uint8"

    @property
    def short(self) -> X86 | None:
        return replace(self, kind="pairs") if self.kind == "words" else None

    def takes(self, groups: np.ndarray) -> np.ndarray:
        """As `Isa`. Of a pair, u8 activations reach at most 255 * (the positive weights), at least 255 * (the negative ones); 255 * 128 = 32640
        fits int16, 255 * 129 = 32895 doesn't, nor does -32895."""
        if self.kind != "pairs":
            return super().takes(groups)
        pairs = groups.astype(np.int16).reshape(*groups.shape[:-1], 2, 2)
        largest = np.maximum(np.maximum(pairs, 0).sum(-1), np.maximum(-pairs, 0).sum(-1))
        return np.asarray((largest <= 128).all(axis=(-1, -2)))

    def step_cycles(self, pixels: int, blocks: int, streamed: bool) -> float:
        """As `Isa`; the operands of "words" are widened by the units that multiply and add."""
        if self.kind == "words":
            return pixels * blocks * self.dot_cost + pixels * self.broadcast_cost + blocks * self.weight_cost
        return super().step_cycles(pixels, blocks, streamed)

    def pack_weights(self, groups: np.ndarray) -> np.ndarray:
        """As `Isa`; "words" splits a group into its even and its odd channels, as `activation` does."""
        outer = groups.shape[:-2]
        if self.kind == "words":
            groups = np.stack([groups[..., 0::2], groups[..., 1::2]], axis=-3)
        return groups.reshape(*outer, -1)

    def weights(self, buffer: Any, index: Any) -> list[Any]:
        if self.kind in ("vnni", "pairs"):
            return [T.bind(load(buffer, index, 4 * self.lanes))]
        if self.kind == "fma":
            return [T.bind(load(buffer, index, self.lanes))]
        half = 2 * self.lanes  # VPMOVSXBW from memory
        return [T.bind(T.Cast(f"int16x{half}", load(buffer, index + s * half, half))) for s in (0, 1)]

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
        if self.kind in ("vnni", "pairs"):
            return [T.bind(T.reinterpret(f"int8x{4 * self.lanes}", spread))]
        # bytes (x0, x1, x2, x3) of a dword as words: (x0, x2) are its low bytes, (x1, x3) its high bytes
        words = T.reinterpret(f"uint16x{2 * self.lanes}", spread)
        even = T.bitwise_and(words, scalar(255, "uint16", 2 * self.lanes))
        odd = T.shift_right(words, scalar(8, "uint16", 2 * self.lanes))
        return [T.bind(T.reinterpret(f"int16x{2 * self.lanes}", e)) for e in (even, odd)]

    def dot(self, acc: Any, x: list[Any], w: list[Any]) -> Any:
        if self.kind == "vnni":
            return call(f"int32x{self.lanes}", f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}", acc, x[0], w[0])
        if self.kind == "fma":
            return call(f"float32x{self.lanes}", "llvm.fma", x[0], w[0], acc)
        if self.kind == "pairs":
            name = {16: "llvm.x86.avx512.pmaddubs.w.512", 8: "llvm.x86.avx2.pmadd.ub.sw"}[self.lanes]
            return acc + multiply_add(call(f"int16x{2 * self.lanes}", name, x[0], w[0]), scalar(1, "int16", 2 * self.lanes), self.lanes)
        for a, b in zip(x, w, strict=True):
            acc = acc + multiply_add(a, b, self.lanes)
        return acc

    def to_int(self, value: Any) -> Any:
        if self.lanes == 16:
            current = tirx.const(4, "int32")  # rounding mode of MXCSR: to nearest even
            return call("int32x16", "llvm.x86.avx512.mask.cvtps2dq.512", value, scalar(0, "int32", 16), tirx.const(-1, "int16"), current)
        return call("int32x8", "llvm.x86.avx.cvt.ps2dq.256", value)

    def pack(self, slots: Sequence[Any], offset: Any, signed: bool) -> Any:
        """As `Isa`. Each of the three saturating steps keeps the sign of an excess, so together they equal one exact saturation."""
        n = self.bytes
        prefix, suffix = ("llvm.x86.avx512", ".512") if self.lanes == 16 else ("llvm.x86.avx2", "")
        words = [call(f"int16x{n // 2}", f"{prefix}.packssdw{suffix}", slots[i], slots[i + 1]) for i in (0, 2)]
        words = [call(f"int16x{n // 2}", "llvm.sadd.sat", w, offset) for w in words]
        packed = call(f"int8x{n}", f"{prefix}.pack{'ss' if signed else 'us'}wb{suffix}", *words)
        return packed if signed else T.reinterpret(f"uint8x{n}", packed)

    def unpack(self, packed: Any, slot: int) -> Any:
        n = self.bytes  # one VPSHUFB
        part, i = np.divmod(np.arange(self.lanes), 4)
        indices = np.full((self.lanes, 4), n)
        indices[:, 0] = 16 * part + 4 * slot + i
        return T.reinterpret(f"int32x{self.lanes}", shuffle([packed, scalar(0, "uint8", n)], indices.reshape(-1).tolist()))


# Cycles measured on a Zen 4 core, whose 512-bit units are two 256-bit halves; those of AVX512 are what two 512-bit units take (Skylake-X).
AVX512VNNI = X86("x86-avx512vnni", 16, 32, 4, 1, 1.0, 0.5, 1.0, 2.0, 4.0, False, "vnni")
AVX512 = X86("x86-avx512", 16, 32, 4, 4, 2.0, 1.0, 1.0, 2.0, 4.0, False, "words")
AVXVNNI = X86("x86-avxvnni", 8, 16, 4, 1, 0.5, 0.55, 0.5, 1.0, 4.3, False, "vnni")
AVX2 = X86("x86-avx2", 8, 16, 4, 4, 1.35, 0.25, 0.65, 1.0, 4.0, False, "words")
AVX512FMA = X86("x86-avx512vnni", 16, 32, 1, 1, 1.0, 0.5, 1.0, 1.0, 4.0, True, "fma")
AVX2FMA = X86("x86-avx2", 8, 16, 1, 1, 0.5, 0.65, 0.5, 0.5, 4.3, True, "fma")
