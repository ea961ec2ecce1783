"""What attention asks of an x86 vector unit: products of words that hold two or four channels, and the exponentials of a step of keys in registers.

A *word* is 4 bytes of an int32 vector: four bytes where there is VPDPBUSD, else two int16 for VPMADDWD. A *step* is four vectors of logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from qcompiler.numerics.constants import ATTENTION, THRESHOLDS, thresholds
from qcompiler.schedules.avx2 import multiply_pairs
from qcompiler.schedules.isa import call, load, scalar, shuffle
from qcompiler.schedules.portable.attention import UNCOUNTED
from qcompiler.schedules.x86 import isa
from qcompiler.schedules.x86.isa import X86

BLOCKS = 4  # vectors of a step


@dataclass(frozen=True)
class Unit:
    """`queries`: rows of a register tile whose other side is four vectors."""

    isa: X86
    queries: int

    @property
    def lanes(self) -> int:
        return self.isa.lanes

    @property
    def step(self) -> int:
        """Keys."""
        return BLOCKS * self.lanes

    @property
    def group(self) -> int:
        """Elements of a word."""
        return 4 if self.isa.kind == "vnni" else 2

    def signed(self, stored: Any, lanes: int) -> Any:
        """The numbers of `lanes` stored bytes, as words."""
        return self._words(T.reinterpret(f"int8x{lanes}", T.bitwise_xor(stored, scalar(128, "uint8", lanes))), lanes)

    def unsigned(self, stored: Any, lanes: int) -> Any:
        """Stored bytes, as words."""
        return self._words(stored, lanes)

    def _words(self, value: Any, lanes: int) -> Any:
        words = lanes // self.group
        return T.bind(T.reinterpret("int32" if words == 1 else f"int32x{words}", value if self.group == 4 else T.Cast(f"int16x{lanes}", value)))

    @property
    def ones(self) -> Any:
        """In every element of a vector."""
        return scalar(0x01010101 if self.group == 4 else 0x00010001, "int32", self.lanes)

    def dot(self, acc: Any, a: Any, b: Any) -> Any:
        """acc + the products of words; elements of `a` are not negative."""
        n = self.lanes
        if self.group == 4:
            return self.isa.dot(acc, [T.reinterpret(f"int8x{4 * n}", a)], [T.reinterpret(f"int8x{4 * n}", b)])
        return acc + multiply_pairs(T.reinterpret(f"int16x{2 * n}", a), T.reinterpret(f"int16x{2 * n}", b), n)


VNNI512, VNNI256, PAIRS = Unit(isa.AVX512VNNI, 6), Unit(isa.AVXVNNI, 3), Unit(isa.AVX2, 3)


class Exponentials:
    """From four vectors of logits to the words of their p: indices as int16, two look-ups in 32 entries, their product rounded (VPMULHRSW).

    VPERMW looks up 32 words. With AVX2, VPSHUFB looks up 16 bytes, and yields 0 where bit 7 of an index is set: an entry is the OR of look-ups in halves of
    the table, with indices moved so that one of them is negative. Packs work in parts of 128 bits. Thresholds are laid out so, and a permutation at the end
    puts elements in order.
    """

    def __init__(self, unit: Unit, buffer: Any, masked: bool) -> None:
        self.unit, self.buffer, self.masked = unit, buffer, masked
        tables, words = _tables(unit).size // (2 * unit.lanes), 2 * unit.lanes
        self.tables = [T.bind(load(buffer, words * i, words)) for i in range(tables)]
        self.thresholds = words * tables
        last = self.thresholds + THRESHOLDS
        self.last = [T.bind(T.reinterpret(f"int32x{unit.lanes}", load(buffer, last + words * i, words))) for i in range(4 // unit.group)]

    @staticmethod
    def constants(unit: Unit, keys: int) -> np.ndarray:
        """int16: the tables, the thresholds, and what keeps the elements of the last step's keys."""
        n = unit.lanes
        pairs = range(THRESHOLDS // (2 * n))
        order = np.concatenate([[n * (2 * pair + side) + 4 * part + i for part in range(n // 4) for side in (0, 1) for i in range(4)] for pair in pairs])
        last = np.where(np.arange(unit.step) < (keys - 1) % unit.step + 1, -1, 0)
        kept = last.astype(np.int8).view(np.int16) if unit.group == 4 else last.astype(np.int16)
        return np.concatenate([_tables(unit), thresholds(THRESHOLDS)[order].astype(np.int16), kept])

    def index(self, acc: Any, top: Any, multiplier: Any) -> Any:
        """int32 of the place in the table."""
        n = self.unit.lanes
        last = scalar(float(ATTENTION.last), "float32", n)
        scaled = T.min(T.Cast(f"float32x{n}", T.broadcast(top, n) - acc) * T.broadcast(multiplier, n), last)
        if self.masked:  # an overflow of the difference is not looked at
            scaled = T.Select(acc == scalar(UNCOUNTED, "int32", n), last, scaled)
        return T.bind(self.unit.isa.to_int(scaled))

    def words(self, logits: list[Any], top: Any, multiplier: Any, key: Any, last: bool) -> list[Any]:
        """Vectors of words with the p of a step from `key` on, for one to four vectors of logits. last: no others follow."""
        n = self.unit.lanes
        places = [self.index(acc, top, multiplier) for acc in logits]
        first = self.thresholds if self.unit.step == THRESHOLDS else T.bind(T.bitwise_and(key, T.int32(THRESHOLDS - 1)) + self.thresholds)
        packed = [T.bind(self._pack("ssdw", places[i], places[min(i + 1, len(places) - 1)])) for i in range(0, len(places), 2)]
        pairs = []
        for i, (coarse, fine) in enumerate(self._look_up(packed)):
            e = call(f"int16x{2 * n}", "llvm.x86.avx512.pmul.hr.sw.512" if n == 16 else "llvm.x86.avx2.pmul.hr.sw", coarse, fine)
            pairs.append(T.bind(T.shift_right(e + load(self.buffer, first + 2 * n * i, 2 * n), scalar(7, "int16", 2 * n))))
        return self.only_keys(self._in_order(pairs), last)

    def only_keys(self, words: list[Any], last: bool) -> list[Any]:
        return [T.bind(T.bitwise_and(w, kept)) for w, kept in zip(words, self.last, strict=True)] if last else words

    def _pack(self, how: str, a: Any, b: Any) -> Any:
        n, prefix, suffix = self.unit.lanes, "llvm.x86.avx512" if self.unit.lanes == 16 else "llvm.x86.avx2", ".512" if self.unit.lanes == 16 else ""
        return call(f"int16x{2 * n}" if how == "ssdw" else f"int8x{4 * n}", f"{prefix}.pack{how}{suffix}", a, b)

    def _in_order(self, pairs: list[Any]) -> list[Any]:
        n = self.unit.lanes
        parts = n // 4
        if self.unit.group == 4:
            packed = T.reinterpret(f"int32x{n}", self._pack("uswb", pairs[0], pairs[-1]))
            return [T.bind(shuffle([packed], [4 * (i % parts) + i // parts for i in range(n)]))]
        order = [2 * (i % parts) + i // parts for i in range(2 * parts)]
        return [T.bind(T.reinterpret(f"int32x{n}", shuffle([T.reinterpret(f"int64x{n // 2}", p)], order))) for p in (pairs[0], pairs[-1])]

    def _look_up(self, places: list[Any]) -> list[tuple[Any, Any]]:
        """Entries of both tables for one or two vectors of int16 places."""
        n = 2 * self.unit.lanes
        coarse = [T.bind(T.shift_right(p, scalar(ATTENTION.fine_bits, "int16", n))) for p in places]
        if self.unit.lanes == 16:  # VPERMW looks at five bits
            name = "llvm.x86.avx512.permvar.hi.512"
            return [(call(f"int16x{n}", name, self.tables[0], c), call(f"int16x{n}", name, self.tables[1], p)) for c, p in zip(coarse, places, strict=True)]
        fine = [T.bind(T.bitwise_and(p, scalar(2**ATTENTION.fine_bits - 1, "int16", n))) for p in places]
        found = [self._halves(which, v[0], v[-1]) for which, v in enumerate((coarse, fine))]
        return list(zip(*found, strict=True))[: len(places)]

    def _halves(self, which: int, first: Any, second: Any) -> list[Any]:
        """Entries of one table for two vectors of 16 int16 places below 32."""
        place = T.bind(self._pack("uswb", first, second))
        low, high = T.bind(place + scalar(0x70, "int8", 32)), T.bind(place - scalar(16, "int8", 32))
        tables = [T.reinterpret("int8x32", t) for t in self.tables[4 * which : 4 * which + 4]]
        found = [[call("int8x32", "llvm.x86.avx2.pshuf.b", table, at) for table, at in zip(tables[i : i + 2], (low, high), strict=True)] for i in (0, 2)]
        below, above = (T.bind(T.bitwise_or(*pair)) for pair in found)
        halves = [[16 * part + 8 * half + i + side for part in (0, 1) for i in range(8) for side in (0, 32)] for half in (0, 1)]
        return [T.bind(T.reinterpret("int16x16", shuffle([below, above], half))) for half in halves]


def _tables(unit: Unit) -> np.ndarray:
    """int16: both tables; for AVX2 of each the lower bytes of entries 0 to 15 and 16 to 31, then the upper ones, twice each for a register's halves."""
    if unit.lanes == 16:
        return np.concatenate([ATTENTION.coarse, ATTENTION.fine])
    bytes_ = [t.view(np.int8).reshape(2, 16, 2).transpose(2, 0, 1).reshape(4, 16) for t in (ATTENTION.coarse, ATTENTION.fine)]
    return np.repeat(np.concatenate(bytes_), 2, axis=0).reshape(-1).view(np.int16)
