"""x86 vector ISAs as facts: widths, registers, costs, and the few instructions that kernels are made of.

A dot step works on `lanes` output channels at once. The activation operand is `group` adjacent input channels, broadcast; the weight operand
holds the same `group` channels of each of the `lanes` output channels:

    acc[lane] += sum(x[k] * w[lane][k] for k in range(group))

An 8-bit step is exact in int32 on every row: VPDPBUSD does not saturate (VPDPBUSDS would), and without VNNI the products are formed by VPMADDWD from
operands widened to int16, never by VPMADDUBSW, whose int16 pair sums saturate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T


def load(buffer: Any, index: Any, lanes: int) -> Any:
    """`lanes` adjacent elements of a flat buffer; any alignment."""
    return buffer[T.ramp(index, 1, lanes)] if lanes > 1 else buffer[index]


def save(buffer: Any, index: Any, value: Any, lanes: int) -> None:
    """Store `lanes` adjacent elements to a flat buffer; any alignment."""
    T.buffer_store(buffer, value, [T.ramp(index, 1, lanes) if lanes > 1 else index])


def shuffle(vectors: Sequence[Any], indices: Sequence[int]) -> Any:
    """The elements `indices` of the concatenated `vectors` (a constant permutation; LLVM finds the instruction)."""
    return tirx.Shuffle(list(vectors), [tirx.const(int(i), "int32") for i in indices])


def call(dtype: str, name: str, *args: Any) -> Any:
    return T.call_llvm_pure_intrin(dtype, name, *args)


def scalar(value: Any, dtype: str, lanes: int) -> Any:
    """A constant in every lane."""
    return T.broadcast(tirx.const(value, dtype), lanes)


@dataclass(frozen=True)
class Isa:
    """One row of the ISA table.

    `group`: input channels per dot step (1 for float). `steps`: instructions sequences a group is split into. Costs are in cycles on the
    machine where they were measured and only steer the heuristics: `dot` per accumulator and group, `broadcast` and `weight` per operand and group.
    """

    name: str
    lanes: int
    registers: int
    group: int
    scratch_registers: int  # besides accumulators and one weight operand per block
    dot_cost: float
    broadcast_cost: float
    weight_cost: float
    latency: float  # of one dot: fewer accumulators than latency / dot_cost leave the unit idle
    kind: str  # "vnni", "madd" or "fma"

    @property
    def accumulator(self) -> str:
        return "float32" if self.kind == "fma" else "int32"

    @property
    def input_dtype(self) -> str:
        return "float32" if self.kind == "fma" else "uint8"

    @property
    def weight_dtype(self) -> str:
        return "float32" if self.kind == "fma" else "int8"

    @property
    def bytes(self) -> int:
        return 4 * self.lanes

    def pack_weights(self, groups: np.ndarray) -> np.ndarray:
        """[..., lanes, group] weights in the order the weight operands are read, [..., lanes * group].

        "madd" splits a group into its even and its odd channels, as `activation` does.
        """
        if self.kind == "madd":
            groups = np.stack([groups[..., 0::2], groups[..., 1::2]], axis=-3)
        return groups.reshape(*groups.shape[: groups.ndim - (3 if self.kind == "madd" else 2)], -1)

    def weights(self, buffer: Any, index: Any) -> list[Any]:
        """The operands that `dot` wants for one block of lanes: `lanes * group` elements at `index`."""
        if self.kind == "vnni":
            return [T.bind(load(buffer, index, 4 * self.lanes))]
        if self.kind == "fma":
            return [T.bind(load(buffer, index, self.lanes))]
        half = 2 * self.lanes  # VPMOVSXBW from memory
        return [T.bind(T.Cast(f"int16x{half}", load(buffer, index + s * half, half))) for s in (0, 1)]

    def activation(self, buffer: Any, index: Any, valid: int) -> list[Any]:
        """`group` channels at `index` in every lane; only the first `valid` of them are read, the others are 0."""
        if self.kind == "fma":
            return [T.bind(T.broadcast(load(buffer, index, 1), self.lanes))]
        if valid == self.group:
            word = T.reinterpret("int32", load(buffer, index, 4))
        else:
            word = tirx.const(0, "int32")
            for i in range(valid):
                word = T.bitwise_or(word, T.shift_left(T.Cast("int32", load(buffer, index + i, 1)), tirx.const(8 * i, "int32")))
        spread = T.bind(T.broadcast(word, self.lanes))
        if self.kind == "vnni":
            return [T.bind(T.reinterpret(f"int8x{4 * self.lanes}", spread))]
        # bytes (x0, x1, x2, x3) of a dword as words: (x0, x2) are its low bytes, (x1, x3) its high bytes
        words = T.reinterpret(f"uint16x{2 * self.lanes}", spread)
        even = T.bitwise_and(words, scalar(255, "uint16", 2 * self.lanes))
        odd = T.shift_right(words, scalar(8, "uint16", 2 * self.lanes))
        return [T.bind(T.reinterpret(f"int16x{2 * self.lanes}", e)) for e in (even, odd)]

    def dot(self, acc: Any, x: list[Any], w: list[Any]) -> Any:
        """acc + x . w, per lane."""
        wide = self.lanes == 16
        if self.kind == "vnni":
            return call(f"int32x{self.lanes}", f"llvm.x86.avx512.vpdpbusd.{512 if wide else 256}", acc, x[0], w[0])
        if self.kind == "fma":
            return call(f"float32x{self.lanes}", "llvm.fma", x[0], w[0], acc)
        for a, b in zip(x, w, strict=True):
            acc = acc + call(f"int32x{self.lanes}", "llvm.x86.avx2.pmadd.wd", a, b)
        return acc

    def to_int(self, value: Any) -> Any:
        """float32 lanes to int32, ties to even; out of range (either side) gives INT32_MIN."""
        if self.lanes == 16:
            rounding = tirx.const(4, "int32")  # the current mode, which is to nearest even
            return call("int32x16", "llvm.x86.avx512.mask.cvtps2dq.512", value, scalar(0, "int32", 16), tirx.const(-1, "int16"), rounding)
        return call("int32x8", "llvm.x86.avx.cvt.ps2dq.256", value)

    def pack(self, slots: Sequence[Any], offset: Any, signed: bool) -> Any:
        """Four vectors of int32, plus `offset` (int16 lanes), saturated to 8 bits: `bytes` bytes, see `channel_order`.

        Saturation of the 16-bit steps keeps the sign of any excess, so the result equals one exact saturation of value + offset.
        """
        wide, n = self.lanes == 16, self.bytes
        prefix, suffix = ("llvm.x86.avx512", ".512") if wide else ("llvm.x86.avx2", "")
        words = [call(f"int16x{n // 2}", f"{prefix}.packssdw{suffix}", slots[i], slots[i + 1]) for i in (0, 2)]
        words = [call(f"int16x{n // 2}", "llvm.sadd.sat", w, offset) for w in words]
        packed = call(f"int8x{n}", f"{prefix}.pack{'ss' if signed else 'us'}wb{suffix}", *words)
        return packed if signed else T.reinterpret(f"uint8x{n}", packed)

    def packed_dwords(self, blocks: int) -> list[int]:
        """The permutation of dwords that makes the pixels of a packed vector contiguous: result[i] = packed[order[i]].

        `pack` works within 128-bit parts: dword 4 * part + slot holds lanes 4 * part .. 4 * part + 3 of that slot. Slots are (pixel, block) with
        `blocks` blocks per pixel. Four blocks of one pixel need no permutation at all, because the weights are packed in `channel_order`.
        """
        parts = range(self.lanes // 4)
        return [4 * part + pixel * blocks + block for pixel in range(4 // blocks) for part in parts for block in range(blocks)]

    def channel_order(self, blocks: int) -> np.ndarray:
        """Which channel of a run of `blocks * lanes` each (block, lane) computes, so that `pack` yields them in order."""
        part, i = np.divmod(np.arange(self.lanes), 4)
        return np.concatenate([part * 4 * blocks + 4 * block + i for block in range(blocks)])

    def unpack(self, packed: Any, slot: int) -> Any:
        """int32 lanes of one slot of a packed vector of uint8 (one VPSHUFB)."""
        n = self.bytes
        part, i = np.divmod(np.arange(self.lanes), 4)
        indices = np.full((self.lanes, 4), n)
        indices[:, 0] = 16 * part + 4 * slot + i
        return T.reinterpret(f"int32x{self.lanes}", shuffle([packed, scalar(0, "uint8", n)], indices.reshape(-1).tolist()))


# Cycles measured on a Zen 4 core, whose 512-bit units are two 256-bit halves.
AVX512VNNI = Isa("x86-avx512vnni", 16, 32, 4, 1, 1.0, 0.5, 1.0, 4, "vnni")
AVXVNNI = Isa("x86-avxvnni", 8, 16, 4, 1, 0.5, 0.5, 0.5, 4, "vnni")
AVX2 = Isa("x86-avx2", 8, 16, 4, 4, 1.0, 1.0, 1.0, 4, "madd")
AVX512FMA = Isa("x86-avx512vnni", 16, 32, 1, 1, 1.0, 0.5, 1.0, 4, "fma")
AVX2FMA = Isa("x86-avx2", 8, 16, 1, 1, 0.5, 0.5, 0.5, 4, "fma")
