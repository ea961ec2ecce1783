"""Products by `mma.sync` m16n8k32 whose operands come straight from memory: which bytes a lane of a warp reads, and what its sums are.

A warp multiplies 16 rows by 8 columns, 32 bytes of the reduction at a time. Lane 4 * row + part holds rows `row` and `row + 8` of the left operand and column
`row` of the right one, of both 8 of the 32 bytes, and sums of those two rows and of columns 2 * part and 2 * part + 1. Which 8 bytes is free, as long as both
operands agree: here they are adjacent, 8 * part and on.

A right operand with a row in memory per place of the reduction is read as words of 4 columns, and 4 such words are transposed. Of 32 columns, 4 products
have every fourth: number t has columns t, 4 + t, ..., so that a lane's sums are those of 8 adjacent columns, 8 * part and on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.builder import Emitter, when
from qcompiler.schedules.cuda.base import local, transpose
from qcompiler.schedules.cuda.gemm import call
from qcompiler.schedules.portable.threads import load_words, quarter

ROWS, DEPTH, COLUMNS = 16, 32, 32  # of a warp: rows, bytes of the reduction at a time, columns that are read together
ONES = 0x01010101


class Lane:
    """This thread's place in its warp. `first`: of its 8 bytes of the reduction, and of its 8 columns."""

    def __init__(self, k: Emitter) -> None:
        lane = T.bind(T.bitwise_and(k.thread, T.int32(31)))
        self.row, part = T.bind(T.shift_right(lane, T.int32(2))), T.bitwise_and(lane, T.int32(3))
        self.first = T.bind(part * 8)


def filled(elements: int, value: int = 0) -> Any:
    made = local(elements)
    for i in range(elements):
        T.buffer_store(made, T.int32(value), [i])
    return made


def read_row(to: Any, places: Sequence[int], memory: Any, at: Any, start: Any, limit: int, step: int) -> None:
    """to[places] = bytes start .. start + 7 of a row that begins at byte `at` of an int32 buffer and has `limit` bytes, a multiple of 4; zeros behind them.
    step: bytes by which `at + start` is aligned."""

    def put(first: int, count: int) -> None:
        with when(start + 4 * first < limit if limit % DEPTH else None):
            for place, word in zip(places[first : first + count], load_words(memory, T.bind(at + (start + 4 * first)), count, step), strict=True):
                T.buffer_store(to, word, [place])

    if limit % DEPTH:
        for place in places:
            T.buffer_store(to, T.int32(0), [place])
    if limit % 8:
        put(0, 1)
        put(1, 1)
    else:
        put(0, 2)


def read_columns(to: Any, memory: Any, starts: Sequence[Any], column: Any, limit: int, tile: int = COLUMNS) -> None:
    """to[2 * t], to[2 * t + 1] = the right operand of product t: of columns `column` .. + 3 out of `limit`, a multiple of 4; zeros behind them.
    starts: the bytes of an int32 buffer where the 8 rows of this lane begin. tile: columns of a warp."""
    if limit % tile:
        for i in range(8):
            T.buffer_store(to, T.int32(0), [i])
    with when(column < limit if limit % tile else None):
        for half in (0, 1):
            pixels = [T.bind(memory[quarter(start + column)]) for start in starts[4 * half : 4 * half + 4]]
            for t, word in enumerate(transpose(pixels)):
                T.buffer_store(to, word, [2 * t + half])


def multiply(sums: Any, at: int, left: Any, left_at: int, right: Any, right_at: int, *, unsigned: bool = False) -> None:
    """sums[at .. at + 3] += left[left_at .. + 3] * right[right_at, + 1]. unsigned: the left operand's bytes are. Sum 2 * i + j is of row `row + 8 * i`."""
    places = T.address_of(sums[at]), T.address_of(left[left_at]), T.address_of(right[right_at])
    call("qc_multiply_unsigned" if unsigned else "qc_multiply_matrices", *places)


def over_row(name: str, value: Any) -> Any:
    """The "sum" or the "max" of an int32 of the 4 lanes that have the same rows."""
    return T.bind(T.call_extern("int32", f"qc_row_{name}", value))
