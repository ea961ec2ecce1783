"""What generic vector code becomes too slow on AVX2: the way from float32 to bytes, and table look-ups.

LLVM narrows int32 to bytes by masking every vector and permuting across halves at each step, and looks bytes up one by one. Vectors of `lanes`
elements here are 16 or 32 bytes when they hold bytes; LLVM splits wider ones into registers, which costs nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.isa import call, load, scalar, shuffle

BYTES = 32  # of a register
WORDS = 8  # int32 in a register
PAIRS = 16  # int16 in a register
TABLES = 16  # registers of 16 entries that a table of 256 fills


WIDE = 64  # bytes of a register of AVX512


def narrowed(value: Any, zero: Any, dtype: str, lanes: int) -> Any:
    """clip(rint(value) + zero) in `dtype` (int8, uint8 or int16, whose zero is 0), for a float32 vector with |value| < 2^31 and an int16 scalar.
    `lanes`: 8, 16 or 32; 64 where there is AVX512, whose registers also hold 32 lanes of int16.
    """
    n = 16 if lanes == WIDE else WORDS
    return packed([rounded(shuffle([value], range(i, i + n)), n) for i in range(0, lanes, n)], zero, dtype, lanes)


def packed(words: list[Any], zero: Any, dtype: str, lanes: int) -> Any:
    """clip(word + zero) in `dtype` for int32 vectors of 8 lanes (of 16 where `lanes` is 64), `lanes` in all; as `narrowed` otherwise. zero None: 0.

    Each of the three saturating steps keeps the sign of an excess, so together they equal one exact saturation. Packs work in parts of 128 bits;
    one permutation at the end puts the elements in order.
    """
    bytes_ = 1 if dtype != "int16" else 2
    n, prefix, suffix = (16, "llvm.x86.avx512", ".512") if lanes == WIDE else (WORDS, "llvm.x86.avx2", "")
    words = [T.bind(w) for w in words]
    pairs = [call(f"int16x{2 * n}", f"{prefix}.packssdw{suffix}", words[i], words[min(i + 1, len(words) - 1)]) for i in range(0, len(words), 2)]
    if bytes_ == 2:
        order = [2 * part + side for side in (0, 1) for part in range(n // 4)]
        found = [T.bind(T.reinterpret(f"int16x{2 * n}", shuffle([T.reinterpret(f"int64x{n // 2}", p)], order))) for p in pairs]
        return found[0] if lanes == 2 * n else shuffle(found, range(lanes))
    if zero is not None:
        pairs = [call(f"int16x{2 * n}", "llvm.sadd.sat", p, T.broadcast(zero, 2 * n)) for p in pairs]
    both = T.reinterpret(f"int32x{n}", call(f"int8x{4 * n}", f"{prefix}.pack{'ss' if dtype == 'int8' else 'us'}wb{suffix}", pairs[0], pairs[-1]))
    order = [4 * part + slot for slot in range(min(4, lanes // n)) for part in range(n // 4)]
    return T.reinterpret(f"{dtype}x{lanes}", shuffle([both], order))


def rounded(value: Any, lanes: int) -> Any:
    """float32 lanes to int32, ties to even."""
    if lanes == WORDS:
        return call("int32x8", "llvm.x86.avx.cvt.ps2dq.256", value)
    current = tirx.const(4, "int32")  # rounding mode of MXCSR: to nearest even
    return call("int32x16", "llvm.x86.avx512.mask.cvtps2dq.512", value, scalar(0, "int32", 16), tirx.const(-1, "int16"), current)


def lookup_tables(entries: np.ndarray) -> np.ndarray:
    """The constants of `lookup` for 256 entries, one byte each: 16 tables of 16, each but 0 and 8 XOR the one before it."""
    tables = entries.view(np.uint8).reshape(2, TABLES // 2, 16)
    return np.concatenate([tables[:, :1], tables[:, 1:] ^ tables[:, :-1]], axis=1).view(np.int8).reshape(-1)


def lookup(tables: Any, index: Any, lanes: int) -> Any:
    """entries[index] of the buffer `lookup_tables(entries)`, for a uint8 vector of 16 or 32 `lanes`: an int8 vector.

    VPSHUFB looks up bits 0 to 3, and yields 0 where bit 7 is set. With r = index mod 128, r - 16 i is negative just for the tables i beyond that of r:
    the XOR of all look-ups ends at the right one. Both halves of the table are looked up, and bit 7 of the index chooses.
    """
    name, vector = {32: "llvm.x86.avx2.pshuf.b", 16: "llvm.x86.ssse3.pshuf.b.128"}[lanes], f"int8x{lanes}"
    index = T.bind(T.reinterpret(vector, index))
    rest = T.bind(T.bitwise_and(index, scalar(127, "int8", lanes)))
    found: list[Any] = [None, None]
    for i in range(TABLES // 2):
        for half in (0, 1):
            table = load(tables, (i + half * TABLES // 2) * 16, 16)
            table = shuffle([table] * (lanes // 16), range(lanes))
            value = call(vector, name, table, rest)
            found[half] = T.bind(value if i == 0 else T.bitwise_xor(found[half], value))
        rest = T.bind(rest - scalar(16, "int8", lanes))
    return tirx.Select(index < scalar(0, "int8", lanes), found[1], found[0])


def multiply_pairs(a: Any, b: Any, lanes: int = WORDS) -> Any:
    """VPMADDWD: int32 lanes, each the sum of two products of adjacent int16, exact but for 2^31, which becomes -2^31."""
    return call(f"int32x{lanes}", {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}[lanes], a, b)


def adjacent(table: Any, index: Any, lanes: int) -> Any:
    """(table[i], table[i + 1]) for 8 or 16 int32 lanes of i: int16 vector. table: an int16 buffer."""
    none, first, scale = scalar(0, "int32", lanes), T.address_of(table[0]), 2
    if lanes == WORDS:
        mask = scalar(-1, "int32", lanes)
        found = T.call_llvm_intrin(f"int32x{lanes}", "llvm.x86.avx2.gather.d.d.256", none, first, index, mask, tirx.const(scale, "int8"))
    else:
        mask = scalar(True, "bool", lanes)
        found = T.call_llvm_intrin(f"int32x{lanes}", "llvm.x86.avx512.mask.gather.dpi.512", none, first, index, mask, tirx.const(scale, "int32"))
    return T.bind(T.reinterpret(f"int16x{2 * lanes}", found))


def pairs_of(first: Any, second: Any, lanes: int, width: int = WORDS) -> list[Any]:
    """Two 8-bit vectors of `lanes` as int16 vectors that hold first[i] and second[i] side by side, for `width` of i each."""
    starts = range(0, lanes, width)
    return [T.Cast(f"int16x{2 * width}", shuffle([first, second], [i + j for i in range(s, s + width) for j in (0, lanes)])) for s in starts]
