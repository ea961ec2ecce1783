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


def to_bytes(value: Any, zero: Any, dtype: str, lanes: int) -> Any:
    """clip(rint(value) + zero) in `dtype` (int8 or uint8), for a float32 vector with |value| < 2^31 and an int16 scalar. `lanes`: 8, 16 or 32.

    Each of the three saturating steps keeps the sign of an excess, so together they equal one exact saturation. Packs work in halves of a register;
    one permutation of words at the end puts the bytes in order.
    """
    parts = [shuffle([value], range(i, i + WORDS)) for i in range(0, lanes, WORDS)]
    words = [call("int32x8", "llvm.x86.avx.cvt.ps2dq.256", p) for p in parts]  # rounds to nearest even
    pairs = [call("int16x16", "llvm.x86.avx2.packssdw", words[i], words[min(i + 1, len(words) - 1)]) for i in range(0, len(words), 2)]
    pairs = [call("int16x16", "llvm.sadd.sat", p, T.broadcast(zero, 16)) for p in pairs]
    name = f"llvm.x86.avx2.pack{'ss' if dtype == 'int8' else 'us'}wb"
    packed = T.reinterpret("int32x8", call("int8x32", name, pairs[0], pairs[-1]))
    order = [0, 4, 1, 5, 2, 6, 3, 7] if lanes == BYTES else [0, 4, 1, 5]
    return T.reinterpret(f"{dtype}x{lanes}", shuffle([packed], order[: lanes // 4]))


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


def multiply_pairs(a: Any, b: Any) -> Any:
    """VPMADDWD: 8 int32, each the exact sum of two products of adjacent int16."""
    return call("int32x8", "llvm.x86.avx2.pmadd.wd", a, b)


def pairs_of(first: Any, second: Any, lanes: int) -> list[Any]:
    """Two 8-bit vectors of 8 or 16 lanes as int16 vectors of 16 that hold first[i] and second[i] side by side."""
    starts = range(0, lanes, WORDS)
    return [T.Cast("int16x16", shuffle([first, second], [i + j for i in range(s, s + WORDS) for j in (0, lanes)])) for s in starts]
