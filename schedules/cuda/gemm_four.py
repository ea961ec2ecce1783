"""Convolution and dense layers with 4-bit weights on a GPU: what differs from `gemm.Gemm`.

Weights stay packed on their way through shared memory, in the order in which lanes hold them (`gemm_plan.pack`), so that a lane reads up to 16 adjacent bytes.
In registers a word of 8 weights becomes two words of bytes, each 16 times a weight: a 4-bit number in the upper half of a byte, in two's complement.

    word & 0xF0F0F0F0   and   (word << 4) & 0xF0F0F0F0

Sums are 16 times what is meant, exactly, and shifted back behind the last step.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.cuda.epilogue import element
from qcompiler.schedules.cuda.gemm import Gemm
from qcompiler.schedules.cuda.gemm_plan import repeated_byte, side

UPPER = repeated_byte(-16)


class FourBitGemm(Gemm):
    """One kernel while it is written."""

    def load_weights(self, right: Any, b: Any, chunk: Any) -> None:
        for j, word in enumerate(self.packed(b, T.shift_right(chunk, T.int32(1)), self.lane, lanes=32, of_part=1)):
            for half, value in enumerate(unpacked(word)):
                T.buffer_store(right, value, [2 * j + half])

    def weight_words(self, b: Any, chunk: Any, x: Any) -> list[list[Any]]:
        words = self.packed(b, chunk, x, lanes=8, of_part=2)
        return [[value for word in words[2 * j : 2 * j + 2] for value in unpacked(word)] for j in range(self.columns)]

    def packed(self, b: Any, number: Any, lane: Any, *, lanes: int, of_part: int) -> list[Any]:
        """The words, `of_part` of each part, that one of `lanes` lanes holds of the warp's weights, which begin at byte b; number: of the `depth` bytes of the
        reduction that are multiplied."""
        width, words = side(self.tile, self.unit) * of_part, self.columns * of_part
        first = T.bind(tirx.truncdiv(b, 4 * width) + number * (words // width * lanes) + lane)
        loaded = [T.bind(self.shared_words[T.ramp(T.bind(first + i * lanes) * width, 1, width)]) for i in range(words // width)]
        return [element(vector, i) for vector in loaded for i in range(width)]

    def add_up(self) -> None:
        for i in range(int(self.sums.shape[0])):
            T.buffer_store(self.sums, T.shift_right(self.sums[i], T.int32(4)), [i])
        super().add_up()


def unpacked(word: Any) -> tuple[Any, Any]:
    """The bytes of the low halves and of the high ones, 16 times each weight."""
    return tuple(T.bind(T.bitwise_and(value, T.int32(UPPER))) for value in (T.shift_left(word, T.int32(4)), word))
